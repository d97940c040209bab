"""Constants into the layers around them."""

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .affine import consumers, reading_weights, scaling_parameters
from .branches import for_autograd, leaves_of
from .compare import BOUNDS, FoldError, double, relative_difference
from .ends import scale
from .gates import Gate, gate_modules
from .layers.frozen import FrozenGate
from .models.frozen import remove_gate, stock_network


@dataclass(frozen=True)
class _Taker:
    """What takes in a constant: rows of parameters before the gate, or inputs of weights after it.

    Attributes:
        rows: Names of parameters whose first axis is the gate's channels.
        inputs: Names of weights that read them, and their numbers of groups.
    """

    rows: Sequence[str] = ()
    inputs: Sequence[tuple[str, int]] = ()

    @property
    def layer(self) -> str:
        """Path of the first of the layers."""
        names = [*self.rows, *(name for name, _ in self.inputs)]
        return names[0].rpartition(".")[0]

    def take_in(self, network: nn.Module, constant: Tensor) -> None:
        """Multiply by the constant, in place."""
        if self.rows:
            scale(network, self.rows, constant, len(constant))
        for name, groups in self.inputs:
            _scale_inputs(network.get_parameter(name), constant, groups)


@torch.no_grad()
def build_frozen(original: Any, constants: dict[Gate, Tensor], images: Tensor) -> tuple[Any, dict[Gate, str]]:
    """A copy with some gates constant, absorbed where a layer takes them in; and what did."""
    held_by = deepcopy(original)
    gates = _last_first(constants)
    for gate in gates:
        remove_gate(held_by, gate.path, _constant(gate, constants[gate], images))
    plan = _plan(held_by, gates, images)

    def absorbed(some: dict[Gate, _Taker]) -> Any:
        network = deepcopy(original)
        for gate in gates:
            remove_gate(
                network, gate.path, None if gate in some else _constant(gate, constants[gate], images)
            )
        for gate, taker in some.items():
            taker.take_in(network, constants[gate])
        return network

    network = absorbed(plan)
    if not _same(held_by, network, images):  # what the graph does not show: a weight in two places, say
        plan = {
            gate: taker for gate, taker in plan.items() if _same(held_by, absorbed({gate: taker}), images)
        }
        network = absorbed(plan)
        if not _same(held_by, network, images):
            plan, network = {}, absorbed({})
    where = {gate: f"in {plan[gate].layer}" if gate in plan else "a multiplication" for gate in gates}
    return network.eval(), where


def _last_first(gates: Iterable[Gate]) -> list[Gate]:
    """Gates that share a cell go from the last to the first."""
    return sorted(gates, key=lambda gate: -gate.run.index(gate.path) if gate.run else 0)


def _constant(gate: Gate, value: Tensor, like: Tensor) -> FrozenGate:
    module = FrozenGate(gate.channels, gate.axis, device=like.device, dtype=like.dtype)
    module.gate.copy_(value)
    return module


def _same(a: nn.Module, b: nn.Module, images: Tensor) -> bool:
    if images.device.type != "cpu":  # GPUs round convolutions to TF32, by more than the bound
        a, b, images = deepcopy(a).cpu(), deepcopy(b).cpu(), images.cpu()
    try:
        return relative_difference(a, b, images) <= BOUNDS[images.dtype]
    except FoldError:
        return False


def _plan(model: nn.Module, gates: list[Gate], images: Tensor) -> dict[Gate, _Taker]:
    """What takes in each constant, where there is something that does."""
    maps: dict[int, tuple[Tensor, Tensor]] = {}
    modules = {}
    for gate in gates:
        module: Any = model.get_submodule(gate.path)
        modules[gate] = module[0] if isinstance(module, nn.Sequential) else module
    hooks = [
        module.register_forward_hook(lambda m, args, y: maps.__setitem__(id(m), (args[0], y)))
        for module in modules.values()
    ]
    plan: dict[Gate, _Taker] = {}
    with leaves_of(model, None) as names:
        for module in modules.values():
            module.gate.requires_grad_(False)  # a gate before another is no layer that takes it in
        try:
            output = model(for_autograd(images))
        finally:
            for hook in hooks:
                hook.remove()
        readers = consumers([t.grad_fn for t in tree_leaves(output) if torch.is_tensor(t) and t.grad_fn])
        for gate, module in modules.items():
            if id(module) not in maps or (module.gate < 0).any():
                continue
            x, y = maps[id(module)]
            if len(readers.get(x.grad_fn, [])) == 1:
                found = scaling_parameters(x, names, readers)[1]
                if found:
                    plan[gate] = _Taker(rows=found)
                    continue
            weights = reading_weights(y.grad_fn, gate.channels, readers)
            unique = {id(leaf): (names.get(id(leaf), ""), groups) for leaf, groups in weights}
            if unique and all(name for name, _ in unique.values()):
                plan[gate] = _Taker(inputs=list(unique.values()))
    return plan


def _scale_inputs(weight: Tensor, v: Tensor, groups: int) -> None:
    """Multiply a weight, O × C / groups (× kernel), by v along its C inputs, in place."""
    parts = double(weight.detach()).unflatten(0, (groups, -1))
    factor = double(v).to(parts.device).view(groups, 1, -1, *[1] * (weight.dim() - 2))
    weight.copy_((parts * factor).flatten(0, 1))


def named_network(
    network: Any, original: Any, chosen: Sequence[Gate], where: dict[Gate, str], images: Tensor
) -> Any:
    """The same as an architecture that timm builds by name and that computes the same, or None."""
    cfg = getattr(original, "pretrained_cfg", None)
    if not isinstance(cfg, dict) or not timm.is_model(str(cfg.get("architecture"))):
        return None
    arguments = {**getattr(original, "_model_args", {}), "num_classes": original.num_classes}
    backbone, paths = cfg["architecture"], list(gate_modules(original))
    numbers, multiplied = [*range(len(paths))], []
    if backbone == "frozen":  # some of its backbone's gates are gone already
        backbone = arguments.pop("backbone", None)
        numbers, multiplied = (arguments.pop(key, ()) for key in ("kept", "multiplied"))
    if len(numbers) != len(paths):  # of a network that was changed since it was made
        return None
    numbered = dict(zip(paths, sorted(numbers), strict=True))
    gone = {gate.path: gate for gate in chosen}
    multiplied = [
        *multiplied,
        *(
            [number, gone[path].channels, gone[path].axis]
            for path, number in numbered.items()
            if path in gone and where[gone[path]] == "a multiplication"
        ),
    ]
    if gone.keys() == set(paths) and not multiplied:
        stock = stock_network(network, backbone, arguments)
        if stock is not None and _same(network, stock, images):
            return stock
    kept = [number for path, number in numbered.items() if path not in gone]
    try:
        named: Any = timm.create_model(
            "frozen", backbone=backbone, kept=kept, multiplied=multiplied, **arguments
        )
        named.to(next(network.parameters())).load_state_dict(network.state_dict())
    except (TypeError, ValueError, RuntimeError):  # a network that was changed since it was made
        return None
    named.pretrained_cfg = named.default_cfg = {**cfg, "architecture": "frozen", "tag": None}
    named._model_args |= {k: v for k, v in arguments.items() if k != "num_classes"}
    return named.eval() if _same(network, named, images) else None
