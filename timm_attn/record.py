"""Records the channel gates of a network while it runs, with hooks."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from .branches import images_of
from .compare import unwrapped
from .gates import Gate, gate_in, gate_modules, gate_of, with_runs


class GateStatistics:
    """Running statistics of one gate over images, in float64.

    Attributes:
        images: Number of images.
        not_finite: Number of images whose output was not finite.
        low, high: Minimum and maximum of each channel, C.
    """

    def __init__(self, channels: int) -> None:
        self.images = self.not_finite = 0
        self.low, self.high = torch.full((channels,), torch.inf), torch.full((channels,), -torch.inf)
        # Of each channel: images in which it was not 0 everywhere, sum, sum of squares; two of them by class.
        self._sums = torch.zeros(3, channels, dtype=torch.float64)
        self._by_class: dict[int, Tensor] = {}

    def add(self, gate: Tensor, labels: Tensor | None = None) -> None:
        """Add gates B × C, NaN where unknown, and the classes of their images."""
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
    def known(self) -> Tensor:
        """Whether the gate of each channel is known, C; it cannot be seen where a channel is 0 everywhere."""
        return self._sums[0] > 0

    @property
    def mean(self) -> Tensor:
        """Mean of each channel over the images, C; 1 where unknown."""
        count, total, _ = self._sums
        return torch.where(count > 0, total / count, 1.0)

    @property
    def variance(self) -> Tensor:
        """Variance of each channel over the images, C."""
        count, _, squares = self._sums
        return torch.where(count > 0, squares / count - self.mean.square(), 0.0).clamp_min(0)

    @property
    def image_share(self) -> float:
        """Share of the variance over images and known channels that is due to the image, from 0 to 1."""
        if not self.known.any():
            return 0.0
        within = self.variance[self.known].mean().item()
        total = within + self.mean[self.known].var(unbiased=False).item()
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


@dataclass(frozen=True)
class Correlation:
    """Correlations between gates of equal width.

    Attributes:
        paths: Paths of the G gates, in the order in which they run.
        pearson: G × G, Pearson's r over all images and channels.
        images: G × G, r after subtracting each channel's mean over images, so only of what the image changes.
    """

    paths: tuple[str, ...]
    pearson: Tensor
    images: Tensor

    @property
    def mean(self) -> float:
        """Mean of ``pearson`` over the pairs of different gates."""
        rows, columns = torch.triu_indices(len(self.paths), len(self.paths), 1)
        return self.pearson[rows, columns].nanmean().item()


@dataclass
class _Pass:
    """A forward pass: the number of its images, None if of a part of the network, their labels, its gates."""

    images: int | None
    labels: Any
    gates: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class Record:
    """The gates of a network as recorded by ``record``.

    ``record[path]`` is the ``GateStatistics`` of a gate. For ``class_share``, set ``labels`` to the classes
    of the images, B, before each forward pass.

    Attributes:
        gates: The gates, in the order in which they run.
        statistics: Statistics by path.
        unknown: Paths of modules that looked like gates but are not, with the reason.
        kept: The gates of the images in ``keep``, N × C, by path. Where a block takes the patches of an image
            for images, those of one image following one another, their mean.
        images: Number of images so far.
    """

    def __init__(
        self, gates: Iterable[Gate] = (), keep: int | Collection[int] = (), correlation: bool = True
    ) -> None:
        self.gates = list(gates)
        self.statistics = {gate.path: GateStatistics(gate.channels) for gate in self.gates}
        self.unknown: dict[str, str] = {}
        self.kept: dict[str, Tensor] = {}
        self.images = 0
        self.labels: Any = None
        self._keep = frozenset(range(keep) if isinstance(keep, int) else keep)
        self._correlation = correlation
        self._pass: _Pass | None = None
        self._sums: dict[tuple[str, ...], Tensor] = {}

    def __getitem__(self, path: str) -> GateStatistics:
        if path not in self.statistics:
            known = ", ".join(self.statistics) or "none"
            raise KeyError(f"no gate at {path!r} has been recorded; gates are: {known}")
        return self.statistics[path]

    def __len__(self) -> int:
        return len(self.statistics)

    def correlations(self) -> list[Correlation]:
        """Correlations for each run of two or more neighbouring gates of equal width."""
        found = []
        for paths, sums in self._sums.items():
            found.append(Correlation(paths, _pearson(sums.sum(-1, keepdim=True)), _pearson(sums)))
        return found

    def take(self, gate: Gate, values: Tensor, finite: Tensor) -> None:
        """Take the gates of a pass, B × C, and whether each image's output is finite, B."""
        now = self._pass
        if now is None or (now.images is None and gate.path in now.gates):  # a part of the network is called
            self.end_pass()
            now = self._begin(None)
        if gate.path in now.gates:  # one constant could not stand for both
            self.unknown[gate.path] = f"{gate.kind} acts in several places"
            self.gates.remove(gate)
            del self.statistics[gate.path], now.gates[gate.path]
            return
        now.gates[gate.path] = values.cpu(), finite.cpu()

    def begin_pass(self, images: int) -> None:
        """Begin a forward pass of the whole network."""
        self.end_part()
        self._begin(images)

    def drop_pass(self, *_: Any) -> None:
        """Drop a forward pass that raised. If it is tried again, it has the same labels."""
        now = self._pass
        if now is not None and now.images is not None:
            self._pass, self.labels = None, now.labels if self.labels is None else self.labels

    def end_part(self) -> None:
        """End the passes of a part of the network, whose end nothing else tells."""
        if self._pass is not None and self._pass.images is None:
            self.end_pass()

    def _begin(self, images: int | None) -> "_Pass":
        self._pass, self.labels = _Pass(images, self.labels), None
        return self._pass

    def end_pass(self, *_: Any) -> None:
        """Add the gates of a pass and their correlations to the statistics, and count its images.

        Raises:
            ValueError: There are labels, but not one per image.
        """
        now, self._pass = self._pass, None
        if now is None or not now.gates:
            return
        labels, passing = now.labels, now.gates
        fewest = min(len(values) for values, _ in passing.values())
        batch = fewest if not now.images or fewest % now.images else now.images
        if labels is not None:
            labels = torch.as_tensor(labels).cpu()
            if labels.shape != (batch,):
                raise ValueError(f"labels of shape {tuple(labels.shape)} for {batch} images: give one each")
        kept = [i for i in range(batch) if self.images + i in self._keep]
        for path, (values, finite) in passing.items():
            statistics = self.statistics[path]
            whole = len(values) == batch  # or else a block takes the patches of an image for images
            statistics.add(values, labels if whole else None)
            statistics.not_finite += int((~finite).sum())
            if kept and len(values) % batch == 0:
                of_images = values if whole else values.unflatten(0, (batch, -1)).nanmean(1)
                self.kept[path] = torch.cat([self.kept.get(path, of_images[:0]), of_images[kept]])
        self.images += batch
        neighbours = [(path, values) for path, (values, _) in passing.items() if self._correlation]
        for _size, group in groupby(neighbours, lambda item: item[1].shape):
            paths, stacked = zip(*group, strict=True)
            if len(paths) > 1:
                g = torch.stack(stacked)
                known = (~g.isnan()).double()
                g = g.nan_to_num()
                pairs = ((known, known), (g, known), (g.square(), known), (g, g))
                sums = torch.stack([torch.einsum("inc,jnc->ijc", *pair) for pair in pairs])
                self._sums[paths] = self._sums.get(paths, 0) + sums


