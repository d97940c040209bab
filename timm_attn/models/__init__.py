"""The networks. Importing this package registers them with timm."""

from . import attached
from .attached import GRAFT, graft_tags, model_names, parse_name, register_folder, stock_model
from .backbones import BACKBONES
from .cifar import CifarResNet
from .mechanisms import MECHANISMS

__all__ = [
    "BACKBONES",
    "GRAFT",
    "MECHANISMS",
    "CifarResNet",
    "attached",
    "graft_tags",
    "model_names",
    "parse_name",
    "register_folder",
    "stock_model",
]
