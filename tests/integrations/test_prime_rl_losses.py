"""Test prime-rl's losses against its formulas in float64, and their metrics.

Bounds: 2e-6 of the value or of 1; gradients within 4e-6 of the largest entry.
"""

import sys
import types
from types import SimpleNamespace

import pytest
import torch
from harness import compare

from tokfuse.integrations import prime_rl_losses as losses

TOKENS = 40


@pytest.fixture(autouse=True)
def _host(monkeypatch):
    module = types.ModuleType("prime_rl.trainer.rl.loss")
    module.LossOutputs = SimpleNamespace
    for name in ("prime_rl", "prime_rl.trainer", "prime_rl.trainer.rl"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def inputs(seed=0, weights=True):
    """Return LossInputs of one sequence with probabilities in all of (0, 1), so that every region has tokens."""
    gen = torch.Generator().manual_seed(seed)

    def draw():
        return torch.randn(TOKENS, generator=gen)

    logp = -(draw().abs() + 0.02)
    return SimpleNamespace(
        trainer_logprobs=logp.requires_grad_(),
        inference_logprobs=-(logp.detach() + 0.5 * draw()).abs(),
        ref_logprobs=-(logp.detach() + 0.7 * draw()).abs(),
        advantages=draw().round(decimals=1),
        loss_mask=torch.rand(TOKENS, generator=gen) < 0.8,
        loss_weights=torch.rand(TOKENS, generator=gen) + 0.5 if weights else None,
    )


def wide(x):
    out = {k: v if v is None or v.dtype == torch.bool else v.detach().double() for k, v in vars(x).items()}
    out["trainer_logprobs"].requires_grad_()
    return SimpleNamespace(**out)


def host_mean(x, mask):
    return (x * mask).sum() / mask.sum().clamp(min=1)


def host_formula(kind, x, low=0.2, high=0.2, threshold=0.1, adv_tau=1.0, kl_tau=1e-3):
    """Return (loss, metrics) as prime-rl states them."""
    log_ratio = x.trainer_logprobs - x.inference_logprobs
    change = (x.trainer_logprobs.exp() - x.inference_logprobs.exp()).detach()
    a, mask = x.advantages, x.loss_mask
    if kind == "default":
        masked = torch.where(a > 0, change > high, change < -low)
    elif kind == "ipo":
        masked = change.abs() > threshold
    else:
        masked, kl_tau = change < -0.2, 1e-3
        a = (x.ref_logprobs - x.trainer_logprobs).detach()
    keep = mask & ~masked
    token = -(keep * adv_tau * a * log_ratio.exp()) + kl_tau * (mask * log_ratio**2)
    if x.loss_weights is not None:
        token = token * x.loss_weights
    kl = (log_ratio.exp() - log_ratio - 1).detach()
    metrics = {
        "masked_mismatch_kl": host_mean(kl, mask & masked),
        "unmasked_mismatch_kl": host_mean(kl, keep),
        "is_masked": host_mean(masked, mask),
    }
    if kind == "default":
        metrics |= {
            "is_masked_low": host_mean((a < 0) & masked, mask),
            "is_masked_high": host_mean((a > 0) & masked, mask),
            "masked_advantage_positive": host_mean(a > 0, mask & masked),
            "masked_advantage_negative": host_mean(a < 0, mask & masked),
        }
    if kind == "ref_kl":
        metrics = {f"ref_kl/{k}": v for k, v in metrics.items()} | {"ref_kl": host_mean(a, mask)}
    return token.sum(), metrics


CASES = [
    ("default", {}, {}),
    (
        "default",
        {"dppo_mask_low": 0.05, "dppo_mask_high": 0.1, "adv_tau": 0.7, "kl_tau": 0.3},
        {"low": 0.05, "high": 0.1, "adv_tau": 0.7, "kl_tau": 0.3},
    ),
    ("default", {"dppo_mask_low": 0.0, "dppo_mask_high": 0.0, "kl_tau": 0.0}, {"low": 0.0, "high": 0.0, "kl_tau": 0.0}),
    ("ipo", {}, {}),
    ("ipo", {"ipo_threshold": 0.02, "adv_tau": 2.0, "kl_tau": 0.1}, {"threshold": 0.02, "adv_tau": 2.0, "kl_tau": 0.1}),
    ("ref_kl", {}, {}),
]


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize(("kind", "options", "formula"), CASES)
def test_losses_are_those_of_prime_rl(kind, options, formula, weights):
    x = inputs(weights=weights)
    exact = wide(x)
    if kind == "ref_kl":
        x.advantages = exact.advantages = torch.full((TOKENS,), float("nan"))  # not read
    out = getattr(losses, f"prime_rl_{kind}_loss")(x, **options)
    want, metrics = host_formula(kind, exact, **formula)
    dropped = [float(value) for name, value in metrics.items() if name.endswith("is_masked")]
    assert 0 < dropped[0] < 1
    compare(out.loss, want, rtol=2e-6, atol=2e-6)
    (mine,), (truth,) = (
        torch.autograd.grad(*pair) for pair in ((out.loss, x.trainer_logprobs), (want, exact.trainer_logprobs))
    )
    compare(mine, truth, atol=4e-6 * float(truth.abs().max()))
    assert out.metrics.keys() == metrics.keys()
    for name, value in metrics.items():
        compare(out.metrics[name].double(), value.double(), rtol=1e-5, atol=1e-6, what=name)


@pytest.mark.parametrize("kind", ["default", "ipo", "ref_kl"])
def test_empty_mask_and_values_outside_it(kind):
    loss = getattr(losses, f"prime_rl_{kind}_loss")
    x = inputs()
    before = loss(x).loss
    x.trainer_logprobs = torch.where(x.loss_mask, x.trainer_logprobs, torch.nan)
    x.inference_logprobs = torch.where(x.loss_mask, x.inference_logprobs, -torch.inf)
    assert loss(x).loss == before
    x = inputs()
    x.loss_mask = torch.zeros(TOKENS, dtype=torch.bool)
    out = loss(x)
    assert out.loss == 0 and not any(out.metrics.values())
    assert not torch.autograd.grad(out.loss, x.trainer_logprobs)[0].any()


def test_ref_kl_needs_a_reference():
    x = inputs()
    x.ref_logprobs = None
    with pytest.raises(ValueError, match="ref_logprobs must be given for ref_kl; got None"):
        losses.prime_rl_ref_kl_loss(x)


def test_clipped_ratio_with_a_kl():
    x = inputs()
    exact = wide(x)
    out = losses.prime_rl_loss(x, clip_high=0.4, dual=1.3, kl_coef=0.1)
    a, ratio = exact.advantages, (exact.trainer_logprobs - exact.inference_logprobs).exp()
    token = torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.4))
    token = torch.where(a < 0, torch.minimum(token, -1.3 * a), token)
    gap = exact.ref_logprobs - exact.trainer_logprobs
    want = ((token + 0.1 * (gap.exp() - gap - 1)) * exact.loss_weights)[exact.loss_mask].sum()
    compare(out.loss, want, rtol=2e-6, atol=2e-6)
    (mine,), (truth,) = (
        torch.autograd.grad(*pair) for pair in ((out.loss, x.trainer_logprobs), (want, exact.trainer_logprobs))
    )
    compare(mine, truth, atol=4e-6 * float(truth.abs().max()))
    assert set(out.metrics) == {"clip_low", "clip_high", "kl_k1", "ratio", "ref_kl_k3"}
