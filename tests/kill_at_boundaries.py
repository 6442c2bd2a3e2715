"""Kill a process at every file operation while it saves a checkpoint.

`save_and_be_killed` runs in a separate process and forks children. Child n (n = 0, 1, …) is killed by SIGKILL before
its n-th file operation in the folder, until a child finishes. After each child, the newest checkpoint that can be read
must be the old or the new one, and complete. At the end it prints «operations N, old A, new B».
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import torch

from sdvae.training.checkpoint import Checkpoint, checkpoints, newest_whole, prune, write_checkpoint

OPERATIONS = ("open", "os.link", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.scandir", "shutil.rmtree")


def checkpoint(step: int) -> Checkpoint:
    weights = {"generator": {"w": torch.full((1000,), float(step))}, "ema": {"w": torch.full((1000,), float(-step))}}
    optimizer = {"state": {0: {"exp_avg": torch.full((1000,), float(step))}}, "param_groups": []}
    return Checkpoint(weights, {"generator": optimizer}, {"step": step, "config": {}})


def save(root: Path, step: int) -> None:
    write_checkpoint(root / f"step-{step:08d}", checkpoint(step))
    prune(root, keep_last=1)


def die_before(operation: int, root: Path) -> None:
    """Kill this process before its file operation number `operation` in `root`, counted from 0.

    Python raises an audit event before each file operation.
    """
    count = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        if event in OPERATIONS and any(str(root) in str(argument) for argument in arguments):
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    sys.addaudithook(hook)


def save_and_be_killed(argv: list[str]) -> None:
    root = Path(argv[0])
    torch.set_num_threads(1)
    counts = {1: 0, 2: 0}
    operation = 0
    while True:
        shutil.rmtree(root, ignore_errors=True)
        save(root, 1)
        child = os.fork()
        if child == 0:
            die_before(operation, root)
            save(root, 2)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        newest, damaged = newest_whole(root)
        assert newest is not None, f"operation {operation}: no checkpoint is left in {list(root.iterdir())}"
        _, found = newest
        assert not damaged, f"operation {operation}: half a checkpoint has a checkpoint's name: {damaged}"
        step = found.state["step"]
        counts[step] += 1
        for name, sign in (("generator", 1), ("ema", -1)):
            assert torch.equal(found.weights[name]["w"], torch.full((1000,), float(sign * step)))
        assert torch.equal(found.optimizers["generator"]["state"][0]["exp_avg"], torch.full((1000,), float(step)))
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            assert [path.name for path in checkpoints(root)] == ["step-00000002"]
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        operation += 1
    print(f"operations {operation}, old {counts[1]}, new {counts[2]}")
