"""Errors that a user can fix: the command line prints their message and exits with status 2."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Wrong input; the message names the value and the fix.

    Not a ValueError, as the command-line parser would catch it and hide its message.
    """


def install(extra: str = "") -> str:
    """The command that installs this package with an extra. It is not on PyPI, where the name is free."""
    name = f"timm-attn[{extra}]" if extra else "timm-attn"
    return f"pip install '{name} @ git+https://github.com/timm-attn/timm_attn'"


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
            f"{error.name} is not installed: {install(name)}", name=error.name
        ) from None
