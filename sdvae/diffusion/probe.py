"""The probe: how much a small diffusion model learns about a VAE's latents in a short training of fixed length.

The network, its noise and its loss are those of `sdvae.diffusion.denoiser`. It is trained on most of the latents, and
then denoises the others at fixed noise levels. Its squared error says little by itself: it depends on the spectrum of
the latents and on the number of their channels. So it is divided by that of the best linear denoiser
(`sdvae.diffusion.linear`) on the same noisy latents. The ratio does not depend on what the network predicts (v, ε or
z), since at one noise level all of these errors differ by a factor.

What the linear denoiser predicts is also added to what the network predicts, whose last layer begins at zero. So the
ratio begins at 1, and the short training is spent on what is not linear. Without that, a network with fewer channels
than its input needs could not even pass the noise on, and a space with many channels would look hard to learn.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn
from tqdm import tqdm

from sdvae.diffusion.denoiser import Batch, new_denoiser, new_scheduler, train
from sdvae.diffusion.linear import LinearDenoiser

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


class Probe(nn.Module):
    """v(z_t, t): the linear denoiser's, and a correction by a small UNet, which is zero before the training.

    Args:
        linear: the linear denoiser of the latents.
        channels: C of the latents.
        side: h and w of the latents.
    """

    def __init__(self, linear: LinearDenoiser, channels: int, side: int):
        super().__init__()
        self.linear = linear
        self.scheduler: Any = new_scheduler()  # Any, since mypy does not see what diffusers' classes inherit
        network: Any = new_denoiser(channels, side, WIDTHS)
        for parameter in network.conv_out.parameters():
            nn.init.zeros_(parameter)
        self.network = network

    def forward(self, noisy: Tensor, timestep: Tensor, class_labels: None = None) -> UNet2DOutput:
        """(B, C, h, w), (B,) -> (B, C, h, w) in `sample`."""
        linear = self.linear(noisy, self.scheduler.alphas_cumprod.to(noisy.device)[timestep])
        return UNet2DOutput(sample=linear + self.network(noisy, timestep).sample)


def run_probe(latents: Tensor, *, steps: int, seed: int, device: torch.device, name: str = "probe") -> ProbeResult:
    """Train the probe on four fifths of a set of latents, and denoise the others.

    On a CPU with the same number of threads the result is the same to the bit.

    Args:
        latents: (N, C, h, w) with N at least HELD_OUT, and h and w equal and multiples of LATENT_MULTIPLE; each channel
            with a mean of 0 and a variance of 1.
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
        model = Probe(LinearDenoiser(trained), latents.shape[1], latents.shape[3]).to(device)
    training = train(model, model.scheduler, _batches(trained, generator), steps=steps, generator=generator)
    for _ in tqdm(training, f"{name}, probe", total=steps, unit="step"):
        pass
    return denoise(model, latents[held_out].to(device), held_out.tolist(), generator)


@torch.inference_mode()
def denoise(model: Probe, latents: Tensor, places: list[int], generator: torch.Generator) -> ProbeResult:
    """The errors of a probe and of its linear denoiser at the noise levels of LOG_SNR.

    Args:
        model: the probe, in evaluation mode.
        latents: (N, C, h, w) that it was not trained on, on its device.
        places: their places in the set, for the result.
        generator: of the noise, on the CPU.
    """
    signals = model.scheduler.alphas_cumprod
    levels, errors, ratios = [], [], []
    for log_snr in LOG_SNR:
        t = int((torch.logit(signals.double()) - log_snr).abs().argmin())
        signal = float(signals[t])
        alpha, sigma = math.sqrt(signal), math.sqrt(1 - signal)
        found: list[Tensor] = []
        for z in latents.split(BATCH_SIZE):
            noisy = alpha * z + sigma * torch.randn(z.shape, generator=generator).to(z)
            steps = torch.full((len(z),), t, device=z.device)
            velocities = model(noisy, steps).sample, model.linear(noisy, signals[t].expand(len(z)))
            estimates = torch.stack([alpha * noisy - sigma * v for v in velocities])
            found.append((estimates - z).square().mean(dim=(2, 3, 4)).cpu().double())
        error, linear_error = torch.cat(found, dim=1)
        errors.append(error)
        ratios.append(error / linear_error.mean())
        levels.append(NoiseLevel(math.log(signal / (1 - signal)), float(error.mean()), float(linear_error.mean())))
    return ProbeResult(levels, torch.stack(ratios).mean(dim=0), torch.stack(errors).mean(dim=0), places)


def _batches(latents: Tensor, generator: torch.Generator) -> Iterator[Batch]:
    """Batches without end, in a new order in each epoch; a batch may begin in one epoch and end in the next."""
    order = (int(i) for _ in itertools.count() for i in torch.randperm(len(latents), generator=generator))
    while True:
        yield latents[list(itertools.islice(order, BATCH_SIZE))], None
