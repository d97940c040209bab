"""Files: written so that nobody sees half of one, and their digests."""

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise what safetensors cannot write as the OSError that it is."""
    try:
        yield
    except SafetensorError as error:
        number = errno.ENOSPC if f"os error {errno.ENOSPC}" in str(error) else errno.EIO
        raise OSError(number, str(error), str(path)) from None


def sha256(path: str | Path) -> str:
    """Hex sha256 digest of a file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
