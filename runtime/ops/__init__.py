"""The public ops, one file each: docstring, checks, dispatch, autograd and torch.compile registration."""
