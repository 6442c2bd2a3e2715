"""What is saved of a VAE that was changed for use loads here and in diffusers, or is refused before it is written."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from diffusers import AutoencoderKL as StockAutoencoderKL
from safetensors.torch import load_file
from torch import Tensor, nn

from sdvae.errors import InputError
from sdvae.kernels.speed import speed_up
from sdvae.model import AutoencoderKL
from sdvae.tutorial.conditional import ConditionalAutoencoderKL
from sdvae.weights import from_ldm, load_vae, save_ldm, save_vae
from tests.test_weights import assert_same_weights, random_vae, refusal, settings

SMALL = settings((32, 32), layers_per_block=1)
SAVERS: dict[str, Callable[[Any, Path], Any]] = {
    "save_vae": save_vae,
    "save_pretrained": lambda vae, path: vae.save_pretrained(path),
    "sharded": lambda vae, path: vae.save_pretrained(path, max_shard_size="100KB"),
    "pickled": lambda vae, path: vae.save_pretrained(path, safe_serialization=False),
    "save_ldm": lambda vae, path: save_ldm(vae, path.with_suffix(".safetensors")),
    "to_diffusers": lambda vae, path: vae.to_diffusers().save_pretrained(path),
}


class Wrapper(nn.Module):
    """What DistributedDataParallel does to names, without a process group."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module


def compiled_decoder(vae: Any) -> Any:
    vae.decoder = torch.compile(vae.decoder)
    return vae


def compiled_blocks(vae: Any) -> Any:
    for blocks in (vae.encoder.down_blocks, vae.decoder.up_blocks):
        for i, block in enumerate(blocks):
            blocks[i] = torch.compile(block)
    return vae


def compiled_in_place(vae: Any) -> Any:
    vae.compile()
    return vae


def wrapped_parts(vae: Any) -> Any:
    vae.encoder, vae.decoder = Wrapper(vae.encoder), Wrapper(torch.compile(vae.decoder))
    return vae


def sped_up(vae: Any) -> Any:
    speed_up(vae)
    return vae


def fused(vae: Any) -> Any:
    vae.fuse_qkv_projections()
    return vae


def channels_last(vae: Any) -> Any:
    return vae.to(memory_format=torch.channels_last)


def group_offloaded(vae: Any) -> Any:
    vae.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    return vae


def hooked(vae: Any) -> Any:
    accelerate.hooks.add_hook_to_module(vae.decoder, accelerate.hooks.ModelHook())
    return vae


UNCHANGED = {
    change.__name__: change
    for change in (
        compiled_decoder,
        compiled_blocks,
        compiled_in_place,
        wrapped_parts,
        sped_up,
        fused,
        channels_last,
        group_offloaded,
        hooked,
    )
}


def saved(saver: str, vae: Any, folder: Path) -> list[dict[str, Tensor]]:
    """The weights that sdvae and diffusers read after saving."""
    path = folder / "vae"
    SAVERS[saver](vae, path)
    if saver == "save_ldm":
        path = path.with_suffix(".safetensors")
        save_vae(random_vae(SMALL, seed=9), folder / "config")
        stock = StockAutoencoderKL.from_single_file(str(path), config=str(folder / "config"))
    else:
        stock = StockAutoencoderKL.from_pretrained(path)
    return [dict(load_vae(path).state_dict()), dict(stock.state_dict())]


@pytest.mark.parametrize("saver", SAVERS)
@pytest.mark.parametrize("change", UNCHANGED)
def test_what_wraps_or_speeds_up_a_vae_is_not_saved(change, saver, tmp_path):
    for read in saved(saver, UNCHANGED[change](random_vae(SMALL)), tmp_path):
        assert_same_weights(read, random_vae(SMALL))


@pytest.mark.parametrize("saver", ["save_vae", "save_ldm"])
@pytest.mark.parametrize("wrap", [torch.compile, Wrapper, lambda vae: Wrapper(torch.compile(vae))])
def test_a_wrapped_vae_is_saved_without_the_wrapper(saver, wrap, tmp_path):
    for read in saved(saver, wrap(random_vae(SMALL)), tmp_path):
        assert_same_weights(read, random_vae(SMALL))


