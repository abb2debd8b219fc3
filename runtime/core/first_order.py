"""Backward passes that have no derivative.

A kernel computes the gradient of an op, but not the gradient of that gradient. torch would treat the result of such
a backward as a constant: a gradient penalty would lose a term without an error.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from tokfuse.runtime.core.errors import refuse


def first_order(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator for a backward pass. It raises ValueError under create_graph=True.

    A backward that fails under vmap raises ValueError, too.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def call(*args: Any) -> Any:
            if torch.is_grad_enabled():  # inside a backward pass, only create_graph=True enables it
                raise refuse(
                    op,
                    "create_graph",
                    "False (the kernels compute no second derivative)",
                    True,
                    'For second derivatives, compute the loss with tokfuse.backend("reference") from token_stats, '
                    "linear_token_stats or policy_loss.",
                )
            try:
                return backward(*args)
            except RuntimeError:
                if not any(isinstance(x, torch.Tensor) and "Batched" in str(torch._C._dispatch_keys(x)) for x in args):
                    raise
            raise refuse(
                op,
                "the gradient that arrives",
                "a plain tensor (the kernels do not run under vmap)",
                "a batch of gradients, from is_grads_batched=True or vectorize=True",
                "Call torch.autograd.grad once per gradient.",
            )

        return call

    return decorate
