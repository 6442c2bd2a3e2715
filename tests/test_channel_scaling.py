"""`latents_mean` and `latents_std`: measured after training or on encoded latents, and read by SDXL's pipelines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL as StockAutoencoderKL
from diffusers import StableDiffusionXLImg2ImgPipeline

from sdvae import InputError, LatentDataset, encode, load_vae, save_vae
from sdvae.cli import main
from sdvae.data import center_crop, read_image, to_tensor
from sdvae.latents.scaling import scaling_of
from sdvae.model import DiagonalGaussian
from sdvae.statistics import LatentMoments
from sdvae.training.build import describing
from sdvae.training.loop import train
from sdvae.training.model_card import card_head
from sdvae.training.recipe import parse_train_config
from tests.conftest import draw_photographs, tiny_arguments, tiny_vae
from tests.latents_tools import draw, options
from tests.latents_tools import tiny_vae as vae_for_latents
from tests.test_pipelines import sdxl

SCALING = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


def keys_of(vae: object) -> list[object]:
    return [vae.config[key] for key in SCALING]  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[Path, Path, Path]:
    """(pictures, latents, folder of a VAE with the scaling by channel that was measured on them)."""
    root = tmp_path_factory.mktemp("by_channel")
    pictures = draw(root / "pictures", 12)
    vae = vae_for_latents()
    vae.register_to_config(shift_factor=0.5)
    save_vae(vae, root / "vae")
    encode(options(pictures, root / "latents", root / "vae", dtype="fp32"))
    command = [
        "export",
        str(root / "vae"),
        str(root / "out"),
        "--latents",
        str(root / "latents"),
        "--by_channel",
        "true",
    ]
    assert main(command) == 0
    return pictures, root / "latents", root / "out"


def test_export_writes_the_measured_statistics_with_a_factor_of_one_and_no_shift(exported):
    _, latents, folder = exported
    statistics = json.loads((latents / "manifest.json").read_text())["statistics"]
    wanted = [1.0, None, statistics["latents_mean"], statistics["latents_std"]]
    assert keys_of(load_vae(folder)) == wanted
    assert keys_of(StockAutoencoderKL.from_pretrained(folder)) == wanted
    assert len(set(statistics["latents_std"])) == 4, "the channels have different scales, or nothing is tested"


@torch.no_grad()
def test_latents_that_sdxl_gives_to_the_unet_have_mean_0_and_std_1_in_each_channel(exported, tmp_path):
    pictures, latents, folder = exported
    case = sdxl(tmp_path)
    vae = StockAutoencoderKL.from_pretrained(folder)
    pipe = StableDiffusionXLImg2ImgPipeline(vae=vae, **case.parts)
    x = torch.stack([to_tensor(center_crop(read_image(file), 32)) for file in sorted(pictures.iterdir())])

    def seen(seed: int) -> torch.Tensor:
        given = {"dtype": torch.float32, "device": torch.device("cpu"), "add_noise": False}
        generator = torch.Generator().manual_seed(seed)
        return pipe.prepare_latents(x, None, len(x), 1, generator=generator, **given)

    z = torch.cat([seen(seed) for seed in range(16)])
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(4), atol=0.02, rtol=0)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4), atol=0.02, rtol=0)
    rows = LatentDataset(latents, scaling="channels", sample=False)
    mine = torch.stack([rows[i]["latents"] for i in range(len(rows))])
    torch.testing.assert_close(mine, scaling_of(load_vae(folder)).normalize(vae.encode(x).latent_dist.mode()))


@torch.no_grad()
def test_sdxl_decodes_what_the_scaling_undoes(exported, tmp_path):
    case = sdxl(tmp_path)
    vae = StockAutoencoderKL.from_pretrained(exported[2])
    pipe = case.pipeline(vae=vae, **case.parts)
    pipe.set_progress_bar_config(disable=True)
    call = {**case.call, "num_inference_steps": 1, "output_type": "latent"}
    z = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    images = pipe(**{**call, "output_type": "pt"}, generator=torch.Generator().manual_seed(0)).images
    unscaled = scaling_of(load_vae(exported[2])).denormalize(z)
    torch.testing.assert_close(images, (vae.decode(unscaled).sample / 2 + 0.5).clamp(0, 1))


def test_a_single_file_keeps_the_scaling_by_channel(exported, tmp_path):
    _, _, folder = exported
    assert main(["export", str(folder), str(tmp_path / "vae.safetensors")]) == 0
    wanted, found = load_vae(folder), load_vae(tmp_path / "vae.safetensors")
    assert keys_of(found) == keys_of(wanted)


def test_a_vae_with_another_number_of_channels_is_said_to_be_beyond_sdxl(tmp_path, capsys):
    pictures = draw(tmp_path / "pictures", 2)
    save_vae(tiny_vae(latent_channels=3), tmp_path / "vae")
    encode(options(pictures, tmp_path / "latents", tmp_path / "vae"))
    command = ["export", str(tmp_path / "vae"), str(tmp_path / "out"), "--latents", str(tmp_path / "latents")]
    assert main([*command, "--by_channel", "true"]) == 0
    assert "take 4 latent channels; this VAE has 3" in capsys.readouterr().out
    assert main([*command[:3], "--by_channel", "true"]) == 2
    assert "add --latents" in capsys.readouterr().err


def test_statistics_give_all_keys_of_a_config_and_refuse_a_channel_that_does_not_vary():
    moments = LatentMoments(2)
    mean = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    moments.update(DiagonalGaussian(torch.cat([mean, torch.full_like(mean, -2.0)], dim=1)))
    flat = mean.double().transpose(0, 1).flatten(1)
    std = (flat.var(1, correction=0) + torch.tensor(-2.0).double().exp()).sqrt()
    found = moments.config_keys(by_channel=True)
    assert set(found) == set(SCALING)
    assert found["latents_mean"] == pytest.approx(flat.mean(1).tolist())
    assert found["latents_std"] == pytest.approx(std.tolist())
    assert (found["scaling_factor"], found["shift_factor"]) == (1.0, None)
    alike = moments.config_keys(with_shift=True)
    assert alike["shift_factor"] == pytest.approx(float(flat.mean()))
    assert (alike["latents_mean"], alike["latents_std"]) == (None, None)
    still = LatentMoments(2)
    mean[:, 1] = 0.25
    still.update(DiagonalGaussian.point(mean))
    with pytest.raises(InputError, match=r"do not vary in channels \[1\]"):
        still.config_keys(by_channel=True)


@pytest.mark.slow
def test_training_writes_them_into_config_and_card(tmp_path):
    source = draw_photographs(tmp_path / "photographs")
    changes = {"model__measure_channels": "true", "steps": "1", "validate_every": "1"}
    vae = load_vae(train(parse_train_config(tiny_arguments(source, tmp_path / "run", **changes))))
    assert vae.config.scaling_factor == 1.0
    assert vae.config.shift_factor is None
    assert len(vae.config.latents_std) == 4
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "`latents_mean` and `latents_std` scale each channel" in " ".join(card.split())


@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_vae_that_has_them_gets_new_ones_when_its_encoder_is_trained_further(is_frozen, tmp_path):
    given = [*tiny_arguments(tmp_path, tmp_path / "run"), "--fine_tune.source=vae"]
    config = parse_train_config([*given, f"--fine_tune.freeze_encoder={str(is_frozen).lower()}"])
    has_them = {"latents_mean": (0.0,) * 4, "latents_std": (1.0,) * 4}
    found = describing(config, tiny_vae(**has_them, shift_factor=0.5, force_upcast=True)).model
    assert (found.measure_channels, found.measure_shift) == ((False, True) if is_frozen else (True, False))
    assert not describing(config, tiny_vae()).model.measure_channels


@pytest.mark.parametrize("key", ["model.measure_shift", "fine_tune.freeze_encoder"])
def test_recipes_that_cannot_write_them_are_refused(key, tmp_path):
    command = [*tiny_arguments(tmp_path, tmp_path / "run"), "--model.measure_channels=true", f"--{key}=true"]
    if key.startswith("fine_tune"):
        command.append("--fine_tune.source=vae")
    with pytest.raises(InputError, match=r"got model\.measure_channels"):
        parse_train_config(command)


def test_a_card_gives_the_factor_of_a_vae_without_them():
    assert "`scaling_factor` 0.18215." in card_head(tiny_vae(), "A VAE")
