"""One image from a data set's cell."""

import io
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import UserError


class DataError(UserError):
    """A data set, a split, an image or a label cannot be used."""


def decode(cell: dict[str, Any], where: str) -> Image.Image:
    """An RGB image from a data set's undecoded cell (``bytes`` or ``path``).

    Raises:
        DataError: The image is missing or corrupt.
    """
    try:
        source = io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"]
        with Image.open(source) as image:
            if image.mode.startswith("I;16"):  # PIL would clip all but the darkest 255 of 65,536 greys
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            elif image.mode in ("I", "F"):
                raise ValueError(f"its pixels are of mode {image.mode}, which has no fixed range")
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError, SyntaxError, TypeError, ValueError) as error:
        path = (cell or {}).get("path")
        raise DataError(
            f"corrupt or unreadable image in {where}{f', path {path}' if path else ''}: {error}. "
            "Repair, convert or remove it, or leave such images out with --on-corrupt skip"
        ) from None
