"""Custom ops: what torch.compile calls instead of tracing a kernel, so that it does not break the graph.

torch.compile keeps a Python float as a constant of the graph. If the value changes between calls, it
compiles once more, with a symbol. A custom op accepts no symbol: torch.compile would put the value
back as a constant and compile again for every value. `GraphOp` therefore passes such a number in a
tensor on the CPU, and the op reads it when it runs.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

Number = float | torch.Tensor
"""A number inside a graph: a constant, or a () float64 tensor on the CPU."""


def graph_number(value: float) -> Number:
    """`value`, or a tensor if torch.compile holds a symbol for it. Traced by torch.compile."""
    # Imported here because it imports sympy: 0.3 s that only torch.compile needs.
    from torch.fx.experimental.symbolic_shapes import has_static_value

    if has_static_value(value):
        return float(value)
    return torch.ones((), dtype=torch.float64, device="cpu") * value


class GraphOp:
    """A custom op whose arguments of type float may change between calls.

    The op `name` has one more argument, `changing`: a tensor with the values of the numbers that
    change, in order. NaN takes their places among the other arguments; no option is NaN.

    Args:
        name: "tokfuse::<op>".
        schema: arguments and results in the schema language of torch.
        run: the op, from the arguments of the schema.
    """

    def __init__(self, name: str, schema: str, run: Callable[..., Any]) -> None:
        arguments, arrow, results = schema.partition(") ->")
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
        # One number: a view. Inductor would compile a CPU kernel for a copy.
        return self._op(*given, changing[0].reshape(1) if len(changing) == 1 else torch.stack(changing))

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Define the results without their values, from the arguments of the schema."""
        self._op.register_fake(lambda *args: fake(*args[:-1]))
        return fake

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """As `CustomOpDef.register_autograd`. In the inputs, a number that changes is a () tensor."""

        def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            *given, changing = inputs
            setup_context(ctx, tuple(given if changing is None else self._replace(given, changing.unbind())), output)

        self._op.register_autograd(lambda ctx, *grads: (*backward(ctx, *grads), None), setup_context=setup)

    def _replace(self, args: Sequence[Any], values: Sequence[Number]) -> list[Any]:
        """`args` with the values in the places of NaN."""
        out, left = list(args), iter(values)
        for place in self._places:
            value = args[place]
            if isinstance(value, list | tuple):
                out[place] = [next(left) if math.isnan(x) else x for x in value]
            elif value is not None and math.isnan(value):
                out[place] = next(left)
        return out


def _number(value: Number, changing: list[torch.Tensor]) -> float:
    """A constant; for a number that changes, NaN, and its tensor is appended to `changing`."""
    number = value if isinstance(value, torch.Tensor) else graph_number(value)
    if isinstance(number, torch.Tensor):
        changing.append(number)
        return math.nan
    return number


def graph_op(name: str, schema: str) -> Callable[[Callable[..., Any]], GraphOp]:
    """Make a function the `GraphOp` of that name and schema."""
    return lambda run: GraphOp(name, schema, run)


# ---------------------------------------------------------------- the ops over packed vectors
#
# Outside of a graph the kernel is called as it is: a custom op costs 10 us a call, as much as the
# kernel of a small batch. Inside it torch.compile calls `tokfuse::<op>_<backend>`.


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
    """A fake of `count` results that each look like the first argument."""

    def fake(x: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(x) for _ in range(count))

    return fake
