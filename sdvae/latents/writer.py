"""Writing a latent data set, from several processes at once.

While it is being made, the folder (see `sdvae.latents.folder`) also holds

    .progress/00000.json                    the record of each shard that is done
    .progress/00000.lock                    held by the process that encodes the shard
    .lock                                   held while the manifest changes

A shard is done when its record exists. The record is written after the shard's file, and both are written under a
temporary name and renamed. When a process dies, its locks are released, so another process encodes its shards. No
process waits for another.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from sdvae.errors import InputError
from sdvae.io import changed_fields, left_beside, replacing, sha256_of, utf8
from sdvae.latents.folder import FORMAT, VERSION, LatentFolder
from sdvae.latents.summary import card, statistics_of
from sdvae.statistics import LatentMoments

if TYPE_CHECKING:
    import pyarrow as pa

# What a fingerprint means that lacks these settings, because it was written before they were.
BEFORE = {"images": {"color": "raw", "max_pixels": None}}
ROW_GROUP_BYTES = 2**20  # at least so much is read for one row, which matters if rows are read in random order


class LatentWriter(LatentFolder):
    """A latent data set that this process writes or repairs, possibly together with other processes.

    Args:
        root: the data set's folder, which may not exist yet.
    """

    def __init__(self, root: str | Path):
        super().__init__(root)
        self._progress = self.root / ".progress"
        self._lock = self.root / ".lock"
        self._stamp: tuple[int, int] | None = None  # of the manifest that was read last
        self._records: dict[int, dict[str, Any]] = {}

    def begin(self, fingerprint: Mapping[str, Any], source: str, vae_config: Mapping[str, Any]) -> None:
        """Start a data set, or continue one that was started in the same way.

        Args:
            fingerprint: the settings and hashes that determine the rows, which JSON can hold.
            source: the name of the source, for the card.
            vae_config: the config of the VAE that makes it.

        Raises:
            InputError: when the folder holds other files, or latents with another fingerprint.
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
            self._read()
            changes = changed_fields(self.manifest["fingerprint"], json.loads(json.dumps(fingerprint)), defaults=BEFORE)
            if changes:
                raise InputError(
                    f"{self.root} holds latents made in another way ({'; '.join(changes)}); choose another folder, "
                    "or run the command that began it"
                )
            self.data.mkdir(exist_ok=True)
            if self.is_complete:
                self._remove_progress()  # it exists if a process was killed just before removing it
            else:
                self._progress.mkdir(exist_ok=True)

    def _left_by_the_killed(self) -> list[Path]:
        """Temporary files of processes that were killed while they held the lock."""
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

    def record(self, shard: int) -> dict[str, Any] | None:
        """The record of a shard.

        Returns:
            rows, row_group_rows, bytes, sha256, moments and skipped (a number), and until the data set is finished also
            skipped_images (their lines for skipped.jsonl). None if the shard is not done.
        """
        if shard not in self._records:
            try:
                self._records[shard] = json.loads(self._record_path(shard).read_text(encoding="utf-8"))
            except FileNotFoundError:
                self._read()  # another process may have finished the data set
        return self._records.get(shard)

    def claim(self, shard: int) -> FileLock | None:
        """Take a shard for this process.

        Returns:
            A lock, which the caller must release; None if the shard is done or another process encodes it.
        """
        if self.record(shard) is not None:
            return None
        self._progress.mkdir(exist_ok=True)
        lock = FileLock(self._progress / f"{shard:05d}.lock", thread_local=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        if self.record(shard) is not None:  # another process finished it before the lock was taken
            lock.release()
            if self.is_complete:
                self._remove_progress()
            return None
        for left in left_beside(self.shard_path(shard)):
            left.unlink()
        return lock

    def write_shard(
        self, shard: int, table: pa.Table, row_bytes: int, moments: LatentMoments, skipped: Sequence[Mapping[str, Any]]
    ) -> None:
        """Write a shard that this process has claimed.

        Args:
            shard: its number.
            table: its rows.
            row_bytes: bytes of the latents in a row; they decide the size of row groups.
            moments: the moments of the shard's latents.
            skipped: index, name and reason of each image that has no row.

        Raises:
            OSError: when the file cannot be written; then the shard is not done.
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
                compression=dict.fromkeys(texts, "zstd"),  # latents are mostly noise, which cannot be compressed
                use_dictionary=texts,
                write_statistics=["index"],  # for latents, minimum and maximum are two whole rows
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
        """Write manifest, card and skipped.jsonl if every shard is done.

        Returns:
            Whether all shards are done.

        Raises:
            InputError: when no image has a row, or the file of a shard is missing.
        """
        if any(self.record(shard) is None for shard in range(self.num_shards)):
            return False
        with FileLock(self._lock):
            self._records, self._stamp = {}, None  # another process may have undone some
            self._read()
            if self.is_complete:
                return True
            found = [self.record(shard) for shard in range(self.num_shards)]
            records = [record for record in found if record is not None]
            if len(records) < len(found):
                return False
            lost = [path.name for path in map(self.shard_path, range(self.num_shards)) if not path.is_file()]
            if lost:
                raise InputError(f"{len(lost)} finished shards are missing ({lost[0]}); repair with --repair true")
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
            self._remove_progress()
            self._read()
        return True

    def undo(self, shards: Sequence[int]) -> None:
        """Remove some shards, so that they are encoded again. Shards that another process is encoding are kept."""
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
            self._read()
            entries = list(self.manifest.get("shards", [None] * self.num_shards))
            for shard in shards:
                entries[shard] = None
                self._records.pop(shard, None)
                self._record_path(shard).unlink(missing_ok=True)
            self._write_manifest({**self._begun(), "complete": False, "shards": entries})
            for shard in shards:
                self.shard_path(shard).unlink(missing_ok=True)
            self._read()

    def _begun(self) -> dict[str, Any]:
        """The part of the manifest that is there from the beginning."""
        return {key: self.manifest[key] for key in ("format", "version", "source", "vae_config", "fingerprint")}

    def _all_skipped(self, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The lines of skipped.jsonl. New records hold theirs; for the others, the lines of the old file are kept."""
        before = self.skipped_lines()
        skipped: list[dict[str, Any]] = []
        for shard, record in enumerate(records):
            if "skipped_images" in record:
                skipped += [{"shard": shard, **line} for line in record["skipped_images"]]
            else:
                skipped += before.get(shard, [])
        return skipped

    def _record_path(self, shard: int) -> Path:
        return self._progress / f"{shard:05d}.json"

    def _write_manifest(self, manifest: Mapping[str, Any]) -> None:
        with replacing(self._manifest_path) as temporary:
            temporary.write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    def _read(self) -> None:
        """Read the manifest again if it was replaced, and the records in it."""
        stat = self._manifest_path.stat()
        stamp = (stat.st_ino, stat.st_mtime_ns)
        if stamp == self._stamp:
            return
        super()._read()
        self._stamp = stamp
        for shard, entry in enumerate(self.manifest.get("shards", [])):
            if entry is not None:
                self._records[shard] = entry

    def _remove_progress(self) -> None:
        shutil.rmtree(self._progress, ignore_errors=True)  # another process may remove it at the same time
