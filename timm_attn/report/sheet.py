"""Predictions as pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..predict import Prediction, read_image
from ..style import new_figure

#: Images on a sheet.
MOST = 48


def contact_sheet(predictions: Sequence[Prediction], title: str) -> Any:
    """A figure of images with their most probable class, at most ``MOST`` of them.

    Args:
        predictions: Whose sources are files.
        title: Of the sheet.
    """
    shown = predictions[:MOST]
    columns = min(6, len(shown))
    rows = -(-len(shown) // columns)
    figure, axes = new_figure(title, 0.5 + 1.75 * rows, rows, columns)
    for axis in axes.flatten():
        axis.set_axis_off()
    for axis, prediction in zip(axes.flatten(), shown, strict=False):
        image = read_image(Path(prediction.source))
        image.thumbnail((256, 256))
        axis.imshow(image)
        axis.set_title(
            f"{short(prediction.classes[0])}\n{100 * prediction.probabilities[0]:.0f} %", fontsize=8
        )
    return figure


def short(name: str, most: int = 20) -> str:
    """A class's name, cut so that it fits above a picture."""
    return name if len(name) <= most else f"{name[: most - 1]}…"
