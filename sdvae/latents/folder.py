"""A latent data set on disk or in a bucket, for reading. `sdvae.latents.writer` makes it.

manifest.json                           the source, the VAE and how values are stored; in a finished data set also the
                                        number of rows and the statistics
data/train-00000-of-00019.parquet       the rows; `datasets.load_dataset(folder)` finds these
shards.jsonl                            one line for each shard of a finished data set: its rows and checksum
skipped.jsonl                           one line for each image that has no row, with the reason
README.md                               a card for people and for the hub

The metadata of each Parquet file hold the shard's own record under the key «sdvae», as JSON: `rows`, `row_group_rows`
(rows in each row group), `data_bytes` and `sha256` (of so many bytes at the beginning of the file, which are all its
rows), `moments` (the sums of the latents from which the statistics are computed) and `skipped` (index, name and reason
of each image that has no row). A shard that exists is therefore complete, and nothing else needs to be known of it.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sdvae.data import kinds_of
from sdvae.errors import InputError, first_few, one_line
from sdvae.latents.scaling import LatentScaling, channel_scaling, config_scaling
from sdvae.latents.summary import is_of_student
from sdvae.model import Autoencoder, AutoencoderKLFlux2
from sdvae.runtime import DTYPES
from sdvae.storage import is_bad_content, open_storage

if TYPE_CHECKING:
    import pyarrow.parquet as pq

FORMAT = "sdvae latents"
VERSION = 2
MANIFEST = "manifest.json"
SHARDS = "shards.jsonl"
SKIPPED = "skipped.jsonl"
CARD = "README.md"
RECORD = b"sdvae"  # the key of the record in a Parquet file's metadata


class ShardFault(Exception):
    """A shard is broken. The message is what is wrong with it."""


class LatentFolder:
    """The manifest of a latent data set, and its files.

    Args:
        root: the data set's folder or URL, which may not exist yet.
        writable: whether files are to be written to it.

    Attributes:
        storage: the folder.
        manifest: the content of manifest.json, empty before `open`.

    Raises:
        InputError: when the URL cannot be used.
    """

    def __init__(self, root: str | Path, *, writable: bool = False):
        self.storage = open_storage(root, writable=writable)
        self.manifest: dict[str, Any] = {}

    def open(self, *, finished: bool = False) -> None:
        """Read the manifest.

        Args:
            finished: whether the data set must be complete.

        Raises:
            InputError: when there is no manifest, when it has another format or version, or when the data set must be
                complete and is not.
        """
        try:
            self._read()
        except (FileNotFoundError, NotADirectoryError) as error:
            several = self._resolutions()
            hint = f"; it holds those of several resolutions; choose {first_few(several)}" if several else ""
            raise InputError(
                f"{self.storage} holds no {MANIFEST}; need a folder that `sdvae encode` wrote{hint}"
            ) from error
        if finished and not self.is_complete:
            raise InputError(f"{self.storage} is not complete; run `sdvae encode` with the same options again")

    def _resolutions(self) -> list[str]:
        """The data sets of several resolutions that were encoded into this folder of a disk."""
        root = Path(str(self.storage))
        return sorted(str(path.parent) for path in root.glob(f"*/{MANIFEST}") if path.parent.name.isdigit())

    def _read(self) -> None:
        where = self.storage.where(MANIFEST)
        try:
            manifest = json.loads(self.storage.read(MANIFEST))
            found = manifest.get("format"), manifest.get("version")
        except (ValueError, AttributeError) as error:
            raise InputError(f"{where} is no JSON object ({one_line(error)}); get a whole copy") from error
        if found[0] != FORMAT or found[1] not in (1, VERSION):
            raise InputError(f"{where} is of format {found[0]!r}, version {found[1]}; need {FORMAT!r}, {VERSION}")
        if found[1] == 1 and not manifest["complete"]:
            raise InputError(
                f"{self.storage} was begun by an older version of sdvae and is not complete; choose another folder and "
                "encode again, or finish it with that version"
            )
        self.manifest = manifest
        self.__dict__.pop("shards", None)

    @property
    def is_complete(self) -> bool:
        return bool(self.manifest["complete"])

    @property
    def num_shards(self) -> int:
        return self.manifest["fingerprint"]["shards"]

    @cached_property
    def shards(self) -> list[dict[str, Any]]:
        """The lines of shards.jsonl: `file`, `rows`, `row_group_rows`, `bytes`, `data_bytes`, `sha256`, `skipped`.

        Raises:
            InputError: when the file is missing or damaged.
        """
        if self.manifest["version"] == 1:  # its checksums are those of whole files
            return [{**entry, "data_bytes": entry["bytes"]} for entry in self.manifest["shards"]]
        try:
            entries = [json.loads(line) for line in self.storage.read(SHARDS).splitlines()]
        except (FileNotFoundError, ValueError) as error:
            raise InputError(f"{self.storage.where(SHARDS)} is missing or damaged; get a whole copy") from error
        if len(entries) != self.num_shards:
            raise InputError(
                f"{self.storage.where(SHARDS)} has {len(entries)} lines for {self.num_shards} shards; get a whole copy"
            )
        return entries

    def shard_name(self, shard: int) -> str:
        return f"data/train-{shard:05d}-of-{self.num_shards:05d}.parquet"

    def parquet(self, shard: int) -> pq.ParquetFile:
        """Open the file of a shard."""
        return self.storage.parquet(self.shard_name(shard))

    @property
    def scaling(self) -> LatentScaling:
        """How pipelines scale these latents: as the VAE's config or batch norm said when the data set was begun.

        Raises:
            InputError: as `config_scaling` does, for a data set of an earlier version, which has the config alone.
        """
        if "scaling" in self.manifest:
            return LatentScaling.from_json(self.manifest["scaling"])
        return config_scaling(self.manifest["vae_config"])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stored values."""
        return DTYPES[self.manifest["fingerprint"]["stored"]["dtype"]]

    def record(self, shard: int) -> dict[str, Any]:
        """The record in the file of a shard: see `sdvae.latents.folder`.

        Raises:
            FileNotFoundError: when the shard is not done.
            InputError: when the file is damaged.
        """
        import pyarrow as pa

        try:
            with self.parquet(shard) as file:
                return json.loads(file.metadata.metadata[RECORD])
        except (pa.ArrowException, ValueError, KeyError, TypeError, OSError) as error:
            if not is_bad_content(error):
                raise
            raise InputError(
                f"{self.storage.where(self.shard_name(shard))} is damaged; encode it again with --repair true"
            ) from error

    def sizes(self) -> list[int | None]:
        """Bytes of each shard's file, or None if it does not exist."""
        found = self.storage.sizes("data")
        return [found.get(self.shard_name(shard).removeprefix("data/")) for shard in range(self.num_shards)]

    def check(self, shard: int, size: int | None) -> dict[str, Any]:
        """Compare the file of a shard with its record and, in a finished data set, with its line in shards.jsonl.

        Args:
            shard: its number.
            size: bytes of the file, None if there is none.

        Returns:
            The shard's line in shards.jsonl, now or later.

        Raises:
            ShardFault: when the file is missing or damaged.
        """
        if size is None:
            raise ShardFault("is missing" if self.is_complete else "is not done")
        entry = self.shards[shard] if self.is_complete else None
        if entry is not None and size != entry["bytes"]:
            raise ShardFault(f"has {size} bytes instead of {entry['bytes']}")
        if entry is None or self.manifest["version"] > 1:
            try:
                own = entry_of(self.record(shard), self.shard_name(shard), size)
            except InputError as error:
                raise ShardFault("has damaged metadata") from error
            if entry not in (None, own):
                raise ShardFault("has another record than shards.jsonl")
            entry = own
        if self._rows_sha256(shard, entry["data_bytes"]) != entry["sha256"]:
            raise ShardFault("has another checksum than its record")
        return entry

    def _rows_sha256(self, shard: int, data_bytes: int) -> str:
        digest = hashlib.sha256()
        with self.storage.open(self.shard_name(shard)) as file:
            while data_bytes > 0 and (block := file.read(min(data_bytes, 2**20))):
                digest.update(block)
                data_bytes -= len(block)
        return digest.hexdigest()

    def skipped_lines(self) -> dict[int, list[dict[str, Any]]]:
        """The lines of skipped.jsonl by shard; none if there is no such file."""
        lines: dict[int, list[dict[str, Any]]] = defaultdict(list)
        if self.storage.exists(SKIPPED):
            for text in self.storage.read(SKIPPED).splitlines():
                line = json.loads(text)
                lines[line["shard"]].append(line)
        return lines

    def counts(self) -> str:
        """How many of the images of a finished data set have a row, and why the others have none."""
        rows, skipped = self.manifest["rows"], self.manifest["skipped"]
        if not skipped:
            return f"{rows} rows"
        why = kinds_of(line["reason"] for lines in self.skipped_lines().values() for line in lines)
        return f"{rows} of {rows + skipped} images have a row, and {skipped} have none ({why}; see skipped.jsonl)"

    def write_scaling(self, vae: Autoencoder, encoder_sha256: str, *, by_channel: bool = False) -> str:
        """Write the scaling that was measured on these latents into a VAE's config, or its batch norm.

        This is scaling_factor, and shift_factor if the VAE has one. By channel it is latents_mean and latents_std, a
        scaling_factor of 1, and a shift_factor of None, as SDXL's pipelines read them. For a VAE of FLUX.2's kind it is
        the running statistics.

        Args:
            vae: the VAE that is to decode them.
            encoder_sha256: the hash of its encoder.
            by_channel: scale each channel by itself, as is done anyway if the VAE has latents_mean and latents_std.

        Returns:
            What was written, as text.

        Raises:
            InputError: when another VAE made these latents, or they do not vary, or for a student.
        """
        if not isinstance(vae, AutoencoderKLFlux2):
            factors = self._factors(vae.config, encoder_sha256, by_channel)
            vae.register_to_config(**factors)
            return ", ".join(f"{key} {value}" for key, value in factors.items() if value is not None)
        if by_channel:
            raise InputError("got by_channel for a VAE with a batch norm, which scales each channel; leave it out")
        self._check_encoder(encoder_sha256)
        statistics = self.manifest["statistics"]
        mean, variance = torch.tensor(statistics["patches_mean"]), torch.tensor(statistics["patches_var"])
        vae.set_statistics(mean, variance)
        return f"a batch norm of mean {float(mean.mean()):.4g} and variance {float(variance.mean()):.4g} on average"

    def _check_encoder(self, encoder_sha256: str) -> None:
        self.open(finished=True)
        if self.manifest["fingerprint"]["vae"]["encoder_sha256"] != encoder_sha256:
            raise InputError(f"the latents in {self.storage} were made by another encoder; need those of this VAE")

    def _factors(self, vae_config: Mapping[str, Any], encoder_sha256: str, by_channel: bool) -> dict[str, Any]:
        if is_of_student(vae_config):
            raise InputError("got latents for a student, whose own latents are scaled already; leave the latents out")
        self._check_encoder(encoder_sha256)
        statistics = self.manifest["statistics"]
        if by_channel or (vae_config["latents_mean"] is not None and vae_config["latents_std"] is not None):
            _ = channel_scaling(statistics)  # which refuses a channel that does not vary
            measured = {key: statistics[key] for key in ("latents_mean", "latents_std")}
            return {"scaling_factor": 1.0, "shift_factor": None, **measured}
        names = ["scaling_factor"] + (["shift_factor"] if vae_config["shift_factor"] is not None else [])
        measured = {name: statistics[name] for name in names}
        if None in measured.values():
            raise InputError(f"the latents in {self.storage} do not vary and have no scaling factor; encode others")
        return measured


def entry_of(record: Mapping[str, Any], name: str, size: int) -> dict[str, Any]:
    """The line of a shard in shards.jsonl.

    Args:
        record: the record in the shard's file.
        name: the file's name in the folder.
        size: bytes of the file.
    """
    numbers = {key: record[key] for key in ("rows", "row_group_rows", "data_bytes", "sha256")}
    return {"file": name, **numbers, "bytes": size, "skipped": len(record["skipped"])}
