"""The channel gates of a network: which modules they are, and what they multiply by."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatch
from importlib import import_module
from typing import Any

import torch
from timm.layers import (
    CecaModule,
    EcaModule,
    EffectiveSEModule,
    GatherExcite,
    GlobalContext,
    SEModule,
    get_attn,
)
from timm.layers.cbam import ChannelAttn
from timm.layers.squeeze_excite import SqueezeExciteCl
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

from .branches import evaluating
from .compare import double
from .dia_end import DIAEnd
from .ends import BranchEnd, GatedInput
from .layers import SEM, SPEM


def _private(module: str, name: str) -> tuple[type, ...]:
    """A class of one of timm's model files, where any may be renamed; then it is no longer known here."""
    try:
        return (getattr(import_module(f"timm.models.{module}"), name),)
    except (ImportError, AttributeError):
        return ()


#: Layers that multiply each channel of a feature map by one number for each image.
GATES = (
    *(SEModule, EffectiveSEModule, SqueezeExciteCl),
    *_private("_efficientnet_blocks", "SqueezeExcite"),
    *_private("senet", "SEModule"),
    *_private("rdnet", "BlockESE"),
    *_private("hgnet", "EseModule"),
    *(EcaModule, CecaModule, GatherExcite, GlobalContext, ChannelAttn),
    *(SqueezeExcitation, SEM, SPEM, DIAEnd),
)


@dataclass(frozen=True)
class Gate:
    """A channel gate of a network.

    Attributes:
        path: Path of the gate's module.
        kind: Name of its class.
        channels: Number of channels C of the feature map.
        axis: Axis of the channels: 1 for B × C × H × W, −1 for B × N × C or B × H × W × C.
        run: Paths of the gates that share a recurrent cell, in the order in which they run; for DIA only.
    """

    path: str
    kind: str
    channels: int
    axis: int = 1
    run: tuple[str, ...] = ()

    @property
    def later(self) -> tuple[str, ...]:
        """Paths of the gates of its run that come after it, and read what it leaves."""
        return self.run[self.run.index(self.path) + 1 :] if self.run else ()


def gate_modules(model: nn.Module, also: Iterable[type | str] = ()) -> dict[str, nn.Module]:
    """Modules that may be channel gates, by path, in the order of the network's modules.

    Args:
        also: Further classes, or paths of modules.

    Raises:
        ValueError: A path names no module of the network.
    """
    if isinstance(also, str):
        raise TypeError(f"further gates are a list, got {also!r}")
    also = tuple(also)
    kinds = (*GATES, *(kind for kind in also if isinstance(kind, type)))
    known = {path: m for path, m in model.named_modules() if isinstance(m, kinds) or path in also}
    missing = [name for name in also if isinstance(name, str) and name not in known]
    if missing:
        paths = [path for path, _ in model.named_modules()]
        near = [path for path in paths if path.endswith(missing[0].rpartition(".")[2])][:3]
        near = near or get_close_matches(missing[0], paths, n=3)
        raise ValueError(f"no module {missing[0]!r} in {type(model).__name__}: name one such as {near}")
    return known


@torch.no_grad()
def find_gates(
    model: nn.Module, images: Any, also: Iterable[type | str] = ()
) -> tuple[list[Gate], dict[str, str]]:
    """Find the channel gates of a network, and modules that look like gates but are not, or are not known.

    A gate multiplies all pixels of a channel by one number for each image. This is tested on the images, in
    eval mode.

    Args:
        model: Left unchanged.
        images: B × C × H × W, two or more that differ.
        also: Further classes, or paths, of modules that are channel gates.

    Returns:
        The gates, in the order in which they run; and the path of every other candidate, with the reason.

    Raises:
        ValueError: A path names no module of the network.
    """
    also = tuple(also)
    known = gate_modules(model, also)
    attention = tuple({kind for name in _ATTENTION if isinstance(kind := get_attn(name), type)})
    seen: dict[str, Any] = {}
    calls: dict[str, int] = {}

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], y: Any) -> None:
            calls[path] = calls.get(path, 0) + 1
            seen[path] = _as_gate(module, args[0] if args else None, y)

        return hook

    candidates = {
        path: module
        for path, module in model.named_modules()
        if path in known or (path and not type(module).__module__.startswith("torch."))
    }
    hooks = [module.register_forward_hook(watch(path)) for path, module in candidates.items()]
    try:
        with evaluating(model):
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    gates, others = [], {}
    for path, found in seen.items():
        module = candidates[path]
        if path in known and calls[path] > 1:
            others[path] = f"{type(module).__name__} acts in {calls[path]} places"
        elif path in known and found is not None:
            gates.append(_gate(path, module, found))
        elif path in known or isinstance(module, attention):
            others[path] = f"{type(module).__name__} is no channel gate: it does more than scale channels"
        elif isinstance(module, BranchEnd) or any(_within(path, other) for other in known):
            continue  # which only holds one
        elif found is not None and found[2]:
            others[path] = (
                f"{type(module).__name__} scales channels but is not known: name it to have it frozen"
            )
    return with_runs(model, gates), others


