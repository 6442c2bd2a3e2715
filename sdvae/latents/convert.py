"""`sdvae convert`: write a finished latent data set in the formats of other trainers. The latents are not scaled."""

from __future__ import annotations

import base64
import io
import json
import logging
import math
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from sdvae.errors import InputError, first_few
from sdvae.io import printable, replacing
from sdvae.latents.folder import LatentFolder, ShardFault
from sdvae.latents.rows import ORIENTATION, OUR_COLUMNS, is_value
from sdvae.latents.summary import is_of_student
from sdvae.model import DiagonalGaussian
from sdvae.noise import sample_seed

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

SIZE_COLUMNS = ("original_size", "crop_top_left", "target_size")
FACTORS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")  # keys of a VAE's config
CAPTION_COLUMNS = ("caption", "text", "txt")  # the first of these that exists becomes KEY.txt
LABEL_COLUMNS = ("label", "cls")  # the first of these that exists becomes KEY.cls
KEY_DIGITS = 15  # enough for a stream, whose part p has rows numbered from p · 2³² on
SCALING_FACTORS = {"sd": 0.18215, "sdxl": 0.13025}  # sd-scripts: train_network.py, library/sdxl_model_util.py
# What sd-scripts looks for in a folder of images: IMAGE_EXTENSIONS in library/train_util.py.
KOHYA_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl")
LONGEST_NAME = 230  # bytes between two slashes: file systems allow 255, and kohya's ending has up to 24

Shape = tuple[int, int, int]  # C, h, w


def export_latents(
    folder: str | Path, target: str | Path, to: Literal["safetensors", "webdataset", "kohya"]
) -> list[Path]:
    """Write a data set of `sdvae encode` in another format. At most one shard is in memory at a time.

    Args:
        folder: the folder of a finished data set.
        target: a new or empty folder. It is written under a temporary name, then renamed.
        to: one of
            - «safetensors»: a file for each shard and latent shape, with the stored tensors (N, C, h, w) under their
              columns' names, `index` (N,) int64, `original_size`, `crop_top_left` and `target_size` (N, 2) int32, and
              integer columns of the source (N,) int64. All other values (names, captions, columns with missing
              numbers) are in a .jsonl file of the same name, a line for each row. stats.json has the statistics, the
              VAE's factors, and the scaling: shift and scale of each channel, and the patches that they are for.
            - «webdataset»: a .tar for each shard. Each row has KEY.mean.npy and so on (fp32 if bf16 is stored) and
              KEY.json with all other values; KEY.txt if there are captions, and KEY.cls if every row has a label.
            - «kohya»: the files that kohya-ss/sd-scripts writes with --cache_latents_to_disk, to be copied into the
              folder of the images. sd-scripts chooses image sizes itself and does not compare them, so encode with
              --buckets none, and train with the same resolution and without buckets. It ignores EXIF's orientation,
              but these latents are those of upright images.

    Returns:
        The files; for kohya, which has one for each image, only the target folder.

    Raises:
        InputError: when the data set is not finished or is damaged; when the target is not empty; or, for kohya, when
            the latents do not have 4 channels at 1/8 of the size, a name is not UTF-8 or not a path below the target,
            or the names of two images differ only in the extension. Nothing is written then.
        OSError: when writing fails. No partial target remains.
    """
    if to not in _WRITERS:
        raise InputError(f"got format {to!r}; need one of {', '.join(_WRITERS)}")
    source = _Source(folder)
    target = Path(target).expanduser().resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"got {target}, which is not empty; need a new or empty folder; choose another")
    source.check()
    if to == "kohya":
        _check_kohya(source)
    if source.scaling.patch_size != (1, 1):
        logger.warning(
            "the latents are written as the encoder gives them; a diffusion model takes %s, whose numbers are under "
            "«scaling» in the data set's manifest.json",
            source.scaling.formula,
        )
    with replacing(target) as temporary, tqdm(total=source.num_rows, unit=" rows", disable=None) as bar:
        temporary.mkdir()
        _WRITERS[to](source, temporary, bar)
    return [target] if to == "kohya" else sorted(target.iterdir())


