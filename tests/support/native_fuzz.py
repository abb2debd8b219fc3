"""Call tokfuse._native with structs that hypothesis modifies. Run it in a separate process.

Sizes never exceed the buffers, and tensors are correct or None, because the module can check neither. Every
buffer is between canaries. A call must return or raise an error, and may write only to its buffers.
"""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokfuse
from tokfuse.runtime.backends import objective_args, row_args
from tokfuse.runtime.backends.objective_args import ObjectiveOut
from tokfuse.runtime.core import native
from tokfuse.runtime.core.logit_options import LogitOptions
from tokfuse.runtime.policy.inputs import PolicyInputs
from tokfuse.runtime.policy.objective import ObjectiveRecord

TOKENS, VOCAB, PAD, CANARY = 6, 2055, 64, 1234.5
REFUSED = (ValueError, TypeError, RuntimeError, OverflowError)
JUNK = (None, "a", (), -1, -(2**63), 2**63, 10**30, float("nan"), float("inf"), -2.5, True)


class Buffers:
    """Tensors with canaries on both sides."""

    def __init__(self) -> None:
        self.whole: list[torch.Tensor] = []

    def of(self, values: torch.Tensor) -> torch.Tensor:
        size = values.numel()
        whole = torch.full((size + 2 * PAD,), CANARY).to(values.dtype)
        whole[PAD : PAD + size] = values.flatten()
        self.whole.append(whole)
        return whole[PAD : PAD + size].view(values.shape)

    def check(self) -> None:
        for whole in self.whole:
            edge = torch.full((PAD,), CANARY).to(whole.dtype)
            assert torch.equal(whole[:PAD], edge) and torch.equal(whole[-PAD:], edge)


class Fields:
    """Replacement of the native module: the builders then return the fields of a struct as a dict."""

    def __getattr__(self, name: str) -> Any:
        return dict


def spoil(fields: dict[str, Any], sizes: set[str]) -> Any:
    """Return the fields of a struct with up to three changed, one missing or one added."""

    def value(name: str) -> st.SearchStrategy[Any]:
        if isinstance(fields[name], torch.Tensor) or fields[name] is None:
            return st.sampled_from((None, None, None, None, 0, "a", -1))
        if name in sizes:
            return st.integers(0, fields[name]) | st.sampled_from(JUNK[:7])
        if isinstance(fields[name], ObjectiveRecord):
            return objectives(fields[name])
        return st.integers(0, 9) | st.floats(-2, 100) | st.sampled_from(JUNK)

    def change(names: list[str]) -> st.SearchStrategy[Any]:
        return st.fixed_dictionaries({name: value(name) for name in names}).map(lambda new: {**fields, **new})

    known = st.sampled_from(sorted(fields))
    missing = known.map(lambda gone: {name: x for name, x in fields.items() if name != gone})
    others = st.one_of(missing, known.map(lambda name: {**fields, name + "s": fields[name]}))
    places = st.lists(known, max_size=3, unique=True)
    return st.integers(0, 9).flatmap(lambda k: others if k == 9 else places.flatmap(change))


def objectives(record: ObjectiveRecord) -> st.SearchStrategy[Any]:
    """Return objective records with other codes and numbers, or other objects."""
    codes = (st.integers(-1, 10), st.integers(-1, 4), st.integers(-1, 8), st.integers(0, 1))
    numbers = st.lists(st.floats(-5, 5), min_size=6, max_size=6).map(tuple)
    number = st.floats(allow_nan=True, width=32)
    tail = st.tuples(*[number] * 4, st.integers(-1, 8), number, number)
    return (
        st.tuples(*codes, numbers, tail).map(lambda t: ObjectiveRecord(*t[:5], *t[5]))
        | st.lists(st.integers(-2, 9) | st.sampled_from(JUNK), max_size=10).map(tuple)
        | st.just(record._replace(p=record.p[:5]))
    )


def threads_stay_few(fields: dict[str, Any]) -> bool:
    threads = fields.get("threads")
    return not (isinstance(threads, int | float) and 8 < threads < 5000)


