"""Test the Triton policy ops on a GPU: no synchronisation, and capture in a CUDA graph.

The files of the ops run every backend, so they test values, options and edge cases on the GPU. Capture without
a GPU relies on these ops using only launches and torch allocations. The only host read is in
`device_head.classify`, which test_triton_linear runs as under capture.
"""

import functools
import warnings

import pytest
import torch
from gpu_time import median_ms
from harness import bits, compare

import tokfuse
from tokfuse import KL, Objective, PPOClip

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

TOKENS, HIDDEN, VOCAB = 64, 256, 32_008
SPEC = Objective(shape=PPOClip(low=0.2, high=0.2), aggregation="seq_mean_token_mean")


@pytest.fixture(autouse=True)
def _triton():
    with tokfuse.backend("triton"):
        yield


def problem(dtype: torch.dtype = torch.bfloat16):
    """Return (hidden, weight, keywords) on the GPU: masked tokens, zero advantages."""
    gen = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=gen).to(dtype)
    weight = torch.randn(VOCAB, HIDDEN, generator=gen).mul(0.1).to(dtype)
    advantage = torch.randn(TOKENS, generator=gen)
    advantage[::3] = 0.0
    keywords = {
        "target": torch.randint(0, VOCAB, (TOKENS,), generator=gen),
        "advantage": advantage,
        "old_logp": torch.randn(TOKENS, generator=gen) - 11.0,
        "mask": torch.arange(TOKENS) % 5 > 0,
        "cu_seqlens": torch.tensor([0, 20, TOKENS], dtype=torch.int32),
    }
    keywords = {k: v.cuda() for k, v in keywords.items()}
    return hidden.cuda().requires_grad_(), weight.cuda().requires_grad_(), keywords


def synchronisations(call) -> int:
    """Return how often the host synchronised with the device. The call is compiled first."""
    call()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(w.message) for w in caught)


def test_the_host_waits_only_for_the_row_classes():
    hidden, weight, keywords = problem()
    logits = (hidden @ weight.t()).detach()
    vectors = {k: v for k, v in keywords.items() if k != "target"}

    def from_logits():
        tokfuse.policy_step(logits=logits, objective=SPEC, normalizer="batch", **keywords)

    def loss():
        tokfuse.policy_loss(vectors["old_logp"], objective=SPEC, normalizer="batch", **vectors)

    def sequence():
        gspo = Objective(level="sequence")
        tokfuse.policy_step(logits=logits, objective=gspo, normalizer="batch", **keywords)

    def from_hidden(objective=SPEC, **options):
        given = keywords | options
        step = tokfuse.policy_step(hidden=hidden, weight=weight, objective=objective, **given)
        step.loss.backward()

    for call in (from_logits, loss, sequence):
        assert synchronisations(call) == 0, call.__name__
    assert synchronisations(from_hidden) == 1
    compact = functools.partial(from_hidden, compact_clipped=True)
    assert synchronisations(compact) == 1
    kl = Objective(kl=KL(coef=0.1))
    known = {"mask": None, "ref_logp": keywords["old_logp"]}
    assert synchronisations(lambda: from_hidden(kl, **known)) == 0


def captured(call):
    """Return (graph, result of `call` inside), after a warm-up on a side stream as torch requires."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_step_from_logits_replays(level: str):
    hidden, weight, keywords = problem()
    logits = (hidden @ weight.t()).detach()
    spec = Objective(level=level, entropy_coef=0.01)

    def step():
        return tokfuse.policy_step(logits=logits, objective=spec, normalizer="batch", **keywords)

    graph, out = captured(step)
    logits.mul_(1.5)
    keywords["advantage"].neg_()
    graph.replay()
    want = step()
    assert bits(out.loss) == bits(want.loss) and bits(out.grad_logits) == bits(want.grad_logits)
    assert bits(out.metrics.sums) == bits(want.metrics.sums)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_step_from_hidden_replays(dtype: torch.dtype, level: str, compact: bool):
    """Under capture every row is computed, in other chunks: equal up to the rounding of the GEMMs."""
    hidden, weight, keywords = problem(dtype)

    def step():
        return tokfuse.policy_step(
            hidden=hidden, weight=weight, objective=Objective(level=level), compact_clipped=compact, **keywords
        )

    graph, out = captured(step)
    with torch.no_grad():
        hidden.mul_(1.1)
    graph.replay()
    want = step()
    compare(out.loss, want.loss, atol=1e-5)
    eps = torch.finfo(dtype).eps
    for name in ("grad_hidden", "grad_weight"):
        expected = getattr(want, name)
        compare(getattr(out, name), expected, atol=max(eps, 1e-5) * float(expected.abs().max()), what=name)
    assert not out.grad_hidden[~keywords["mask"]].any()


def test_offsets_beyond_two_to_the_31():
    """Rows that start 2^31 elements into a buffer."""
    rows, vocab = 4, 2**30 + 64
    logits = torch.zeros(rows, vocab, dtype=torch.bfloat16, device="cuda")[:, :VOCAB]
    logits.copy_(torch.randn(rows, VOCAB))
    keywords = {
        "target": torch.arange(rows, device="cuda"),
        "advantage": torch.ones(rows, device="cuda"),
        "old_logp": torch.full((rows,), -11.0, device="cuda"),
        "objective": Objective(),
    }
    want = tokfuse.policy_step(logits=logits.contiguous(), **keywords)
    got = tokfuse.policy_step_(logits, **keywords)
    assert bits(got.grad_logits.contiguous()) == bits(want.grad_logits)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_a_step_over_the_logits_takes_the_time_of_a_copy(softcap, record_property):
    """One read and one write; L2 serves the second read of a row.

    With a softcap the arithmetic takes longer than the memory: 72% of an H100's bandwidth by the kernel table.
    """
    rows, vocab = 4096, 128_256
    logits = torch.randn(rows, vocab, device="cuda", dtype=torch.bfloat16)
    other = torch.empty_like(logits)
    given = {
        "target": torch.randint(0, vocab, (rows,), device="cuda"),
        "advantage": torch.ones(rows, device="cuda"),
        "old_logp": torch.full((rows,), -12.0, device="cuda"),
    }
    spec = Objective(entropy_coef=0.01)
    step = median_ms(lambda: tokfuse.policy_step_(logits, objective=spec, softcap=softcap, **given))
    share = median_ms(lambda: other.copy_(logits)) / step
    record_property("share_of_copy_bandwidth", share)
    assert share > (0.6 if softcap is None else 0.3), f"{share:.2f} of the bandwidth of a copy"


@pytest.mark.parametrize(("kind", "least"), [("kl_forward", 0.6), ("jsd", 0.3)])
def test_a_divergence_takes_the_time_of_its_reads(kind, least, record_property):
    """A KL reads two tensors once: as many bytes as one copy moves. The JSD reads them twice."""
    p, q = (torch.randn(4096, 128_256, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(p)
    share = median_ms(lambda: out.copy_(p)) / median_ms(lambda: tokfuse.paired_divergence(p, q, kind=kind))
    record_property("share_of_copy_bandwidth", share)
    assert share > least, f"{share:.2f} of the bandwidth of a copy"
