"""scripts/latent_diffusion.py at a very small size, from photographs to a pipeline's pictures."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as StockAutoencoderKL
from diffusers import DDIMScheduler, DiTPipeline, UNet2DModel
from PIL import Image

from scripts.latent_diffusion import (
    CLASSES,
    SIDE,
    batches,
    cut_crops,
    decoded_crops,
    draw,
    grid,
    main,
    strips,
    watch,
)
from sdvae import AutoencoderKL, InputError, load_vae, save_vae
from sdvae.data import to_image
from sdvae.diffusion.denoiser import NO_CLASS, denoising_loss, new_denoiser, new_scheduler, train
from sdvae.latents.config import EncodeConfig
from sdvae.latents.dataset import LatentDataset
from sdvae.latents.encode import encode

WIDTHS = (8, 16)


@pytest.fixture(scope="module")
def crops(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "crops"
    cut_crops(folder, count=2)
    return folder


@pytest.fixture(scope="module")
def latents(crops) -> Path:
    folder = crops.parent / "latents"
    encode(EncodeConfig(source=str(crops), output=str(folder), resolution=SIDE, mirror=True))
    return folder


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return load_vae()


@pytest.fixture
def denoiser() -> UNet2DModel:
    torch.manual_seed(0)
    return new_denoiser(4, SIDE // 8, WIDTHS, classes=True)


def pipeline(denoiser: UNet2DModel, vae: AutoencoderKL) -> DiTPipeline:
    pipe = DiTPipeline(transformer=denoiser.eval(), vae=vae, scheduler=new_scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_crops_are_the_same_every_time_and_differ_from_each_other(crops, tmp_path):
    cut_crops(tmp_path / "again", count=2)
    files = sorted(path.relative_to(crops) for path in crops.rglob("*.png"))
    assert len(files) == 2 * len(CLASSES)
    assert all((crops / file).read_bytes() == (tmp_path / "again" / file).read_bytes() for file in files)
    assert len({(crops / file).read_bytes() for file in files}) == len(files)
    assert all(Image.open(crops / file).size == (SIDE, SIDE) for file in files)


def test_labels_number_the_classes_as_the_script_does(latents):
    dataset = LatentDataset(latents)
    seen = {(Path(row["name"]).parent.name, row["label"]) for row in map(dataset.__getitem__, range(len(dataset)))}
    assert seen == {(name, label) for label, name in enumerate(CLASSES)}


def test_training_moves_the_weights_and_the_loss_stays_finite(latents, denoiser):
    before = copy.deepcopy(denoiser.state_dict())
    dataset = LatentDataset(latents)
    losses = list(train(denoiser, new_scheduler(), batches(dataset, batch_size=8), steps=3))
    assert len(losses) == 3, "more than an epoch has batches for"
    assert np.isfinite(losses).all()
    still = [name for name, weight in denoiser.state_dict().items() if torch.equal(weight, before[name])]
    assert still == []


def test_labels_are_dropped_so_that_guidance_has_its_other_half(denoiser):
    z, labels = torch.randn(64, 4, 16, 16), torch.zeros(64, dtype=torch.int64)
    denoising_loss(denoiser, new_scheduler(), z, labels).backward()
    gradient = denoiser.class_embedding.weight.grad.abs().sum(dim=1)
    assert set(gradient.nonzero().flatten().tolist()) == {0, NO_CLASS}
    assert labels.eq(0).all(), "the caller's labels stay"


def test_a_denoiser_that_knows_the_latents_gets_no_loss(latents, denoiser):
    z = LatentDataset(latents, sample=False, mirror=0.0)[0]["latents"][None]
    denoiser.forward = oracle(z, new_scheduler())
    assert float(denoising_loss(denoiser, new_scheduler(), z, torch.zeros(1, dtype=torch.int64))) < 1e-6


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_a_denoiser_that_knows_a_crop_draws_it(latents, crops, denoiser, vae, guidance):
    """From photograph to picture every scale must be right: the data set's, the scheduler's and the pipeline's."""
    dataset = LatentDataset(latents, sample=False, mirror=0.0)
    rows = [dataset[i] for i in range(0, len(dataset), 2)]
    z = torch.stack([row["latents"] for row in rows])
    denoiser.forward = oracle(z, new_scheduler())
    generator = torch.Generator().manual_seed(0)
    labels = [row["label"] for row in rows]
    pictures = pipeline(denoiser, vae)(
        labels, guidance_scale=guidance, num_inference_steps=3, generator=generator, output_type="pt"
    ).images
    with torch.inference_mode():
        decoded = vae.decode(dataset.scaling.denormalize(z)).sample / 2 + 0.5
    torch.testing.assert_close(pictures, decoded.clamp(0, 1), atol=1e-3, rtol=0)
    for picture, row in zip(pictures, rows, strict=True):
        crop = torch.from_numpy(np.array(Image.open(crops / row["name"]))).permute(2, 0, 1) / 255
        psnr = -10 * torch.log10((picture - crop).square().mean())
        assert psnr > 18, f"{row['name']}: {psnr:.1f} dB"


