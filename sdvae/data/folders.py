"""What a folder holds: its files by kind and by split, the classes that its folders name, and what is not used."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from sdvae.data.base import IMAGE_EXTENSIONS
from sdvae.errors import InputError, first_few
from sdvae.io import printable

logger = logging.getLogger(__name__)

TABLE_EXTENSIONS = frozenset((".parquet", ".arrow"))
TAR_EXTENSIONS = frozenset((".tar",))
CAPTION_EXTENSIONS = (".txt", ".caption")  # `.caption` is the default of kohya's sd-scripts
METADATA_FILES = frozenset(("metadata.csv", "metadata.jsonl", "metadata.parquet"))  # of `datasets`' imagefolder
ARCHIVE_EXTENSIONS = frozenset((".zip", ".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".7z", ".rar"))
# Files that a user may take for images or data, so that leaving them out deserves a warning.
UNSUPPORTED_EXTENSIONS = ARCHIVE_EXTENSIONS | frozenset(
    (
        *(".heic", ".heif", ".hif", ".jxl", ".jxr", ".svg", ".exr", ".hdr", ".tga", ".eps", ".pdf", ".xcf", ".blp"),
        *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".raw", ".fits", ".dcm", ".nii"),
        *(".mp4", ".mov", ".avi", ".mkv", ".webm", ".npy", ".npz", ".h5", ".hdf5", ".lmdb", ".mdb", ".tfrecord"),
    )
)
# The words by which `datasets` knows a split in the name of a folder or a file, in its order (datasets.data_files).
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_BREAK = "[-._ 0-9]"  # what may stand between such a word and the rest of the name
_SPLIT_FOLDER = {
    split: re.compile(rf"(?:.*{_BREAK})?(?:{'|'.join(words)})(?:{_BREAK}.*)?", re.DOTALL)
    for split, words in SPLIT_WORDS.items()
}
_SPLIT_FILE = {
    split: re.compile(rf"(?:.*{_BREAK})?(?:{'|'.join(words)}){_BREAK}.*", re.DOTALL)
    for split, words in SPLIT_WORDS.items()
}
_SPLIT_SHARD = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*\.[^/]*")
# `a_mask.png` beside `a.png` as many tools write it; the other two are OneTrainer's.
_MASK = re.compile(r"(?P<image>.+)(?:_mask|-masklabel|-condlabel)", re.DOTALL)
_MASK_FOLDERS = frozenset(("mask", "masks"))


class Unused:
    """Counts of what a source holds and does not use."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[bool, str], list] = {}  # (deserves a warning, kind) -> count, first name
        self._said: set[tuple[bool, str]] = set()

    def add(self, kind: str, names: Sequence[str], *, warn: bool) -> None:
        """Count things of one kind.

        Args:
            kind: a noun in the plural, or an extension.
            names: their names.
            warn: whether they may be images, words or data that the user expects to be used.
        """
        if names:
            entry = self._kinds.setdefault((warn, kind), [0, names[0]])
            entry[0] += len(names)

    def add_files(self, files: Iterable[str]) -> None:
        """Count files of no kind that is used, by their extension."""
        by_extension: dict[str, list[str]] = defaultdict(list)
        for file in files:
            by_extension[_extension(file)].append(file)
        for extension, names in by_extension.items():
            warn = extension in UNSUPPORTED_EXTENSIONS or extension in IMAGE_EXTENSIONS
            self.add(extension or "files without an extension", names, warn=warn)

    def text(self, warn: bool | None = None) -> str:
        """One line that lists the kinds with their counts; those of one level, or all."""
        return "; ".join(
            f"{kind}: {count}, such as {printable(name)}"
            for (level, kind), (count, name) in self._kinds.items()
            if warn in (None, level) and (level, kind) not in self._said
        )

    def say(self, spec: str) -> None:
        """Log what is not used: one warning, and one line of information for what is harmless. Each kind is said once.

        Args:
            spec: where it is.
        """
        for warn, level in ((True, logging.WARNING), (False, logging.INFO)):
            if text := self.text(warn):
                logger.log(level, "%s: not used: %s", printable(spec), text)
        self._said |= self._kinds.keys()


def walk(root: Path, unused: Unused) -> list[str]:
    """All regular files below a folder, as sorted posix paths.

    Links to files and folders are followed, each folder once. As in `datasets`, hidden files and folders are left out,
    and folders whose names begin with two underscores, such as `__MACOSX`.

    Args:
        root: the folder.
        unused: gets what is left out.
    """
    files: list[str] = []
    seen = {_identity(os.stat(root))}
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        try:
            with os.scandir(os.path.join(root, prefix)) as entries:
                listed = list(entries)
        except OSError:
            unused.add("folders that cannot be listed", [prefix], warn=True)
            continue
        folders = []
        for entry in listed:
            path = prefix + entry.name
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:  # a link that leads to itself
                is_folder = is_file = False
            if entry.name.startswith(".") or (is_folder and entry.name.startswith("__")):
                unused.add("hidden files or folders", [path], warn=False)
            elif is_file:
                files.append(path)
            elif is_folder:
                folders.append((path, entry))
            else:
                unused.add("broken links or files that are not regular", [path], warn=True)
        kept = []
        for path, entry in sorted(folders, key=lambda folder: folder[0]):
            identity = _identity(entry.stat())
            if identity in seen:
                unused.add("links to a folder that is read already", [path], warn=False)
            else:
                seen.add(identity)
                kept.append(f"{path}/")
        waiting += reversed(kept)
    return sorted(files)


