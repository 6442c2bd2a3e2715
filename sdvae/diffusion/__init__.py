"""A small diffusion model of latents, and what a short training of it says about a VAE."""
