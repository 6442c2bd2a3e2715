"""`sdvae explore`: experiments to pictures and JSON files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch

from sdvae.errors import InputError
from sdvae.explore.experiments import EXPERIMENTS
from sdvae.explore.study import Settings, Study
from sdvae.weights import load_vae
from sdvae.weights.files import replacing


def explore(what: str, settings: Settings, *, vae: str | None, subfolder: str | None, output: Path) -> list[Path]:
    """Write WHAT.png and WHAT.json into `output`, and print the figures. Nothing is written before all is computed.

    Args:
        what: a key of EXPERIMENTS, or "all" for all of them.
        vae: whatever `load_vae` reads; None takes the VAE of this package.

    Raises: InputError for settings that do not fit, or photographs that cannot be read.
    """
    if what != "all" and what not in EXPERIMENTS:
        raise InputError(f"got {what!r} to explore; need one of {', '.join(EXPERIMENTS)}, or all")
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file; need a folder; choose another with --output")
    study = Study(load_vae(vae, subfolder=subfolder, dtype=torch.float32), settings)
    names = list(EXPERIMENTS) if what == "all" else [what]
    findings = {name: EXPERIMENTS[name](study) for name in names}
    written = []
    for name, finding in findings.items():
        target = output / f"{name}.png"
        with replacing(target) as temporary:
            finding.picture.save(temporary, format="PNG", optimize=True)
        record = {"experiment": name, "vae": vae or "packaged", "settings": dataclasses.asdict(settings)}
        record["figures"] = finding.figures
        with replacing(target.with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        print(f"wrote {target} and {target.with_suffix('.json').name}")
        for line in finding.lines:
            print(f"  {line}")
        written += [target, target.with_suffix(".json")]
    return written
