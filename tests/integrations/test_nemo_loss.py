"""Test `NemoPolicyLoss` with the KL penalty, every correction and the NLL term against NeMo-RL's formula in float64.

`host_formula` states NeMo-RL's ClippedPGLossFn. Bounds: 2e-6 of the value or of 1; gradients within 4e-6
of the largest entry.
"""

import pytest
import torch
from harness import compare

from tokfuse.integrations.nemo_loss import NemoPolicyLoss

B, L = 5, 8
SEQS, TOKS = 7, 41  # global counts, larger than those of this batch
SEQUENCE = {"sequence_level_importance_ratios": True, "token_level_loss": False}
PENALTY = {"reference_policy_kl_penalty": 0.3}


def correction(kind, low=0.7, high=1.4):
    return {
        "use_importance_sampling_correction": True,
        "truncated_importance_sampling_type": kind,
        "truncated_importance_sampling_ratio": high,
        "truncated_importance_sampling_ratio_min": low,
    }


def batch(dtype=torch.float32):
    """Return (log-probabilities, data). Log-ratios are up to about 2; sample 3 has no weight, sample 4 no token."""
    gen = torch.Generator().manual_seed(5)

    def draw(*shape):
        return torch.randn(*shape, generator=gen)

    logp = -2 + 0.5 * draw(B, L + 1)
    lengths = torch.tensor([8, 5, 3, 6, 0])
    data = {
        "prev_logprobs": logp + 0.3 * draw(B, L + 1),
        "generation_logprobs": logp + 0.5 * draw(B, L + 1),
        "reference_policy_logprobs": logp + 0.8 * draw(B, L + 1),
        "advantages": draw(B, L + 1),
        "token_mask": torch.nn.functional.pad((torch.arange(L) < lengths.unsqueeze(1)).float(), (1, 0)),
        "sample_mask": torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0]),
        "rewards": torch.tensor([1.0, 0.0, 0.5, 1.0, 1.0]),
        "curr_logprobs_unfiltered": (logp + 0.1 * draw(B, L + 1))[:, 1:].to(dtype).requires_grad_(),
    }
    data = {k: v.to(dtype) if k != "curr_logprobs_unfiltered" else v for k, v in data.items()}
    return logp[:, 1:].to(dtype).requires_grad_(), data


def masked_mean(x, mask, dim=None, count=None):
    return (x * mask).sum(dim) / ((mask.sum(dim) if count is None else count) + 1e-8)


def kl_estimate(logp, reference, kind, bound, output_bound, weight):
    gap = reference - logp
    if bound is not None:
        inside = gap.clamp(-bound, bound)
        weight = torch.where(gap == inside, weight, weight.detach())
        gap = inside
    kl = {"k1": -gap, "k2": gap.square() / 2, "k3": gap.exp() - 1 - gap}[kind] * weight
    return kl if output_bound is None else kl.clamp(-output_bound, output_bound)


def host_formula(logp, data, cfg):
    """Return (loss, the metrics of the terms under test)."""
    c = {"token_level_loss": True, "reference_policy_kl_penalty": 0.0, "kl_input_clamp_value": 20.0} | cfg
    tokens, samples = data["token_mask"][:, 1:], data["sample_mask"]
    mask = tokens * samples.unsqueeze(1)
    old, sampled, reference, a = (
        data[k][:, 1:] for k in ("prev_logprobs", "generation_logprobs", "reference_policy_logprobs", "advantages")
    )
    by_sequence, by_token = c.get("sequence_level_importance_ratios", False), c["token_level_loss"]

    def reduce(x):
        if by_token:
            return masked_mean(x, mask, count=TOKS)
        return masked_mean(masked_mean(x, tokens, -1), samples, count=SEQS)

    kl = logp.new_zeros(())
    penalty = 0 if c.get("use_kl_in_reward") else c["reference_policy_kl_penalty"]
    if penalty:
        current = data.get("curr_logprobs_unfiltered", logp)
        other = sampled if c.get("use_on_policy_kl_approximation") else current.detach()
        weight = (current - other).exp().nan_to_num(nan=0, posinf=0, neginf=0)
        kind = c.get("reference_policy_kl_type", "k3")
        clamps = (c["kl_input_clamp_value"], c.get("kl_output_clamp_value", 10.0))
        kl = reduce(penalty * kl_estimate(current, reference, kind, *clamps, weight))
    log_ratio = logp - old
    if by_sequence:
        log_ratio = masked_mean(log_ratio, tokens, -1).unsqueeze(1).expand(B, L)
    ratio = log_ratio.exp()
    token = torch.max(-a * ratio, -a * ratio.clamp(0.8, 1.2))
    gap = old - sampled
    w = (gap * mask).sum(-1, keepdim=True).exp() if by_sequence else gap.exp()
    w, oob = w.nan_to_num(nan=0, posinf=0, neginf=0), None
    kind = c.get("truncated_importance_sampling_type")
    low, high = c.get("truncated_importance_sampling_ratio_min"), c.get("truncated_importance_sampling_ratio")
    if kind == "seq-mask-tis":
        mean = masked_mean(gap.nan_to_num(nan=0, posinf=0, neginf=0), tokens, -1).exp()
        kept = ((mean >= low) & (mean <= high)).double()
        oob, w = masked_mean(1 - kept, samples, count=SEQS), w * kept.unsqueeze(1)
    elif kind is not None:
        low = 0.0 if low is None else low
        outside = (w < low) | (w > high)
        oob = masked_mean(outside.double(), mask, count=TOKS)
        w = w.clamp(low, high) if kind == "tis" else w * ~outside
    total = (w.squeeze(1) * samples).sum() / SEQS if by_sequence else masked_mean(w, mask, count=TOKS)
    actor = reduce((w if c.get("use_importance_sampling_correction") else 1.0) * token)
    nll, weight = logp.new_zeros(()), c.get("positive_example_nll_weight", 0.0)
    correct = mask * (data["rewards"] > 0).unsqueeze(1)
    if weight > 0 and correct.sum() > 0:
        nll = masked_mean(-logp, correct, count=correct.sum())
    metrics = {"kl_penalty": kl / penalty if penalty else kl, "positive_nll_loss": nll}
    metrics["sampling_importance_ratio"] = total
    return actor + kl + weight * nll, metrics if oob is None else metrics | {"is_oob_ratio": oob}


