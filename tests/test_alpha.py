"""Images with alpha: read, cropped, compared as they are seen, trained on, drawn and written."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sdvae import InputError, LatentDataset, load_vae, save_vae
from sdvae.alpha import DARK, LIGHT, as_seen, drawn, random_backgrounds
from sdvae.cli import main, parse_train_config
from sdvae.data import ReadOptions, color_jitter, random_crop, read_image, to_image, to_tensor
from sdvae.errors import Stopped
from sdvae.evaluation.config import EvaluateConfig
from sdvae.evaluation.evaluate import evaluate
from sdvae.metrics.image import image_metrics, psnr
from sdvae.model import DiagonalGaussian
from sdvae.noise import posterior_generators
from sdvae.training import loop
from sdvae.training.build import build_accelerator, starting_vae
from sdvae.training.checkpoint import checkpoints, read_checkpoint
from sdvae.training.objective import Judges
from sdvae.training.players import Players
from sdvae.training.step import TrainStep
from sdvae.training.widen import widened
from tests.conftest import tiny_arguments, tiny_vae
from tests.faults import fault
from tests.test_resume import differences

RGBA = ReadOptions(channels=4)
POINT = DiagonalGaussian.point(torch.zeros(2, 4, 2, 2))


def picture(seed: int, size: tuple[int, int] = (56, 48)) -> Image.Image:
    """A smooth RGBA picture with transparent, half transparent and opaque parts, whose hidden colour is pink."""
    generator = np.random.default_rng(seed)
    colours = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(size, Image.BICUBIC)
    alpha = Image.fromarray(generator.integers(0, 256, (4, 4), dtype=np.uint8)).resize(size, Image.BICUBIC)
    alpha = alpha.point([min(255, max(0, 3 * value - 256)) for value in range(256)])
    values = np.dstack([np.asarray(colours), np.asarray(alpha)])
    values[values[..., 3] == 0, :3] = (255, 0, 200)
    return Image.fromarray(values)


def draw_pictures(folder: Path) -> Path:
    folder.mkdir()
    for i in range(10):
        picture(i).save(folder / f"{i:02}.png")
    picture(3).convert("RGB").save(folder / "opaque.jpg")
    return folder


def images(seed: int = 0) -> Tensor:
    return torch.rand(2, 4, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "tRNS", "RGB", "L", "CMYK"])
def test_every_file_becomes_rgba_and_opaque_where_it_has_no_alpha(tmp_path, mode):
    original = picture(0)
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    if mode == "tRNS":
        values = np.array(original.convert("RGB"))
        values[:10] = (1, 2, 3)
        Image.fromarray(values).save(path, transparency=(1, 2, 3))
        wanted_alpha = np.where((values == (1, 2, 3)).all(-1), 0, 255)
    elif mode == "P":
        original.quantize(64, method=Image.Quantize.FASTOCTREE).save(path)
        wanted_alpha = np.asarray(Image.open(path).convert("RGBA"))[..., 3]
    else:
        original.convert(mode).save(path)
        wanted_alpha = np.asarray(original)[..., 3] if mode in ("RGBA", "LA") else np.full((48, 56), 255)
    read = read_image(path.read_bytes(), RGBA)
    values = np.asarray(read)
    assert read.mode == "RGBA"
    assert np.array_equal(values[..., 3], wanted_alpha)
    with Image.open(path) as file:
        plain = np.asarray(file.convert("RGBA") if file.mode != "CMYK" else file.convert("RGB"))[..., :3]
    visible = values[..., 3] > 0
    assert np.array_equal(values[visible, :3], plain[visible])
    assert not values[~visible, :3].any(), "hidden colours are black"


def test_tensors_and_pictures_are_each_others_inverse():
    image = picture(1)
    tensor = to_tensor(image)
    assert tensor.shape == (4, 48, 56)
    assert to_image(tensor).mode == "RGBA"
    assert to_image(tensor).tobytes() == image.tobytes()


def test_crops_do_not_spread_hidden_colours_and_jitter_leaves_alpha():
    values = np.zeros((64, 64, 4), np.uint8)
    values[..., :3] = (255, 0, 200)  # hidden
    values[16:48, 16:48] = (0, 128, 0, 255)
    crop = to_tensor(random_crop(Image.fromarray(values), 24, np.random.default_rng(0), (1.0, 1.0), flip=0.0))
    visible = crop[3] > -0.9
    assert 100 < visible.sum() < 576
    assert (crop[0][visible] < -0.9).all(), "no pink at the border"
    jittered = color_jitter(crop, 0.5, np.random.default_rng(1))
    assert torch.equal(jittered[3], crop[3])
    grey = color_jitter(crop[:3], 0.5, np.random.default_rng(1))
    assert torch.equal(jittered[:3], grey)


# ---------------------------------------------------------------- comparing


def test_what_is_seen_is_pillows_composite():
    image, background = picture(2), (30, 200, 90)
    wanted = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image).convert("RGB")
    colour = (torch.tensor(background) / 127.5 - 1)[None, :, None, None]
    seen = as_seen(to_tensor(image)[None], colour)
    assert torch.equal(seen[0, 3], to_tensor(image)[3])
    assert np.abs(np.asarray(to_image(seen[0, :3])).astype(int) - np.asarray(wanted).astype(int)).max() <= 1
    for channels in (1, 3):
        x = torch.rand(1, channels, 4, 4)
        assert as_seen(x) is x


def test_a_background_depends_on_the_seed_of_its_image_alone():
    seeds = torch.tensor([5, 2**62, 9])
    all_three = random_backgrounds(torch.zeros(3, 4, 2, 2), seeds)
    assert all_three.shape == (3, 3, 1, 1)
    assert torch.equal(random_backgrounds(torch.zeros(2, 4, 2, 2), seeds[[2, 0]]), all_three[[2, 0]])
    assert len(all_three.unique()) == 9
    assert all_three.abs().max() <= 1


def test_figures_are_those_over_grey_with_alphas_own():
    x, y = images(0), images(1)
    rows = image_metrics(x, y, POINT, None)
    a, b = (((z[:, 3:] + 1) / 2) * z[:, :3] for z in (x, y))
    assert [row["psnr"] for row in rows] == pytest.approx(psnr(a, b).tolist(), rel=1e-5)
    assert [row["psnr_alpha"] for row in rows] == pytest.approx(psnr(x[:, 3:], y[:, 3:]).tolist(), rel=1e-5)
    hidden = torch.cat([y[:, :3], -torch.ones(2, 1, 32, 32)], 1)
    other = torch.cat([-y[:, :3], -torch.ones(2, 1, 32, 32)], 1)
    assert image_metrics(hidden, other, POINT, None)[0]["psnr"] == 100, "hidden colours do not count"


def test_the_board_shows_through_where_a_picture_is_transparent():
    x = torch.cat([torch.ones(1, 3, 32, 32), -torch.ones(1, 1, 32, 32)], 1)
    x[..., :8, 8:16] = 1.0
    board = drawn(x)
    assert board.shape == (1, 3, 32, 32)
    assert (board[0, :, :8, :16] == LIGHT).all(), "a light square, and white"
    assert (board[0, :, :8, 24:] == torch.tensor(DARK)).all()


# ---------------------------------------------------------------- a step

SEEDS = torch.tensor([3, 4])


def step_of(**changes: str) -> TrainStep:
    given = {"model.in_channels": "4", "mixed_precision": "no", "channels_last": "false", **changes}
    config = parse_train_config([f"--{key}={value}" for key, value in given.items()] + SHAPE)
    torch.manual_seed(0)
    accelerator = build_accelerator(config)
    vae, config = starting_vae(config)
    return TrainStep(config, Players(vae, config, accelerator), Judges(), accelerator)


SHAPE = ["--model.block_out_channels=[8,16]", "--model.norm_num_groups=4", "--loss.lpips_weight=0"]
SHAPE += ["--data.resolution=32", "--loss.discriminator.layers=1", "--loss.discriminator.width=8"]


def test_the_loss_is_that_of_what_is_seen_over_each_images_colour():
    step = step_of()
    outcome = step._outcome(0, images(), SEEDS)
    vae = step.players.vae
    with torch.no_grad():
        posterior = vae.encode(images()).latent_dist
        y = vae.decode(posterior.sample(posterior_generators(SEEDS))).sample
    background = random_backgrounds(images(), SEEDS)
    a, b = ((z[:, 3:] + 1) / 2 for z in (images(), y))
    x, y = (torch.cat([o * z[:, :3] + (1 - o) * background, z[:, 3:]], 1) for o, z in ((a, images()), (b, y)))
    torch.testing.assert_close(outcome.nll, (x - y).abs().mean())
    torch.testing.assert_close(outcome.values["alpha"], (x - y)[:, 3].abs().mean())
    torch.testing.assert_close(outcome.real, x)
    torch.testing.assert_close(outcome.fake.detach(), y)


def test_gradients_reach_colours_and_alpha_and_the_discriminator_sees_both():
    step = step_of(**{"loss.discriminator.weight": "0.5", "loss.discriminator.start_step": "0"})
    values, real, fake = step.generator_pass(0, images(), SEEDS)
    gradient = step.players.vae.decoder.conv_out.weight.grad
    assert (gradient.flatten(1).norm(dim=1) > 0).all()
    assert real.shape == fake.shape == (2, 4, 32, 32)
    assert {"alpha", "generator"} <= values.keys()


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("images") / "pictures")


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """An RGB VAE that got alpha."""
    folder = tmp_path_factory.mktemp("wide") / "vae"
    save_vae(widened(tiny_vae(), image_channels=4, latent_channels=6), folder)
    return folder


def recipe(source: Path, output: Path, wide: Path) -> list[str]:
    changes = {"fine_tune__source": str(wide), "loss__equivariance__weight": "0.25", "data__color_jitter": "0.1"}
    changes |= {"loss__discriminator__weight": "0.5", "loss__discriminator__start_step": "1"}
    changes |= {"loss__discriminator__layers": "1", "loss__discriminator__width": "8", "checkpoint__every_steps": "1"}
    changes |= {"steps": "3", "validate_every": "3", "mixed_precision": "no", "data__background": "[0,0,0]"}
    return tiny_arguments(source, output, **changes)


@pytest.mark.slow
def test_a_wide_vae_trains_resumes_exactly_and_serves_every_command(pictures, wide, tmp_path, caplog, capsys):
    loop.train(parse_train_config(recipe(pictures, tmp_path / "whole", wide)))
    assert "data.background is not used" in caplog.text
    with fault("sigterm", 1), pytest.raises(Stopped):
        loop.train(parse_train_config(recipe(pictures, tmp_path / "run", wide)))
    loop.train(parse_train_config(recipe(pictures, tmp_path / "run", wide)))
    ends = [read_checkpoint(checkpoints(tmp_path / name / "checkpoints")[0]).weights for name in ("whole", "run")]
    assert not differences(*ends)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert any("train/alpha" in line for line in lines)
    assert all(np.isfinite(lines[-1][f"validation/{name}"]) for name in ("psnr", "psnr_alpha", "ssim"))
    model = tmp_path / "whole" / "model"
    vae = load_vae(model)
    assert (vae.config.in_channels, vae.config.out_channels, vae.config.latent_channels) == (4, 4, 6)
    assert len(json.loads((model / "latent_rgb_factors.json").read_text())["latent_rgb_factors"][0]) == 3
    grid = np.asarray(Image.open(model / "reconstructions.png").convert("RGB"))
    board = {round((value + 1) * 127.5) for value in (LIGHT, DARK)}
    assert board <= set(np.unique(grid)), "the board is in the picture"

    given = ["reconstruct", str(pictures / "00.png"), "--vae", str(model), "--output", str(tmp_path / "out")]
    assert main(given) == 0
    assert Image.open(tmp_path / "out" / "00.png").mode == "RGBA"
    options = ["--resolution", "32", "--batch_size", "4"]
    output = ["--output", str(tmp_path / "measured")]
    assert main(["evaluate", str(model), "--data", str(pictures), "--lpips", "none", *options, *output]) == 0
    assert "PSNR of alpha, dB" in capsys.readouterr().out
    page = tmp_path / "report.html"
    images = ["--data", str(pictures), "--resolution", "32", "--lpips", "none"]
    assert main(["report", str(model), *images, "--output", str(page)]) == 0
    text = page.read_text()
    measured = json.loads((tmp_path / "measured" / "results.json").read_text())
    (found,) = measured["vaes"]
    shown = {name: float(re.search(f'data-figure="{name}">([0-9.]+)<', text)[1]) for name in ("psnr", "psnr_alpha")}
    for name, value in shown.items():  # evaluate rounds to 8 bits, which makes the alpha of an opaque image exact
        assert value == pytest.approx(found["means"][name]["mean"], abs=0.1), name
    first = Image.open(io.BytesIO(base64.b64decode(re.search(r"data:image/webp;base64,([^\"]+)", text)[1])))
    assert first.mode == "RGB"
    assert board <= set(np.unique(np.asarray(first))), "pictures are drawn over the board"
    encode = ["encode", "--source", str(pictures), "--vae", str(model), "--output", str(tmp_path / "latents")]
    assert main([*encode, *options, "--dtype", "fp32", "--precision", "fp32", "--device", "cpu"]) == 0
    row = LatentDataset(tmp_path / "latents", sample=False, scaling="none")[0]
    x = to_tensor(read_image(pictures / "00.png", RGBA).resize((32, 32), Image.BICUBIC, box=(4, 0, 52, 48)))[None]
    with torch.no_grad():
        torch.testing.assert_close(row["latents"], vae.encode(x).latent_dist.mean[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("command", ["demo", "explore", "distil"])
def test_commands_that_cannot_show_alpha_refuse_it_in_one_line(command, pictures, wide, tmp_path, capsys):
    given = {
        "demo": ["demo", str(wide)],
        "explore": ["explore", "pca", "--vae", str(wide), "--data", str(pictures), "--output", str(tmp_path / "e")],
        "distil": ["distil", str(wide), "--data.source", str(pictures), "--output_dir", str(tmp_path / "run")],
    }[command]
    if command == "distil":
        given += [
            "--data.validation_count=2",
            "--distil.encoder_blocks=[1,1]",
            "--distil.decoder_blocks=[1,1]",
            "--loss.lpips_weight=0",
        ]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert "with (4, 4) image channels; need 1 (grey) or 3 (RGB) in and out" in error
    assert len(error.splitlines()) == 1


def test_an_rgba_vae_is_not_compared_with_one_of_rgb(pictures, wide, tmp_path):
    save_vae(tiny_vae(), tmp_path / "rgb")
    config = EvaluateConfig(vaes=(str(wide), str(tmp_path / "rgb")), data=str(pictures), lpips="none")
    with pytest.raises(InputError, match=r"take images of \[3, 4\] channels"):
        evaluate(config)
