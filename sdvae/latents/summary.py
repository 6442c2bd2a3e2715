"""The statistics in the manifest of a finished latent data set, and its card, README.md."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sdvae.io import printable
from sdvae.latents.scaling import LatentScaling
from sdvae.model.patches import PatchSize
from sdvae.statistics import LatentMoments

# `store` of the options -> what the columns of latents hold
STORED = {"moments": "posterior means and log-variances", "sample": "samples", "mean": "posterior means"}


def is_of_student(vae_config: Mapping[str, Any]) -> bool:
    """Whether the latents are those of an AutoencoderTiny, which gives them as a diffusion model sees them."""
    return "latent_magnitude" in vae_config


def statistics_of(records: Sequence[Mapping[str, Any]], patch_size: PatchSize = (1, 1)) -> dict[str, Any]:
    """The statistics of all rows, under the keys of a VAE's config.

    Args:
        records: the records of all shards, each with its `moments`, which leave out mirror images.
        patch_size: of the VAE's scaling. The moments are those of the channels of patches.

    Returns:
        scaling_factor, shift_factor, latents_mean and latents_std. The two factors are None if the latents do not
        vary, as those of a single image of one colour may not. With patches also patches_mean and patches_var, (C·p·q,)
        each, the running statistics of a batch norm over patches.
    """
    sums = torch.tensor([record["moments"] for record in records], dtype=torch.float64)  # (shards, 4, C·p·q)
    patches = LatentMoments(sums.shape[-1])
    patches.sums = sums.sum(dim=0)
    moments = patches.over_patches(math.prod(patch_size))
    has_std = 0 < moments.std < float("inf")
    scale, shift = moments.factors(with_shift=True) if has_std else (None, None)
    return {
        "scaling_factor": scale,
        "shift_factor": shift,
        "latents_mean": moments.channel_mean.tolist(),
        "latents_std": moments.channel_std.tolist(),
        **({} if patch_size == (1, 1) else batch_norm_statistics(patches)),
    }


def batch_norm_statistics(patches: LatentMoments) -> dict[str, list[float]]:
    """Mean and variance of each channel of patches, under their keys in the manifest."""
    return {"patches_mean": patches.channel_mean.tolist(), "patches_var": patches.channel_std.square().tolist()}


def card(manifest: Mapping[str, Any], shards: Sequence[Mapping[str, Any]], scaling: LatentScaling) -> str:
    """The README.md of a data set. The hub and `datasets` read its head.

    Args:
        manifest: the manifest of the finished data set.
        shards: the lines of its shards.jsonl.
        scaling: how pipelines scale its latents.
    """
    fingerprint = manifest["fingerprint"]
    stored, images, vae = fingerprint["stored"], fingerprint["images"], fingerprint["vae"]
    sizes = ", ".join(f"{height} x {width}" for height, width in images["sizes"])
    scaled = is_of_student(manifest["vae_config"])
    what = "Scaled latents of a student" if scaled else f"Unscaled {STORED[stored['what']]}"
    convention = (
        ""
        if scaling.patch_size == (1, 1)
        else f"\n- As a diffusion model gets them: {scaling.formula}, so of {len(scaling.shift)} channels"
    )
    factors = {} if scaled else {k: v for k, v in manifest["statistics"].items() if k.endswith("factor")}
    figures = ", ".join(f"{key} {value:.6g}" for key, value in factors.items() if value is not None)
    measured = f"\n- Measured here: {figures}" if figures else ""
    loaded, drawn = {
        "moments": ('LatentDataset("this folder")', "a fresh sample of each posterior"),
        "sample": ('LatentDataset("this folder")', "the stored samples"),
        "mean": ('LatentDataset("this folder", sample=False)', "the stored means"),
    }[stored["what"]]
    vae_config = manifest["vae_config"]
    by_channel = " with latents_mean and latents_std" if vae_config.get("latents_std") is not None else ""
    factor = vae_config.get("scaling_factor")
    scaled_by = "" if factor is None else f", scaling_factor {factor}{by_channel}"
    vae_class = vae_config.get("_class_name", "VAE")  # data sets of older versions do not name it
    # The cache of `datasets` tells two data sets apart only by this head and the folder's last name.
    content = hashlib.sha256("".join(entry["sha256"] for entry in shards).encode()).hexdigest()
    return f"""---
configs:
- config_name: default
  data_files: data/train-*.parquet
  description: {content}
tags:
- latents
---

# Latents of {printable(os.path.basename(manifest["source"].rstrip("/")) or manifest["source"])}

{manifest["rows"]} images ({manifest["skipped"]} skipped, see skipped.jsonl), encoded with `sdvae encode`, which the
project's README describes. {what}
in {stored["dtype"]}{", also of the mirror images" if stored["mirror"] else ""}.

- {vae_class}: encoder {vae["encoder_sha256"][:16]}…, {vae["precision"]}{scaled_by}{convention}
- Images: {sizes} (height x width){measured}

```python
from sdvae import LatentDataset

for batch in {loaded}.loader(batch_size=64):
    batch["latents"]  # (64, C, h, w), {drawn}, scaled as a diffusion model sees it
```
"""
