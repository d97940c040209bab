"""Errors that a user can mend: the command line prints their message and exits with status 2."""


class UserError(ValueError):
    """Wrong input; the message names the value and the fix."""
