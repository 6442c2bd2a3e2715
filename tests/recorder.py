"""A training process that records the samples and the gradients of each of its steps."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator

from sdvae.cli import parse_train_config
from sdvae.training import loop
from sdvae.training.players import Player, TrainingForward


def record(argv: list[str]) -> None:
    """Train in this process. The arguments are WORLD_SIZE RECORD_FOLDER [sdvae train arguments …].

    This writes RECORD_FOLDER/rank-R.pt: for each optimizer step the sample keys of this process, and the gradients of
    VAE and discriminator before they are clipped.
    """
    world_size, folder, arguments = int(argv[0]), Path(argv[1]), argv[2:]
    samples: list[tuple[int, int]] = []
    steps: list[dict] = []
    make_batches, clip = loop.training_batches, Player.clip

    def recording_batches(images, config, accelerator, **where):
        assert accelerator.num_processes == world_size
        for batch in make_batches(images, config, accelerator, **where):
            samples.extend(zip(batch["epoch"].tolist(), batch["index"].tolist(), strict=True))
            yield batch

    def recording_clip(self, scaler, max_norm):
        if isinstance(self.network, TrainingForward):
            steps.append({"samples": samples.copy(), "gradients": []})
            samples.clear()
        steps[-1]["gradients"] += [p.grad.clone() for p in self.trained]
        return clip(self, scaler, max_norm)

    loop.training_batches = recording_batches
    Player.clip = recording_clip
    loop.train(parse_train_config(arguments))
    rank = Accelerator().process_index
    torch.save(steps, folder / f"rank-{rank}.pt")
