"""The forms in which VAEs are found: which family a file belongs to, and what can be repaired while it is read."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL as StockAutoencoderKL
from diffusers.loaders.single_file_utils import CHECKPOINT_KEY_NAMES, SingleFileComponentError, fetch_diffusers_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdvae.cli import main
from sdvae.errors import InputError
from sdvae.model import AutoencoderKL
from sdvae.weights import from_ldm, load_vae, save_ldm, save_vae, to_ldm
from tests.test_weights import NO_QUANT, STEM, assert_same_weights, contiguous, random_vae, refusal, settings

FOUR: dict[str, Any] = settings((32, 64), layers_per_block=1)
SIXTEEN: dict[str, Any] = FOUR | {"latent_channels": 16} | NO_QUANT


@pytest.fixture(scope="module")
def vae() -> Any:
    return random_vae(FOUR)


@pytest.fixture(scope="module")
def wide() -> Any:
    return random_vae(SIXTEEN)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# ---------------------------------------------------------------- families

UNET, DIT = "model.diffusion_model.", "model.diffusion_model."
SD, SDXL, X4 = {"scaling_factor": 0.18215}, {"scaling_factor": 0.13025}, {"scaling_factor": 0.08333}
SD3 = {"scaling_factor": 1.5305, "shift_factor": 0.0609}
FLUX = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
PLAYGROUND = {
    "scaling_factor": 0.5,
    "latents_mean": (-1.6574, 1.886, -1.383, 2.5155),
    "latents_std": (8.4927, 5.9022, 6.5498, 5.2299),
}
SDXL_KEYS = [CHECKPOINT_KEY_NAMES["xl_base"], "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias"]
# name -> (keys of the diffusion model and text encoders, the factors, the repository that diffusers reads them from)
WHOLE: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Any], str]] = {
    "sd1": (
        {"cond_stage_model.transformer.text_model.embeddings.position_ids": (1,), f"{UNET}out.2.bias": (4,)},
        SD,
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
    ),
    "sd2": (
        {CHECKPOINT_KEY_NAMES["v2"]: (4, 1024), CHECKPOINT_KEY_NAMES["open_clip"]: (2,)},
        SD,
        "stabilityai/stable-diffusion-2-1",
    ),
    "sd1_unet_alone": (
        {f"{UNET}input_blocks.1.1.transformer_blocks.0.norm1.bias": (2,)},
        SD,
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
    ),
    "sdxl": (dict.fromkeys(SDXL_KEYS, (2,)), SDXL, "stabilityai/stable-diffusion-xl-base-1.0"),
    "sdxl_refiner": (
        {CHECKPOINT_KEY_NAMES["xl_refiner"]: (2,)},
        SDXL,
        "stabilityai/stable-diffusion-xl-refiner-1.0",
    ),
    "playground": (
        dict.fromkeys(["edm_mean", "edm_std", *SDXL_KEYS], (4,)),
        PLAYGROUND,
        "playgroundai/playground-v2.5-1024px-aesthetic",
    ),
    "upscaler": (
        {CHECKPOINT_KEY_NAMES["upscale"]: (2,), CHECKPOINT_KEY_NAMES["open_clip"]: (2,)},
        X4,
        "stabilityai/stable-diffusion-x4-upscaler",
    ),
    "auraflow": (dict.fromkeys(CHECKPOINT_KEY_NAMES["auraflow"], (2,)), SDXL, "fal/AuraFlow-v0.3"),
    "sd3": (
        {CHECKPOINT_KEY_NAMES["sd3"][1]: (9216,), f"{DIT}pos_embed": (1, 36864, 1)},
        SD3,
        "stabilityai/stable-diffusion-3-medium-diffusers",
    ),
    "sd35": ({CHECKPOINT_KEY_NAMES["sd35_large"][1]: (2,)}, SD3, "stabilityai/stable-diffusion-3.5-large"),
    "flux": ({CHECKPOINT_KEY_NAMES["flux"][1]: (2,)}, FLUX, "black-forest-labs/FLUX.1-schnell"),
    "chroma": (
        {CHECKPOINT_KEY_NAMES["chroma"][0]: (2,), CHECKPOINT_KEY_NAMES["flux"][1]: (2,)},
        FLUX,
        "lodestones/Chroma1-HD",
    ),
    "lumina2": ({CHECKPOINT_KEY_NAMES["lumina2"][0]: (2,)}, FLUX, "Alpha-VLLM/Lumina-Image-2.0"),
    "z_image": ({CHECKPOINT_KEY_NAMES["z-image-turbo"][0]: (2,)}, FLUX, "Tongyi-MAI/Z-Image-Turbo"),
    "hidream": ({CHECKPOINT_KEY_NAMES["hidream"]: (2,)}, FLUX, "HiDream-ai/HiDream-I1-Dev"),
}


def whole(vae: Any, keys: dict[str, tuple[int, ...]], prefix: str = "first_stage_model.") -> dict[str, Tensor]:
    others = {key: torch.zeros(shape) for key, shape in keys.items()}
    return others | {prefix + key: weight for key, weight in contiguous(to_ldm(vae.state_dict())).items()}


@pytest.mark.parametrize("prefix", ["first_stage_model.", "vae."])
@pytest.mark.parametrize("name", WHOLE)
def test_whole_checkpoint_tells_its_factors(vae, wide, name, prefix, tmp_path, caplog):
    keys, factors, _ = WHOLE[name]
    of = wide if "shift_factor" in factors else vae
    save_file(whole(of, keys, prefix), tmp_path / "model.safetensors")
    back = load_vae(tmp_path / "model.safetensors")
    assert_same_weights(back, of)
    assert {key: back.config[key] for key in factors} == factors
    assert back.config["shift_factor"] == factors.get("shift_factor")
    assert warnings(caplog) == []


@pytest.mark.parametrize("name", WHOLE)
def test_diffusers_takes_the_same_checkpoints_for_the_same_models(vae, wide, name):
    # its factors are those in the config.json of this repository, on which the table's are based
    keys, factors, repository = WHOLE[name]
    found = fetch_diffusers_config(whole(wide if "shift_factor" in factors else vae, keys))
    assert found["pretrained_model_name_or_path"] == repository


ARCHITECTURES = {
    "stable-diffusion-v1": SD,
    "stable-diffusion-v2-768-v": SD,
    "stable-diffusion-v1/vae": SD,
    "stable-diffusion-xl-v1-base": SDXL,
    "Stable-Diffusion-XL-v1-base/lora": SDXL,
    "stable-diffusion-v3-medium": SD3,
    "stable-diffusion-3.5-large": SD3,
    "stable-diffusion-3": SD3,
    "flux-1-dev": FLUX,
    "chroma": FLUX,
    "lumina-2": FLUX,
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_metadata_tell_the_factors_of_a_vae_alone(vae, wide, architecture, tmp_path, caplog):
    factors = ARCHITECTURES[architecture]
    of = wide if "shift_factor" in factors else vae
    path = tmp_path / "vae.safetensors"
    save_file(contiguous(to_ldm(of.state_dict())), path, metadata={"modelspec.architecture": architecture})
    back = load_vae(path)
    assert {key: back.config[key] for key in factors} == factors
    assert warnings(caplog) == []


def test_keys_count_more_than_metadata_and_what_is_given_more_than_both(vae, tmp_path, caplog):
    path = tmp_path / "model.safetensors"
    save_file(whole(vae, WHOLE["sdxl"][0]), path, metadata={"modelspec.architecture": "stable-diffusion-v1"})
    assert load_vae(path).config["scaling_factor"] == 0.13025
    assert load_vae(path, config={"scaling_factor": 0.5}).config["scaling_factor"] == 0.5
    assert warnings(caplog) == []


@pytest.mark.parametrize("architecture", ["flux-1-dev", "stable-video-diffusion-img2vid-v1", "anything", ""])
def test_metadata_of_a_model_with_another_vae_tell_nothing(vae, architecture, tmp_path, caplog):
    path = tmp_path / "vae.safetensors"
    save_file(contiguous(to_ldm(vae.state_dict())), path, metadata={"modelspec.architecture": architecture})
    assert load_vae(path).config["scaling_factor"] == 0.18215
    assert "nothing tells" in warnings(caplog)[0]


def test_keys_of_a_model_with_another_vae_tell_nothing(wide, tmp_path, caplog):
    save_file(whole(wide, WHOLE["sdxl"][0]), tmp_path / "model.safetensors")
    assert load_vae(tmp_path / "model.safetensors").config["scaling_factor"] == 0.3611
    assert "nothing tells" in warnings(caplog)[0]


def test_pickled_and_wrapped_checkpoint_tells_its_factors(vae, tmp_path):
    torch.save({"state_dict": whole(vae, WHOLE["sdxl"][0])}, tmp_path / "model.ckpt")
    assert load_vae(tmp_path / "model.ckpt").config["scaling_factor"] == 0.13025


def test_export_writes_what_was_assumed_only_with_a_warning(vae, tmp_path, caplog):
    save_file(contiguous(to_ldm(vae.state_dict())), tmp_path / "bare.safetensors")
    assert main(["export", str(tmp_path / "bare.safetensors"), str(tmp_path / "folder")]) == 0
    (said,) = warnings(caplog)
    assert "SDXL (0.13025)" in said
    assert "sdvae export: --config" in said
    caplog.clear()
    (tmp_path / "factor.json").write_text('{"scaling_factor": 0.13025}')
    given = ["--config", str(tmp_path / "factor.json")]
    assert main(["export", str(tmp_path / "bare.safetensors"), str(tmp_path / "folder"), *given]) == 0
    assert warnings(caplog) == []
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["scaling_factor"] == 0.13025


# ---------------------------------------------------------------- what a single file carries


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_single_file_carries_what_shapes_do_not_tell(likelihood, tmp_path, caplog):
    odd = settings((24, 48), norm_num_groups=8, act_fn="relu", scaling_factor=0.13025, force_upcast=False)
    vae = random_vae(odd | {"latents_mean": (1.0, 2.0, 3.0, 4.0), "sample_size": 64})
    vae.set_likelihood(likelihood)
    save_ldm(vae, tmp_path / "vae.safetensors")
    back = load_vae(tmp_path / "vae.safetensors")
    assert back.likelihood == likelihood
    kept = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    assert {key: back.config[key] for key in kept} | {"latents_mean": tuple(back.config["latents_mean"])} == kept
    assert load_vae(tmp_path / "vae.safetensors", config={"scaling_factor": 2.0}).config["scaling_factor"] == 2.0
    assert warnings(caplog) == []


@pytest.mark.parametrize("target", ["vae.safetensors", "VAE.SAFETENSORS", "vae.sft", "vae.Sft"])
def test_export_of_a_bernoulli_vae_to_a_file_and_back_says_nothing(target, tmp_path, caplog):
    vae = random_vae(FOUR)
    vae.set_likelihood("bernoulli")
    save_vae(vae, tmp_path / "source")
    assert main(["export", str(tmp_path / "source"), str(tmp_path / target)]) == 0
    assert (tmp_path / target).is_file()
    assert main(["export", str(tmp_path / target), str(tmp_path / "back")]) == 0
    assert warnings(caplog) == []
    assert load_vae(tmp_path / "back").likelihood == "bernoulli"
    assert_same_weights(load_vae(tmp_path / "back"), vae)
    with safe_open(tmp_path / target, framework="pt") as file:
        assert set(file.metadata()) == {"format", "sdvae.config"}


@pytest.mark.parametrize("target", ["vae.CKPT", "vae.Pt", "vae.bin"])
def test_export_writes_no_pickle(target, vae, tmp_path, capfd):
    save_vae(vae, tmp_path / "source")
    assert main(["export", str(tmp_path / "source"), str(tmp_path / target)]) == 2
    assert "pickles are not written" in capfd.readouterr().err


@pytest.mark.parametrize("entry", ["{", "[]", '{"scaling_factor": "x"}', '{"_likelihood": "poisson"}', '{"what": 1}'])
def test_damaged_metadata_are_refused(vae, entry, tmp_path):
    path = tmp_path / "vae.safetensors"
    save_file(contiguous(to_ldm(vae.state_dict())), path, metadata={"sdvae.config": entry})
    assert "sdvae.config" in refusal(path)


# ---------------------------------------------------------------- repairs


def flattened(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """1x1 convs as matrices, and everything with one side as (C, 1, 1)."""
    return {
        key: weight[:, :, 0, 0] if weight.shape[2:] == (1, 1) else weight[:, None, None] if weight.ndim == 1 else weight
        for key, weight in weights.items()
    }


@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_sides_of_one_more_or_less_are_repaired(vae, layout, suffix, tmp_path):
    weights = vae.state_dict() if layout == "diffusers" else to_ldm(vae.state_dict())
    odd = contiguous(flattened(dict(weights)))
    assert odd["quant_conv.weight"].shape == (8, 8)
    assert odd["quant_conv.bias"].shape == (8, 1, 1)
    (save_file if suffix == ".safetensors" else torch.save)(odd, tmp_path / f"vae{suffix}")
    assert_same_weights(load_vae(tmp_path / f"vae{suffix}"), vae)


def test_folder_with_flattened_weights_is_repaired(vae, tmp_path):
    save_vae(vae, tmp_path)
    save_file(contiguous(flattened(dict(vae.state_dict()))), tmp_path / f"{STEM}.safetensors")
    assert_same_weights(load_vae(tmp_path), vae)


def test_a_transposed_weight_is_not_repaired(vae, tmp_path):
    weights = dict(to_ldm(vae.state_dict()))
    weights["decoder.conv_out.weight"] = weights["decoder.conv_out.weight"].transpose(0, 1)
    save_file(contiguous(weights), tmp_path / "vae.safetensors")
    refusal(tmp_path / "vae.safetensors")


@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
@pytest.mark.parametrize(
    "names", [("query", "key", "value", "proj_attn"), ("to_q", "to_k", "to_v", "to_out.0"), ("q", "k", "v", "proj_out")]
)
def test_attention_has_any_of_its_names_in_either_layout(vae, layout, names, tmp_path):
    weights = dict(vae.state_dict()) if layout == "diffusers" else dict(to_ldm(vae.state_dict()))
    today = ("to_q", "to_k", "to_v", "to_out.0") if layout == "diffusers" else ("q", "k", "v", "proj_out")
    for old, new in zip(today, names, strict=True):
        weights = {key.replace(f".{old}.", f".{new}."): weight for key, weight in weights.items()}
    assert sum(f".{names[0]}.weight" in key for key in weights) == 2
    save_file(contiguous(weights), tmp_path / "vae.safetensors")
    assert_same_weights(load_vae(tmp_path / "vae.safetensors"), vae)


NESTED = {
    "lightning": lambda w: {"state_dict": w, "optimizer_states": [], "hyper_parameters": {"lr": 1e-4}},
    "model": lambda w: {"model": w, "optimizer": {"state": {}}},
    "twice": lambda w: {"model": {"state_dict": w}, "epoch": 3},
    "ema": lambda w: {"ema": w},
    "lightning_module": lambda w: {"state_dict": {f"model.{key}": weight for key, weight in w.items()}},
    "generator": lambda w: {f"generator.{key}": weight for key, weight in w.items()},
    "averaged": lambda w: {**{f"module.{key}": weight for key, weight in w.items()}, "n_averaged": torch.tensor(3)},
    "ema_alone": lambda w: {f"ema_model.{key}": weight for key, weight in w.items()},
}


@pytest.mark.parametrize("nesting", NESTED)
@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
def test_state_dicts_inside_others_are_found(vae, nesting, layout, tmp_path):
    weights = dict(vae.state_dict()) if layout == "diffusers" else to_ldm(vae.state_dict())
    torch.save(NESTED[nesting](weights), tmp_path / "vae.PT")
    assert_same_weights(load_vae(tmp_path / "vae.PT"), vae)


def test_two_vaes_in_one_file_are_refused_by_prefix(vae, tmp_path):
    weights = contiguous(dict(vae.state_dict()))
    both = {
        f"{prefix}.{key}": weight.clone() for prefix in ("online_model", "ema_model") for key, weight in weights.items()
    }
    save_file(both, tmp_path / "vae.safetensors")
    assert "several VAEs, under ema_model., online_model." in refusal(tmp_path / "vae.safetensors")


@pytest.mark.parametrize("form", ["file", "folder", "shards", "pickle"])
def test_keys_beside_the_network_are_left_out_and_named_once(vae, form, tmp_path, caplog):
    weights = contiguous(dict(vae.state_dict())) | {"logvar": torch.zeros(1), "teacher.weight": torch.zeros(3)}
    if form in ("folder", "shards"):
        save_vae(vae, tmp_path)
        name = f"{STEM}.safetensors" if form == "folder" else f"{STEM}-00001-of-00001.safetensors"
        if form == "shards":
            (tmp_path / f"{STEM}.safetensors").unlink()
            index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
            (tmp_path / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))
        save_file(weights, tmp_path / name)
        source = tmp_path
        assert_same_weights(AutoencoderKL.from_pretrained(tmp_path), vae)
        assert "left out logvar, teacher.weight" in warnings(caplog)[-1]
        caplog.clear()
    else:
        source = tmp_path / ("vae.safetensors" if form == "file" else "vae.pt")
        (save_file if form == "file" else torch.save)(weights, source)
    config = {"scaling_factor": 1.0}
    assert_same_weights(load_vae(source, config=config), vae)
    (said,) = warnings(caplog)
    assert "left out 2 keys that no VAE has (logvar, teacher.weight)" in said


@pytest.mark.parametrize("extra", ["encoder.conv_in.scale_weight", "decoder.time_stack.weight", "quantize.embedding"])
def test_keys_inside_the_network_are_refused(vae, extra, tmp_path):
    # such as the scales of 8-bit weights, without which the weights mean something else
    weights = contiguous(dict(vae.state_dict())) | {extra: torch.zeros(4)}
    save_vae(vae, tmp_path / "folder")
    save_file(weights, tmp_path / "folder" / f"{STEM}.safetensors")
    save_file(weights, tmp_path / "vae.safetensors")
    assert extra in refusal(tmp_path / "folder")
    assert extra in refusal(tmp_path / "vae.safetensors")
    with pytest.raises(InputError, match=extra):
        AutoencoderKL.from_pretrained(tmp_path / "folder")


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("form", ["vae.safetensors", "vae.ckpt", "folder"])
def test_weights_of_8_bits_load_with_the_same_values(vae, storage, form, tmp_path):
    eight = contiguous({key: weight.to(storage) for key, weight in vae.state_dict().items()})
    path = tmp_path / form
    if form == "folder":
        save_vae(vae, path)
        save_file(eight, path / f"{STEM}.safetensors")
    else:
        (torch.save if form == "vae.ckpt" else save_file)(to_ldm(eight) if form == "vae.ckpt" else eight, path)
    assert_same_weights(load_vae(path), {key: weight.float() for key, weight in eight.items()})
    assert_same_weights(load_vae(path, dtype="file"), {key: w.to(torch.bfloat16) for key, w in eight.items()})


def test_every_value_of_8_bits_is_one_of_bfloat16():
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    for storage in (torch.float8_e4m3fn, torch.float8_e5m2):
        values = codes.view(storage)
        assert torch.equal(values.to(torch.bfloat16).float().nan_to_num(), values.float().nan_to_num())


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_the_variant_that_is_asked_for_is_read(vae, binary, sharded, tmp_path):
    other = random_vae(FOUR, seed=1).half()
    kind = {"safe_serialization": not binary, "max_shard_size": "100KB" if sharded else "10GB"}
    vae.save_pretrained(tmp_path, **kind)
    other.save_pretrained(tmp_path, variant="fp16", **kind)
    assert_same_weights(load_vae(tmp_path), vae)
    assert_same_weights(load_vae(tmp_path, variant="fp16", dtype="file"), other)
    assert f"need {STEM}.ema.safetensors" in refusal(tmp_path, variant="ema")


def test_one_of_several_variants_is_read_only_when_named(vae, tmp_path):
    vae.save_pretrained(tmp_path, variant="ema")
    random_vae(FOUR, seed=1).save_pretrained(tmp_path, variant="fp16")
    assert "several variants" in refusal(tmp_path)
    assert "variant=" in refusal(tmp_path)
    assert_same_weights(load_vae(tmp_path, variant="ema"), vae)
    save_ldm(vae, tmp_path / "vae.safetensors")
    assert "variant='ema' with the single file" in refusal(tmp_path / "vae.safetensors", variant="ema")


# ---------------------------------------------------------------- every writer, every reader


def _folder(path: Path, vae: Any, **how: Any) -> Path:
    vae.save_pretrained(path / "written", **how)
    return path / "written"


def _file(path: Path, weights: dict[str, Tensor], name: str = "written.safetensors") -> Path:
    (save_file if name.endswith(("safetensors", "sft")) else torch.save)(contiguous(weights), path / name)
    return path / name


LDM_TO_LEGACY = {".q.": ".query.", ".k.": ".key.", ".v.": ".value.", ".proj_out.": ".proj_attn."}
WRITERS: dict[str, Any] = {
    "save_vae": lambda p, v: (save_vae(v, p / "written"), p / "written")[1],
    "save_ldm": lambda p, v: (save_ldm(v, p / "written.safetensors"), p / "written.safetensors")[1],
    "stock folder": lambda p, v: _folder(p, v.to_diffusers()),
    "stock folder, shards": lambda p, v: _folder(p, v.to_diffusers(), max_shard_size="100KB"),
    "stock folder, .bin": lambda p, v: _folder(p, v.to_diffusers(), safe_serialization=False),
    "stock folder, variant": lambda p, v: _folder(p, v.to_diffusers(), variant="fp16"),
    "diffusers names in a file": lambda p, v: _file(p, v.state_dict()),
    "LDM names, .ckpt": lambda p, v: _file(p, to_ldm(v.state_dict()), "written.ckpt"),
    "whole checkpoint": lambda p, v: _file(p, whole(v, WHOLE["sdxl"][0])),
    "ComfyUI VAESave": lambda p, v: _file(p, to_ldm(v.state_dict())),
    "ComfyUI CheckpointSave": lambda p, v: _file(p, whole(v, WHOLE["sdxl"][0])),
    "kohya, vae. prefix": lambda p, v: _file(p, whole(v, WHOLE["sd1"][0], "vae.")),
    "compiled, DDP": lambda p, v: _file(p, {f"module._orig_mod.{k}": w for k, w in v.state_dict().items()}),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_writer_is_read_by_every_reader(vae, writer, tmp_path):
    path = WRITERS[writer](tmp_path, vae)
    assert_same_weights(load_vae(path, config={"scaling_factor": 1.0}), vae)
    save_vae(vae, tmp_path / "config")
    for kind in (StockAutoencoderKL, AutoencoderKL):
        if path.is_dir():
            how = {"variant": "fp16"} if "variant" in writer else {}
            assert_same_weights(kind.from_pretrained(path, **how), vae)
        elif writer != "compiled, DDP":
            assert_same_weights(kind.from_single_file(str(path), config=str(tmp_path / "config")), vae)


def test_a_file_of_a_compiled_vae_is_refused_by_from_single_file_and_not_read_in_part(vae, tmp_path):
    path = WRITERS["compiled, DDP"](tmp_path, vae)
    save_vae(vae, tmp_path / "config")
    with pytest.raises(SingleFileComponentError):
        AutoencoderKL.from_single_file(str(path), config=str(tmp_path / "config"))


def test_from_ldm_takes_what_save_ldm_writes(vae, tmp_path):
    save_ldm(vae, tmp_path / "vae.safetensors")
    assert_same_weights(from_ldm(load_file(tmp_path / "vae.safetensors")), dict(vae.state_dict()))
