"""Folders of images: which file is in which split, and of which class.

The splits are the folders ``train`` beside ``test``, ``val`` or ``validation`` (or another of the names that
Hugging Face `datasets` knows) at the root, and nothing below them is one. Any other folder of images is one
training split. A class is the folder that an image lies in.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..images import NEWER_EXTENSIONS, DataError

if TYPE_CHECKING:
    import datasets


class ImageFile(NamedTuple):
    """An image, its class, the depth of folders that it lies in, and where links lead."""

    path: str
    label: str
    depth: int
    real: str


def _keywords() -> dict[str, str]:
    """Folder name to split."""
    from datasets.data_files import SPLIT_KEYWORDS

    return {name: str(split) for split, names in SPLIT_KEYWORDS.items() for name in names}


def _subfolders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not _hidden(p.name))


def _hidden(name: str) -> bool:
    return name.startswith((".", "__"))  # __MACOSX holds an icon for every image


def split_folders(root: Path) -> dict[str, Path]:
    """Folders of the splits of a data set by the split's name; none where the whole is one split.

    Raises:
        DataError: Two folders would be the same split.
    """
    keywords, found = _keywords(), {}
    folders = _subfolders(root)
    for folder in folders:
        split = keywords.get(folder.name.casefold())
        if split in found:
            raise DataError(
                f"{found[split]} and {folder} would both be the split {split}: rename or move one"
            )
        if split:
            found[split] = folder
    others = len(folders) > len(found)
    deep = bool(found) and all(map(_subfolders, found.values()))
    if others and not deep:
        return {}  # classes side by side, some with the name of a split
    beside = "train" in found and len(found) > 1
    return found if beside or (deep and not others) else {}


def image_splits(root: Path) -> dict[str, list[ImageFile]]:
    """The images of a folder by split, in the order of their paths.

    Links to files and folders are followed. Nothing where no folder holds images, or where something else
    says what splits and labels are: Parquet and Arrow files, ``metadata.csv``, a dataset card that
    configures them.

    Raises:
        DataError: An image is in two splits or in no class folder, or class folders cannot be told from
            others.
    """
    while not _says_more(root) and not split_folders(root) and len(_subfolders(root)) == 1:
        (inner,) = _subfolders(root)
        if not _subfolders(inner):
            break
        root = inner  # what an archive is unpacked into
    if _card_decides(root):
        return {}
    folders = split_folders(root) or {"train": root}
    found = {split: list(_images(folder)) for split, folder in folders.items()}
    images = {split: [image for image in some if image] for split, some in found.items()}
    labelled = any(image.depth for some in images.values() for image in some)
    if not labelled or any(None in some for some in found.values()):
        return {}
    owner: dict[str, str] = {}
    for split, some in images.items():
        for image in some:
            if owner.setdefault(image.real, split) != split:
                raise DataError(
                    f"{image.path} is in the splits {owner[image.real]} and {split}: remove one of the links"
                )
        _check_classes(folders[split], some)
    return images


def _says_more(root: Path) -> bool:
    """Whether a folder itself holds images, or what says more than folders do."""
    kinds = (_kind(path.name) for path in root.iterdir() if path.is_file() and not _hidden(path.name))
    return _card_decides(root) or any(kinds)


def _kind(name: str) -> str:
    """``image``, ``table`` for a file that says more than folders do, or nothing for others."""
    extension = os.path.splitext(name.lower())[1]
    if extension in (".parquet", ".arrow") or name.lower() in ("metadata.csv", "metadata.jsonl"):
        return "table"
    return "image" if extension in _extensions() else ""


@cache
def _extensions() -> frozenset[str]:
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    return frozenset((*ImageFolder.EXTENSIONS, *NEWER_EXTENSIONS))


def _card_decides(root: Path) -> bool:
    card = root / "README.md"
    if not card.is_file():
        return False
    head = card.read_text(encoding="utf-8", errors="replace").split("\n---", 1)[0]
    return head.startswith("---") and "\nconfigs:" in head


def _walk(folder: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Each folder below one, links followed: its path, where that leads, and its files."""
    for path, names, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(path)
        below = path != os.fspath(folder)
        if below and os.path.islink(path) and real in map(os.path.realpath, Path(path).absolute().parents):
            names.clear()  # it leads to a folder above
            continue
        names[:] = sorted(name for name in names if not _hidden(name))
        yield path, real, sorted(name for name in files if not _hidden(name))


