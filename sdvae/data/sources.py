"""Opening images: from a folder, a bucket, a data set of the `datasets` library, or scikit-image's photographs.

A source returns the bytes of a file without decoding them, so that a bad file is one bad sample and does not end a run.
Captions, labels and other columns come as a table.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import importlib.util
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sdvae.data.base import IMAGE_EXTENSIONS, ImageSource, ImageStream, Subset, is_lfs_pointer
from sdvae.data.files import Files
from sdvae.data.folders import (
    ARCHIVE_EXTENSIONS,
    CAPTION_EXTENSIONS,
    TABLE_EXTENSIONS,
    TAR_EXTENSIONS,
    Unused,
    by_kind,
    by_split,
    chosen_split,
    classes_of,
    fits,
    grouped,
    matching,
    no_split,
    split_extension,
    split_of_folder,
    visible,
    walk,
    without_masks,
)
from sdvae.data.metadata import read_metadata
from sdvae.data.streams import HubStream
from sdvae.data.tables import BucketTable, TableImages, TableStream, table_features
from sdvae.data.tars import Tars, TarStream, no_images
from sdvae.errors import InputError, one_line
from sdvae.io import HUB_ID, is_url, printable
from sdvae.storage import EXTRAS, BucketStorage, LocalStorage, Storage, open_storage

if TYPE_CHECKING:
    from datasets import Dataset, Features

logger = logging.getLogger(__name__)

BUCKETS = frozenset({*EXTRAS, "hf", "memory"})  # the schemes of URLs that images are read from

# The photographs in scikit-image's wheel: file, width, height. Its drawings, masks, texts and crops of 100 pixels are
# left out. The two motorcycles are a stereo pair, so both or neither should be held out.
SKIMAGE_PHOTOGRAPHS = {
    "astronaut": ("astronaut.png", 512, 512),
    "brick": ("brick.png", 512, 512),
    "camera": ("camera.png", 512, 512),
    "chelsea": ("chelsea.png", 451, 300),
    "coffee": ("coffee.png", 600, 400),
    "coins": ("coins.png", 384, 303),
    "grass": ("grass.png", 512, 512),
    "gravel": ("gravel.png", 512, 512),
    "hubble_deep_field": ("hubble_deep_field.jpg", 1000, 872),
    "ihc": ("ihc.png", 512, 512),
    "moon": ("moon.png", 512, 512),
    "motorcycle_left": ("motorcycle_left.png", 741, 500),
    "motorcycle_right": ("motorcycle_right.png", 741, 500),
    "retina": ("retina.jpg", 1411, 1411),
    "rocket": ("rocket.jpg", 640, 427),
}


def open_source(
    spec: str, *, split: str = "train", image_column: str | None = None, or_all: bool = False
) -> ImageSource:
    """Open the images that a string names. What is there and is not used is logged.

    Args:
        spec: one of
            - "skimage": the photographs inside scikit-image's wheel;
            - a folder of images, nested or not, in the order of their paths;
            - a folder of .parquet or .arrow files or of .tar archives (webdataset), or one such file;
            - a folder that `datasets` wrote with `save_to_disk`;
            - a glob of any of these files;
            - the URL of such a folder or file or a glob below one, s3://bucket/photos; file:// is this machine;
            - the id of a data set on the Hugging Face hub, with its owner.
        split: the split to open, of a source that has several. All of a source without splits is "train".
        image_column: the column of images, of raw bytes or of paths; by default the only one of images or of bytes. For
            archives with several images in a sample, the extension of one, such as "input.jpg".
        or_all: take all of a source that has no splits, whatever `split` is.

    Returns:
        The source.

    Raises:
        InputError: when there is no such source or split, or it is empty.
    """
    if spec == "skimage":
        return _open_skimage()
    spec = _without_file_scheme(spec)
    path = Path(spec).expanduser()
    if not is_url(spec) and path.is_dir() and _is_saved(path):
        return _open_saved(path, split, image_column, or_all)
    if is_url(spec) or path.exists() or glob.has_magic(spec):
        return _open_found(_find(spec, split, or_all), image_column)
    if is_hub_id(spec):
        import datasets

        with _refusing(spec, split):
            return _open_rows(spec, datasets.load_dataset(spec, split=split), image_column, None)
    raise InputError(_not_there(spec))


def subset(source: ImageSource, indices: Iterable[int]) -> ImageSource:
    """The images of `source` at `indices`, in that order."""
    return Subset(source, np.fromiter(indices, dtype=np.int64))


def split_off(
    source: ImageSource, *, names: Sequence[str] | None = None, count: int = 0, seed: int = 0
) -> tuple[ImageSource, ImageSource]:
    """Divide a source into images to train on and images that are held out.

    Args:
        source: all images.
        names: the names of the images to hold out. If they are given, `count` is ignored.
        count: how many images to hold out: those with the smallest hash of (seed, name). An image that is added later
            changes at most one of them.
        seed: the seed of that hash.

    Returns:
        (train, held out), both in the order of `source`.

    Raises:
        InputError: when the source lacks a name, or nothing would be left to train on.
    """
    all_names = [source.name(index) for index in range(len(source))]
    if names:
        known = set(all_names)
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
                raise InputError(
                    f"got data.validation_names with {printable(name)}, which no image has; need names of images, "
                    f"{'perhaps' if near else 'such as'} {' or '.join(map(printable, near or all_names[:1]))}; "
                    "or give [], to hold out data.validation_count images"
                )
        wanted = set(names)
        held_out = {index for index, name in enumerate(all_names) if name in wanted}
    else:
        if count < 0:
            raise InputError(f"{count} images to hold out; need 0 or more")
        ranked = sorted(range(len(all_names)), key=lambda index: (_name_hash(seed, all_names[index]), index))
        held_out = set(ranked[:count])
    if len(held_out) == len(source):
        wanted_count = len(held_out) if names else count
        raise InputError(f"{wanted_count} of {len(source)} images to hold out; need some to train on; hold out fewer")
    train = [index for index in range(len(source)) if index not in held_out]
    return subset(source, train), subset(source, sorted(held_out))


def _name_hash(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}:".encode() + os.fsencode(name)).digest()


def open_stream(spec: str, *, split: str = "train", image_column: str | None = None) -> ImageStream:
    """Open archives, tables or a data set of the hub as a stream, without an index and without a copy on this disk.

    Args:
        spec: a folder, glob or URL of .tar, .parquet or .arrow files, or the id of a data set on the hub.
        split: the split to open, of a data set that has several.
        image_column: the column of images or of raw bytes; by default the only one of type `Image`.

    Returns:
        The stream. Each file is one of its parts.

    Raises:
        InputError: when it cannot be opened, or its columns cannot be found.
    """
    spec = _without_file_scheme(spec)
    if is_url(spec) or Path(spec).expanduser().exists() or glob.has_magic(spec):
        return _stream_found(_find(spec, split, False), image_column)
    if is_hub_id(spec):
        return _stream_hub(spec, split, image_column)
    raise InputError(_not_there(spec))


def open_source_or_stream(
    spec: str, *, split: str = "train", image_column: str | None = None
) -> ImageSource | ImageStream:
    """Open images as `open_source` does, except for archives and tables in a bucket, which are opened as a stream.

    Args:
        spec: as for `open_source`.
        split: as for `open_source`.
        image_column: as for `open_source`.

    Raises:
        InputError: when there is no such source or split, or it is empty.
    """
    if not is_url(_without_file_scheme(spec)):
        return open_source(spec, split=split, image_column=image_column)
    found = _find(spec, split, False)
    return _open_found(found, image_column) if found.kind == "images" else _stream_found(found, image_column)


def _without_file_scheme(spec: str) -> str:
    """The path in a URL such as file:///photos, or `spec` itself."""
    for scheme in ("file://", "local://"):
        if spec.startswith(scheme):
            return spec.removeprefix(scheme)
    return spec


