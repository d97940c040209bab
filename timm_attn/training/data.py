"""Images from a folder, the Hugging Face Hub or scikit-learn, as one split at a time.

Small images (the side read is at most 64 pixels) are decoded once into one uint8 tensor and augmented by the
batch; larger ones stay encoded and are decoded in worker processes.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .images import DataError, decode
from .pixels import decoded

if TYPE_CHECKING:
    import datasets

SMALL = 64  # pixels
MEMORY = 4 * 2**30  # bytes that one decoded split may take
DIGITS_TRAIN = 1437
LABEL_NAMES = ("label", "labels", "fine_label", "target", "class")


@dataclass
class Split:
    """One split of an image classification data set.

    Args:
        data: The data set as the user named it.
        name: The split.
        labels: Class indices, int64, shape (N,).
        label_names: Class names, by index.
        pixels: Small images: uint8, N × H × W × 3. None for larger ones.
        rows: Larger images: the data set's rows, image bytes undecoded. None for small ones.
        column: Name of the image column of ``rows``.
        named: Whether the classes have names; else ``label_names`` are the numbers up to the greatest label.
        skipped: Number of corrupt small images that were left out.
    """

    data: str
    name: str
    labels: Tensor
    label_names: list[str]
    pixels: Tensor | None = None
    rows: "datasets.Dataset | None" = None
    column: str = "image"
    named: bool = True
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """Decode one larger image as RGB.

        Raises:
            DataError: The image is corrupt.
        """
        assert self.rows is not None
        return decode(self.rows[index][self.column], f"row {index} of {self.data} ({self.name})")

    def select(self, indices: Tensor, name: str) -> "Split":
        """A part of the split, under another name."""
        return dataclasses.replace(
            self,
            name=name,
            labels=self.labels[indices],
            pixels=None if self.pixels is None else self.pixels[indices],
            rows=None if self.rows is None else self.rows.select(indices.tolist()),
        )

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Channel means and standard deviations of small images, in [0, 1]."""
        assert self.pixels is not None
        # Exact in integers: a float32 mean over 50 million pixels is not.
        values = torch.arange(256, dtype=torch.float64) / 255
        means, stds = [], []
        for channel in self.pixels.unbind(3):
            counts = torch.bincount(channel.flatten(), minlength=256).double()
            mean = (counts @ values / counts.sum()).item()
            means.append(mean)
            stds.append((counts @ (values - mean).square() / counts.sum()).sqrt().item())
        return tuple(means), tuple(stds)


def load_split(
    data: str,
    role: str,
    name: str | None = None,
    size: tuple[int, int] | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    encoded: bool = False,
    skip_corrupt: bool = False,
) -> Split:
    """Read one split.

    Args:
        data: A folder, a Hugging Face dataset id, or ``digits``.
        role: ``train``, or ``eval`` for the split that is evaluated.
        name: The split's name; found by ``role`` if None.
        size: Width and height in pixels that images are brought to; None keeps small images as they are.
        encoded: Leave small images encoded, too.
        skip_corrupt: Leave small images that are corrupt out; larger ones are decoded later.

    Raises:
        DataError: There is no such data, split or column, or an image or label cannot be used.
    """
    if data == "digits":
        return _digits(role, name, size or (32, 32))
    rows, name = _rows(data, role, name)
    column, target = _columns(data, rows.features, image_column, label_column)
    labels, label_names, named = _labels(data, name, rows, target)
    import datasets

    rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    width, height = size or _first_size(rows, column, f"{data} ({name})", skip_corrupt)
    if encoded or max(width, height) > SMALL or len(rows) * width * height * 3 > MEMORY:
        return Split(data, name, labels, label_names, rows=rows, column=column, named=named)
    pixels, kept = decoded(rows, column, (width, height), size is not None, f"{data} ({name})", skip_corrupt)
    return Split(
        data, name, labels[kept], label_names, pixels=pixels, named=named, skipped=len(rows) - len(kept)
    )


def _first_size(rows: "datasets.Dataset", column: str, where: str, skip: bool) -> tuple[int, int]:
    for row in range(len(rows)):
        try:
            return decode(rows[row][column], f"row {row} of {where}").size
        except DataError:
            if not skip:
                raise
    raise DataError(f"no image of {where} can be decoded: choose other data")


def _digits(role: str, name: str | None, size: tuple[int, int]) -> Split:
    """scikit-learn's 1,797 digits: the first 1,437 train, the last 360 test; 8×8 grey enlarged, as RGB.

    The rows are in the order in which people wrote them, so hardly anybody's digits are in both splits.
    """
    from sklearn.datasets import load_digits

    name = name or ("train" if role == "train" else "test")
    if name not in ("train", "test"):
        raise DataError(f"digits has the splits train and test, not {name!r}")
    part = slice(None, DIGITS_TRAIN) if name == "train" else slice(DIGITS_TRAIN, None)
    bunch: Any = load_digits()
    grey = torch.from_numpy(bunch.images[part] / 16).float()[:, None]
    large = torch.nn.functional.interpolate(grey, size=size[::-1], mode="bilinear", align_corners=False)
    pixels = (large * 255).round().to(torch.uint8).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous()
    labels = torch.from_numpy(bunch.target[part]).long()
    return Split("digits", name, labels, [str(d) for d in range(10)], pixels=pixels)


