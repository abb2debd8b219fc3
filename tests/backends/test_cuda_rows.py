"""Test policy_step of the CUDA backend with both kernels: rows in a cluster, and the second read from L2.

The kernels run on the CPU. Statistics and gradients are compared with float64 within the bounds of token_stats,
objectives with policy_loss in float64. The tests of the ops cover the default calls.
"""

from typing import Any

import cuda_rows
import pytest
import torch
from harness import FLOAT_DTYPES, bits, compare, half_ulp
from logit_cases import FORWARD_ATOL, GRADIENT_RTOL, truth

import tokfuse
from tokfuse import KL, Objective, PPOClip, TargetRatio
from tokfuse.runtime.backends import cuda_backend

pytestmark = [pytest.mark.cuda_host, pytest.mark.skipif(not cuda_backend.hosted(), reason="needs TOKFUSE_CUDA_HOST")]


def check_stats(stats, expected) -> None:
    for name, got in zip(("logp", "entropy", "lse"), stats, strict=False):
        compare(got, getattr(expected, name), atol=FORWARD_ATOL, what=name)
    compare(stats[3], expected.sum_sq, rtol=1e-5, what="sum_sq")
    compare(stats[4], expected.top1, what="top1")


def check_gradient(grad, expected) -> None:
    atol = GRADIENT_RTOL * expected.term
    if grad.dtype != torch.float32:
        atol = atol + half_ulp(expected.grad, grad.dtype)
    compare(grad, expected.grad, atol=atol, what="gradient")


# ---------------------------------------------------------------------------------- policy_step


def policy_problem(tokens: int, vocab: int, dtype: torch.dtype, **names: bool):
    """Return (logits, target, inputs): ratios on both sides of the clip, rows without advantage."""
    gen = torch.Generator().manual_seed(vocab)

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(tokens, generator=gen) * (high - low) + low

    logits = (torch.randn(tokens, vocab, generator=gen) * 3).to(dtype)
    target = torch.randint(0, vocab, (tokens,), generator=gen)
    logp = torch.log_softmax(logits.double(), 1).gather(1, target[:, None])[:, 0].float()
    advantage = uniform(-2.0, 2.0)
    advantage[1::4] = 0.0
    inputs = {
        "old_logp": logp + uniform(-0.5, 0.5),
        "advantage": advantage,
        "token_weight": uniform(0.2, 2.0),
        "signal": uniform(0.1, 0.9),
        "ref_logp": logp + uniform(-1.0, 1.0),
        "kl_weight": uniform(0.0, 1.0),
        "entropy_weight": uniform(0.0, 1.0),
        "anchor_logp": logp + uniform(-1.0, 1.0),
        "anchor_weight": uniform(0.0, 1.0),
    }
    return logits, target, inputs


EVERYTHING = Objective(kl=KL(coef=0.05), entropy_coef=0.02)
OBJECTIVES = {
    "clip": (Objective(shape=PPOClip(low=0.1, high=0.1, dual=2.0)), ("token_weight",)),
    "all_terms": (EVERYTHING, ("token_weight", "ref_logp", "kl_weight", "entropy_weight")),
    "no_weights": (EVERYTHING, ("ref_logp",)),
    "anchor": (
        Objective(kl=KL(coef=0.05), anchor=KL(estimator="abs", coef=0.2)),
        ("ref_logp", "anchor_logp", "anchor_weight"),
    ),
    "signal": (Objective(shape=TargetRatio(low=0.2, high=0.3)), ("signal",)),
}


def check_policy(logits, target, inputs, objective, mask=None, scale=0.25, out=None, **options):
    """Compare statistics and gradient with float64, and results with policy_loss in float64."""
    before = logits.clone()
    stats, results, grad = cuda_rows.policy_step(logits, target, objective, inputs, scale, out, mask=mask, **options)
    if out is not logits:
        assert bits(logits) == bits(before)
    ga, gh = results["d_logp"], results["d_entropy"]
    expected = truth(before, target, ga, gh, mask=mask, **options)
    check_stats(stats, expected)
    check_gradient(grad, expected)
    logp, entropy = (x.double().requires_grad_() for x in stats[:2])
    given = {name: x.double() for name, x in inputs.items() if name != "agg_weight"}
    whole = tokfuse.policy_loss(
        logp,
        objective=objective,
        normalizer=1 / float(scale),
        mask=mask,
        entropy=entropy if objective.entropy_coef else None,
        **given,
    )
    agg = inputs.get("agg_weight", torch.ones_like(ga)).double()
    if "agg_weight" not in inputs:
        whole.loss.backward()
        compare(ga, logp.grad, atol=1e-6, rtol=2e-5, what="d_logp")
        if entropy.grad is not None:
            compare(gh, entropy.grad, atol=1e-7, rtol=1e-6, what="d_entropy")
    compare(results["token_loss"], agg * whole.token_loss, atol=1e-6, rtol=2e-5, what="token_loss")
    kept = torch.ones_like(target, dtype=torch.bool) if mask is None else mask
    ratio = torch.where(kept, (logp.detach() - given["old_logp"]).exp(), 0.0)
    compare(results["ratio"], ratio, rtol=1e-5, what="ratio")
    assert results["flags"][~kept].eq(0).all()
    return results, grad


