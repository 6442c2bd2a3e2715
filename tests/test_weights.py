"""File formats: what goes out comes back bit for bit, and what is damaged is refused in one line."""

from __future__ import annotations

import fnmatch
import json
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL as StockAutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import sdvae.weights.load
from sdvae.cli import main
from sdvae.errors import InputError
from sdvae.model import AutoencoderKL
from sdvae.weights import export_targets, from_ldm, load_vae, save_ldm, save_vae, to_ldm

STEM = "diffusion_pytorch_model"


def settings(widths: tuple[int, ...], attention: tuple[int, ...] = (), **changes: Any) -> dict[str, Any]:
    """Arguments of AutoencoderKL; `attention` names the encoder's levels that have it."""
    down = ["AttnDownEncoderBlock2D" if i in attention else "DownEncoderBlock2D" for i in range(len(widths))]
    up = ["AttnUpDecoderBlock2D" if i in attention else "UpDecoderBlock2D" for i in range(len(widths))][::-1]
    return {
        "block_out_channels": widths,
        "down_block_types": tuple(down),
        "up_block_types": tuple(up),
        "layers_per_block": 2,
        "sample_size": 512,
    } | changes


NO_QUANT: dict[str, Any] = {"use_quant_conv": False, "use_post_quant_conv": False, "force_upcast": False}
CONFIGS = {
    "sd_f8c4": settings((32, 32, 64, 64)),
    "flux_f8c16": settings(
        (32, 32, 64, 64), latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, **NO_QUANT
    ),
    "no_middle_attention": settings((32, 64), mid_block_add_attention=False),
    "f4": settings((32, 64, 64), latent_channels=3, scaling_factor=1.0, shift_factor=0.0),
    "grey": settings((32, 64), in_channels=1, out_channels=1, layers_per_block=1),
    "f16_level_attention": settings(
        (32, 32, 32, 64, 64), attention=(4,), latent_channels=16, scaling_factor=1.0, shift_factor=0.0
    ),
    "uneven_widths": settings((96, 32, 64), attention=(0, 2), layers_per_block=3),
}


