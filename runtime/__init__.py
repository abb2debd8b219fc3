"""The runtime: op registry, dispatch, autograd, checks and reference. Algorithms reach kernels only through it."""
