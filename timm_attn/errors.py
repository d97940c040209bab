"""Errors that a user can mend: the command line prints their message and exits with status 2."""


class UserError(Exception):
    """Wrong input; the message names the value and the fix.

    No ValueError: the parser of the command line takes those for its own and hides what they say.
    """
