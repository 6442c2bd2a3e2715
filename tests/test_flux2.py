"""AutoencoderKLFlux2: against diffusers' class and pipelines, in files, and its batch norm as a scaling of latents."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLFlux2 as StockAutoencoderKLFlux2
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdvae import (
    AutoencoderKLFlux2,
    InputError,
    LatentDataset,
    Previews,
    load_vae,
    save_ldm,
    save_vae,
    speed_up,
    stream,
)
from sdvae.cli import main, parse_train_config
from sdvae.data import EvaluationImages, evaluation_loader
from sdvae.io import read_json
from sdvae.latents.convert import export_latents
from sdvae.latents.encode import encode
from sdvae.latents.scaling import LatentScaling, scaling_of
from sdvae.model import fp16
from sdvae.model.state import BATCH_NORM, COUNTER
from sdvae.previews import decode_scaled, fit_preview
from sdvae.studio.demo import view
from sdvae.training import loop, save
from sdvae.training.build import build_accelerator
from sdvae.training.checkpoint import checkpoints, read_checkpoint
from sdvae.training.data import open_sources, reading_of
from sdvae.training.distil import Teacher
from sdvae.training.model_card import card_head, loading_text
from sdvae.weights import export_targets
from tests.conftest import tiny_arguments
from tests.faults import Crash, blank, fault
from tests.latents_tools import draw, options, rows_of

LEVELS = 3
SHAPE: dict[str, Any] = {
    "block_out_channels": (8, 8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * LEVELS,
    "up_block_types": ("UpDecoderBlock2D",) * LEVELS,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 32,
}
WIDTHS = "decoder_block_out_channels"
NARROW_DECODER = {WIDTHS: (4, 4, 8)}
BUCKETS = {"buckets": "area", "bucket_step": 8, "max_aspect": 1.7, "mirror": True, "dtype": "fp32"}
CASES = {
    "one width for both": {},
    "a narrow decoder": NARROW_DECODER,
    "a wide decoder without quant convs": {
        "decoder_block_out_channels": (8, 16, 24),
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "batch_norm_eps": 1e-2,
    },
}


def flux2_vae(**changes: Any) -> AutoencoderKLFlux2:
    """Random weights and statistics, the same in each call."""
    torch.manual_seed(0)
    vae = AutoencoderKLFlux2(**{**SHAPE, **changes})
    with torch.no_grad():
        if vae.quant_conv is not None:
            vae.quant_conv.weight.mul_(3)
        channels = vae.bn.num_features
        vae.set_statistics(torch.randn(channels), torch.rand(channels) + 0.5)
        vae.bn.num_batches_tracked.fill_(1234)
    return vae.eval()


def stock_of(vae: AutoencoderKLFlux2) -> Any:
    keys = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    stock = StockAutoencoderKLFlux2(**keys)
    stock.load_state_dict(vae.state_dict(), strict=True)
    return stock.eval()


def images_of(side: int = 32, count: int = 2) -> Tensor:
    return torch.rand(count, 3, side, side + 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def same(a: Any, b: Any) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLFlux2:
    return flux2_vae()


@pytest.fixture(scope="module")
def folder(vae, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("flux2") / "vae"
    save_vae(vae, path)
    return path


# ---------------------------------------------------------------- the network


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_diffusers_to_the_bit(name):
    ours = flux2_vae(**CASES[name])
    stock = stock_of(ours)
    assert isinstance(ours, StockAutoencoderKLFlux2), "pipelines ask for it"

    def passes(model: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        posterior = model.encode(images_of()).latent_dist
        image = model.decode(posterior.sample(torch.Generator().manual_seed(3))).sample
        (image.square().mean() + 1e-3 * posterior.parameters.square().mean()).backward()
        return posterior.parameters, image, {key: weight.grad for key, weight in model.named_parameters()}

    (moments, image, gradients), (want_moments, want_image, want_gradients) = passes(ours), passes(stock)
    assert torch.equal(moments, want_moments)
    assert torch.equal(image, want_image)
    assert gradients.keys() == want_gradients.keys()
    assert all(torch.equal(gradients[key], want_gradients[key]) for key in gradients)


def test_defaults_and_keys_are_diffusers():
    with torch.device("meta"):
        ours, stock = AutoencoderKLFlux2(), StockAutoencoderKLFlux2()

    def public(config: Any) -> dict[str, Any]:
        return {key: value for key, value in config.items() if not key.startswith("_")}

    assert public(ours.config) == public(stock.config)
    shapes = [{key: weight.shape for key, weight in model.state_dict().items()} for model in (ours, stock)]
    assert shapes[0] == shapes[1]


@torch.no_grad()
def test_strips_and_kernels_compute_the_same_with_a_decoder_of_other_widths():
    vae = flux2_vae(**CASES["a wide decoder without quant convs"])
    x = images_of(64, 1)
    want = vae(x)
    vae.enable_tiling(memory_bytes=2_000_000)
    got = vae(x)
    assert torch.allclose(got.sample, want.sample, atol=1e-5)
    assert torch.allclose(got.posterior.mean, want.posterior.mean, atol=1e-5)
    vae.disable_tiling()
    speed_up(vae)
    assert torch.allclose(vae(x).sample, want.sample, atol=1e-4)


@torch.no_grad()
def test_diffusers_own_is_streamed_around_its_weights_and_its_batch_norm():
    stock = stock_of(flux2_vae(**NARROW_DECODER))
    want = stock(images_of()).sample
    vae = stream(stock)
    assert type(vae) is AutoencoderKLFlux2
    assert torch.allclose(vae(images_of()).sample, want, atol=1e-5)
    shared = {name: id(weight) for name, weight in stock.state_dict(keep_vars=True).items()}
    assert {name: id(weight) for name, weight in vae.state_dict(keep_vars=True).items()} == shared


def test_the_fp16_rescaling_keeps_function_and_batch_norm():
    vae = flux2_vae()
    with torch.no_grad():
        vae.decoder.conv_in.weight.mul_(3e5)
    x = images_of()
    before, norm = vae(x).sample, vae.bn.running_var.clone()
    largest = max(fp16.audit(vae, [x]).values())
    fp16.fix(vae, [x])
    assert max(fp16.audit(vae, [x]).values()) < largest / 2
    assert torch.allclose(vae(x).sample, before, atol=1e-3)
    assert torch.equal(vae.bn.running_var, norm)


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="decoder_block_out_channels for 2 levels and block_out_channels for 3"):
        AutoencoderKLFlux2(**SHAPE, decoder_block_out_channels=(8, 8))
    with pytest.raises(InputError, match="norm_num_groups=4 does not divide"):
        AutoencoderKLFlux2(**SHAPE, decoder_block_out_channels=(8, 8, 6))


@pytest.mark.parametrize("widths", [96, ["8", "8", "16"]])
def test_a_config_with_odd_decoder_widths_is_refused(widths, folder, tmp_path):
    config = {**read_json(folder / "config.json"), WIDTHS: widths}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="has decoder_block_out_channels"):
        load_vae(folder, config=tmp_path / "config.json")


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("name", CASES)
def test_diffusers_reads_our_folders_and_we_read_its(name, tmp_path):
    ours = flux2_vae(**CASES[name])
    save_vae(ours, tmp_path / "ours")
    stock = StockAutoencoderKLFlux2.from_pretrained(tmp_path / "ours")
    assert same(stock, ours)
    own = CASES[name].get(WIDTHS)
    assert stock.config.decoder_block_out_channels == (list(own) if own else None)
    stock.save_pretrained(tmp_path / "stock")
    for again in (load_vae(tmp_path / "stock"), AutoencoderKLFlux2.from_pretrained(tmp_path / "stock")):
        assert type(again) is AutoencoderKLFlux2
        assert same(again, ours)
    plain = ours.to_diffusers()
    assert type(plain) is StockAutoencoderKLFlux2
    assert same(plain, ours)


def test_halves_keep_the_counter_an_integer_and_a_pipelines_folder_is_found(vae, tmp_path):
    vae.to_diffusers().to(torch.bfloat16).save_pretrained(tmp_path / "pipe" / "vae", variant="bf16")
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    config = tmp_path / "pipe" / "vae" / "config.json"
    config.write_text(json.dumps({**read_json(config), "force_upcast": True}))  # as in FLUX.2's published config.json
    loaded = load_vae(tmp_path / "pipe", dtype="file")
    assert loaded.dtype == loaded.bn.running_var.dtype == torch.bfloat16
    assert int(loaded.bn.num_batches_tracked) == 1234
    assert "force_upcast" not in loaded.config
    wide = load_vae(tmp_path / "pipe", variant="bf16")
    assert torch.equal(wide.bn.running_var, vae.bn.running_var.bfloat16().float())


# The names of black-forest-labs/flux2, src/flux2/autoencoder.py, for levels of one block. Those of quant convs and of
# the batch norm are the only ones that other LDM files do not have.
def bfl_names() -> set[str]:
    resnet = ["norm1", "conv1", "norm2", "conv2"]
    names = ["encoder.quant_conv", "decoder.post_quant_conv"]
    for part, down, blocks in (("encoder", "down", 1), ("decoder", "up", 2)):
        names += [f"{part}.{layer}" for layer in ("conv_in", "norm_out", "conv_out")]
        names += [f"{part}.mid.{block}.{layer}" for block in ("block_1", "block_2") for layer in resnet]
        names += [f"{part}.mid.attn_1.{layer}" for layer in ("norm", "q", "k", "v", "proj_out")]
        for level in range(LEVELS):
            names += [f"{part}.{down}.{level}.block.{i}.{layer}" for i in range(blocks) for layer in resnet]
    names += [f"encoder.down.{level}.downsample.conv" for level in (0, 1)]
    names += [f"decoder.up.{level}.upsample.conv" for level in (1, 2)]
    names += ["encoder.down.2.block.0.nin_shortcut", "decoder.up.1.block.0.nin_shortcut"]  # 8 -> 16, and 16 -> 8
    return {f"{name}.{kind}" for name in names for kind in ("weight", "bias")} | set(BATCH_NORM)


def test_the_single_file_has_bfls_names_and_comes_back_the_same(vae, tmp_path):
    file = tmp_path / "ae.safetensors"
    save_ldm(vae, file)
    written = load_file(file)
    assert written.keys() == bfl_names()
    assert written["encoder.mid.attn_1.q.weight"].shape == (16, 16, 1, 1)
    assert same(load_vae(file), vae)
    assert load_vae(file).config.sample_size == 32


@pytest.mark.parametrize("changes", [{}, NARROW_DECODER])
def test_a_file_without_our_metadata_tells_its_shape(changes, tmp_path, caplog):
    """As BFL's and ComfyUI's, where the quant convs may also lie at the top and the counter may be missing."""
    vae = flux2_vae(**changes)
    save_ldm(vae, tmp_path / "ours.safetensors", dtype=torch.bfloat16)
    weights = load_file(tmp_path / "ours.safetensors")
    assert weights[COUNTER].dtype == torch.int64
    forms: dict[str, dict[str, Tensor]] = {
        "bfl": weights,
        "top": {key.replace("encoder.quant", "quant").replace("decoder.post", "post"): w for key, w in weights.items()},
        "counted": {**weights, COUNTER: weights[COUNTER].to(torch.bfloat16)},
        "uncounted": {key: weight for key, weight in weights.items() if key != COUNTER},
        "diffusers": {key: weight.contiguous() for key, weight in vae.to_diffusers().bfloat16().state_dict().items()},
        "whole": {"model.diffusion_model.x.weight": torch.zeros(1), **{f"vae.{key}": w for key, w in weights.items()}},
    }
    for name, form in forms.items():
        save_file(form, tmp_path / f"{name}.safetensors")
        with caplog.at_level(logging.WARNING):
            loaded = load_vae(tmp_path / f"{name}.safetensors", config={"norm_num_groups": 4}, dtype="file")
        assert type(loaded) is AutoencoderKLFlux2
        assert torch.equal(loaded.decoder.conv_in.weight, vae.decoder.conv_in.weight.bfloat16())
        assert torch.equal(loaded.bn.running_var, vae.bn.running_var.bfloat16())
        assert loaded.config.sample_size == 1024
        assert loaded.config.patch_size == (2, 2)
        assert loaded.config.decoder_block_out_channels == changes.get("decoder_block_out_channels")
    assert "scaling_factor" not in caplog.text


def test_a_damaged_batch_norm_is_refused(vae, folder, tmp_path):
    weights = vae.to_diffusers().state_dict()
    bad = {
        "short": ({**weights, "bn.running_mean": torch.zeros(7), "bn.running_var": torch.ones(7)}, "7 channels over"),
        "nan": ({**weights, "bn.running_var": torch.full((16,), float("nan"))}, "NaN or infinite"),
        "half": ({key: w for key, w in weights.items() if key != "bn.running_var"}, r"missing \(bn.running_var"),
    }
    for name, (form, message) in bad.items():
        save_file(form, tmp_path / f"{name}.safetensors")
        with pytest.raises(InputError, match=message):
            load_vae(tmp_path / f"{name}.safetensors", config={"norm_num_groups": 4})
    config = read_json(folder / "config.json")
    (tmp_path / "kl").mkdir()
    plain = {key: value for key, value in config.items() if key not in ("batch_norm_eps", "batch_norm_momentum")}
    del plain["patch_size"], plain["decoder_block_out_channels"]
    (tmp_path / "kl" / "config.json").write_text(json.dumps({**plain, "_class_name": "AutoencoderKL"}))
    (tmp_path / "kl" / "diffusion_pytorch_model.safetensors").write_bytes(
        (folder / "diffusion_pytorch_model.safetensors").read_bytes()
    )
    with pytest.raises(InputError, match=r"unexpected \(bn.num_batches_tracked"):
        load_vae(tmp_path / "kl")


def test_programs_that_can_load_it_are_told():
    sd = {"block_out_channels": (128, 256, 512, 512), "decoder_block_out_channels": (96, 192, 384, 384)}
    with torch.device("meta"):
        narrow = export_targets(AutoencoderKLFlux2(**sd))
        odd = export_targets(AutoencoderKLFlux2(decoder_block_out_channels=(96, 192, 192, 384)))
        other = export_targets(AutoencoderKLFlux2(batch_norm_eps=1e-5))
    assert narrow["comfyui"] is None
    assert "batch norm" in (narrow["a1111"] or "")
    assert "in proportion" in (odd["comfyui"] or "")
    assert "batch_norm_eps" in (other["comfyui"] or "")


# ---------------------------------------------------------------- scaling


def pipelines_latents(model: Any, z: Tensor) -> Tensor:
    """What diffusers' FLUX.2 pipelines make of the encoder's latents, by their own functions."""

    def encode(image: Tensor) -> Any:
        return SimpleNamespace(latents=z)

    own = SimpleNamespace(bn=model.bn, config=model.config, encode=encode)
    pipe = SimpleNamespace(vae=own, _patchify_latents=Flux2Pipeline._patchify_latents)
    return Flux2Pipeline._encode_vae_image(pipe, torch.zeros(1, 3, 8, 8), generator=None)


def test_the_scaling_is_the_pipelines_and_bfls(vae):
    z = 3 * torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    scaling = scaling_of(vae)
    scaled = scaling.normalize(z)
    assert scaled.shape == (2, 16, 3, 4)
    torch.testing.assert_close(scaled, pipelines_latents(vae, z), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(scaled, vae.bn(nn.functional.pixel_unshuffle(z, 2)), atol=1e-6, rtol=1e-6)  # BFL's
    torch.testing.assert_close(scaling.denormalize(scaled), z, atol=1e-6, rtol=1e-6)
    assert torch.equal(Flux2Pipeline._unpatchify_latents(scaled), scaling.scaled(z))
    odd = scaling.scaled(z[:, :, :5, :7])  # previews and reports take any size
    assert torch.equal(odd, scaling.scaled(z)[:, :, :5, :7])
    torch.testing.assert_close(scaling.unscaled(odd), z[:, :, :5, :7], atol=1e-6, rtol=1e-6)
    with pytest.raises(InputError, match="got latents of 5 x 7"):
        scaling.normalize(z[:, :, :5, :7])
    again = LatentScaling.from_json(json.loads(json.dumps(scaling.to_json())))
    assert torch.equal(again.normalize(z), scaled)


@pytest.fixture(scope="module")
def latents(folder, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("latents")
    draw(root / "photos", 7, sizes=((40, 40), (60, 36)))
    encode(options(root / "photos", root / "out", folder, **BUCKETS))
    return root / "out"


def test_a_latent_data_set_gives_what_a_flux2_pipeline_trains_on(latents, vae):
    rows = list(rows_of(latents).values())
    data = LatentDataset(latents, sample=False, mirror=0)
    for row, stored in zip(data, rows, strict=True):
        want = pipelines_latents(vae, stored["mean"][None])[0]
        assert row["latents"].shape == want.shape
        torch.testing.assert_close(row["latents"], want, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(data.scaling.denormalize(row["latents"]), stored["mean"], atol=1e-5, rtol=1e-5)
    assert len({tuple(row["latents"].shape) for row in data}) == 2, "in both sizes"
    batch = next(iter(LatentDataset(latents).loader(batch_size=2)))
    assert batch["latents"].shape[1] == 16
    for unpatched in ("none", "channels"):
        assert LatentDataset(latents, scaling=unpatched)[0]["latents"].shape[0] == 4
    assert torch.equal(LatentDataset(latents, scaling="none", sample=False, mirror=0)[0]["latents"], rows[0]["mean"])


def test_measured_statistics_are_those_of_all_patches(latents):
    rows = list(rows_of(latents).values())

    def patches(name: str) -> Tensor:
        return torch.cat([nn.functional.pixel_unshuffle(row[name].double(), 2).flatten(1) for row in rows], dim=1)

    means, noise = patches("mean"), patches("logvar").exp().mean(dim=1)
    variance = means.var(dim=1, correction=0) + noise
    statistics = read_json(latents / "manifest.json")["statistics"]
    np.testing.assert_allclose(statistics["patches_mean"], means.mean(dim=1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(statistics["patches_var"], variance, rtol=1e-5)
    plain = torch.cat([row["mean"].double().flatten(1) for row in rows], dim=1)
    np.testing.assert_allclose(statistics["latents_mean"], plain.mean(dim=1), rtol=1e-5, atol=1e-6)
    measured = LatentDataset(latents, scaling="measured").scaling
    torch.testing.assert_close(measured.shift.flatten().double(), means.mean(dim=1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(measured.scale.flatten().double(), (variance + 1e-4).rsqrt(), rtol=1e-5, atol=1e-6)


def test_the_convention_is_said_and_exports_do_not_lose_it(latents, tmp_path, caplog):
    assert "of 16 channels" in (latents / "README.md").read_text()
    with caplog.at_level(logging.WARNING):
        export_latents(latents, tmp_path / "tensors", "safetensors")
    assert "as the encoder gives them" in caplog.text
    stats = read_json(tmp_path / "tensors" / "stats.json")
    scaling = LatentScaling.from_json(stats["scaling"])
    file = next((tmp_path / "tensors").glob("*.safetensors"))
    stored = load_file(file)
    index = int(stored["index"][0])
    want = LatentDataset(latents, sample=False, mirror=0)[index]["latents"]
    assert torch.equal(scaling.normalize(stored["mean"][0]), want)
    with pytest.raises(InputError, match="AutoencoderKLFlux2"):
        export_latents(latents, tmp_path / "kohya", "kohya")


def test_images_that_do_not_fill_patches_are_refused_before_anything_is_encoded(folder, latents, tmp_path):
    with pytest.raises(InputError, match="need multiples of 8"):  # f4, and patches of 2
        encode(options(latents.parent / "photos", tmp_path / "out", folder, resolution=28))


def test_export_writes_what_was_measured_into_the_batch_norm(latents, folder, tmp_path, capsys):
    main(["export", str(folder), str(tmp_path / "measured"), f"--latents={latents}"])
    statistics = read_json(latents / "manifest.json")["statistics"]
    norm = load_vae(tmp_path / "measured").bn
    torch.testing.assert_close(norm.running_mean, torch.tensor(statistics["patches_mean"]))
    torch.testing.assert_close(norm.running_var, torch.tensor(statistics["patches_var"]))
    assert "batch norm of mean" in capsys.readouterr().out
    other = flux2_vae()
    other.encoder.conv_in.weight.data.add_(1)
    save_vae(other, tmp_path / "other")
    assert main(["export", str(tmp_path / "other"), str(tmp_path / "no"), f"--latents={latents}"]) == 2
    assert "made by another encoder" in capsys.readouterr().err


# ---------------------------------------------------------------- pipelines


def klein(vae: Any) -> Flux2KleinPipeline:
    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = Flux2KleinPipeline(scheduler, vae, None, None, transformer, is_distilled=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: Any, **changes: Any) -> Any:
    embeds = torch.randn(1, 3, 12, generator=torch.Generator().manual_seed(0))
    settings = {"height": 32, "width": 48, "num_inference_steps": 2, "output_type": "pt", **changes}
    return pipe(prompt_embeds=embeds, generator=torch.Generator().manual_seed(0), **settings).images


@pytest.mark.parametrize("with_image", [False, True])
def test_a_flux2_pipeline_makes_the_same_images_with_ours(vae, with_image):
    pixels = (images_of(64, 1)[0].permute(1, 2, 0) * 127.5 + 127.5).byte().numpy()
    picture = {"image": Image.fromarray(pixels)} if with_image else {}  # which the encoder and the batch norm see
    ours, stock = call(klein(vae), **picture), call(klein(stock_of(vae)), **picture)
    assert torch.equal(ours, stock)


def test_a_pipelines_folder_takes_ours_and_gives_it_back(vae, tmp_path):
    pipe = klein(vae.to_diffusers())
    pipe.save_pretrained(tmp_path)
    assert type(load_vae(tmp_path)) is AutoencoderKLFlux2
    again = DiffusionPipeline.from_pretrained(tmp_path, vae=load_vae(tmp_path), text_encoder=None, tokenizer=None)
    again.set_progress_bar_config(disable=True)
    assert type(again.vae) is AutoencoderKLFlux2
    assert torch.equal(call(again), call(pipe))


def test_the_last_preview_is_the_pipelines_picture(vae):
    seen = []
    previews = Previews(vae, lambda step, pictures: seen.append(pictures[0]), size=(32, 48))
    image = call(klein(vae), callback_on_step_end=previews, output_type="pil")[0]
    assert len(seen) == 2
    difference = np.abs(np.asarray(seen[-1], np.int16) - np.asarray(image, np.int16))
    assert difference.max() <= 1
    z = torch.randn(1, 4, 8, 12)
    want = decode_scaled(vae, scaling_of(vae).scaled(z))
    torch.testing.assert_close(decode_scaled(vae, scaling_of(vae).normalize(z)), want)
    torch.testing.assert_close(want, vae.decode(z).sample, atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match="got latents of 5 channels for a decoder of 4"):
        decode_scaled(vae, torch.randn(1, 5, 8, 8))


def test_rgb_factors_take_scaled_latents_without_patches(vae, latents, tmp_path):
    preview = fit_preview(vae, str(latents.parent / "photos"), count=3, resolution=32)
    assert preview.map.factors.shape == (4, 3)
    save_vae(vae, tmp_path / "vae")
    written = read_json(preview.write_beside(tmp_path / "vae"))
    assert "batch norm over 2 x 2 patches" in written["input"]
    assert "the patches are undone" in preview.markdown()


# ---------------------------------------------------------------- training

BATCH_NORM_RUN = {
    "model__batch_norm": "true",
    "model__block_out_channels": "[8, 8, 16]",
    "model__decoder_block_out_channels": "[8, 8, 8]",
    "optimizer__ema_decay": "0.5",
    "optimizer__learning_rate": "0.003",
    "checkpoint__every_steps": "1",
    "validate_every": "4",
}


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr(save, "draw", blank)


def patches_by_hand(vae: Any, config: Any) -> tuple[Tensor, Tensor]:
    """Mean and variance of the channels of patches, over samples of the training images' posteriors, in float64."""
    train_source, _ = open_sources(config.data, config.seed)
    images = EvaluationImages(train_source, config.data.evaluation_resolution, reading_of(config))
    loader = evaluation_loader(images, range(len(train_source)), batch_size=1, num_workers=0)
    with torch.no_grad():
        posteriors = [vae.encode(batch["image"]).latent_dist for batch in loader]
    mean, var = (torch.cat([getattr(p, name).double() for p in posteriors]) for name in ("mean", "var"))
    mean, var = (nn.functional.pixel_unshuffle(z, 2).transpose(0, 1).flatten(1) for z in (mean, var))
    return mean.mean(1), mean.var(1, correction=0) + var.mean(1)


