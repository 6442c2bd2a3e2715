"""Train a plain baseline for a recipe: diffusers' AutoencoderKL with L1 + KL and its training script's optimizer.

    python scripts/plain_baseline.py --config configs/small_f8c4.yaml --data.source photos/train --output out.json

It has the recipe's model shape, images, crops, number of steps and validation, and leaves out LPIPS, pass-through
initialisation, warm-ups, schedule and EMA. The optimizer has the defaults of diffusers'
examples/research_projects/autoencoderkl/train_autoencoderkl.py: AdamW, learning rate 4.5e-6, betas (0.9, 0.999), weight
decay 1e-2, gradients clipped to norm 1. All other options are those of `sdvae train`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from tqdm import tqdm

from sdvae.cli import parse_train_config
from sdvae.errors import exit_code
from sdvae.metrics.image import image_metrics
from sdvae.training.build import build_vae
from sdvae.training.data import evaluation_batches, open_sources, training_batches, training_images

KL_WEIGHT = 1e-6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--learning_rate", type=float, default=4.5e-6)
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the results")
    arguments, recipe = parser.parse_known_args()
    config = parse_train_config(recipe)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    train_source, validation_source = open_sources(config.data, config.seed)

    torch.manual_seed(config.seed)
    shape = build_vae(replace(config.model, initialisation="torch"))
    vae = AutoencoderKL(**{key: value for key, value in shape.config.items() if not key.startswith("_")})
    vae.to(accelerator.device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.999), weight_decay=1e-2)

    start = time.perf_counter()
    for batch in tqdm(training_batches(training_images(train_source, config), config, accelerator), mininterval=60):
        images = batch["image"].to(accelerator.device)
        posterior = vae.encode(images).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
        kl = posterior.kl().mean() / images[0].numel()
        loss = (reconstruction - images).abs().mean() + KL_WEIGHT * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - start

    rows = []
    vae.eval()
    with torch.no_grad():
        for batch in evaluation_batches(validation_source, config, accelerator):
            images = batch["image"].to(accelerator.device)
            posterior = vae.encode(images).latent_dist
            rows += image_metrics(images, vae.decode(posterior.mode()).sample, posterior, None)
    figures = {name: statistics.mean(row[name] for row in rows) for name in rows[0]}
    figures |= {"images": len(rows), "steps": config.steps, "learning_rate": arguments.learning_rate}
    figures["training_seconds"] = round(seconds)
    arguments.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(figures)


if __name__ == "__main__":
    sys.exit(exit_code("plain_baseline", main))
