"""Previews of a sampling loop, and latent RGB factors, against numpy and the pipelines' own pictures."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny as StockAutoencoderTiny
from diffusers import FluxPipeline

from sdvae import AutoencoderTiny, InputError, load_vae
from sdvae.cli import main
from sdvae.data import EvaluationImages, ReadOptions, open_source, to_image
from sdvae.latents.scaling import scaling_of
from sdvae.previews import Previews, decode_scaled, fit_preview, read_preview, unpacked
from sdvae.statistics import LatentRGB, RGBFactors, merged
from tests.test_pipelines import SIDE, build, flux, make_vae, noise, sd, sdxl

# ---- latent RGB factors ----


def batch_of(count: int, seed: int, channels: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (B, C, 5, 6), and images (B, 3, 40, 48) that partly depend on them."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count, channels, 5, 6, generator=generator)
    mixed = torch.einsum("bchw,ck->bkhw", z, torch.randn(channels, 3, generator=torch.Generator().manual_seed(9)))
    images = mixed.repeat_interleave(8, 2).repeat_interleave(8, 3)
    return z, 0.2 * images + 0.3 * torch.randn(images.shape, generator=generator) + 0.1


def design(z: torch.Tensor, images: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(N, C + 1) latents with a one, and (N, 3) mean colours of 8 x 8 pixels, position by position."""
    blocks = images.double().numpy().reshape(len(z), 3, z.shape[2], 8, z.shape[3], 8).mean(axis=(3, 5))
    inputs = z.double().numpy().transpose(0, 2, 3, 1).reshape(-1, z.shape[1])
    return np.hstack([inputs, np.ones((len(inputs), 1))]), blocks.transpose(0, 2, 3, 1).reshape(-1, 3)


def test_factors_and_their_fit_are_those_of_numpys_least_squares():
    parts = [batch_of(count, seed) for seed, count in enumerate((3, 1, 4))]
    sums = []
    for part in parts:
        sums.append(LatentRGB(4))
        sums[-1].update(*part)
    found = merged(sums).fit()

    a, b = design(torch.cat([z for z, _ in parts]), torch.cat([images for _, images in parts]))
    wanted, residual, *_ = np.linalg.lstsq(a, b, rcond=None)
    np.testing.assert_allclose(found.factors, wanted[:-1], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.bias, wanted[-1], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.r2, 1 - residual / ((b - b.mean(0)) ** 2).sum(0), rtol=1e-9)
    mse = np.mean(((a @ wanted - b) / 2) ** 2)  # of values in [0, 1]
    assert found.psnr == pytest.approx(-10 * np.log10(mse), rel=1e-9)

    z = parts[0][0]
    np.testing.assert_allclose(
        found.decode(z).permute(0, 2, 3, 1).reshape(-1, 3), (design(*parts[0])[0] @ wanted), rtol=1e-4, atol=1e-5
    )


def test_a_constant_channel_gets_the_least_squares_of_least_norm():
    z, images = batch_of(4, 0)
    z[:, 2] = 0.0
    sums = LatentRGB(4)
    sums.update(z, images)
    found = sums.fit()
    wanted = np.linalg.lstsq(*design(z, images), rcond=None)[0]
    np.testing.assert_allclose(found.factors, wanted[:-1], rtol=1e-6, atol=1e-9)
    assert found.factors[2].abs().max() < 1e-9


@pytest.mark.parametrize("images", [torch.zeros(0, 3, 40, 48), torch.full((2, 3, 40, 48), 0.3)])
def test_images_of_one_colour_have_no_factors(images):
    sums = LatentRGB(4)
    sums.update(noise(len(images), 4, 5, 6), images)
    with pytest.raises(InputError, match="one colour"):
        sums.fit()


