"""Triton kernels, imported as `minitune.kernels`: only `minitune.ops`, tests and benches do so."""
