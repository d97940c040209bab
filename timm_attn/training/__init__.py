"""Training: recipe → data → loop → run folder."""

from .loop import evaluate, resume, train
from .recipe import Recipe
from .validate import load_model, validate

__all__ = ["Recipe", "evaluate", "load_model", "resume", "train", "validate"]
