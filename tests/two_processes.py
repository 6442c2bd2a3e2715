"""Run under torchrun by test_training.py: trains with the arguments given and records what each step saw.

    torchrun … tests/two_processes.py WORLD_SIZE RECORD_FOLDER [sdvae train arguments …]

Writes RECORD_FOLDER/rank-R.pt: for each optimizer step the sample keys of this process and the gradients that the
optimizer is about to use.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from sdvae.cli import parse_train_config
from sdvae.training import loop


def record(world_size: int, folder: Path, arguments: list[str]) -> None:
    samples: list[tuple[int, int]] = []
    steps: list[dict] = []
    make_batches, clip = loop.training_batches, Accelerator.clip_grad_norm_

    def recording_batches(source, config, accelerator):
        assert accelerator.num_processes == world_size
        for batch in make_batches(source, config, accelerator):
            samples.extend(zip(batch["epoch"].tolist(), batch["index"].tolist(), strict=True))
            yield batch

    def recording_clip(self, parameters, *args, **kwargs):
        parameters = list(parameters)
        steps.append({"samples": samples.copy(), "gradients": [p.grad.clone() for p in parameters]})
        samples.clear()
        return clip(self, parameters, *args, **kwargs)

    loop.training_batches = recording_batches
    Accelerator.clip_grad_norm_ = recording_clip
    loop.train(parse_train_config(arguments))
    rank = Accelerator().process_index
    torch.save(steps, folder / f"rank-{rank}.pt")


if __name__ == "__main__":
    record(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
