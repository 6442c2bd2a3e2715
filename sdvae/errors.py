"""The one exception that means «your input is wrong», as opposed to «the program is»."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input from the user: a file, an option, a tensor of the wrong shape.

    The message is one line that says what was got, what is needed, and how to fix it.
    The command line prints it without a traceback and exits with status 2.
    """


class Stopped(Exception):
    """The run was told to stop and did so in good order; nothing is lost.

    Attributes:
        exit_code: 128 + the signal's number, as shells count: 130 for SIGINT, 143 for SIGTERM.
    """

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number
