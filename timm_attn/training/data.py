"""Images from a folder, the Hugging Face Hub or scikit-learn, as one split at a time.

Small images (the side read is at most 64 pixels) are decoded once into one uint8 tensor and augmented by the
batch; larger ones stay encoded and are decoded in worker processes.
"""

import dataclasses
import errno
import glob
import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from ..images import DataError, decode
from ..weights import hub_unreachable
from .folders import image_splits, image_table, readable_folder, split_folders
from .labels import read_labels
from .pixels import cache_folder, check_sizes, contents, decoded

if TYPE_CHECKING:
    import datasets

SMALL = 64  # pixels
MEMORY = 4 * 2**30  # bytes that one decoded split may take
DIGITS_TRAIN = 1437
_GIVE = (
    "Give a folder of parquet files or of unpacked images, train/CLASS/… and test/CLASS/…, a Hugging Face "
    "dataset id, or digits"
)
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
        named: Whether the classes have names; else ``label_names`` are the numbers that occur, sorted.
        skipped: Number of corrupt small images that were left out.
        fingerprint: Digest of labels and images, by which a run that goes on knows its data.
        numbers: Of a part: the numbers that its rows have in the whole split.
        native: Height and width of small images that are too many to be decoded at once.
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
    fingerprint: str = ""
    numbers: Tensor | None = None
    native: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """Decode one larger image as RGB.

        Raises:
            DataError: The image is corrupt.
        """
        assert self.rows is not None
        number = index if self.numbers is None else int(self.numbers[index])
        return decode(self.rows[index][self.column], f"row {number} of {self.data} ({self.name})")

    def select(self, indices: Tensor, name: str) -> "Split":
        """A part of the split, under another name."""
        return dataclasses.replace(
            self,
            name=name,
            labels=self.labels[indices],
            pixels=None if self.pixels is None else self.pixels[indices],
            rows=None if self.rows is None else self.rows.select(indices.tolist()),
            numbers=indices if self.numbers is None else self.numbers[indices],
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
    config: str | None = None,
    revision: str | None = None,
) -> Split:
    """Read one split.

    Args:
        data: A folder, a Hugging Face dataset id, or ``digits``.
        role: ``train``, or ``eval`` for the split that is evaluated.
        name: The split's name; found by ``role`` if None.
        size: Width and height in pixels that images are brought to; None keeps small images as they are.
        encoded: Leave small images encoded, too.
        skip_corrupt: Leave small images that are corrupt out; larger ones are decoded later.
        config: Configuration of a data set that has several.
        revision: Branch, tag or commit of a data set on the Hub.

    Raises:
        DataError: There is no such data, split or column, or an image or label cannot be used.
    """
    if data == "digits":
        return _digits(role, name, size or (32, 32))
    rows, name = _rows(data, role, name, config, revision)
    where = f"{data} ({name})"
    column, target = _columns(data, rows.features, image_column, label_column)
    labels, label_names, named = read_labels(rows, target, where)
    import datasets

    rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    first = _first_image(rows, column, where, skip_corrupt)
    if "bits" in first.info:
        warnings.warn(
            f"images of {where} have sixteen bits a channel, of which the first uses {first.info['bits']}: "
            "each is scaled to eight by its own depth",
            stacklevel=2,
        )
    split = Split(data, name, labels, label_names, rows=rows, column=column, named=named)
    split.fingerprint = _fingerprint(split)
    width, height = size or first.size
    if encoded or max(width, height) > SMALL:
        return split
    if len(rows) * width * height * 3 > MEMORY:
        if size is None:
            check_sizes(rows, column, _sample(len(rows)), first.size, where, skip_corrupt)
        return dataclasses.replace(split, native=(height, width))
    pixels, kept = decoded(rows, column, (width, height), size is not None, where, skip_corrupt)
    skipped = len(rows) - len(kept)
    return dataclasses.replace(split, labels=labels[kept], pixels=pixels, rows=None, skipped=skipped)


