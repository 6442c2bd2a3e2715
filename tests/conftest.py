"""Fixtures and small inputs that several test modules use."""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torchvision
from accelerate.state import AcceleratorState
from PIL import Image

from sdvae import AutoencoderKL
from sdvae.weights import save_vae
from tests.browser import browser_page  # noqa: F401 - a fixture
from tests.latents_tools import tiny_vae as vae_for_latents
from tests.s3 import s3_server

# Tests run in two processes on two cores, and some compare results bit by bit with a process of one thread.
torch.set_num_threads(1)


DIGITS_SIDE = 18  # pixels: with three levels, padded to 20


@pytest.fixture(autouse=True, scope="module")
def own_precision() -> None:
    """accelerate keeps the precision of a process's first Accelerator for all later ones; each file starts anew."""
    AcceleratorState._reset_state()


@pytest.fixture(scope="module")
def server():
    """An S3 server with an empty bucket s3://bucket."""
    with s3_server() as running:
        yield running


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    """The folder of a tiny VAE that encodes quickly."""
    folder = tmp_path_factory.mktemp("vae") / "vae"
    save_vae(vae_for_latents(), folder)
    return folder


@pytest.fixture(scope="module")
def trunk(tmp_path_factory) -> Path:
    """A file with the random trunk of an LPIPS, since nothing is downloaded in tests."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("trunk") / "squeeze.pth"
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), file)
    return file


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """scikit-learn's 1,797 digits as MNIST comes: a parquet file of PNGs and labels, 18 x 18 pixels."""
    from sklearn.datasets import load_digits  # which takes a second, and one fixture needs it

    found = load_digits()
    rows = []
    for values in found.images:
        digit = Image.fromarray((values * 255 / 16).astype(np.uint8))
        picture = digit.resize((DIGITS_SIDE, DIGITS_SIDE), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": None})
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(i) for i in range(10)])}
    )
    path = tmp_path_factory.mktemp("digits") / "digits.parquet"
    datasets.Dataset.from_dict({"image": rows, "label": found.target.tolist()}, features=features).to_parquet(path)
    return path


@pytest.fixture
def own_datasets_cache(tmp_path_factory, monkeypatch) -> None:
    """`datasets` keeps its copies in a folder of the test, and asks no hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets-cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A folder of ten small pictures."""
    return draw_photographs(tmp_path / "photographs")


def draw_photographs(folder: Path) -> Path:
    """Write ten small, smooth pictures, all different."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(10):
        coarse = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize((56, 48), Image.Resampling.BICUBIC).save(folder / f"{i:02}.png")
    return folder


TINY = {
    "steps": "4",
    "batch_size": "2",
    "log_every": "2",
    "validate_every": "2",
    "scale_images": "8",
    "grid_images": "2",
    "model.block_out_channels": "[8, 8, 16, 16]",
    "model.layers_per_block": "1",
    "model.norm_num_groups": "4",
    "data.resolution": "32",
    "data.min_side": "16",
    "data.validation_count": "3",
    "data.num_workers": "0",
    "loss.lpips_weight": "0",
    "mixed_precision": "no",  # "auto" depends on the machine
    "trackers": "[]",
}


def tiny_arguments(source: Path, output: Path, **changes: str) -> list[str]:
    """Command-line overrides for a run of a few seconds; `__` in a changed key stands for a dot."""
    settings = {**TINY, "data.source": str(source), "output_dir": str(output)}
    settings.update({key.replace("__", "."): value for key, value in changes.items()})
    return [f"--{key}={value}" for key, value in settings.items()]


def tiny_vae(**changes) -> AutoencoderKL:
    """A VAE of two levels (f2), with the same random weights in each call."""
    torch.manual_seed(0)
    shape = {"block_out_channels": (8, 16), "norm_num_groups": 4, **changes}
    levels = len(shape["block_out_channels"])
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    return AutoencoderKL(**kinds, **shape)
