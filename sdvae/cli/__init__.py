"""The command line, `sdvae COMMAND …`.

torch is imported only when a command runs, so `sdvae --help`, `sdvae train --print_config` and the message about a
misspelt option do not wait for it.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Sequence
from typing import get_type_hints

from sdvae.cli.commands import COMMANDS
from sdvae.errors import InputError, exit_code
from sdvae.options import parse_options, suggest
from sdvae.training.recipe import parse_train_config

__all__ = ["main", "parse_train_config"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the command and its arguments; by default those of this process.

    Returns:
        The exit code, as `exit_code` defines it.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # paths may hold bytes that are not UTF-8
    _log_to_stderr()
    return exit_code("sdvae", lambda: _run(name, rest))


def _run(name: str, arguments: Sequence[str]) -> None:
    if name not in COMMANDS:
        raise InputError(f"unknown command {name!r}; {suggest(name, COMMANDS) or 'see sdvae --help'}")
    run, positional, urls, first = COMMANDS[name]
    options = get_type_hints(run)["options"]
    if first and arguments and not arguments[0].startswith("-"):
        if any(argument.partition("=")[0] == f"--{first}" for argument in arguments):
            raise InputError(f"got {arguments[0]} and --{first}; need one of them; leave one out")
        arguments = [f"--{first}={arguments[0]}", *arguments[1:]]
    run(parse_options(options, arguments, f"sdvae {name}", run.__doc__, positional, urls))


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.run.__doc__}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: sdvae COMMAND …; «sdvae COMMAND --help» lists its options", "", *lines])


def _log_to_stderr() -> None:
    """Log plain lines: all messages of the main process, and only errors of the others."""
    is_main = int(os.environ.get("RANK", "0")) == 0
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("sdvae").setLevel(logging.INFO if is_main else logging.ERROR)
