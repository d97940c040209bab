"""Small images, decoded once: a memory-mapped file of uint8 pixels, keyed by the encoded images."""

import contextlib
import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.Image import Resampling
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..images import DataError, decode
from .progress import track

if TYPE_CHECKING:
    import datasets

#: Counts the ways in which images were decoded: what an older one has kept is not read.
DECODING = 2


def decoded(
    rows: "datasets.Dataset", column: str, size: tuple[int, int], resize: bool, where: str, skip: bool
) -> tuple[Tensor, Tensor]:
    """Pixels of all rows, from the cache where they are in it.

    Args:
        rows: Rows with undecoded images.
        column: Name of their column.
        size: Width and height in pixels.
        resize: Bring other sizes to this one; else they are an error.
        where: What errors call the rows.
        skip: Leave corrupt images out.

    Returns:
        uint8, N × H × W × 3, mapped from the file; and the rows that they are of, int64, shape (N,).

    Raises:
        DataError: An image is corrupt and ``skip`` is False, or has another size.
    """
    path = cache_folder() / f"{_key(rows, column, size, resize, skip)}.safetensors"
    if path.is_file():
        try:
            return _read(path)
        except (OSError, SafetensorError) as error:
            warnings.warn(f"{path} is damaged and made again: {error}", stacklevel=2)
    pixels, kept = _decode(rows, column, size, resize, where, skip)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"pixels": pixels, "rows": kept}, partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:  # a full disk costs time at the next run, no more
        with contextlib.suppress(OSError):
            partial.unlink()
        warnings.warn(f"decoded images of {where} cannot be kept in {path.parent}: {error}", stacklevel=2)
        return pixels, kept
    return _read(path)


def cache_folder() -> Path:
    """Where this package keeps what it has made of data sets."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "timm_attn"  # pyright: ignore


def _read(path: Path) -> tuple[Tensor, Tensor]:
    with safe_open(path, "pt") as file:
        return file.get_tensor("pixels"), file.get_tensor("rows")


def _cells(rows: "datasets.Dataset", column: str, batch_size: int = 1000) -> Iterator[dict[str, Any]]:
    for batch in rows.with_format("arrow").iter(batch_size):
        yield from batch.column(column).to_pylist()  # pyright: ignore[reportAttributeAccessIssue]


def contents(rows: "datasets.Dataset", column: str, batch_size: int) -> Iterator[bytes]:
    """The encoded images of all rows, so many read at a time; nothing for one that is missing."""
    for cell in _cells(rows, column, batch_size):
        content = (cell or {}).get("bytes")
        if content is None:
            path = Path((cell or {}).get("path") or "")
            content = path.read_bytes() if path.is_file() else b""
        yield content


def _key(rows: "datasets.Dataset", column: str, *options: Any) -> str:
    digest = hashlib.blake2b(repr((DECODING, *options)).encode(), digest_size=16)
    for content in contents(rows, column, 1000):
        digest.update(len(content).to_bytes(8))
        digest.update(content)
    return digest.hexdigest()


def check_sizes(
    rows: "datasets.Dataset",
    column: str,
    numbers: Sequence[int],
    size: tuple[int, int],
    where: str,
    skip: bool,
) -> None:
    """Raise a DataError if one of these rows has an image of another size."""
    cells = zip(numbers, _cells(rows.select(numbers), column), strict=True)
    for _ in _images_of_size(cells, size, where, skip):
        pass


def _images_of_size(
    cells: Iterable[tuple[int, dict[str, Any]]], size: tuple[int, int] | None, where: str, skip: bool
) -> Iterator[tuple[int, Image.Image]]:
    """The images of undecoded cells, with the numbers of their rows; corrupt ones may be left out.

    Raises:
        DataError: An image is corrupt, or has another size than all are to have.
    """
    for row, cell in cells:
        try:
            image = decode(cell, f"row {row} of {where}")
        except DataError:
            if skip:
                continue
            raise
        if size is not None and image.size != size:
            raise DataError(
                f"row {row} of {where} has {image.width}×{image.height} pixels, the first row "
                f"{size[0]}×{size[1]}: give --img-size to bring all to one size"
            )
        yield row, image


def _decode(
    rows: "datasets.Dataset", column: str, size: tuple[int, int], resize: bool, where: str, skip: bool
) -> tuple[Tensor, Tensor]:
    width, height = size
    pixels, kept = np.empty((len(rows), height, width, 3), np.uint8), []
    cells = enumerate(track(_cells(rows, column), len(rows), True, f"decoding {where}"))
    for row, image in _images_of_size(cells, None if resize else size, where, skip):
        if image.size != size:
            image = ImageOps.fit(image, size, Resampling.BILINEAR)
        pixels[len(kept)] = np.asarray(image)
        kept.append(row)
    return torch.from_numpy(pixels[: len(kept)]), torch.tensor(kept)
