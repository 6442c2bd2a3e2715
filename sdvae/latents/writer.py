"""Writing a latent data set, from several processes at once.

A shard is done when its file exists. The file is made in memory and written by `Storage.create`, so it is there
completely or not at all, and of two processes that encode the same shard only one writes it. All other files follow
from the shards; whoever finds all shards done writes them, and two processes that do so at once write the same bytes.

How processes divide the work, so that no shard is encoded twice:

- in parts: process i of n takes every n-th shard, beginning with shard i. They need not see each other, and a process
  that dies leaves its part to whoever is started with the same i and n, or to any later run.
- by locks, on a disk of this machine or one that machines share: a process takes any shard that is neither done nor
  locked by another. Locks are files in `.progress`; when a process dies, the system releases its locks.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from sdvae.errors import InputError, first_few
from sdvae.io import TEMPORARY, changed_fields, printable
from sdvae.latents.folder import CARD, FORMAT, MANIFEST, RECORD, SHARDS, SKIPPED, VERSION, LatentFolder, entry_of
from sdvae.latents.scaling import LatentScaling
from sdvae.latents.summary import card, statistics_of
from sdvae.statistics import LatentMoments
from sdvae.storage import LocalStorage

if TYPE_CHECKING:
    import pyarrow as pa

# What a fingerprint of format version 1 means, which lacks these settings.
VERSION_1 = {"images": {"color": "raw", "max_pixels": None}}
ROW_GROUP_BYTES = 2**20  # at least so much is read for one row, which matters if rows are read in random order
READERS = 32  # threads that read the shards' records; in a bucket each waits for its answer
NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP})


class LatentWriter(LatentFolder):
    """A latent data set that this process writes or repairs, possibly together with other processes.

    Args:
        root: the data set's folder or URL, which may not exist yet.
        part: (i, n), to encode only shards i, i + n, i + 2 n, …; None for any shards that no other process has locked.

    Raises:
        InputError: when the URL cannot be used.
    """

    def __init__(self, root: str | Path, part: tuple[int, int] | None = None):
        super().__init__(root, writable=True)
        self.part = part if part is not None or self.storage.is_local else (0, 1)
        self._done: set[int] = set()

    def begin(
        self, fingerprint: Mapping[str, Any], source: str, vae_config: Mapping[str, Any], scaling: LatentScaling
    ) -> None:
        """Start a data set, or continue one that was started in the same way.

        Args:
            fingerprint: the settings and hashes that determine the rows, which JSON can hold.
            source: the name of the source, for the card.
            vae_config: the config of the VAE that makes it.
            scaling: how pipelines scale the latents of that VAE.

        Raises:
            InputError: when the folder holds other files, or latents with another fingerprint.
        """
        if isinstance(self.storage, LocalStorage) and self.storage.root.exists() and not self.storage.root.is_dir():
            raise InputError(f"{self.storage} is a file; need the path of a folder")
        if not self.storage.exists(MANIFEST):
            strangers = sorted(printable(name) for name in self._names() if not fnmatch(name, TEMPORARY))
            if strangers:
                raise InputError(
                    f"{self.storage} holds other files ({first_few(strangers)}) and no latents; need a new or empty "
                    "folder; choose another"
                )
            begun = {"format": FORMAT, "version": VERSION, "source": source, "vae_config": dict(vae_config)}
            begun |= {"scaling": scaling.to_json(), "fingerprint": dict(fingerprint)}
            self.storage.create(MANIFEST, _json({**begun, "complete": False}))
        self._read()
        defaults = VERSION_1 if self.manifest["version"] == 1 else None
        changes = changed_fields(self.manifest["fingerprint"], json.loads(json.dumps(fingerprint)), defaults=defaults)
        if changes:
            raise InputError(
                f"{self.storage} holds latents made in another way ({'; '.join(changes)}); choose another folder, "
                "or run the command that began it"
            )
        self.refresh()
        if self.is_complete:
            self._remove_progress()  # it exists if a process was killed just before removing it

    def _names(self) -> list[str]:
        """What the folder holds: the names of files and, on a disk, of folders."""
        if isinstance(self.storage, LocalStorage):
            return os.listdir(self.storage.root) if self.storage.root.is_dir() else []
        return list(self.storage.sizes())

    def refresh(self) -> None:
        """Find out which shards are done."""
        self._done = {shard for shard, size in enumerate(self.sizes()) if size is not None}

    def is_done(self, shard: int) -> bool:
        """Whether a shard was done when this process last looked."""
        return shard in self._done

    def claim(self, shard: int) -> Claim | None:
        """Take a shard for this process.

        Returns:
            A claim, which the caller must release; None if the shard is done or left to another process.

        Raises:
            InputError: when the disk has no locks.
        """
        if shard in self._done:
            return None
        if self.part is not None:
            number, count = self.part
            return Claim(None) if shard % count == number else None
        try:
            lock = self._acquired(f"{shard:05d}.lock", timeout=0)
        except Timeout:
            return None
        if self.storage.exists(self.shard_name(shard)):  # another process finished it before the lock was taken
            self._done.add(shard)
            lock.release()
            return None
        return Claim(lock)

    def write_shard(
        self, shard: int, table: pa.Table, row_bytes: int, moments: LatentMoments, skipped: Sequence[Mapping[str, Any]]
    ) -> bool:
        """Write a shard that this process has claimed.

        Args:
            shard: its number.
            table: its rows.
            row_bytes: bytes of the latents in a row; they decide the size of row groups.
            moments: the moments of the shard's latents.
            skipped: index, name and reason of each image that has no row.

        Returns:
            False if another process wrote it before; its file stays.

        Raises:
            OSError: when the file cannot be written; then the shard is not done.
        """
        row_group_rows = max(1, ROW_GROUP_BYTES // row_bytes)
        record = {"row_group_rows": row_group_rows, "moments": moments.sums.tolist(), "skipped": list(skipped)}
        is_new = self.storage.create(self.shard_name(shard), _parquet(table, row_group_rows, record))
        self._done.add(shard)
        return is_new

    def finish(self) -> bool:
        """Write manifest, card, shards.jsonl and skipped.jsonl if every shard is done.

        Returns:
            Whether all shards are done.

        Raises:
            InputError: when no image has a row, or a shard is damaged.
        """
        if self.part is not None:
            return self._finished()
        lock = self._acquired("finish.lock", timeout=-1)
        try:
            return self._finished()
        finally:
            lock.release()

    def _finished(self) -> bool:
        self._read()
        if self.is_complete:
            self._remove_progress()
            return True
        sizes = self.sizes()
        if None in sizes:
            return False
        records = self.records(range(self.num_shards))
        skipped = [{"shard": shard, **line} for shard, record in enumerate(records) for line in record["skipped"]]
        rows = sum(record["rows"] for record in records)
        if rows == 0:
            raise InputError(
                f"none of the {len(skipped)} images could be encoded (the first: {skipped[0]['reason']}); "
                "choose other images or options, and another output folder"
                if skipped
                else "the source holds no images; choose another"
            )
        entries = [
            entry_of(record, self.shard_name(shard), size or 0)
            for shard, (record, size) in enumerate(zip(records, sizes, strict=True))
        ]
        counts = {"rows": rows, "skipped": len(skipped), "statistics": statistics_of(records, self.scaling.patch_size)}
        manifest = {**self._begun(), "complete": True, **counts}
        self.storage.replace(SKIPPED, _json_lines(skipped))
        self.storage.replace(SHARDS, _json_lines(entries))
        self.storage.replace(CARD, card(manifest, entries, self.scaling).encode())
        self.storage.replace(MANIFEST, _json(manifest))
        self._remove_progress()
        self._read()
        return True

    def records(self, shards: Sequence[int]) -> list[dict[str, Any]]:
        """The records in the files of several shards.

        Raises:
            FileNotFoundError: when a shard is not done.
            InputError: when a file is damaged.
        """
        with ThreadPoolExecutor(READERS) as readers:
            return list(readers.map(self.record, shards))

    def undo(self, shards: Sequence[int]) -> None:
        """Remove some shards, so that they are encoded again.

        Raises:
            InputError: when an older version wrote the data set, whose files lack their records.
        """
        if self.manifest["version"] != VERSION:
            raise InputError(f"an older version of sdvae wrote {self.storage}; encode it again into another folder")
        self.storage.replace(MANIFEST, _json({**self._begun(), "complete": False}))
        for shard in shards:
            self.storage.remove(self.shard_name(shard))
        self._read()
        self.refresh()

    def _begun(self) -> dict[str, Any]:
        """The part of the manifest that is there from the beginning."""
        keys = ("format", "version", "source", "vae_config", "scaling", "fingerprint")
        return {key: self.manifest[key] for key in keys if key in self.manifest}

    def _acquired(self, name: str, timeout: float) -> FileLock:
        """Take a lock, also if a process that finishes the data set is removing the folder of locks.

        Args:
            name: the lock's name.
            timeout: seconds to wait for another process, -1 for any time.

        Raises:
            Timeout: when another process holds it for longer.
            InputError: when the disk has no locks.
        """
        while True:
            self._progress.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self._progress / name, thread_local=False, fallback_to_soft=False)
            try:
                lock.acquire(timeout=timeout)
                return lock
            except FileNotFoundError:
                continue
            except (NotImplementedError, OSError) as error:
                if isinstance(error, Timeout) or (isinstance(error, OSError) and error.errno not in NO_LOCKS):
                    raise
                raise InputError(
                    f"the disk of {self.storage} has no file locks, by which processes divide the work; give each of n "
                    "processes its part, --part 0/n to --part n-1/n, and a single one --part 0/1"
                ) from error

    @property
    def _progress(self) -> Path:
        assert isinstance(self.storage, LocalStorage)
        return self.storage.root / ".progress"

    def _remove_progress(self) -> None:
        """Remove the locks, and the temporary files of processes that were killed."""
        if isinstance(self.storage, LocalStorage):
            shutil.rmtree(self._progress, ignore_errors=True)  # another process may remove it at the same time
            self.storage.remove_unfinished("data")
            if self.part is None:  # under the lock of `finish`: no other process is writing these files
                self.storage.remove_unfinished()


class Claim:
    """A shard that this process encodes.

    Args:
        lock: the lock that this process holds, or None if processes encode in parts.
    """

    def __init__(self, lock: FileLock | None):
        self._lock = lock

    @property
    def is_locked(self) -> bool:
        return self._lock is not None

    def release(self) -> None:
        if self._lock is not None:
            self._lock.release()


def _parquet(table: pa.Table, row_group_rows: int, record: Mapping[str, Any]) -> bytes:
    """A Parquet file with a record in its metadata, to which the rows' number, bytes and checksum are added."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [field.name for field in table.schema if pa.types.is_string(field.type)]
    file = io.BytesIO()
    with pq.ParquetWriter(
        file,
        table.schema,
        compression=dict.fromkeys(texts, "zstd"),  # latents are mostly noise, which cannot be compressed
        use_dictionary=texts,
        write_statistics=["index"],  # for latents, minimum and maximum are two whole rows
    ) as writer:
        if table.num_rows:  # `datasets` reads a file without row groups, but not a row group without rows
            writer.write_table(table, row_group_size=row_group_rows)
        data = file.getbuffer()
        digest, size = hashlib.sha256(data).hexdigest(), len(data)
        data.release()  # the file cannot grow while its buffer is in use
        whole = {"rows": table.num_rows, **record, "data_bytes": size, "sha256": digest}
        writer.add_key_value_metadata({RECORD.decode(): json.dumps(whole)})
    return file.getvalue()


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def _json_lines(lines: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()
