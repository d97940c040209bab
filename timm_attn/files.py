"""Files: written so that nobody sees half of one, and their digests."""

import contextlib
import csv
import errno
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one; a device or a pipe is written to.

    Raises:
        OSError: It cannot be written; the old one is left.
    """
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    path = link_target(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as stream:
            with contextlib.suppress(OSError):  # there is none, or the file system has no such thing
                shutil.copymode(path, partial)
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def link_target(path: Path) -> Path:
    """Where a file is, or will be, that a link may lead to.

    Raises:
        OSError: The link leads back to itself.
    """
    try:
        path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise
    return Path(os.path.realpath(path))


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise what safetensors cannot write as the OSError that it is."""
    try:
        yield
    except SafetensorError as error:
        number = errno.ENOSPC if f"os error {errno.ENOSPC}" in str(error) else errno.EIO
        raise OSError(number, str(error), str(path)) from None


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file, whole; zero-dimensional tensors become numbers."""
    replace_file(path, json.dumps(value, indent=1, default=lambda v: v.item()).encode())


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace a CSV file, whole; the columns are the keys of the first row."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace_file(path, stream.getvalue().encode())


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, by the names of their columns."""
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def sha256(path: str | Path) -> str:
    """Hex sha256 digest of a file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
