"""Code for the VAEs of tutorials: with a Bernoulli likelihood, class labels, or an adversary on the latents."""