def _stream_hub(spec: str, split: str, image_column: str | None) -> HubStream:
    import datasets

    with _refusing(spec, split):
        dataset = datasets.load_dataset(spec, split=split, streaming=True)
        if dataset.features is None:
            # reads the first rows of a webdataset, whose columns are not known otherwise
            dataset = dataset._resolve_features()
    column = _image_column(spec, dataset.features, image_column, paths=False)
    for name, feature in dataset.features.items():  # `datasets` decodes nothing; only the images are decoded, later
        if isinstance(feature, (datasets.Image, datasets.Audio, datasets.Video)):
            dataset = dataset.cast_column(name, type(feature)(decode=False))
    return HubStream(dataset, column, spec)


def _open_skimage() -> ImageSource:
    package = importlib.util.find_spec("skimage")  # finds the folder without importing it
    folders = list(package.submodule_search_locations or []) if package else []
    root = Path(folders[0], "data") if folders else None
    files = [file for file, _, _ in SKIMAGE_PHOTOGRAPHS.values()]
    if root is None or not all((root / file).is_file() for file in files):
        raise InputError('data source "skimage" needs the photographs of scikit-image; pip install "sdvae[quickstart]"')
    return Files(LocalStorage(root), files, names=list(SKIMAGE_PHOTOGRAPHS))


