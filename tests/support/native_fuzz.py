"""Calls tokfuse._native with records that hypothesis has spoilt; run in a process of its own.

Sizes never exceed what the buffers hold and addresses are either right or null, since neither can
be checked. Every buffer lies between canaries. A call must return or raise, and may write its own
buffers only.
"""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokfuse
from tokfuse.runtime.backends import cpu_policy, cpu_rows
from tokfuse.runtime.core import native
from tokfuse.runtime.core.logit_options import LogitOptions
from tokfuse.runtime.policy.inputs import PolicyInputs

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


def spoil(record: tuple[Any, ...], addresses: set[int], sizes: set[int]) -> Any:
    """Records with up to three fields changed, or of another length."""

    def field(i: int) -> st.SearchStrategy[Any]:
        if i in addresses:
            return st.sampled_from((0, 0, 0, 0, None, "a", -1))
        if i in sizes:
            return st.integers(0, record[i]) | st.sampled_from(JUNK[:7])
        if isinstance(record[i], tuple):
            return objectives(record[i])
        return st.integers(0, 9) | st.floats(-2, 100) | st.sampled_from(JUNK)

    def change(indices: list[int]) -> st.SearchStrategy[Any]:
        return st.tuples(*(field(i) for i in indices)).map(
            lambda values: tuple(values[indices.index(i)] if i in indices else old for i, old in enumerate(record))
        )

    places = st.lists(st.integers(0, len(record) - 1), max_size=3, unique=True)
    lengths = st.integers(0, len(record) + 1).map(lambda n: (record + (0,))[:n])
    return st.integers(0, 9).flatmap(lambda k: lengths if k == 9 else places.flatmap(change))


def objectives(record: tuple[Any, ...]) -> st.SearchStrategy[Any]:
    """Objective records: other codes and numbers, or something else altogether."""
    codes = (st.integers(-1, 10), st.integers(-1, 4), st.integers(-1, 8), st.integers(0, 1))
    numbers = st.lists(st.floats(-5, 5), min_size=6, max_size=6).map(tuple)
    tail = st.tuples(*[st.floats(allow_nan=True, width=32)] * 4)
    return (
        st.tuples(*codes, numbers, tail).map(lambda t: (*t[:5], *t[5]))
        | st.lists(st.integers(-2, 9) | st.sampled_from(JUNK), max_size=10).map(tuple)
        | st.just((*record[:4], record[4][:5], *record[5:]))
    )


def threads_stay_few(record: Any) -> bool:
    return all(not (isinstance(x, int | float) and 8 < x < 5000) for x in record[14:15])


def main() -> None:
    module = native.module()
    assert module is not None
    buffers = Buffers()
    make = buffers.of
    logits = make(torch.randn(TOKENS, VOCAB))
    target = make(torch.randint(0, VOCAB, (TOKENS,)))
    out = [make(torch.zeros(TOKENS)) for _ in range(7)]
    grad = make(torch.zeros(TOKENS, VOCAB))
    index = make(torch.randperm(TOKENS))
    options = LogitOptions(make(torch.ones(TOKENS)), None, 1.0, None)
    logits_record, alive = cpu_rows.logits_record(logits, target, options)
    logits_record = (*logits_record[:15], index.data_ptr(), *logits_record[16:])
    vector = [make(torch.rand(TOKENS)) for _ in range(7)]
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
        mask=torch.ones(TOKENS, dtype=torch.bool),
    )
    terms = cpu_policy.native_outputs(TOKENS)
    terms = tuple(make(x) for x in terms)
    objective = tokfuse.Objective(shape=tokfuse.NFT(), kl=tokfuse.KL(coef=0.1), entropy_coef=0.1)
    policy, more = cpu_policy.native_record(out[0], out[1], inputs, objective, 1.0, terms)
    pointers = [x.data_ptr() for x in out]
    bad_logits = spoil(logits_record, {0, 5, 6, 7, 11, 15}, {1, 3, 4, 16}).filter(threads_stay_few)
    bad_policy = spoil(policy, {3, 4, 5, 7, 8, *range(9, 15), *range(17, 21), 22}, {1, 2}).filter(
        lambda r: all(not (isinstance(x, int | float) and 8 < x < 5000) for x in r[21:22])
    )
    nullable = st.integers(-20, 6).map(lambda null: [i != null for i in range(7)])
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

    def some(keep: list[bool]) -> list[int]:
        return [p if k else 0 for p, k in zip(pointers, keep, strict=True)]

    rules = settings(max_examples=80, deadline=None, derandomize=True, database=None)

    @rules
    @given(bad_logits, nullable)
    def forward(record: Any, keep: list[bool]) -> None:
        attempt(lambda: module.token_stats_fwd(record, *some(keep), 0, 0, 0, 1.0))

    @rules
    @given(bad_logits, nullable, st.sampled_from((VOCAB, VOCAB, 0, -1, VOCAB - 1)))
    def backward(record: Any, keep: list[bool], stride: int) -> None:
        p = some(keep)
        attempt(lambda: module.token_stats_bwd(record, p[5], p[6], *p[:2], p[3], p[4], grad.data_ptr(), stride))

    @rules
    @given(bad_policy)
    def loss(record: Any) -> None:
        attempt(lambda: module.policy_loss(record))

    @rules
    @given(bad_logits, bad_policy, st.booleans(), st.integers(-1, 9), nullable)
    def step(first: Any, second: Any, swap: bool, phases: int, keep: list[bool]) -> None:
        first, second = (first, policy) if swap else (logits_record, second)
        # Rows may only be listed where the gradient overwrites the logits.
        kept = 0 if keep[0] else index.data_ptr()
        attempt(lambda: module.policy_step(phases, first, second, *some(keep)[2:], grad.data_ptr(), VOCAB, kept))

    @rules
    @given(st.lists(st.integers(-3, 9), min_size=4, max_size=4))
    def offsets(values: list[int]) -> None:
        def run() -> None:
            cu.copy_(torch.tensor(values))
            module.policy_loss(policy)
            assert values[0] == 0 and values[-1] == TOKENS and sorted(values) == values

        attempt(run)

    @rules
    @given(st.lists(st.integers(-(2**62), 2**62) | st.integers(0, 7), min_size=6, max_size=6))
    def indices(values: list[int]) -> None:
        def run() -> None:
            index.copy_(torch.tensor(values))
            module.token_stats_fwd(logits_record, *pointers, 0, 0, 0, 1.0)
            assert all(0 <= v < TOKENS for v in values)

        attempt(run)

    for check in (forward, backward, loss, step, offsets, indices):
        check()
    del alive, more
    assert outcomes["ran"] > 40 and outcomes["refused"] > 100, outcomes


if __name__ == "__main__":
    main()
