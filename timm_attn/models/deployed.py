"""The deployed form of networks whose mechanism depends on the image: norms fused into convolutions."""

from itertools import pairwise
from typing import Any

from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.resnetv2 import PreActBasic, PreActBottleneck
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_weights
from torchvision.ops import FrozenBatchNorm2d

from ..compare import double

#: Exactly these: a subclass, such as timm's norms with an activation, may do more.
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)
_NORM_TENSORS = ("running_mean", "running_var", "weight", "bias")


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
        elif isinstance(module, PreActBasic | PreActBottleneck):
            last = f"{prefix}conv{3 if isinstance(module, PreActBottleneck) else 2}"
            paths += [(last, f"{prefix}{name}") for name in ("dia_norm", "fmm_branch_norm")]
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
    pairs = _pairs_and_eps(model)
    state = fuse_state(dict(model.state_dict()), pairs)
    for conv_path, norm_path, _ in pairs:
        conv: Any = model.get_submodule(conv_path)
        conv.weight.data.copy_(state[f"{conv_path}.weight"])
        conv.bias = nn.Parameter(state[f"{conv_path}.bias"])
        parent, _, name = norm_path.rpartition(".")
        setattr(model.get_submodule(parent), name, nn.Identity())
    return len(pairs)


def fuse_state(state: dict[str, Tensor], pairs: list[tuple[str, str, float]]) -> dict[str, Tensor]:
    """The state dict of a network whose norms are fused, from that of the one whose are not.

    Args:
        state: Left as it is.
        pairs: Paths of each convolution and the batch norm after it, and the norm's ε.
    """
    state = dict(state)
    for conv, norm, eps in pairs:
        state.pop(f"{norm}.num_batches_tracked", None)
        kernel = state[f"{conv}.weight"]
        tensors = [kernel, state.get(f"{conv}.bias")]
        tensors += [state.pop(f"{norm}.{name}", None) for name in _NORM_TENSORS]
        # In float64, and rounded once to the dtype that came in.
        weight, bias, mean, var, gamma, beta = (t if t is None else double(t) for t in tensors)
        assert weight is not None and mean is not None and var is not None
        fused = fuse_conv_bn_weights(weight, bias, mean, var, eps, gamma, beta)
        for name, tensor in zip(("weight", "bias"), fused, strict=True):
            state[f"{conv}.{name}"] = tensor.detach().to(kernel)
    return state


def has_norms(state: dict[str, Tensor], pairs: list[tuple[str, str, float]]) -> bool:
    """Whether a state dict holds a network whose norms are not fused."""
    return bool(pairs) and all(f"{norm}.running_mean" in state for _, norm, _ in pairs)


def _pairs_and_eps(model: nn.Module) -> list[tuple[str, str, float]]:
    return [(conv, norm, model.get_submodule(norm).eps) for conv, norm in conv_norm_pairs(model)]  # pyright: ignore


def folded(model_cls: type[nn.Module], **kwargs: Any) -> nn.Module:
    """Build a network in its deployed form; ``fused_pairs`` says what was fused."""
    model: Any = model_cls(**kwargs)
    model.fused_pairs = _pairs_and_eps(model)
    if not fuse_conv_norms(model):
        raise ValueError("folded=True needs batch norms after convolutions, and this network has none")
    return model
