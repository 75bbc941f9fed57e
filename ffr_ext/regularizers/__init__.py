"""Penalties on the weights of a model, on the same kernels as the flow loss."""
