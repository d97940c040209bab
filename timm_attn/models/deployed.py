"""The deployed form of networks whose mechanism depends on the image: norms fused into convolutions."""

from typing import Any

from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from ..algebra import fuse_conv_norm


def _pairs(model: nn.Module) -> list[tuple[Any, str, str]]:
    """(parent, name of a convolution, name of the norm that follows it and nothing between)."""
    places: list[tuple[Any, str, str]] = [(model, "conv1", "bn1")]
    for module in model.modules():
        if isinstance(module, BasicBlock | Bottleneck):
            last = 3 if isinstance(module, Bottleneck) else 2
            places += [(module, f"conv{i}", f"bn{i}") for i in range(1, last + 1)]
            if isinstance(module.downsample, nn.Sequential):
                size = len(module.downsample)
                places.append((module.downsample, str(size - 2), str(size - 1)))
    return [
        (parent, conv, norm)
        for parent, conv, norm in places
        if isinstance(getattr(parent, conv, None), nn.Conv2d)
        and isinstance(getattr(parent, norm, None), nn.BatchNorm2d | nn.SyncBatchNorm)
    ]


def separate_norms(model: nn.Module) -> list[str]:
    """Paths of the batch norms of a network that no convolution takes in: FMM's on identity shortcuts."""
    fused = {id(getattr(parent, norm)) for parent, _, norm in _pairs(model)}
    norms = nn.BatchNorm2d | nn.SyncBatchNorm
    return [path for path, m in model.named_modules() if isinstance(m, norms) and id(m) not in fused]


def fuse_conv_norms(model: nn.Module) -> int:
    """Fuse every batch norm into the convolution before it, in place; exact in eval mode only.

    The norms become identities and the convolutions get a bias. Returns the number of norms fused.
    """
    pairs = _pairs(model)
    for parent, conv_name, norm_name in pairs:
        conv, norm = getattr(parent, conv_name), getattr(parent, norm_name)
        weight, bias = fuse_conv_norm(
            conv.weight.detach(),
            None if conv.bias is None else conv.bias.detach(),
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight.detach(),
            norm.bias.detach(),
        )
        conv.weight.data.copy_(weight)
        conv.bias = nn.Parameter(bias)
        setattr(parent, norm_name, nn.Identity())
    return len(pairs)


def folded(model_cls: type[nn.Module], **kwargs: Any) -> nn.Module:
    """Build a network in its deployed form."""
    model = model_cls(**kwargs)
    if not fuse_conv_norms(model):
        raise ValueError("folded=True needs batch norms after convolutions, and this network has none")
    return model