def _fingerprint(split: Split) -> str:
    """Digest of all labels and of a thousand images, evenly spaced: the same wherever the data lies."""
    digest = hashlib.blake2b(split.labels.numpy().tobytes(), digest_size=16)
    assert split.rows is not None
    few = split.rows.select(_sample(len(split)))
    for content in contents(few, split.column, 16):  # photos may be large
        digest.update(len(content).to_bytes(8) + content)
    return digest.hexdigest()


def _sample(rows: int) -> range:
    """At most a thousand rows, evenly spaced."""
    return range(0, rows, -(-rows // 1000))


def _first_image(rows: "datasets.Dataset", column: str, where: str, skip: bool) -> Image.Image:
    for row in range(len(rows)):
        try:
            return decode(rows[row][column], f"row {row} of {where}")
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
    fingerprint = hashlib.blake2b(bunch.images[part].tobytes(), digest_size=16).hexdigest()
    names = [str(d) for d in range(10)]
    return Split("digits", name, labels, names, pixels=pixels, fingerprint=fingerprint)


def _rows(
    data: str, role: str, name: str | None, config: str | None, revision: str | None
) -> tuple["datasets.Dataset", str]:
    if not data:
        raise DataError("no data: give --data a folder, a Hugging Face dataset id, or digits")
    folder = Path(data)
    if not folder.is_dir() and (data[0] in "./~\\" or data.count("/") > 1 or folder.exists()):
        hint = " (an archive is to be unpacked)" if folder.is_file() else ""
        raise DataError(f"{data} is not a folder{hint}: give a folder, a Hugging Face dataset id, or digits")
    images = image_splits(folder) if folder.is_dir() and config is None else {}
    if images:
        name = _chosen_split(data, role, name, images)
        rows = image_table(images[name])
    else:
        rows, name = _read(data, role, name, config, revision)
    if len(rows) == 0:
        raise DataError(f"split {name!r} of {data} is empty: name another with --{role}-split")
    return rows, name


class NoSplit(DataError):
    """A data set has not the split that is asked for.

    Attributes:
        found: What it has, in words without a hint.
        above: A hint at the folder above, if the given one looks like a split itself; else ''.
    """

    def __init__(self, found: str, hint: str, above: str) -> None:
        super().__init__(f"{found}: {hint}{above}")
        self.found, self.above = found, above


def _chosen_split(data: str, role: str, name: str | None, splits: Iterable[str]) -> str:
    wanted = [name] if name else ["train"] if role == "train" else ["test", "validation"]
    found = [n for n in wanted if n in splits]
    if not found:
        hint = f"choose with --{role}-split"
        if role == "eval" and not name:
            hint += ", or hold out a part of the training split with --val-fraction 0.2"
        above = ""
        if Path(data).name in ("train", *wanted):
            above = f", or give the folder above, {Path(data).resolve().parent}"
        raise NoSplit(f"{data} has no split {' or '.join(wanted)}, only {', '.join(splits)}", hint, above)
    return found[0]


def _read(
    data: str, role: str, name: str | None, config: str | None, revision: str | None
) -> tuple["datasets.Dataset", str]:
    """One split, by Hugging Face `datasets`."""
    import datasets

    folder, source, patterns = Path(data), data, None
    if not folder.is_dir():
        _check_hub(data)
    try:
        if folder.is_dir():
            folder = readable_folder(folder.resolve(), cache_folder() / "links")
            parts = split_folders(folder) if config is None else {}
            patterns = {split: f"{part.name}/**" for split, part in parts.items()} or None
            source = str(folder)
        builder: Any = datasets.load_dataset_builder(source, config, data_files=patterns, revision=revision)
        files = {
            str(split): list(map(str, paths)) for split, paths in (builder.config.data_files or {}).items()
        }
        _check_files(data, files)
        if folder.is_dir() and config is None:
            # A split alone: `datasets` reads the class names of the first one into all.
            name = _chosen_split(data, role, name, files)
            _check_class_names(files[name])
            patterns = {name: [glob.escape(path) for path in files[name]]}
            builder = datasets.load_dataset_builder(source, data_files=patterns)
        builder.download_and_prepare()
        splits = builder.as_dataset()
    except DataError:
        raise
    except Exception as error:  # the library raises a dozen types, OSError to ValueError
        if "corresponds to no data" in str(error):
            raise DataError(f"a split of {data} is empty ({error}): fill or remove it") from error
        nowhere = "" if "/" in data else "there is no folder of that name here, and on the Hub: "
        raise DataError(f"cannot read {data!r} as a data set: {nowhere}{_why(error)}") from error
    name = _chosen_split(data, role, name, splits)
    return splits[name], name


def _check_hub(data: str) -> None:
    """Raise a DataError at once if the Hub does not answer: `datasets` goes on asking for half a minute."""
    from datasets import config
    from datasets.naming import camelcase_to_snakecase

    *owner, name = data.split("/")
    cached = config.HF_DATASETS_CACHE / "___".join((*owner, camelcase_to_snakecase(name)))
    if cached.is_dir():
        return
    reason = hub_unreachable()
    if reason:
        raise DataError(
            f"cannot read {data!r} as a data set: there is no folder of that name here, none in the cache, "
            f"and {reason}. Get a connection, or give another place. {_GIVE}"
        )


def _check_files(data: str, files: Mapping[str, Sequence[str]]) -> None:
    owner: dict[str, str] = {}
    for split, paths in files.items():
        for path in paths:
            if owner.setdefault(path, split) != split:
                raise DataError(
                    f"{path} of {data} would be in the splits {owner[path]} and {split}, by its name: rename "
                    "it or its folder"
                )


def _check_class_names(files: Sequence[str]) -> None:
    """Raise a DataError if the Parquet files of a split name other classes: `datasets` reads the first's."""
    from pyarrow import parquet

    first = None
    for file in files:
        if not file.endswith(".parquet"):
            continue
        metadata = (parquet.read_schema(file).metadata or {}).get(b"huggingface", b"{}")
        features = json.loads(metadata).get("info", {}).get("features", {})
        names = {c: f["names"] for c, f in features.items() if isinstance(f, dict) and "names" in f}
        if first is not None and names != first[1]:
            raise DataError(f"{first[0]} and {file} have other class names: write them with the same")
        first = first or (file, names)


_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


def _why(error: BaseException) -> str:
    """What went wrong at the root of an error of `datasets`, and the fix."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    causes = "; ".join(dict.fromkeys(f"{type(e).__name__}: {' '.join(str(e).split())}" for e in chain))
    for cause in chain:
        if isinstance(cause, OSError) and cause.errno in _CLOSED:
            where = cause.filename or "the folder"
            return f"{causes}. Give yourself access to {where}, or name a cache with room by HF_HOME"
    if "Config name is missing" in causes:
        return f"{causes}. Choose with --data-config"
    return f"{causes.rstrip('.')}. {_GIVE}"


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
            c
            for c, f in features.items()
            if getattr(f, "dtype", "") in ("binary", "large_binary") or "bytes" in dict_of(f)
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
    named = {*classes, *plain} & {*LABEL_NAMES}
    # Class labels under another name beside a column of that name: either may be meant.
    candidates = [] if classes and named and not named & {*classes} else classes or plain
    if len(candidates) > 1:  # CIFAR-100 has coarse and fine labels
        candidates = [c for c in LABEL_NAMES if c in candidates][:1]
    if not candidates:
        raise DataError(
            f"{data} has no clear label column in {', '.join(features)}: name it with --label-column "
            "(a folder of images needs one folder a class, and at least two)"
        )
    return candidates[0]
