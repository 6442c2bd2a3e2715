"""Folders on a disk of this machine and in buckets, behind one interface.

A URL such as s3://bucket/latents is opened by fsspec with the driver of its scheme. Credentials, endpoints and other
settings are those of the driver: environment variables, its own files, or fsspec's configuration.

`create` writes a file that does not exist yet, completely or not at all, and only one of several writers of one name
succeeds. In a bucket it is one conditional put (If-None-Match on S3, ifGenerationMatch on Google's storage); on a disk
it is a hard link to a finished temporary file.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from sdvae.errors import InputError, one_line
from sdvae.io import TEMPORARY, is_url, replacing, sync, temporary_beside

if TYPE_CHECKING:
    import pyarrow.parquet as pq

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az", "abfss": "az"}
# The schemes whose drivers have a conditional put.
WRITABLE = frozenset(EXTRAS)
AHEAD_BYTES = 8 * 2**20  # read at once from a file of a bucket; the drivers' own numbers go up to 50 MiB
NO_LINKS = frozenset({errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV})


class StorageError(OSError):
    """A bucket did not answer as it should. The same request may succeed later."""


def is_bad_content(error: Exception) -> bool:
    """Whether an exception while a file was read blames its content, and not the disk or the bucket.

    For damaged files pyarrow raises, among others, an OSError without a number.
    """
    return not isinstance(error, StorageError) and getattr(error, "errno", None) is None


class Storage(Protocol):
    """A folder. Names of files in it have slashes, on every system."""

    is_local: bool

    def __str__(self) -> str: ...

    def where(self, name: str) -> str:
        """The file's path or URL."""
        ...

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading at any position.

        Raises:
            FileNotFoundError: when it does not exist.
        """
        ...

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        """The bytes of a file, or only `size` of them from `start` on.

        Raises:
            FileNotFoundError: when it does not exist.
        """
        ...

    def exists(self, name: str) -> bool: ...

    def sizes(self, folder: str = "") -> dict[str, int]:
        """The files directly inside a folder that may not exist: name without the folder's -> bytes."""
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Write a new file, completely or not at all.

        Returns:
            False if there is such a file already, which stays as it is.
        """
        ...

    def replace(self, name: str, data: bytes) -> None:
        """Write a file, completely or not at all, in place of an old one if there is one."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        ...

    def parquet(self, name: str) -> pq.ParquetFile:
        """Open a Parquet file, which is then read in pieces."""
        ...


def open_storage(path: str | os.PathLike[str], *, writable: bool = False) -> Storage:
    """Open a folder, which need not exist yet.

    Args:
        path: a path on this machine, or a URL.
        writable: whether files are to be written to it.

    Raises:
        InputError: for a scheme that is not known, that has no driver installed or, if `writable`, no conditional put.
    """
    text = os.fspath(path)
    if not is_url(text):
        return LocalStorage(Path(text).expanduser())
    scheme, slashes, rest = text.partition("://")
    if not slashes:
        raise InputError(f"got {text}; need two slashes after the colon, as a str: a Path keeps only one of them")
    if scheme in ("file", "local"):
        return LocalStorage(Path(rest))
    if not rest.strip("/"):
        raise InputError(f"got {text}; need the name of a bucket after the slashes")
    if writable and scheme not in WRITABLE:
        known = ", ".join(f"{scheme}://" for scheme in sorted(WRITABLE))
        raise InputError(f"got {text}; need a path on this machine, or a URL that begins with one of {known}")
    return BucketStorage(text)


class LocalStorage:
    """A folder on a disk of this machine.

    Args:
        root: its path.
    """

    is_local = True

    def __init__(self, root: Path):
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def where(self, name: str) -> str:
        return str(self.root / name)

    def open(self, name: str) -> BinaryIO:
        return (self.root / name).open("rb")

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        with (self.root / name).open("rb") as file:
            file.seek(start)
            return file.read(-1 if size is None else size)

    def exists(self, name: str) -> bool:
        return (self.root / name).is_file()

    def sizes(self, folder: str = "") -> dict[str, int]:
        with suppress(FileNotFoundError), os.scandir(self.root / folder) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        return {}

    def create(self, name: str, data: bytes) -> bool:
        target = self.root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_beside(target)
        try:
            temporary.write_bytes(data)
            sync(temporary)
            try:
                os.link(temporary, target)
            except FileExistsError:
                return False
            except FileNotFoundError:  # another process has finished the data set, and removed temporary files
                if target.exists():
                    return False
                raise
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                # A disk without hard links, such as exFAT. Two writers could both get past the check at the same
                # moment; the second file would then replace the first.
                if target.exists():
                    return False
                temporary.replace(target)
            sync(target.parent)
            return True
        finally:
            temporary.unlink(missing_ok=True)

    def replace(self, name: str, data: bytes) -> None:
        with replacing(self.root / name) as temporary:
            temporary.write_bytes(data)

    def remove(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)

    def parquet(self, name: str) -> pq.ParquetFile:
        import pyarrow.parquet as pq

        return pq.ParquetFile(self.root / name, memory_map=True)

    def remove_unfinished(self, folder: str = "") -> None:
        """Remove the temporary files that killed processes left directly inside a folder."""
        for left in (self.root / folder).glob(TEMPORARY):
            left.unlink(missing_ok=True)


