"""One file per op: checks, dispatch, autograd, torch.compile registration."""