def is_hub_id(spec: str) -> bool:
    """Whether it is the id of a data set on the hub, `owner/name`, and not a path.

    It is a path if its first part is on this disk, or if it has the extension of a file.
    """
    extensions = IMAGE_EXTENSIONS | TABLE_EXTENSIONS | TAR_EXTENSIONS | ARCHIVE_EXTENSIONS
    return (
        HUB_ID.fullmatch(spec) is not None
        and not spec.startswith(".")
        and not os.path.exists(spec.split("/")[0])
        and os.path.splitext(spec)[1].lower() not in extensions
    )


def _not_there(spec: str) -> str:
    """The message for a path that does not exist, with the nearest names in its folder."""
    path = Path(spec).expanduser()
    try:
        beside = [entry.name for entry in os.scandir(path.parent)]
    except OSError:
        beside = []
    near = [str(path.parent / name) for name in difflib.get_close_matches(path.name, beside, n=3)]
    hub = "" if "/" in spec or path.suffix else ", or a data set on the hub as owner/name, such as 'ylecun/mnist'"
    perhaps = f"perhaps {' or '.join(map(repr, near))}" if near else "check the path"
    return f"no such folder or file: {spec!r}; need an existing one{hub}; {perhaps}"


class _Found(NamedTuple):
    """The files that a path, a pattern or a URL names."""

    spec: str  # for messages
    storage: Storage  # a folder above all of them
    kind: str  # what they are: images, tables or tars
    chosen: list[str]  # the files of that kind and of the wanted split
    kinds: dict[str, list[str]]  # all files by kind
    sizes: Mapping[str, int]  # of the files of a bucket, in bytes
    split: str
    unused: Unused


