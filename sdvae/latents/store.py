"""A latent data set on disk, and how several processes fill it without hurting each other.

    manifest.json                           what the latents are, of what and by which VAE; at the end every shard's
                                            rows and checksum, and the statistics
    data/train-00000-of-00019.parquet       the rows; `datasets.load_dataset(folder)` finds these
    skipped.jsonl                           one line for each image that has no row, with the reason
    README.md                               a card for people and for the hub
    .progress/00000.json                    while it is being made: the record of each shard that is done
    .progress/00000.lock                    held by the process that encodes the shard

A shard is done when its record is there, which is written after its file; both are written beside and renamed. A
process that dies loses its locks, so another one takes its shard up again. No process waits for another.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout

from sdvae.errors import InputError
from sdvae.io import changed_fields, left_beside, read_json, replacing, sha256_of, utf8
from sdvae.runtime import DTYPES
from sdvae.statistics import LatentMoments

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = "sdvae latents"
VERSION = 1
ROW_GROUP_BYTES = 2**20  # what reading one row costs at least, where rows are read in random order


class LatentFolder:
    """Args: root: the data set's folder; need not exist yet for a new one."""

    def __init__(self, root: str | Path):
        self.root = Path(root).expanduser()
        self.data = self.root / "data"
        self.skipped = self.root / "skipped.jsonl"
        self.card = self.root / "README.md"
        self._manifest_path = self.root / "manifest.json"
        self._progress = self.root / ".progress"
        self._lock = self.root / ".lock"
        self._stamp: tuple[int, int] | None = None
        self._records: dict[int, dict[str, Any]] = {}
        self.manifest: dict[str, Any] = {}

    def open(self, *, finished: bool = False) -> None:
        """Read the manifest of a data set that is there.

        Args: finished: it must be.

        Raises: InputError when there is none, it is not one of ours, or not finished.
        """
        if not self._manifest_path.is_file():
            raise InputError(f"{self.root} holds no manifest.json; need a folder that `sdvae encode` wrote")
        self._refresh()
        if finished and not self.is_complete:
            raise InputError(f"{self.root} is not complete; run `sdvae encode` with the same options again")

    def factors(self, vae_config: Mapping[str, Any], encoder_sha256: str) -> dict[str, Any]:
        """scaling_factor, and where the VAE has one shift_factor, as measured on the rows of this data set; for a VAE
        with latents_mean and latents_std these, and scaling_factor 1.

        Raises: InputError when these are the latents of another VAE, or have no factors.
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

    def begin(self, fingerprint: Mapping[str, Any], source: str, vae_config: Mapping[str, Any]) -> None:
        """Start a data set, or go on with one that was started in the same way.

        Args:
            fingerprint: all that decides what the rows are; JSON.
            source: what it is made from, for the reader's information.
            vae_config: of the VAE that made them, with its factors.

        Raises: InputError when the folder holds other files, or latents with another fingerprint.
        """
        if self.root.exists() and not self.root.is_dir():
            raise InputError(f"{self.root} is a file; need the path of a folder")
        self._check_ours()
        self.root.mkdir(parents=True, exist_ok=True)
        with FileLock(self._lock):
            self._check_ours()
            for left in self._left_by_the_killed():
                left.unlink()
            if not self._manifest_path.is_file():
                begun = {"format": FORMAT, "version": VERSION, "source": source, "vae_config": dict(vae_config)}
                self._write_manifest({**begun, "fingerprint": dict(fingerprint), "complete": False})
            self._refresh()
            changes = changed_fields(self.manifest["fingerprint"], json.loads(json.dumps(fingerprint)))
            if changes:
                raise InputError(
                    f"{self.root} holds latents made in another way ({'; '.join(changes)}); choose another folder, "
                    "or run the command that began it"
                )
            self.data.mkdir(exist_ok=True)
            if self.is_complete:
                self._forget_progress()  # of a process that was killed before it could
            else:
                self._progress.mkdir(exist_ok=True)

    def _left_by_the_killed(self) -> list[Path]:
        """Files that are written beside their targets and under the lock."""
        return [path for target in (self._manifest_path, self.skipped, self.card) for path in left_beside(target)]

    def _check_ours(self) -> None:
        if not self.root.exists() or self._manifest_path.is_file():
            return
        ours = {self._lock, *self._left_by_the_killed()}
        strangers = sorted(utf8(path.name) for path in self.root.iterdir() if path not in ours)
        if strangers:
            raise InputError(
                f"{self.root} holds other files ({', '.join(strangers[:3])}) and no latents; "
                "need a new or empty folder; choose another"
            )

    @property
    def is_complete(self) -> bool:
        return bool(self.manifest["complete"])

    @property
    def num_shards(self) -> int:
        return self.manifest["fingerprint"]["shards"]

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored values."""
        return DTYPES[self.manifest["fingerprint"]["stored"]["dtype"]]

    def shard_path(self, shard: int) -> Path:
        return self.data / f"train-{shard:05d}-of-{self.num_shards:05d}.parquet"

    def record(self, shard: int) -> dict[str, Any] | None:
        """Of a shard that is done: rows, bytes, sha256, moments, skipped; before the end also `skipped_images`."""
        if shard not in self._records:
            try:
                self._records[shard] = json.loads(self._record_path(shard).read_text(encoding="utf-8"))
            except FileNotFoundError:
                self._refresh()  # another process may have finished the data set
        return self._records.get(shard)

    def claim(self, shard: int) -> FileLock | None:
        """A lock to be released, or None where the shard is done, or another process is at it."""
        if self.record(shard) is not None:
            return None
        self._progress.mkdir(exist_ok=True)
        lock = FileLock(self._progress / f"{shard:05d}.lock", thread_local=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        if self.record(shard) is not None:  # finished between the look and the lock
            lock.release()
            if self.is_complete:
                self._forget_progress()
            return None
        for left in left_beside(self.shard_path(shard)):
            left.unlink()
        return lock

    def write_shard(
        self, shard: int, table: pa.Table, row_bytes: int, moments: LatentMoments, skipped: Sequence[Mapping[str, Any]]
    ) -> None:
        """Write a shard that this process has claimed.

        Args:
            row_bytes: of the latents in a row, for the size of row groups.
            moments: of the shard's latents.
            skipped: index, name and reason of the images that have no row.

        Raises: OSError when the disk does not take it; then the shard is not done.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self.shard_path(shard)
        row_group_rows = max(1, ROW_GROUP_BYTES // row_bytes)
        texts = [field.name for field in table.schema if pa.types.is_string(field.type)]
        with replacing(path) as temporary:
            with pq.ParquetWriter(
                temporary,
                table.schema,
                compression=dict.fromkeys(texts, "zstd"),  # noise does not shrink
                use_dictionary=texts,
                write_statistics=["index"],  # or each page would hold its least and greatest latents
            ) as writer:
                if table.num_rows:  # `datasets` reads a file without row groups, but not a row group without rows
                    writer.write_table(table, row_group_size=row_group_rows)
            digest = sha256_of(temporary)
            size = temporary.stat().st_size
        record = {
            "rows": table.num_rows,
            "row_group_rows": row_group_rows,
            "bytes": size,
            "sha256": digest,
            "moments": moments.sums.tolist(),
            "skipped": len(skipped),
            "skipped_images": list(skipped),
        }
        with replacing(self._record_path(shard)) as temporary:
            temporary.write_text(json.dumps(record), encoding="utf-8")
        self._records[shard] = record

    def finish(self) -> bool:
        """Write manifest, card and skipped.jsonl if every shard is done. False when some are not.

        Raises: InputError when no image has a row, or a file is gone that was written.
        """
        if any(self.record(shard) is None for shard in range(self.num_shards)):
            return False
        with FileLock(self._lock):
            self._records, self._stamp = {}, None  # another process may have undone some
            self._refresh()
            if self.is_complete:
                return True
            found = [self.record(shard) for shard in range(self.num_shards)]
            records = [record for record in found if record is not None]
            if len(records) < len(found):
                return False
            lost = [path.name for path in map(self.shard_path, range(self.num_shards)) if not path.is_file()]
            if lost:
                raise InputError(f"{len(lost)} shards were written and are gone ({lost[0]}); mend with --repair true")
            rows = sum(record["rows"] for record in records)
            skipped = self._all_skipped(records)
            if rows == 0:
                raise InputError(
                    f"none of the {len(skipped)} images could be encoded (the first: {skipped[0]['reason']}); "
                    "choose other images or options, and another output folder"
                    if skipped
                    else "the source holds no images; choose another"
                )
            with replacing(self.skipped) as temporary:
                lines = [json.dumps(line) + "\n" for line in skipped]
                temporary.write_text("".join(lines), encoding="utf-8")
            manifest = {
                **self._begun(),
                "complete": True,
                "rows": rows,
                "skipped": len(skipped),
                "statistics": statistics_of(records),
                "shards": [
                    {"file": f"data/{self.shard_path(shard).name}"}
                    | {key: value for key, value in record.items() if key != "skipped_images"}
                    for shard, record in enumerate(records)
                ],
            }
            with replacing(self.card) as temporary:
                temporary.write_text(card(manifest), encoding="utf-8")
            self._write_manifest(manifest)
            self._forget_progress()
            self._refresh()
        return True

    def undo(self, shards: Sequence[int]) -> None:
        """Make some shards undone again; their files go. Those that another process is at are left to it."""
        with FileLock(self._lock), ExitStack() as held:
            self._progress.mkdir(exist_ok=True)
            free = []
            for shard in shards:
                try:
                    held.enter_context(FileLock(self._progress / f"{shard:05d}.lock", timeout=0))
                    free.append(shard)
                except Timeout:
                    continue
            shards = free
            self._refresh()
            entries = list(self.manifest.get("shards", [None] * self.num_shards))
            for shard in shards:
                entries[shard] = None
                self._records.pop(shard, None)
                self._record_path(shard).unlink(missing_ok=True)
            self._write_manifest({**self._begun(), "complete": False, "shards": entries})
            for shard in shards:
                self.shard_path(shard).unlink(missing_ok=True)
            self._refresh()

    def _begun(self) -> dict[str, Any]:
        """What a manifest says from the beginning."""
        return {key: self.manifest[key] for key in ("format", "version", "source", "vae_config", "fingerprint")}

    def _all_skipped(self, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Records have the images themselves; what a manifest keeps is their number, and skipped.jsonl the rest."""
        before = self.skipped_lines()
        skipped: list[dict[str, Any]] = []
        for shard, record in enumerate(records):
            if "skipped_images" in record:
                skipped += [{"shard": shard, **line} for line in record["skipped_images"]]
            else:
                skipped += before.get(shard, [])
        return skipped

    def skipped_lines(self) -> dict[int, list[dict[str, Any]]]:
        """The lines of skipped.jsonl by shard."""
        lines: dict[int, list[dict[str, Any]]] = defaultdict(list)
        if self.skipped.is_file():
            for text in self.skipped.read_text(encoding="utf-8").splitlines():
                line = json.loads(text)
                lines[line["shard"]].append(line)
        return lines

    def _record_path(self, shard: int) -> Path:
        return self._progress / f"{shard:05d}.json"

    def _write_manifest(self, manifest: Mapping[str, Any]) -> None:
        with replacing(self._manifest_path) as temporary:
            temporary.write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    def _refresh(self) -> None:
        """Read the manifest again if it was replaced."""
        stat = self._manifest_path.stat()
        stamp = (stat.st_ino, stat.st_mtime_ns)
        if stamp == self._stamp:
            return
        manifest = read_json(self._manifest_path)
        if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
            raise InputError(
                f"{self._manifest_path} is of format {manifest.get('format')!r}, version {manifest.get('version')}; "
                f"need {FORMAT!r}, version {VERSION}"
            )
        self.manifest, self._stamp = manifest, stamp
        for shard, entry in enumerate(manifest.get("shards", [])):
            if entry is not None:
                self._records[shard] = entry

    def _forget_progress(self) -> None:
        shutil.rmtree(self._progress, ignore_errors=True)  # another process may be at the same


def statistics_of(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """scaling_factor, shift_factor, latents_mean and latents_std of all rows, under the keys of a VAE's config.

    Mirror images are not counted. With one image of a single colour there is no std, and the factors are None.
    """
    sums = torch.tensor([record["moments"] for record in records], dtype=torch.float64)  # (shards, 4, C)
    moments = LatentMoments(sums.shape[-1])
    moments.sums = sums.sum(dim=0)
    has_std = 0 < moments.std < float("inf")
    scale, shift = moments.factors(with_shift=True) if has_std else (None, None)
    return {
        "scaling_factor": scale,
        "shift_factor": shift,
        "latents_mean": moments.channel_mean.tolist(),
        "latents_std": moments.channel_std.tolist(),
    }


def card(manifest: Mapping[str, Any]) -> str:
    """A data set card: the hub reads its head, people the rest."""
    print_ = manifest["fingerprint"]
    stored, images, vae = print_["stored"], print_["images"], print_["vae"]
    sizes = ", ".join(f"{height} x {width}" for height, width in images["sizes"])
    factors = {key: value for key, value in manifest["statistics"].items() if key.endswith("factor")}
    scaling_factor = manifest["vae_config"].get("scaling_factor")
    # `datasets` tells copies in its cache apart by this head and the folder's last name, and by nothing else
    content = hashlib.sha256("".join(entry["sha256"] for entry in manifest["shards"]).encode()).hexdigest()
    return f"""---
configs:
- config_name: default
  data_files: data/train-*.parquet
  description: {content}
tags:
- latents
---

# Latents of {os.path.basename(manifest["source"].rstrip("/")) or manifest["source"]}

{manifest["rows"]} images ({manifest["skipped"]} skipped, see skipped.jsonl), encoded with `sdvae encode`, which the
project's README describes. Unscaled {"posterior means and log-variances" if stored["what"] == "moments" else "samples"}
in {stored["dtype"]}{", also of the mirror images" if stored["mirror"] else ""}.

- VAE: encoder {vae["encoder_sha256"][:16]}…, {vae["precision"]}, scaling_factor {scaling_factor}
- Images: {sizes} (height x width)
- Measured here: {", ".join(f"{key} {value:.6g}" for key, value in factors.items() if value is not None)}

```python
from sdvae import LatentDataset

for batch in LatentDataset("this folder").loader(batch_size=64):
    batch["latents"]  # (64, C, h, w), a fresh sample of each posterior, scaled as a diffusion model sees it
```
"""
