"""`sdvae explore`: run experiments and write their pictures and JSON files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch

from sdvae.errors import InputError
from sdvae.io import make_folder, replacing
from sdvae.roundtrip import check_image_channels
from sdvae.studio.explore.experiments import EXPERIMENTS, NEEDED
from sdvae.studio.explore.study import Study
from sdvae.studio.settings import Settings
from sdvae.weights import load_kl


def explore(what: str, settings: Settings, *, vae: str | None, subfolder: str | None, output: Path) -> list[Path]:
    """Run experiments, write WHAT.png and WHAT.json of each as soon as it is done, and print the main figures.

    Args:
        what: a key of EXPERIMENTS, or "all". If one experiment fails, the files of earlier ones stay.
        settings: the settings of the experiments.
        vae: a source for `load_vae`; None is the VAE in this package.
        subfolder: folder inside the source that holds the VAE.
        output: folder for the files.

    Returns:
        The written files.

    Raises:
        InputError: for settings that do not fit, or a VAE or images that cannot be read.
    """
    if what != "all" and what not in EXPERIMENTS:
        raise InputError(f"got {what!r} to explore; need one of {', '.join(EXPERIMENTS)}, or all")
    names = list(EXPERIMENTS) if what == "all" else [what]
    model = load_kl(vae, subfolder=subfolder, dtype=torch.float32)
    check_image_channels(model, vae)
    study = Study(model, settings)
    study.check(needed=max(NEEDED.get(name, 1) for name in names))
    make_folder(output)
    said = {field.name: getattr(settings, field.name) for field in dataclasses.fields(Settings)}
    written = []
    for name in names:
        finding = EXPERIMENTS[name](study)
        target = output / f"{name}.png"
        with replacing(target) as temporary:
            finding.picture.save(temporary, format="PNG", optimize=True)
        record = {"experiment": name, "vae": vae or "packaged", "settings": said, "figures": finding.figures}
        with replacing(target.with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        print(f"wrote {target} and {target.with_suffix('.json').name}", flush=True)
        for line in finding.lines:
            print(f"  {line}", flush=True)
        written += [target, target.with_suffix(".json")]
    return written