def random_vae(config: dict[str, Any], seed: int = 0) -> Any:
    """Every weight random, norms too, so that no two tensors can change places unnoticed."""
    vae = AutoencoderKL(**config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.normal_(0.0, 0.05, generator=generator)
    return vae


@pytest.fixture(scope="module")
def vaes() -> dict[str, Any]:
    return {name: random_vae(config) for name, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def vae() -> Any:
    return random_vae(settings((32, 64)))


def assert_same_weights(one: Any, other: Any) -> None:
    """Two modules or state dicts have the same names, dtypes and bits."""
    a = one if isinstance(one, dict) else one.state_dict()
    b = other if isinstance(other, dict) else other.state_dict()
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype, key
        assert torch.equal(a[key], b[key]), key


def refusal(source: Path | str, **kwargs: Any) -> str:
    """The message of the InputError that `load_vae` must raise: a single line."""
    with pytest.raises(InputError) as caught:
        load_vae(source, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def plain_config(vae: Any) -> dict[str, Any]:
    return {key: value for key, value in vae.config.items() if not key.startswith("_")}


def contiguous(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: weight.contiguous().clone() for key, weight in weights.items()}


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize("name", CONFIGS)
def test_diffusers_folder_round_trip_is_bit_exact(vaes, name, tmp_path):
    save_vae(vaes[name], tmp_path / "ours")
    back = load_vae(tmp_path / "ours")
    assert_same_weights(back, vaes[name])
    assert plain_config(back) == plain_config(vaes[name])
    assert not back.training

    vaes[name].to_diffusers().save_pretrained(tmp_path / "stock")
    assert_same_weights(load_vae(tmp_path / "stock"), vaes[name])
    assert_same_weights(StockAutoencoderKL.from_pretrained(tmp_path / "ours"), vaes[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_ldm_file_round_trip_is_bit_exact_and_configuration_is_inferred(vaes, name, tmp_path):
    save_ldm(vaes[name], tmp_path / "vae.safetensors")
    back = load_vae(tmp_path / "vae.safetensors")
    assert_same_weights(back, vaes[name])
    assert plain_config(back) == plain_config(vaes[name])
    assert not back.training


@pytest.mark.parametrize("name", CONFIGS)
def test_to_ldm_and_from_ldm_are_inverses(vaes, name):
    weights = vaes[name].state_dict()
    ldm = to_ldm(weights)
    assert len(ldm) == len(weights)
    assert_same_weights(from_ldm(ldm), dict(weights))


@pytest.mark.parametrize("name", [name for name in CONFIGS if "Attn" not in str(CONFIGS[name])])
def test_ldm_file_is_what_diffusers_converter_reads(vaes, name, tmp_path):
    # diffusers' converter knows no attention in the levels, so those configurations are left out.
    vae = vaes[name]
    save_ldm(vae, tmp_path / "vae.safetensors")
    save_vae(vae, tmp_path / "config")
    converted = convert_ldm_vae_checkpoint(load_file(tmp_path / "vae.safetensors"), vae.config)
    assert_same_weights(converted, vae)
    stock = StockAutoencoderKL.from_single_file(str(tmp_path / "vae.safetensors"), config=str(tmp_path / "config"))
    assert_same_weights(stock, vae)


def test_reloaded_ldm_file_gives_the_same_images(vaes, tmp_path):
    vae = vaes["sd_f8c4"]
    save_ldm(vae, tmp_path / "vae.safetensors")
    back: Any = load_vae(tmp_path / "vae.safetensors")
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        assert torch.equal(back(images).sample, vae(images).sample)


LDM_RESNET = ("norm1", "conv1", "norm2", "conv2")
LDM_ATTENTION = ("norm", "q", "k", "v", "proj_out")


def test_ldm_names_are_those_of_compvis(tmp_path):
    # Written by hand from CompVis' ldm/modules/diffusionmodules/model.py, for ch 32, ch_mult [1, 2, 2],
    # num_res_blocks 1, attn_resolutions at the lowest level.
    vae = random_vae(settings((32, 64, 64), attention=(2,), layers_per_block=1))
    save_ldm(vae, tmp_path / "vae.safetensors")
    resnets = [
        "encoder.down.0.block.0",  # 32 -> 32
        "encoder.down.1.block.0",  # 32 -> 64
        "encoder.down.2.block.0",
        "encoder.mid.block_1",
        "encoder.mid.block_2",
        "decoder.mid.block_1",
        "decoder.mid.block_2",
        "decoder.up.2.block.0",  # the decoder begins at up.2
        "decoder.up.2.block.1",
        "decoder.up.1.block.0",
        "decoder.up.1.block.1",
        "decoder.up.0.block.0",  # 64 -> 32
        "decoder.up.0.block.1",
    ]
    attentions = [
        "encoder.down.2.attn.0",
        "encoder.mid.attn_1",
        "decoder.mid.attn_1",
        "decoder.up.2.attn.0",
        "decoder.up.2.attn.1",
    ]
    layers = [
        "encoder.conv_in",
        "encoder.down.0.downsample.conv",
        "encoder.down.1.downsample.conv",
        "encoder.down.1.block.0.nin_shortcut",
        "encoder.norm_out",
        "encoder.conv_out",
        "quant_conv",
        "post_quant_conv",
        "decoder.conv_in",
        "decoder.up.2.upsample.conv",
        "decoder.up.1.upsample.conv",
        "decoder.up.0.block.0.nin_shortcut",
        "decoder.norm_out",
        "decoder.conv_out",
        *(f"{place}.{layer}" for place in resnets for layer in LDM_RESNET),
        *(f"{place}.{layer}" for place in attentions for layer in LDM_ATTENTION),
    ]
    written = load_file(tmp_path / "vae.safetensors")
    assert set(written) == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    shapes = {key: tuple(weight.shape) for key, weight in written.items()}
    assert shapes["decoder.up.0.block.0.nin_shortcut.weight"] == (32, 64, 1, 1)
    assert shapes["encoder.mid.attn_1.q.weight"] == (64, 64, 1, 1)
    assert shapes["decoder.up.2.attn.1.proj_out.weight"] == (64, 64, 1, 1)
    assert shapes["encoder.mid.attn_1.norm.weight"] == (64,)


def test_full_size_sd_vae_has_the_248_keys_of_the_published_file():
    with torch.device("meta"):
        vae = AutoencoderKL(**settings((128, 256, 512, 512)))
    ldm = to_ldm(vae.state_dict())
    assert len(ldm) == 248
    assert sum(weight.numel() for weight in ldm.values()) == 83_653_863
    assert "decoder.up.0.block.0.nin_shortcut.weight" in ldm
    assert ldm["decoder.up.1.block.0.nin_shortcut.weight"].shape == (256, 512, 1, 1)


# ---------------------------------------------------------------- the forms in which files are found


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
def test_prefixed_file_loads_beside_other_models(vae, prefix, layout, tmp_path):
    weights = vae.state_dict() if layout == "diffusers" else to_ldm(vae.state_dict())
    content = {prefix + key: weight for key, weight in weights.items()}
    if prefix:
        content["model.diffusion_model.input_blocks.0.0.weight"] = torch.full((2,), float("nan"))
        content["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(4)
    save_file(contiguous(content), tmp_path / "model.safetensors")
    assert_same_weights(load_vae(tmp_path / "model.safetensors"), vae)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_training_checkpoint_loads_without_loss_and_ema(vae, suffix, wrapped, tmp_path):
    content: dict[str, Any] = dict(to_ldm(vae.state_dict()))
    content |= {
        "loss.logvar": torch.tensor(0.0),
        "loss.discriminator.main.0.weight": torch.zeros(4),
        "loss.perceptual_loss.lin0.model.1.weight": torch.zeros(4),
        "model_ema.decay": torch.tensor(0.99),
        "model_ema.num_updates": torch.tensor(7),
    }
    if wrapped:
        content = {"state_dict": content, "global_step": 7, "epoch": 1, "optimizer_states": []}
    else:
        content["global_step"] = 7
    torch.save(content, tmp_path / f"last{suffix}")
    assert_same_weights(load_vae(tmp_path / f"last{suffix}"), vae)


WRAPPED = {
    "ddp": lambda key: f"module.{key}",
    "compiled": lambda key: f"_orig_mod.{key}",
    "compiled_in_ddp": lambda key: f"module._orig_mod.{key}",
    "ddp_compiled": lambda key: f"_orig_mod.module.{key}",
    "parts_compiled": lambda key: key.replace("encoder.", "encoder._orig_mod.").replace(".conv.", "._orig_mod.conv."),
    "blocks_compiled": lambda key: re.sub(r"((up|down)_blocks\.\d+|up\.\d+)\.", r"\1._orig_mod.", key),
    "of_a_pipeline": lambda key: f"module.vae._orig_mod.{key}",
    "of_a_checkpoint": lambda key: f"_orig_mod.first_stage_model.{key}",
}


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_file_of_a_model_that_was_compiled_or_in_ddp_loads(vae, wrapper, layout, suffix, tmp_path):
    weights = vae.state_dict() if layout == "diffusers" else to_ldm(vae.state_dict())
    content = contiguous({WRAPPED[wrapper](key): weight for key, weight in weights.items()})
    assert content.keys() != weights.keys()
    write = save_file if suffix == ".safetensors" else torch.save
    write(content, tmp_path / f"vae{suffix}")
    assert_same_weights(load_vae(tmp_path / f"vae{suffix}"), vae)


def test_state_dict_of_a_compiled_model_loads(tmp_path):
    vae = random_vae(settings((32, 64)))
    vae.decoder = torch.compile(vae.decoder)
    torch.save(torch.compile(vae).state_dict(), tmp_path / "vae.pt")
    assert_same_weights(load_vae(tmp_path / "vae.pt"), random_vae(settings((32, 64))))


@pytest.mark.parametrize("sharded", [False, True])
def test_folder_of_a_compiled_model_loads(vae, sharded, tmp_path):
    vae.save_pretrained(tmp_path)
    (tmp_path / f"{STEM}.safetensors").unlink()
    weights = contiguous(
        {f"decoder._orig_mod.{k[8:]}" if k[:8] == "decoder." else k: w for k, w in vae.state_dict().items()}
    )
    if sharded:
        save_file(weights, tmp_path / f"{STEM}-00001-of-00001.safetensors")
        index = {"weight_map": dict.fromkeys(weights, f"{STEM}-00001-of-00001.safetensors")}
        (tmp_path / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(weights, tmp_path / f"{STEM}.safetensors")
    assert_same_weights(load_vae(tmp_path), vae)


def test_weight_with_and_without_a_wrapper_is_refused(vae, tmp_path):
    weights = dict(vae.state_dict())
    weights["module.encoder.conv_in.bias"] = torch.zeros(32)
    torch.save(weights, tmp_path / "vae.pt")
    assert "2 keys for encoder.conv_in.bias" in refusal(tmp_path / "vae.pt")


@pytest.mark.parametrize("name", ["state_dict", "model", "module", "vae", "ema", "model_ema"])
def test_state_dict_within_a_checkpoint_loads(vae, name, tmp_path):
    weights = {f"module.{key}": weight for key, weight in vae.state_dict().items()}
    other = {"opt": {"state": {0: {"exp_avg": torch.zeros(3)}}}, "step": 7}
    torch.save({name: weights, **other}, tmp_path / "checkpoint.pt")
    assert_same_weights(load_vae(tmp_path / "checkpoint.pt"), vae)


def test_checkpoint_with_two_state_dicts_is_refused(vae, tmp_path):
    weights = dict(vae.state_dict())
    torch.save({"model": weights, "ema": weights}, tmp_path / "checkpoint.pt")
    assert "holds weights under model, ema; need one" in refusal(tmp_path / "checkpoint.pt")
    torch.save({"model": weights, "ema": {"decay": 0.999}}, tmp_path / "checkpoint.pt")
    assert_same_weights(load_vae(tmp_path / "checkpoint.pt"), vae)


@pytest.mark.parametrize("name", ["vae.sft", "VAE.SAFETENSORS", "vae.PT", "Vae.Ckpt"])
def test_endings_of_single_files(vae, name, tmp_path):
    weights = contiguous(to_ldm(vae.state_dict()))
    if name.lower().endswith(("sft", "safetensors")):
        save_file(weights, tmp_path / name)
    else:
        torch.save(weights, tmp_path / name)
    assert_same_weights(load_vae(tmp_path / name), vae)
    assert "there is no file" in refusal(tmp_path / "no" / name)


def test_old_pickle_format_loads(vae, tmp_path):
    torch.save(to_ldm(vae.state_dict()), tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert_same_weights(load_vae(tmp_path / "old.ckpt"), vae)


def test_loaded_pickle_does_not_depend_on_its_file(vae, tmp_path):
    path = tmp_path / "vae.pt"
    torch.save(to_ldm(vae.state_dict()), path)
    back = load_vae(path)
    with path.open("r+b") as file:  # in place: a mapping of the file would see it
        file.write(b"\0" * path.stat().st_size)
    assert_same_weights(back, vae)


DIFFUSERS_LEGACY = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
LDM_LEGACY = {".q.": ".query.", ".k.": ".key.", ".v.": ".value.", ".proj_out.": ".proj_attn."}


def legacy(weights: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    renamed = {}
    for key, weight in weights.items():
        for new, old in names.items():
            key = key.replace(new, old)
        renamed[key] = weight
    assert sum(".query." in key for key in renamed) == 4  # weight and bias, encoder and decoder
    return contiguous(renamed)


@pytest.mark.parametrize("layout", ["diffusers", "ldm"])
def test_legacy_attention_names_load_from_a_single_file(vae, layout, tmp_path):
    weights = dict(vae.state_dict())
    old = legacy(weights, DIFFUSERS_LEGACY) if layout == "diffusers" else legacy(to_ldm(weights), LDM_LEGACY)
    save_file(old, tmp_path / "vae.safetensors")
    assert_same_weights(load_vae(tmp_path / "vae.safetensors"), vae)


@pytest.mark.parametrize("binary", [False, True])
def test_legacy_diffusers_folder_loads(vae, binary, tmp_path):
    save_vae(vae, tmp_path)
    old = legacy(dict(vae.state_dict()), DIFFUSERS_LEGACY)
    (tmp_path / f"{STEM}.safetensors").unlink()
    if binary:
        torch.save(old, tmp_path / f"{STEM}.bin")
    else:
        save_file(old, tmp_path / f"{STEM}.safetensors")
    assert_same_weights(load_vae(tmp_path), vae)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_attention_projections_load_as_linear_or_conv(vae, shape, tmp_path):
    weights = to_ldm(vae.state_dict())
    for key in list(weights):
        if ".attn_1." in key and weights[key].ndim == 4:
            weights[key] = weights[key].reshape(*weights[key].shape[:2], *shape)
    save_file(contiguous(weights), tmp_path / "vae.safetensors")
    assert_same_weights(load_vae(tmp_path / "vae.safetensors"), vae)


def test_one_pixel_convs_outside_attention_keep_their_shape(vae):
    assert from_ldm(to_ldm(vae.state_dict()))["quant_conv.weight"].shape == (8, 8, 1, 1)


def test_sharded_folder_loads(vae, tmp_path):
    vae.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_weights(load_vae(tmp_path), vae)


def test_lone_variant_loads(vae, tmp_path):
    half = random_vae(settings((32, 64))).half()
    half.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / f"{STEM}.fp16.safetensors").is_file()
    assert_same_weights(load_vae(tmp_path, dtype="file"), half)


def test_plain_weights_are_preferred_to_a_variant(vae, tmp_path):
    random_vae(settings((32, 64)), seed=1).save_pretrained(tmp_path, variant="ema")
    vae.save_pretrained(tmp_path)
    assert_same_weights(load_vae(tmp_path), vae)


@pytest.mark.parametrize("with_index", [True, False])
def test_pipeline_folder_gives_its_vae(vae, with_index, tmp_path):
    save_vae(vae, tmp_path / "vae")
    if with_index:
        (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    assert_same_weights(load_vae(tmp_path), vae)
    assert_same_weights(load_vae(tmp_path, subfolder="vae"), vae)


def test_hub_repository_downloads_one_copy_of_the_weights(vae, tmp_path, monkeypatch):
    hub, cache, downloaded = tmp_path / "hub", tmp_path / "cache", []
    save_vae(vae, hub / "vae")
    random_vae(settings((32, 64)), seed=1).save_pretrained(hub / "vae", variant="fp16")
    torch.save(dict(vae.state_dict()), hub / "vae" / f"{STEM}.bin")
    (hub / "model_index.json").write_text("{}")
    (hub / "unet").mkdir()
    (hub / "unet" / f"{STEM}.safetensors").write_bytes(b"of another model")

    def snapshot(repo: str, allow_patterns: list[str]) -> str:
        assert repo == "somebody/model"
        for path in sorted(path for path in hub.rglob("*") if path.is_file()):
            name = path.relative_to(hub).as_posix()
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                downloaded.append(name)
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, cache / name)
        return str(cache)

    monkeypatch.setattr(sdvae.weights.load, "snapshot_download", snapshot)
    assert_same_weights(load_vae("somebody/model"), vae)
    assert downloaded == ["model_index.json", "vae/config.json", f"vae/{STEM}.safetensors"]

    shutil.rmtree(cache)
    for path in (hub / "vae").glob("*.safetensors"):
        path.unlink()
    assert_same_weights(load_vae("somebody/model", subfolder="vae"), vae)
    assert (cache / "vae" / f"{STEM}.bin").is_file()


def test_unreachable_hub_is_one_line(monkeypatch):
    def offline(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("no network\nand no cache")

    monkeypatch.setattr(sdvae.weights.load, "snapshot_download", offline)
    assert "check the name, the network" in refusal("somebody/model")


# ---------------------------------------------------------------- configuration


def test_config_wins_over_what_is_inferred(vae, tmp_path):
    save_ldm(vae, tmp_path / "vae.safetensors")
    back = load_vae(tmp_path / "vae.safetensors", config={"scaling_factor": 0.13025, "force_upcast": False})
    assert (back.config["scaling_factor"], back.config["force_upcast"]) == (0.13025, False)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", "shift_factor": 0.5}))
    assert load_vae(tmp_path / "vae.safetensors", config=tmp_path / "config.json").config["shift_factor"] == 0.5


def test_config_wins_over_the_folder(vae, tmp_path):
    save_vae(vae, tmp_path)
    back = load_vae(tmp_path, config={"scaling_factor": 0.5})
    assert back.config["scaling_factor"] == 0.5
    assert_same_weights(back, vae)


def test_assumed_factors_are_warned_of(vaes, tmp_path, caplog):
    for name, said in (
        ("sd_f8c4", "for SDXL's give {'scaling_factor': 0.13025} as config="),
        ("flux_f8c16", "for SD3's give {'scaling_factor': 1.5305, 'shift_factor': 0.0609} as config="),
        ("f4", "the scaling_factor for 3 latent channels is not known"),
    ):
        caplog.clear()
        save_file(contiguous(to_ldm(vaes[name].state_dict())), tmp_path / f"{name}.safetensors")
        load_vae(tmp_path / f"{name}.safetensors")
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert said in record.getMessage()
    caplog.clear()
    load_vae(tmp_path / "sd_f8c4.safetensors", config={"scaling_factor": 0.13025})
    assert caplog.text == ""


def test_odd_width_asks_for_the_number_of_groups(tmp_path):
    vae = random_vae(settings((24, 48), norm_num_groups=8))
    save_file(contiguous(to_ldm(vae.state_dict())), tmp_path / "vae.safetensors")
    assert 'config={"norm_num_groups"' in refusal(tmp_path / "vae.safetensors")
    back = load_vae(tmp_path / "vae.safetensors", config={"norm_num_groups": 8})
    assert_same_weights(back, vae)
    assert back.config["norm_num_groups"] == 8


@pytest.fixture
def fp16_file(vae, tmp_path) -> Path:
    save_ldm(vae, tmp_path / "half.safetensors", dtype=torch.float16)
    return tmp_path / "half.safetensors"


def test_fp16_weights_load_in_fp32_and_encode_on_a_cpu(vae, fp16_file):
    back = load_vae(fp16_file)
    assert_same_weights(back, {key: weight.half().float() for key, weight in vae.state_dict().items()})
    with torch.no_grad():
        z = back.encode(torch.zeros(1, 3, 16, 16)).latent_dist.mode()
        assert back.decode(z).sample.dtype == torch.float32


@pytest.mark.parametrize(
    ("dtype", "want"),
    [
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        ("fp32", torch.float32),
        ("float16", torch.float16),
        ("torch.bfloat16", torch.bfloat16),
        ("fp16", torch.float16),
        ("bf16", torch.bfloat16),
        ("file", torch.float16),
    ],
)
def test_weights_come_in_the_dtype_that_is_asked_for(fp16_file, dtype, want):
    assert {p.dtype for p in load_vae(fp16_file, dtype=dtype).parameters()} == {want}


@pytest.mark.parametrize("target", ["folder", "vae.safetensors"])
def test_export_keeps_the_dtype_of_the_source(fp16_file, target, tmp_path):
    assert main(["export", str(fp16_file), str(tmp_path / target)]) == 0
    assert_same_weights(load_vae(tmp_path / target, dtype="file"), load_vae(fp16_file, dtype="fp16"))
    assert main(["export", str(fp16_file), str(tmp_path / target), "--dtype=fp32"]) == 0
    assert load_vae(tmp_path / target, dtype="file").dtype == torch.float32


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux's /proc")
def test_converted_weights_are_not_held_twice(tmp_path):
    source = AutoencoderKL(**settings((64, 128, 256, 256)))
    weights = {key: weight.half() for key, weight in source.state_dict().items()}
    torch.save(weights, tmp_path / "vae.pt", _use_new_zipfile_serialization=False)  # which is read as a whole
    program = """if True:
        import re, sys
        from pathlib import Path
        from sdvae.weights import load_vae
        peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
        load_vae()  # the first call imports what it needs
        before = peak()
        load_vae(sys.argv[1])
        print(peak() - before)
    """
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}  # threads keep memory of their own
    used = int(subprocess.check_output([sys.executable, "-c", program, tmp_path / "vae.pt"], env=alone))
    in_fp32 = 4 * sum(weight.numel() for weight in weights.values())
    assert 0.7 < used / in_fp32 < 1.2, "beside a whole copy in fp16 it is 1.3 to 1.5"


@pytest.mark.parametrize("dtype", ["half", "float15", torch.int8, None, 16])
def test_another_dtype_is_refused(fp16_file, dtype):
    assert "need one of fp32, fp16, bf16, file" in refusal(fp16_file, dtype=dtype)


def test_a_file_of_several_dtypes_counts_as_the_widest(vae, tmp_path):
    save_ldm(vae, tmp_path / "half.safetensors", dtype=torch.bfloat16)
    mixed = load_file(tmp_path / "half.safetensors")
    mixed["encoder.conv_in.bias"] = mixed["encoder.conv_in.bias"].half()
    save_file(mixed, tmp_path / "mixed.safetensors")
    back = load_vae(tmp_path / "mixed.safetensors", dtype="file")
    assert {p.dtype for p in back.parameters()} == {torch.float32}
    assert torch.equal(back.state_dict()["encoder.conv_in.bias"], mixed["encoder.conv_in.bias"].float())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"_class_name": "AutoencoderDC"}, "is for AutoencoderDC"),
        ({"laten_channels": 4}, "did you mean 'latent_channels'"),
        ({"some_new_switch": True}, "unknown key 'some_new_switch'"),
        ({"layers_per_block": "2"}, "layers_per_block = '2'"),
        ({"block_out_channels": [32, "64"]}, "block_out_channels"),
        ({"block_out_channels": []}, "block_out_channels"),
        ({"scaling_factor": None}, "scaling_factor = None"),
        ({"use_quant_conv": 1}, "use_quant_conv = 1"),
        ({"down_block_types": ["DownEncoderBlock2D"]}, "down_block_types names 1"),
    ],
)
def test_folder_with_a_wrong_configuration_is_refused(vae, change, said, tmp_path):
    save_vae(vae, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    assert said in refusal(tmp_path)


def test_underscored_config_keys_are_notes(vae, tmp_path):
    save_vae(vae, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"_name_or_path": "x", "_anything": [1]}))
    assert_same_weights(load_vae(tmp_path), vae)


# ---------------------------------------------------------------- faults


@pytest.fixture
def ldm(vae) -> dict[str, Tensor]:
    return contiguous(to_ldm(vae.state_dict()))


def _empty(path: Path, _: dict[str, Tensor]) -> None:
    path.write_bytes(b"")


def _cut(fraction: float) -> Callable[[Path, dict[str, Tensor]], None]:
    def spoil(path: Path, weights: dict[str, Tensor]) -> None:
        if path.suffix == ".safetensors":
            save_file(weights, path)
        else:
            torch.save(weights, path)
        os.truncate(path, int(path.stat().st_size * fraction))

    return spoil


def _text(content: str) -> Callable[[Path, dict[str, Tensor]], None]:
    def spoil(path: Path, _: dict[str, Tensor]) -> None:
        path.write_text(content)

    return spoil


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 334643276\n"


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        pytest.param(_empty, "is empty", id="empty"),
        pytest.param(_cut(0.0001), "damaged", id="few_bytes"),
        pytest.param(_cut(0.5), "damaged", id="half"),
        pytest.param(_cut(0.999), "damaged", id="end_missing"),
        pytest.param(_text("hello world\n"), "damaged", id="text"),
        pytest.param(_text(LFS_POINTER), "Git LFS pointer", id="lfs"),
        pytest.param(_text("<!DOCTYPE html><html>"), "web page", id="html"),
    ],
)
def test_damaged_file_is_refused(ldm, suffix, spoil, said, tmp_path):
    path = tmp_path / f"vae{suffix}"
    spoil(path, ldm)
    message = refusal(path)
    assert said in message
    assert str(path) in message


@pytest.mark.parametrize("source", ["vae.safetensors", "vae.ckpt", "folder/of/nothing", "vae.onnx", "empty"])
def test_missing_source_is_refused(source, tmp_path):
    (tmp_path / "empty").mkdir()
    assert source in refusal(tmp_path / source)


def _drop(weights: dict[str, Tensor], *keys: str) -> dict[str, Tensor]:
    return {key: weight for key, weight in weights.items() if key not in keys}


def test_missing_keys_are_counted_and_named(ldm, tmp_path):
    save_file(_drop(ldm, "encoder.mid.block_1.conv1.weight", "decoder.norm_out.bias"), tmp_path / "vae.safetensors")
    message = refusal(tmp_path / "vae.safetensors")
    assert "2 missing (decoder.conv_norm_out.bias, encoder.mid_block.resnets.0.conv1.weight)" in message


@pytest.mark.parametrize("half", ["encoder.", "decoder."])
def test_half_a_vae_is_refused(ldm, half, tmp_path):
    save_file({key: w for key, w in ldm.items() if key.startswith(half)}, tmp_path / "vae.safetensors")
    refusal(tmp_path / "vae.safetensors")


@pytest.mark.parametrize(
    "key", ["encoder.conv_in.weight", "decoder.conv_in.weight", "encoder.down.1.block.0.conv1.weight"]
)
def test_file_without_a_key_that_tells_the_configuration_is_refused(ldm, key, tmp_path):
    save_file(_drop(ldm, key), tmp_path / "vae.safetensors")
    assert "lacks" in refusal(tmp_path / "vae.safetensors")


@pytest.mark.parametrize(
    "stranger", ["quantize.embedding.weight", "encoder.mid.attn_1.q.scale", "decoder.up.0.attn.x.q.weight"]
)
def test_unexpected_key_is_refused_by_name(ldm, stranger, tmp_path):
    ldm[stranger] = torch.zeros(4)
    save_file(ldm, tmp_path / "vae.safetensors")
    message = refusal(tmp_path / "vae.safetensors")
    assert stranger in message
    assert "vae.safetensors" in message


def test_unexpected_layer_in_a_known_place_is_refused(ldm, tmp_path):
    ldm["decoder.up.0.block.2.nin_shortcut.weight"] = torch.zeros(32, 32, 1, 1)
    save_file(ldm, tmp_path / "vae.safetensors")
    assert "1 unexpected (decoder.up_blocks.1.resnets.2.conv_shortcut.weight)" in refusal(tmp_path / "vae.safetensors")


def test_wrong_shape_is_refused_with_both_shapes(ldm, tmp_path):
    ldm["encoder.mid.block_1.conv1.weight"] = torch.zeros(64, 64, 1, 1)
    save_file(ldm, tmp_path / "vae.safetensors")
    assert "(64, 64, 1, 1) instead of (64, 64, 3, 3)" in refusal(tmp_path / "vae.safetensors")


def test_one_element_too_many_does_not_broadcast(ldm, tmp_path):
    ldm["encoder.conv_in.bias"] = torch.zeros(1)
    save_file(ldm, tmp_path / "vae.safetensors")
    assert "encoder.conv_in.bias (1,) instead of (32,)" in refusal(tmp_path / "vae.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("form", ["file", "folder"])
def test_non_finite_weight_is_named(vae, value, form, tmp_path):
    broken = random_vae(settings((32, 64)))
    with torch.no_grad():
        broken.decoder.conv_out.weight[0, 0, 0, 0] = value
    if form == "file":
        save_file(contiguous(to_ldm(broken.state_dict())), tmp_path / "vae.safetensors")
        message = refusal(tmp_path / "vae.safetensors")
    else:
        broken.save_pretrained(tmp_path)
        message = refusal(tmp_path)
    assert "NaN or infinite values in 1 of" in message
    assert "decoder.conv_out.weight" in message


def test_weights_that_overflow_the_requested_dtype_are_refused(vae, tmp_path):
    big = random_vae(settings((32, 64)))
    with torch.no_grad():
        big.decoder.conv_out.bias[0] = 1e5
    with pytest.raises(InputError, match=r"float16.*decoder\.conv_out\.bias"):
        save_ldm(big, tmp_path / "vae.safetensors", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []
    save_ldm(big, tmp_path / "vae.safetensors")
    assert "float16" in refusal(tmp_path / "vae.safetensors", dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_tensor_that_is_no_weight_is_named(ldm, dtype, tmp_path):
    ldm["encoder.conv_in.bias"] = torch.ones(32).to(dtype)
    save_file(ldm, tmp_path / "vae.safetensors")
    assert f"encoder.conv_in.bias ({dtype})" in refusal(tmp_path / "vae.safetensors")


def test_checkpoint_without_a_vae_is_refused(tmp_path):
    save_file({"model.diffusion_model.out.2.weight": torch.zeros(4)}, tmp_path / "unet.safetensors")
    assert "has no VAE among its 1 keys (model.diffusion_model.out.2.weight)" in refusal(tmp_path / "unet.safetensors")


def test_weight_under_its_old_and_its_new_name_is_refused(vae, tmp_path):
    weights = contiguous(dict(vae.state_dict()))
    weights["encoder.mid_block.attentions.0.query.weight"] = torch.zeros(64, 64)
    save_file(weights, tmp_path / "vae.safetensors")
    assert "beside its other name" in refusal(tmp_path / "vae.safetensors")


@pytest.mark.parametrize("content", [[torch.zeros(3)], torch.zeros(3), {"encoder.conv_in.weight": "text"}])
def test_pickle_of_something_else_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "vae.pt")
    assert "state dict" in refusal(tmp_path / "vae.pt")


def test_folder_without_weights_or_with_two_sets_is_refused(vae, tmp_path):
    save_vae(vae, tmp_path)
    (tmp_path / f"{STEM}.safetensors").rename(tmp_path / f"{STEM}.fp16.safetensors")
    shutil.copy(tmp_path / f"{STEM}.fp16.safetensors", tmp_path / f"{STEM}.ema.safetensors")
    assert "several variants" in refusal(tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    assert "there are no weights" in refusal(tmp_path)


def test_stale_shards_beside_a_whole_file_are_refused(vae, tmp_path):
    vae.save_pretrained(tmp_path, max_shard_size="200KB")
    save_file(contiguous(dict(vae.state_dict())), tmp_path / f"{STEM}.safetensors")
    assert "remove the stale one" in refusal(tmp_path)


def test_folder_with_a_missing_shard_is_refused(vae, tmp_path):
    vae.save_pretrained(tmp_path, max_shard_size="200KB")
    sorted(tmp_path.glob("*.safetensors"))[-1].unlink()
    assert "there is no file" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/x.safetensors"])
def test_shard_outside_its_folder_is_refused(vae, name, tmp_path):
    vae.save_pretrained(tmp_path / "vae", max_shard_size="200KB")
    save_file(contiguous(dict(vae.state_dict())), tmp_path / "outside.safetensors")
    index = tmp_path / "vae" / f"{STEM}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(vae.state_dict(), name)}))
    assert "outside its folder" in refusal(tmp_path / "vae")


def test_shard_that_its_index_does_not_describe_is_refused(vae, tmp_path):
    vae.save_pretrained(tmp_path, max_shard_size="200KB")
    first = sorted(tmp_path.glob("*.safetensors"))[0]
    save_file({"encoder.conv_in.bias": torch.zeros(32)}, first)
    assert "disagree" in refusal(tmp_path)


@pytest.mark.parametrize("content", ["{not json", "[1, 2]", ""])
def test_broken_config_json_is_refused(vae, content, tmp_path):
    save_vae(vae, tmp_path)
    (tmp_path / "config.json").write_text(content)
    assert "config.json" in refusal(tmp_path)


def test_subfolder_of_a_single_file_is_refused(vae, tmp_path):
    save_ldm(vae, tmp_path / "vae.safetensors")
    assert "subfolder" in refusal(tmp_path / "vae.safetensors", subfolder="vae")


class _Payload:
    """A pickle that creates a file when it is executed."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self) -> tuple[Callable, tuple[str, str]]:
        return open, (self.path, "w")


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin"])
@pytest.mark.parametrize("writer", ["torch", "torch_old", "pickle"])
def test_code_in_a_pickle_is_never_executed(ldm, suffix, writer, tmp_path):
    target, path = tmp_path / "executed", tmp_path / f"vae{suffix}"
    content = {"state_dict": ldm, "callbacks": _Payload(target)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(content["callbacks"], protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "torch")
    message = refusal(path)
    assert not target.exists()
    assert "holds code or unsupported objects" in message

    pickle.loads(pickle.dumps(_Payload(target))).close()  # the payload works: this test can fail
    assert target.exists()


def test_code_in_a_folders_bin_is_never_executed(vae, tmp_path):
    save_vae(vae, tmp_path / "vae")
    (tmp_path / "vae" / f"{STEM}.safetensors").unlink()
    torch.save({"a": _Payload(tmp_path / "executed")}, tmp_path / "vae" / f"{STEM}.bin")
    assert "holds code" in refusal(tmp_path / "vae")
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------- saving


def test_ldm_file_has_the_metadata_that_loaders_ask_for(vae, tmp_path):
    save_ldm(vae, tmp_path / "new" / "vae.safetensors")
    with safe_open(tmp_path / "new" / "vae.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["vae.safetensors"]


def test_saving_leaves_the_model_as_it_was(vae, tmp_path):
    before = {key: weight.clone() for key, weight in vae.state_dict().items()}
    save_ldm(vae, tmp_path / "vae.safetensors", dtype=torch.float16)
    assert_same_weights(vae, before)


def test_interrupted_ldm_save_keeps_the_old_file(vae, tmp_path, monkeypatch):
    path = tmp_path / "vae.safetensors"
    save_ldm(vae, path)
    old = path.read_bytes()

    def half_written(weights: dict[str, Tensor], filename: Path, metadata: dict[str, str]) -> None:
        Path(filename).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sdvae.weights.save.save_file", half_written)
    with pytest.raises(OSError, match="No space left"):
        save_ldm(random_vae(settings((32, 64)), seed=1), path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["vae.safetensors"]


def test_interrupted_folder_save_keeps_the_old_folder(vae, tmp_path, monkeypatch):
    save_vae(vae, tmp_path / "vae")
    other = random_vae(settings((32, 64)), seed=1)

    def half_written(self: AutoencoderKL, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(AutoencoderKL, "save_pretrained", half_written)
    with pytest.raises(OSError, match="No space left"):
        save_vae(other, tmp_path / "vae")
    assert_same_weights(load_vae(tmp_path / "vae"), vae)
    assert [p.name for p in tmp_path.iterdir()] == ["vae"]


def test_failed_swap_puts_the_old_folder_back(vae, tmp_path, monkeypatch):
    save_vae(vae, tmp_path / "vae")
    real, calls = os.replace, []

    def second_fails(source: Path, target: Path) -> None:
        calls.append((source, target))
        if len(calls) == 2:
            raise PermissionError("busy")
        real(source, target)

    monkeypatch.setattr("os.replace", second_fails)
    with pytest.raises(PermissionError, match="busy"):
        save_vae(random_vae(settings((32, 64)), seed=1), tmp_path / "vae")
    assert_same_weights(load_vae(tmp_path / "vae"), vae)
    assert [p.name for p in tmp_path.iterdir()] == ["vae"]


def test_saved_folder_replaces_a_vae_and_keeps_its_card(vae, tmp_path):
    folder = tmp_path / "vae"
    random_vae(settings((32, 32, 64)), seed=1).save_pretrained(folder, max_shard_size="200KB")
    (folder / "README.md").write_text("a card")
    save_vae(vae, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", f"{STEM}.safetensors"]
    assert (folder / "README.md").read_text() == "a card"
    assert_same_weights(load_vae(folder), vae)
    assert [p.name for p in tmp_path.iterdir()] == ["vae"]


@pytest.mark.parametrize("inside", ["photo.png", "src/code.py", "config.json"])
def test_folder_of_other_things_is_never_replaced(vae, inside, tmp_path):
    precious = tmp_path / "folder" / inside
    precious.parent.mkdir(parents=True)
    precious.write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(InputError, match="holds other things"):
        save_vae(vae, tmp_path / "folder")
    assert precious.is_file()


def test_vae_folder_with_a_folder_inside_is_never_replaced(vae, tmp_path):
    save_vae(vae, tmp_path / "run")
    precious = tmp_path / "run" / "checkpoints" / "step-1"
    precious.mkdir(parents=True)
    with pytest.raises(InputError, match="holds other things"):
        save_vae(vae, tmp_path / "run")
    assert precious.is_dir()


def test_save_vae_through_a_link_keeps_the_link(vae, tmp_path):
    save_vae(random_vae(settings((32, 64)), seed=1), tmp_path / "real")
    (tmp_path / "latest").symlink_to(tmp_path / "real", target_is_directory=True)
    save_vae(vae, tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink()
    assert_same_weights(load_vae(tmp_path / "real"), vae)


@pytest.mark.parametrize("name", ["vae.ckpt", "vae", "folder.safetensors"])
def test_save_ldm_refuses_a_path_that_is_no_safetensors_file(vae, name, tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(InputError, match=r"ends in \.safetensors"):
        save_ldm(vae, tmp_path / name)


@pytest.mark.parametrize("save", [save_vae, save_ldm])
def test_broken_model_is_not_saved(save, tmp_path):
    broken = random_vae(settings((32, 64)))
    with torch.no_grad():
        broken.quant_conv.bias[0] = float("nan")
    with pytest.raises(InputError, match=r"NaN.*quant_conv\.bias"):
        save(broken, tmp_path / "vae.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_model_without_data_is_not_saved(tmp_path):
    with torch.device("meta"):
        vae = AutoencoderKL(**settings((32, 64)))
    with pytest.raises(InputError, match="without data"):
        save_ldm(vae, tmp_path / "vae.safetensors")


def targets(widths: tuple[int, ...] = (128, 256, 512, 512), **changes: Any) -> dict[str, str | None]:
    with torch.device("meta"):
        return export_targets(AutoencoderKL(**settings(widths, **changes)))


def test_export_targets_say_who_loads_what():
    assert set(targets().values()) == {None}
    flux = targets(latent_channels=16, **NO_QUANT)
    assert flux["comfyui"] is None
    assert "4 latent channels, got 16" in (flux["a1111"] or "")
    assert "quant convs" in (flux["kohya"] or "")
    narrow = targets((64, 128, 256, 256))
    assert narrow["diffusers"] is None
    for program in ("comfyui", "a1111", "kohya"):
        assert "got (64, 128, 256, 256)" in (narrow[program] or "")
    assert targets((128, 256, 512))["comfyui"] is None
    assert targets((128, 256, 512))["a1111"] is not None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"in_channels": 1, "out_channels": 1}, "3 image channels"),
        ({"layers_per_block": 1}, "layers_per_block 2, got 1"),
        ({"norm_num_groups": 16}, "norm_num_groups 32, got 16"),
        ({"act_fn": "relu"}, "act_fn silu, got relu"),
        ({"mid_block_add_attention": False}, "attention in the middle"),
        ({"attention": (3,)}, "attention in the levels"),
        ({"use_quant_conv": False}, "both quant convs"),
    ],
)
def test_every_departure_from_sd_is_a_reason(changes, reason):
    found = targets(**changes)
    for program in ("comfyui", "a1111", "kohya"):
        assert reason in (found[program] or "")


def test_uis_that_take_logits_for_images_are_no_target():
    vae = AutoencoderKL(**settings((32, 64)))
    vae.set_likelihood("bernoulli")
    found = export_targets(vae)
    assert all("gives logits" in (found[program] or "") for program in ("comfyui", "a1111", "kohya"))


def test_a_run_folder_stands_for_its_model(tmp_path):
    vae = load_vae()
    assert vae.dtype == torch.float32
    save_vae(vae, tmp_path / "run" / "model")
    (tmp_path / "run" / "config.yaml").write_text("steps: 1\n")
    found = load_vae(tmp_path / "run")
    assert all(torch.equal(found.state_dict()[key], tensor) for key, tensor in vae.state_dict().items())
