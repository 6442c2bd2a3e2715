"""Statistics of latents over many images: sums over posteriors, in float64.

`LatentMoments`     mean and variance of each channel, and the scaling factor
`LatentHealth`      the same with KL and log-variances, and a list of faults
`LatentCovariance`  covariance between channels, and principal components
`LatentMaps`        statistics by position in the image
`LatentRGB`         the linear map from latents to small pictures

`update` adds a batch of posteriors. `merged` adds up the moments or the health of several processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sdvae.errors import InputError
from sdvae.model import DiagonalGaussian
from sdvae.model.config import LOGVAR_RANGE

ACTIVE_VARIANCE = 0.01  # Burda et al. 2016, «Importance weighted autoencoders», section 5: active units
DEAD_KL = 0.01  # nats; the KL of a mean of 0.14, or of a std of 0.9: almost no information about the image
BLACK_HOLE_LOGVAR = LOGVAR_RANGE[0] + 0.5  # half a nat above the clamp; SD-1's other elements are at -23 to -13
EXPLODED_STD = 50.0  # published VAEs have far less: SD-1 1/0.18215 = 5.5, SDXL 1/0.13025 = 7.7, SD3 1/1.5305 = 0.65
PRIOR_LIKE_KL = 1.0  # nats; if a constant posterior has more, the KL term did not make it constant
ROUNDING = 1e-12  # bound on the rounding error of E[x²] - E[x]² relative to E[x²] in float64
LEAST_ERROR = 4e-10  # mean squared error of RGB factors that counts as exact: 100 dB
NAMED_CHANNELS = 8  # the most channels that one complaint lists

BINS = round(LOGVAR_RANGE[1] - LOGVAR_RANGE[0])  # of the histogram, one nat each
KL, LOGVAR, DEAD, BLACK_HOLES, HISTOGRAM = range(4, 9)  # rows of the sums, after the four of LatentMoments
HISTOGRAM_RANGE = (-5.0, 5.0)  # of scaled latents, in standard deviations of N(0, 1)
HISTOGRAM_BINS = 100


Sums = TypeVar("Sums", "LatentMoments", "LatentHealth")


def merged(parts: Sequence[Sums]) -> Sums:
    """Statistics of the images of all parts together, such as those of all processes.

    Args:
        parts: at least one; the first is changed.
    """
    whole, *others = parts
    for other in others:
        whole.sums += other.sums
    return whole


class LatentMoments:
    """Mean and variance of the latents over images and positions, channel by channel, in float64.

    Each latent element is N(mean, var) with its own mean and var. By the law of total variance, over all elements
    Var[z] = Var[mean] + E[var]: this is exact and needs no samples.

    Attributes:
        sums: (4, C) float64 on the CPU: count, Σ mean, Σ mean², Σ var.
    """

    def __init__(self, channels: int):
        self.sums = torch.zeros(4, channels, dtype=torch.float64)

    def update(self, posterior: DiagonalGaussian) -> None:
        posterior = _in_float64(posterior)
        self.add(posterior.mean, posterior.var)

    def add(self, mean: Tensor, var: Tensor) -> None:
        """`update` with the mean and the variance of each element, (B, C, h, w) float64 on the CPU."""
        count = torch.full((mean.shape[1],), mean.numel() / mean.shape[1], dtype=torch.float64)
        over = (0, 2, 3)
        self.sums += torch.stack([count, mean.sum(over), mean.square().sum(over), var.sum(over)])

    def over_patches(self, positions: int) -> LatentMoments:
        """The moments of the channels of which each `positions` successive channels here are the patches' positions."""
        whole = LatentMoments(self.sums.shape[1] // positions)
        whole.sums = self.sums.unflatten(1, (-1, positions)).sum(dim=2)
        return whole

    @property
    def channel_mean(self) -> Tensor:
        """(C,) float64."""
        return self.sums[1] / self.sums[0]

    @property
    def channel_std(self) -> Tensor:
        """(C,) float64: standard deviation of sampled latents."""
        return (self.sums[2:].sum(0) / self.sums[0] - self.channel_mean.square()).clamp(min=0).sqrt()

    @property
    def mean(self) -> float:
        return float(self.sums[1].sum() / self.sums[0].sum())

    @property
    def std(self) -> float:
        """Standard deviation over all channels together: 1/std is LDM's scaling factor (appendix G)."""
        return float((self.sums[2:].sum() / self.sums[0].sum() - self.mean**2).clamp(min=0).sqrt())

    def factors(self, with_shift: bool) -> tuple[float, float | None]:
        """The scaling factor, 1/std, and the shift factor, which is the mean.

        Args:
            with_shift: if false, the shift factor is None.

        Raises:
            InputError: when no image was counted, or the latents do not vary.
        """
        if not 0 < self.std < math.inf:
            raise InputError(
                f"the latents' std is {self.std}, so they have no scaling factor; need images that can be read"
            )
        return 1.0 / self.std, self.mean if with_shift else None

    def config_keys(self, *, by_channel: bool = False, with_shift: bool = False) -> dict[str, Any]:
        """The scaling of these latents, under all its keys in a VAE's config. Those that it does not use are None.

        Args:
            by_channel: scale each channel to mean 0 and standard deviation 1, by latents_mean and latents_std. SDXL's
                pipelines give (z - latents_mean) · scaling_factor / latents_std to the diffusion model, so
                scaling_factor is 1; they do not use a shift_factor.
            with_shift: also give the mean of all latents as shift_factor; not together with `by_channel`.

        Raises:
            InputError: when no image was counted, or the latents, or with `by_channel` a channel, do not vary.
        """
        scale, shift = self.factors(with_shift)
        if not by_channel:
            return {"scaling_factor": scale, "shift_factor": shift, "latents_mean": None, "latents_std": None}
        assert not with_shift
        mean, std = self.channel_mean.tolist(), self.channel_std.tolist()
        still = [channel for channel, value in enumerate(std) if value == 0]
        if still:
            raise InputError(
                f"the latents do not vary in channels {still}, which have no scale; scale all channels alike"
            )
        return {"scaling_factor": 1.0, "shift_factor": None, "latents_mean": mean, "latents_std": std}

    @property
    def active_channels(self) -> int:
        """Channels whose posterior mean varies over images and positions: Var[mean] > 0.01."""
        variance = self.sums[2] / self.sums[0] - self.channel_mean.square()
        return int((variance > ACTIVE_VARIANCE).sum())


class LatentHealth:
    """Statistics over the elements of posteriors, one for each (image, channel, position), in float64.

    An element is «dead» when its KL is below DEAD_KL: it equals the prior, whatever the image. It is a «black hole»
    when its log-variance is at the lower clamp, where it gets no gradient; SD-1's VAE has some in every image.

    Posteriors of an encoder that predicts no variance (`deterministic`) only add to the moments. Then there is no KL,
    and nothing is dead or a black hole.

    Args:
        channels: C of the latents.

    Attributes:
        sums: (8 + BINS, C) float64 on the CPU: LatentMoments' four, Σ KL, Σ log-variance, dead elements, black
            holes, histogram of the log-variance.
    """

    def __init__(self, channels: int):
        self.sums = torch.zeros(HISTOGRAM + BINS, channels, dtype=torch.float64)

    def update(self, posterior: DiagonalGaussian) -> None:
        """Add a batch. Elements that are not finite make the sums of their channel NaN or infinite.

        Raises:
            InputError: when the posterior has another number of channels.
        """
        channels = self.sums.shape[1]
        if posterior.mean.shape[1] != channels:
            got = posterior.mean.shape[1]
            raise InputError(f"got a posterior of {got} channels; need {channels}, or LatentHealth(channels={got})")
        posterior = _in_float64(posterior)
        self.moments.update(posterior)
        if posterior.deterministic:
            return
        kl, logvar = posterior.kl_map(), posterior.logvar
        summed = (kl, logvar, kl < DEAD_KL, logvar <= BLACK_HOLE_LOGVAR)  # (B, C, h, w) each
        self.sums[KL:HISTOGRAM] += torch.stack([terms.double().sum(dim=(0, 2, 3)) for terms in summed])
        self.sums[HISTOGRAM:] += torch.stack([torch.histc(c, BINS, *LOGVAR_RANGE) for c in logvar.unbind(1)], dim=1)

    @property
    def moments(self) -> LatentMoments:
        """The first four rows of the sums, as a view: updating it updates them."""
        moments = LatentMoments(self.sums.shape[1])
        moments.sums = self.sums[:KL]
        return moments

    @property
    def has_variance(self) -> bool:
        """Whether the counted posteriors have a variance, and so a KL."""
        return bool(self.sums[KL:].any())

    @property
    def channel_kl(self) -> Tensor:
        """(C,) float64: nats per element."""
        return self.sums[KL] / self.sums[0]

    @property
    def logvar_histogram(self) -> Tensor:
        """(BINS,) int64: elements of all channels with log-variance in [-30, -29), …, [18, 19), [19, 20]."""
        return self.sums[HISTOGRAM:].sum(dim=1).long()

    @property
    def logvar_min(self) -> float:
        """The minimum, rounded down to a nat: the lower edge of the lowest bin that is not empty."""
        filled = self.logvar_histogram.nonzero()
        return LOGVAR_RANGE[0] + int(filled[0]) if len(filled) else float("nan")

    @property
    def black_hole_fraction(self) -> float:
        return self._mean_of(BLACK_HOLES)

    @property
    def collapsed(self) -> Tensor:
        """(C,) bool: useless channels. Their mean varies little and by less than its noise, or all elements are dead.

        It is not sufficient that a channel is not active (Burda et al. 2016): that threshold assumes the prior's
        variance of 1, and a channel may have small values and be precise.
        """
        mean_variance, noise_variance = self._variances()
        hidden = (mean_variance <= ACTIVE_VARIANCE) & (mean_variance < noise_variance)
        return hidden | (self.sums[DEAD] == self.sums[0])

    @property
    def vanished(self) -> Tensor:
        """(C,) bool: channels that vary by more than their noise, but too little to count as active."""
        mean_variance, noise_variance = self._variances()
        return (mean_variance <= ACTIVE_VARIANCE) & (mean_variance >= noise_variance) & ~self.collapsed

    @property
    def exploded(self) -> Tensor:
        """(C,) bool: channels with a std many times larger than in any published VAE."""
        return self.moments.channel_std > EXPLODED_STD

    def metrics(self) -> dict[str, float]:
        """Scalars for logs; the KL is in nats per latent element. Without variance there are only the first two.

        Raises:
            InputError: when there was no update.
        """
        self._need_elements()
        values = {"active_channels": self.moments.active_channels, "latent_std": self.moments.std}
        if not self.has_variance:
            return values
        values |= {
            "dead_fraction": self._mean_of(DEAD),
            "black_hole_fraction": self.black_hole_fraction,
            "logvar_mean": self._mean_of(LOGVAR),
            "logvar_min": self.logvar_min,
            "kl_per_element": self._mean_of(KL),
        }
        return values | {f"channel_kl_{c}": kl for c, kl in enumerate(self.channel_kl.tolist())}

    def complaints(self) -> list[str]:
        """A line for each fault of the latents, with its extent and a remedy.

        Raises:
            InputError: when there was no update.
        """
        self._need_elements()
        broken = ~self.sums.isfinite().all(dim=0)
        if broken.any():
            return [f"latents not finite: {_named(broken)}; lower optimizer.learning_rate, or train in fp32"]
        found = []
        std, collapsed, vanished, exploded = self.moments.channel_std, self.collapsed, self.vanished, self.exploded
        if collapsed.any():
            name = "posterior collapse" if collapsed.all() else "partial collapse"
            kl = float(self.channel_kl[collapsed].min())
            if kl < PRIOR_LIKE_KL:
                remedy = "lower loss.kl_weight"
            else:  # a constant mean far from the prior's
                remedy = "check that the images differ, or lower optimizer.learning_rate"
            verb = "does" if collapsed.sum() == 1 else "do"
            found.append(f"{name}: {_named(collapsed)} {verb} not depend on the image, KL ≥ {kl:.2g} nats; {remedy}")
        if vanished.any():
            largest = float(std[vanished].max())
            remedy = "; raise loss.kl_weight" if self.has_variance else ""
            found.append(f"latents vanish: std {largest:.2g} or less in {_named(vanished)}{remedy}")
        if exploded.any():
            largest = float(std[exploded].max())
            found.append(
                f"latents explode: std up to {largest:.3g} in {_named(exploded)}; "
                f"{'raise loss.kl_weight or ' if self.has_variance else ''}lower optimizer.learning_rate"
            )
        if self.black_hole_fraction > 0:  # even a single one counts, since without a gradient it never recovers
            found.append(
                f"black holes: {100 * self.black_hole_fraction:.2g} % of elements have log-variance at the clamp "
                f"of {LOGVAR_RANGE[0]:.0f}; raise loss.kl_weight"
            )
        return found

    def _variances(self) -> tuple[Tensor, Tensor]:
        """Var[mean] and E[var], (C,) each: the variance of the signal, and of the noise on it."""
        count, mean, square, noise = self.sums[:KL]
        signal = square / count - (mean / count).square()
        resolved = signal > ROUNDING * square / count
        return signal.where(resolved, 0.0), noise / count

    def _mean_of(self, row: int) -> float:
        return float(self.sums[row].sum() / self.sums[0].sum())

    def _need_elements(self) -> None:
        if not self.sums[0].any():
            raise InputError("got no posterior; need at least one image: call update() first")


@dataclass(frozen=True)
class PrincipalComponents:
    """Directions of the latents at one position, in order of decreasing variance. All tensors are float64.

    Attributes:
        mean: (C,).
        axes: (C, C), a unit vector in each row, whose largest component is positive.
        variance: (C,), along each axis.
    """

    mean: Tensor
    axes: Tensor
    variance: Tensor

    @property
    def explained(self) -> Tensor:
        """(C,): each component's share of the variance."""
        return self.variance / self.variance.sum()

    def coefficients(self, z: Tensor) -> Tensor:
        """axes · (z - mean), the coordinates along the axes: (N, C, h, w) -> (N, C, h, w)."""
        return torch.einsum("kc,nchw->nkhw", self.axes.to(z), z - self.mean.to(z)[:, None, None])

    def keep(self, z: Tensor, count: int) -> Tensor:
        """The latents from only their first `count` components, (N, C, h, w) -> (N, C, h, w)."""
        kept = self.coefficients(z)[:, :count]
        return torch.einsum("kc,nkhw->nchw", self.axes[:count].to(z), kept) + self.mean.to(z)[:, None, None]


class LatentCovariance:
    """Mean of each channel and covariance between channels, of the posterior's mean over images and positions.

    Attributes:
        sums: (C + 1, C) float64 on the CPU: Σ z zᵀ, and in the last row Σ z.
        count: number of positions, over all images.
    """

    def __init__(self, channels: int):
        self.sums = torch.zeros(channels + 1, channels, dtype=torch.float64)
        self.count = 0

    def update(self, posterior: DiagonalGaussian) -> None:
        z = posterior.mean.detach().cpu().double()  # (B, C, h, w)
        z = z.transpose(0, 1).flatten(1)  # (C, positions)
        self.sums += torch.cat([z @ z.T, z.sum(dim=1)[None]])
        self.count += z.shape[1]

    @property
    def mean(self) -> Tensor:
        """(C,) float64."""
        return self.sums[-1] / self.count

    @property
    def covariance(self) -> Tensor:
        """(C, C) float64: E[z zᵀ] - E[z] E[z]ᵀ."""
        return self.sums[:-1] / self.count - torch.outer(self.mean, self.mean)

    def principal_components(self) -> PrincipalComponents:
        """The eigenvectors of the covariance (Pearson 1901; Bishop 2006, section 12.1).

        Raises:
            InputError: when the latents do not vary.
        """
        if not self.count or not float(self.covariance.trace()) > 0:
            raise InputError("got latents that do not vary; need photographs; choose other --data")
        variance, axes = torch.linalg.eigh(self.covariance)  # rising; eigenvectors in columns
        variance, axes = variance.flip(0).clamp(min=0), axes.flip(1).T
        largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
        return PrincipalComponents(self.mean, axes * largest.sign(), variance)


class LatentMaps:
    """Statistics of posteriors of one size by position, in float64.

    Args:
        shape: (C, h, w) of the latents.
        scaled: maps latents (…, C, h, w) to those of a diffusion model, in the same places: a shift and a scale of each
            element.

    Attributes:
        images: the number of images that were counted.
        scaled_moments: of scaled latents.
        histogram: (C, HISTOGRAM_BINS) int64, of scaled samples.
        outside: (C,) int64, number of scaled samples outside HISTOGRAM_RANGE.
    """

    def __init__(self, shape: tuple[int, int, int], scaled: Callable[[Tensor], Tensor]):
        channels, height, width = shape
        self.scaled = scaled
        self._gain = scaled(torch.ones(shape, dtype=torch.float64)) - scaled(torch.zeros(shape, dtype=torch.float64))
        self.images = 0
        self.scaled_moments = LatentMoments(channels)
        self.histogram = torch.zeros(channels, HISTOGRAM_BINS, dtype=torch.int64)
        self.outside = torch.zeros(channels, dtype=torch.int64)
        self._kl = torch.zeros(height, width, dtype=torch.float64)
        self._sums = torch.zeros(3, channels, height, width, dtype=torch.float64)  # Σ mean, Σ mean², Σ var
        self._covariance = LatentCovariance(channels)

    def update(self, posterior: DiagonalGaussian, generator: torch.Generator) -> None:
        """Add a batch.

        Args:
            posterior: over (B, C, h, w).
            generator: the generator of the samples that the histogram counts.
        """
        posterior = _in_float64(posterior)
        mean, var = posterior.mean, posterior.var
        self.images += len(mean)
        self._kl += posterior.kl_map().sum(dim=(0, 1))
        self._sums += torch.stack([mean.sum(0), mean.square().sum(0), var.sum(0)])
        self._covariance.update(posterior)
        self.scaled_moments.add(self.scaled(mean), var * self._gain.square())
        scaled = self.scaled(posterior.sample(generator)).transpose(0, 1).flatten(1)  # (C, B·h·w)
        self.histogram += torch.stack([torch.histc(c, HISTOGRAM_BINS, *HISTOGRAM_RANGE).long() for c in scaled])
        low, high = HISTOGRAM_RANGE
        self.outside += ((scaled < low) | (scaled > high)).sum(dim=1)

    def kl(self) -> Tensor:
        """(h, w): KL in nats at each position, summed over channels and averaged over images."""
        return self._kl / self.images

    def std(self, moments: LatentMoments) -> Tensor:
        """(h, w): standard deviation of scaled latents at each position, over images and channels.

        Deviations are taken from the mean of each channel over all positions. So a position that is always brighter
        than the others has a larger value.

        Args:
            moments: over the same images.
        """
        mean, square, var = self._sums / self.images  # (C, h, w) each
        centre = moments.channel_mean[:, None, None]
        variance = (square - 2 * centre * mean + centre.square() + var).clamp(min=0)
        return (self._gain.square() * variance).mean(dim=0).sqrt()

    def covariance(self, moments: LatentMoments) -> Tensor:
        """(C, C), of unscaled latents over images and positions; the diagonal is channel_std².

        By the law of total covariance it is Cov[mean] + diag(E[var]), since the noise of elements is independent.

        Args:
            moments: over the same images.
        """
        return self._covariance.covariance + torch.diag(moments.sums[3] / moments.sums[0])

    def correlation(self, moments: LatentMoments) -> Tensor:
        """(C, C) in [-1, 1]; NaN in the row and column of a channel that does not vary.

        Args:
            moments: over the same images.
        """
        std = moments.channel_std
        return self.covariance(moments) / (std[:, None] * std)


@dataclass(frozen=True)
class RGBFactors:
    """An affine map from latents to an image of their size, and how well it fits.

    Attributes:
        factors: (C, 3) float64: the rows of UIs' «latent RGB factors».
        bias: (3,) float64.
        r2: (3,): the share of each colour's variance that the map explains.
        psnr: in dB, at most 100, over all pixels of all images at the latents' resolution; nothing is clamped.
    """

    factors: Tensor
    bias: Tensor
    r2: Tensor
    psnr: float

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> (B, 3, h, w), nominally in [-1, 1] and not clamped."""
        return torch.einsum("bchw,ck->bkhw", z, self.factors.to(z)) + self.bias.to(z)[:, None, None]


class LatentRGB:
    """Sums for the best map from the latents at one position to the mean colour of its pixels, by least squares.

    Args:
        channels: C of the latents.
        colours: 3 for RGB, 1 for grey.

    Attributes:
        sums: (C + 1 + colours,)² float64 on the CPU: Σ v vᵀ over all positions, with v = (latents, 1, colour).
    """

    def __init__(self, channels: int, colours: int = 3):
        self.channels = channels
        self.sums = torch.zeros((channels + 1 + colours,) * 2, dtype=torch.float64)

    def update(self, z: Tensor, images: Tensor) -> None:
        """Add a batch.

        Args:
            z: (B, C, h, w), the latents that the map shall take.
            images: (B, 3, f·h, f·w) in [-1, 1].
        """
        small = F.adaptive_avg_pool2d(
            images.detach().cpu().double(), (z.shape[2], z.shape[3])
        )  # the mean of f x f pixels
        v = torch.cat([z.detach().cpu().double(), torch.ones_like(small[:, :1]), small], dim=1)
        v = v.transpose(0, 1).flatten(1)  # (C + 1 + colours, positions)
        self.sums += v @ v.T

    def fit(self) -> RGBFactors:
        """The least-squares solution; that of least norm if some latents are constant or depend on others.

        Raises:
            InputError: when no image was counted, or all have one colour.
        """
        inputs = self.channels + 1
        gram, products = self.sums[:inputs, :inputs], self.sums[:inputs, inputs:]  # of the normal equations
        count = float(gram[-1, -1])
        squares = self.sums[inputs:, inputs:].diagonal()
        variation = squares - products[-1].square() / count
        if not (variation > ROUNDING * squares).all():
            raise InputError("got images of one colour to fit RGB factors to; need photographs; choose others")
        weights = torch.linalg.lstsq(gram, products, driver="gelsd").solution  # (C + 1, colours)
        residual = squares - 2 * (weights * products).sum(0) + (weights * (gram @ weights)).sum(0)
        error = max(float(residual.mean()) / count, LEAST_ERROR)
        psnr = 10 * math.log10(4 / error)  # values from -1 to 1: the peak is 2
        return RGBFactors(weights[:-1], weights[-1], 1 - residual / variation, psnr)


def _in_float64(posterior: DiagonalGaussian) -> DiagonalGaussian:
    """A posterior on the CPU, without gradients."""
    return DiagonalGaussian(posterior.parameters.detach().cpu().double(), posterior.deterministic)  # MPS lacks float64


def _named(mask: Tensor) -> str:
    """(C,) bool -> «3 of 16 channels (0, 4, 7)»; channels are numbered from 0."""
    channels = mask.nonzero().flatten().tolist()
    listed = ", ".join(str(c) for c in channels[:NAMED_CHANNELS]) + (", …" if len(channels) > NAMED_CHANNELS else "")
    return f"{len(channels)} of {len(mask)} channels ({listed})"
