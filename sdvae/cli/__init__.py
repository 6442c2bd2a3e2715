"""The command line: one module-level function a command, and one place where bad input becomes an exit code.

Exit codes: 0 done, 1 a fault of the program or the machine, 2 bad input, 130 and 143 stopped by SIGINT and SIGTERM.
A command imports what it needs when it runs: `sdvae train --print_config` or a misspelt option does not wait for torch.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from sdvae.cli.parsing import parse_train_config, suggest
from sdvae.cli.registry import COMMANDS
from sdvae.errors import InputError, Stopped

from sdvae.cli import train, encode, export, look, publish  # isort: skip  # noqa: F401 - they register, in this order

__all__ = ["main", "parse_train_config"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Bad input is one line on standard error and exit code 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    name, *rest = arguments
    _log_to_stderr()
    try:
        if name not in COMMANDS:
            raise InputError(f"unknown command {name!r}; {suggest(name, COMMANDS) or 'see sdvae --help'}")
        COMMANDS[name][1](rest)
    except InputError as error:
        print(f"sdvae: error: {_innermost(error)}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"sdvae: error: {error}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        print(f"sdvae: {stopped}", file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:
        print("sdvae: interrupted", file=sys.stderr)
        return 130
    return 0


def _innermost(error: InputError) -> str:
    """The message itself: torch's DataLoader wraps a worker's error in a traceback."""
    lines = str(error).strip().splitlines()
    return lines[-1].removeprefix("sdvae.errors.InputError: ").removeprefix("sdvae.data.images.ImageError: ")


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, (summary, _) in COMMANDS.items()]
    return "\n".join(["usage: sdvae COMMAND …; sdvae COMMAND --help tells more", "", *lines])


def _log_to_stderr() -> None:
    """Log lines of the main process only, plain; other processes speak when something is wrong."""
    is_main = int(os.environ.get("RANK", "0")) == 0
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("sdvae").setLevel(logging.INFO if is_main else logging.ERROR)