def visible(files: Iterable[str], unused: Unused) -> list[str]:
    """The sorted files of a bucket without those that `walk` leaves out of a folder.

    Args:
        files: names of objects.
        unused: gets what is left out.
    """
    hidden = re.compile(r"(?:.*/)?(?:\.|__[^/]*/).*", re.DOTALL)
    names = sorted(files)
    unused.add("hidden files or folders", [name for name in names if hidden.fullmatch(name)], warn=False)
    return [name for name in names if not hidden.fullmatch(name)]


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def matching(pattern: str) -> tuple[Path, list[str]]:
    """The regular files that a pattern names.

    Args:
        pattern: as `glob` takes it. With `**`, files come once each even if links form a loop; with `glob`, they would
            come up to 40 times.

    Returns:
        A folder above all of them, and sorted posix paths below it.
    """
    parts = pattern.split("/")
    if "**" not in parts:
        found = sorted(file for file in glob.glob(pattern) if os.path.isfile(file))
        root = Path(os.path.commonpath([os.path.dirname(file) for file in found]) or ".") if found else Path()
        return root, [Path(file).relative_to(root).as_posix() for file in found]
    first = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    above = Path("/".join(parts[:first]) or ("/" if pattern.startswith("/") else "."))
    names = [name for name in (walk(above, Unused()) if above.is_dir() else []) if fits(name.split("/"), parts[first:])]
    folder = os.path.commonpath([os.path.dirname(name) for name in names]) if names else ""
    return above / folder, [os.path.relpath(name, folder) if folder else name for name in names]


