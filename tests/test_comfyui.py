"""The nodes of comfyui/: ComfyUI's conventions, the whole image's values, and no copies of its weights.

ComfyUI is not a package that can be installed. Most tests use stand-ins for what the nodes take from it. With
COMFYUI=path/to/a/clone one more test runs them in the real one (tests/comfyui_real.py says what it needs).
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdvae import AutoencoderKL, InputError
from sdvae.model import tiling
from sdvae.weights import to_ldm

ROOT = Path(__file__).parents[1]


class Network(nn.Module):
    """Layers under LDM's names, with the weights of a VAE: what ComfyUI calls `first_stage_model`."""

    def __init__(self, weights: dict[str, Tensor]):
        super().__init__()
        for key in [key for key in weights if key.endswith(".weight")]:
            weight, name = weights[key], key.removesuffix(".weight")
            layer: nn.Module
            if weight.ndim == 1:
                layer = nn.GroupNorm(1, len(weight))
            else:
                layer = nn.Conv2d(
                    *weight.shape[1::-1],
                    weight.shape[2],
                    padding=int(weight.shape[2] == 3 and "downsample" not in name),
                )
            layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(weights[f"{name}.bias"])
            *path, last = name.split(".")
            parent: nn.Module = self
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            parent.add_module(last, layer)


