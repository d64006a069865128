"""Triton kernels, imported as ``airl_fast.kernels``."""