def _images(folder: Path) -> Iterator[ImageFile | None]:
    """Images below a folder; None for a file that says more than folders do."""
    known: dict[tuple[str, str], str] = {}
    for path, real, files in _walk(folder):
        relative = Path(path).relative_to(folder)
        if known.setdefault((real, relative.name), path) != path:
            continue  # another link has led here, to the same class
        for name in files:
            kind = _kind(name)
            if kind == "table":
                yield None
            elif kind == "image":
                file = os.path.join(path, name)
                target = os.path.realpath(file) if os.path.islink(file) else os.path.join(real, name)
                yield ImageFile(file, relative.name, len(relative.parts), target)


def _check_classes(folder: Path, images: list[ImageFile]) -> None:
    by_depth = {image.depth: image.path for image in images}
    if 0 in by_depth and len(by_depth) > 1:
        raise DataError(f"{by_depth[0]} lies in no class folder: move it into one, or away")
    if len(by_depth) > 1:
        first, second, *_ = by_depth.values()
        raise DataError(
            f"{first} and {second} lie at different depths, so that their classes are not clear: bring all "
            "class folders to one depth"
        )
    labels = {image.label for image in images}
    if labels and max(by_depth) > 1 and labels <= _keywords().keys():
        raise DataError(
            f"the splits {', '.join(sorted(labels))} of {folder} lie in the class folders: put the class "
            "folders into the folders of the splits, e.g. train/CLASS"
        )
    known: dict[str, ImageFile] = {}
    for image in images:
        first = known.setdefault(image.real, image)
        if first.label != image.label:
            raise DataError(f"{first.path} and {image.path} are one image in two classes: take one away")
        try:
            image.path.encode()
        except UnicodeEncodeError:
            raise DataError(f"the path {os.fsencode(image.path)!r} is not UTF-8: rename it") from None


def image_table(images: list[ImageFile]) -> "datasets.Dataset":
    """Rows with an undecoded ``image`` and, if the images lie in class folders, a ``label``."""
    import datasets

    names = sorted({image.label for image in images})
    index = {name: i for i, name in enumerate(names)}
    columns: dict[str, list[Any]] = {"image": [{"bytes": None, "path": image.path} for image in images]}
    features: dict[str, Any] = {"image": datasets.Image(decode=False)}
    if names != [""]:
        columns["label"] = [index[image.label] for image in images]
        features["label"] = datasets.ClassLabel(names=names)
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def readable_folder(folder: Path, cache: Path) -> Path:
    """A folder of files for `datasets`: itself, or where it cannot be read, links to its files in ``cache``.

    `datasets` does not follow links to folders, and takes ``[`` in a path for a pattern.
    """
    links = any(os.path.islink(os.path.join(path, n)) for path, names, _ in os.walk(folder) for n in names)
    if not links and not set("*?[") & set(str(folder)):
        return folder
    files = {
        Path(path).relative_to(folder) / name: os.path.realpath(os.path.join(path, name))
        for path, _, names in _walk(folder)
        for name in names
    }
    content = [(str(name), target, os.stat(target).st_mtime_ns) for name, target in files.items()]
    mirror = cache / hashlib.blake2b(os.fsencode(repr(content)), digest_size=16).hexdigest()
    if not mirror.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=cache))
        for name, target in files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).symlink_to(target)
        with contextlib.suppress(OSError):  # another process was faster
            partial.rename(mirror)
        shutil.rmtree(partial, ignore_errors=True)
    return mirror
