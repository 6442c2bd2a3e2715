"""Run the nodes inside ComfyUI: python tests/comfyui_real.py COMFYUI, the folder of a clone.

ComfyUI's own loader imports comfyui/, and the nodes are compared with «VAE Decode» and «VAE Encode», on VAEs of SD's
and Flux's shape with random weights, and on one whose layers were told to pad by reflection.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from sdvae import AutoencoderKL
from sdvae.weights import to_ldm

NODES = Path(__file__).parents[1] / "comfyui"
LEVELS = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
LEVELS |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
SHAPES = {"SD": {}, "Flux": {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}}


def error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    return float((found - wanted).abs().max() / wanted.std())


@torch.inference_mode()
def main(comfyui: str) -> None:
    sys.path.insert(0, comfyui)
    sys.argv = ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import nodes
    from comfy.sd import VAE

    assert asyncio.run(nodes.load_custom_node(str(NODES)))
    decode_exact, encode_exact = (
        nodes.NODE_CLASS_MAPPINGS[name]() for name in ("SdvaeDecodeExact", "SdvaeEncodeExact")
    )
    for name, changes in SHAPES.items():
        torch.manual_seed(0)
        weights = AutoencoderKL(**LEVELS, **changes).state_dict()
        vae = VAE(sd=to_ldm(weights), dtype=torch.float32)
        for padding in ("zeros", "reflect") if name == "SD" else ("zeros",):
            for module in vae.first_stage_model.modules():
                if isinstance(module, nn.Conv2d) and any(module.padding):
                    module.padding_mode = padding
            places = {key: weight.data_ptr() for key, weight in vae.first_stage_model.state_dict().items()}
            pixels = torch.rand(2, 75, 58, 3)
            (wanted,) = nodes.VAEEncode().encode(vae, pixels)
            (latents,) = encode_exact.encode(pixels, vae, memory_mib=64)
            (image,) = nodes.VAEDecode().decode(vae, wanted)
            (found,) = decode_exact.decode(wanted, vae, memory_mib=0)
            errors = error(latents["samples"], wanted["samples"]), error(found, image)
            assert max(errors) <= 1e-3, (name, padding, errors)
            assert places == {key: weight.data_ptr() for key, weight in vae.first_stage_model.state_dict().items()}
            print(f"{name}, {padding}: encode {errors[0]:.1e}, decode {errors[1]:.1e}")


if __name__ == "__main__":
    main(*sys.argv[1:])
