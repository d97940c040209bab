"""Errors that a user can fix: the command line prints their message and exits with status 2."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Wrong input; the message names the value and the fix.

    Not a ValueError, as the command-line parser would catch it and hide its message.
    """


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Import packages that an extra of this package installs.

    Raises:
        ModuleNotFoundError: One is missing; the message says how to install it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "timm_attn":
            raise
        raise ModuleNotFoundError(
            f"{error.name} is not installed: pip install 'timm-attn[{name}]'", name=error.name
        ) from None