def _rows(data: str, role: str, name: str | None) -> tuple["datasets.Dataset", str]:
    import datasets

    if not data:
        raise DataError("no data: give --data a folder, a Hugging Face dataset id, or digits")
    if not Path(data).is_dir() and (data[0] in "./~\\" or data.count("/") > 1 or Path(data).exists()):
        raise DataError(f"{data} is not a folder: give a folder, a Hugging Face dataset id, or digits")
    try:
        splits: Any = datasets.load_dataset(str(Path(data).resolve()) if Path(data).is_dir() else data)
    except Exception as error:  # the library raises a dozen types, OSError to ValueError
        if "corresponds to no data" in str(error):
            raise DataError(f"a split of {data} is empty ({error}): fill or remove it") from None
        raise DataError(
            f"cannot read {data!r} as a data set: {type(error).__name__}: {error}. "
            "Give a folder of parquet files or images, a Hugging Face dataset id, or digits"
        ) from None
    names = list(splits)
    wanted = [name] if name else ["train"] if role == "train" else ["test", "validation"]
    found = [n for n in wanted if n in splits]
    if not found:
        raise DataError(
            f"{data} has no split {' or '.join(wanted)}, only {', '.join(names)}: choose with --{role}-split"
        )
    name = found[0]
    if len(splits[name]) == 0:
        raise DataError(f"split {name!r} of {data} is empty: name another with --{role}-split")
    return splits[name], name


def _columns(data: str, features: Any, image: str | None, label: str | None) -> tuple[str, str]:
    for given in (image, label):
        if given is not None and given not in features:
            raise DataError(f"{data} has no column {given!r}; it has {', '.join(features)}")
    return _image_column(data, features, image), label or _label_column(data, features)


def _image_column(data: str, features: Any, image: str | None) -> str:
    import datasets

    images = [c for c, f in features.items() if isinstance(f, datasets.Image)]
    if not images:  # parquet files that other libraries wrote: encoded images without the type
        images = [
            c for c, f in features.items() if getattr(f, "dtype", "") == "binary" or "bytes" in dict_of(f)
        ]
    if image is not None and image not in images:
        raise DataError(f"column {image!r} of {data} holds {features[image]}, not images")
    if image is None and len(images) != 1:
        found = f"several image columns ({', '.join(images)})" if images else "no image column"
        raise DataError(f"{data} has {found} among {', '.join(features)}: name one with --image-column")
    return image or images[0]


def dict_of(feature: Any) -> dict[str, Any]:
    """The fields of a struct feature, nothing for others."""
    return feature if isinstance(feature, dict) else {}


def _label_column(data: str, features: Any) -> str:
    import datasets

    classes = [c for c, f in features.items() if isinstance(f, datasets.ClassLabel)]
    plain = [c for c, f in features.items() if isinstance(f, datasets.Value) and c in LABEL_NAMES]
    candidates = classes or plain
    if len(candidates) > 1:  # CIFAR-100 has coarse and fine labels
        candidates = [c for c in LABEL_NAMES if c in candidates][:1]
    if not candidates:
        raise DataError(
            f"{data} has no clear label column in {', '.join(features)}: name it with --label-column "
            "(a folder of images needs one folder a class, and at least two)"
        )
    return candidates[0]


def _labels(data: str, split: str, rows: "datasets.Dataset", column: str) -> tuple[Tensor, list[str], bool]:
    import datasets

    feature = rows.features[column]
    missing = rows.data.column(column).null_count
    if missing:
        raise DataError(f"{missing} rows of {data} ({split}) have no {column}: remove or label them")
    values = rows.with_format("numpy")[column][:]
    if isinstance(feature, datasets.ClassLabel):
        names = list(feature.names)
    elif np.issubdtype(np.asarray(values).dtype, np.integer):
        names = [str(i) for i in range(int(np.max(values)) + 1)]
    elif np.asarray(values).dtype.kind in "UO":
        names = sorted(set(map(str, values)))
        values = [names.index(str(v)) for v in values]
    else:
        raise DataError(f"column {column!r} of {data} holds {feature}, not class labels")
    labels = torch.as_tensor(np.asarray(values)).long()
    bad = ((labels < 0) | (labels >= len(names))).nonzero()
    if len(bad):
        row = int(bad[0])
        raise DataError(
            f"label {int(labels[row])} in row {row} of {data} ({split}) is out of range 0 to {len(names) - 1}"
            " (-1 usually marks a split without labels): choose another split or repair the column"
        )
    named = isinstance(feature, datasets.ClassLabel) or np.asarray(values).dtype.kind in "UO"
    return labels, names, named
