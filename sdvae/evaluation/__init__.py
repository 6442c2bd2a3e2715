"""Measuring a VAE and drawing what it does."""
