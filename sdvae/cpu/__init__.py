"""Kernels for CPUs. The rest of the package works without this room."""
