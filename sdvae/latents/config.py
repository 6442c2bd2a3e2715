"""The options of `sdvae encode`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sdvae.errors import InputError


@dataclass(frozen=True)
class EncodeConfig:
    """How a data set of images becomes one of latents."""

    source: str
    """A folder of images (with NAME.txt beside them for captions, and folders for labels), a folder or glob of
    Parquet, Arrow or .tar (webdataset) files, a data set saved by `datasets`, or one on the Hugging Face hub."""
    output: str
    """Folder for the latents. With one that is begun, the same command goes on where it stopped."""
    vae: str | None = None
    """Whatever `sdvae export` takes as SOURCE; by default the small VAE of this package."""
    subfolder: str | None = None
    """Folder inside `vae` that holds the VAE."""
    vae_config: str | None = None
    """A config.json whose keys win over those of `vae`: a single file does not tell its scaling factor."""
    split: str = "train"
    """Of a data set that has several."""
    image_column: str | None = None
    """Of a data set with several columns of images."""
    columns: tuple[str, ...] | None = None
    """Columns to carry through; by default all that the source has besides the image."""
    streaming: bool = False
    """Read a data set as it comes, without a copy on this disk. It is divided by its files then."""
    resolution: int = 256
    """Pixels: the side of the square that is resized and cropped from the centre, or with buckets the side of the
    square whose area they have."""
    buckets: Literal["none", "area", "sdxl"] = "none"
    """Aspect-ratio buckets instead of the square: all sizes of about `resolution`² pixels whose sides are multiples of
    `bucket_step`, or SDXL's list, scaled to `resolution`."""
    bucket_step: int = 64
    """Pixels between the sides of «area» buckets."""
    max_aspect: float = 2.0
    """Longer side over shorter, at most, of «area» buckets."""
    mirror: bool = False
    """Also encode the left-right mirror image. Latents cannot be mirrored themselves."""
    store: Literal["moments", "sample"] = "moments"
    """The posterior's mean and log-variance, from which any number of samples can be drawn; or one sample, drawn here,
    at half the size."""
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Of the stored values."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the encoder. auto: bf16 where the hardware computes in it, else fp32."""
    batch_size: int = 8
    """Images in a forward pass; the last ones of a shard and bucket may be fewer."""
    num_workers: int = 2
    """Threads that read, decode and resize images, in each process."""
    shard_rows: int | None = None
    """Images in a file, which is what an interruption can cost. By default 1/64 of all, within 64 to 4096 and
    128 MiB."""
    background: tuple[int, int, int] = (255, 255, 255)
    """RGB below transparent images."""
    min_side: int | None = None
    """Pixels. Images with a shorter side are skipped; by default half of the resolution."""
    seed: int = 0
    """Of the noise of `store: sample`."""
    device: str | None = None
    """cpu, cuda, cuda:1, …; by default the accelerator of this process's local rank, else the CPU."""
    verify: bool = False
    """Encode nothing. Reread what is there: checksums, counts, finite values, and `verify_rows` rows encoded again."""
    repair: bool = False
    """Verify, then do again what is broken."""
    verify_rows: int = 32
    """Rows that `verify` encodes again and compares."""

    def __post_init__(self) -> None:
        for name in ("resolution", "bucket_step", "batch_size", "num_workers"):
            if getattr(self, name) < 1:
                raise InputError(f"got {name}={getattr(self, name)}; need at least 1")
        for name in ("shard_rows", "min_side"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"got {name}={value}; need at least 1, or leave it out")
        if self.max_aspect < 1:
            raise InputError(f"got max_aspect={self.max_aspect}; need at least 1, longer side over shorter")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"got seed={self.seed}; need a number from 0 to {2**32 - 1}")
        if self.verify_rows < 0:
            raise InputError(f"got verify_rows={self.verify_rows}; need 0 or more")
        if any(not 0 <= value <= 255 for value in self.background):
            raise InputError(f"got background={self.background}; need three numbers from 0 to 255")
