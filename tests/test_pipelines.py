"""Our VAE in diffusers' pipelines: the same images as with diffusers' own class, and folders that load without us.

Every pipeline is tiny and random. Prompts are given as embeddings, except for Stable Diffusion, which has
its text encoder and a tokenizer of a few letters.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import AutoencoderKL as StockAutoencoderKL
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdvae.model import AutoencoderKL

SIDE = 32  # pixels


@dataclass
class Case:
    """A pipeline class, its parts other than the VAE, and the arguments of a call other than the generator."""

    pipeline: Any
    parts: dict[str, Any]
    call: dict[str, Any]
    sixteen_channels: bool = False


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_vae(sixteen_channels: bool = False) -> Any:
    torch.manual_seed(0)
    special: dict[str, Any] = (
        {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "force_upcast": False}
        | {"scaling_factor": 1.5305, "shift_factor": 0.0609}
        if sixteen_channels
        else {}
    )
    return AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=SIDE,
        **special,
    )


def make_stock_vae(sixteen_channels: bool = False, *, seed: int) -> Any:
    """diffusers' own class with the same configuration and other weights."""
    config = {key: value for key, value in make_vae(sixteen_channels).config.items() if not key.startswith("_")}
    torch.manual_seed(seed)
    return StockAutoencoderKL(**config)


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )


def sd_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        sample_size=SIDE // 2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=2,
    )


