"""`sdvae report`: a VAE, or a run, described in a single HTML file."""