def oracle(z: torch.Tensor, scheduler: DDIMScheduler):
    """The v of z_t = sqrt(ᾱ) z + sqrt(1 - ᾱ) ε that leads to z, whatever ε is."""

    def forward(z_t, timestep, class_labels):
        alpha = scheduler.alphas_cumprod[timestep].reshape(-1, 1, 1, 1)
        known = z.repeat(len(z_t) // len(z), 1, 1, 1)
        v = (alpha.sqrt() * z_t - known) / (1 - alpha).sqrt()
        return type("Output", (), {"sample": v})

    return forward


@pytest.mark.parametrize("sampling_steps", [2, 13])
def test_what_the_model_expects_is_shown_at_every_step_from_the_first(latents, denoiser, vae, sampling_steps):
    """A denoiser that knows the latents expects them from the first step on; the pictures are the VAE's own."""
    dataset = LatentDataset(latents, sample=False, mirror=0.0)
    z = torch.stack([dataset[i]["latents"] for i in range(0, len(dataset), 2)])
    denoiser.forward = oracle(z, new_scheduler())
    pipe = pipeline(denoiser, vae)
    scheduler = pipe.scheduler
    shown = watch(pipe, vae, sampling_steps=sampling_steps, seed=0)
    assert list(shown) == list(range(0, sampling_steps, max(1, (sampling_steps - 1) // 5)))
    assert pipe.scheduler is scheduler
    with torch.inference_mode():
        wanted = [np.array(to_image(x), dtype=int) for x in vae.decode(dataset.scaling.denormalize(z)).sample]
    for pictures in shown.values():
        assert all(np.abs(np.array(picture) - x).max() <= 1 for picture, x in zip(pictures, wanted, strict=True))
    assert strips(shown).width >= len(shown) * SIDE


def test_the_crops_of_the_grid_are_those_of_their_class(latents, crops, vae):
    rows = decoded_crops(LatentDataset(latents, sample=False, mirror=0.0), vae, count=2)
    for name, pictures in zip(CLASSES, rows, strict=True):
        originals = [np.array(Image.open(file), dtype=float) for file in sorted((crops / name).iterdir())]
        errors = [[np.abs(np.array(picture) - original).mean() for original in originals] for picture in pictures]
        assert all(min(of_picture) < 25 for of_picture in errors), "grey levels"


def test_the_grid_has_a_row_for_each_class_and_a_tile_for_each_picture():
    red, blue = (to_image(torch.tensor(c)[:, None, None].expand(3, SIDE, SIDE)) for c in ((1.0, -1, -1), (-1.0, -1, 1)))
    picture = np.array(grid([[red] * 2] * 3, [[blue] * 4] * 3))
    assert (picture == (255, 0, 0)).all(-1).sum() == 2 * 3 * SIDE**2
    assert (picture == (0, 0, 255)).all(-1).sum() == 4 * 3 * SIDE**2


def test_the_saved_pipeline_draws_the_same_with_diffusers_own_classes(denoiser, vae, tmp_path):
    pipe = pipeline(denoiser, vae)
    settings = {"sampling_steps": 2, "seed": 0}
    ours = draw(pipe, 1, **settings)
    pipe.vae = vae.to_diffusers()
    pipe.save_pretrained(tmp_path)
    again = DiTPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again.vae) is StockAutoencoderKL
    for (a,), (b,) in zip(ours, draw(again, 1, **settings), strict=True):
        np.testing.assert_allclose(np.array(a, dtype=int), np.array(b, dtype=int), atol=1)


@pytest.mark.slow
def test_the_script_leaves_a_grid_and_a_pipeline(tmp_path, capsys):
    output = tmp_path / "run"
    small = ["--crops", "1", "--steps", "2", "--batch_size", "2", "--widths", "8", "16", "--sampling_steps", "2"]
    main(["--output", str(output), *small])
    said = capsys.readouterr().out
    assert "6 latents of (4, 16, 16)" in said
    for name in ("samples.png", "previews.png"):
        with Image.open(output / name) as picture:
            assert np.array(picture).std() > 10
    assert (output / "pipeline" / "model_index.json").is_file()


def test_a_vae_that_the_pipeline_would_not_unshift_is_refused(tmp_path):
    vae = load_vae()
    vae.register_to_config(shift_factor=0.1)
    save_vae(vae, tmp_path / "shifted")
    with pytest.raises(InputError, match="shift"):
        main(["--vae", str(tmp_path / "shifted"), "--output", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
