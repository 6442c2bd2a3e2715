"""Kernels for CPUs. The rest of the package also works without them."""
