"""The networks. Importing this package registers them with timm."""

from . import resnet_attn
from .cifar import CifarResNet
from .mechanisms import BACKBONES, MECHANISMS
from .resnet_attn import GRAFT, graft_tags, model_names, parse_name, register_folder, stock_model

__all__ = [
    "BACKBONES",
    "GRAFT",
    "MECHANISMS",
    "CifarResNet",
    "graft_tags",
    "model_names",
    "parse_name",
    "register_folder",
    "resnet_attn",
    "stock_model",
]
