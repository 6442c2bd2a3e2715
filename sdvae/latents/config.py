"""The options of `sdvae encode`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Literal

from sdvae.errors import InputError, Ranges, check_ranges
from sdvae.io import is_url

RANGES: Ranges = (
    ("at least 1", lambda x: x >= 1, "resolution bucket_step batch_size num_workers shard_rows min_side max_pixels"),
    ("at least 1, the longer side over the shorter", lambda x: x >= 1, "max_aspect"),
    (f"a number from 0 to {2**32 - 1}", lambda x: 0 <= x < 2**32, "seed"),
    ("0 or more", lambda x: x >= 0, "verify_rows"),
    ("a number from 0 to 1", lambda x: 0 <= x <= 1, "max_bad_fraction"),
    ("three numbers from 0 to 255", lambda x: 0 <= x <= 255, "background"),
)


@dataclass(frozen=True)
class EncodeConfig:
    """The options of encoding a data set of images to latents."""

    source: str
    """A folder of images (with NAME.txt beside them for captions, and folders for labels), a folder or glob of
    Parquet, Arrow or .tar (webdataset) files, the URL of any of these (s3://bucket/photos), a data set saved by
    `datasets`, or one on the Hugging Face hub."""
    output: str
    """Folder for the latents. If it holds unfinished ones, the same command continues them."""
    vae: str | None = None
    """A folder, file or hub id, as `sdvae export` takes for SOURCE, or a folder or hub id of another autoencoder of
    diffusers, such as AutoencoderDC or AutoencoderKLWan; by default the small VAE in this package."""
    subfolder: str | None = None
    """Folder inside `vae` that holds the VAE."""
    vae_config: str | None = None
    """A config.json whose keys replace those of `vae`. A single file does not hold its scaling factor."""
    split: str = "train"
    """The split to encode, of a source that has several. All of a source without splits is «train»."""
    image_column: str | None = None
    """The column to encode, of a data set with several columns of images."""
    columns: tuple[str, ...] | None = None
    """Columns of the source to copy beside the latents; by default all except the image."""
    streaming: bool = False
    """Read archives, tables or a data set of the hub as a stream: without an index, without a copy on this disk, and
    each file becomes a shard. Archives and tables of a bucket are always read so."""
    resolution: int | tuple[int, ...] = 256
    """Pixels. Images are resized and cropped from the centre to a square with this side. With buckets: the side of a
    square of their area. Of several, each becomes a data set in a folder OUTPUT/RESOLUTION, and each image is read and
    decoded only once."""
    buckets: Literal["none", "area", "sdxl"] = "none"
    """Aspect-ratio buckets instead of the square. area: all sizes of about `resolution`² pixels whose sides are
    multiples of `bucket_step`. sdxl: SDXL's list, scaled to `resolution`."""
    bucket_step: int = 64
    """Pixels. The sides of `area` buckets are multiples of it."""
    max_aspect: float = 2.0
    """The largest ratio of the longer to the shorter side of `area` buckets."""
    mirror: bool = False
    """Also encode the left-right mirror image of each image, since mirrored latents do not decode to it."""
    store: Literal["moments", "sample", "mean"] = "moments"
    """moments: mean and log-variance of the posterior, from which any number of samples can be drawn. sample: one
    sample, at half the size. mean: the mean alone, which is all that there is if the VAE is a student; then moments
    means this too."""
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    """The dtype of the stored values."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """The precision of the encoder. auto: bf16 if the hardware computes in it, else fp32."""
    batch_size: int = 8
    """Images in a forward pass. The last pass of a shard and bucket may have fewer."""
    num_workers: int = 2
    """Threads that read, decode and resize images, in each process."""
    part: str | None = None
    """i/n, with i from 0 to n - 1: encode only every n-th shard, beginning with shard i. For n processes that are
    started separately, such as the tasks of a job array. By default processes on one disk divide the shards by file
    locks, and those that a launcher started take RANK/WORLD_SIZE if the output is a URL."""
    shard_rows: int | None = None
    """Images in a file. An interruption loses at most one file for each process. By default 1/64 of all images, within
    64 and 4096, and at most 128 MiB."""
    background: tuple[int, int, int] = (255, 255, 255)
    """RGB, 0 to 255: the colour behind transparent images."""
    color: Literal["srgb", "raw"] = "srgb"
    """srgb: colours are converted to sRGB by the profile in the file. raw: the numbers in the file are taken as they
    are, as latents were made before this option."""
    min_side: int | None = None
    """Pixels. Images with a shorter side are skipped; by default half of the resolution."""
    max_pixels: int | None = None
    """Images with more pixels are skipped without being decoded, which bounds the memory of each thread; by default
    178,956,970."""
    max_bad_fraction: float = 0.01
    """End with an error if more than this fraction of the images was skipped. The others are encoded and kept."""
    seed: int = 0
    """Seed of the noise for `store: sample`."""
    engine: Literal["ray"] | None = None
    """ray: run on a Ray cluster (the extra `ray`): CPUs of all nodes decode, and each GPU, or each node if there is no
    GPU, encodes. `num_workers` is then the number of shards that are decoded at the same time for each encoder, each by
    a process on one CPU. Every node must see the source, the VAE and the output under the same names. By default this
    process, or those of a launcher, do everything."""
    ray_address: str | None = None
    """The cluster for `engine: ray`: auto, HOST:PORT or ray://HOST:PORT. By default that of RAY_ADDRESS, else one that
    runs on this machine, else a new one for this command alone."""
    device: str | None = None
    """cpu, cuda, cuda:1, … By default the accelerator of this process's local rank, else the CPU."""
    verify: bool = False
    """Check existing latents instead of encoding: checksums, counts and finite values, and `verify_rows` rows by
    encoding them again."""
    repair: bool = False
    """Verify, then encode broken files again."""
    verify_rows: int = 32
    """Rows that `verify` encodes again and compares."""

    def __post_init__(self) -> None:
        check_ranges(self, RANGES)
        if isinstance(self.resolution, tuple) and len(set(self.resolution)) < max(len(self.resolution), 1):
            raise InputError(f"got resolution={list(self.resolution)}; need one or several, each of them once")
        _ = self.part_numbers
        if self.engine is None:
            if self.ray_address is not None:
                raise InputError(f"got ray_address={self.ray_address} without an engine; add --engine ray")
            return
        if self.part is not None:
            raise InputError(f"got part={self.part} with engine={self.engine}, which divides the work; leave out part")
        if self.verify or self.repair:
            raise InputError(f"got verify or repair with engine={self.engine}; need one process; leave out the engine")
        if self.device not in (None, "cpu", "cuda"):
            raise InputError(
                f"got device={self.device} with engine={self.engine}, which assigns GPUs; need cpu or cuda"
            )
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError(f"got engine={self.engine} in several processes; start it once, without a launcher")

    @property
    def outputs(self) -> dict[int, str]:
        """Resolution -> folder or URL of its latents."""
        if isinstance(self.resolution, int):
            return {self.resolution: self.output}
        return {resolution: f"{self.output.rstrip('/')}/{resolution}" for resolution in self.resolution}

    @property
    def part_numbers(self) -> tuple[int, int] | None:
        """(i, n): encode shards i, i + n, i + 2 n, …; None if processes divide the shards by locks.

        Under an engine it is (0, 1): any process may be given any shard.

        Raises:
            InputError: when `part` is no part.
        """
        if self.engine is not None:
            return 0, 1
        if self.part is None:
            world_size = int(os.environ.get("WORLD_SIZE", "1"))
            return (int(os.environ["RANK"]), world_size) if is_url(self.output) and world_size > 1 else None
        found = re.fullmatch(r"(\d+)/(\d+)", self.part)
        if found is None or int(found[1]) >= int(found[2]):
            raise InputError(f"got part={self.part}; need i/n, with i from 0 to n - 1, such as 0/8")
        return int(found[1]), int(found[2])
