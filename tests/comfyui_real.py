"""Run the nodes inside ComfyUI: python tests/comfyui_real.py COMFYUI, the folder of a clone.

ComfyUI's own loader imports comfyui/, and the nodes are compared with «VAE Decode» and «VAE Encode», on VAEs of SD's
and Flux's shape with random weights, and on one whose layers were told to pad by reflection. Then its previews of a
sampling loop are drawn by students that `save_taesd` wrote into its models folder, by linear maps, and by the published
students that lie in models/vae_approx of the clone, if any do.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sdvae import AutoencoderKL, AutoencoderTiny, load_vae
from sdvae.data import to_image
from sdvae.statistics import RGBFactors
from sdvae.training.initialise import initialise_student
from sdvae.weights import save_taesd, to_ldm
from sdvae.weights.tiny import PUBLISHED

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
    previews()


def previews() -> None:
    """Pictures of ComfyUI's previewers, beside ours."""
    import folder_paths
    import latent_preview
    from comfy import latent_formats
    from comfy.cli_args import LatentPreviewMethod, args

    args.preview_method = LatentPreviewMethod.TAESD
    formats = (latent_formats.SD15, latent_formats.SDXL, latent_formats.SD3, latent_formats.Flux)
    there = Path(folder_paths.get_folder_paths("vae_approx")[0])
    for name, latent_format in zip(PUBLISHED, formats, strict=False):
        z = torch.randn(1, latent_format.latent_channels, 24, 16, generator=torch.Generator().manual_seed(0))
        sources = {"published": there}
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(1)
            student = AutoencoderTiny(latent_channels=latent_format.latent_channels).eval()
            initialise_student(student)
            save_taesd(student, Path(folder) / f"{name}_decoder.safetensors")
            sources["ours"] = Path(folder)
            for whose, place in sources.items():
                if not (place / f"{name}_decoder.safetensors").is_file():
                    continue
                folder_paths.folder_names_and_paths["vae_approx"] = ([str(place)], {".safetensors"})
                folder_paths.filename_list_cache.clear()
                previewer = latent_preview.get_previewer(torch.device("cpu"), latent_format())
                assert isinstance(previewer, latent_preview.TAESDPreviewerImpl)
                wanted = to_image(load_vae(place / f"{name}_decoder.safetensors").decode(z).sample[0])
                difference = levels(previewer.decode_latent_to_preview(z), wanted)
                assert difference <= 1, (name, whose, difference)  # ComfyUI cuts off where we round
                print(f"{name}, {whose}: previews")
        channels = latent_format.latent_channels
        rgb = RGBFactors(torch.randn(channels, 3).double() / channels, torch.rand(3).double() - 0.5, torch.ones(3), 1)
        linear = latent_preview.Latent2RGBPreviewer(rgb.factors.tolist(), rgb.bias.tolist())
        assert levels(linear.decode_latent_to_preview(z), to_image(rgb.decode(z)[0])) <= 1


def levels(found: Image.Image, wanted: Image.Image) -> int:
    """The largest difference of two pictures, of 255 levels."""
    assert found.size == wanted.size
    assert np.asarray(wanted).std() > 5
    return int(np.abs(np.asarray(found, dtype=int) - np.asarray(wanted, dtype=int)).max())


if __name__ == "__main__":
    main(*sys.argv[1:])
