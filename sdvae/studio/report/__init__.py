"""`sdvae report`: a VAE, or a run, described in a single HTML file."""

from sdvae.studio.report.run import write_report

__all__ = ["write_report"]
