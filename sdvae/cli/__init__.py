"""The command line: one module-level function a command.

A command imports what it needs when it runs: `sdvae train --print_config` or a misspelt option does not wait for torch.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from sdvae.cli.parsing import parse_train_config, suggest
from sdvae.cli.registry import COMMANDS, Command
from sdvae.errors import InputError, exit_code

from sdvae.cli import train, encode, export, look, publish  # isort: skip  # noqa: F401 - they register, in this order

__all__ = ["main", "parse_train_config"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns: its exit code, as `exit_code` counts.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    name, *rest = arguments
    _log_to_stderr()
    return exit_code("sdvae", lambda: _command(name)(rest))


def _command(name: str) -> Command:
    if name not in COMMANDS:
        raise InputError(f"unknown command {name!r}; {suggest(name, COMMANDS) or 'see sdvae --help'}")
    return COMMANDS[name][1]


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, (summary, _) in COMMANDS.items()]
    return "\n".join(["usage: sdvae COMMAND …; sdvae COMMAND --help tells more", "", *lines])


def _log_to_stderr() -> None:
    """Log lines of the main process only, plain; other processes speak when something is wrong."""
    is_main = int(os.environ.get("RANK", "0")) == 0
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("sdvae").setLevel(logging.INFO if is_main else logging.ERROR)
