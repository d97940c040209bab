"""Where a mechanism stands in a network: at the ends of its residual branches, or in its norm layers."""

import warnings
from collections.abc import Sequence
from typing import Any

from timm.layers import RmsNorm, RmsNorm2d, SimpleNorm, SimpleNorm2d
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from ..branches import Branch, branches, first_parameter
from ..ends import BranchEnd, GatedInput, GateEnd, mixed
from ..merging import gates_first

NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    RmsNorm,
    RmsNorm2d,
    SimpleNorm,
    SimpleNorm2d,
)


def like(model: nn.Module) -> dict[str, Any]:
    """Device and dtype for what is put into a network."""
    parameter = first_parameter(model)
    return {"device": parameter.device, "dtype": parameter.dtype}


def branches_with_own_slots(model: nn.Module, images: Any) -> list[Branch]:
    """The branches that have a slot of their own, where a mechanism can read what leaves them.

    Raises:
        ValueError: There are none.
    """
    found = _found(model, images)
    return _without(
        [branch for branch in found if branch.calls > 1],
        found,
        "the residual branches of {name} share their slots for stochastic depth (such as {first}), so that "
        "only a constant gate can stand there: try asr",
        "{left} of {all} slots for stochastic depth of {name} get nothing, as several residual branches pass "
        "them, such as {first}",
        type(model).__name__,
    )


def branches_taking_gates(model: nn.Module, images: Any) -> list[Branch]:
    """The branches that end in what takes in a constant gate.

    Raises:
        ValueError: There are none.
    """
    found = _found(model, images)
    return _without(
        [branch for branch in found if not branch.affine],
        found,
        "the residual branches of {name} end in nothing that takes in a constant gate (such as {first}): asr "
        "takes where='norms' there",
        "{left} of {all} residual branches of {name} get no gate, as they end in nothing that takes it in, "
        "such as {first}",
        type(model).__name__,
    )


def _found(model: nn.Module, images: Any) -> list[Branch]:
    found = branches(model, images)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no residual branch that ends in a slot for stochastic depth "
            "(drop_path): asr takes where='norms' there"
        )
    return found


def _without(left: list[Branch], found: list[Branch], none: str, some: str, name: str) -> list[Branch]:
    """The branches that are not left out; raises if all are, and warns if some are."""
    if not left:
        return found
    words = {"name": name, "left": len(left), "all": len(found), "first": f"{left[0].block}.{left[0].slot}"}
    if len(left) == len(found):
        raise ValueError(none.format(**words))
    warnings.warn(some.format(**words), stacklevel=5)
    return [branch for branch in found if branch not in left]


def stand(model: nn.Module, ends: Sequence[tuple[Branch, str, nn.Module]], make: Any = BranchEnd) -> None:
    """Put modules at the ends of branches, registered in the block under the mechanism's name."""
    for branch, key, module in ends:
        block = model.get_submodule(branch.block)
        module.train(block.training)
        # timm's own place: ``se`` in the block of a ResNet. Elsewhere it may be in the middle of the branch.
        if isinstance(block, BasicBlock | Bottleneck) and getattr(block, key, model) is None:
            setattr(block, key, module)
            model.attached = key  # pyright: ignore[reportArgumentType]
            continue
        end = make(block, branch, free_name(block, key + branch.suffix), module)
        if make is GateEnd and branch.attention:
            attention: Any = block.get_submodule(branch.attention)
            attention.__class__ = mixed(GatedInput, type(attention))
            attention.gate_end, end.inner = (end,), None
        else:
            setattr(block, branch.slot, end.train(block.training))
    gates_first(model)


def free_name(block: nn.Module, name: str) -> str:
    """A name for a child that a block has not used for anything else."""
    return f"branch_{name}" if hasattr(block, name) else name


def norm_layers(model: nn.Module) -> list[Any]:
    """The norm layers of a network that have a weight for each channel."""
    norms: list[Any] = [module for module in model.modules() if isinstance(module, NORMS)]
    return [norm for norm in norms if norm.weight is not None and norm.weight.dim() == 1]
