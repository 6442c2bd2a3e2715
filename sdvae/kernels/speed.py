"""`speed_up`, and the rules by which it chooses the form of each layer."""

from __future__ import annotations

import logging

import torch
from torch import nn

from sdvae.errors import InputError
from sdvae.kernels.calibration import faster, fastest
from sdvae.kernels.fitness import layout_of
from sdvae.kernels.forms import FORMS, Forms, own_modules, use
from sdvae.kernels.winograd import has_nnpack
from sdvae.model import Autoencoder
from sdvae.model.blocks import Upsample
from sdvae.model.config import PADDING_MODES
from sdvae.model.plain import has_geometry, kind_of
from sdvae.runtime import keep_freed_memory

logger = logging.getLogger(__name__)


def speed_up(
    vae: Autoencoder,
    dtype: torch.dtype | None = None,
    *,
    calibrate: tuple[int, int] | None = None,
    forms: Forms | None = None,
) -> Forms:
    """Make `vae` faster, in place. Weights, state-dict names and, up to rounding, the function stay the same.

    Without `calibrate`, rules choose what was fastest on the machines of docs/speed.md. On a CPU, a VAE for which
    `takes_winograd` is true (on many machines SD's VAE in fp32) gets Winograd's convolutions, which are used for maps
    of the sizes where `winograd_pays` is true. It also gets slicing: without gradients, a batch is computed image by
    image, as those kernels do (`disable_slicing` undoes that). Every other VAE gets the channels-last layout, which its
    outputs then have too. Upsamplers whose conv does not use Winograd use four taps instead of nine, except under
    `enable_tiling`. On a GPU nothing has been measured, so the rules change nothing there, and a warning says so.

    With `calibrate`, the forms are timed here, on maps of the sizes that an image of this height and width has, and
    the fastest are kept: those that were found layer by layer, or those of the rules if the whole VAE is faster in
    them. Which ones these are depends on the machine, and on what else it does at that time, so two calls may choose
    differently; each choice computes the same function up to rounding. To use one choice again, or in several
    processes, pass what was returned as `forms`.

    Deep copies, DDP and gradient checkpointing work as before. Under torch.compile, for other dtypes, after a move to a
    device of another type, and if a layer was changed afterwards, the ordinary layers are used. A second call replaces
    the choice of the first.

    On a CPU the process also keeps the memory that it frees from now on (`keep_freed_memory(False)` undoes that).

    docs/speed.md has the measured times. The custom gradients can be differentiated only once.

    Args:
        vae: a VAE whose weights have their final dtype and are on their final device.
        dtype: the dtype of its computation under autocast; by default the dtype of its weights.
        calibrate: height and width of the images, in pixels, for which the forms are timed, without gradients. On a CPU
            it takes about as long as ten such images there and back. Hooks see random images meanwhile.
        forms: what an earlier call returned, for a VAE of the same configuration on the same type of device.

    Returns:
        What was chosen. After calibration it is logged at level INFO, otherwise at DEBUG.

    Raises:
        InputError: when `forms` or `calibrate` does not fit the VAE.
    """
    sides = [type(side) for side in calibrate] if isinstance(calibrate, tuple | list) else calibrate
    if sides not in (None, [int, int]):
        raise InputError(f"got calibrate={calibrate}; need height and width of the images, in pixels")
    device_type = vae.device.type
    if device_type == "cpu":
        keep_freed_memory()
    if device_type not in FORMS:
        logger.warning("the VAE is on %s and stays as it is: there are kernels for CPUs and CUDA alone", vae.device)
        return Forms()
    if device_type != "cpu" and calibrate is None and forms is None:
        logger.warning(
            "the VAE is on %s and keeps torch's layers: other kernels were not measured there; pass "
            "calibrate=(height, width) to time them",
            vae.device,
        )
    if forms is None and calibrate is not None:
        ordinary, slicing = as_it_is(vae), vae.use_slicing
        try:
            measured = fastest(vae, calibrate, dtype or vae.dtype)
            forms = faster(vae, calibrate, dtype or vae.dtype, by_rules(vae, dtype), measured)
        except BaseException:
            use(vae, ordinary)  # torch's layers, in the layout that they had
            raise
        finally:
            vae.use_slicing = slicing
    forms = by_rules(vae, dtype) if forms is None else forms
    use(vae, forms)
    logger.log(logging.DEBUG if calibrate is None else logging.INFO, "speed_up on %s: %s", vae.device, forms)
    return forms


def by_rules(vae: Autoencoder, dtype: torch.dtype | None = None) -> Forms:
    """The forms for a machine that is not measured: on a CPU those of docs/speed.md, elsewhere the ordinary layers."""
    if vae.device.type != "cpu":
        return as_it_is(vae)
    winograd = takes_winograd(vae, dtype)
    layers = {name: "four taps" for name, module in own_modules(vae) if kind_of(module) is Upsample}
    if winograd:
        convs = [name for name, module in own_modules(vae) if is_conv3x3(module)]
        layers |= dict.fromkeys(convs, "winograd")
    return Forms("contiguous" if winograd else "channels_last", layers)


def as_it_is(vae: Autoencoder) -> Forms:
    """torch's layers, in the layout that the weights have."""
    weight = next(weight for weight in vae.decoder.parameters() if weight.ndim == 4)
    return Forms("channels_last" if layout_of(weight) == torch.channels_last else "contiguous")


def is_conv3x3(module: nn.Module) -> bool:
    """Whether it is a 3x3 conv of stride 1 that has no hook of its own class, such as a parametrization."""
    return kind_of(module) is nn.Conv2d and has_geometry(module, 3, padding=1, modes=PADDING_MODES)


def takes_winograd(vae: Autoencoder, dtype: torch.dtype | None = None) -> bool:
    """Whether the VAE computes in fp32, with at least 64 channels at full resolution, on a machine where Winograd pays.

    The size of the images is not considered: below 128x128 pixels, SD's VAE has few maps for which Winograd pays.
    """
    wide = vae.config.block_out_channels[0] >= 64
    return wide and (dtype or vae.dtype) == torch.float32 and has_nnpack() and _multiplies_256_bits()


def _multiplies_256_bits() -> bool:
    """Whether the machine multiplies 256 bits at a time.

    A machine that multiplies 512 bits computes direct convolutions twice as fast, but not NNPACK's kernels, which were
    written for AVX2. Measured on AVX2 and on AMD's Zen 4, which computes AVX-512 in two halves. Zen 5 does not; it is
    recognised by AVX-VNNI, which Zen 4 lacks.
    """
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        return True
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    amd = str(features.get("cpu_name", "")).startswith("AMD")
    return amd and bool(features.get("avx512_bf16")) and not features.get("avx_vnni", True)