def test_export_fits_the_factors_of_scaled_latents_and_writes_them(vae, tmp_path, capsys):
    target = tmp_path / "out"
    options = ["--data", "skimage", "--count", "3", "--resolution", "30"]  # no multiple of 4: padded
    assert main(["export", str(vae), str(target), *options]) == 0
    said = capsys.readouterr().out
    written = json.loads((target / "latent_rgb_factors.json").read_text())
    assert f"{written['psnr']:.1f} dB" in said

    model, source = load_vae(vae), open_source("skimage")
    images = EvaluationImages(source, 30, ReadOptions(channels=3, min_side=1))
    x = torch.nn.functional.pad(torch.stack([images[i]["image"] for i in range(3)]), (0, 2, 0, 2), mode="replicate")
    z = scaling_of(model).normalize(model.encode(x).latent_dist.mode())
    small = torch.nn.functional.avg_pool2d(x, 4)
    a = np.hstack([z.permute(0, 2, 3, 1).reshape(-1, 4).detach().numpy(), np.ones((z[:, 0].numel(), 1))])
    wanted = np.linalg.lstsq(
        a.astype(np.float64), small.permute(0, 2, 3, 1).reshape(-1, 3).double().numpy(), rcond=None
    )[0]
    np.testing.assert_allclose(written["latent_rgb_factors"], wanted[:-1], rtol=1e-2, atol=1e-4)
    np.testing.assert_allclose(written["latent_rgb_factors_bias"], wanted[-1], rtol=1e-2, atol=1e-4)
    assert written["compression_ratio"] == 4
    assert written["scaling_factor"] == model.config.scaling_factor

    # ComfyUI's way to draw them: torch.nn.functional.linear of latents with channels last
    factors, bias = (torch.tensor(written[f"latent_rgb_factors{end}"]) for end in ("", "_bias"))
    drawn = torch.nn.functional.linear(z[0].movedim(0, -1), factors.T, bias)
    ours = read_preview(target / "latent_rgb_factors.json").decode(z)[0].movedim(0, -1)
    torch.testing.assert_close(ours, drawn)

    # a model card in the folder gets the same numbers, once
    (target / "README.md").write_text("# A VAE\n\n## Recipe\n\nlong\n")
    for _ in range(2):
        assert main(["export", str(target), str(target), *options]) == 0
    card = (target / "README.md").read_text()
    assert card.startswith("# A VAE\n\n## Recipe\n\nlong\n")
    assert card.count("## Previews") == 1
    assert f"| bias | {' | '.join(f'{v:.4f}' for v in written['latent_rgb_factors_bias'])} |" in card

    # another VAE in that folder has other factors, so the old ones do not stay
    assert main(["export", str(vae), str(target)]) == 0
    assert not (target / "latent_rgb_factors.json").exists()
    assert main(["export", str(vae), str(tmp_path / "vae.safetensors"), *options]) == 0
    assert (tmp_path / "vae.latent_rgb_factors.json").exists()


def test_nothing_is_written_if_the_factors_cannot_be_fitted(vae, tmp_path, capfd):
    assert main(["export", str(vae), str(tmp_path / "out"), "--data", "skimage", "--count", "0"]) == 2
    assert "need at least one image" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(InputError, match="holds no latent RGB factors"):
        read_preview(tmp_path / "other.json")


# ---- the callback ----


@pytest.mark.parametrize("make", [sd, sdxl, flux])
def test_the_last_preview_is_the_pipelines_picture(make, tmp_path):
    case = make(tmp_path)
    vae = make_vae(case.sixteen_channels)
    if make is sdxl:
        vae.register_to_config(latents_mean=(0.1, -0.2, 0.3, 0.0), latents_std=(1.0, 2.0, 0.5, 1.5))
    pipe, shown = build(case, vae), []
    previews = Previews(vae, lambda step, pictures: shown.append((step, pictures)))
    arguments = {**case.call, "num_inference_steps": 3, "callback_on_step_end": previews}
    result = pipe(**arguments, generator=torch.Generator().manual_seed(0)).images
    assert [step for step, _ in shown] == [0, 1, 2]
    difference = np.array(shown[-1][1][0]).astype(int) - np.array(result[0])
    assert abs(difference).max() <= 1, "but for rounding to 8 bits"
    without = pipe(**case.call, num_inference_steps=3, generator=torch.Generator().manual_seed(0)).images
    assert np.array_equal(np.array(without[0]), np.array(result[0])), "watching changes nothing"