def fits(path: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a path match those of a pattern, in which `**` stands for any number of folders."""
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(fits(path[skipped:], pattern[1:]) for skipped in range(len(path) + 1))
    return bool(path) and fnmatchcase(path[0], pattern[0]) and fits(path[1:], pattern[1:])


def by_kind(files: Iterable[str]) -> dict[str, list[str]]:
    """Files by kind: `images`, `tables`, `tars`, `captions`, `metadata` and `others`."""
    kinds: dict[str, list[str]] = {kind: [] for kind in ("images", "tables", "tars", "captions", "metadata", "others")}
    for file in files:
        extension = _extension(file)
        if extension in IMAGE_EXTENSIONS:
            kinds["images"].append(file)
        elif extension in CAPTION_EXTENSIONS:
            kinds["captions"].append(file)
        elif file.rpartition("/")[2] in METADATA_FILES:
            kinds["metadata"].append(file)
        elif extension in TABLE_EXTENSIONS:
            kinds["tables"].append(file)
        elif extension in TAR_EXTENSIONS:
            kinds["tars"].append(file)
        else:
            kinds["others"].append(file)
    return kinds


def split_extension(file: str) -> tuple[str, str]:
    """As os.path.splitext does for posix paths of files that are not hidden, in a third of its time."""
    stem, dot, extension = file.rpartition(".")
    return (stem, dot + extension) if dot and "/" not in extension else (file, "")


def _extension(file: str) -> str:
    return split_extension(file)[1].lower()


def without_masks(images: list[str], unused: Unused) -> list[str]:
    """Images without those that are masks of others.

    A mask is `a_mask.png`, `a-masklabel.png` or `a-condlabel.png` beside an image `a`, or `masks/a.png` if there is an
    image `a` beside the folder `masks` or in a folder beside it.

    Args:
        images: paths of all images of a folder.
        unused: gets the masks.
    """
    suspects = [image for image in images if "mask" in image.lower() or "-condlabel" in image]
    if not suspects:
        return images
    beside: set[str] = set()  # paths without extension
    around: set[tuple[str, str]] = set()  # (folder, name without extension) of images in the folder or one below it
    for image in images:
        folder, _, name = split_extension(image)[0].rpartition("/")
        beside.add(split_extension(image)[0])
        if folder.rpartition("/")[2].lower() not in _MASK_FOLDERS:
            around |= {(folder, name), (folder.rpartition("/")[0], name)} if folder else {("", name)}
    masks = set()
    for image in suspects:
        stem = split_extension(image)[0]
        folder, _, name = stem.rpartition("/")
        above, _, last = folder.rpartition("/")
        of_image = _MASK.fullmatch(stem)
        if (of_image and of_image["image"] in beside) or (last.lower() in _MASK_FOLDERS and (above, name) in around):
            masks.add(image)
    unused.add("masks of other images, which only a pattern reads", sorted(masks), warn=True)
    return [image for image in images if image not in masks]


def by_split(files: Sequence[str], *, partly: bool) -> dict[str | None, list[str]] | None:
    """Divide files into the splits that their names tell, as `datasets` does.

    In this order: files `data/SPLIT-00000-of-00001…`; folders whose names have one of `SPLIT_WORDS`; file names that
    have one. The first of these that applies to any file decides. A file is in the split of the topmost folder that
    names one; `datasets` would put it into several.

    Args:
        files: paths below a folder.
        partly: whether file names are splits even if some files have no such name.

    Returns:
        Split -> files, and None -> the files that are in no split; or None if no name tells a split.
    """
    shards = {file: found[1] for file in files if (found := _SPLIT_SHARD.fullmatch(file))}
    if shards:
        return grouped(files, [shards.get(file) for file in files])
    of_folder = {folder: split_of_folder(folder) for folder in {file.rpartition("/")[0] for file in files}}
    if any(of_folder.values()):
        return grouped(files, [of_folder[file.rpartition("/")[0]] for file in files])
    of_file: list[str | None] = []
    for file in files:
        of_file.append(_named(_SPLIT_FILE, file.rpartition("/")[2]))
        if of_file[-1] is None and not partly:
            return None
    return grouped(files, of_file) if any(of_file) else None


def grouped(files: Sequence[str], splits: Sequence[str | None]) -> dict[str | None, list[str]]:
    groups: dict[str | None, list[str]] = defaultdict(list)
    for file, split in zip(files, splits, strict=True):
        groups[split].append(file)
    return dict(groups)


def _named(patterns: Mapping[str, re.Pattern], name: str) -> str | None:
    return next((split for split, pattern in patterns.items() if pattern.fullmatch(name)), None)


def split_of_folder(folder: str) -> str | None:
    """The split that the topmost folder of a path names, if one does."""
    return _split_folder(folder)[0]


def _split_folder(folder: str) -> tuple[str | None, int]:
    """The split that the topmost folder of a path names, and the number of folders down to it."""
    for depth, name in enumerate(folder.split("/"), start=1):
        if split := _named(_SPLIT_FOLDER, name):
            return split, depth
    return None, 0


def chosen_split(
    files: Sequence[str],
    splits: Mapping[str | None, list[str]] | None,
    split: str,
    spec: str,
    unused: Unused,
    or_all: bool,
) -> list[str]:
    """The files of one split.

    Args:
        files: all files.
        splits: what `by_split` returned for them.
        split: the split's name.
        spec: how the user named the folder.
        unused: gets the files of other splits, and those in no split.
        or_all: take all files if there are no splits, whatever `split` is.

    Raises:
        InputError: when there is no such split.
    """
    if splits is None:
        if split != "train" and not or_all:
            raise InputError(no_split(spec, split, []))
        return list(files)
    if split not in splits:
        raise InputError(no_split(spec, split, [name for name in splits if name]))
    for other, of_other in splits.items():
        if other is None:
            unused.add("files in no split, which only a pattern reads", of_other, warn=True)
        elif other != split:
            unused.add(f"files of the split {other!r}", of_other, warn=False)
    return splits[split]


def no_split(spec: str, split: str, there: Iterable[str]) -> str:
    """The message for a split that is not there, among those that are."""
    names = sorted(there)
    needed = f"one of {names}" if names else "'train', which is all of a source without splits"
    return f"{spec!r} has no split {split!r}; need {needed}"


def classes_of(images: Sequence[str], others: Iterable[str], spec: str) -> dict[str, str]:
    """The classes that folders name, as in `datasets`' imagefolder.

    There are classes if each image lies in a folder, below that of the split, all at the same depth, and if these
    folders have more than one name. If only some images lie otherwise, a line says so.

    Args:
        images: the images of the chosen split.
        others: the images of the other splits. Their classes are counted too, so that a class has one number in all.
        spec: how the user named the folder.

    Returns:
        Folder -> name of its class, for the folders of all splits. Empty if there are no classes.
    """
    here = Counter(image.rpartition("/")[0] for image in images)
    names = {folder: _class_name(folder) for folder in [*here, *{image.rpartition("/")[0] for image in others}]}
    depths = Counter[int]()  # of the folders, -1 if they name no class -> images
    for folder, count in here.items():
        depths[_depth(folder, names)] += count
    depth, count = depths.most_common(1)[0]
    classes = {folder: name for folder, name in names.items() if name and _depth(folder, names) == depth}
    if len(set(classes.values())) < 2:
        return {}
    if count < len(images):
        stray = next(image for image in images if _depth(image.rpartition("/")[0], names) != depth)
        logger.log(
            logging.WARNING if count > len(images) / 2 else logging.INFO,
            "%s: no labels, because %d of %d images (such as %s) do not lie in folders of the same depth as %s; "
            "if these are classes, move the images",
            printable(spec),
            len(images) - count,
            len(images),
            printable(stray),
            first_few(sorted(map(printable, classes))),
        )
        return {}
    return classes


def _class_name(folder: str) -> str | None:
    """The name of the last folder of a path, if it lies below the folder that names the split."""
    if not folder or _split_folder(folder)[1] == folder.count("/") + 1:
        return None
    return folder.rpartition("/")[2]


def _depth(folder: str, names: Mapping[str, str | None]) -> int:
    return folder.count("/") if names[folder] else -1