def _find(spec: str, split: str, or_all: bool) -> _Found:
    """Find the images, tables or archives of one split. What is not used is counted and not yet said."""
    unused = Unused()
    path = Path(spec).expanduser()
    sizes: Mapping[str, int] = {}
    if is_url(spec):
        storage, sizes, is_folder = _objects(spec)
        files = visible(sizes, unused)
    elif is_folder := path.is_dir():
        spec = str(path)
        storage, files = LocalStorage(path), walk(path, unused)
    else:
        storage, files = _named_files(spec, path)
    if not is_folder and split != "train" and not or_all:
        raise InputError(no_split(spec, split, []))
    kind, kinds = _only_kind(spec, storage, files, unused)
    if not is_folder:  # all files are used
        if kind == "images":
            kinds["captions"] = [
                caption
                for folder in sorted({os.path.dirname(file) for file in kinds["images"]})
                for caption in by_kind(os.path.join(folder, name) for name in _names_in(storage, folder))["captions"]
            ]
            unused = Unused()  # what is beside named images was not asked for
        return _Found(spec, storage, kind, kinds[kind], kinds, sizes, split, unused)
    if kind == "images" and not kinds["metadata"]:
        kinds["images"] = without_masks(kinds["images"], unused)
    if kind == "tables":
        splits = _splits_of_tables(storage, kinds["tables"], split)
    else:
        splits = by_split(kinds[kind], partly=kind == "tars")
    chosen = chosen_split(kinds[kind], splits, split, spec, unused, or_all)
    return _Found(spec, storage, kind, chosen, kinds, sizes, split, unused)


def _open_found(found: _Found, image_column: str | None) -> ImageSource:
    source: ImageSource
    if found.kind == "images":
        source = _open_images(found, image_column)
    elif found.kind == "tars":
        source = Tars(found.storage, found.chosen, image_column, found.unused)
        if len(source) == 0:
            raise no_images(found.spec, found.unused)
    elif isinstance(found.storage, LocalStorage):
        source = _open_tables(found.spec, found.storage.root, found.chosen, image_column)
    else:
        source = _open_bucket_table(found, image_column)
    found.unused.say(found.spec)
    return source


def _stream_found(found: _Found, image_column: str | None) -> ImageStream:
    if found.kind == "images":
        raise InputError(
            f"{found.spec!r} cannot be streamed; need .tar, .parquet or .arrow files, or a hub id; "
            "image files are read in place without streaming"
        )
    sizes = {
        file: found.sizes[file] if file in found.sizes else os.path.getsize(found.storage.where(file))
        for file in found.chosen
    }
    if found.kind == "tars":
        stream: ImageStream = TarStream(found.storage, sizes, image_column)
    else:
        features = table_features(found.storage, found.chosen[0])
        column = _image_column(found.spec, features, image_column, paths=True)
        stream = TableStream(found.storage, sizes, column, features, _folder_of(found.storage, found.chosen))
    found.unused.say(found.spec)
    return stream


def _open_bucket_table(found: _Found, image_column: str | None) -> BucketTable:
    arrow = next((file for file in found.chosen if not file.lower().endswith(".parquet")), None)
    if arrow is not None:
        raise InputError(
            f"{found.storage.where(arrow)!r} has no index by which single images could be read out of a bucket; need "
            ".parquet, .tar or image files there, or a copy on this disk"
        )
    features = table_features(found.storage, found.chosen[0])
    column = _image_column(found.spec, features, image_column, paths=True)
    table = BucketTable(found.storage, found.chosen, column, features, _folder_of(found.storage, found.chosen))
    if len(table) == 0:
        raise InputError(f"data set {found.spec!r} has no rows; need at least one image")
    return table


def _objects(url: str) -> tuple[Storage, Mapping[str, int], bool]:
    """The files that a URL names: a folder above them, name below it -> bytes, and whether the URL is a folder's."""
    parts = url.split("/")
    if parts[0].rstrip(":") not in BUCKETS:
        known = ", ".join(f"{scheme}://" for scheme in sorted({*BUCKETS, "file"}))
        raise InputError(f"got {url}; need a path, or a URL that begins with one of {known}")
    magic = next((place for place, part in enumerate(parts) if place > 2 and glob.has_magic(part)), None)
    storage = open_storage("/".join(parts[:magic]))
    assert isinstance(storage, BucketStorage)
    try:
        sizes = storage.files()
    except FileNotFoundError as error:
        raise InputError(f"no such folder or file: {url!r} ({one_line(error)}); check the URL") from error
    if magic is not None:
        names = [name for name in visible(sizes, Unused()) if fits(name.split("/"), parts[magic:])]
        if not names:
            raise InputError(f"no file matches {url!r}; need at least one; check the pattern")
        folder = os.path.commonpath([os.path.dirname(name) for name in names])
        below = {os.path.relpath(name, folder) if folder else name: sizes[name] for name in names}
        return open_storage(storage.where(folder)), below, False
    if set(sizes) == {""}:
        above, _, name = url.rstrip("/").rpartition("/")
        return open_storage(above), {name: sizes[""]}, False
    if not sizes:
        raise InputError(f"no such folder or file: {url!r}; need an existing one; check the URL")
    return storage, sizes, True