def test_a_student_and_a_linear_map_preview_the_latents_as_the_pipeline_holds_them(tmp_path):
    case = sd(tmp_path)
    pipe, held = build(case, make_vae()), []

    def hold(pipe, step, timestep, tensors):
        held.append(tensors["latents"].clone())
        return tensors

    pipe(**case.call, num_inference_steps=2, callback_on_step_end=hold)
    torch.manual_seed(0)
    student = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 2,
        decoder_block_out_channels=(8,) * 2,
        num_encoder_blocks=(0, 0),
        num_decoder_blocks=(0, 0),
    )
    stock = StockAutoencoderTiny(**{key: value for key, value in student.config.items() if key in TINY_KEYS})
    stock.load_state_dict(student.state_dict())
    (picture,) = Previews(student, print).draw(held[-1])
    assert np.array_equal(np.array(picture), np.array(to_image(stock.decode(held[-1]).sample[0].detach())))

    factors = RGBFactors(noise(4, 3).double(), torch.zeros(3, dtype=torch.float64), torch.ones(3), 30.0)
    (picture,) = Previews(factors, print).draw(held[-1])
    assert picture.size == (SIDE // 2, SIDE // 2)
    wanted = (held[-1][0].movedim(0, -1).double() @ factors.factors).movedim(-1, 0)
    assert np.array_equal(np.array(picture), np.array(to_image(wanted.float())))


TINY_KEYS = ("encoder_block_out_channels", "decoder_block_out_channels", "num_encoder_blocks", "num_decoder_blocks")


def test_packed_latents_are_unpacked_as_flux_does():
    z = noise(2, 16, 12, 8)
    packed = FluxPipeline._pack_latents(z, 2, 16, 12, 8)
    assert torch.equal(unpacked(packed, (96, 64)), z)
    assert torch.equal(unpacked(packed, (96, 64)), FluxPipeline._unpack_latents(packed, 96, 64, 8))
    square = FluxPipeline._pack_latents(z[:, :, :8], 2, 16, 8, 8)
    assert torch.equal(unpacked(square, None), z[:, :, :8])
    with pytest.raises(InputError, match="size="):
        unpacked(packed, None)  # 24 tokens are no square
    with pytest.raises(InputError, match="size="):
        unpacked(packed, (96, 96))


def test_only_every_so_many_steps_are_decoded_and_faults_are_named(tmp_path):
    shown = []
    factors = RGBFactors(noise(4, 3).double(), torch.zeros(3, dtype=torch.float64), torch.ones(3), 30.0)
    previews = Previews(factors, lambda step, pictures: shown.append(step), every=3)
    for step in range(7):
        assert previews(None, step, 0, {"latents": noise(1, 4, 2, 2)}) == {}
    assert shown == [0, 3, 6]
    with pytest.raises(InputError, match="callback_on_step_end_tensor_inputs"):
        previews(None, 0, 0, {})
    with pytest.raises(InputError, match="of 16 channels for a decoder of 4"):
        decode_scaled(factors, noise(1, 16, 2, 2))
    with pytest.raises(InputError, match="need those of images"):
        previews.draw(noise(1, 4, 3, 2, 2))
    with pytest.raises(InputError, match="every=0"):
        Previews(factors, print, every=0)


def test_factors_of_a_student_are_those_of_its_own_latents():
    torch.manual_seed(0)
    student = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(0, 1, 0, 0),
        num_decoder_blocks=(0, 0, 0, 0),
    )
    preview = fit_preview(student, "skimage", 2, 64)
    assert preview.map.factors.shape == (4, 3)
    assert preview.about["images"] == 2
    assert preview.about["scaling_factor"] == 1.0
