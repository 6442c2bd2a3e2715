"""Initial weights with which a new VAE gives a coarse copy of its input instead of noise.

With PyTorch's default weights, a deep encoder-decoder needs hundreds of steps before its output depends on its input,
and the noise of a posterior of variance 1 hides the little signal there is. With the weights set here,

- every residual branch ends in zero (Goyal et al. 2017, section 5.1), so each block is its shortcut;
- resampling convolutions and shortcuts copy their input, and the first and last convolutions of encoder and decoder mix
  channels at one pixel, so colours reach the latents and come back at the resolution of the latents;
- the posterior is narrow, with log-variance INITIAL_LOGVAR at every element;
- labels have no effect (in a VAE that takes labels).

A little noise breaks the symmetry between channels. During training, the KL term and the data widen the posterior.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sdvae.model import AutoencoderTiny, ConvolutionalVAE
from sdvae.model.blocks import Downsample, ResnetBlock, SelfAttention, Upsample
from sdvae.model.tiny import TinyBlock

INITIAL_LOGVAR = -6.0  # std 0.05, against latents of std about 1
SYMMETRY_NOISE = 0.3  # as a fraction of LeCun's standard deviation, 1/sqrt(fan_in)


@torch.no_grad()
def initialise(vae: ConvolutionalVAE) -> None:
    """Set all weights in place, with noise from torch's global generator. Norms keep scale 1 and bias 0."""
    for name, parameter in vae.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=fan_in(parameter) ** -0.5)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    for module in vae.modules():
        if isinstance(module, (Downsample, Upsample)):
            pass_through(module.conv)
        elif isinstance(module, ResnetBlock):
            nn.init.zeros_(module.conv2.weight)
            if module.conv_shortcut is not None:
                pass_through(module.conv_shortcut)
        elif isinstance(module, SelfAttention):
            nn.init.zeros_(module.get_parameter("to_out.0.weight"))
        elif isinstance(module, nn.Embedding):  # the labels' embedding, of the same standard deviation as features
            nn.init.normal_(module.weight)
    for name, parameter in vae.named_parameters():
        if name.endswith("label_proj.weight"):
            nn.init.zeros_(parameter)
    for conv in (vae.encoder.conv_in, vae.encoder.conv_out, vae.decoder.conv_in, vae.decoder.conv_out):
        mix_channels(conv)
    moments = "encoder.conv_out" if vae.quant_conv is None else "quant_conv"
    latent_channels = vae.config.latent_channels
    nn.init.zeros_(vae.get_parameter(f"{moments}.weight")[latent_channels:])
    nn.init.constant_(vae.get_parameter(f"{moments}.bias")[latent_channels:], INITIAL_LOGVAR)


@torch.no_grad()
def initialise_student(student: AutoencoderTiny) -> None:
    """Set all weights in place, by the same rules: each block is relu(x), and resampling convolutions copy their input.

    Then the decoder gives a coarse picture whose colours are random functions of the latents. The norms inside blocks
    keep scale 1 and bias 0, and their branches end in zero.
    """
    for network in (student.encoder, student.decoder):
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim > 1:
                nn.init.normal_(parameter, std=(2 / fan_in(parameter)) ** 0.5)  # He et al. 2015, for ReLUs
        resampling = [layer for layer in network.layers if isinstance(layer, nn.Conv2d)]
        for conv in (resampling.pop(0), resampling.pop()):
            mix_channels(conv)
        for conv in resampling:
            pass_through(conv)
        for block in network.layers:
            if isinstance(block, TinyBlock):
                nn.init.zeros_(block.get_parameter("conv.4.weight"))
                if block.pool is not None:
                    nn.init.zeros_(block.get_parameter("pool.3.weight"))


def fan_in(weight: Tensor) -> int:
    return weight[0].numel()


def pass_through(conv: nn.Conv2d) -> None:
    """Copy input channel i mod in_channels to output channel i at the middle of the kernel, and add noise."""
    out_channels, in_channels = conv.weight.shape[:2]
    channels = torch.arange(out_channels)
    _set_middle(conv, torch.eye(in_channels)[channels % in_channels])


def mix_channels(conv: nn.Conv2d) -> None:
    """Mix the input channels at random at the middle of the kernel, preserving the variance, and add noise."""
    out_channels, in_channels = conv.weight.shape[:2]
    _set_middle(conv, torch.randn(out_channels, in_channels) * in_channels**-0.5)


def _set_middle(conv: nn.Conv2d, matrix: Tensor) -> None:
    nn.init.normal_(conv.weight, std=SYMMETRY_NOISE * fan_in(conv.weight) ** -0.5)
    middle = conv.kernel_size[0] // 2
    conv.weight[:, :, middle, middle] += matrix.to(conv.weight)