def _pearson(sums: Tensor) -> Tensor:
    """Correlations within channels, G × G; NaN where a gate does not vary.

    Args:
        sums: 4 × G × G × C: over images where both gates are known, their number, the one, its square, and
            the product of both.
    """
    n, a, aa, ab = sums
    n = n.clamp_min(1)
    covariance = (ab - a * a.transpose(0, 1) / n).sum(-1)
    variance = (aa - a.square() / n).sum(-1)
    variance = torch.where(variance > 1e-12 * aa.sum(-1), variance, 0.0)  # else it is rounding
    scale = (variance * variance.T).sqrt()
    return torch.where(scale > 0, covariance / scale, torch.nan).clamp(-1, 1)


@contextmanager
def record(
    model: nn.Module,
    gates: Iterable[Gate] | None = None,
    *,
    also: Iterable[type | str] = (),
    keep: int | Collection[int] = (),
    correlation: bool = True,
) -> Iterator[Record]:
    """Record the channel gates of a network while it runs, with hooks that are removed afterwards.

    ::

        with timm_attn.record(model) as gates, torch.no_grad():
            model(images)
        gates["layer1.0.se"].image_share

    Memory does not grow with the number of images. The network may be in training, compiled (it runs eagerly
    meanwhile) or wrapped for distributed training, where each process records its own images.

    Args:
        model: Any network.
        gates: Gates from ``find_gates``; by default, all that are found while the network runs.
        also: Further classes, or paths, of modules that are channel gates.
        keep: Images whose gates are kept in ``kept``: a number, for the first images, or indices from 0.
        correlation: Also collect correlations between gates.

    Raises:
        TypeError: ``model`` is not a network, ``gates`` are not gates, or ``keep`` is not numbers.
        ValueError: ``also`` names a module that does not exist, or ``keep`` is negative.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"record needs a network, got {type(model).__name__}")
    gates = None if gates is None else list(gates)
    if not all(isinstance(gate, Gate) for gate in gates or ()):
        raise TypeError("gates are those of find_gates; for paths there is also=[...]")
    numbers = [keep] if isinstance(keep, int) else keep
    if isinstance(keep, str) or not all(isinstance(i, int) for i in numbers):
        raise TypeError(f"keep is a number of images, or numbers of images, got {keep!r}")
    if any(i < 0 for i in numbers):
        raise ValueError(f"keep must not be below 0, got {keep!r}")
    model = unwrapped(model)
    known = None if gates is None else {gate.path: gate for gate in gates}
    found = Record(known.values() if known else (), keep, correlation)
    modules = gate_modules(model, also) if known is None else {p: model.get_submodule(p) for p in known}
    seen = dict(known or {})

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
            if path in found.unknown or torch._C._current_graph_task_id() != -1:
                return  # the backward pass runs a checkpointed block again
            x = _first_tensor(args, kwargs)
            if x is None or not x.numel():
                return
            if path not in seen:
                gate = gate_in(path, module, x, y)
                if gate is None:
                    found.unknown[path] = f"{type(module).__name__} is no channel gate"
                    return
                seen[path] = gate
                found.gates.append(gate)
                found.statistics[path] = GateStatistics(gate.channels)
            found.take(seen[path], gate_of(x, y, seen[path].axis)[0], y.detach().isfinite().flatten(1).all(1))

        return hook

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        images = images_of((args, kwargs))
        found.begin_pass(0 if images is None or not images.dim() else len(images))

    hooks = [module.register_forward_hook(watch(path), with_kwargs=True) for path, module in modules.items()]
    hooks.append(model.register_forward_pre_hook(begin, with_kwargs=True))
    hooks.append(model.register_forward_hook(found.end_pass))
    hooks.append(model.register_forward_hook(found.drop_pass, always_call=True))
    try:
        with torch.compiler.set_stance("force_eager"):
            yield found
    finally:
        for hook in hooks:
            hook.remove()
        found.end_part()
        found.gates = with_runs(model, found.gates)


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return next((t for t in (*args, *kwargs.values()) if torch.is_tensor(t)), None)


@contextmanager
def held(model: nn.Module, constants: dict[Gate, Tensor]) -> Iterator[None]:
    """Replace gates by constants, C each, within the context."""

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