def main() -> None:
    module = native.module()
    assert module is not None
    buffers = Buffers()
    make = buffers.of
    logits = make(torch.randn(TOKENS, VOCAB))
    target = make(torch.randint(0, VOCAB, (TOKENS,)))
    out = [make(torch.zeros(TOKENS)) for _ in range(10)]
    grad = make(torch.zeros(TOKENS, VOCAB))
    index = make(torch.randperm(TOKENS))
    options = LogitOptions(make(torch.ones(TOKENS)), None, 1.0, None)
    rows = row_args.logits_args(Fields(), logits, target, options, index=index)
    vector = [make(torch.rand(TOKENS)) for _ in range(9)]
    cu = make(torch.tensor([0, 2, 2, TOKENS]).int())
    inputs = PolicyInputs(
        vector[0],
        vector[1],
        cu_seqlens=cu,
        token_weight=vector[2],
        signal=vector[3],
        ref_logp=vector[4],
        kl_weight=vector[5],
        entropy_weight=vector[6],
        anchor_logp=vector[7],
        anchor_weight=vector[8],
        mask=torch.ones(TOKENS, dtype=torch.bool),
    )
    terms = ObjectiveOut(*(make(x) for x in ObjectiveOut.empty(TOKENS)))
    kl = tokfuse.KL(coef=0.1)
    objective = tokfuse.Objective(shape=tokfuse.NFT(), kl=kl, anchor=kl, entropy_coef=0.1)
    policy = objective_args.objective_args(
        Fields(),
        logp=out[0],
        entropy=out[1],
        inputs=inputs,
        objective=objective,
        inv_normalizer=1.0,
        out=terms,
        scratch=make(torch.zeros(4 * TOKENS)),
    )
    bad_rows = spoil(rows, {"stride", "rows", "vocab", "tokens"}).filter(threads_stay_few)
    bad_policy = spoil(policy, {"tokens", "seqs"}).filter(threads_stay_few)
    # One of seven outputs is sometimes null; each of the three optional ones is sometimes given.
    rare = st.integers(0, 8).map(lambda i: i == 8)
    nullable = st.tuples(st.integers(-20, 6), rare, rare, rare).map(lambda t: [*(i != t[0] for i in range(7)), *t[1:]])
    outcomes = {"ran": 0, "refused": 0}

    def attempt(call: Callable[[], Any]) -> None:
        index.copy_(torch.randperm(TOKENS))
        cu.copy_(torch.tensor([0, 2, 2, TOKENS]))
        target.clamp_(0, VOCAB - 1)
        try:
            call()
            outcomes["ran"] += 1
        except REFUSED:
            outcomes["refused"] += 1
        buffers.check()

    def stats(keep: list[bool]) -> Any:
        given = (x if k else None for x, k in zip(out, keep, strict=True))
        return row_args.token_stats_out(module, row_args.RowStats(*given))

    rules = settings(max_examples=80, deadline=None, derandomize=True, database=None)

    @rules
    @given(bad_rows, nullable)
    def forward(fields: dict[str, Any], keep: list[bool]) -> None:
        attempt(lambda: module.token_stats_fwd(module.LogitsArgs(**fields), stats(keep)))

    @rules
    @given(bad_rows, nullable, st.sampled_from((VOCAB, VOCAB, 0, -1, VOCAB - 1)))
    def backward(fields: dict[str, Any], keep: list[bool], stride: int) -> None:
        def run() -> None:
            logp, entropy, _, ga, gh, row_max, inv_sum = (
                x if k else None for x, k in zip(out[:7], keep[:7], strict=True)
            )
            gradient = module.TokenStatsGrad(
                row_max=row_max,
                inv_sum=inv_sum,
                logp=logp,
                entropy=entropy,
                grad_logp=ga,
                grad_entropy=gh,
                grad_logits=grad,
                grad_stride=stride,
                grad_dtype=0,
            )
            module.token_stats_bwd(module.LogitsArgs(**fields), gradient)

        attempt(run)

    @rules
    @given(bad_policy)
    def loss(fields: dict[str, Any]) -> None:
        attempt(lambda: module.policy_loss(module.ObjectiveArgs(**fields)))

    @rules
    @given(bad_rows, bad_policy, st.booleans(), st.integers(-1, 9), nullable)
    def step(first: dict[str, Any], second: dict[str, Any], swap: bool, phases: int, keep: list[bool]) -> None:
        first, second = (first, policy) if swap else (rows, second)
        # Rows may be listed only if the gradient overwrites the logits.
        listed = None if keep[0] else index
        attempt(
            lambda: module.policy_step(
                logits=module.LogitsArgs(**first),
                stats=stats([True, True, *keep[2:]]),
                objective=module.ObjectiveArgs(**second),
                grad=row_args.grad_rows(module, grad, listed),
                phases=phases,
            )
        )

    @rules
    @given(st.lists(st.integers(-3, 9), min_size=4, max_size=4))
    def offsets(values: list[int]) -> None:
        def run() -> None:
            cu.copy_(torch.tensor(values))
            module.policy_loss(module.ObjectiveArgs(**policy))
            assert values[0] == 0 and values[-1] == TOKENS and sorted(values) == values

        attempt(run)

    @rules
    @given(st.lists(st.integers(-(2**62), 2**62) | st.integers(0, 7), min_size=6, max_size=6))
    def indices(values: list[int]) -> None:
        def run() -> None:
            index.copy_(torch.tensor(values))
            module.token_stats_fwd(module.LogitsArgs(**rows), stats([True] * 7))
            assert all(0 <= v < TOKENS for v in values)

        attempt(run)

    for check in (forward, backward, loss, step, offsets, indices):
        check()
    assert outcomes["ran"] > 40 and outcomes["refused"] > 100, outcomes


if __name__ == "__main__":
    main()
