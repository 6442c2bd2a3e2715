"""The published VAEs that share their shapes with others, and what tells them apart in a file.

A file that holds a whole checkpoint has the diffusion model's and the text encoders' weights beside the VAE's, and
their names tell which model the VAE belongs to. Otherwise the file's metadata may say so. The shapes of a VAE's own
weights are the same for SD 1, SD 2 and SDXL, and for SD3 and Flux, whose latents are scaled differently.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """Models that use the same VAE.

    Attributes:
        name: as people call them.
        latent_channels: of their VAE.
        factors: keys of config.json that no shape tells.
        keys: matches the beginning of a key that only their whole checkpoints have.
        architecture: matches the metadata's `modelspec.architecture` (github.com/Stability-AI/ModelSpec).
    """

    name: str
    latent_channels: int
    factors: Mapping[str, Any]
    keys: re.Pattern[str]
    architecture: re.Pattern[str] | None = None


def _family(name: str, channels: int, factors: Mapping[str, Any], keys: str, architecture: str = "") -> Family:
    return Family(name, channels, factors, re.compile(keys), re.compile(architecture) if architecture else None)


# The factors are those of the published config.json files, and equal ComfyUI's (comfy/latent_formats.py) and LDM's
# (appendix G: 0.18215 = 1/std of SD 1's latents). Flux: black-forest-labs/flux, src/flux/util.py.
SD = {"scaling_factor": 0.18215}
SDXL = {"scaling_factor": 0.13025}
SD3 = {"scaling_factor": 1.5305, "shift_factor": 0.0609}
FLUX = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
PLAYGROUND = {
    "scaling_factor": 0.5,
    "latents_mean": (-1.6574, 1.886, -1.383, 2.5155),
    "latents_std": (8.4927, 5.9022, 6.5498, 5.2299),
}
X4_UPSCALER = {"scaling_factor": 0.08333}

_UNET = r"model\.diffusion_model\."
_DIT = r"(model\.|diffusion_model\.|transformer\.)*"
# The first row that fits is taken. Playground's and the upscaler's checkpoints also have keys of a row below.
FAMILIES = (
    _family("Playground 2.5", 4, PLAYGROUND, r"edm_(mean|std)$"),
    _family("the SD x4 upscaler", 4, X4_UPSCALER, rf"{_UNET}input_blocks\.10\.0\.skip_connection\.|low_scale_model\."),
    _family(
        "SDXL",  # in SD's U-Net the attention blocks have one transformer layer
        4,
        SDXL,
        rf"conditioner\.embedders\.|{_UNET}input_blocks\.4\.1\.transformer_blocks\.1\.",
        r"stable-diffusion-xl",
    ),
    _family("AuraFlow", 4, SDXL, rf"{_DIT}(double_layers\.0\.attn\.w2q\.|cond_seq_linear\.)", r"aura-?flow"),
    _family("Hunyuan-DiT", 4, SDXL, rf"{_DIT}mlp_t5\.0\.", r"hunyuan-dit"),
    _family("SD3", 16, SD3, rf"{_DIT}joint_blocks\.", r"stable-diffusion-v?3"),
    _family("Flux or Chroma", 16, FLUX, rf"{_DIT}double_blocks\.0\.img_attn\.", r"flux[-.]1|chroma"),
    _family("HiDream", 16, FLUX, rf"{_DIT}double_stream_blocks\.", r"hidream"),
    _family(
        "Lumina 2 or Z-Image",
        16,
        FLUX,
        rf"{_DIT}(cap_embedder\.0\.|layers\.0\.adaLN_modulation\.)",
        r"lumina-2|z-image",
    ),
    _family(
        "SD 1 or 2",
        4,
        SD,
        rf"cond_stage_model\.|{_UNET}input_blocks\.1\.1\.transformer_blocks\.",
        r"stable-diffusion-v[12]",
    ),
)


# Published VAEs that were trained with reflect padding, which none of their files says. Anzhc's model card asks for it.
REFLECTING = re.compile(r"ms[-_ ]?lc[-_ ]?eq[-_ ]?d[-_ ]?vr", re.IGNORECASE)


def family_of(keys: Iterable[str], metadata: Mapping[str, str], latent_channels: int) -> tuple[Family, str] | None:
    """The family that a file's VAE belongs to.

    Args:
        keys: all keys of the file, the VAE's and others.
        metadata: of a safetensors file. The keys count more, since merged files often keep the metadata of one parent.
        latent_channels: of the VAE in the file. A family whose VAE has another number does not count.

    Returns:
        The family, and the key or the entry of the metadata that shows it; None if nothing does.
    """
    keys = list(keys)
    fitting = [family for family in FAMILIES if family.latent_channels == latent_channels]
    for family in fitting:
        if shown := next((key for key in keys if family.keys.match(key)), None):
            return family, shown
    said = metadata.get("modelspec.architecture", "").lower()
    for family in fitting:
        if family.architecture is not None and family.architecture.match(said):
            return family, f"modelspec.architecture {said}"
    return None