class VAE:
    """What the nodes use of `comfy.sd.VAE` (comfy/sd.py)."""

    device = output_device = torch.device("cpu")

    def __init__(self, vae: AutoencoderKL):
        self.first_stage_model: Any = Network(to_ldm(vae.state_dict()))
        self.vae_dtype = vae.dtype
        self.patcher = object()
        self.process_input = lambda image: image * 2.0 - 1.0
        self.process_output = lambda image: torch.clamp((image + 1.0) / 2.0, min=0.0, max=1.0)

    def throw_exception_if_invalid(self) -> None:
        if self.first_stage_model is None:
            raise RuntimeError("VAE is invalid")

    def vae_encode_crop_pixels(self, pixels: Tensor) -> Tensor:
        for d in (1, 2):
            extra = pixels.shape[d] % 8
            pixels = pixels.narrow(d, extra // 2, pixels.shape[d] - extra)
        return pixels

    def memory_used_decode(self, shape: torch.Size, dtype: torch.dtype) -> int:
        return 1000 * shape[2] * shape[3]

    memory_used_encode = memory_used_decode


@pytest.fixture
def comfy(monkeypatch) -> Any:
    """The module of the nodes, imported as ComfyUI does, with `loaded`: what was asked of its memory management."""
    management, parent = ModuleType("comfy.model_management"), ModuleType("comfy")
    loaded: list[tuple[Any, dict[str, Any]]] = []
    management.load_models_gpu = lambda models, **named: loaded.append((models, named))  # type: ignore[attr-defined]
    parent.model_management = management  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "comfy", parent)
    monkeypatch.setitem(sys.modules, "comfy.model_management", management)
    name = str(ROOT / "comfyui")
    spec = importlib.util.spec_from_file_location(name, ROOT / "comfyui" / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    module.loaded = loaded  # type: ignore[attr-defined]
    monkeypatch.setattr(tiling, "STRIPS_A_MAP", 4)
    return module


def sd_vae(**changes: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return AutoencoderKL(block_out_channels=(32,) * 4, **levels, **changes).double().eval()


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.std())


def test_the_nodes_follow_comfyuis_conventions(comfy):
    assert comfy.NODE_CLASS_MAPPINGS.keys() == comfy.NODE_DISPLAY_NAME_MAPPINGS.keys()
    for node in comfy.NODE_CLASS_MAPPINGS.values():
        inputs = node.INPUT_TYPES()["required"]
        assert list(inputs)[1:] == ["vae", "memory_mib"]
        kind, settings = inputs["memory_mib"]
        assert (kind, settings["default"]) == ("INT", 0)
        method = getattr(node(), node.FUNCTION)
        assert set(inputs) <= set(method.__wrapped__.__code__.co_varnames)
        assert len(node.RETURN_TYPES) == 1


@pytest.mark.parametrize(("flux", "mode"), [(False, "zeros"), (True, "reflect")])
@torch.no_grad()
def test_both_directions_have_the_values_of_the_whole_image(flux, mode, comfy):
    shape = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False} if flux else {}
    vae = sd_vae(**shape, padding_mode=mode)
    theirs = VAE(vae)
    for module in theirs.first_stage_model.modules():
        if isinstance(module, nn.Conv2d) and any(module.padding):
            module.padding_mode = mode
    pixels = torch.rand(2, 67, 41, 4, dtype=torch.float64)  # an alpha channel, and sides that are no multiples of 8
    middle = pixels[:, 1:65, :40, :3].movedim(-1, 1) * 2 - 1
    wanted = vae.encode(middle).latent_dist.mode()
    (latents,) = comfy.VAEEncodeExact().encode(pixels, theirs, 64)
    assert latents["samples"].dtype == torch.float32
    assert error(latents["samples"], wanted) <= 1e-5
    image = (vae.decode(wanted).sample / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    (found,) = comfy.VAEDecodeExact().decode({"samples": wanted.float()}, theirs, 0)
    assert found.shape == (2, 64, 40, 3)
    assert found.dtype == torch.float32
    assert error(found, image) <= 1e-5
    asked = [named for models, named in comfy.loaded if models == [theirs.patcher]]
    assert asked == [
        {"memory_required": 64 * 2**20, "force_full_load": True},
        {"memory_required": 1000 * 8 * 5, "force_full_load": True},
    ]


@torch.no_grad()
def test_the_weights_are_comfyuis_own(comfy):
    theirs = VAE(sd_vae())
    ours = comfy.streaming(theirs, 0, lambda: 0)
    assert ours.use_tiling
    places = {weight.data_ptr() for weight in theirs.first_stage_model.parameters()}
    assert {weight.data_ptr() for weight in ours.parameters()} == places
    budget = comfy.streaming(theirs, 3, lambda: 0)
    with pytest.raises(InputError, match=f"got memory_bytes={3 * 2**20}"):
        budget.decode(torch.zeros(1, 4, 512, 512, dtype=torch.float64))


def test_vaes_of_another_kind_are_refused(comfy):
    def refused(theirs: VAE, said: str) -> None:
        with pytest.raises(InputError, match=said):
            comfy.VAEDecodeExact().decode({"samples": torch.zeros(1, 4, 8, 8)}, theirs, 0)

    other = VAE(sd_vae())
    other.first_stage_model.encoder.add_module("time_mix", nn.Conv2d(2, 2, 1))
    refused(other, "not of the Stable Diffusion kind.*encoder.time_mix.*use «VAE Decode»")
    incomplete = VAE(sd_vae())
    del incomplete.first_stage_model.decoder.mid.attn_1.q
    refused(incomplete, "not of the Stable Diffusion kind")
    circular = VAE(sd_vae())
    circular.first_stage_model.encoder.conv_in.padding_mode = "circular"
    refused(circular, r"pad with \['circular', 'zeros'\]")
    patched = VAE(sd_vae())
    patched.first_stage_model.encoder.conv_in.weight_function = [lambda weight: 2 * weight]
    refused(patched, "patches its weights")
    with pytest.raises(InputError, match="got latents of shape"):
        comfy.VAEDecodeExact().decode({"samples": torch.zeros(1, 16, 2, 8, 8)}, VAE(sd_vae()), 0)
    gone = VAE(sd_vae())
    gone.first_stage_model = None
    with pytest.raises(RuntimeError, match="invalid"):
        comfy.VAEEncodeExact().encode(torch.zeros(1, 8, 8, 3), gone, 0)


@pytest.mark.skipif("COMFYUI" not in os.environ, reason="COMFYUI names no clone of ComfyUI")
def test_in_comfyui_itself():
    command = [sys.executable, str(ROOT / "tests" / "comfyui_real.py"), os.environ["COMFYUI"]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=os.environ["COMFYUI"], check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("decode") == 3
    assert done.stdout.count("ours: previews") == 4