@pytest.mark.parametrize("saver", SAVERS)
def test_tied_weights_are_saved_each_under_its_name(saver, tmp_path):
    vae = random_vae(SMALL)
    attention = vae.decoder.mid_block.attentions[0]
    attention.to_k.weight = attention.to_q.weight
    expected = {key: weight.clone() for key, weight in vae.state_dict().items()}
    for read in saved(saver, vae, tmp_path):
        assert_same_weights(read, expected)


@pytest.mark.parametrize("saver", SAVERS)
def test_strided_weights_are_saved_with_their_values(saver, tmp_path):
    vae = random_vae(SMALL)
    vae.quant_conv.weight = nn.Parameter(vae.quant_conv.weight.detach().transpose(0, 1))
    vae.quant_conv.bias = nn.Parameter(torch.arange(16.0)[::2])
    expected = {key: weight.clone().contiguous() for key, weight in vae.state_dict().items()}
    for read in saved(saver, vae, tmp_path):
        assert_same_weights(read, expected)


@pytest.mark.parametrize("saver", SAVERS)
@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_cast_to_8_bits_are_saved_in_the_dtype_they_are_computed_in(saver, storage, tmp_path):
    vae = random_vae(SMALL)
    vae.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    expected = {key: weight.float() for key, weight in vae.state_dict().items()}
    assert any(weight.dtype == storage for weight in vae.state_dict().values())
    for read in saved(saver, vae, tmp_path):
        assert_same_weights(read, expected)


def with_lora(vae: Any, **changes: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    targets = ["conv1", "conv_out", "to_q", "to_out.0"]
    vae.add_adapter(peft.LoraConfig(r=2, init_lora_weights=False, target_modules=targets, **changes))
    return vae


@pytest.mark.parametrize("saver", SAVERS)
@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"lora_alpha": 5, "use_rslora": True}])
def test_a_merged_adapter_is_saved_as_what_it_computes(saver, changes, tmp_path):
    vae = with_lora(random_vae(SMALL), **changes)
    x = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    with torch.no_grad():
        adapted, plain = vae(x).sample, random_vae(SMALL)(x).sample
        vae.fuse_lora()
        merged = vae(x).sample
        reads = saved(saver, vae, tmp_path)
        assert_same_weights(reads[0], reads[1])
        back = AutoencoderKL(**SMALL).eval()
        back.load_state_dict(reads[0])
        assert torch.equal(back(x).sample, merged)
    torch.testing.assert_close(merged, adapted)
    assert (merged - plain).abs().max() > 0.01


def with_peft_model(vae: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(vae, peft.LoraConfig(r=2, target_modules=["conv1"]))


def test_peft_models_are_saved_after_their_merge(tmp_path):
    model = with_peft_model(random_vae(SMALL))
    for save in (save_vae, save_ldm):
        with pytest.raises(InputError, match=r"merge_and_unload"):
            save(model, tmp_path / "vae.safetensors")
    assert list(tmp_path.iterdir()) == []
    for read in saved("save_vae", model.merge_and_unload(), tmp_path):  # a new LoRA adds zero
        assert_same_weights(read, random_vae(SMALL))


def disabled_after_merge(vae: Any) -> Any:
    with_lora(vae).fuse_lora()
    vae.disable_lora()
    return vae


def spectral_norm(vae: Any) -> Any:
    torch.nn.utils.parametrizations.spectral_norm(vae.decoder.conv_in)
    return vae


def weight_norm(vae: Any) -> Any:
    torch.nn.utils.parametrizations.weight_norm(vae.encoder.mid_block.resnets[0].conv1)
    return vae


def old_spectral_norm(vae: Any) -> Any:
    torch.nn.utils.spectral_norm(vae.decoder.conv_in)
    return vae


def offloaded(vae: Any) -> Any:
    return accelerate.cpu_offload(vae, torch.device("cpu"))


def on_meta(vae: Any) -> Any:
    return vae.to("meta")


def without_attention(vae: Any) -> Any:
    vae.decoder.mid_block.attentions[0] = nn.Identity()
    return vae


def other_latents(vae: Any) -> Any:
    vae.post_quant_conv = nn.Conv2d(8, 4, 1)
    return vae


REFUSED = {
    with_lora: "adapter that is not merged .*first call vae.fuse_lora()",
    disabled_after_merge: "adapter that is not merged",
    spectral_norm: "parametrized weights .*conv_in.*remove_parametrizations",
    weight_norm: "parametrized weights .*mid_block.*remove_parametrizations",
    old_spectral_norm: "weight_norm or spectral_norm .*remove_spectral_norm",
    offloaded: "without data .*remove_hook_from_module",
    on_meta: "without data",
    without_attention: "lacks 10 .*decoder.mid_block.attentions.0",
    other_latents: r"another shape .*post_quant_conv.weight \(4, 8, 1, 1\)",
}


@pytest.mark.parametrize("saver", SAVERS)
@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_what_would_not_load_is_refused_before_anything_is_written(change, saver, tmp_path):
    with pytest.raises(InputError, match=REFUSED[change]) as caught:
        SAVERS[saver](change(random_vae(SMALL)), tmp_path / "vae")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("saver", SAVERS)
def test_weights_that_group_offloading_holds_on_disk_are_refused(saver, tmp_path):
    # diffusers leaves uninitialised memory in the weights meanwhile, which would be saved without a sign
    vae = random_vae(SMALL)
    vae.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=str(tmp_path / "offload")
    )
    with pytest.raises(InputError, match=r"on disk .*before vae.enable_group_offload"):
        SAVERS[saver](vae, tmp_path / "vae")
    assert [path.name for path in tmp_path.iterdir()] == ["offload"]


