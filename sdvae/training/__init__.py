"""Training a VAE: recipe, objective, loop. `sdvae.training.loop.train` is the door."""
