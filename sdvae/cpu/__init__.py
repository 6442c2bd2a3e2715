"""Kernels for CPUs. They are imported only where a VAE computes on a CPU; nothing on a GPU needs them."""