CASES = {
    "k1": PENALTY | {"reference_policy_kl_type": "k1"},
    "k2": PENALTY | {"reference_policy_kl_type": "k2"},
    "k3": PENALTY,
    "negative": {"reference_policy_kl_penalty": -0.2, "token_level_loss": False},
    "clamped": PENALTY | {"kl_input_clamp_value": 0.5, "kl_output_clamp_value": 0.15},
    "clamped k1": PENALTY | {"reference_policy_kl_type": "k1", "kl_output_clamp_value": 0.3, **SEQUENCE},
    "free": PENALTY | {"kl_input_clamp_value": None, "kl_output_clamp_value": None},
    "against generation": PENALTY | {"use_on_policy_kl_approximation": True, "token_level_loss": False},
    "in the reward": PENALTY | {"use_kl_in_reward": True},
    "seq-mask-tis": correction("seq-mask-tis", 0.95, 1.1),
    "seq-mask-tis by sample": correction("seq-mask-tis", 0.95, 1.1) | {"token_level_loss": False},
    "sequence": SEQUENCE | {"use_importance_sampling_correction": True},
    "sequence tis": SEQUENCE | correction("tis", None, 1.1),
    "sequence icepop": SEQUENCE | correction("icepop", 0.4, 1.1),
    "nll": {"positive_example_nll_weight": 0.4},
    "all": PENALTY | correction("seq-mask-tis", 0.95, 1.1) | {"positive_example_nll_weight": 0.4},
}


def run(cfg, logp, data):
    """Call it without a mention of the penalty where the case has none, because NeMo-RL's default is 0.01."""
    loss = NemoPolicyLoss({"reference_policy_kl_penalty": 0.0} | cfg)
    return loss(logp, data, torch.tensor(SEQS), torch.tensor(TOKS))


@pytest.mark.parametrize("unfiltered", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_loss_gradients_and_metrics_are_those_of_nemo(case, unfiltered):
    (logp, data), (exact, wide) = batch(), batch(torch.float64)
    if not unfiltered:
        del data["curr_logprobs_unfiltered"], wide["curr_logprobs_unfiltered"]
    loss, metrics = run(CASES[case], logp, data)
    want, expected = host_formula(exact, wide, CASES[case])
    compare(loss, want, rtol=2e-6, atol=2e-6)
    leaves = [(logp, exact)]
    if unfiltered:
        leaves.append((data["curr_logprobs_unfiltered"], wide["curr_logprobs_unfiltered"]))
    for mine, theirs in leaves:
        truth = torch.autograd.grad(want, theirs, retain_graph=True, allow_unused=True)[0]
        grad = torch.autograd.grad(loss, mine, retain_graph=True, allow_unused=True)[0]
        assert (grad is None) == (truth is None)
        if truth is not None:
            assert truth.any()
            compare(grad, truth, atol=4e-6 * float(truth.abs().max()))
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value.item(), rel=2e-5, abs=2e-6), name
    assert ("is_oob_ratio" in metrics) == ("is_oob_ratio" in expected)


def test_samples_are_kept_and_dropped_by_the_cases():
    _, metrics = host_formula(*batch(torch.float64), CASES["seq-mask-tis"])
    assert 0 < metrics["is_oob_ratio"] < 4 / SEQS
    _, metrics = host_formula(*batch(torch.float64), CASES["sequence icepop"])
    assert 0 < metrics["is_oob_ratio"] < 16 / TOKS


def test_log_probabilities_that_are_not_finite():
    """NeMo-RL replaces a ratio that is not finite by 0. Values outside the mask have no effect."""
    cfg = CASES["all"] | {"use_on_policy_kl_approximation": True}
    logp, data = batch()
    del data["curr_logprobs_unfiltered"]
    before = run(cfg, logp, data)[0]
    outside = data["token_mask"] == 0
    for name in ("prev_logprobs", "generation_logprobs", "reference_policy_logprobs"):
        data[name] = data[name].masked_fill(outside, torch.nan)
    loss, _ = run(cfg, logp, data)
    assert loss == before
    assert torch.autograd.grad(loss, logp)[0].isfinite().all()
    data["generation_logprobs"][0, 2] = -torch.inf
    exact, wide = batch(torch.float64)
    del wide["curr_logprobs_unfiltered"]
    wide["generation_logprobs"][0, 2] = -torch.inf
    want, _ = host_formula(exact, wide, cfg)
    compare(run(cfg, logp, data)[0], want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("case", CASES)
def test_micro_batches_without_a_token(case):
    logp, data = batch()
    data["sample_mask"] = torch.zeros(B)
    loss, metrics = run(CASES[case], logp, data)
    assert loss == 0 and metrics["kl_penalty"] == metrics["positive_nll_loss"] == 0
    assert not torch.autograd.grad(loss, logp)[0].any()


def test_nll_without_rewards_or_without_a_correct_sample():
    logp, data = batch()
    data["rewards"] = torch.zeros(B)
    wrong, metrics = run(CASES["nll"], logp, data)
    assert metrics["positive_nll_loss"] == 0
    del data["rewards"]
    assert run(CASES["nll"], logp, data)[0] == wrong == run({}, logp, data)[0]
