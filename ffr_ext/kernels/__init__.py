"""Triton kernels. Import a submodule only when it is to be run: triton is optional and slow to import."""
