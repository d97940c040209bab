"""Attention that costs little or nothing at inference, as a plugin of timm.

Importing this package registers its models, so that ``timm.create_model("resnet50_dia")`` finds them.
"""

from . import models
from .attach import attach, create_model
from .compare import FoldError
from .fold import FoldReport, NothingToFold, fold, verify_fold
from .freeze import FreezeReport, freeze
from .graft import graft
from .models import model_names, register, register_folder
from .models.grafting import GraftError
from .predict import Prediction, predict
from .record import record
from .version import __version__
from .weights import WeightsError

__all__ = [
    "FoldError",
    "FoldReport",
    "FreezeReport",
    "GraftError",
    "NothingToFold",
    "Prediction",
    "WeightsError",
    "__version__",
    "attach",
    "create_model",
    "fold",
    "freeze",
    "graft",
    "model_names",
    "models",
    "predict",
    "record",
    "register",
    "register_folder",
    "verify_fold",
]