def test_training_measures_the_batch_norm_over_the_training_latents(photographs, tmp_path, undrawn):
    arguments = tiny_arguments(photographs, tmp_path / "run", **BATCH_NORM_RUN)
    model = loop.train(parse_train_config(arguments))
    trained = StockAutoencoderKLFlux2.from_pretrained(model).eval()
    assert trained.config.decoder_block_out_channels == [8, 8, 8]
    mean, variance = patches_by_hand(trained, parse_train_config(arguments))
    torch.testing.assert_close(trained.bn.running_mean.double(), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(trained.bn.running_var.double(), variance, rtol=1e-4, atol=1e-5)
    newest = read_checkpoint(checkpoints(tmp_path / "run" / "checkpoints")[0])
    assert torch.equal(newest.weights["ema"]["bn.running_var"], trained.bn.running_var)
    initial = newest.weights["generator"]["vae.bn.running_var"]
    assert torch.equal(initial, torch.ones_like(initial)), "no step changes it"
    card = (model / "README.md").read_text()
    assert "from diffusers import AutoencoderKLFlux2" in card
    assert "statistics are those of the training images" in card


@pytest.mark.slow
def test_an_interrupted_run_gives_the_same_batch_norm(photographs, tmp_path, undrawn):
    settings = {**BATCH_NORM_RUN, "validate_every": "2"}
    whole = loop.train(parse_train_config(tiny_arguments(photographs, tmp_path / "whole", **settings)))
    arguments = tiny_arguments(photographs, tmp_path / "parts", **settings)
    with fault("crash", 3), pytest.raises(Crash):
        loop.train(parse_train_config(arguments))
    parts = loop.train(parse_train_config(arguments))
    assert same(load_vae(parts), load_vae(whole))


def test_fine_tuning_keeps_the_batch_norm_of_a_frozen_encoder_and_measures_it_otherwise(
    folder, vae, photographs, tmp_path, undrawn
):
    def tuned(frozen: bool) -> AutoencoderKLFlux2:
        settings = {"fine_tune__source": str(folder), "fine_tune__freeze_encoder": str(frozen).lower(), "steps": "1"}
        arguments = tiny_arguments(photographs, tmp_path / str(frozen), **settings)
        return load_vae(loop.train(parse_train_config(arguments)))

    frozen = tuned(True)
    for key in BATCH_NORM:
        assert torch.equal(frozen.get_buffer(key), vae.get_buffer(key))
    assert torch.equal(frozen.encoder.conv_in.weight, vae.encoder.conv_in.weight)
    assert not torch.equal(frozen.decoder.conv_out.weight, vae.decoder.conv_out.weight)
    assert "those of the VAE it started from" in (tmp_path / "True" / "model" / "README.md").read_text()
    mean, variance = patches_by_hand(
        free := tuned(False), parse_train_config(tiny_arguments(photographs, tmp_path / "unused"))
    )
    torch.testing.assert_close(free.bn.running_mean.double(), mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(free.bn.running_var.double(), variance, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.decoder_block_out_channels": "[8, 8, 16, 16]"}, "model.batch_norm=true: diffusers' AutoencoderKL"),
        ({"model.batch_norm": "true", "model.decoder_block_out_channels": "[8]"}, "a width for each of the 4 levels"),
        ({"model.batch_norm": "true", "model.num_classes": "3"}, "need one of the two"),
        ({"model.batch_norm": "true", "model.measure_shift": "true"}, "running mean in the place of shift_factor"),
    ],
)
def test_recipes_that_do_not_fit_are_refused(changes, message, photographs, tmp_path):
    with pytest.raises(InputError, match=message):
        parse_train_config(tiny_arguments(photographs, tmp_path / "run", **changes))


def test_a_student_of_it_learns_latents_as_a_diffusion_model_has_them(folder, vae, photographs, tmp_path, undrawn):
    settings = {"distil.encoder_width": "4", "distil.encoder_blocks": "[1, 1, 1]", "distil.decoder_width": "4"}
    settings |= {"distil.decoder_blocks": "[1, 1, 1]", "steps": "1", "validate_every": "1", "grid_images": "1"}
    settings |= {"data.resolution": "32", "data.min_side": "16", "data.validation_count": "2", "batch_size": "2"}
    settings |= {"data.num_workers": "0", "loss.lpips_weight": "0", "mixed_precision": "no"}
    settings |= {"data.source": str(photographs), "output_dir": str(tmp_path / "run")}
    arguments = [f"--distil.teacher={folder}", *(f"--{key}={value}" for key, value in settings.items())]
    config = parse_train_config(arguments)
    student = load_vae(loop.train(config))
    assert student.config.latent_channels == 4
    lesson = Teacher(load_vae(folder), build_accelerator(config)).lesson(images_of())
    z = vae.encode(images_of()).latent_dist.mode()
    want = Flux2Pipeline._unpatchify_latents(pipelines_latents(vae, z))
    torch.testing.assert_close(lesson.mode, want, atol=1e-5, rtol=1e-5)
    seen: list[Any] = []
    call(klein(vae), callback_on_step_end=Previews(student, lambda step, p: seen.append(p[0]), size=(32, 48)))
    assert seen[-1].size == (48, 32)


# ---------------------------------------------------------------- the other commands


@pytest.mark.slow
def test_every_command_takes_it(folder, vae, latents, tmp_path, capsys):
    photos = str(latents.parent / "photos")
    picture = str(sorted((latents.parent / "photos").iterdir())[0])

    def run(*arguments: object) -> None:
        assert main([str(argument) for argument in arguments]) == 0, capsys.readouterr().err

    few = ["--resolution=32", "--count=2"]
    run("reconstruct", picture, f"--vae={folder}", f"--output={tmp_path / 'reconstructed'}")
    run(
        "evaluate", folder, f"--data={photos}", "--resolution=32", "--lpips=none", f"--output={tmp_path / 'evaluation'}"
    )
    run("fp16", "audit", folder, f"--images={photos}", *few)
    run("report", folder, f"--data={photos}", *few, f"--output={tmp_path / 'report.html'}", "--lpips=none")
    assert "a batch norm over patches of 2 × 2 latents" in (tmp_path / "report.html").read_text()
    run("explore", "pca", f"--vae={folder}", f"--data={photos}", *few, f"--output={tmp_path / 'explored'}")
    run("export", folder, tmp_path / "ae.safetensors")
    assert "takes no batch norm over the latents (FLUX.2's)" in capsys.readouterr().out
    encode(options(latents.parent / "photos", latents, folder, **BUCKETS, verify=True))


def test_the_demo_scales_noise_and_files_by_the_batch_norm(folder, vae, tmp_path):
    model = view.Model.load(str(folder))
    assert model.std == pytest.approx(float((vae.bn.running_var + 1e-4).mean().sqrt()), rel=1e-5)
    x = images_of(32, 1)
    view.save_latents(model, view.Encoded(x, model.encode(x), None, 0.0), tmp_path / "z.safetensors")
    with safe_open(tmp_path / "z.safetensors", "pt") as file:
        assert "scaling_factor" not in file.metadata()
        scaling = LatentScaling.from_json(json.loads(file.metadata()["scaling"]))
        z = file.get_tensor("mean")
    torch.testing.assert_close(scaling.normalize(z), pipelines_latents(vae, vae.encode(x).latent_dist.mode()))


def test_a_model_card_names_the_class_and_the_batch_norm(vae):
    assert "each 2x2 positions as one, of 16 channels, normalised by the batch norm `bn`" in card_head(vae, "title")
    assert "AutoencoderKLFlux2.from_pretrained" in loading_text(vae, "me/vae")
