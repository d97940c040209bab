"""Turns stock weights into weights of a variant with the same outputs.

The gate of the variant is made constant, and the parameters before or after it are divided by it.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from timm.layers import EcaModule, SEModule
from torch import Tensor, nn

from ..branches import ATTENTION, branches, example_input
from ..compare import double
from ..dia_end import DIAEnd
from ..ends import BranchEnd, GatedInput, GatedNorm, GateEnd, scale_parameters
from ..layers import ConAM


class GraftError(ValueError):
    """A variant cannot be made from these stock weights."""


@torch.no_grad()
def start_constant(model: nn.Module, stock: Iterable[str]) -> None:
    """Let the gates of a network with stock weights start as constants that other parameters undo, in place.

    Args:
        stock: Keys of the stock network's state dict. Attention that ends a branch in timm's own place for
            it, and is not among them, is new.

    Raises:
        GraftError: A gate cannot be made constant, or nothing undoes it; the network is then half changed.
    """
    stock = set(stock)
    new = [path for path, _ in model.named_modules() if path.rpartition(".")[2] in ATTENTION]
    new = [path for path in new if not any(key.startswith(f"{path}.") for key in stock)]
    for branch in branches(model, example_input(model, 1)) if new else ():
        place = f"{branch.block}.{branch.attention}"
        if not branch.attention or branch.calls > 1 or place not in new:
            continue
        if not isinstance(model.get_submodule(place), GatedInput):
            block = model.get_submodule(branch.block)
            _undo(place, BranchEnd(block, replace(branch, attention=""), branch.attention))
    for path, module in model.named_modules():
        if isinstance(module, BranchEnd):
            _undo(path, module)
        elif isinstance(module, GatedInput):
            _undo(path, module.gate_end[0])
        elif isinstance(module, GatedNorm):
            module.scale(1 / module.gate())
        elif isinstance(module, ConAM):
            block = model.get_submodule(path.rpartition(".")[0])
            block.conv1.weight.copy_(double(block.conv1.weight) / _equal_patches(module))  # pyright: ignore


def _undo(path: str, end: BranchEnd) -> None:
    layer = end.mechanism
    if isinstance(end, DIAEnd) and end.new_norm:
        norm: Any = end.block.get_submodule(end.norm)
        norm.running_var.fill_(1 - norm.eps)  # with which it changes nothing in eval mode
    if isinstance(end, GateEnd):
        gate = layer.gate()
    elif hasattr(layer, "start_constant"):
        gate = layer.start_constant()
    elif isinstance(layer, SEModule | EcaModule):
        last = layer.fc2 if isinstance(layer, SEModule) else layer.conv
        for parameter in last.parameters():
            parameter.zero_()
        gate = 0.5
    else:
        raise GraftError(f"{path}: nobody has said how {type(layer).__name__} starts as a constant gate")
    if end.branch.prefix and not end.all_tokens:
        raise GraftError(f"{path}: the gate leaves the class token as it is, so that no scale undoes it")
    if end.branch.attention and not isinstance(end, GateEnd):
        raise GraftError(
            f"{path} cannot be grafted: {end.branch.attention} ends the branch, and lets no scale through"
        )
    try:
        scale_parameters(end.block, end.branch, 1 / double(torch.as_tensor(gate)))
    except ValueError as error:
        raise GraftError(f"{path} cannot be grafted: {error}") from None


def _equal_patches(layer: ConAM) -> float:
    """Let all patches look alike, so that each has confidence 1 / patches; what that multiplies the map by.

    fc2 gives the same vector c · 1 whatever comes in, with c = 1 / √C above zero so that gradients pass the
    ReLU.
    """
    if layer.patch_size is not None:
        raise GraftError(
            f"ConAM with patch_size={layer.patch_size} cannot be grafted: the number of patches depends on "
            "the image, so no scale undoes their weights. Use grid"
        )
    nn.init.zeros_(layer.fc2.weight)
    nn.init.constant_(layer.fc2.bias, layer.fc2.bias.shape[0] ** -0.5)
    return 1 + 1 / layer.grid**2


def key_difference(have: Iterable[str], want: Iterable[str], classifier: tuple[str, ...] = ()) -> str:
    """What is missing from and unexpected in the keys of a checkpoint, the classifier's aside, or ''."""
    differences = set(want) - set(have), set(have) - set(want)
    missing, unexpected = (sorted(k for k in keys if not k.startswith(classifier)) for keys in differences)
    if not missing and not unexpected:
        return ""
    counts = f"({len(missing)} in all)", f"({len(unexpected)} in all)"
    return f"missing {missing[:5]} {counts[0]}, unexpected {unexpected[:5]} {counts[1]}"


def classifier_keys(cfg: dict[str, Any], *others: str) -> tuple[str, ...]:
    """What the keys of the classifiers of a network begin with, and of what other fields of ``cfg`` name."""
    names: list[str] = []
    for field in ("classifier", *others):
        value = cfg.get(field) or ()
        names += [value] if isinstance(value, str) else value
    return tuple(f"{name}." for name in names)


def load_stock(model: Any, state: dict[str, Tensor], stock: Iterable[str]) -> None:
    """Load the weights of the stock network into a variant; what is the variant's own stays.

    Args:
        stock: Keys of the stock network's state dict.

    Raises:
        GraftError: A key outside the classifier is missing or unexpected, or a tensor has another shape.
    """
    # Frozen norms do not count their batches.
    wanted, given = ({k for k in keys if not k.endswith("num_batches_tracked")} for keys in (stock, state))
    misfit = key_difference(given, wanted, classifier_keys(model.pretrained_cfg))
    state_dict = model.state_dict()
    fitting = {k: v for k, v in state.items() if k in state_dict and state_dict[k].shape == v.shape}
    ends = classifier_keys(model.pretrained_cfg, "first_conv")
    wrong = [k for k in wanted & given - fitting.keys() if not k.startswith(ends)]
    if wrong:
        given_shape, shape = (tuple(tensors[wrong[0]].shape) for tensors in (state, state_dict))
        misfit += f" {wrong[0]} has the shape {given_shape}, not {shape}"
    if misfit:
        raise GraftError(f"the weights are not those of the stock network: {misfit}")
    model.load_state_dict(fitting, strict=False)


def graft_description(source: str) -> str:
    """What a grafted model's configuration says of it."""
    return f"Grafted from {source}, which was trained without this mechanism; the graft adds it untrained."
