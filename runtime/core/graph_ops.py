"""The ops over packed vectors inside torch.compile: a custom op each, so that no graph is cut.

Outside of a graph the kernel is called as it is: a custom op costs 10 us a call, as much as the
kernel of a small batch. torch.compile cannot look into a kernel that takes addresses, so inside it
calls `tokfuse::<op>_<backend>`, which tells shapes by `fake` and runs the same function.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class GraphForm(NamedTuple):
    """How an op looks inside a graph; the same for every backend.

    Args:
        schema: arguments and results in the schema language of torch; those after the star are
            keywords of the kernel.
        fake: the results without their values, from the arguments of the schema.
        flat: keywords of the kernel -> keywords of the schema, which knows no union and no record.
            Traced by torch.compile. None: they are the same.
        rich: the way back.
        differentiate: (setup_context, backward) of `register_autograd`, or None.
    """

    schema: str
    fake: Callable[..., Any]
    flat: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    rich: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    differentiate: tuple[Callable[..., None], Callable[..., Any]] | None = None


STAR = " *,"


def traceable(op: str, backend: str, run: Callable[..., Any], form: GraphForm) -> Callable[..., Any]:
    """`run`, and inside torch.compile a custom op around it."""
    # A custom op takes no tensor as a keyword alone, so there the star is gone.
    positional, _, rest = form.schema.partition(STAR)
    keywords = [part.split()[-1] for part in rest.partition(")")[0].split(",") if part]
    first = positional.count(",") + (not rest)

    def named(function: Callable[..., Any], change: Any = None) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            options = dict(zip(keywords, args[first:], strict=True))
            return function(*args[:first], **(options if change is None else change(options)))

        return call

    custom = torch.library.custom_op(
        f"tokfuse::{op}_{backend}", named(run, form.rich), mutates_args=(), schema=positional + rest
    )
    custom.register_fake(named(form.fake))
    if form.differentiate is not None:
        setup_context, backward = form.differentiate
        custom.register_autograd(backward, setup_context=setup_context)

    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            return run(*args, **kwargs)
        options = kwargs if form.flat is None else form.flat(kwargs)
        return custom(*args, *(options[name] for name in keywords))

    return call


def like_rows(count: int) -> Callable[..., tuple[torch.Tensor, ...]]:
    """A fake of `count` results that each look like the first argument."""

    def fake(x: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(x) for _ in range(count))

    return fake
