"""The one exception that means «your input is wrong», as opposed to «the program is»."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input from the user: a file, an option, a tensor of the wrong shape.

    The message is one line that says what was got, what is needed, and how to fix it.
    The command line prints it without a traceback and exits with status 2.
    """
