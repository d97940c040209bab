"""Decodes one image of a dataset: upright, opaque, eight bits per channel."""

import contextlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from .errors import UserError

#: Bytes that a pixel takes while an image is decoded and converted, at most.
_PIXEL = 8
#: Image files that Pillow reads and Hugging Face `datasets` does not list.
NEWER_EXTENSIONS = {".avif", ".avifs"}


class DataError(UserError):
    """A dataset, a split, an image or a label cannot be used."""


def decode(cell: dict[str, Any], where: str) -> Image.Image:
    """An RGB image from a data set's undecoded cell (``bytes`` or ``path``).

    The image is rotated according to its EXIF orientation, and transparent pixels are put on white. Sixteen
    bits per channel are scaled to eight: their range is the smallest of 8, 10, 12, 14 and 16 bits that holds
    the values of the image, and is given as ``info["bits"]``.

    Raises:
        DataError: The image is missing or corrupt, or too large for an eighth of this machine's memory.
    """
    try:
        data = Path(cell["path"]).read_bytes() if cell["bytes"] is None else cell["bytes"]
        with _no_pixel_limit(), Image.open(io.BytesIO(data)) as image:
            return plain(image)
    except Exception as error:  # Pillow's plugins raise whatever their codecs raise
        path = (cell or {}).get("path")
        reason = re.sub(r" <_io\.\w+ object at 0x[0-9a-f]+>", "", str(error))  # Pillow's name for our bytes
        raise DataError(
            f"corrupt or unreadable image in {where}{f', path {path}' if path else ''}: {reason}. "
            "Repair, convert or remove it, or leave such images out: --on-corrupt skip, of train and validate"
        ) from error


def plain(image: Image.Image) -> Image.Image:
    """An image as RGB, upright and opaque, as ``decode`` gives it.

    Raises:
        ValueError: It is too large, or its pixels have no fixed range.
        OSError: It is damaged.
    """
    _check_memory(image)
    deep = _sixteen_bits(image)
    image.load()  # turns a TIFF upright itself, and lets go of the other's raw mode
    orientation = _orientation(image)
    shown: Image.Image = image if deep is None else deep
    bits = shown.info.get("bits") if deep else None
    if shown.has_transparency_data:
        shown = shown.convert("RGBA")
        shown = Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown)
    shown = shown.convert("RGB")
    shown.info = {} if bits is None else {"bits": bits}
    shown.getexif()[ExifTags.Base.Orientation] = orientation
    return ImageOps.exif_transpose(shown)


@contextlib.contextmanager
def _no_pixel_limit() -> Iterator[None]:
    """Pillow takes any scan of more than 179 megapixels for an attack; here the memory decides."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _check_memory(image: Image.Image) -> None:
    needed, limit = image.width * image.height * _PIXEL, _physical_memory() // 8
    if needed > limit:
        raise ValueError(
            f"{image.width}×{image.height} pixels take {needed / 2**30:.1f} GiB, over an eighth of memory"
        )


def _physical_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf
        return 16 * 2**30


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF data is no damaged image
        return 1


def _sixteen_bits(image: Any) -> Image.Image | None:
    """An image of sixteen bits a channel scaled to eight, with ``info["bits"]``; None of others."""
    raw = str(image.tile[0].args) if getattr(image, "tile", None) else ""
    if image.mode == "F":
        raise ValueError("its pixels are of mode F, which has no fixed range")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"its pixels of mode {image.mode} do not fit sixteen bits")
        return _scaled(values, 0)
    return _scaled(np.asarray(image), 8) if ";16" in raw else None


def _scaled(values: np.ndarray, cut: int) -> Image.Image:
    """Eight bits a channel from sixteen, H × W or H × W × C, less the lower ones that Pillow has cut off."""
    colours = values if values.ndim == 2 else values[..., :3]
    bits = next(bits for bits in (8, 10, 12, 14, 16) if colours.max() < 2 ** (bits - cut))
    if bits == cut:
        raise ValueError("its colours of sixteen bits use the lower eight only, which Pillow does not read")
    image = Image.fromarray((colours.astype(np.uint32) * 255 // (2 ** (bits - cut) - 1)).astype(np.uint8))
    if values.shape[2:] == (4,):
        image.putalpha(Image.fromarray(values[..., 3]))
    image.info["bits"] = bits
    return image