def tiny_tokenizer(folder: Path) -> CLIPTokenizer:
    folder.mkdir()
    symbols = ["<|startoftext|>", "<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz"]
    symbols += [f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz"]
    (folder / "vocab.json").write_text(json.dumps({symbol: number for number, symbol in enumerate(symbols)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def sd_parts(folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    text_config = CLIPTextConfig(
        vocab_size=54,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        hidden_size=8,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        max_position_embeddings=16,
    )
    return {
        "unet": sd_unet(),
        "scheduler": scheduler(),
        "text_encoder": CLIPTextModel(text_config).eval(),
        "tokenizer": tiny_tokenizer(folder / "tokenizer"),
        "safety_checker": None,
        "feature_extractor": None,
    }


def sd(folder: Path) -> Case:
    call = {"prompt": "a cat", "height": SIDE, "width": SIDE, "guidance_scale": 3.0}
    return Case(StableDiffusionPipeline, sd_parts(folder), call)


def sd_img2img(folder: Path) -> Case:
    call = {"prompt": "a cat", "image": noise(1, 3, SIDE, SIDE).sigmoid(), "strength": 0.8}
    return Case(StableDiffusionImg2ImgPipeline, sd_parts(folder), call)


def sd_inpaint(folder: Path) -> Case:
    mask = torch.zeros(1, 1, SIDE, SIDE)
    mask[..., SIDE // 2 :] = 1.0
    call = {"prompt": "a cat", "image": noise(1, 3, SIDE, SIDE).sigmoid(), "mask_image": mask}
    return Case(StableDiffusionInpaintPipeline, sd_parts(folder), call | {"height": SIDE, "width": SIDE})


def sdxl(_: Path) -> Case:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        sample_size=SIDE // 2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,  # 6 · 8 + 32
        cross_attention_dim=64,
        norm_num_groups=1,
    )
    parts = {
        "unet": unet,
        "scheduler": EulerDiscreteScheduler(beta_schedule="scaled_linear"),
        **dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")),
    }
    call = {
        "prompt_embeds": noise(1, 7, 64),
        "negative_prompt_embeds": noise(1, 7, 64, seed=1),
        "pooled_prompt_embeds": noise(1, 32),
        "negative_pooled_prompt_embeds": noise(1, 32, seed=1),
        "height": SIDE,
        "width": SIDE,
    }
    return Case(StableDiffusionXLPipeline, parts, call)


def sd3(_: Path) -> Case:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=SIDE // 2,
        patch_size=1,
        in_channels=16,
        out_channels=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
    )
    absent = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    parts = {"transformer": transformer, "scheduler": FlowMatchEulerDiscreteScheduler(), **dict.fromkeys(absent)}
    call = {
        "prompt_embeds": noise(1, 7, 32),
        "negative_prompt_embeds": noise(1, 7, 32, seed=1),
        "pooled_prompt_embeds": noise(1, 64),
        "negative_pooled_prompt_embeds": noise(1, 64, seed=1),
        "height": SIDE,
        "width": SIDE,
    }
    return Case(StableDiffusion3Pipeline, parts, call, sixteen_channels=True)


def flux(_: Path) -> Case:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,  # 16 latent channels, packed 2x2
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    absent = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    parts = {"transformer": transformer, "scheduler": FlowMatchEulerDiscreteScheduler(), **dict.fromkeys(absent)}
    call = {"prompt_embeds": noise(1, 7, 32), "pooled_prompt_embeds": noise(1, 32), "height": SIDE, "width": SIDE}
    return Case(FluxPipeline, parts, call, sixteen_channels=True)


def dit(_: Path) -> Case:
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        sample_size=SIDE // 2,
        num_layers=1,
        patch_size=4,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    return Case(DiTPipeline, {"transformer": transformer, "scheduler": DDIMScheduler()}, {"class_labels": [1]})


CASES: dict[str, Callable[[Path], Case]] = {
    "sd": sd,
    "sd_img2img": sd_img2img,
    "sd_inpaint": sd_inpaint,
    "sdxl": sdxl,
    "sd3": sd3,
    "flux": flux,
    "dit": dit,
}


def build(case: Case, vae: Any) -> Any:
    pipe = case.pipeline(**case.parts, vae=vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image(pipe: Any, call: dict[str, Any], **changes: Any) -> torch.Tensor:
    """The images of one call with a fresh generator: (B, H, W, 3) in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    arguments = call | {"num_inference_steps": 2, "output_type": "np", "generator": generator} | changes
    return torch.from_numpy(pipe(**arguments).images)


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, Case]:
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in CASES.items()}


@pytest.fixture(scope="module")
def stock_images(cases) -> dict[str, torch.Tensor]:
    """What diffusers' own class with our weights gives."""
    images = {}
    for name, case in cases.items():
        images[name] = image(build(case, make_vae(case.sixteen_channels).to_diffusers()), case.call)
        assert images[name].shape == (1, SIDE, SIDE, 3)
        assert images[name].std() > 0.01, "a blank picture would prove nothing"
    return images


def assert_same_image(ours: torch.Tensor, stock: torch.Tensor) -> None:
    torch.testing.assert_close(ours, stock, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_pipeline_gives_the_image_of_the_stock_vae(cases, stock_images, name):
    case = cases[name]
    assert_same_image(image(build(case, make_vae(case.sixteen_channels)), case.call), stock_images[name])

    pipe = build(case, make_stock_vae(case.sixteen_channels, seed=7))
    pipe.vae = make_vae(case.sixteen_channels)
    assert_same_image(image(pipe, case.call), stock_images[name])


def test_slicing_decodes_a_batch_image_by_image_to_the_same_images(cases):
    case, vae = cases["sd"], make_vae()
    pipe = build(case, vae)
    whole = image(pipe, case.call, num_images_per_prompt=3)

    batches: list[int] = []
    vae.decoder.register_forward_pre_hook(lambda module, inputs: batches.append(inputs[0].shape[0]))
    pipe.vae.enable_slicing()
    sliced = image(pipe, case.call, num_images_per_prompt=3)
    assert batches == [1, 1, 1]
    assert_same_image(sliced, whole)

    batches.clear()
    pipe.vae.disable_slicing()
    image(pipe, case.call, num_images_per_prompt=3)
    assert batches == [3]


def test_sdxl_upcasts_a_half_precision_vae(cases):
    case = cases["sdxl"]
    images = []
    for vae in (make_vae(), make_vae().to_diffusers()):
        pipe = build(case, vae.to(torch.float16))
        images.append(image(pipe, case.call))
    assert torch.isfinite(images[0]).all()
    assert_same_image(images[0], images[1])


def test_sdxl_fuses_projections_and_divides_them_again(cases, stock_images):
    case = cases["sdxl"]
    pipe = build(case, make_vae())
    names = pipe.vae.state_dict().keys()
    pipe.fuse_qkv_projections(unet=False)
    assert {type(p).__name__ for p in pipe.vae.attn_processors.values()} == {"FusedAttnProcessor2_0"}
    assert_same_image(image(pipe, case.call), stock_images["sdxl"])
    pipe.unfuse_qkv_projections(unet=False)
    assert {type(p).__name__ for p in pipe.vae.attn_processors.values()} == {"AttnProcessor2_0"}
    assert pipe.vae.state_dict().keys() == names
    assert_same_image(image(pipe, case.call), stock_images["sdxl"])


class CountingHook(ModelHook):
    def __init__(self) -> None:
        self.calls = 0

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.calls += 1
        return args, kwargs


def test_offload_hook_runs_on_encode_and_on_decode():
    vae, hook = make_vae(), CountingHook()
    add_hook_to_module(vae, hook)
    with torch.no_grad():
        vae.encode(noise(1, 3, SIDE, SIDE))
        assert hook.calls == 1
        vae.decode(noise(1, 4, SIDE // 2, SIDE // 2))
        assert hook.calls == 2


def test_model_offloading_works_through_a_pipeline(cases, stock_images, monkeypatch):
    case, vae = cases["sd_img2img"], make_vae()
    vae, offload = cpu_offload_with_hook(vae, execution_device="cpu")
    onloads = []
    original = vae._hf_hook.pre_forward

    def counted(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        onloads.append(module)
        return original(module, *args, **kwargs)

    monkeypatch.setattr(vae._hf_hook, "pre_forward", counted)
    assert_same_image(image(build(case, vae), case.call), stock_images["sd_img2img"])
    assert [module is vae for module in onloads] == [True, True]  # the photograph's encode, the result's decode
    offload.offload()


RELOAD = """
import sys, torch

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "sdvae":
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Absent())
from diffusers import AutoencoderKL, DiffusionPipeline

folder = sys.argv[1]
for name, (absent, call) in torch.load(f"{folder}/calls.pt", weights_only=True).items():
    pipe = DiffusionPipeline.from_pretrained(f"{folder}/{name}", **dict.fromkeys(absent))
    assert type(pipe.vae) is AutoencoderKL, type(pipe.vae)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipe(**call, num_inference_steps=2, output_type="np", generator=generator).images
    torch.save(torch.from_numpy(images), f"{folder}/{name}.pt")
assert "sdvae" not in sys.modules
"""


@pytest.mark.slow
def test_saved_pipelines_load_where_sdvae_is_not_installed(cases, stock_images, tmp_path):
    calls = {}
    for name, case in cases.items():
        pipe = build(case, make_vae(case.sixteen_channels))
        pipe.vae = pipe.vae.to_diffusers()
        pipe.save_pretrained(tmp_path / name)
        calls[name] = ([part for part, value in case.parts.items() if value is None], case.call)
    torch.save(calls, tmp_path / "calls.pt")
    # one process for all: importing diffusers takes longer than the pictures
    done = subprocess.run([sys.executable, "-c", RELOAD, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in cases:
        assert_same_image(torch.load(tmp_path / f"{name}.pt", weights_only=True), stock_images[name])


@pytest.mark.parametrize("name", ["sd", "dit"])
def test_pipeline_saved_with_our_class_reloads_as_our_class(cases, stock_images, name, tmp_path):
    case = cases[name]
    build(case, make_vae()).save_pretrained(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=False)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.vae) is AutoencoderKL
    assert_same_image(image(pipe, case.call), stock_images[name])


def test_our_vae_replaces_the_one_of_a_saved_pipeline(cases, stock_images, tmp_path):
    case = cases["sd"]
    build(case, make_stock_vae(seed=7)).save_pretrained(tmp_path)
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path, vae=make_vae())
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.vae) is AutoencoderKL
    assert_same_image(image(pipe, case.call), stock_images["sd"])
