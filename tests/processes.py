"""Processes for tests, forked from a process that has imported everything, which takes a new interpreter ten seconds.

They get the environment variables that a launcher such as torchrun sets, so that the program forms its process group
in the same way.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sdvae.cli import main

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["sdvae.cli", "sdvae.training.loop", "sdvae.latents.encode", "sdvae.evaluation.evaluate", "tests.faults"]
)


@dataclass(frozen=True)
class Finished:
    """The results of the processes.

    Attributes:
        codes: the exit code of each rank; minus the number of the signal if a signal ended it.
        stdout: the output of all ranks, one after the other.
        stderr: the same for standard error.
    """

    codes: list[int]
    stdout: str
    stderr: str


def launch(
    target: Callable[[list[str]], None],
    arguments: Sequence[object],
    folder: Path,
    *,
    world_size: int = 1,
    timeout: float = 120,
) -> Finished:
    """Run `target(arguments)` in `world_size` processes of one thread each, and wait for all.

    Args:
        target: the function to run.
        arguments: its arguments, which are converted to strings.
        folder: an existing folder for the output of the processes.
        world_size: the number of processes.
        timeout: seconds after which processes are killed and the test fails.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    given = [str(argument) for argument in arguments]
    processes = []
    for rank in range(world_size):
        environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        if world_size > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
            environment |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "MASTER_PORT": port}
        output = folder / f"rank-{rank}"
        processes.append(_CONTEXT.Process(target=_run, args=(target, given, environment, output)))
    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
        process.join()
    out, err = ("".join(_read(folder, rank, name) for rank in range(world_size)) for name in ("out", "err"))
    assert not late, f"{len(late)} processes were not done after {timeout} s\n{err[-3000:]}"
    return Finished([process.exitcode for process in processes], out, err)


def run_main(argv: list[str]) -> None:
    """`sdvae ARGUMENTS …`, for `launch`."""
    sys.exit(main(argv))


def run_script(argv: list[str]) -> None:
    """`python FILE ARGUMENTS …`, for `launch`."""
    sys.argv = argv
    sys.path.insert(0, str(Path(argv[0]).parent))
    runpy.run_path(argv[0], run_name="__main__")


def _read(folder: Path, rank: int, name: str) -> str:
    return (folder / f"rank-{rank}.{name}").read_text(errors="replace")


def _run(target: Callable[[list[str]], None], arguments: list[str], environment: dict[str, str], output: Path) -> None:
    for name, descriptor in (("out", 1), ("err", 2)):
        file = os.open(f"{output}.{name}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(file, descriptor)
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        target(arguments)
    finally:
        sys.stdout.flush()
