"""The commands, in the order in which `sdvae --help` lists them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Command = Callable[[Sequence[str]], None]

COMMANDS: dict[str, tuple[str, Command]] = {}


def command(summary: str) -> Callable[[Command], Command]:
    """Register a function of the remaining arguments under its own name."""

    def register(function: Command) -> Command:
        COMMANDS[function.__name__] = (summary, function)
        return function

    return register
