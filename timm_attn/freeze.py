"""Replaces trained gates by constants, within a budget of accuracy.

Many trained channel gates hardly depend on the image (the "stripe observation" of
https://arxiv.org/abs/2304.06345). Such a gate can be replaced by its mean, and the mean can be multiplied
into the layer before or after it.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .branches import copied
from .compare import unwrapped
from .fold import fold, foldable
from .gates import Gate, find_gates
from .passes import Figures
from .search import GateSearch, Recover

#: Shares of the images for the means, for choosing and for the final figures, without ``calibration``.
PARTS = (0.4, 0.3, 0.3)
#: Smallest number of images to judge a gate or a network by.
LEAST = 100


@dataclass(frozen=True)
class GateReport:
    """Measurements of one gate, and whether it was frozen.

    Attributes:
        path: Path of the gate's module.
        kind: Name of its class.
        channels: Number of channels.
        image_share: Share of its variance, over images and channels, that is due to the image.
        class_share: Share of the variance over images that is between classes; NaN without labels.
        kl: Kullback–Leibler divergence from the original when only this gate is frozen, in nats.
        milliseconds: Time that the gate takes in the original, per batch.
        frozen: Whether the gate was frozen.
        where: The layer that absorbed the constant, "a multiplication", or why the gate stays.
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
    """The result of ``freeze``.

    Attributes:
        model: The frozen network, in eval mode. If ``timm.create_model`` can build it by name, its
            architecture is that of the network without gates (if no gate is left), or ``frozen``.
        gates: One entry per gate, in the order in which they run.
        unknown: Modules that look like gates but are not, or are not known, with the reason.
        before, after: Figures of the original and of the result.
        batch_size: Batch size of the measured times.
        images: Number of images for the means, for choosing and for the final figures.
        budget: The points of top-1 that were allowed to be lost; infinite with ``every``.
        curves: For each order, ``greedy`` and ``depth``: (gates frozen, top-1 or agreement in %,
            milliseconds), measured on the images for choosing, without recovery.
        loads: Whether ``timm.create_model`` builds the result by name.
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
        """Number of frozen gates."""
        return sum(gate.frozen for gate in self.gates)


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
    """Replace channel gates of a network by constants, as many as the budget allows.

    Each gate is replaced by its mean over images. Gates are frozen one after the other, once in order of
    their damage when frozen alone (Kullback–Leibler divergence from the original), and once in order of
    damage divided by the time that they take. A gate stays if freezing it would make the loss of accuracy
    exceed the budget. Of the two results, the one that saves more time is returned.

    Args:
        model: Any network, in eval mode; left unchanged.
        images: B × C × H × W, normalised, on any device. Without ``calibration`` they are split at random:
            40 % for the means, 30 % for choosing, 30 % for the final figures.
        labels: Their classes, B. Without them, agreement with the original takes the place of accuracy.
        budget: Points of top-1 that the result may lose. A loss below one standard error of the paired
            difference cannot be told from zero and is always allowed.
        every: Freeze all gates, whatever the loss.
        keep: Shell patterns of paths of gates that are not frozen.
        gates: Further classes, or paths, of modules that are channel gates.
        calibration: Separate images for the means; ``images`` are then split into two halves.
        calibration_labels: Their classes, for ``class_share``.
        recover: A function that trains a frozen network and returns it; more gates are then tried within the
            budget.
        batch_size: Batch size for forward passes and timing.
        curves: Also measure accuracy and time as gates are frozen one by one.
        note: Called with the name of each step.

    Raises:
        TypeError: ``model`` is not a network, or ``images`` are not a tensor.
        ValueError: The network has no gates, is in training mode or does not take the images; a gate acts in
            several places; labels are out of range; or there are too few images.
    """
    _check(model, images, labels, budget, keep, gates, batch_size)
    original: Any = _plain(model, images)
    few = images[:8].to(next(original.parameters()))
    found, unknown = _found(original, few, gates, keep)
    _check_labels(original(few[:2]), labels, type(model).__name__)
    parts = _parts(images, labels, calibration, calibration_labels, 0.0 if every else budget)
    search = GateSearch(original, found, parts, batch_size, keep, note)
    note("choice")
    limit = math.inf if every else budget
    choice = search.choose(limit)
    chosen = choice.chosen
    network = search.network(chosen)
    when = ""
    if recover is not None and choice.order:
        note("recovery")
        when = ", before recovery"
        network, chosen = search.recovered(recover, choice, limit) or (network, chosen)
    where = {gate: f"{loss:.2f} points with those before it{when}" for gate, loss in choice.losses.items()}
    where |= choice.staying | {gate: network.where[gate] for gate in chosen}
    note("final figures")
    before, after = search.figures(network.model)
    drawn: dict[str, list[tuple[int, float, float]]] = {}
    if curves:
        note("curves")
        orders = {"greedy": choice.order, "depth": search.depth}
        drawn = {name: search.curve(order) for name, order in orders.items()}
    reports = [
        GateReport(
            gate.path,
            gate.kind,
            gate.channels,
            search.statistics[gate.path].image_share,
            search.statistics[gate.path].class_share,
            search.damage[gate],
            search.milliseconds[gate],
            gate in chosen,
            where[gate],
        )
        for gate in found
    ]
    sizes: Any = tuple(len(x) for x, _ in parts)
    return FreezeReport(
        network.model,
        reports,
        unknown,
        before,
        after,
        batch_size,
        sizes,
        limit,
        drawn,
        network.loads,
    )


def _check(
    model: Any, images: Any, labels: Any, budget: float, keep: Any, gates: Any, batch_size: int
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"freeze needs a network, got {type(model).__name__}")
    name = type(model).__name__
    _check_images(images, "images")
    if not 0 <= budget <= 100:
        raise ValueError(f"budget is in points of top-1, from 0 to 100, got {budget}")
    for option, given in (("keep", keep), ("gates", gates)):
        if isinstance(given, str):
            raise TypeError(f"{option} is a list, got {given!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if model.training:
        raise ValueError(f"{name} is in training mode, where dropout acts: call .eval() first")
    if not any(True for _ in model.parameters()):
        raise ValueError(f"{name} has no parameters")
    if any(p.is_meta for p in model.parameters()):
        raise ValueError(f"{name} is on the meta device and has no weights to freeze gates of")
    if labels is not None and (
        not torch.is_tensor(labels) or labels.shape != images.shape[:1] or labels.is_floating_point()
    ):
        raise ValueError(f"labels must be {len(images)} whole numbers, one for each image")


def _check_images(images: Any, name: str) -> None:
    if not torch.is_tensor(images) or images.dim() != 4 or not images.is_floating_point() or not len(images):
        shape = tuple(images.shape) if torch.is_tensor(images) else type(images).__name__
        raise TypeError(f"{name} must be normalised, B × C × H × W, got {shape}")
    for i, image in enumerate(images):  # one by one: all may take much of the memory
        if not image.isfinite().all():
            raise ValueError(f"{name} hold NaN or infinity, first in image {i}: leave those out")


def _check_labels(logits: Any, labels: Tensor | None, name: str) -> None:
    if not torch.is_tensor(logits) or logits.dim() != 2:
        raise ValueError(f"{name} gives no logits, B × classes: freeze the network that has its classifier")
    classes = logits.shape[1]
    if labels is not None and (labels.min() < 0 or labels.max() >= classes):
        wrong = int(labels.min() if labels.min() < 0 else labels.max())
        raise ValueError(f"label {wrong} is not one of the network's {classes} classes, 0 to {classes - 1}")


def _plain(model: Any, images: Tensor) -> Any:
    """A copy, without what folds anyway."""
    model = unwrapped(model)
    if not foldable(model):
        return copied(model).eval()
    return fold(model, images[:2].to(next(model.parameters()))).eval()


def _found(
    model: nn.Module, images: Tensor, also: Iterable[type | str], keep: Sequence[str]
) -> tuple[list[Gate], dict[str, str]]:
    name = type(model).__name__
    try:
        found, unknown = find_gates(model, images, also)
    except ValueError:
        raise
    except Exception as error:  # whatever a network raises on images that it was not made for
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{name} does not take images {tuple(images.shape[1:])} ({reason}): give it those of its own size"
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
    if calibration is not None:
        _check_images(calibration, "calibration")
        if calibration.shape[1:] != images.shape[1:]:
            raise ValueError(
                f"calibration is of {tuple(calibration.shape[1:])}, images {tuple(images.shape[1:])}"
            )
        if calibration_labels is not None and len(calibration_labels) != len(calibration):
            raise ValueError(f"{len(calibration_labels)} calibration_labels for {len(calibration)} images")
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
    # Data sets are sorted by class, or have classes in turn.
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    edges = [round(len(images) * sum(shares[:i])) for i in range(4)]
    rows = [order[low:high].sort().values for low, high in pairwise(edges)]
    parts = [(images[row], None if labels is None else labels[row]) for row in rows]
    if calibration is not None:
        parts[0] = calibration, calibration_labels
    return parts
