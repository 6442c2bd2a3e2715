"""The state of the latents: KL, moments and log-variances, and the names of what can go wrong with them."""

from __future__ import annotations

import torch
from torch import Tensor

from sdvae.errors import InputError
from sdvae.evaluation.metrics import ACTIVE_VARIANCE, LatentMoments
from sdvae.model import DiagonalGaussian
from sdvae.model.posterior import LOGVAR_RANGE

DEAD_KL = 0.01  # nats; what a mean of 0.14 costs, or a std of 0.9: next to nothing about the image
BLACK_HOLE_LOGVAR = LOGVAR_RANGE[0] + 0.5  # half a nat above the clamp; SD-1's other elements sit at -23 to -13
EXPLODED_STD = 50.0  # several times any in use: SD-1 has 1/0.18215 = 5.5, SDXL 1/0.13025 = 7.7, SD3 1/1.5305 = 0.65
PRIOR_LIKE_KL = 1.0  # nats; a constant posterior that costs more than this was not pulled there by the KL term
ROUNDING = 1e-12  # of E[x²] - E[x]² relative to E[x²] in float64, with room for the sums' own
NAMED_CHANNELS = 8  # at most, in one complaint

BINS = round(LOGVAR_RANGE[1] - LOGVAR_RANGE[0])  # of the histogram, one nat each
KL, LOGVAR, DEAD, BLACK_HOLES, HISTOGRAM = range(4, 9)  # rows of the sums, after the four of LatentMoments