def test_the_remedies_in_the_refusals_work(tmp_path):
    vae = offloaded(random_vae(SMALL))
    accelerate.hooks.remove_hook_from_module(vae, recurse=True)
    assert_same_weights(saved("save_vae", vae, tmp_path / "a")[1], random_vae(SMALL))
    vae = with_lora(random_vae(SMALL))
    vae.unload_lora()
    assert_same_weights(saved("save_vae", vae, tmp_path / "b")[1], random_vae(SMALL))
    vae = weight_norm(random_vae(SMALL))
    torch.nn.utils.parametrize.remove_parametrizations(vae.encoder.mid_block.resnets[0].conv1, "weight")
    expected = {key: weight.clone() for key, weight in vae.state_dict().items()}
    assert_same_weights(saved("save_vae", vae, tmp_path / "c")[1], expected)


def test_saving_a_changed_vae_leaves_it_as_it_was(tmp_path):
    vae = compiled_decoder(random_vae(SMALL))
    keys, before = list(vae.state_dict()), vae.config
    vae.save_pretrained(tmp_path)
    assert list(vae.state_dict()) == keys
    assert vae.config == before
    copy = vae.to_diffusers()
    with torch.no_grad():
        copy.quant_conv.bias.zero_()
    assert vae.quant_conv.bias.abs().sum() > 0


def test_saving_draws_no_random_numbers(tmp_path):
    vae = random_vae(SMALL)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    vae.save_pretrained(tmp_path)
    assert torch.equal(torch.rand(1), expected)


def test_saved_config_keeps_likelihood_and_mode_of_use(tmp_path):
    vae = random_vae(SMALL | {"scaling_factor": 0.7, "latents_mean": (1.0, 2.0, 3.0, 4.0)})
    vae.set_likelihood("bernoulli")
    compiled_decoder(vae).save_pretrained(tmp_path)
    back = load_vae(tmp_path)
    assert (back.likelihood, back.config["scaling_factor"]) == ("bernoulli", 0.7)
    assert tuple(back.config["latents_mean"]) == (1.0, 2.0, 3.0, 4.0)
    assert vae.to_diffusers().config["_likelihood"] == "bernoulli"


def test_diffusers_own_class_is_saved_too(tmp_path):
    stock = random_vae(SMALL).to_diffusers()
    stock.decoder = torch.compile(stock.decoder)
    save_vae(stock, tmp_path / "vae")
    save_ldm(stock, tmp_path / "vae.safetensors")
    assert_same_weights(load_vae(tmp_path / "vae"), random_vae(SMALL))
    assert_same_weights(from_ldm(load_file(tmp_path / "vae.safetensors")), dict(random_vae(SMALL).state_dict()))


