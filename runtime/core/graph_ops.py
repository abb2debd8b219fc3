"""Custom ops. torch.compile calls them instead of tracing a kernel, so the graph does not break.

torch.compile keeps a Python float as a constant of the graph. If the value changes between calls, it
compiles once more, with a symbol. A custom op accepts no symbol: torch.compile would put the value
back as a constant and compile again for every value. `GraphOp` therefore passes such a number in a
tensor on the CPU, and the op reads it when it runs.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from tokfuse.runtime.core.first_order import first_order

Number = float | torch.Tensor
"""A number inside a graph: a constant, or a () float64 tensor on the CPU."""


def graph_number(value: float) -> Number:
    """Return `value`, or a tensor if torch.compile holds a symbol for it. Traced by torch.compile."""
    # Imported here because it imports sympy: 0.3 s that only torch.compile needs.
    from torch.fx.experimental.symbolic_shapes import has_static_value

    if has_static_value(value):
        return float(value)
    return torch.ones((), dtype=torch.float64, device="cpu") * value


class GraphOp:
    """A custom op whose arguments of type float may change between calls.

    The op `name` has one more argument, `changing`: a tensor with the values of the numbers that
    change, in order. NaN marks their places among the other arguments. No option is NaN otherwise.

    Args:
        name: "tokfuse::<op>".
        schema: arguments and results in the schema language of torch.
        run: function that computes the op from the arguments of the schema.
    """

    def __init__(self, name: str, schema: str, run: Callable[..., Any]) -> None:
        arguments, arrow, results = schema.partition(") ->")
        self._name = name.removeprefix("tokfuse::")
        kinds = [part.split()[0] for part in arguments.lstrip("(").split(",")]
        self._places = [place for place, kind in enumerate(kinds) if kind.startswith("float")]

        def kernel(*args: Any) -> Any:
            *given, changing = args
            return run(*(given if changing is None else self._replace(given, changing.tolist())))

        self._op = torch.library.custom_op(
            name, kernel, mutates_args=(), schema=f"{arguments}, Tensor? changing{arrow}{results}"
        )

    def __call__(self, *args: Any) -> Any:
        """Call the op; a number may be a () tensor. Traced by torch.compile."""
        given = list(args)
        changing: list[torch.Tensor] = []
        for place in self._places:
            value = args[place]
            if isinstance(value, list | tuple):
                numbers = [_number(x, changing) for x in value]
                given[place] = numbers
            elif value is not None:
                given[place] = _number(value, changing)
        if not changing:
            return self._op(*given, None)
        # A single number is passed as a view: for a copy, Inductor would compile a CPU kernel.
        return self._op(*given, changing[0].reshape(1) if len(changing) == 1 else torch.stack(changing))

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Register `fake`: it returns results of the right shape without values, from the arguments of the schema."""
        self._op.register_fake(lambda *args: fake(*args[:-1]))
        return fake

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """Register the backward like `CustomOpDef.register_autograd`.

        In the inputs of `setup_context`, a number that changes is a () tensor.
        """

        def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            *given, changing = inputs
            setup_context(ctx, tuple(given if changing is None else self._replace(given, changing.unbind())), output)

        backward = first_order(self._name)(backward)
        self._op.register_autograd(lambda ctx, *grads: (*backward(ctx, *grads), None), setup_context=setup)

    def _replace(self, args: Sequence[Any], values: Sequence[Number]) -> list[Any]:
        """Return `args` with each NaN replaced by the next value."""
        out, left = list(args), iter(values)
        for place in self._places:
            value = args[place]
            if isinstance(value, list | tuple):
                out[place] = [next(left) if math.isnan(x) else x for x in value]
            elif value is not None and math.isnan(value):
                out[place] = next(left)
        return out


def _number(value: Number, changing: list[torch.Tensor]) -> float:
    """Return a constant as a float. For a number that changes, append its tensor to `changing` and return NaN."""
    number = value if isinstance(value, torch.Tensor) else graph_number(value)
    if isinstance(number, torch.Tensor):
        changing.append(number)
        return math.nan
    return number


def graph_op(name: str, schema: str) -> Callable[[Callable[..., Any]], GraphOp]:
    """Return a decorator that makes a function the `GraphOp` of that name and schema."""
    return lambda run: GraphOp(name, schema, run)


# ---------------------------------------------------------------- the ops over packed vectors
#
# Eager code calls the kernel directly: a custom op costs 10 us per call, as much as the kernel of a
# small batch. Only inside a graph torch.compile calls the custom op `tokfuse::<op>_<backend>`.


class GraphForm(NamedTuple):
    """The form of an op inside a graph, shared by all backends.

    Args:
        schema: arguments and results in the schema language of torch. Arguments after the star are
            keywords of the kernel.
        fake: function that returns results without values, from the arguments of the schema.
        flat: function from the keywords of the kernel to the keywords of the schema. The schema
            supports neither unions nor records. Traced by torch.compile. None: they are the same.
        rich: the inverse of `flat`.
        differentiate: (setup_context, backward) of `register_autograd`, or None.
    """

    schema: str
    fake: Callable[..., Any]
    flat: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    rich: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    differentiate: tuple[Callable[..., None], Callable[..., Any]] | None = None


STAR = " *,"


def traceable(op: str, backend: str, run: Callable[..., Any], form: GraphForm) -> Callable[..., Any]:
    """Return a function that calls `run`, or, inside torch.compile, a custom op around `run`."""
    # A custom op accepts no keyword-only tensor, so its schema has no star.
    positional, _, rest = form.schema.partition(STAR)
    keywords = [part.split()[-1] for part in rest.partition(")")[0].split(",") if part]
    first = positional.count(",") + (not rest)

    def named(function: Callable[..., Any], change: Any = None) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            options = dict(zip(keywords, args[first:], strict=True))
            return function(*args[:first], **(options if change is None else change(options)))

        return call

    custom = GraphOp(f"tokfuse::{op}_{backend}", positional + rest, named(run, form.rich))
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
    """Return a fake with `count` results that have the shape and dtype of the first argument."""

    def fake(x: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(x) for _ in range(count))

    return fake


def save_flat(ctx: Any, flat: tuple[Any, ...]) -> None:
    """Keep the flat arguments of an op for its backward: the tensors as saved tensors, the rest beside them."""
    ctx.save_for_backward(*(x if isinstance(x, torch.Tensor) else None for x in flat))
    ctx.rest = [None if isinstance(x, torch.Tensor) else x for x in flat]


def saved_flat(ctx: Any) -> list[Any]:
    """Return the arguments that `save_flat` kept."""
    return [y if x is None else x for x, y in zip(ctx.saved_tensors, ctx.rest, strict=True)]
