"""Print the errors of every output and gradient relative to float64: `python -m tokfuse bench errors`.

Inputs are ordinary and extreme. The table has one line per op, provider, dtype and input family. Outputs
show the largest absolute error. Gradients show the largest absolute error / the largest exact absolute
value. `--json` appends one `ErrorRow` per output, with both numbers.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from tokfuse.bench import exact, machine, ours, peers
from tokfuse.bench.measure import Outputs
from tokfuse.bench.problem import Batch, Unsupported, make_batch
from tokfuse.bench.row import ERROR_NAMES, SCHEMA_VERSION, plain
from tokfuse.bench.runner import classify
from tokfuse.inspection import tables

DTYPES = ("float32", "bfloat16", "float16")
TOKENS = 12
VOCAB = 4099
HIDDEN = 48
TAILS = (1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 65, 1023, 2049)
ENTROPY_COEF = 0.01


@dataclass(frozen=True)
class ErrorRow:
    """Error of one output: `max_abs`, and `max_rel` = max_abs / largest exact absolute value."""

    schema: int
    op: str
    provider: str
    backend: str
    dtype: str
    family: str
    shape: str
    output: str
    max_abs: float | None
    max_rel: float | None
    status: str
    note: str
    cpu_model: str
    isa: str
    torch: str
    commit: str

    def to_json(self) -> str:
        """Return the row as one JSON line."""
        return json.dumps({k: plain(v) for k, v in asdict(self).items()}, allow_nan=False)


@dataclass
class Inputs:
    """One family of inputs, with random incoming gradients and a batch with old_logp close to the exact logp.

    Args:
        leaves: (logits,), or (hidden, weight) for the ops that include the lm_head.
        scaling: keyword arguments of the op: temperature, softcap, logit_scale.
    """

    family: str
    leaves: tuple[torch.Tensor, ...]
    target: torch.Tensor
    scaling: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        gen = torch.Generator().manual_seed(1)
        self.by_logp = torch.randn(self.target.numel(), generator=gen)
        self.by_entropy = torch.randn(self.target.numel(), generator=gen)
        self.z, self.slope = self._scaled()
        self.stats = exact.token_stats(self.z, self.target)
        self.batch: Batch = make_batch(self.target, self.stats["logp"], gen)

    @property
    def shape(self) -> str:
        sizes = [*self.leaves[0].shape, *(leaf.shape[0] for leaf in self.leaves[1:])]
        return "x".join(map(str, sizes))

    def _scaled(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scaled logits in float64, and their derivative with respect to the logits."""
        scale, softcap = self.scaling.get("logit_scale", 1.0), self.scaling.get("softcap")
        raw = exact.head_logits(*self.leaves) if len(self.leaves) == 2 else self.leaves[0].double()
        z, slope = raw * scale, torch.full_like(raw, scale)
        if softcap is not None:
            squashed = torch.tanh(z / softcap)
            z, slope = softcap * squashed, slope * (1 - squashed * squashed)
        temperature = self.scaling.get("temperature", 1.0)
        return z / temperature, slope / temperature

    def exact_stats(self) -> Outputs:
        """Return the statistics, and the gradients of sum(by_logp * logp + by_entropy * entropy)."""
        grad = exact.grad_logits(self.z, self.target, self.by_logp, self.by_entropy)
        return self.stats | self._named(grad * self.slope)

    def exact_step(self) -> Outputs:
        """Return the statistics, the loss and the gradients of the policy step."""
        out = exact.policy_step(self.z, self.batch, ENTROPY_COEF)
        return out | self._named(out.pop("grad_logits") * self.slope)

    def _named(self, grad: torch.Tensor) -> Outputs:
        if len(self.leaves) == 1:
            return {"grad_logits": grad}
        return exact.through_head(grad, self.leaves[0], self.leaves[1])


