"""The exception for bad input, exit codes, and messages on one line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from operator import attrgetter


class InputError(ValueError):
    """Bad input from the user: a file, an option, a tensor of the wrong shape.

    The message is one line that says what was got, what is needed and how to fix it. The command line prints it
    without a traceback and exits with status 2.
    """


class Stopped(Exception):
    """The run was told to stop and has stopped after writing a checkpoint.

    Args:
        message: one line for the user.
        signal_number: the number of the signal that stopped the run.

    Attributes:
        exit_code: 128 + the signal's number, as shells do: 130 for SIGINT, 143 for SIGTERM.
    """

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


def require(module: str, purpose: str, extra: str) -> None:
    """Check that an optional package is installed, before a long computation needs it.

    Args:
        module: the name under which the package is imported.
        purpose: the feature that needs it, for the message.
        extra: the group in pyproject.toml that installs it.

    Raises:
        InputError: when it is not installed.
    """
    if find_spec(module) is None:
        raise InputError(f'got no package {module}; need it for {purpose}; pip install "sdvae[{extra}]"')


# (what a value must be, the test of it, the names of the options that must pass it)
Ranges = tuple[tuple[str, Callable[[float], bool], str], ...]


def check_ranges(options: object, ranges: Ranges) -> None:
    """Check the options of a dataclass. None is always allowed, and of several numbers each one is tested.

    Args:
        options: the dataclass; names may be dotted, for a section's options.
        ranges: the ranges of its options.

    Raises:
        InputError: for the first option out of its range.
    """
    for need, in_range, keys in ranges:
        for key in keys.split():
            value = attrgetter(key)(options)
            several = isinstance(value, tuple | list)
            if value is not None and not all(in_range(x) for x in (value if several else [value])):
                raise InputError(f"got {key}={list(value) if several else value}; need {need}")


def exit_code(program: str, run: Callable[[], object]) -> int:
    """Run a program, and print what stops it as one line on standard error. Only bugs raise and give a traceback.

    Args:
        program: the program's name, with which the line begins.
        run: the program.

    Returns:
        0 when it is done, 1 for a fault of the machine, 2 for bad input, 130 and 143 when it was stopped by SIGINT and
        SIGTERM.
    """
    try:
        run()
    except InputError as error:
        print(f"{program}: error: {escaped(_without_worker_traceback(error))}", file=sys.stderr)
        return 2
    except OSError as error:  # such as a full disk, a folder that may not be written to, a bucket that does not answer
        print(f"{program}: error: {escaped(_without_worker_traceback(error))}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        print(f"{program}: {stopped}", file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    return 0


def _without_worker_traceback(error: Exception) -> str:
    """The error's message without the traceback that torch adds if it was raised in a worker of a DataLoader.

    From a worker, torch passes on only the exception's class and the text of its traceback
    (torch._utils.ExceptionWrapper), and raises that class with that text. The last line of the text is
    «module.Class: message».
    """
    text = str(error)
    if not text.startswith("Caught "):
        return text
    return text.splitlines()[-1].partition(": ")[2]


def first_few(names: list[str], count: int = 3) -> str:
    """Join some names, such as «a, b, c, …», so that a message about many of them stays one line."""
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")


def escaped(text: str) -> str:
    """Text on one line: line breaks, control characters and half surrogates become escapes such as \\n and \\x1b."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(error: object) -> str:
    """The message of an error on a single line, or the name of its class if it has none."""
    return " ".join(str(error).split()) or type(error).__name__
