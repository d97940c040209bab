"""Training: recipe → data → loop → run folder."""

from .evaluation import evaluate
from .loop import resume, train
from .recipe import Recipe
from .seeds import resume_seeds, train_seeds
from .signals import Interrupted
from .validation import load_model, validate

__all__ = [
    "Interrupted",
    "Recipe",
    "evaluate",
    "load_model",
    "resume",
    "resume_seeds",
    "train",
    "train_seeds",
    "validate",
]
