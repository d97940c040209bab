"""Training: recipe → data → loop → run folder."""

from ..errors import extra

with extra("train"):
    from .evaluation import evaluate
    from .loop import resume, train
    from .recipe import Recipe
    from .seeds import resume_seeds, train_seeds
    from .signals import Interrupted
    from .validation import validate

__all__ = [
    "Interrupted",
    "Recipe",
    "evaluate",
    "resume",
    "resume_seeds",
    "train",
    "train_seeds",
    "validate",
]