def families(dtype: torch.dtype) -> Iterator[Inputs]:
    """Yield logits of each regime, with |logit| <= 100, except for "offset", which adds 1e4 to every logit."""
    gen = torch.Generator().manual_seed(0)

    def make(family: str, logits: torch.Tensor, **scaling: float) -> Inputs:
        target = torch.randint(logits.shape[-1], (logits.shape[0],), generator=gen)
        return Inputs(family, (logits.to(dtype),), target, scaling)

    normal = torch.randn(TOKENS, VOCAB, generator=gen) * 3
    yield make("ordinary", normal)
    yield make("wide", torch.rand(TOKENS, VOCAB, generator=gen) * 200 - 100)
    rows = torch.arange(TOKENS)
    peaked = normal.clone()
    peaked[rows, rows * 11] = 60.0
    # half of the targets are the peak
    target = torch.where(rows % 2 == 0, rows * 11, rows + 1)
    yield Inputs("peaked", (peaked.to(dtype),), target)
    yield make("uniform", torch.full((TOKENS, VOCAB), -7.5))
    # half of the vocabulary is -inf, never the target; in row 0 everything but the target
    hidden = torch.rand(TOKENS, VOCAB, generator=gen) < 0.5
    hidden[0] = True
    hidden.scatter_(-1, target[:, None], False)
    yield Inputs("masked", (normal.masked_fill(hidden, -torch.inf).to(dtype),), target)
    yield make("offset", normal + 1e4)
    yield make("temperature", normal, temperature=0.7)
    yield make("softcap", normal * 6, softcap=30.0, logit_scale=0.5)
    for size in TAILS:
        yield make(f"tail_{size}", torch.randn(TOKENS, size, generator=gen) * 3)


def head_families(dtype: torch.dtype) -> Iterator[Inputs]:
    """Yield hidden states and weights whose logits are ordinary, peaked, or a single one."""
    for family, scale, vocab in (("ordinary", 3, 1027), ("peaked", 20, 1027), ("tail_1", 3, 1)):
        gen = torch.Generator().manual_seed(2)
        hidden = torch.randn(TOKENS, HIDDEN, generator=gen)
        weight = torch.randn(vocab, HIDDEN, generator=gen) * (scale / HIDDEN**0.5)
        target = torch.randint(vocab, (TOKENS,), generator=gen)
        yield Inputs(family, (hidden.to(dtype), weight.to(dtype)), target)


@dataclass(frozen=True)
class Case:
    """One op of one provider with one family. `run` returns the backend and the outputs."""

    op: str
    provider: str
    inputs: Inputs
    run: Callable[[], tuple[str, Outputs]]
    exact: Callable[[], Outputs]


def cases(dtype: torch.dtype, peer_names: list[str]) -> Iterator[Case]:
    """Yield every case of one dtype."""
    for data in families(dtype):
        stats_run = partial(_run_stats, "token_stats", data)
        yield Case("token_stats", "tokfuse", data, stats_run, data.exact_stats)
        for name in peer_names if not data.scaling else ():
            run = partial(_run_peer, name, data)
            yield Case("token_stats", name, data, run, data.exact_stats)
        for op in ("policy_step", "policy_step_"):
            yield Case(op, "tokfuse", data, partial(_run_step, op, data), data.exact_step)
    for data in head_families(dtype):
        stats_run = partial(_run_stats, "linear_token_stats", data)
        yield Case("linear_token_stats", "tokfuse", data, stats_run, data.exact_stats)
        step_run = partial(_run_step, "policy_step", data)
        yield Case("policy_step_hidden", "tokfuse", data, step_run, data.exact_step)


def _grads(data: Inputs, stats: Any, leaves: tuple[torch.Tensor, ...]) -> Outputs:
    outputs = (stats["logp"], stats["entropy"])
    incoming = (data.by_logp.to(outputs[0].dtype), data.by_entropy.to(outputs[1].dtype))
    grads = torch.autograd.grad(outputs, leaves, incoming)
    names = ("grad_logits",) if len(leaves) == 1 else ("grad_hidden", "grad_weight")
    return dict(zip(names, grads, strict=True))


def _run_stats(name: str, data: Inputs) -> tuple[str, Outputs]:
    op = ours.public(name)
    leaves = tuple(leaf.clone().requires_grad_() for leaf in data.leaves)

    def run() -> Outputs:
        stats = ours.stats_outputs(op(*leaves, data.target, **data.scaling))
        return stats | _grads(data, stats, leaves)

    return ours.provider(run).backend, run()


