"""Training: recipe → data → loop → run folder."""

from .evaluation import evaluate
from .loop import resume, train
from .recipe import Recipe
from .validation import load_model, validate

__all__ = ["Recipe", "evaluate", "load_model", "resume", "train", "validate"]