def _names_in(storage: Storage, folder: str) -> Iterable[str]:
    return os.listdir(storage.where(folder)) if storage.is_local else storage.sizes(folder)


def _is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote the folder."""
    return (folder / "dataset_dict.json").is_file() or all(
        (folder / file).is_file() for file in ("dataset_info.json", "state.json")
    )


def _named_files(spec: str, path: Path) -> tuple[LocalStorage, list[str]]:
    """A folder and paths below it, of a file or of those that a pattern matches."""
    if not path.exists():
        root, files = matching(str(path))
        if not files:
            raise InputError(f"no file matches {spec!r}; need at least one; check the pattern")
        return LocalStorage(root), files
    if not path.is_file():
        raise InputError(f"{spec!r} is not a regular file; need an image, a table or an archive")
    return LocalStorage(path.parent), [path.name]


def _only_kind(spec: str, storage: Storage, files: Sequence[str], unused: Unused) -> tuple[str, dict[str, list[str]]]:
    """The one kind of data among files: `images`, `tables` or `tars`; and all files by kind.

    Args:
        spec: how the user named them.
        storage: the folder above them.
        files: paths below it.
        unused: gets the files of no kind that is used.

    Raises:
        InputError: when there is no such kind, or more than one.
    """
    kinds = by_kind(files)
    # img2dataset writes 00000.parquet with facts about the images in 00000.tar or in the folder 00000
    if kinds["tables"] and (kinds["tars"] or kinds["images"]):
        described = {split_extension(tar)[0] for tar in kinds["tars"]} | set(map(os.path.dirname, kinds["images"]))
        if all(split_extension(table)[0] in described for table in kinds["tables"]):
            unused.add("tables about the images beside them", kinds["tables"], warn=False)
            kinds["tables"] = []
    if not kinds["images"]:  # captions and metadata are those of image files
        kinds["tables"] += [file for file in kinds["metadata"] if file.endswith(".parquet")]
        kinds["others"] += [file for file in kinds["metadata"] if not file.endswith(".parquet")] + kinds["captions"]
    unused.add_files(kinds["others"])
    found = [kind for kind in ("images", "tables", "tars") if kinds[kind]]
    if not found:
        there = f"; it holds {text}" if (text := unused.text()) else ""
        packed = any(os.path.splitext(file)[1].lower() in ARCHIVE_EXTENSIONS for file in files)
        raise InputError(
            f"{spec!r} holds no images; need .png, .jpg, …, .parquet, .arrow or uncompressed .tar files{there}"
            + ("; unpack the archives" if packed else "")
        )
    if len(found) > 1:
        counts = " and ".join(f"{len(kinds[kind])} {kind}" for kind in found)
        patterns = " or ".join(repr(_pattern_of(storage, kinds[kind])) for kind in found)
        raise InputError(f"{spec!r} holds {counts}; need one kind; choose it by a pattern such as {patterns}")
    return found[0], kinds


def _pattern_of(storage: Storage, files: Sequence[str]) -> str:
    """A pattern that matches files, or those of their most common extension."""
    folder = os.path.commonpath([os.path.dirname(file) for file in files])
    extension = Counter(os.path.splitext(file)[1] for file in files).most_common(1)[0][0]
    nested = "" if all(os.path.dirname(file) == folder for file in files) else "**/"
    return f"{glob.escape(storage.where(folder))}/{nested}*{extension}"


def _open_images(found: _Found, image_column: str | None) -> ImageSource:
    """Open image files.

    Args:
        found: the files.
        image_column: for metadata with several images in a row.
    """
    spec, storage, images, kinds, unused = found.spec, found.storage, found.chosen, found.kinds, found.unused
    classes = classes_of(images, kinds["images"], spec)
    if not kinds["metadata"]:
        if image_column not in (None, "image"):
            raise InputError(f"got image_column {image_column!r}; {spec!r} holds image files without columns; omit it")
        captions = _captions(images, kinds, unused)
        return Files(storage, images, captions=captions, classes=classes)
    unused.add("folders as labels, since the metadata has the columns", sorted(classes), warn=False)
    paths, table = read_metadata(storage, kinds["metadata"], image_column)
    here, everywhere = set(images), set(kinds["images"])
    # an image that is not there is kept, to be a bad image; its folder tells the split
    rows = [
        row
        for row, path in enumerate(paths)
        if path in here or (path not in everywhere and split_of_folder(os.path.dirname(path)) in (None, found.split))
    ]
    if not rows:
        raise InputError(
            f"the metadata in {spec!r} has no row of an image in split {found.split!r}; check its file_name"
        )
    names = [paths[row] for row in rows]
    unused.add("images that the metadata does not list", sorted(here - set(names)), warn=True)
    captions = [] if "caption" in table.column_names else _captions(names, kinds, unused)
    files = [name if name in here else "" for name in names]
    return Files(storage, files, names=names, captions=captions, metadata=table.take(rows))


def _captions(images: Sequence[str], kinds: dict[str, list[str]], unused: Unused) -> list[str]:
    """The caption file of each image, or "": NAME.txt, or else NAME.caption."""
    texts = set(kinds["captions"])
    if not texts:
        return []
    stems = [split_extension(image)[0] for image in images]
    captions = [
        next((file for extension in CAPTION_EXTENSIONS if (file := stem + extension) in texts), "") for stem in stems
    ]
    left = texts.difference(captions)
    if left:
        second = left.intersection(stem + ".caption" for stem in stems)
        unused.add(".caption beside a .txt of the same image", sorted(second), warn=True)
        of_images = {split_extension(image)[0] for image in kinds["images"]}
        alone = sorted(file for file in left if split_extension(file)[0] not in of_images)
        unused.add("texts without an image of that name", alone, warn=any(captions))
    return captions


def _splits_of_tables(storage: Storage, tables: Sequence[str], split: str) -> dict[str | None, list[str]] | None:
    """The tables by split, which the folder's card (README.md; only on this disk) or their names tell."""
    import datasets

    if not isinstance(storage, LocalStorage) or not storage.exists("README.md"):
        return by_split(tables, partly=True)
    with _refusing(str(storage), split):
        found = datasets.load_dataset_builder(str(storage)).config.data_files or {}
    of_card = {os.path.relpath(file, storage.root): str(name) for name, files in found.items() for file in files}
    return grouped(tables, [of_card.get(table) for table in tables])


