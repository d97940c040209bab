"""The channel gates of a network, and what they do while it runs."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
from timm.models import senet
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models.rdnet import BlockESE
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

from .branches import evaluating
from .ends import BranchEnd, DIAEnd
from .layers import SEM, SPEM

#: Layers that multiply each channel of a map by a number of their own for each image.
GATES = (
    *(SEModule, SqueezeExcite, EffectiveSEModule, SqueezeExciteCl, senet.SEModule, BlockESE),
    *(EcaModule, CecaModule, GatherExcite, GlobalContext, ChannelAttn),
    *(SqueezeExcitation, SEM, SPEM, DIAEnd),
)


@dataclass(frozen=True)
class Gate:
    """A channel gate of a network.

    Attributes:
        path: Path of the module that multiplies.
        kind: Name of its class.
        channels: Width C of the map.
        axis: Of the channels: 1 of B × C × H × W, −1 of B × N × C or B × H × W × C.
        run: Paths of the gates that share a recurrent cell, in running order; of DIA only.
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
    """
    also = tuple(also)
    kinds = (*GATES, *(kind for kind in also if isinstance(kind, type)))
    return {path: m for path, m in model.named_modules() if isinstance(m, kinds) or path in also}


@torch.no_grad()
def find_gates(
    model: nn.Module, images: Any, also: Iterable[type | str] = ()
) -> tuple[list[Gate], dict[str, str]]:
    """The channel gates of a network in running order, and what looks like one but is not, or is not known.

    A gate is what multiplies all pixels of a channel by the same number, one for each image; that is tried
    out on the images, in eval mode.

    Args:
        model: Left as it is.
        images: B × C × H × W, two or more that differ.
        also: Further classes, or paths of modules.

    Returns:
        The gates; and the path of every other candidate, with the reason in words.

    Raises:
        ValueError: A path names no module of the network.
    """
    also = tuple(also)
    known = gate_modules(model, also)
    missing = [name for name in also if isinstance(name, str) and name not in known]
    if missing:
        near = [path for path, _ in model.named_modules() if path.endswith(missing[0].rpartition(".")[2])]
        raise ValueError(f"no module {missing[0]!r} in {type(model).__name__}: name one such as {near[:3]}")
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
            gates.append(Gate(path, type(getattr(module, "mechanism", module)).__name__, *found[:2]))
        elif path in known or isinstance(module, attention):
            others[path] = f"{type(module).__name__} is no channel gate: it does more than scale channels"
        elif isinstance(module, BranchEnd) or any(_within(path, other) for other in known):
            continue  # which only holds one
        elif found is not None and found[2]:
            others[path] = (
                f"{type(module).__name__} scales channels but is not known: name it to have it frozen"
            )
    return _with_runs(model, gates), others


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


def _with_runs(model: nn.Module, gates: list[Gate]) -> list[Gate]:
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
    for axis in (1, -1) if x.dim() == 4 else (-1,):
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
    x, y = (t.detach().movedim(axis, 1).flatten(2).double() for t in (x, y))
    largest = [t.abs().amax(2, keepdim=True) for t in (x, y)]  # squares of small numbers would vanish
    x, y = x / largest[0], y / largest[1]
    xy, xx, yy = (x * y).sum(2), x.square().sum(2), y.square().sum(2)
    rest = 1 - xy.square() / (xx * yy)
    gate = torch.where(largest[1][..., 0] > 0, xy / xx * (largest[1] / largest[0])[..., 0], 0.0)
    return torch.where(largest[0][..., 0] > 0, gate, torch.nan), rest.nan_to_num(0.0).max().item()


class GateStatistics:
    """Running statistics of one gate over images, float64.

    Attributes:
        images: Number of images.
        low, high: Extremes, each C.
    """

    def __init__(self, channels: int) -> None:
        self.images = 0
        self.low, self.high = torch.full((channels,), torch.inf), torch.full((channels,), -torch.inf)
        # Of each channel: images in which it was not 0 everywhere, sum, sum of squares; two of them by class.
        self._sums = torch.zeros(3, channels, dtype=torch.float64)
        self._by_class: dict[int, Tensor] = {}

    def add(self, gate: Tensor, labels: Tensor | None = None) -> None:
        """Take up gates B × C, NaN where nothing is known, and the classes of their images."""
        gate = gate.cpu()
        self.images += len(gate)
        known = ~gate.isnan()
        values = gate.nan_to_num()
        self.low = torch.minimum(self.low, gate.nan_to_num(torch.inf).amin(0).float())
        self.high = torch.maximum(self.high, gate.nan_to_num(-torch.inf).amax(0).float())
        self._sums += torch.stack([known.sum(0), values.sum(0), values.square().sum(0)])
        if labels is not None:
            for label in labels.unique().tolist():
                rows = labels.cpu() == label
                sums = torch.stack([known[rows].sum(0), values[rows].sum(0)]).double()
                self._by_class[label] = self._by_class.get(label, 0) + sums

    @property
    def mean(self) -> Tensor:
        """Mean of each channel over the images, C; 1 where the channel was always 0 and nothing is known."""
        count, total, _ = self._sums
        return torch.where(count > 0, total / count, 1.0)

    @property
    def variance(self) -> Tensor:
        """Variance of each channel over the images, C."""
        count, _, squares = self._sums
        return torch.where(count > 0, squares / count - self.mean.square(), 0.0).clamp_min(0)

    @property
    def image_share(self) -> float:
        """Share of the variance over images and channels that is due to the image, from 0 to 1."""
        within = self.variance.mean().item()
        total = within + self.mean.var(unbiased=False).item()
        return within / total if total else 0.0

    @property
    def class_share(self) -> float:
        """Share of the variance over images that is between classes, as ω².

        It is about 0 where classes make no difference; NaN without labels, or with as many classes as images.
        """
        if not self._by_class or self.images <= len(self._by_class):
            return torch.nan
        counts, totals = torch.stack(list(self._by_class.values()), 1)
        means = torch.where(counts > 0, totals / counts, self.mean)
        between = (counts * (means - self.mean).square()).sum()
        images, classes = counts.sum(0), (counts > 0).sum(0)
        whole = (images * self.variance).sum()
        noise = (whole - between) / (images - classes).sum() if (images > classes).any() else 0.0
        share = (between - (classes - 1).clamp_min(0).sum() * noise) / (whole + len(images) * noise)
        return max(0.0, share.item()) if whole else 0.0


class Record:
    """What :func:`record` has collected: ``statistics[path]`` of every gate.

    Set ``labels`` to the classes of the images before a forward pass to learn what is between classes.
    """

    def __init__(self, gates: list[Gate]) -> None:
        self.gates = gates
        self.statistics = {gate.path: GateStatistics(gate.channels) for gate in gates}
        self.labels: Tensor | None = None


@contextmanager
def record(model: nn.Module, gates: list[Gate]) -> Iterator[Record]:
    """Collect every gate of a network while it runs, by hooks that are gone afterwards.

    Args:
        model: Of which the gates are.
        gates: From :func:`find_gates`.
    """
    found = Record(gates)

    def watch(gate: Gate) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
            found.statistics[gate.path].add(gate_of(args[0], y, gate.axis)[0], found.labels)

        return hook

    hooks = [model.get_submodule(gate.path).register_forward_hook(watch(gate)) for gate in gates]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def held(model: nn.Module, constants: dict[Gate, Tensor]) -> Iterator[None]:
    """Let gates be constants for a while: each C numbers."""

    def watch(gate: Gate, constant: Tensor) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
            v = constant.to(y)
            return args[0] * (v[:, None, None] if gate.axis == 1 else v)

        return hook

    hooks = [model.get_submodule(g.path).register_forward_hook(watch(g, v)) for g, v in constants.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
