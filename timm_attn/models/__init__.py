"""The networks. Importing this package registers them with timm."""

from . import attached, frozen
from .attached import (
    GRAFT,
    did_you_mean,
    graft_obstacle,
    graft_tags,
    known_architecture,
    model_names,
    parse_name,
    register,
    register_folder,
    register_graft,
    register_name,
    registering,
    stock_model,
)
from .backbones import BACKBONES
from .cifar import CifarResNet, CifarResNetV2
from .mechanisms import MECHANISMS, mechanism
from .status import STATUSES, status

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
