"""Image data sets as latents on disk: encoding them, and training on them."""
