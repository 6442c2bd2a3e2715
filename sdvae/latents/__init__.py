"""Data sets of images as latents on disk: encoding them, and training on them."""
