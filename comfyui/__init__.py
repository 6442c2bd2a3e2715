"""Nodes for ComfyUI that decode and encode images of any size in bounded memory, with the result of the whole image.

ComfyUI imports this folder when it lies in, or is linked into, its `custom_nodes`, and sdvae is installed in its Python
(docs/inference.md). The nodes take the VAE of any «Load VAE» or «Load Checkpoint» node of the Stable Diffusion kind
(SD 1 and 2, SDXL, SD3, Flux.1). The weights are those that ComfyUI has loaded, in its dtype and on its device.
"""

from __future__ import annotations

from typing import Any

import torch
from comfy import model_management
from torch import Tensor, nn

from sdvae import AutoencoderKL, InputError
from sdvae.weights.config import infer_config
from sdvae.weights.load import check_fit
from sdvae.weights.names import from_ldm

MEMORY: tuple[str, dict[str, Any]] = (
    "INT",
    {
        "default": 0,
        "min": 0,
        "max": 2**20,
        "step": 64,
        "tooltip": "What the device may use beside weights, input and output, in MiB. Maps that do not fit are kept in "
        "the host's memory. 0: 70 % of what is free.",
    },
)


class VAEDecodeExact:
    """Latents to images."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "decode"
    CATEGORY = "latent"
    DESCRIPTION = "Decodes large images in bounded memory, without tiles: the result is that of «VAE Decode»."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"samples": ("LATENT",), "vae": ("VAE",), "memory_mib": MEMORY}}

    @torch.no_grad()
    def decode(self, samples: dict[str, Any], vae: Any, memory_mib: int = 0) -> tuple[Tensor]:
        """Decode each image of a batch by itself.

        Args:
            samples: ComfyUI's latents: `samples`, (B, C, h, w), unscaled.
            vae: a `comfy.sd.VAE`.
            memory_mib: the budget; 0 for none.

        Returns:
            (B, H, W, 3) fp32 in [0, 1], on ComfyUI's device for results.

        Raises:
            InputError: for a VAE of another kind, latents that are not its own, or too small a budget.
        """
        z = samples["samples"]
        ours = streaming(vae, memory_mib, lambda: vae.memory_used_decode(z.shape, vae.vae_dtype))
        images = [
            ours.decode(one.to(vae.device, vae.vae_dtype)).sample.to(vae.output_device).float() for one in z.split(1)
        ]
        return (vae.process_output(torch.cat(images)).movedim(1, -1),)


class VAEEncodeExact:
    """Images to latents."""

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "encode"
    CATEGORY = "latent"
    DESCRIPTION = "Encodes large images in bounded memory, without tiles: the result is that of «VAE Encode»."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"pixels": ("IMAGE",), "vae": ("VAE",), "memory_mib": MEMORY}}

    @torch.no_grad()
    def encode(self, pixels: Tensor, vae: Any, memory_mib: int = 0) -> tuple[dict[str, Tensor]]:
        """Encode each image of a batch by itself, to the mode of its posterior.

        Args:
            pixels: (B, H, W, 3 or more) in [0, 1]; as in «VAE Encode», the middle is cut out to multiples of 8.
            vae: a `comfy.sd.VAE`.
            memory_mib: the budget; 0 for none.

        Returns:
            ComfyUI's latents: `samples`, (B, C, H/8, W/8) fp32, unscaled.

        Raises:
            InputError: for a VAE of another kind, or too small a budget.
        """
        vae.throw_exception_if_invalid()
        x = vae.vae_encode_crop_pixels(pixels[..., :3]).movedim(-1, 1)
        ours = streaming(vae, memory_mib, lambda: vae.memory_used_encode(x.shape, vae.vae_dtype))
        latents = []
        for image in x.split(1):
            posterior = ours.encode(vae.process_input(image).to(vae.device, vae.vae_dtype)).latent_dist
            latents.append(posterior.mode().to(vae.output_device).float())
        return ({"samples": torch.cat(latents)},)


def streaming(vae: Any, memory_mib: int, usual_bytes: Any) -> AutoencoderKL:
    """This package's class around the weights of a `comfy.sd.VAE`, which ComfyUI brings to its device first.

    Nothing is copied, except weights that ComfyUI keeps elsewhere under `--lowvram`. The object is made for one call:
    ComfyUI moves the weights away when it needs the memory, and patches them.

    Args:
        vae: the `comfy.sd.VAE`.
        memory_mib: the budget; 0 for 70 % of the free memory.
        usual_bytes: gives what ComfyUI frees for the whole image, which it also does here if there is no budget.

    Raises:
        InputError: for a VAE of another kind.
    """
    vae.throw_exception_if_invalid()
    model = vae.first_stage_model
    budget = memory_mib * 2**20 or None
    model_management.load_models_gpu([vae.patcher], memory_required=budget or usual_bytes(), force_full_load=True)
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d) and any(module.padding)]
    padding = {conv.padding_mode for conv in convs}
    patched = any(getattr(module, "weight_function", None) for module in model.modules())
    if len(padding) != 1 or patched:
        what = "patches its weights layer by layer" if patched else f"has convolutions that pad with {sorted(padding)}"
        raise InputError(f"got a VAE ({type(model).__name__}) that {what}; need plain layers of one padding")
    weights = {name: weight.detach() for name, weight in model.state_dict(keep_vars=True).items()}
    try:
        weights = from_ldm(weights)
        config = infer_config(weights, {"scaling_factor": 1.0, "padding_mode": padding.pop()}, "it")
        with torch.device("meta"):  # only shapes: no memory, no random initialisation
            ours = AutoencoderKL(**config)
        check_fit(ours.state_dict(), weights, "it")
    except InputError as error:
        raise InputError(
            f"got a VAE ({type(model).__name__}) that is not of the Stable Diffusion kind: {error}; use «VAE Decode»"
        ) from error
    ours.load_state_dict({name: weight.to(vae.device, vae.vae_dtype) for name, weight in weights.items()}, assign=True)
    ours.eval().enable_tiling(memory_bytes=budget)
    return ours


NODE_CLASS_MAPPINGS = {"SdvaeDecodeExact": VAEDecodeExact, "SdvaeEncodeExact": VAEEncodeExact}
NODE_DISPLAY_NAME_MAPPINGS = {
    "SdvaeDecodeExact": "VAE Decode (exact, bounded memory)",
    "SdvaeEncodeExact": "VAE Encode (exact, bounded memory)",
}
