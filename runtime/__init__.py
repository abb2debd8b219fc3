"""The only way from an algorithm to a kernel: registry, dispatch, autograd, checks, reference."""
