"""The VAEs of the tutorials: a Bernoulli likelihood, class labels, an adversary on the latents."""