class _Source:
    """The shards of a finished data set, except empty ones.

    Args:
        root: the data set's folder.

    Raises:
        InputError: when there is no finished data set.
    """

    def __init__(self, root: str | Path):
        folder = LatentFolder(root)
        folder.open(finished=True)
        self._folder = folder
        self.dtype = folder.dtype
        self.statistics: dict[str, Any] = folder.manifest["statistics"]
        self.vae: dict[str, Any] = folder.manifest["vae_config"]
        self.scaling = folder.scaling
        self.has_buckets = len(folder.manifest["fingerprint"]["images"]["sizes"]) > 1
        self.num_rows: int = folder.manifest["rows"]
        self.shards = [shard for shard, entry in enumerate(folder.shards) if entry["rows"]]

    def check(self) -> None:
        """Compare the checksums of all files.

        Raises:
            InputError: when a file is missing or damaged.
        """
        sizes = self._folder.sizes()
        for shard in self.shards:
            try:
                self._folder.check(shard, sizes[shard])
            except ShardFault as error:
                where = self._folder.storage.where(self._folder.shard_name(shard))
                raise InputError(f"{where} {error}; run `sdvae encode` as before, with --repair true") from error

    @property
    def names(self) -> dict[str, int]:
        """Name of a file in the target, without extension -> shard.

        The numbers have no gaps, as patterns such as {00000..00018} require.
        """
        count = len(self.shards)
        return {f"train-{number:05d}-of-{count:05d}": shard for number, shard in enumerate(self.shards)}

    @cached_property
    def schema(self) -> pa.Schema:
        with self._folder.parquet(self.shards[0]) as file:
            return file.schema_arrow

    @cached_property
    def values(self) -> list[str]:
        """The columns of latents."""
        return [name for name in self.schema.names if is_value(name)]

    @cached_property
    def carried(self) -> list[str]:
        return [name for name in self.schema.names if name not in (*OUR_COLUMNS, *self.values)]

    def whole_integers(self) -> list[str]:
        """The integer columns of the source that fit int64 and have a number in every row of every shard."""
        import pyarrow as pa

        types = {name: self.schema.field(name).type for name in self.carried}
        names = [name for name, kind in types.items() if pa.types.is_integer(kind) and kind != pa.uint64()]
        for shard in self.shards if names else ():
            names = [name for name in names if self.column(shard, name).null_count == 0]
        return names

    def column(self, shard: int, name: str) -> pa.ChunkedArray:
        with self._folder.parquet(shard) as file:
            return file.read([name]).column(name)

    def rows(self, shard: int) -> Iterator[dict[str, Any]]:
        """The rows of a shard, with latents as tensors (C, h, w) in the stored dtype. Reads one row group at a time."""
        values = self.values
        with self._folder.parquet(shard) as file:
            for group in range(file.num_row_groups):
                for row in file.read_row_group(group).to_pylist():
                    shape = tuple(row.pop("shape"))
                    for name in values:
                        row[name] = torch.frombuffer(bytearray(row[name]), dtype=self.dtype).reshape(shape)
                    yield row


# ---- safetensors ----


@dataclass
class _Stack:
    """Rows of one latent shape: tensors that are filled row by row, and lines of JSON for all other values."""

    tensors: dict[str, Tensor]
    lines: list[str] = field(default_factory=list)

    def append(self, row: dict[str, Any]) -> None:
        for name, tensor in self.tensors.items():
            value = row[name]
            tensor[len(self.lines)] = value if isinstance(value, Tensor) else torch.tensor(value)
        rest = {name: value for name, value in row.items() if name not in self.tensors}
        self.lines.append(_json({"index": row["index"], **rest}) + "\n")


def _write_safetensors(source: _Source, target: Path, bar: tqdm) -> None:
    integers = ["index", *source.whole_integers()]
    for stem, shard in source.names.items():
        counts: Counter[Shape] = Counter(tuple(shape) for shape in source.column(shard, "shape").to_pylist())
        stacks = {
            shape: _Stack(
                {name: torch.empty(count, *shape, dtype=source.dtype) for name in source.values}
                | {name: torch.empty(count, 2, dtype=torch.int32) for name in SIZE_COLUMNS}
                | {name: torch.empty(count, dtype=torch.int64) for name in integers}
            )
            for shape, count in counts.items()
        }
        for row in source.rows(shard):
            stacks[tuple(row[source.values[0]].shape)].append(row)
            bar.update()
        for shape, stack in stacks.items():
            name = f"{stem}-{'x'.join(map(str, shape))}"
            save_file(stack.tensors, target / f"{name}.safetensors", metadata={"format": "pt"})
            (target / f"{name}.jsonl").write_text("".join(stack.lines), encoding="utf-8", newline="\n")
    factors = {name: source.vae.get(name) for name in FACTORS}
    stats = {"statistics": source.statistics, "vae": factors, "scaling": source.scaling.to_json()}
    (target / "stats.json").write_text(json.dumps(stats, indent=1) + "\n", encoding="utf-8")


