"""Patches of latents: p x q positions become p · q channels of one position. FLUX.2 normalises its latents so."""

from __future__ import annotations

from torch import Tensor

from sdvae.errors import InputError

PatchSize = tuple[int, int]  # height and width of a patch, in positions


def patched(z: Tensor, size: PatchSize) -> Tensor:
    """Latents (…, C, p·h, q·w) as patches (…, C·p·q, h, w).

    Channel c·p·q + i·q + j holds row i and column j of channel c's patches, as in FLUX.2
    (black-forest-labs/flux2, src/flux2/autoencoder.py) and in `torch.nn.functional.pixel_unshuffle`.

    Raises:
        InputError: when a side is not a multiple of the patch's.
    """
    (p, q), (*batch, channels, height, width) = size, z.shape
    if size == (1, 1):
        return z
    if height % p or width % q:
        raise InputError(
            f"got latents of {height} x {width}, of which this VAE's scaling takes patches of {p} x {q}; need sides "
            f"that are multiples of {p} and {q}; crop the images to multiples of as many times the compression ratio"
        )
    parts = z.reshape(*batch, channels, height // p, p, width // q, q)
    return parts.movedim((-3, -1), (-4, -3)).reshape(*batch, channels * p * q, height // p, width // q)


def unpatched(z: Tensor, size: PatchSize) -> Tensor:
    """Patches (…, C·p·q, h, w) as latents (…, C, p·h, q·w): the inverse of `patched`.

    Raises:
        InputError: when the number of channels is no multiple of p·q.
    """
    (p, q), (*batch, channels, height, width) = size, z.shape
    if size == (1, 1):
        return z
    if channels % (p * q):
        raise InputError(f"got patches of {p} x {q} latents with {channels} channels; need a multiple of {p * q}")
    parts = z.reshape(*batch, channels // (p * q), p, q, height, width)
    return parts.movedim((-4, -3), (-3, -1)).reshape(*batch, channels // (p * q), height * p, width * q)