def _open_tables(spec: str, root: Path, tables: Sequence[str], image_column: str | None) -> ImageSource:
    """Open tables with `datasets.load_dataset`, which keeps a memory-mapped Arrow copy in its cache.

    They become its split "train". If it got a folder, it would name its cached copy after the last part of the path,
    and might return the copy of another folder of that name.
    """
    import datasets

    builders = {os.path.splitext(table)[1].lower()[1:] for table in tables}
    if len(builders) > 1:
        raise InputError(f"{spec!r} holds .arrow and .parquet files; need one kind; choose it by a pattern")
    files = [os.path.abspath(root / table) for table in tables]
    for file in files:
        with open(file, "rb") as opened:
            if is_lfs_pointer(opened.read(64)):
                raise InputError(f"{file!r} is a Git LFS pointer; need the table itself; run «git lfs pull»")
    escaped = [glob.escape(file) for file in files]  # `datasets` takes them for patterns
    with _refusing(spec, "train"):
        dataset = datasets.load_dataset(builders.pop(), data_files={"train": escaped}, split="train")
    return _open_rows(spec, dataset, image_column, _folder_of(LocalStorage(root), tables))


def _folder_of(storage: Storage, files: Sequence[str]) -> Storage:
    """The folder in which relative paths in tables begin: that of the tables, or the one above all of them."""
    where = storage.where(os.path.commonpath([os.path.dirname(file) for file in files]))
    return LocalStorage(Path(os.path.abspath(where))) if storage.is_local else open_storage(where)