class LatentHealth:
    """Sums over the elements of posteriors, one for each (image, channel, position), in float64.

    An element is dead when its KL is below DEAD_KL: it is the prior, whatever the image. It is a black hole when
    its log-variance lies at the lower clamp, where it gets no gradient; SD-1's VAE has some in every image.

    Args:
        channels: C of the latents.

    Attributes:
        sums: (8 + BINS, C) float64 on the CPU: LatentMoments' four, Σ KL, Σ log-variance, dead elements, black
            holes, histogram of the log-variance. Those of two sets of images add up, which is how processes merge
            theirs.
    """

    def __init__(self, channels: int):
        self.sums = torch.zeros(HISTOGRAM + BINS, channels, dtype=torch.float64)

    def update(self, posterior: DiagonalGaussian) -> None:
        """Add a batch. Elements that are not finite make their channel's sums so; the histogram leaves them out.

        Raises: InputError when the posterior has another number of channels.
        """
        channels = self.sums.shape[1]
        if posterior.mean.shape[1] != channels:
            got = posterior.mean.shape[1]
            raise InputError(f"got a posterior of {got} channels; need {channels}, or LatentHealth(channels={got})")
        posterior = DiagonalGaussian(posterior.parameters.detach().cpu().double())  # in this order: MPS has no float64
        self.moments.update(posterior)
        kl, logvar = posterior.kl_map(), posterior.logvar
        summed = (kl, logvar, kl < DEAD_KL, logvar <= BLACK_HOLE_LOGVAR)  # (B, C, h, w) each
        self.sums[KL:HISTOGRAM] += torch.stack([terms.double().sum(dim=(0, 2, 3)) for terms in summed])
        self.sums[HISTOGRAM:] += torch.stack([torch.histc(c, BINS, *LOGVAR_RANGE) for c in logvar.unbind(1)], dim=1)

    @property
    def moments(self) -> LatentMoments:
        """The first four rows: a view, so that what is added to its sums is added to these."""
        moments = LatentMoments(self.sums.shape[1])
        moments.sums = self.sums[:KL]
        return moments

    @property
    def channel_mean(self) -> Tensor:
        """(C,) float64."""
        return self.moments.channel_mean

    @property
    def channel_std(self) -> Tensor:
        """(C,) float64: standard deviation of sampled latents."""
        return self.moments.channel_std

    @property
    def channel_kl(self) -> Tensor:
        """(C,) float64: nats an element."""
        return self.sums[KL] / self.sums[0]

    @property
    def logvar_histogram(self) -> Tensor:
        """(BINS,) int64: elements of all channels with log-variance in [-30, -29), …, [18, 19), [19, 20]."""
        return self.sums[HISTOGRAM:].sum(dim=1).long()

    @property
    def logvar_mean(self) -> float:
        return self._mean_of(LOGVAR)

    @property
    def logvar_min(self) -> float:
        """Rounded down to a nat: the lower edge of the lowest bin that is not empty, since a minimum does not add."""
        filled = self.logvar_histogram.nonzero()
        return LOGVAR_RANGE[0] + int(filled[0]) if len(filled) else float("nan")

    @property
    def dead_fraction(self) -> float:
        return self._mean_of(DEAD)

    @property
    def black_hole_fraction(self) -> float:
        return self._mean_of(BLACK_HOLES)

    @property
    def collapsed(self) -> Tensor:
        """(C,) bool: channels without use: the mean hardly varies and drowns in its noise, or all elements are dead.

        Inactive (Burda et al. 2016) alone would not do: that measures against the prior's variance of one, and
        calls a channel collapsed which is small but precise.
        """
        mean_variance, noise_variance = self._variances()
        hidden = (mean_variance <= ACTIVE_VARIANCE) & (mean_variance < noise_variance)
        return hidden | (self.sums[DEAD] == self.sums[0])

    @property
    def vanished(self) -> Tensor:
        """(C,) bool: channels that vary more than their noise, but by too little to count as active."""
        mean_variance, noise_variance = self._variances()
        return (mean_variance <= ACTIVE_VARIANCE) & (mean_variance >= noise_variance) & ~self.collapsed

    @property
    def exploded(self) -> Tensor:
        """(C,) bool: channels many times wider than those of any VAE in use."""
        return self.channel_std > EXPLODED_STD

    def metrics(self) -> dict[str, float]:
        """Scalars for logs; the KL is in nats a latent element.

        Raises: InputError when there was no update.
        """
        self._need_elements()
        values = {
            "active_channels": self.moments.active_channels,
            "latent_std": self.moments.std,
            "dead_fraction": self.dead_fraction,
            "black_hole_fraction": self.black_hole_fraction,
            "logvar_mean": self.logvar_mean,
            "logvar_min": self.logvar_min,
            "kl_per_element": self._mean_of(KL),
        }
        return values | {f"channel_kl_{c}": kl for c, kl in enumerate(self.channel_kl.tolist())}

    def complaints(self) -> list[str]:
        """What is wrong, one line each: its name, how much of it, and the remedy. Empty when all is well.

        Raises: InputError when there was no update.
        """
        self._need_elements()
        broken = ~self.sums.isfinite().all(dim=0)
        if broken.any():
            return [f"latents not finite: {_named(broken)}; lower optimizer.learning_rate, or train in fp32"]
        found = []
        std, collapsed, vanished, exploded = self.channel_std, self.collapsed, self.vanished, self.exploded
        if collapsed.any():
            name = "posterior collapse" if collapsed.all() else "partial collapse"
            kl = float(self.channel_kl[collapsed].min())
            if kl < PRIOR_LIKE_KL:
                remedy = "lower loss.kl_weight"
            else:  # the mean is a constant, but a costly one
                remedy = "check that the images differ, or lower optimizer.learning_rate"
            verb = "does" if collapsed.sum() == 1 else "do"
            found.append(f"{name}: {_named(collapsed)} {verb} not depend on the image, KL ≥ {kl:.2g} nats; {remedy}")
        if vanished.any():
            largest = float(std[vanished].max())
            found.append(f"latents vanish: std {largest:.2g} or less in {_named(vanished)}; raise loss.kl_weight")
        if exploded.any():
            largest = float(std[exploded].max())
            found.append(
                f"latents explode: std up to {largest:.3g} in {_named(exploded)}; "
                "raise loss.kl_weight or lower optimizer.learning_rate"
            )
        if self.black_hole_fraction > 0:  # one is enough to name: the clamp passes no gradient that could free it
            found.append(
                f"black holes: {100 * self.black_hole_fraction:.2g} % of elements have log-variance at the clamp "
                f"of {LOGVAR_RANGE[0]:.0f}; raise loss.kl_weight"
            )
        return found

    def _variances(self) -> tuple[Tensor, Tensor]:
        """Var[mean] and E[var], (C,) each: of the signal over images and positions, and of the noise on it."""
        count, mean, square, noise = self.sums[:KL]
        signal = square / count - (mean / count).square()
        resolved = signal > ROUNDING * square / count
        return signal.where(resolved, 0.0), noise / count

    def _mean_of(self, row: int) -> float:
        return float(self.sums[row].sum() / self.sums[0].sum())

    def _need_elements(self) -> None:
        if not self.sums[0].any():
            raise InputError("got no posterior; need at least one image: call update() first")


def _named(mask: Tensor) -> str:
    """(C,) bool -> «3 of 16 channels (0, 4, 7)», counted from 0."""
    channels = mask.nonzero().flatten().tolist()
    listed = ", ".join(str(c) for c in channels[:NAMED_CHANNELS]) + (", …" if len(channels) > NAMED_CHANNELS else "")
    return f"{len(channels)} of {len(mask)} channels ({listed})"
