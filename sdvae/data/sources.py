"""Opening images: from a folder, a data set of the `datasets` library, tar archives, or scikit-image's photographs.

A source returns the bytes of a file without decoding them, so that a bad file is one bad sample and does not end a run.
Captions, labels and other columns come as a table.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import importlib.util
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdvae.data.base import IMAGE_EXTENSIONS, ImageSource, Subset
from sdvae.data.files import Files
from sdvae.data.streams import ImageStream
from sdvae.data.tables import TableImages
from sdvae.data.tars import Tars
from sdvae.errors import InputError, one_line

if TYPE_CHECKING:
    from datasets import Dataset, Features

TABLE_EXTENSIONS = frozenset((".parquet", ".arrow"))
TAR_EXTENSIONS = frozenset((".tar",))

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


def open_source(spec: str, *, split: str = "train", image_column: str | None = None) -> ImageSource:
    """Open the images that a string names.

    Args:
        spec: one of
            - "skimage": the photographs inside scikit-image's wheel;
            - a folder of images, nested or not, in the order of their paths; hidden files are ignored;
            - a folder or file of `datasets`: from `save_to_disk`, or .parquet or .arrow files;
            - a folder, file or glob of .tar (webdataset);
            - a glob of images or tables;
            - the id of a data set on the Hugging Face hub.
        split: the split to open, of a data set that has several.
        image_column: the column of images or of raw bytes; by default the only one of type `Image`.

    Returns:
        The source.

    Raises:
        InputError: when there is no such source, or it is empty.
    """
    if spec == "skimage":
        return _open_skimage()
    path = Path(spec).expanduser()
    if path.is_dir():
        return _open_folder(path, split, image_column)
    if path.is_file():
        return _open_files(spec, path.parent, [path.name], split, image_column)
    if glob.has_magic(spec):
        files = sorted(file for file in glob.glob(str(path), recursive=True) if os.path.isfile(file))
        if not files:
            raise InputError(f"no file matches {spec!r}; need at least one; check the pattern")
        root = Path(os.path.commonpath([os.path.dirname(file) for file in files]) or ".")
        names = [Path(file).relative_to(root).as_posix() for file in files]
        captions = [text for file in names if os.path.isfile(root / (text := f"{os.path.splitext(file)[0]}.txt"))]
        return _open_files(spec, root, names, split, image_column, others=captions)
    if _looks_like_path(spec):
        raise InputError(f"no such folder or file: {spec!r}; need an existing one; check the path")
    return _open_tables(spec, {"path": spec}, split, image_column)


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
                    f"no image named {name!r} to hold out; need a name of the data set, "
                    + (f"perhaps {' or '.join(map(repr, near))}" if near else f"such as {all_names[0]!r}")
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
    """Open a data set of the `datasets` library that is read as a stream, without a copy on this disk.

    Args:
        spec: a folder or glob of .parquet or .arrow files, or the id of a data set on the hub.
        split: the split to open, of a data set that has several.
        image_column: the column of images or of raw bytes; by default the only one of type `Image`.

    Returns:
        The stream.

    Raises:
        InputError: when it cannot be opened, or its columns cannot be found.
    """
    import datasets

    arguments: dict[str, Any] = {"path": spec}
    if _looks_like_path(spec):
        path = Path(spec).expanduser()
        files = sorted(glob.glob(str(path), recursive=True)) if glob.has_magic(spec) else [str(path)]
        kinds = {kind for kind, found in _by_kind(_walk(path) if path.is_dir() else files).items() if found}
        if kinds != {"tables"} or not (path.is_dir() or all(os.path.isfile(file) for file in files)):
            raise InputError(
                f"{spec!r} cannot be streamed; need .parquet or .arrow files, or a hub id; "
                "images and .tar on this disk are read in place without streaming"
            )
        builder = os.path.splitext(files[0])[1][1:]
        arguments = _table_files(str(path), split) if path.is_dir() else {"path": builder, "data_files": {split: files}}
    with _refusing(spec, split):
        dataset = datasets.load_dataset(**arguments, split=split, streaming=True)
        if dataset.features is None:
            dataset = (
                dataset._resolve_features()
            )  # reads the first rows of a webdataset, whose columns are not known otherwise
    column = _image_column(spec, dataset.features, image_column)
    for name, feature in dataset.features.items():  # `datasets` decodes nothing; only the images are decoded, later
        if isinstance(feature, (datasets.Image, datasets.Audio, datasets.Video)):
            dataset = dataset.cast_column(name, type(feature)(decode=False))
    return ImageStream(dataset, column)


def _open_skimage() -> ImageSource:
    package = importlib.util.find_spec("skimage")  # finds the folder without importing it
    folders = list(package.submodule_search_locations or []) if package else []
    root = Path(folders[0], "data") if folders else None
    files = [file for file, _, _ in SKIMAGE_PHOTOGRAPHS.values()]
    if root is None or not all((root / file).is_file() for file in files):
        raise InputError('data source "skimage" needs the photographs of scikit-image; pip install "sdvae[quickstart]"')
    return Files(root, files, names=list(SKIMAGE_PHOTOGRAPHS))


def _open_folder(folder: Path, split: str, image_column: str | None) -> ImageSource:
    if (folder / "dataset_dict.json").is_file() or all(
        (folder / file).is_file() for file in ("dataset_info.json", "state.json")
    ):
        return _open_saved(folder, split, image_column)
    files = _walk(folder)
    kinds = _by_kind(files)
    found = {kind: files for kind, files in kinds.items() if files}
    if not found:
        raise InputError(f"{str(folder)!r} holds no images; need a folder with .png, .jpg, … .parquet or .tar files")
    if len(found) > 1:
        counts = " and ".join(f"{len(files)} {kind}" for kind, files in found.items())
        raise InputError(
            f"{str(folder)!r} holds {counts}; need one kind; choose it by a pattern such as '{folder}/**/*.png'"
        )
    if "tables" in found:
        return _open_tables(str(folder), _table_files(str(folder), split), split, image_column)
    if "tars" in found:
        return _open_tars(str(folder), folder, found["tars"])
    return Files(folder, found["images"], others=files)


def _open_files(
    spec: str,
    root: Path,
    files: Sequence[str],
    split: str,
    image_column: str | None,
    others: Sequence[str] = (),
) -> ImageSource:
    """Open files that are given as a list.

    Args:
        spec: how the user named them.
        root: a folder above all of them.
        files: paths below `root`.
        split: the name that the split of tables gets.
        image_column: the column of images in tables.
        others: files that may hold captions.
    """
    kinds = _by_kind(files)
    kind = next((kind for kind, of_kind in kinds.items() if len(of_kind) == len(files)), None)
    if kind is None:
        raise InputError(f"{spec!r} names files of several or unknown kinds; need images, .tar, .parquet or .arrow")
    if kind == "images":
        return Files(root, files, others=others)
    if kind == "tars":
        return _open_tars(spec, root, files)
    builders = {os.path.splitext(file)[1].lower()[1:] for file in files}
    if len(builders) > 1:
        raise InputError(f"{spec!r} names .arrow and .parquet files; need one kind; narrow the pattern")
    data_files = {split: [str(root / file) for file in files]}
    return _open_tables(spec, {"path": builders.pop(), "data_files": data_files}, split, image_column)


def _open_tars(spec: str, root: Path, files: Sequence[str]) -> ImageSource:
    tars = Tars(root, files)
    if len(tars) == 0:
        raise InputError(f"{spec!r} holds no images; need .png, .jpg, … members in its archives")
    return tars


def _table_files(folder: str, split: str) -> dict[str, Any]:
    """Arguments of `load_dataset` for one split of a folder of tables. The folder's card or file names give the splits.

    If `load_dataset` got only the folder, it would name its cached copy after the last part of the path, and might
    return the copy of another folder with the same name.
    """
    import datasets

    with _refusing(folder, split):
        splits = datasets.load_dataset_builder(folder).config.data_files
    if not splits or split not in splits:
        raise InputError(f"data set {folder!r} has no split {split!r}; need one of {sorted(map(str, splits or {}))}")
    files = [str(file) for file in splits[split]]
    return {"path": os.path.splitext(files[0])[1].lower()[1:], "data_files": {split: files}}


def _open_tables(spec: str, arguments: dict[str, Any], split: str, image_column: str | None) -> ImageSource:
    """Open tables with `datasets.load_dataset`, which keeps a memory-mapped Arrow copy in its cache."""
    import datasets

    with _refusing(spec, split):
        dataset = datasets.load_dataset(**arguments, split=split)
    return _open_rows(spec, dataset, image_column)


@contextmanager
def _refusing(spec: str, split: str) -> Iterator[None]:
    """Turn the exceptions of `datasets` for an input that it cannot open into an InputError."""
    import datasets

    try:
        yield
    # `datasets` raises many classes when a data set is not found or not readable, lacks a split, or is offline
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"data set {spec!r}, split {split!r} cannot be opened; {one_line(error)}") from error


def _open_saved(folder: Path, split: str, image_column: str | None) -> ImageSource:
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, LookupError) as error:  # ArrowInvalid is a ValueError; no rows are an IndexError
        raise InputError(
            f"data set {str(folder)!r} cannot be opened; need what save_to_disk wrote, with rows; {one_line(error)}"
        ) from error
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise InputError(f"data set {str(folder)!r} has no split {split!r}; need one of {sorted(map(str, saved))}")
        saved = saved[split]
    elif split not in ("train", str(saved.split)):
        raise InputError(f"data set {str(folder)!r} was saved as one split, {saved.split}; got split {split!r}")
    return _open_rows(str(folder), saved, image_column)


def _open_rows(spec: str, dataset: Dataset, image_column: str | None) -> ImageSource:
    import datasets

    if len(dataset) == 0:
        raise InputError(f"data set {spec!r} has no rows; need at least one image")
    image_column = _image_column(spec, dataset.features, image_column)
    if isinstance(dataset.features[image_column], datasets.Image):
        dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    return TableImages(dataset, image_column)


def _image_column(spec: str, features: Features, image_column: str | None) -> str:
    """The column `image_column`; if that is None, the only column of images, or else the only column of bytes."""
    import datasets

    if image_column is None:
        columns = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        columns = columns or [name for name, feature in features.items() if _is_binary(feature)]
        if len(columns) != 1:
            found = f"image columns {columns}" if columns else f"no image column among {list(features)}"
            raise InputError(f"data set {spec!r} has {found}; need exactly one; name it with image_column")
        return columns[0]
    if image_column not in features:
        near = difflib.get_close_matches(image_column, features, n=1, cutoff=0.0)
        raise InputError(
            f"data set {spec!r} has no column {image_column!r}; need one of {list(features)}, perhaps {near[0]!r}"
        )
    feature = features[image_column]
    if not isinstance(feature, datasets.Image) and not _is_binary(feature):
        raise InputError(f"column {image_column!r} of {spec!r} is {feature}; need images or raw bytes")
    return image_column


def _is_binary(feature: Any) -> bool:
    """Whether the column holds raw bytes, or bytes and paths, as images do in Parquet files without metadata."""
    if isinstance(feature, dict):
        return _is_binary(feature.get("bytes"))
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def _walk(root: Path) -> list[str]:
    """All files below `root` except hidden ones, as sorted posix paths. Links to folders are followed once each."""
    files: list[str] = []
    seen = {os.path.realpath(root)}
    for folder, subfolders, names in os.walk(root, followlinks=True):
        kept = []
        for name in sorted(subfolders):
            real = os.path.realpath(os.path.join(folder, name))
            if not name.startswith(".") and real not in seen:
                seen.add(real)
                kept.append(name)
        subfolders[:] = kept
        relative = Path(os.path.relpath(folder, root))
        files += [(relative / name).as_posix() for name in names if not name.startswith(".")]
    return sorted(files)


def _by_kind(files: Iterable[str]) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {"images": [], "tables": [], "tars": []}
    for file in files:
        extension = os.path.splitext(file)[1].lower()
        if extension in IMAGE_EXTENSIONS:
            kinds["images"].append(file)
        elif extension in TABLE_EXTENSIONS:
            kinds["tables"].append(file)
        elif extension in TAR_EXTENSIONS:
            kinds["tars"].append(file)
    return kinds


def _looks_like_path(spec: str) -> bool:
    """Whether it is a path and not a hub id (`name` or `owner/name`).

    It is if it does not have the form of an id, if its first part exists on this disk, or if it has a file's extension.
    """
    extensions = IMAGE_EXTENSIONS | TABLE_EXTENSIONS | TAR_EXTENSIONS
    return (
        re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", spec) is None
        or os.path.exists(spec.split("/")[0])
        or os.path.splitext(spec)[1].lower() in extensions
    )
