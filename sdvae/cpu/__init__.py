"""Kernels for CPUs, imported where a VAE computes on a CPU and only there; nothing on a GPU needs this room."""
