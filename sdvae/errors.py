"""The exception that means «your input is wrong», as opposed to «the program is», and the exit codes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec


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


def require(module: str, purpose: str, extra: str) -> None:
    """Check that an optional package is installed, before a long computation needs it.

    Args:
        module: what is imported.
        purpose: what needs it, for the message.
        extra: the group in pyproject.toml that installs it.

    Raises:
        InputError: when it is not installed.
    """
    if find_spec(module) is None:
        raise InputError(f'got no package {module}; need it for {purpose}; pip install "sdvae[{extra}]"')


def exit_code(program: str, run: Callable[[], object]) -> int:
    """Run a program to its end. What stops it is one line on standard error, `program: …`; a fault of ours a traceback.

    Returns: 0 done, 1 a fault of the machine, 2 bad input, 130 and 143 stopped by SIGINT and SIGTERM.
    """
    try:
        run()
    except InputError as error:
        print(f"{program}: error: {_innermost(error)}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"{program}: error: {error}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        print(f"{program}: {stopped}", file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    return 0


def _innermost(error: InputError) -> str:
    """The message itself: torch's DataLoader wraps a worker's error in a traceback."""
    lines = str(error).strip().splitlines()
    return lines[-1].removeprefix("sdvae.errors.InputError: ").removeprefix("sdvae.data.images.ImageError: ")


def first_few(names: list[str], count: int = 3) -> str:
    """«a, b, c, …»: enough to see what is the matter, in one line."""
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")


def one_line(error: object) -> str:
    """The message of an error on a single line."""
    return " ".join(str(error).split())