def gate_in(path: str, module: nn.Module, x: Any, y: Any) -> Gate | None:
    """The gate that a module of a known class is, by what it makes of an input; None if it is none."""
    found = _as_gate(module, x, y)
    return None if found is None else _gate(path, module, found)


def _gate(path: str, module: nn.Module, found: tuple[int, int, bool]) -> Gate:
    kind = type(getattr(module, "mechanism", module))
    kind = kind.__mro__[2] if issubclass(kind, GatedInput) else kind
    return Gate(path, kind.__name__, *found[:2])


def matching(paths: Sequence[str], patterns: Sequence[str], option: str) -> set[str]:
    """The paths of gates that shell patterns name.

    Args:
        paths: Of the gates.
        patterns: Such as ``layer3.*``.
        option: Where they were given, for the message.

    Raises:
        ValueError: A pattern names no gate.
    """
    for pattern in patterns:
        if not any(fnmatch(path, pattern) for path in paths):
            near = get_close_matches(pattern, paths, n=3, cutoff=0.4) or list(paths[:3])
            raise ValueError(f"{option} {pattern!r} names no gate: gates are {', '.join(near)} …")
    return {path for path in paths if any(fnmatch(path, pattern) for pattern in patterns)}


def _within(a: str, b: str) -> bool:
    """Whether one of two modules holds the other."""
    return f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.")


_ATTENTION = (
    "se",
    "ese",
    "eca",
    "ecam",
    "ceca",
    "ge",
    "gc",
    "gca",
    "cbam",
    "lcbam",
    "sk",
    "splat",
    "nl",
    "bat",
)


def with_runs(model: nn.Module, gates: list[Gate]) -> list[Gate]:
    """The same, with the gates that share a cell named in each."""
    runs: dict[int, list[str]] = {}
    for gate in gates:
        end: Any = model.get_submodule(gate.path)
        if isinstance(end, DIAEnd):
            runs.setdefault(id(end.run), []).append(gate.path)
    by_path = {path: tuple(run) for run in runs.values() for path in run}
    return [Gate(g.path, g.kind, g.channels, g.axis, by_path.get(g.path, ())) for g in gates]


def _as_gate(module: nn.Module, x: Any, y: Any) -> tuple[int, int, bool] | None:
    """Width, axis of the channels, and whether images differ, if a module's output is a gated input."""
    if not (torch.is_tensor(x) and torch.is_tensor(y)) or x.shape != y.shape or x.dim() not in (3, 4):
        return None
    axes = (1, -1) if x.dim() == 4 else (-1,)
    if isinstance(module, BranchEnd):  # of a gate that is the same for all channels, the map does not tell it
        axes = (module.branch.axis,)
    elif isinstance(module, SqueezeExciteCl):
        axes = (-1,)
    for axis in axes:
        gate, rest = gate_of(x, y, axis)
        # The rounding of the product, squared, or that of the sums.
        if rest <= max(4 * torch.finfo(y.dtype).eps ** 2, 1e-14) * max(10, x[0].numel() / gate.shape[1]):
            differs = bool((gate - gate[:1]).abs().nan_to_num().max() > 1e-5)
            if isinstance(module, GATES) or (gate - 1).abs().nan_to_num().max() > 1e-5:
                return gate.shape[1], axis, differs
    return None


def gate_of(x: Tensor, y: Tensor, axis: int) -> tuple[Tensor, float]:
    """What each channel of x was multiplied by to give y, B × C in float64; NaN where x is 0 everywhere.

    Also the greatest share of a channel of y, as a sum of squares, that is no multiple of x.
    """
    x, y = (double(t.detach()).movedim(axis, 1).flatten(2) for t in (x, y))
    largest = [t.abs().amax(2, keepdim=True) for t in (x, y)]  # squares of small numbers would vanish
    x, y = x / largest[0], y / largest[1]
    xy, xx, yy = (x * y).sum(2), x.square().sum(2), y.square().sum(2)
    rest = 1 - xy.square() / (xx * yy)
    gate = torch.where(largest[1][..., 0] > 0, xy / xx * (largest[1] / largest[0])[..., 0], 0.0)
    return torch.where(largest[0][..., 0] > 0, gate, torch.nan), rest.nan_to_num(0.0).max().item()
