"""A contact sheet of images with their predicted classes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import ImageOps

from ..predict import Prediction, read_image
from ..style import new_figure, short

#: Largest number of images on a sheet.
MOST = 48


def contact_sheet(predictions: Sequence[Prediction], title: str) -> Any:
    """A figure of images with their most probable class, at most ``MOST`` of them.

    Args:
        predictions: Predictions for image files.
        title: Title of the sheet.
    """
    shown = predictions[:MOST]
    columns = min(6, len(shown))
    rows = -(-len(shown) // columns)
    if len(shown) < len(predictions):
        title += f": {len(shown)} of {len(predictions):,}"
    figure, axes = new_figure(title, 0.5 + 1.9 * rows, rows, columns)
    for axis in axes.flatten():
        axis.set_axis_off()
    for axis, prediction in zip(axes.flatten(), shown, strict=False):
        image = read_image(Path(prediction.source))
        image.thumbnail((256, 256))
        axis.imshow(ImageOps.pad(image, (256, 256), color="white"))
        percent = f"{100 * prediction.probabilities[0]:.0f} %"
        lines = (short(Path(prediction.source).name), short(prediction.classes[0]), percent)
        axis.set_title("\n".join(lines), fontsize=7)
    return figure