# ---- webdataset ----


def _write_webdataset(source: _Source, target: Path, bar: tqdm) -> None:
    """Write a .tar for each shard. `datasets` needs a row's members next to each other, and the same for all rows."""
    import pyarrow as pa

    texts = [name for name in source.carried if source.schema.field(name).type in (pa.string(), pa.large_string())]
    caption = next((name for name in CAPTION_COLUMNS if name in texts), None)
    integers = source.whole_integers()
    label = next((name for name in LABEL_COLUMNS if name in integers), None)
    for stem, shard in source.names.items():
        with tarfile.open(target / f"{stem}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for row in source.rows(shard):
                key = f"{row['index']:0{KEY_DIGITS}d}"  # not the name, which may have dots and slashes
                for name in source.values:
                    _add(tar, f"{key}.{name}.npy", _npy(row.pop(name)))
                _add(tar, f"{key}.json", _json(row).encode())
                if caption is not None:
                    _add(tar, f"{key}.txt", (row[caption] or "").encode())
                if label is not None:
                    _add(tar, f"{key}.cls", str(row[label]).encode())
                bar.update()


def _npy(values: Tensor) -> bytes:
    file = io.BytesIO()
    np.save(file, (values.float() if values.dtype == torch.bfloat16 else values).numpy())
    return file.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # without time and user, so that the same rows make the same file
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


# ---- kohya ----


def _check_kohya(source: _Source) -> None:
    if is_of_student(source.vae):
        raise InputError(
            "got latents of a student, which are scaled already, and sd-scripts scales them; need latents of its "
            "teacher; encode with that VAE"
        )
    if (class_name := source.vae.get("_class_name", "AutoencoderKL")) != "AutoencoderKL":
        raise InputError(f"got latents of an {class_name}; sd-scripts needs SD's or SDXL's VAE; choose another format")
    channels, compression = source.vae["latent_channels"], 2 ** (len(source.vae["block_out_channels"]) - 1)
    if (channels, compression) != (4, 8):
        raise InputError(
            f"got {channels} latent channels at 1/{compression} of the image's size; need SD's and SDXL's 4 at 1/8; "
            "choose another format"
        )
    unsafe: list[str] = []
    same: list[str] = []
    unread: list[str] = []
    by_stem: dict[str, str] = {}  # sd-scripts too holds every name in memory
    for shard in source.shards:
        for name in source.column(shard, "name").to_pylist():
            if not _is_below(name):
                unsafe.append(name)
            if not name.lower().endswith(KOHYA_EXTENSIONS):
                unread.append(name)
            stem = _stem(name)
            if stem in by_stem:
                same += [by_stem[stem], name]
            else:
                by_stem[stem] = name
    if unsafe:
        raise InputError(
            f"got {len(unsafe)} of {source.num_rows} images with such names as "
            f"{first_few([_quoted(name) for name in unsafe])}; need relative paths in UTF-8 without .. or backslashes, "
            f"of at most {LONGEST_NAME} bytes a part; rename these and encode again, or choose another format"
        )
    if same:
        raise InputError(
            f"got images whose names differ only in the extension ({first_few([_quoted(name) for name in same], 4)}); "
            "need different names without it, since the cache's files have none; rename these and encode again"
        )
    if unread:
        logger.warning(
            "%d of %d images have names that sd-scripts does not look for, such as %s, so it does not use their "
            "latents; it looks for %s",
            *(len(unread), source.num_rows, printable(unread[0]), ", ".join(KOHYA_EXTENSIONS)),
        )
    _say_orientation(source)


def _say_orientation(source: _Source) -> None:
    """Warn of images that sd-scripts would train on as they lie in the file."""
    if ORIENTATION not in source.schema.names:
        logger.warning(
            "these latents were encoded before the EXIF orientation was stored; if the images are turned by it, "
            "sd-scripts may look for files with width and height exchanged in their names; encode again"
        )
        return
    turned = [number for shard in source.shards for number in source.column(shard, ORIENTATION).to_pylist()]
    count = sum(number > 1 for number in turned)
    if count:
        logger.warning(
            "%d of %d images have an EXIF orientation, which sd-scripts ignores; with these files it trains on them "
            "upright, and without them as they lie in the file",
            *(count, len(turned)),
        )


def _write_kohya(source: _Source, target: Path, bar: tqdm) -> None:
    """Write a file for each image, as sd-scripts does (SdSdxlLatentsCachingStrategy in library/strategy_sd.py)."""
    factor = source.vae.get("scaling_factor")
    model = next((name for name, its in SCALING_FACTORS.items() if math.isclose(factor or 0, its, rel_tol=1e-3)), None)
    if model is None:
        logger.warning(
            "sd-scripts multiplies latents by %s, whatever the VAE; the scaling_factor of this VAE is %s; the files "
            "are named as for SD",
            " or ".join(f"{its} ({name})" for name, its in SCALING_FACTORS.items()),
            factor,
        )
    if source.has_buckets:
        logger.warning("these latents have other buckets than sd-scripts, which does not check sizes")
    ending = f"_{model or 'sd'}.npz"
    suffixes = [name.removeprefix("mean") for name in source.values if name.startswith("mean")]
    suffixes = suffixes or [name.removeprefix("sample") for name in source.values]
    for shard in source.shards:
        for row in source.rows(shard):
            width, height = _kohya_size(row)
            file = target / f"{_stem(row['name'])}_{width:04d}x{height:04d}{ending}"
            file.parent.mkdir(parents=True, exist_ok=True)
            arrays: dict[str, Any] = {
                "latents_flipped" if suffix else "latents": _one_sample(row, suffix).numpy() for suffix in suffixes
            }
            with file.open("xb") as opened:  # fails if two names differ only in case, on a disk that ignores case
                np.savez(
                    opened,
                    original_size=np.array(row["original_size"][::-1]),
                    crop_ltrb=np.array(_crop_ltrb(row["original_size"], row["target_size"])),
                    **arrays,
                )
            bar.update()


def _kohya_size(row: Mapping[str, Any]) -> tuple[int, int]:
    """The width and height in the name of a row's file.

    sd-scripts finds a file either by the size in the image's header, which EXIF's orientation does not change, or by
    its prefix alone; then it takes the size in the name for the image's, and chooses the bucket by it. For square
    latents the bucket is always the same, so the header's size is right in both cases. Other latents fit only the
    bucket of the upright size.
    """
    height, width = row["original_size"]
    target_height, target_width = row["target_size"]
    is_turned = row.get(ORIENTATION, 1) >= 5
    return (height, width) if is_turned and target_height == target_width else (width, height)


def _one_sample(row: Mapping[str, Any], suffix: str) -> Tensor:
    """A sample (C, h, w) in fp32: the stored one, or one drawn with a seed that depends on the row's index.

    Without a stored log-variance it is the mean.
    """
    if f"sample{suffix}" in row:
        return row[f"sample{suffix}"].float()
    if f"logvar{suffix}" not in row:
        return row[f"mean{suffix}"].float()
    moments = torch.cat([row[f"mean{suffix}"], row[f"logvar{suffix}"]])[None].float()
    generator = torch.Generator().manual_seed(sample_seed(0, 0, row["index"], f"kohya{suffix}"))
    return DiagonalGaussian(moments).sample(generator)[0]


def _crop_ltrb(original_size: Sequence[int], target_size: Sequence[int]) -> tuple[float, float, float, float]:
    """Left, top, right and bottom as in sd-scripts (BucketManager.get_crop_ltrb).

    This is not the crop. It is the box that the whole image would have if it were shrunk to fit into the target: for a
    wide image in a square, top is above 0 and left is 0. sd-scripts computes the left of a flipped image as target
    width - right, which is right only for this box.

    Args:
        original_size: (height, width).
        target_size: (height, width).
    """
    height, width = target_size
    aspect = original_size[1] / original_size[0]
    is_narrower = width / height > aspect
    inner_width, inner_height = (height * aspect, height) if is_narrower else (width, width / aspect)
    left, top = (width - inner_width) // 2, (height - inner_height) // 2
    return left, top, left + inner_width, top + inner_height


def _quoted(name: str) -> str:
    return f"'{printable(name)}'"


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _is_below(name: str) -> bool:
    """Whether the name is, on every system, a relative path below a folder that can be spelt only in this way."""
    parts = name.split("/")
    return (
        not any(part in ("", ".", "..") or len(part.encode()) > LONGEST_NAME for part in parts)
        and not any(character in name for character in "\\\0")
        and not PureWindowsPath(name).drive
    )


# ---- all ----


_WRITERS: dict[str, Callable[[_Source, Path, tqdm], None]] = {
    "safetensors": _write_safetensors,
    "webdataset": _write_webdataset,
    "kohya": _write_kohya,
}


def _json(row: Mapping[str, Any]) -> str:
    return json.dumps(_plain(row), allow_nan=False)


def _plain(value: Any) -> Any:
    """Replace what JSON lacks: bytes by base64, NaN and infinity by null, dates by their text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else str(value)
