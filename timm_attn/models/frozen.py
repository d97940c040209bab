"""Networks some of whose channel gates are gone: the architecture ``frozen``, of a backbone."""

import re
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from .. import weights
from ..dia_end import DIAEnd
from ..ends import BranchEnd
from ..layers.frozen import FrozenGate
from .attached import overwriting, register_name
from .building import feature_cfg, saved_options
from .variants import model_names, parse_name


def remove_gate(model: nn.Module, path: str, constant: FrozenGate | None = None) -> None:
    """Take a gate out of a network, in place, or put a constant where it was.

    Args:
        model: With a gate at ``path``, as ``timm_attn.record.find_gates`` names it. Of the gates that
            share a cell, the last goes first.
        path: Of the module that multiplies.
        constant: What multiplies now.
    """
    gate: Any = model.get_submodule(path)
    parent, _, name = path.rpartition(".")
    if isinstance(gate, DIAEnd):
        left = gate.inner if constant is None else nn.Sequential(constant, gate.inner or nn.Identity())
        setattr(model.get_submodule(parent), name, left or (nn.Identity() if gate.new_norm else None))
        gate.run.steps -= 1
        if not gate.run.steps:
            delattr(gate.home, gate.key)
        return
    for end in model.modules():
        if isinstance(end, BranchEnd) and end.mechanism is gate:
            end.replace(constant)
            return
    setattr(model.get_submodule(parent), name, nn.Identity() if constant is None else constant)


def frozen_network(
    backbone: str, kept: Sequence[int] = (), multiplied: Sequence[Sequence[int]] = (), **kwargs: Any
) -> nn.Module:
    """A network with some of its gates.

    Args:
        backbone: Name of an architecture.
        kept: Numbers of the gates that stay, in the order of the network's modules.
        multiplied: (number, channels, axis) of those that are a multiplication by a constant.
        kwargs: Of the architecture.

    Raises:
        ValueError: There is no such network, or no such gate.
    """
    from ..gates import gate_modules  # which looks at networks of this package

    if not isinstance(backbone, str) or not register_name(backbone):
        raise ValueError(f"frozen needs the name of a network as backbone=, got {backbone!r}")
    model = timm.create_model(backbone, **kwargs)
    paths = list(gate_modules(model))
    constants = {number: (channels, axis) for number, channels, axis in multiplied}
    wrong = [i for i in (*kept, *constants) if isinstance(i, bool) or i not in range(len(paths))]
    if wrong:
        raise ValueError(f"{backbone} has {len(paths)} gates, numbered from 0: there is no gate {wrong[0]!r}")
    like = {name: kwargs.get(name) for name in ("device", "dtype")}
    for i, path in reversed(list(enumerate(paths))):
        if i not in kept:
            remove_gate(model, path, FrozenGate(*constants[i], **like) if i in constants else None)
    return model


# timm reads this table while it registers an entry point.
_CFGS: dict[str, Any] = weights.pretrained_cfgs("frozen") or {"frozen": {}}
default_cfgs = generate_default_cfgs(_CFGS)


@register_model
def frozen(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A network without some of its gates, as ``timm-attn freeze`` makes it; see ``frozen_network``."""
    saved = weights.resolve("frozen", kwargs) if pretrained else {}
    kwargs |= saved
    backbone = kwargs.pop("backbone", None)
    gates = {name: kwargs.pop(name, ()) for name in ("kept", "multiplied")}
    build: Any = partial(frozen_network, backbone, **gates)
    if kwargs.get("features_only") and register_name(str(backbone)):
        kwargs["feature_cfg"] = feature_cfg(str(backbone), kwargs) | kwargs.pop("feature_cfg", {})
    model: Any = build_model_with_cfg(build, "frozen", pretrained, **kwargs)
    if not pretrained:
        cfg: Any = timm.models.get_pretrained_cfg(str(backbone))
        fields = cfg.to_dict(remove_source=True) | {"architecture": "frozen", "tag": None}
        fields["num_classes"] = kwargs.get("num_classes", fields["num_classes"])
        model.pretrained_cfg = model.default_cfg = fields
    made_of = {"backbone": backbone, **{name: list(value) for name, value in gates.items()}}
    model._model_args = saved_options(saved) | made_of
    return model


def register_again() -> None:
    """Let timm know the checkpoints that there are by now."""
    cfgs: dict[str, Any] = weights.pretrained_cfgs("frozen")
    default_cfgs.update(generate_default_cfgs(cfgs))
    with overwriting():
        register_model(frozen)


def without_gates(architecture: str, arguments: dict[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    """Names and arguments of networks that may be an architecture without its gates."""
    yield architecture, arguments  # gates may have been attached to it
    if architecture in model_names():
        yield parse_name(architecture)[0], arguments
    for name in (
        re.sub(r"(?:se|eca_?|gc)(?=(?:res|bot|halo))", "", architecture),
        re.sub(r"^(?:se|eca|gc)_?(?=\w)", "", architecture),
        architecture.removesuffix("_se"),
    ):
        if name != architecture and timm.is_model(name):
            yield name, arguments
    if timm.is_model(architecture) and "regnet" in architecture:
        yield architecture, {**arguments, "se_ratio": 0.0}


@torch.no_grad()
def stock_network(model: Any, architecture: str, arguments: dict[str, Any]) -> Any:
    """A network that is built by a name of timm's or this package's and has the same keys, or None.

    Args:
        model: Without gates, with the weights that the result gets.
        architecture: What it was when it had gates.
        arguments: That it was made with.
    """
    state: dict[str, Tensor] = model.state_dict()
    shapes = {key: tensor.shape for key, tensor in state.items()}
    for name, given in without_gates(architecture, arguments):
        try:
            stock: Any = timm.create_model(name, **given)
        except (TypeError, ValueError, RuntimeError):  # an argument of the one that the other does not know
            continue
        if {key: tensor.shape for key, tensor in stock.state_dict().items()} == shapes:
            stock.to(next(model.parameters())).load_state_dict(state)
            cfg = {**model.pretrained_cfg, "architecture": name, "tag": None}
            stock.pretrained_cfg = stock.default_cfg = cfg
            stock._model_args = {k: v for k, v in given.items() if k != "num_classes"}
            return stock.eval()
    return None
