"""Trained gates into constants, within a budget of accuracy.

Many trained channel gates hardly depend on the image (https://arxiv.org/abs/2304.06345 calls it the stripe
observation). Such a gate may become its mean, and the mean may go into the layer before or after it.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import pairwise
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.utils import unwrap_model  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .affine import consumers, reading_weights, scaling_parameters
from .branches import evaluating, leaves_of
from .ends import scale
from .fold import BOUNDS, FoldError, NothingToFold, fold, relative_difference
from .layers.frozen import FrozenGate
from .models.frozen import remove_gate, stock_network
from .record import Gate, find_gates, gate_modules, held, record

#: Of images that are not divided by the caller: for the means, for choosing, for the final figures.
PARTS = (0.4, 0.3, 0.3)
#: Fewer images tell nothing of a gate, or of a network.
LEAST = 100
#: Images on which the damage of each gate alone is measured.
ALONE = 2048


@dataclass(frozen=True)
class Figures:
    """Of one network on the images that were not used for choosing.

    Attributes:
        top1: In %; NaN without labels.
        agreement: Images that get the original's class, in %.
        kl: Mean Kullback–Leibler divergence of the original's classes from these, nats.
        milliseconds: Median time of a batch.
        parameters: Number of parameters.
    """

    top1: float
    agreement: float
    kl: float
    milliseconds: float
    parameters: int


@dataclass(frozen=True)
class GateReport:
    """What was found out about one gate, and what became of it.

    Attributes:
        path: Of the module that multiplied.
        kind: Its class.
        channels: Its width.
        image_share: Share of its variance, over images and channels, that is due to the image.
        class_share: Share of that, which is between classes; NaN without labels.
        kl: Divergence when it alone is constant, nats.
        milliseconds: Of a batch that it takes in the original.
        frozen: Whether it is a constant now.
        where: What took the constant in, "a multiplication", or why the gate stays.
    """

    path: str
    kind: str
    channels: int
    image_share: float
    class_share: float
    kl: float
    milliseconds: float
    frozen: bool
    where: str


@dataclass(frozen=True)
class FreezeReport:
    """What :func:`freeze` did.

    Attributes:
        model: The result, in eval mode. Where an architecture of this name can be built, it is one:
            of timm's if no gate is left, or ``frozen``.
        gates: One entry for each gate, in running order.
        unknown: Modules that look like gates but are none or are not known, with the reason.
        before, after: Figures of the original and of the result.
        batch_size: Of the times.
        images: Number of images for means, choosing and final figures.
        curves: For each order, by ``greedy`` and by ``depth``: (gates frozen, top-1 or agreement in %,
            milliseconds), measured on the images for choosing, without recovery.
        loads: Whether :func:`timm.create_model` builds the result.
    """

    model: nn.Module
    gates: list[GateReport]
    unknown: dict[str, str]
    before: Figures
    after: Figures
    batch_size: int
    images: tuple[int, int, int]
    budget: float
    curves: dict[str, list[tuple[int, float, float]]] = field(default_factory=dict)
    loads: bool = True

    @property
    def frozen(self) -> int:
        """Number of gates that are constants."""
        return sum(gate.frozen for gate in self.gates)


#: From a network with constant gates to one that has been trained since, of the same architecture.
Recover = Callable[[Any], Any]


def freeze(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    budget: float = 0.1,
    *,
    every: bool = False,
    keep: Sequence[str] = (),
    gates: Iterable[type | str] = (),
    calibration: Tensor | None = None,
    calibration_labels: Tensor | None = None,
    recover: Recover | None = None,
    batch_size: int = 64,
    curves: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> FreezeReport:
    """Turn channel gates of a network into constants, as many as the budget allows.

    Each gate's mean over images is tried in its place. Gates are frozen in the order of the damage that they
    do alone (Kullback–Leibler divergence from the original) over the time that they take; one that would
    cost more than the budget, with those before it, stays.

    Args:
        model: In eval mode; left as it is. Of timm, this package or anybody.
        images: B × C × H × W, normalised, on the model's device or not. They are divided, if there is no
            ``calibration``: 40 % for the means, 30 % for choosing, 30 % for the final figures, in turn.
        labels: Their classes, B. Without them, agreement with the original stands for accuracy.
        budget: Points of top-1 that the result may lose. What cannot be told from no loss, one standard error
            of the paired difference, is always allowed.
        every: Freeze all, whatever it costs.
        keep: Shell patterns of paths of gates that stay.
        gates: Further classes, or paths, of modules that are channel gates.
        calibration: Further images, for the means; then ``images`` are divided into two halves.
        calibration_labels: Their classes, for ``class_share``.
        recover: Trains what was frozen; then more may be frozen within the budget.
        batch_size: Of all passes, and of the times.
        curves: Measure accuracy and time as gates are frozen one by one.
        note: Called with the name of each step of the work.

    Raises:
        TypeError: It is no network, or images are no tensor.
        ValueError: It has no gates, is in training mode with dropout, does not take the images, a gate stands
            in several places, labels are out of range, or images are too few.
    """
    _check(model, images, labels, budget, keep)
    original: Any = _plain(model, images)
    device = next(original.parameters()).device
    original.to(device)
    with evaluating(original):
        found, unknown = _found(original, images[:8].to(next(original.parameters())), gates, keep)
        parts = _parts(images, labels, calibration, calibration_labels, 0.0 if every else budget)
        work = _Work(original, found, parts, batch_size)
        note("means")
        with record(original, found) as recorded:
            for x, y in work.batches(0):
                recorded.labels = y
                original(x)
        constants = {gate: recorded.statistics[gate.path].mean for gate in found}
        note("damage and time of each gate")
        free = [gate for gate in found if not any(fnmatch(gate.path, pattern) for pattern in keep)]
        milliseconds = work.gate_times()
        damage = {gate: work.damage({gate: constants[gate]}) for gate in found}
        order = _in_order(free, {g: damage[g] / max(milliseconds[g], 1e-6) for g in free})
        note("choice")
        limit = math.inf if every else budget
        chosen, refused = _choose(work, order, constants, limit)
        rest = [gate for gate in order if gate not in chosen]

        def build(some: Sequence[Gate]) -> tuple[Any, dict[Gate, str]]:
            return _build(
                original, {g: constants[g] for g in some}, images[:4].to(next(original.parameters()))
            )

        result, where = build(chosen)
        result = _named(result, model, original, chosen, where)
        if recover is not None:
            note("recovery")
            result, where, chosen = _recovered(
                work,
                build,
                lambda net, some, at: _named(net, model, original, some, at),
                recover,
                [*chosen, *_in_order(rest, {g: order.index(g) for g in rest})],
                len(chosen),
                limit,
                result,
                where,
            )
        note("final figures")
        times = work.times([original, result])
        before, after = (
            work.figures(network, seconds) for network, seconds in zip((original, result), times, strict=True)
        )
        drawn: dict[str, list[tuple[int, float, float]]] = {}
        if curves:
            note("curves")
            depth = _in_order(free, {gate: found.index(gate) for gate in free})
            greedy = [*chosen, *(gate for gate in order if gate not in chosen)]
            for name, some in (("greedy", greedy), ("depth", depth)):
                drawn[name] = work.curve(build, some, constants)
    reports = [
        GateReport(
            gate.path,
            gate.kind,
            gate.channels,
            recorded.statistics[gate.path].image_share,
            recorded.statistics[gate.path].class_share,
            damage[gate],
            milliseconds[gate],
            gate in chosen,
            where[gate] if gate in chosen else refused.get(gate, "named by keep"),
        )
        for gate in found
    ]
    loads = hasattr(result, "pretrained_cfg") and isinstance(result.pretrained_cfg, dict)
    sizes: Any = tuple(len(x) for x, _ in parts)
    return FreezeReport(
        result,
        reports,
        unknown,
        before,
        after,
        batch_size,
        sizes,
        budget,
        drawn,
        loads,
    )


def _check(model: Any, images: Any, labels: Any, budget: float, keep: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"freeze needs a network, got {type(model).__name__}")
    if not torch.is_tensor(images) or images.dim() != 4 or not images.is_floating_point():
        shape = tuple(images.shape) if torch.is_tensor(images) else type(images).__name__
        raise TypeError(f"images must be normalised, B × C × H × W, got {shape}")
    if not 0 <= budget <= 100:
        raise ValueError(f"budget is in points of top-1, from 0 to 100, got {budget}")
    if isinstance(keep, str):
        raise TypeError(f"keep is a list of patterns, got {keep!r}")
    random = [m for m in model.modules() if m.training and getattr(m, "p", getattr(m, "drop_prob", 0))]
    if random:
        raise ValueError(
            f"{type(model).__name__} is in training mode, with {type(random[0]).__name__}: call .eval() first"
        )
    if any(p.is_meta for p in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} is on the meta device and has no weights to freeze gates of"
        )
    if labels is not None:
        if not torch.is_tensor(labels) or labels.shape != images.shape[:1] or labels.is_floating_point():
            raise ValueError(f"labels must be {len(images)} whole numbers, one for each image")
        classes = getattr(model, "num_classes", None) or int(labels.max()) + 1
        if labels.min() < 0 or labels.max() >= classes:
            wrong = labels.min() if labels.min() < 0 else labels.max()
            raise ValueError(
                f"label {int(wrong)} is not one of the network's {classes} classes, 0 to {classes - 1}"
            )


def _plain(model: Any, images: Tensor) -> Any:
    """A copy, without what folds anyway."""
    model = unwrap_model(model)
    try:
        return (
            fold(model, images[:2].to(next(model.parameters()))) if _folds(model) else deepcopy(model).eval()
        )
    except NothingToFold:
        return deepcopy(model).eval()


def _folds(model: nn.Module) -> bool:
    from .layers import SSIA, ConstantGate

    return any(isinstance(m, ConstantGate | SSIA) for m in model.modules())


def _found(
    model: nn.Module, images: Tensor, also: Iterable[type | str], keep: Sequence[str]
) -> tuple[list[Gate], dict[str, str]]:
    name = type(model).__name__
    try:
        found, unknown = find_gates(model, images, also)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"{name} does not take images {tuple(images.shape[1:])} ({str(error).splitlines()[0]}): give it "
            "those of its own size"
        ) from error
    shared = [path for path, reason in unknown.items() if "places" in reason]
    shared = [path for path in shared if not any(fnmatch(path, pattern) for pattern in keep)]
    if shared:
        raise ValueError(
            f"{shared[0]}: {unknown[shared[0]]}, which one constant does not serve: name it in keep"
        )
    if not found:
        hint = "".join(f"; {path}: {reason}" for path, reason in list(unknown.items())[:3])
        raise ValueError(f"{name} has no channel gates to freeze{hint}")
    return found, unknown


def _parts(
    images: Tensor,
    labels: Tensor | None,
    calibration: Tensor | None,
    calibration_labels: Tensor | None,
    budget: float,
) -> list[tuple[Tensor, Tensor | None]]:
    """Images and labels for the means, for choosing and for the final figures."""
    shares = PARTS if calibration is None else (0.0, 0.5, 0.5)
    needed = max(LEAST, math.ceil(100 / budget) if budget else 0)
    smallest = min(share for share in shares if share)
    if calibration is not None and len(calibration) < LEAST:
        raise ValueError(f"{len(calibration)} images for the means are too few: give {LEAST} or more")
    if len(images) * smallest < needed:
        why = f"fewer than {LEAST} tell nothing"
        if needed > LEAST:
            why = f"{needed} of them tell differences of {100 / needed:.2g} points"
        raise ValueError(
            f"{len(images)} images are too few: they are divided for the means, the choice and the final "
            f"figures, and {why}: give {math.ceil(needed / smallest)} or more, or a greater budget"
        )
    # In turn, as data sets are often sorted by class.
    place = torch.arange(len(images)) % 10
    edges = [round(10 * sum(shares[:i])) for i in range(4)]
    rows = [(place >= low) & (place < high) for low, high in pairwise(edges)]
    parts = [(images[row], None if labels is None else labels[row]) for row in rows]
    if calibration is not None:
        parts[0] = calibration, calibration_labels
    return parts


def _in_order(gates: Iterable[Gate], cost: dict[Gate, float]) -> list[Gate]:
    """By cost; of gates that share a cell, later ones first, as the earlier ones feed them."""
    gates, order = list(gates), []
    names = {gate.path for gate in gates}
    while gates:
        ready = []
        for gate in gates:
            later = gate.run[gate.run.index(gate.path) + 1 :] if gate.run else ()
            if not any(path in names for path in later):
                ready.append(gate)
        best = min(ready, key=lambda gate: cost[gate])
        order.append(best)
        gates.remove(best)
        names.remove(best.path)
    return order


def _choose(
    work: "_Work", order: list[Gate], constants: dict[Gate, Tensor], budget: float
) -> tuple[list[Gate], dict[Gate, str]]:
    """The gates that may be frozen together, in the order in which they were, and why the others may not."""
    chosen: list[Gate] = []
    refused: dict[Gate, str] = {}
    for gate in order:
        later = gate.run[gate.run.index(gate.path) + 1 :] if gate.run else ()
        stays = [path for path in later if path not in {g.path for g in chosen}]
        if stays:
            refused[gate] = f"{stays[0]}, which stays, reads its cell"
            continue
        if math.isinf(budget):
            chosen.append(gate)
            continue
        loss, error = work.loss({g: constants[g] for g in (*chosen, gate)})
        if loss <= max(budget, error):
            chosen.append(gate)
        else:
            refused[gate] = f"{loss:.2f} points with those before it"
    return chosen, refused


def _recovered(
    work: "_Work",
    build: Any,
    named: Any,
    recover: Recover,
    order: list[Gate],
    least: int,
    budget: float,
    result: Any,
    where: dict[Gate, str],
) -> tuple[Any, dict[Gate, str], list[Gate]]:
    """The network with the most gates frozen that, trained since, keeps the budget; by bisection."""
    low, high = least, len(order)
    best = result, where, order[:least]
    tried = False
    while low < high or (not tried and low):
        middle = high if math.isinf(budget) else (low + high + 1) // 2
        network, at = build(order[:middle])
        network = recover(named(network, order[:middle], at)).eval()
        tried = True
        loss, error = work.loss_of(network)
        if loss <= max(budget, error):
            low, best = middle, (network, at, order[:middle])
        elif middle == low:
            break  # what was chosen without training keeps the budget
        else:
            high = middle - 1
    return best


@torch.no_grad()
def _build(original: Any, constants: dict[Gate, Tensor], images: Tensor) -> tuple[Any, dict[Gate, str]]:
    """A copy with some gates constant, absorbed where a layer takes them in; and what did."""
    held_by = deepcopy(original)
    gates = _last_first(constants)
    for gate in gates:
        remove_gate(held_by, gate.path, _constant(gate, constants[gate], images))
    plan = _plan(held_by, gates, images)

    def absorbed(some: dict[Gate, Any]) -> Any:
        network = deepcopy(original)
        for gate in gates:
            remove_gate(
                network, gate.path, None if gate in some else _constant(gate, constants[gate], images)
            )
        for gate, (kind, names, _) in some.items():
            if kind == "rows":
                scale(network, names, constants[gate], gate.channels)
            else:
                for name, groups in names:
                    _scale_inputs(network.get_parameter(name), constants[gate], groups)
        return network

    network = absorbed(plan)
    if not _same(held_by, network, images):  # what the graph does not show: a weight in two places, say
        plan = {gate: how for gate, how in plan.items() if _same(held_by, absorbed({gate: how}), images)}
        network = absorbed(plan)
        if not _same(held_by, network, images):
            plan, network = {}, absorbed({})
    where = {gate: f"in {plan[gate][2]}" if gate in plan else "a multiplication" for gate in gates}
    return network.eval(), where


def _last_first(gates: Iterable[Gate]) -> list[Gate]:
    """Gates that share a cell go from the last to the first."""
    return sorted(gates, key=lambda gate: -gate.run.index(gate.path) if gate.run else 0)


def _constant(gate: Gate, value: Tensor, like: Tensor) -> FrozenGate:
    module = FrozenGate(gate.channels, gate.axis, device=like.device, dtype=like.dtype)
    module.gate.copy_(value)
    return module


def _same(a: nn.Module, b: nn.Module, images: Tensor) -> bool:
    try:
        return relative_difference(a, b, images) <= BOUNDS[images.dtype]
    except FoldError:
        return False


def _plan(model: nn.Module, gates: list[Gate], images: Tensor) -> dict[Gate, tuple[str, Any, str]]:
    """What takes in each constant: rows of parameters before it, or input channels of weights after it."""
    maps: dict[int, tuple[Tensor, Tensor]] = {}
    modules = {}
    for gate in gates:
        module: Any = model.get_submodule(gate.path)
        modules[gate] = module[0] if isinstance(module, nn.Sequential) else module
    hooks = [
        module.register_forward_hook(lambda m, args, y: maps.__setitem__(id(m), (args[0], y)))
        for module in modules.values()
    ]
    plan: dict[Gate, tuple[str, Any, str]] = {}
    with leaves_of(model, None) as names, torch.enable_grad():
        try:
            output = model(images)
        finally:
            for hook in hooks:
                hook.remove()
        readers = consumers([t.grad_fn for t in tree_leaves(output) if torch.is_tensor(t) and t.grad_fn])
        for gate, module in modules.items():
            if id(module) not in maps or (module.gate < 0).any():
                continue
            x, y = maps[id(module)]
            if len(readers.get(x.grad_fn, [])) == 1:
                found = scaling_parameters(x, names)[1]
                if found:
                    plan[gate] = "rows", found, found[0].rpartition(".")[0]
                    continue
            weights = reading_weights(y.grad_fn, gate.channels, readers)
            unique = {id(leaf): (names.get(id(leaf)), groups) for leaf, groups in weights}
            if unique and all(name for name, _ in unique.values()):
                taken = list(unique.values())
                plan[gate] = "inputs", taken, str(taken[0][0]).rpartition(".")[0]
    return plan


def _scale_inputs(weight: Tensor, v: Tensor, groups: int) -> None:
    """Multiply a weight, O × C / groups (× kernel), by v along its C inputs, in place."""
    parts = weight.detach().double().unflatten(0, (groups, -1))
    factor = v.double().to(weight.device).view(groups, 1, -1, *[1] * (weight.dim() - 2))
    weight.copy_((parts * factor).flatten(0, 1))


def _named(network: Any, model: Any, original: Any, chosen: Sequence[Gate], where: dict[Gate, str]) -> Any:
    """The same as an architecture that timm can build, where there is one."""
    cfg = getattr(original, "pretrained_cfg", None)
    if not chosen or not isinstance(cfg, dict) or not timm.is_model(str(cfg.get("architecture"))):
        return network
    arguments = {**getattr(original, "_model_args", {}), "num_classes": original.num_classes}
    paths = list(gate_modules(original))
    gone = {gate.path: gate for gate in chosen}
    if len(gone) == len(paths) and "a multiplication" not in where.values():
        stock = stock_network(network, cfg["architecture"], arguments)
        if stock is not None:
            return stock
    kept = [i for i, path in enumerate(paths) if path not in gone]
    multiplied = [
        [i, gone[path].channels, gone[path].axis]
        for i, path in enumerate(paths)
        if path in gone and where[gone[path]] == "a multiplication"
    ]
    try:
        named: Any = timm.create_model(
            "frozen", backbone=cfg["architecture"], kept=kept, multiplied=multiplied, **arguments
        )
        named.to(next(network.parameters())).load_state_dict(network.state_dict())
    except (TypeError, ValueError, RuntimeError):  # a network that was changed since it was made
        return network
    named.pretrained_cfg = named.default_cfg = {**cfg, "architecture": "frozen", "tag": None}
    named._model_args |= {k: v for k, v in arguments.items() if k != "num_classes"}
    return named.eval()


class _Work:
    """Passes over the parts of the images, with the original's logits remembered."""

    def __init__(
        self, model: Any, gates: list[Gate], parts: list[tuple[Tensor, Tensor | None]], batch_size: int
    ) -> None:
        self.model, self.gates, self.parts, self.batch_size = model, gates, parts, batch_size
        self.like = next(model.parameters())
        self.known: dict[tuple[int, int | None], Tensor] = {}

    def batches(self, part: int, most: int | None = None) -> Iterable[tuple[Tensor, Tensor | None]]:
        """Images on the network's device, and their labels."""
        images, labels = self.parts[part]
        for i in range(0, min(len(images), most or len(images)), self.batch_size):
            end = min(i + self.batch_size, most or len(images))
            yield images[i:end].to(self.like), None if labels is None else labels[i:end].to(self.like.device)

    @torch.no_grad()
    def logits(self, network: nn.Module, part: int, most: int | None = None) -> Tensor:
        """B × classes in float64 on the CPU."""
        return torch.cat([network(x).double().cpu() for x, _ in self.batches(part, most)])

    def original(self, part: int, most: int | None = None) -> Tensor:
        """Those of the original."""
        if (part, most) not in self.known:
            self.known[part, most] = self.logits(self.model, part, most)
        return self.known[part, most]

    def damage(self, constants: dict[Gate, Tensor]) -> float:
        """Divergence of the original's classes from those with some gates constant, nats."""
        with held(self.model, constants):
            logits = self.logits(self.model, 0, ALONE)
        return _divergence(self.original(0, ALONE), logits)

    def right(self, logits: Tensor, part: int) -> Tensor:
        """Which images get their class, or without labels the original's."""
        labels = self.parts[part][1]
        return logits.argmax(1) == (self.original(part).argmax(1) if labels is None else labels.cpu())

    def loss(self, constants: dict[Gate, Tensor]) -> tuple[float, float]:
        """Points of top-1 lost on the images for choosing, and their standard error."""
        self.original(1)  # before its gates are held
        with held(self.model, constants):
            return self.loss_of(self.model)

    def loss_of(self, network: nn.Module) -> tuple[float, float]:
        """The same of another network."""
        before = self.right(self.original(1), 1).double()
        difference = before - self.right(self.logits(network, 1), 1).double()
        return 100 * difference.mean().item(), 100 * difference.std().item() / len(difference) ** 0.5

    def figures(self, network: nn.Module, milliseconds: float) -> Figures:
        """On the images that were not used for choosing."""
        logits, original = self.logits(network, 2), self.original(2)
        labels = self.parts[2][1]
        return Figures(
            100 * self.right(logits, 2).double().mean().item() if labels is not None else math.nan,
            100 * (logits.argmax(1) == original.argmax(1)).double().mean().item(),
            _divergence(original, logits),
            milliseconds,
            sum(p.numel() for p in network.parameters()),
        )

    @torch.no_grad()
    def times(self, networks: list[nn.Module], rounds: int = 9) -> list[float]:
        """Median milliseconds of a batch of each network, taken in turn."""
        x = next(iter(self.batches(0)))[0]
        taken: list[list[float]] = [[] for _ in networks]
        for i in range(rounds + 1):
            for network, seconds in zip(networks, taken, strict=True):
                start = self._clock()
                network(x)
                if i:  # the first warms up
                    seconds.append(1000 * (self._clock() - start))
        return [torch.tensor(seconds).median().item() for seconds in taken]

    def _clock(self) -> float:
        if self.like.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @torch.no_grad()
    def gate_times(self, rounds: int = 5) -> dict[Gate, float]:
        """Median milliseconds that each gate takes of a batch, in its place."""
        x = next(iter(self.batches(0)))[0]
        started: dict[str, float] = {}
        taken: dict[str, list[float]] = {gate.path: [] for gate in self.gates}
        hooks = []
        for gate in self.gates:
            module = self.model.get_submodule(gate.path)
            path = gate.path
            hooks.append(
                module.register_forward_pre_hook(lambda *_, p=path: started.__setitem__(p, self._clock()))
            )
            hooks.append(
                module.register_forward_hook(
                    lambda *_, p=path: taken[p].append(1000 * (self._clock() - started[p]))
                )
            )
        try:
            for _ in range(rounds + 1):
                self.model(x)
        finally:
            for hook in hooks:
                hook.remove()
        return {gate: torch.tensor(taken[gate.path][1:]).median().item() for gate in self.gates}

    def curve(
        self, build: Any, order: list[Gate], constants: dict[Gate, Tensor]
    ) -> list[tuple[int, float, float]]:
        """Gates frozen, top-1 (or agreement) and milliseconds, as the gates are frozen in an order."""
        networks = [build(order[:n])[0] for n in range(len(order) + 1)]
        right = [100 * self.right(self.logits(n, 1), 1).double().mean().item() for n in networks]
        return list(zip(range(len(networks)), right, self.times(networks), strict=True))


def _divergence(original: Tensor, logits: Tensor) -> float:
    return F.kl_div(
        logits.log_softmax(1), original.log_softmax(1), reduction="batchmean", log_target=True
    ).item()