@pytest.mark.parametrize("model", [nn.Linear(2, 2), "vae", None])
@pytest.mark.parametrize("save", [save_vae, save_ldm])
def test_what_is_no_vae_is_not_saved(save, model, tmp_path):
    with pytest.raises(InputError, match=f"got a {type(model).__name__} to save; need an AutoencoderKL"):
        save(model, tmp_path / "vae.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("first", [0, 1])
def test_folders_of_conditional_and_plain_vaes_replace_each_other(first, tmp_path):
    plain, conditional = random_vae(SMALL), ConditionalAutoencoderKL(num_classes=3, **SMALL)
    vaes = [plain, conditional] if first == 0 else [conditional, plain]
    for vae in (*vaes, vaes[0]):
        save_vae(vae, tmp_path / "vae")
        assert_same_weights(type(vae).from_pretrained(tmp_path / "vae"), vae)


def test_a_conditional_vae_is_refused_with_the_way_to_load_it(tmp_path):
    save_vae(ConditionalAutoencoderKL(num_classes=3, **SMALL), tmp_path / "vae")
    assert "ConditionalAutoencoderKL.from_pretrained" in refusal(tmp_path / "vae")
    with pytest.raises(InputError, match="layout does not have"):
        save_ldm(ConditionalAutoencoderKL(num_classes=3, **SMALL), tmp_path / "vae.safetensors")
    assert not (tmp_path / "vae.safetensors").exists()


# ---------------------------------------------------------------- from_pretrained


@pytest.mark.parametrize("name", ["torch_dtype", "dtype"])
@pytest.mark.parametrize("word", ["fp16", "float16", "torch.float16"])
def test_dtypes_may_be_words(name, word, tmp_path):
    random_vae(SMALL).save_pretrained(tmp_path)
    save_ldm(random_vae(SMALL), tmp_path / "vae.safetensors")
    assert AutoencoderKL.from_pretrained(tmp_path, **{name: word}).dtype == torch.float16
    file = str(tmp_path / "vae.safetensors")
    single: Any = AutoencoderKL.from_single_file(file, config=str(tmp_path), **{name: word})
    assert single.dtype == torch.float16
    with pytest.raises(InputError, match="got dtype='float15'; need one of fp32"):
        AutoencoderKL.from_pretrained(tmp_path, dtype="float15")


def test_weights_of_another_shape_are_newly_initialised_and_named(tmp_path, caplog):
    vae = random_vae(SMALL)
    vae.save_pretrained(tmp_path)
    torch.manual_seed(5)
    back = AutoencoderKL.from_pretrained(tmp_path, latent_channels=8, ignore_mismatched_sizes=True)
    (record,) = [record for record in caplog.records if record.name.startswith("sdvae")]
    assert record.levelno == logging.WARNING
    new = [key for key, weight in back.state_dict().items() if weight.shape != vae.state_dict()[key].shape]
    assert len(new) == 7
    assert all(key in record.getMessage() for key in new)
    for key, weight in back.state_dict().items():
        if key not in new:
            assert torch.equal(weight, vae.state_dict()[key]), key
    fresh = AutoencoderKL(**SMALL | {"latent_channels": 8})
    for key in new:  # uniform in ±1/sqrt(fan_in), as in a new layer; diffusers leaves whatever memory held
        bound = fresh.state_dict()[key.replace("bias", "weight")][0].numel() ** -0.5
        assert 0.5 * bound < back.state_dict()[key].abs().max() <= bound, key


@pytest.mark.parametrize("how", [{}, {"ignore_mismatched_sizes": False}])
def test_weights_of_another_shape_are_refused_otherwise(how, tmp_path):
    random_vae(SMALL).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="conv_in"):
        AutoencoderKL.from_pretrained(tmp_path, latent_channels=8, **how)


@pytest.mark.parametrize("how", [{}, {"low_cpu_mem_usage": False}, {"torch_dtype": torch.float16}])
def test_single_file_that_lacks_weights_is_refused(how, tmp_path):
    random_vae(SMALL).save_pretrained(tmp_path)
    weights = dict(random_vae(SMALL).state_dict())
    del weights["quant_conv.bias"]
    torch.save(weights, tmp_path / "vae.bin")
    with pytest.raises(InputError, match=r"vae.bin lacks weights"):
        AutoencoderKL.from_single_file(str(tmp_path / "vae.bin"), config=str(tmp_path), **how)


def test_files_can_be_read_by_whom_the_umask_lets_read_them(tmp_path):
    """safetensors 0.8 makes files that only their owner can read, also where a group shares the disk."""
    before = os.umask(0o027)
    try:
        save_vae(load_vae(), tmp_path / "folder")
        save_ldm(load_vae(), tmp_path / "single.safetensors")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 3
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}
