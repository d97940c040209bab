"""Errors that a user can mend: the command line prints their message and exits with status 2."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Wrong input; the message names the value and the fix.

    No ValueError: the parser of the command line takes those for its own and hides what they say.
    """


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Import what belongs to an extra of the package.

    Raises:
        ModuleNotFoundError: It is not there; the message says how to install it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "timm_attn":
            raise
        raise ModuleNotFoundError(
            f"{error.name} is not installed: pip install 'timm-attn[{name}]'", name=error.name
        ) from None
