"""Writing a VAE as two ONNX models, in the layout that optimum's pipelines for ONNX Runtime read.

vae_encoder/model.onnx    sample (B, C, H, W) -> latent_parameters (B, 2c, H/f, W/f)
                          of a student: sample (B, C, H, W) -> latent_sample (B, c, H/f, W/f)
vae_decoder/model.onnx    latent_sample (B, c, h, w) -> sample (B, C, f·h, f·w)
config.json               in each folder, the VAE's

The names are those of optimum (github.com/huggingface/optimum-onnx, optimum/exporters/onnx/model_configs.py and
onnxruntime/modeling_diffusion.py). Batch and sides are dynamic.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdvae.errors import InputError, first_few, require
from sdvae.io import refuse_url, replacing
from sdvae.model import Autoencoder, AutoencoderKL, AutoencoderTiny
from sdvae.model.state import rebuilt
from sdvae.roundtrip import link
from sdvae.weights.read import check_tensors

logger = logging.getLogger(__name__)

PARTS = ("encoder", "decoder")
OWN_FILES = ("config.json", "model.onnx", "model.onnx.data")
DTYPES = (torch.float32, torch.float16)
# Latents (batch, height, width) on which a written model is compared with the VAE, and the largest difference that is
# rounding, divided by the standard deviation of the output.
CHECKED = ((1, 2, 3), (2, 7, 4))
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1}
METADATA_KEYS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "latent_channels")


class _Encoder(nn.Module):
    """(B, C, H, W) in [-1, 1] -> mean and log-variance stacked, (B, 2c, H/f, W/f); of a student (B, c, H/f, W/f)."""

    def __init__(self, vae: Autoencoder):
        super().__init__()
        self.vae = vae

    def forward(self, sample: Tensor) -> Tensor:
        encoded: Any = self.vae.encode(sample)
        return encoded.latents if isinstance(self.vae, AutoencoderTiny) else encoded.latent_dist.parameters


class _Decoder(nn.Module):
    """(B, c, h, w), unscaled (of a student scaled) -> images (B, C, f·h, f·w), nominally in [-1, 1]."""

    def __init__(self, vae: Autoencoder):
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: Tensor) -> Tensor:
        decoded: Any = self.vae.decode(latent_sample)
        return link(self.vae, decoded.sample)


def save_onnx(vae: Autoencoder, folder: str | Path) -> list[Path]:
    """Write encoder and decoder as ONNX models, and compare them with the VAE if onnxruntime is installed.

    The models compute in the dtype of the VAE's weights, fp32 or fp16. The metadata of each hold `METADATA_KEYS` and
    `spatial_compression_ratio`, as JSON. Latents are unscaled, as `encode` gives them and `decode` takes them; the
    decoder of a VAE with a Bernoulli likelihood gives images, not logits.

    Args:
        vae: the model, which is not changed; also one that torch.compile, DDP or `speed_up` changed.
        folder: vae_encoder/ and vae_decoder/ are written into it, or replaced, and other content is kept. It may be the
            folder of an optimum pipeline.

    Returns:
        The paths of the two models.

    Raises:
        InputError: for a VAE in another dtype or with class labels, when there is no onnxscript, when a folder of these
            names holds something else, or when ONNX Runtime computes something else than torch.
        OSError: when the folder cannot be written.
    """
    require("onnxscript", "ONNX", "onnx")
    refuse_url(folder, "folder")
    if type(vae) not in (AutoencoderKL, AutoencoderTiny):
        raise InputError(f"got an {type(vae).__name__} for ONNX; need an AutoencoderKL or AutoencoderTiny")
    if vae.dtype not in DTYPES:
        raise InputError(f"got a VAE in {vae.dtype} for ONNX, which ONNX Runtime does not compute; need fp32 or fp16")
    root = Path(folder).expanduser()
    targets = {part: root / f"vae_{part}" for part in PARTS}
    for target in targets.values():
        others = [path.name for path in target.iterdir() if path.name not in OWN_FILES] if target.is_dir() else []
        if others:
            raise InputError(f"{target} holds other things ({first_few(others)}); choose another folder")
    plain = rebuilt(vae, type(vae)).to("cpu").eval()
    check_tensors(plain.state_dict(), "the VAE")
    wrappers = {"encoder": _Encoder(plain).eval(), "decoder": _Decoder(plain).eval()}
    is_checked = find_spec("onnxruntime") is not None
    if not is_checked:
        logger.warning('the models are not compared with the VAE: no onnxruntime; pip install "sdvae[onnx]"')
    for part, target in targets.items():
        with replacing(target) as temporary:
            temporary.mkdir()
            _write(wrappers[part], plain, part, temporary / "model.onnx")
            plain.save_config(temporary)
            if is_checked:
                _check(temporary / "model.onnx", wrappers[part], plain, part)
    return [target / "model.onnx" for target in targets.values()]


def _write(wrapper: nn.Module, vae: Autoencoder, part: str, file: Path) -> None:
    """Export one part with a batch and sides of any size."""
    f, dim = vae.spatial_compression_ratio, torch.export.Dim
    height, width = dim("latent_height"), dim("latent_width")
    if part == "encoder":
        names = "sample", "latent_sample" if isinstance(vae, AutoencoderTiny) else "latent_parameters"
        height, width = f * height, f * width
    else:
        names = "latent_sample", "sample"
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about its own code
        program = torch.onnx.export(
            wrapper,
            (_example(vae, part, (2, 5, 6)),),
            dynamo=True,
            dynamic_shapes=({0: dim("batch"), 2: height, 3: width},),
            input_names=[names[0]],
            output_names=[names[1]],
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update(metadata_of(vae))
    program.save(file)


def metadata_of(vae: Autoencoder) -> dict[str, str]:
    """What a program needs to know of the latents, each value as JSON; keys that the VAE lacks are left out."""
    config: Mapping[str, Any] = vae.config
    known = {key: config[key] for key in METADATA_KEYS if config.get(key) is not None}
    known["spatial_compression_ratio"] = vae.spatial_compression_ratio
    return {key: json.dumps(value) for key, value in known.items()}


def _check(file: Path, wrapper: nn.Module, vae: Autoencoder, part: str) -> None:
    """Compare a model with torch at two sizes.

    Raises:
        InputError: when they differ by more than rounding.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for shape in CHECKED:
        x = _example(vae, part, shape)
        with torch.no_grad():
            wanted = wrapper(x).float()
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        difference = float((torch.from_numpy(found).float() - wanted).abs().max() / wanted.std())
        if not difference <= TOLERANCE[vae.dtype]:
            raise InputError(
                f"the ONNX {part} differs from the VAE by {difference:.2g} standard deviations at {tuple(x.shape)}, "
                "so it is not written; export with --dtype fp32, or report it with the versions of torch and ONNX"
            )


def _example(vae: Autoencoder, part: str, latents: tuple[int, int, int]) -> Tensor:
    """Noise in the shape of the images or latents of a (batch, height, width) of latents."""
    batch, height, width = latents
    f, config = vae.spatial_compression_ratio, vae.config
    shape = (
        (batch, config.in_channels, f * height, f * width)
        if part == "encoder"
        else (batch, config.latent_channels, height, width)
    )
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(vae.dtype)
