"""Each backend: whether it is usable, and how an op reaches its kernels."""
