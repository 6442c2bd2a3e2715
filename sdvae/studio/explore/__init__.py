"""`sdvae explore`: experiments on a VAE's latents, with pictures and figures, and the functions behind them."""

from sdvae.statistics import LatentCovariance, PrincipalComponents
from sdvae.studio.explore.anomaly import add_defect, anomaly_scores, auroc, error_map
from sdvae.studio.explore.denoise import add_noise, blur
from sdvae.studio.explore.moves import analogy, angle_between, lerp, mean_analogy, slerp, traverse
from sdvae.studio.explore.prior import LatentSpectrum, gaussian_kl, neighbour_correlation, sample_moments
from sdvae.studio.explore.run import explore
from sdvae.studio.settings import Settings

__all__ = [
    "LatentCovariance",
    "LatentSpectrum",
    "PrincipalComponents",
    "Settings",
    "add_defect",
    "add_noise",
    "analogy",
    "angle_between",
    "anomaly_scores",
    "auroc",
    "blur",
    "error_map",
    "explore",
    "gaussian_kl",
    "lerp",
    "mean_analogy",
    "neighbour_correlation",
    "sample_moments",
    "slerp",
    "traverse",
]
