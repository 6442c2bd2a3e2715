"""The VAE inside the package, and `sdvae reconstruct`, which works with it right after the install."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as StockAutoencoderKL
from diffusers import AutoencoderTiny as StockAutoencoderTiny
from PIL import Image

from sdvae import load_vae, save_vae
from sdvae.cli import main
from sdvae.data import center_crop, open_source, read_image, to_tensor
from sdvae.latents.scaling import scaling_of
from sdvae.weights.load import PACKAGED_STUDENT, PACKAGED_VAE


@pytest.fixture
def photo(tmp_path) -> Path:
    """A photograph of 185x130 pixels, sides that are no multiples of 8."""
    source = open_source("skimage")
    names = [source.name(i) for i in range(len(source))]
    image = read_image(source.read(names.index("astronaut")))
    image.resize((256, 256), Image.Resampling.LANCZOS).crop((40, 20, 225, 150)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_the_packaged_vae_is_small_and_its_card_gives_its_figures():
    assert sum(path.stat().st_size for path in PACKAGED_VAE.iterdir()) <= 8_000_000
    vae = load_vae()
    assert vae.config.latent_channels == 4
    assert vae.spatial_compression_ratio == 8
    assert vae.dtype == torch.float32
    assert load_vae(dtype="file").dtype == torch.float16
    card = (PACKAGED_VAE / "README.md").read_text()
    psnr = float(re.search(r"\| psnr \| ([\d.]+) \|", card)[1])
    assert psnr >= 23
    assert f"{vae.config.scaling_factor:.5f}" in card


@pytest.mark.slow
def test_the_packaged_vae_is_diffusers_own_and_its_factor_is_the_latents():
    stock = StockAutoencoderKL.from_pretrained(PACKAGED_VAE, torch_dtype=torch.float32)
    source = open_source("skimage")
    pictures = [center_crop(read_image(source.read(i)), 256) for i in range(len(source))]
    x = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1 for picture in pictures])
    with torch.no_grad():
        z = stock.encode(x).latent_dist.mode() * stock.config.scaling_factor
        y = stock.decode(z / stock.config.scaling_factor).sample.clamp(-1, 1)
    assert 0.7 < float(z.std()) < 1.4, "about one, on photographs that it has never seen"
    psnr = -10 * torch.log10(((x - y) / 2).square().mean((1, 2, 3)))
    assert float(psnr.mean()) > 22


@pytest.mark.slow
def test_the_packaged_student_draws_what_the_packaged_vae_decodes():
    assert sum(path.stat().st_size for path in PACKAGED_STUDENT.iterdir()) <= 2_000_000
    student, vae, source = load_vae(PACKAGED_STUDENT, dtype=torch.float32), load_vae(), open_source("skimage")
    assert isinstance(student, StockAutoencoderTiny), "pipelines take it"
    pictures = [center_crop(read_image(source.read(i)), 256) for i in range(len(source))]
    x = torch.stack([to_tensor(picture) for picture in pictures])
    with torch.no_grad():
        z = vae.encode(x).latent_dist.mode()
        y = vae.decode(z).sample.clamp(-1, 1)
        scaled = scaling_of(vae).scaled(z)
        preview = student.decode(scaled).sample.clamp(-1, 1)
        own = student.encode(x).latents
    psnr = -10 * torch.log10(((y - preview) / 2).square().mean((1, 2, 3)))
    assert float(psnr.mean()) > 28
    assert float((own - scaled).square().mean()) < 0.05


def test_a_photograph_comes_back_in_its_size(photo, tmp_path, capsys):
    assert main(["reconstruct", str(photo), "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    with Image.open(photo) as before, Image.open(tmp_path / "out" / "photo.png") as after:
        assert before.size == after.size == (185, 130)
        a, b = (np.asarray(image, dtype=np.float64) for image in (before, after))
    psnr = 10 * np.log10(255**2 / np.square(a - b).mean())
    assert float(re.search(r"([\d.]+) dB", said)[1]) == pytest.approx(psnr, abs=0.1)
    assert psnr > 20


def test_a_grey_vae_of_ones_own_and_large_images(photo, tmp_path, capsys):
    vae = load_vae()
    save_vae(vae, tmp_path / "own")
    arguments = ["reconstruct", str(photo), "--vae", str(tmp_path / "own"), "--max_side", "64"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    assert Image.open(tmp_path / "out" / "photo.png").size == (64, 45)


def test_bad_input_leaves_nothing_behind(photo, tmp_path, capsys):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "photo.jpg").write_bytes(photo.read_bytes())
    out = str(tmp_path / "out")
    before = photo.read_bytes()
    cases = {
        "broken.jpg: ": [str(photo), str(tmp_path / "broken.jpg"), "--output", out],
        "No such file": [str(tmp_path / "missing.png"), "--output", out],
        "two files would be written to": [str(photo), str(tmp_path / "other" / "photo.jpg"), "--output", out],
        "would be overwritten": [str(photo), "--output", str(tmp_path)],
    }
    for message, arguments in cases.items():
        assert main(["reconstruct", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not Path(out).exists()
    assert photo.read_bytes() == before