class BucketStorage:
    """A folder in a bucket, or whatever else fsspec opens.

    Drivers repeat a request several times if the connection breaks or the server is busy, and then raise an exception.

    Args:
        url: the folder's URL.

    Raises:
        InputError: when the scheme is not known, or its driver is not installed.
    """

    is_local = False

    def __init__(self, url: str):
        import fsspec

        self.url = url.rstrip("/")
        scheme = url.partition("://")[0]
        try:
            self._opened_fs, self._root = fsspec.url_to_fs(self.url)
            self._process = os.getpid()
        except ImportError as error:
            extra = EXTRAS.get(scheme)
            fix = f'pip install "sdvae[{extra}]"' if extra else one_line(error)
            raise InputError(f"got {url}; need a driver for {scheme}://; {fix}") from error
        except ValueError as error:
            known = ", ".join(f"{scheme}://" for scheme in sorted({*EXTRAS, "hf", "file"}))
            raise InputError(
                f"got {url} ({one_line(error)}); need a path, or a URL that begins with one of {known}"
            ) from error

    @property
    def _fs(self) -> Any:
        if self._process != os.getpid():  # a forked process cannot use the connections of its parent
            self.__init__(self.url)  # type: ignore[misc]
        return self._opened_fs

    def __str__(self) -> str:
        return self.url

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["url"])  # type: ignore[misc]

    def where(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url

    def _key(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def open(self, name: str) -> BinaryIO:
        return io.BufferedReader(self._opened(name, "readahead"), buffer_size=2**20)

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        if size == 0:  # an empty range is refused by the servers
            return b""
        with self._asking(name):
            if size is None:
                return self._fs.cat_file(self._key(name))
            return self._fs.cat_file(self._key(name), start=start, end=start + size)

    def exists(self, name: str) -> bool:
        self._fs.invalidate_cache()
        with self._asking(name):
            return self._fs.isfile(self._key(name))

    def sizes(self, folder: str = "") -> dict[str, int]:
        self._fs.invalidate_cache()
        try:
            with self._asking(folder):
                found = self._fs.ls(self._key(folder), detail=True)
        except FileNotFoundError:
            return {}
        return {entry["name"].rpartition("/")[2]: entry["size"] or 0 for entry in found if entry["type"] == "file"}

    def files(self) -> dict[str, int]:
        """All files below the folder, by one listing without regard to folders: name -> bytes.

        Returns:
            {"": bytes} if the URL is that of a file; nothing if nothing is there.

        Raises:
            FileNotFoundError: when the bucket does not exist.
        """
        self._fs.invalidate_cache()
        with self._asking(""):
            found = self._fs.find(self._root, detail=True)
        self._fs.invalidate_cache()  # the driver keeps the listing, which is larger than the names
        # A name that ends with a slash is an empty object that stands for a folder.
        return {
            name.removeprefix(self._root).removeprefix("/"): entry["size"] or 0
            for name, entry in found.items()
            if not name.endswith("/")
        }

    def create(self, name: str, data: bytes) -> bool:
        try:
            with self._asking(name):
                self._fs.pipe_file(self._key(name), data, mode="create")
        except FileExistsError:
            return False
        except FileNotFoundError as error:
            raise InputError(f"{self.where(name)} cannot be written: {one_line(error)}; check the bucket") from error
        return True

    def replace(self, name: str, data: bytes) -> None:
        with self._asking(name):
            self._fs.pipe_file(self._key(name), data)

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError), self._asking(name):
            self._fs.rm_file(self._key(name))

    def parquet(self, name: str) -> pq.ParquetFile:
        import pyarrow.parquet as pq

        # Without a cache, and with `pre_buffer`, a row group is read by few requests for exactly its bytes.
        return pq.ParquetFile(self._opened(name, "none"), pre_buffer=True)

    def _opened(self, name: str, cache: str) -> _BucketFile:
        with self._asking(name):
            file = self._fs.open(self._key(name), "rb", block_size=AHEAD_BYTES, cache_type=cache)
            return _BucketFile(file, partial(self._asking, name))

    @contextmanager
    def _asking(self, name: str) -> Iterator[None]:
        """Turn the exceptions of a driver into an OSError or an InputError that names the URL."""
        try:
            yield
        except FileNotFoundError as error:
            if str(error).strip("/") != self._key(name).strip("/"):  # often the message is only the name
                raise
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.where(name)) from error
        except (FileExistsError, StorageError, InputError):
            raise
        except PermissionError as error:
            raise InputError(
                f"got no access to {self.where(name)} ({one_line(error)}); need credentials that allow it, where the "
                "driver looks for them"
            ) from error
        except Exception as error:  # each driver has exception classes of its own, which are no OSError
            if "credential" in str(error).lower():
                raise InputError(
                    f"{self.where(name)} needs credentials ({one_line(error)}); set them as the driver expects"
                ) from error
            raise StorageError(f"{self.where(name)}: {one_line(error)}") from error


class _BucketFile(io.RawIOBase):
    """A file of a bucket whose exceptions are those of `BucketStorage`."""

    def __init__(self, file: Any, asking: Callable[[], AbstractContextManager[None]]):
        self._file = file
        self._asking = asking

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with self._asking():
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()