@pytest.fixture(params=[80, 90], ids=["through_l2", "in_a_cluster"])
def arch(request, monkeypatch):
    monkeypatch.setenv("TOKFUSE_HOST_ARCH", str(request.param))
    return request.param


@pytest.mark.parametrize("name", OBJECTIVES)
def test_policy_step_objectives(name: str, arch: int):
    objective, names = OBJECTIVES[name]
    logits, target, inputs = policy_problem(9, 3001, torch.float32)
    inputs = {n: inputs[n] for n in ("old_logp", "advantage", *names)}
    mask = torch.tensor([True, True, False, True, True, True, True, False, True])
    results, grad = check_policy(logits[:, :3000].clone(), target % 3000, inputs, objective, mask)
    # Rows without a coefficient are zero, and there are some of both kinds.
    dead = (results["d_logp"] == 0) & (results["d_entropy"] == 0)
    assert not grad[dead].any() and dead[2] and not dead.all()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 20.0, "logit_scale": 1.5}, {"temperature": torch.linspace(0.5, 2.0, 7)}],
    ids=["plain", "softcap", "temperature_rows"],
)
@pytest.mark.parametrize("vocab", [1, 7, 2056, 5003])
def test_policy_step_rows(vocab: int, options, dtype: torch.dtype, arch: int):
    logits, target, inputs = policy_problem(7, vocab, dtype)
    inputs = {n: inputs[n] for n in ("old_logp", "advantage")}
    objective = Objective(entropy_coef=0.02)
    separate = check_policy(logits, target, inputs, objective, **options)
    over = logits.clone()
    written = check_policy(over, target, inputs, objective, out=over, **options)
    assert written[1] is over and bits(over) == bits(separate[1])


@pytest.mark.parametrize(
    ("dtype", "vocab", "options"),
    [
        (torch.float32, 40000, {}),
        (torch.bfloat16, 131077, {}),
        (torch.bfloat16, 262144, {}),
        (torch.float32, 40003, {"softcap": 20.0}),
        (torch.bfloat16, 76421, {"softcap": 20.0, "temperature": 0.8}),
    ],
    ids=["2_blocks", "4_blocks_and_a_tail", "8_blocks", "2_blocks_with_softcap", "4_blocks_with_softcap"],
)
def test_policy_step_over_the_blocks_of_a_cluster(dtype: torch.dtype, vocab: int, options: dict[str, Any]):
    """Rows at multiples of 16 bytes for every vocabulary, with masked rows and excluded logits."""
    wide, target, inputs = policy_problem(7, -(-vocab // 8) * 8, dtype)
    target = target.clamp(max=vocab - 1)
    wide[:, 5:vocab:1001] = -torch.inf
    wide[range(7), target] = 1.5
    target[0], target[3] = vocab - 1, 0
    mask = torch.tensor([True, False, True, True, False, False, True])
    inputs = {n: inputs[n] for n in ("old_logp", "advantage")}
    beside = torch.full_like(wide, float("nan"))[:, :vocab]
    objective = Objective(entropy_coef=0.01)
    separate = check_policy(wide[:, :vocab], target, inputs, objective, mask, out=beside, **options)
    assert not separate[1][:, 5:vocab:1001].any()
    over = wide.clone()[:, :vocab]
    check_policy(over, target, inputs, objective, mask, out=over, **options)
    assert bits(over) == bits(separate[1])


def test_policy_step_scale_and_aggregation_weight(arch: int):
    logits, target, inputs = policy_problem(5, 96, torch.float32)
    inputs = {n: inputs[n] for n in ("old_logp", "advantage")}
    inputs["agg_weight"] = torch.tensor([0.5, 1.0, 2.0, 0.25, 3.0])
    check_policy(logits, target, inputs, Objective(), scale=torch.tensor(0.125))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_rows_give_16_bit_gradients_at_their_tokens(dtype: torch.dtype, arch: int):
    """The lm_head path: chunks of float32 logits, row i of token index[i], gradients for a GEMM."""
    logits, target, inputs = policy_problem(6, 520, torch.float32)
    inputs = {n: inputs[n] for n in ("old_logp", "advantage")}
    index = torch.tensor([4, 1, 5])
    out = torch.full((3, 520), float("nan"), dtype=dtype)
    stats, results, grad = cuda_rows.policy_step(logits[index], target, Objective(), inputs, 1.0, out, index=index)
    assert stats[0][[0, 2, 3]].isnan().all()  # other tokens are not changed
    expected = truth(logits[index], target[index], results["d_logp"][index], torch.zeros(3))
    check_stats([x[index] for x in stats], expected)
    check_gradient(grad, expected)
    rows, ones = logits[index], torch.ones(3)
    state = cuda_rows.token_stats_fwd(rows, target[index])
    again = cuda_rows.token_stats_bwd(rows, target[index], state, ones, ones, torch.empty_like(out))
    check_gradient(again, truth(rows, target[index], ones, ones))
