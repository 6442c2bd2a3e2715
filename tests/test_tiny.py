"""The student class against diffusers' AutoencoderTiny with the same weights."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderTiny as StockAutoencoderTiny

from sdvae.errors import InputError
from sdvae.model.tiny import AutoencoderTiny

F8 = {"encoder_block_out_channels": (16,) * 4, "decoder_block_out_channels": (16,) * 4}
CASES = {
    "taesd": {},
    "sd3_and_flux": {"latent_channels": 16},
    "other_block_counts": {**F8, "num_encoder_blocks": (0, 1, 2, 3), "num_decoder_blocks": (2, 0, 1, 1)},
    "encoder_and_decoder_of_other_widths": {**F8, "encoder_block_out_channels": (8,) * 4},
    "silu": {**F8, "act_fn": "silu"},
    "f4_grey": {
        "in_channels": 1,
        "out_channels": 1,
        "num_encoder_blocks": (1, 1, 1),
        "num_decoder_blocks": (1, 1, 1),
        "encoder_block_out_channels": (8,) * 3,
        "decoder_block_out_channels": (8,) * 3,
    },
    "enlarging_by_3": {**F8, "upsampling_scaling_factor": 3},
    "bilinear": {**F8, "upsample_fn": "bilinear"},
}
OF_TAEF2 = {**F8, "num_decoder_blocks": (2, 1, 1, 0), "use_midblock_gn": True}  # not in diffusers' class


def pair(config: dict) -> tuple[AutoencoderTiny, StockAutoencoderTiny]:
    torch.manual_seed(0)
    stock = StockAutoencoderTiny(**config)
    ours = AutoencoderTiny(**config)
    ours.load_state_dict(stock.state_dict(), strict=True)
    return ours, stock


def images_for(model: AutoencoderTiny, height: int = 32, width: int = 48) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, model.config.in_channels, height, width, generator=generator) * 2 - 1


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_diffusers_class_bit_for_bit(name):
    results = []
    for model in pair(CASES[name]):
        images = images_for(model).requires_grad_(True)
        z = model.encode(images).latents
        decoded = model.decode(4 * z).sample  # beyond the bound of 3, where tanh bends
        (decoded.square().mean() + z.sum()).backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        results.append([z, decoded, images.grad, model(images_for(model)).sample, *gradients])
    assert all(torch.equal(ours, stock) for ours, stock in zip(*results, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_config_has_the_keys_and_values_of_diffusers(name):
    ours, stock = pair(CASES[name])
    plain = [{key: value for key, value in dict(m.config).items() if not key.startswith("_")} for m in (ours, stock)]
    assert plain[0] == plain[1]


def test_folder_is_read_by_both_classes(tmp_path):
    ours, stock = pair(CASES["other_block_counts"])
    ours.save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    images = images_for(ours)
    expected = stock.decode(stock.encode(images).latents).sample
    for cls, folder in ((StockAutoencoderTiny, "ours"), (AutoencoderTiny, "stock")):
        model = cls.from_pretrained(tmp_path / folder)
        assert torch.equal(model.decode(model.encode(images).latents).sample, expected)


@pytest.mark.parametrize("name", [*(name for name in CASES if name != "taesd"), "taef2"])
@torch.no_grad()
def test_tiling_gives_the_values_of_the_whole_image(name, monkeypatch):
    monkeypatch.setattr("sdvae.model.tiny.STRIP_ROWS", 5)
    torch.manual_seed(0)
    model = AutoencoderTiny(**(OF_TAEF2 if name == "taef2" else CASES[name])).double()
    images = images_for(model, height=37 * model.spatial_compression_ratio, width=16).double()
    z = model.encode(images).latents
    whole = model.decode(z).sample
    model.enable_tiling()
    torch.testing.assert_close(model.encode(images).latents, z, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.decode(z).sample, whole, rtol=0, atol=1e-12)


def test_strips_are_strips_of_the_fine_levels_alone(monkeypatch):
    monkeypatch.setattr("sdvae.model.tiny.STRIP_ROWS", 5)
    model, _ = pair({**F8, "num_decoder_blocks": (3, 0, 0, 1)})
    model.enable_tiling()
    heights = {"coarse": set(), "fine": set()}
    block, last = model.decoder.layers[2], model.decoder.conv_out
    block.register_forward_hook(lambda _, __, output: heights["coarse"].add(output.shape[2]))
    last.register_forward_hook(lambda _, __, output: heights["fine"].add(output.shape[2]))
    model.decode(torch.zeros(1, 4, 60, 8))
    assert heights["coarse"] == {60}
    assert max(heights["fine"]) < 8 * 60 / 2


@pytest.mark.parametrize("with_norms", [False, True])
@torch.no_grad()
def test_with_norms_each_pixel_depends_on_the_whole_image(with_norms):
    torch.manual_seed(0)
    model = AutoencoderTiny(**{**OF_TAEF2, "use_midblock_gn": with_norms}).double()
    z = torch.randn(1, 4, 64, 4, dtype=torch.float64)
    other = z.clone()
    other[:, :, -1] += 1
    top = [model.decode(latents).sample[:, :, 0] for latents in (z, other)]
    assert torch.equal(*top) != with_norms


def test_the_key_of_the_norms_is_in_the_configuration_only_where_they_are(tmp_path):
    assert "use_midblock_gn" not in AutoencoderTiny(**F8).config
    model = AutoencoderTiny(**OF_TAEF2)
    model.save_pretrained(tmp_path)
    again = AutoencoderTiny.from_pretrained(tmp_path)
    assert again.config.use_midblock_gn
    images = images_for(model)
    assert torch.equal(again(images).sample, model(images).sample)
    _, said = StockAutoencoderTiny.from_pretrained(tmp_path, output_loading_info=True)
    assert all(".pool." in key for key in said["unexpected_keys"])
    assert len(said["unexpected_keys"]) == 4 * (3 + 2)
    with pytest.raises(InputError, match=r"need blocks at the latents' resolution"):
        AutoencoderTiny(**{**OF_TAEF2, "num_decoder_blocks": (0, 1, 1, 1)})


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = AutoencoderTiny(**OF_TAEF2)
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.decode(model.encode(images_for(model)).latents).sample.square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("widths", [(16, 32, 32, 32), (16, 16, 16), ()])
def test_widths_that_diffusers_cannot_compute_are_refused(widths):
    with pytest.raises(InputError, match="one width for all levels"):
        AutoencoderTiny(encoder_block_out_channels=widths)
