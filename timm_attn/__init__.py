"""Attention that costs little or nothing at inference, as a plugin of timm.

Importing this package registers its models, so that ``timm.create_model("resnet50_dia")`` finds them.
"""

from . import models
from .fold import FoldError, NothingToFold, fold
from .models import model_names
from .version import __version__

__all__ = ["FoldError", "NothingToFold", "__version__", "fold", "model_names", "models"]
