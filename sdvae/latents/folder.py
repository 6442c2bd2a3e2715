"""A latent data set on disk, for reading. `sdvae.latents.writer` makes it.

manifest.json                           the source, the VAE and how values are stored; in a finished data set also
                                        each shard's rows and checksum, and the statistics
data/train-00000-of-00019.parquet       the rows; `datasets.load_dataset(folder)` finds these
skipped.jsonl                           one line for each image that has no row, with the reason
README.md                               a card for people and for the hub
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sdvae.data import kinds_of
from sdvae.errors import InputError
from sdvae.io import read_json
from sdvae.runtime import DTYPES

FORMAT = "sdvae latents"
VERSION = 1


class LatentFolder:
    """The manifest of a latent data set, and the places of its files.

    Args:
        root: the data set's folder, which may not exist yet.

    Attributes:
        manifest: the content of manifest.json, empty before `open`.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root).expanduser()
        self.data = self.root / "data"
        self.skipped = self.root / "skipped.jsonl"
        self.card = self.root / "README.md"
        self.manifest: dict[str, Any] = {}
        self._manifest_path = self.root / "manifest.json"

    def open(self, *, finished: bool = False) -> None:
        """Read the manifest.

        Args:
            finished: whether the data set must be complete.

        Raises:
            InputError: when there is no manifest, when it has another format or version, or when the data set must be
                complete and is not.
        """
        if not self._manifest_path.is_file():
            raise InputError(f"{self.root} holds no manifest.json; need a folder that `sdvae encode` wrote")
        self._read()
        if finished and not self.is_complete:
            raise InputError(f"{self.root} is not complete; run `sdvae encode` with the same options again")

    def _read(self) -> None:
        manifest = read_json(self._manifest_path)
        if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
            raise InputError(
                f"{self._manifest_path} is of format {manifest.get('format')!r}, version {manifest.get('version')}; "
                f"need {FORMAT!r}, version {VERSION}"
            )
        self.manifest = manifest

    @property
    def is_complete(self) -> bool:
        return bool(self.manifest["complete"])

    @property
    def num_shards(self) -> int:
        return self.manifest["fingerprint"]["shards"]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stored values."""
        return DTYPES[self.manifest["fingerprint"]["stored"]["dtype"]]

    def shard_path(self, shard: int) -> Path:
        return self.data / f"train-{shard:05d}-of-{self.num_shards:05d}.parquet"

    def skipped_lines(self) -> dict[int, list[dict[str, Any]]]:
        """The lines of skipped.jsonl by shard."""
        lines: dict[int, list[dict[str, Any]]] = defaultdict(list)
        if self.skipped.is_file():
            for text in self.skipped.read_text(encoding="utf-8").splitlines():
                line = json.loads(text)
                lines[line["shard"]].append(line)
        return lines

    def counts(self) -> str:
        """How many of the images of a finished data set have a row, and why the others have none."""
        rows, skipped = self.manifest["rows"], self.manifest["skipped"]
        if not skipped:
            return f"{rows} rows"
        why = kinds_of(line["reason"] for lines in self.skipped_lines().values() for line in lines)
        return f"{rows} of {rows + skipped} images have a row; {skipped} were skipped ({why}; see skipped.jsonl)"

    def factors(self, vae_config: Mapping[str, Any], encoder_sha256: str) -> dict[str, Any]:
        """The scaling that was measured on these latents, under the keys of a VAE's config.

        Args:
            vae_config: the config of the VAE that is to decode them.
            encoder_sha256: the hash of that VAE's encoder.

        Returns:
            scaling_factor, and shift_factor if the VAE has one. For a VAE with latents_mean and latents_std: those two,
            and a scaling_factor of 1.

        Raises:
            InputError: when another VAE made these latents, or they do not vary.
        """
        self.open(finished=True)
        if self.manifest["fingerprint"]["vae"]["encoder_sha256"] != encoder_sha256:
            raise InputError(f"the latents in {self.root} were made by another encoder; need those of this VAE")
        statistics = self.manifest["statistics"]
        if vae_config["latents_mean"] is not None and vae_config["latents_std"] is not None:
            return {"scaling_factor": 1.0, **{key: statistics[key] for key in ("latents_mean", "latents_std")}}
        names = ["scaling_factor"] + (["shift_factor"] if vae_config["shift_factor"] is not None else [])
        measured = {name: statistics[name] for name in names}
        if None in measured.values():
            raise InputError(f"the latents in {self.root} do not vary, so they have no scaling factor; encode others")
        return measured
