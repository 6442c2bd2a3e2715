"""`sdvae explore`: experiments on a VAE's latents, with pictures and figures, and the functions behind them."""
