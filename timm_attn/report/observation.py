"""Samples of images, and observations of networks on them as pictures and tables."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..files import write_csv
from ..fold import foldable
from ..gates import matching
from ..record import Record, record
from ..style import style, write_png


@dataclass(frozen=True)
class Sample:
    """Images to observe networks on.

    Attributes:
        images: B × C × H × W, normalised.
        labels: Their classes, B.
        names: Names of the classes.
        mean, std: Mean and standard deviation of each channel, used to normalise the images.
    """

    images: Tensor
    labels: Tensor
    names: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.images)

    def first(self, n: int) -> "Sample":
        """The first n images."""
        return Sample(self.images[:n], self.labels[:n], self.names, self.mean, self.std)

    def batches(self, model: Any, size: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels in batches, on a network's device."""
        like = next(model.parameters())
        for i in range(0, len(self), size):
            yield self.images[i : i + size].to(like), self.labels[i : i + size].to(like.device)

    def pixels(self) -> Any:
        """The images before normalisation, B × H × W × C in [0, 1], on the CPU."""
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return (self.images.cpu().float() * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()


@dataclass(frozen=True)
class Observation:
    """A picture, the figures in it, and their summary.

    Attributes:
        name: Name of the observation, such as "stripes".
        rows: Rows of the CSV.
        summary: (quantity, our value, the paper's value), as text.
        draw: Makes the picture, a matplotlib figure.
        images: Number of images used.
    """

    name: str
    rows: list[dict[str, Any]]
    summary: list[tuple[str, str, str]]
    draw: Callable[[], Any]
    images: int

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write ``<name>.png`` and ``<name>.csv`` into a folder, which is created if necessary."""
        folder.mkdir(parents=True, exist_ok=True)
        picture, table = folder / f"{self.name}.png", folder / f"{self.name}.csv"
        with style():
            write_png(self.draw(), picture)
        write_csv(table, self.rows)
        return picture, table


def recorded(
    name: str,
    model: Any,
    sample: Sample,
    gates: Sequence[str] = (),
    keep: int = 0,
    correlation: bool = False,
) -> Record:
    """Record the gates of a network on a sample.

    Args:
        name: Name of the network.
        model: Network in eval mode.
        sample: Images.
        gates: Shell patterns of paths of gates; by default, all.
        keep: Number of images whose gates are kept.
        correlation: Also collect correlations between gates.

    Raises:
        UserError: The network has no gates, a pattern matches none, their inputs are all zero, or an output
            is not finite.
    """
    x, _ = next(sample.batches(model, 2))
    with record(model, correlation=False) as found, torch.no_grad():
        model(x)
    if not found.gates and foldable(model):
        raise UserError(
            f"the gates of {name} are constants, the same for every image, and fold away: choose a network "
            "with SE, ECA, DIA or the like"
        )
    if not found.gates:
        raise UserError(f"{name} has no channel gates: choose a network with SE, ECA, DIA or the like")
    try:
        chosen = matching([gate.path for gate in found.gates], gates or ["*"], "--gates")
    except ValueError as error:
        raise UserError(f"{error} in {name}") from None
    asked = [gate for gate in found.gates if gate.path in chosen]
    with record(model, asked, keep=keep, correlation=correlation) as found, torch.no_grad():
        for x, y in sample.batches(model):
            found.labels = y
            model(x)
    for gate in found.gates:
        if found[gate.path].not_finite:
            raise UserError(
                f"{name} is not finite after {gate.path} in {found[gate.path].not_finite} of {len(sample)} "
                "images: its weights or the images are damaged"
            )
    found.gates = [gate for gate in found.gates if found[gate.path].known.any()]
    if not found.gates:
        raise UserError(
            f"the gates of {name} see nothing but zeros, as its branches are still zero: train it"
        )
    return found


def spaced(items: list[Any], most: int) -> list[Any]:
    """At most ``most`` items of a list, evenly spaced, including the first and the last."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / max(1, most - 1))] for i in range(most)]


def round_to(value: float, digits: int = 4) -> float:
    """Round to significant digits, for tables."""
    return float(f"{value:.{digits}g}")
