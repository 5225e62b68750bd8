"""Tensors to tensors: the reference mathematics."""
