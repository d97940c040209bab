"""The networks. Importing this package registers them with timm."""

from . import attached, frozen
from .attached import (
    did_you_mean,
    graft_tags,
    known_architecture,
    register,
    register_folder,
    register_graft,
    register_name,
    registering,
)
from .backbones import BACKBONES
from .building import stock_model
from .cifar import CifarResNet, CifarResNetV2
from .mechanisms import MECHANISMS, mechanism
from .status import STATUSES, status
from .variants import GRAFT, graft_obstacle, model_names, parse_name

__all__ = [
    "BACKBONES",
    "GRAFT",
    "MECHANISMS",
    "STATUSES",
    "CifarResNet",
    "CifarResNetV2",
    "attached",
    "did_you_mean",
    "frozen",
    "graft_obstacle",
    "graft_tags",
    "known_architecture",
    "mechanism",
    "model_names",
    "parse_name",
    "register",
    "register_folder",
    "register_graft",
    "register_name",
    "registering",
    "status",
    "stock_model",
]
