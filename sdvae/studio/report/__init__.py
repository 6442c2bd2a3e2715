"""`sdvae report`: all about one VAE, or one run, in a single HTML file."""

from sdvae.studio.report.run import write_report

__all__ = ["write_report"]
