"""The deployed form of networks whose mechanism depends on the image: norms fused into convolutions."""

from itertools import pairwise
from typing import Any

import torch
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from ..algebra import fuse_conv_norm

#: Exactly these: a subclass, such as timm's norms with an activation, may do more.
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)


def conv_norm_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Paths of each convolution and of the batch norm that follows it with nothing between."""
    modules: dict[str, Any] = dict(model.named_modules())
    paths: list[tuple[str, str]] = []
    for path, module in modules.items():
        prefix = path and f"{path}."
        if isinstance(module, nn.Sequential):
            paths += pairwise(f"{prefix}{name}" for name, _ in module.named_children())
        elif isinstance(module, BasicBlock | Bottleneck):
            paths += [(f"{prefix}conv{i}", f"{prefix}bn{i}") for i in (1, 2, 3)]
        else:  # a network's stem, also where timm has taken its stages out to collect their feature maps
            stem = modules.get(f"{prefix}conv1")
            last = f".{len(stem) - 1}" if isinstance(stem, nn.Sequential) else ""
            paths.append((f"{prefix}conv1{last}", f"{prefix}bn1"))
    return [(a, b) for a, b in paths if type(modules.get(a)) is nn.Conv2d and _fixed(modules.get(b))]


def _fixed(norm: Any) -> bool:
    """Whether it is a batch norm that in eval mode is the same for every batch."""
    return type(norm) in _NORMS and norm.running_mean is not None


def separate_norms(model: nn.Module) -> list[str]:
    """Paths of the batch norms of a network that no convolution takes in: FMM's on identity shortcuts."""
    fused = {norm for _, norm in conv_norm_pairs(model)}
    return [path for path, m in model.named_modules() if isinstance(m, _NORMS) and path not in fused]


def fuse_conv_norms(model: nn.Module) -> int:
    """Fuse every batch norm into the convolution before it, in place; exact in eval mode only.

    The norms become identities and the convolutions get a bias. Returns the number of norms fused.
    """
    pairs = conv_norm_pairs(model)
    for conv_path, norm_path in pairs:
        conv: Any = model.get_submodule(conv_path)
        norm: Any = model.get_submodule(norm_path)
        weight, bias = fuse_conv_norm(
            conv.weight.detach(),
            None if conv.bias is None else conv.bias.detach(),
            norm.running_mean,
            norm.running_var,
            norm.eps,
            torch.ones_like(norm.running_var) if norm.weight is None else norm.weight.detach(),
            torch.zeros_like(norm.running_var) if norm.bias is None else norm.bias.detach(),
        )
        conv.weight.data.copy_(weight)
        conv.bias = nn.Parameter(bias)
        parent, _, name = norm_path.rpartition(".")
        setattr(model.get_submodule(parent), name, nn.Identity())
    return len(pairs)


def folded(model_cls: type[nn.Module], **kwargs: Any) -> nn.Module:
    """Build a network in its deployed form."""
    model = model_cls(**kwargs)
    if not fuse_conv_norms(model):
        raise ValueError("folded=True needs batch norms after convolutions, and this network has none")
    return model