@contextmanager
def _refusing(spec: str, split: str) -> Iterator[None]:
    """Turn the exceptions of `datasets` for an input that it cannot open into an InputError."""
    import datasets

    try:
        yield
    # `datasets` raises many classes when a data set is not found or not readable, lacks a split, or is offline
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        here = "" if os.path.exists(spec) or glob.has_magic(spec) else ", and there is no such folder or file here"
        raise InputError(f"data set {spec!r}, split {split!r} cannot be opened{here}; {one_line(error)}") from error


def _open_saved(folder: Path, split: str, image_column: str | None, or_all: bool) -> ImageSource:
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, LookupError) as error:  # ArrowInvalid is a ValueError; no rows are an IndexError
        raise InputError(
            f"data set {str(folder)!r} cannot be opened; need what save_to_disk wrote, with rows; {one_line(error)}"
        ) from error
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise InputError(no_split(str(folder), split, map(str, saved)))
        saved = saved[split]
    elif split not in ("train", str(saved.split)) and not or_all:
        raise InputError(f"data set {str(folder)!r} was saved as one split, {saved.split}; got split {split!r}")
    return _open_rows(str(folder), saved, image_column, LocalStorage(folder))


def _open_rows(spec: str, dataset: Dataset, image_column: str | None, folder: Storage | None) -> ImageSource:
    import datasets

    if len(dataset) == 0:
        raise InputError(f"data set {spec!r} has no rows; need at least one image")
    image_column = _image_column(spec, dataset.features, image_column, paths=folder is not None)
    if isinstance(dataset.features[image_column], datasets.Image):
        dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    return TableImages(dataset, image_column, folder)


def _image_column(spec: str, features: Features, image_column: str | None, *, paths: bool) -> str:
    """The column `image_column`; if that is None, the only column of images, or else the only column of bytes.

    Args:
        spec: how the user named the data set.
        features: its columns.
        image_column: the name of one of them.
        paths: whether it may be a column of text, with the paths of images.
    """
    import datasets

    if image_column is None:
        columns = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        columns = columns or [name for name, feature in features.items() if _is_binary(feature)]
        if len(columns) != 1:
            found = f"image columns {columns}" if columns else f"no image column among {list(features)}"
            or_paths = " (it may hold paths of images)" if paths and not columns else ""
            raise InputError(f"data set {spec!r} has {found}; need exactly one; name it with image_column{or_paths}")
        return columns[0]
    if image_column not in features:
        near = difflib.get_close_matches(image_column, features, n=1, cutoff=0.0)
        raise InputError(
            f"data set {spec!r} has no column {image_column!r}; need one of {list(features)}, perhaps {near[0]!r}"
        )
    feature = features[image_column]
    is_path = paths and getattr(feature, "dtype", None) in ("string", "large_string")
    if not isinstance(feature, datasets.Image) and not _is_binary(feature) and not is_path:
        raise InputError(f"column {image_column!r} of {spec!r} is {feature}; need images, raw bytes or paths")
    return image_column


def _is_binary(feature: Any) -> bool:
    """Whether the column holds raw bytes, or bytes and paths, as images do in Parquet files without metadata."""
    if isinstance(feature, dict):
        return _is_binary(feature.get("bytes"))
    return getattr(feature, "dtype", None) in ("binary", "large_binary")
