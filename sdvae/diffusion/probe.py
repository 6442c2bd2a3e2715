"""The probe: how much a small diffusion model learns about a VAE's latents in a short training of fixed length.

The network, its noise and its loss are those of `sdvae.diffusion.denoiser`. It is trained on most of the latents, and
then denoises the others at fixed noise levels. Its squared error says little by itself: it depends on the spectrum of
the latents and on the number of their channels. So it is divided by that of the best linear denoiser
(`sdvae.diffusion.gaussian`) on the same noisy latents. The ratio does not depend on what the network predicts (v, ε or
z), since at one noise level all of these errors differ by a factor.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor
from tqdm import tqdm

from sdvae.diffusion.denoiser import Batch, new_denoiser, new_scheduler, train
from sdvae.diffusion.gaussian import GaussianDenoiser

WIDTHS = (32, 48, 64)  # of the UNet: 0.95 M parameters for four channels
BATCH_SIZE = 16
LATENT_MULTIPLE = 2 ** (len(WIDTHS) - 1)  # rows and columns of latents, which the UNet halves at each level
HELD_OUT = 5  # every fifth image is not trained on
LOG_SNR = (-4.0, -2.0, 0.0, 2.0, 4.0)  # log(α²/σ²) of the noise levels: σ/α from 7.4 down to 0.14


@dataclass(frozen=True)
class NoiseLevel:
    """The errors at one noise level, for each latent element, in the mean over the images that were held out.

    Attributes:
        log_snr: log(α²/σ²).
        error: mean squared error of the probe's estimate of z, whose variance is 1.
        linear_error: that of the best linear denoiser.
    """

    log_snr: float
    error: float
    linear_error: float


@dataclass(frozen=True)
class ProbeResult:
    """The result of the probe.

    Attributes:
        levels: the errors at each noise level.
        ratio: (held out,) float64; for each image its error divided by the mean error of the linear denoiser, in the
            mean over the noise levels. Below 1 the probe has learned what no linear denoiser knows.
        error: (held out,) float64; for each image its error, in the mean over the noise levels.
        held_out: the places of these images in the set.
    """

    levels: list[NoiseLevel]
    ratio: Tensor
    error: Tensor
    held_out: list[int]


def run_probe(latents: Tensor, *, steps: int, seed: int, device: torch.device, name: str = "probe") -> ProbeResult:
    """Train the probe on four fifths of a set of latents, and denoise the others.

    On a CPU with the same number of threads the result is the same to the bit.

    Args:
        latents: (N, C, h, w) with N at least HELD_OUT, and h and w multiples of LATENT_MULTIPLE; each channel with a
            mean of 0 and a variance of 1.
        steps: number of training steps, of BATCH_SIZE latents each.
        seed: of the weights, the order of the latents and the noise.
        device: where the network is trained.
        name: what the progress bar shows.
    """
    places = torch.arange(len(latents))
    held_out = places[places % HELD_OUT == HELD_OUT - 1]
    trained = latents[places % HELD_OUT != HELD_OUT - 1].to(device)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = new_denoiser(latents.shape[1], latents.shape[3], WIDTHS).to(device)
    scheduler = new_scheduler()
    training = train(model, scheduler, _batches(trained, generator), steps=steps, generator=generator)
    for _ in tqdm(training, f"{name}, probe", total=steps, unit="step"):
        pass
    return _denoised(model, scheduler, GaussianDenoiser(trained), latents[held_out], held_out.tolist(), generator)


def _batches(latents: Tensor, generator: torch.Generator) -> Iterator[Batch]:
    """Batches without end, in a new order in each epoch; a batch may begin in one epoch and end in the next."""
    order = (int(i) for _ in itertools.count() for i in torch.randperm(len(latents), generator=generator))
    while True:
        yield latents[list(itertools.islice(order, BATCH_SIZE))], None


@torch.inference_mode()
def _denoised(
    model: UNet2DModel,
    scheduler: DDIMScheduler,
    linear: GaussianDenoiser,
    latents: Tensor,
    places: list[int],
    generator: torch.Generator,
) -> ProbeResult:
    levels, errors, ratios = [], [], []
    for log_snr in LOG_SNR:
        t = _timestep(scheduler, log_snr)
        signal = float(scheduler.alphas_cumprod[t])
        alpha, sigma = math.sqrt(signal), math.sqrt(1 - signal)
        of_probe, of_linear = [], []
        for z in latents.split(BATCH_SIZE):
            noisy = alpha * z + sigma * torch.randn(z.shape, generator=generator)
            v = model(noisy.to(model.device), timestep=t).sample.cpu()
            of_probe.append(_error(alpha * noisy - sigma * v, z))
            of_linear.append(_error(linear(noisy, alpha, sigma), z))
        error, linear_error = torch.cat(of_probe), float(torch.cat(of_linear).mean())
        errors.append(error)
        ratios.append(error / linear_error)
        levels.append(NoiseLevel(math.log(signal / (1 - signal)), float(error.mean()), linear_error))
    return ProbeResult(levels, torch.stack(ratios).mean(dim=0), torch.stack(errors).mean(dim=0), places)


def _timestep(scheduler: DDIMScheduler, log_snr: float) -> int:
    """The t of which log(ᾱ/(1 - ᾱ)) is nearest to log_snr."""
    return int((torch.logit(scheduler.alphas_cumprod.double()) - log_snr).abs().argmin())


def _error(estimate: Tensor, z: Tensor) -> Tensor:
    """Mean squared error of each image, (B,) float64."""
    return (estimate - z).double().square().mean(dim=(1, 2, 3))