def _run_step(name: str, data: Inputs) -> tuple[str, Outputs]:
    op = ours.public(name)
    arguments = {**ours.policy_arguments(data.batch, ENTROPY_COEF), **data.scaling}
    arguments["target"] = data.target

    def run() -> Outputs:
        leaves = [leaf.clone() for leaf in data.leaves]
        if name == "policy_step_":
            return ours.step_outputs(op(leaves[0], **arguments))
        if len(leaves) == 1:
            return ours.step_outputs(op(logits=leaves[0], **arguments))
        hidden, weight = (leaf.requires_grad_() for leaf in leaves)
        return ours.step_outputs(op(hidden=hidden, weight=weight, **arguments))

    return ours.provider(run).backend, run()


def _run_peer(name: str, data: Inputs) -> tuple[str, Outputs]:
    function = peers.token_stats_fn(name, 1, everything=True)
    leaf = data.leaves[0].clone().requires_grad_()
    stats = function(leaf, data.target)
    if "entropy" not in stats:
        raise Unsupported("computes only logp")
    return peers.KNOWN[name].module, stats | _grads(data, stats, (leaf,))


def measure_errors(dtypes: list[str], peer_names: list[str], facts: dict[str, Any]) -> Iterator[ErrorRow]:
    """Yield one row per op, provider, dtype, family and output."""
    kept: dict[str, Any] = {key: str(facts[key]) for key in ("cpu_model", "isa", "torch", "commit")}
    for dtype in dtypes:
        for case in cases(getattr(torch, dtype), peer_names):
            row = partial(
                ErrorRow,
                schema=SCHEMA_VERSION,
                op=case.op,
                provider=case.provider,
                dtype=dtype,
                family=case.inputs.family,
                shape=case.inputs.shape,
                **kept,
            )
            try:
                backend, outputs = case.run()
            except Exception as error:  # becomes a row
                status, note = classify(error)
                yield row(backend="", output="", max_abs=None, max_rel=None, status=status, note=note)
                continue
            status = "fallback" if backend == "reference" else "pass"
            want = case.exact()
            for name in ERROR_NAMES:
                if name in outputs and name in want:
                    worst = exact.distance("", outputs[name], want[name])
                    largest = exact.largest(want[name])
                    yield row(
                        backend=backend,
                        output=name,
                        max_abs=worst,
                        status=status,
                        note="",
                        max_rel=worst / largest if largest else worst,
                    )


def table(rows: list[ErrorRow]) -> tables.Table:
    """Return one row per op, provider, dtype and family. Vocabulary tails are merged into their largest error."""
    lines: dict[tuple[str, ...], dict[str, float]] = {}
    notes: dict[tuple[str, ...], str] = {}
    for row in rows:
        family = "tails" if row.family.startswith("tail_") else row.family
        key = (row.op, f"{row.provider} ({row.backend or '-'})", row.dtype, family)
        cells = lines.setdefault(key, {})
        value = row.max_rel if row.output.startswith("grad_") else row.max_abs
        if value is None:
            notes[key] = f"{row.status}: {row.note}"
        else:
            cells[row.output] = max(cells.get(row.output, 0.0), value)
    heads = ["op", "provider", "dtype", "inputs", *ERROR_NAMES, "note"]
    out = []
    for line_key, cells in lines.items():
        numbers = [f"{cells[n]:.1e}" if n in cells else "-" for n in ERROR_NAMES]
        out.append([*line_key, *numbers, notes.get(line_key, "")])
    return tables.Table(heads, out)


def main(options: argparse.Namespace) -> int:
    """Print the table and append rows to `--json`. Return 1 if a tokfuse op failed."""
    dtypes = options.dtype.split(",") if options.dtype else list(DTYPES)
    names = [n for n in peers.choose(options.peers or "none", "") if "compile" not in n]
    rows = []
    for row in measure_errors(dtypes, names, machine.facts("python -m tokfuse bench errors")):
        rows.append(row)
        if options.json:
            with open(options.json, "a", encoding="utf-8") as sink:
                print(row.to_json(), file=sink)
    about = "outputs: max absolute error; gradients: max absolute error / max absolute value"
    found = table(rows)
    if options.md:
        print(f"{about}\n", *found.markdown(), sep="\n")
    else:
        tables.show("\n".join([f"{about}\n", *found.aligned()]), about, found)
    return int(any(row.provider == "tokfuse" and row.status == "error" for row in rows))
