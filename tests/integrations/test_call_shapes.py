"""Test losses with other trainers' signatures, each against the trainer's formula in float64.

Bounds: 2e-6 of the value or of 1; gradients within 4e-6 of the largest entry.
"""

import importlib
import inspect
import sys
import types
from types import SimpleNamespace

import pytest
import torch
from harness import compare

from tokfuse.integrations import call_shapes as shapes
from tokfuse.integrations import nemo_loss

B, L, V = 3, 6, 31


def batch(seed=0):
    gen = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    logp = (-2 + 0.5 * draw(B, L)).float()
    mask = torch.ones(B, L)
    mask[0, 4:] = mask[2, 2:] = 0
    return SimpleNamespace(
        logp=logp.requires_grad_(),
        old=(logp.detach() + 0.3 * draw(B, L)).float(),
        rollout=(logp.detach() + 0.6 * draw(B, L)).float(),
        advantage=draw(B, L).float(),
        mask=mask,
    )


def wide(b):
    """Return the same batch in float64, for the formula."""
    out = SimpleNamespace(**{k: v.detach().double() for k, v in vars(b).items()})
    out.logp.requires_grad_()
    return out


def ppo(ratio, a, low, high, dual=None):
    loss = torch.maximum(-ratio * a, -ratio.clamp(1 - low, 1 + high) * a)
    return loss if dual is None else torch.where(a < 0, torch.minimum(loss, -dual * a), loss)


def assert_same(ours, leaf, formula, wide_leaf):
    assert formula.dtype == torch.float64
    compare(ours, formula, rtol=2e-6, atol=1e-6, what="loss")
    mine, want = (torch.autograd.grad(*x, retain_graph=True)[0] for x in ((ours, leaf), (formula, wide_leaf)))
    compare(mine, want, atol=4e-6 * float(want.abs().max()), what="gradient")


def mean_of(x, mask):
    return ((x * mask).sum() / mask.sum()).item()


# ------------------------------------------------------------------------------------------- Liger

LIGER = {
    "dapo": {},
    "bnpo": {"beta": 0.0},
    "grpo": {},
    "sapo": {},
    "cispo": {"eps_high": 1.1},
    "dr_grpo": {"max_completion_length": 9},
    "vespo": {"beta": 0.0},
}


def liger_reference(logits, b, ids, a, kind, beta=0.04, eps_high=0.4, max_completion_length=L):
    logp = (logits[:, :-1] / 0.9).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    ratio, a, m = (logp - b.old).exp(), a.unsqueeze(1), b.mask
    if kind == "sapo":
        tau = torch.where(a > 0, 1.0, 1.05)
        loss = -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * a
    elif kind == "cispo":
        loss = -ratio.clamp(max=eps_high).detach() * a * logp
    elif kind == "vespo":
        w = ((logp - b.old) * m).sum(-1, keepdim=True).exp().detach()
        k, lam = torch.where(a >= 0, 2.0, 3.0), torch.where(a >= 0, 3.0, 2.0)
        loss = -(lam + k * w.log() - lam * w).exp() * a * logp
    else:
        loss = ppo(ratio, a, 0.2, eps_high)
    loss = loss + beta * ((b.rollout - logp).exp() - (b.rollout - logp) - 1)
    if kind in ("grpo", "sapo"):
        return ((loss * m).sum(1) / m.sum(1)).mean()
    return (loss * m).sum() / (B * max_completion_length if kind == "dr_grpo" else m.sum())


@pytest.mark.parametrize("kind", LIGER)
def test_liger(kind):
    b = batch()
    gen = torch.Generator().manual_seed(3)
    logits = torch.randn(B, L + 1, V, generator=gen, requires_grad=True)
    ids, a = torch.randint(V, (B, L), generator=gen), torch.tensor([1.0, -0.5, 0.7])
    before = logits.detach().clone()
    ours, metrics = shapes.triton_grpo_loss(
        logits, b.old, b.rollout, ids, a, b.mask, loss_type=kind, reduce=True, **LIGER[kind]
    )
    exact = logits.detach().double().requires_grad_()
    assert_same(ours, logits, liger_reference(exact, wide(b), ids, a.double(), kind, **LIGER[kind]), exact)
    assert torch.equal(logits.detach(), before)  # inplace=True permits the op to overwrite its input
    assert len(metrics) == (1 if LIGER[kind].get("beta") == 0.0 else 2)


def test_liger_window_and_sampler_ratio():
    b = batch()
    logits = torch.randn(B, L + 1, V, requires_grad=True)
    ids, a = torch.randint(V, (B, L)), torch.tensor([1.0, -0.5, 0.7])
    args = (logits, b.old, None, ids, a, b.mask)
    one, _ = shapes.triton_grpo_loss(*args, beta=0.0, reduce=True, num_items_in_batch=40)
    plain, _ = shapes.triton_grpo_loss(*args, beta=0.0, reduce=True)
    # Summands near 1 cancel to 2e-4, so the bound is their rounding and not relative to the loss.
    assert one.item() == pytest.approx(plain.item() * b.mask.sum().item() / 40, rel=1e-5, abs=1e-7)
    twice, _ = shapes.triton_grpo_loss(*args, beta=0.0, reduce=True, vllm_is_ratio=torch.full((B,), 2.0))
    assert twice.item() == pytest.approx(2 * plain.item(), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(
    "more",
    [
        {"reduce": False},
        {"loss_type": "luspo", "reduce": True},
        {"loss_type": "x", "reduce": True},
        {"use_bias_correction_kl": True, "importance_sampling_level": "sequence", "reduce": True},
    ],
)
def test_liger_refuses(more):
    name = "use_bias_correction_kl" if len(more) == 3 else next(iter(more))
    with pytest.raises(ValueError, match=f"call_shapes: {name} must be"):
        shapes.triton_grpo_loss(
            torch.zeros(1, 3, 4), None, torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.int64), torch.ones(1), **more
        )


# ---------------------------------------------------------------------------------------- OpenRLHF


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dual_clip": 1.5},
        {"token_level_loss": False},
        {"policy_loss_type": "gspo"},
        {"policy_loss_type": "gspo", "enable_vllm_is_correction": True, "dual_clip": 1.01},
        {"enable_vllm_is_correction": True},
        {"vllm_is_correction_type": "icepop"},
        {"vllm_is_correction_type": "seq-mask-tis"},
    ],
)
@pytest.mark.parametrize("counts", [{}, {"dp_size": 2, "batch_num_tokens": 31, "global_batch_size": 7}])
def test_openrlhf(options, counts):
    f, b = batch(), wide(batch())
    m = b.mask
    low, high = (0.7, 1.4)
    correct = options.get("enable_vllm_is_correction") or "vllm_is_correction_type" in options
    if correct:
        options = {**options, "enable_vllm_is_correction": True, "vllm_is_truncated_threshold": [low, high]}
    gspo = options.get("policy_loss_type") == "gspo"
    corrects_gspo = gspo and correct
    correct = correct and not gspo
    log_ratio = b.logp - (b.rollout if corrects_gspo else b.old)
    if gspo:
        log_ratio = ((log_ratio * m).sum(1) / m.sum(1)).unsqueeze(1) * torch.ones_like(m)
    loss = ppo(log_ratio.exp(), b.advantage, 0.2, 0.2, options.get("dual_clip"))
    w = (b.old - b.rollout).exp()
    if correct:
        mean = (((b.old - b.rollout) * m).sum(1) / m.sum(1)).exp().unsqueeze(1)
        loss = (
            loss
            * {
                "tis": w.clamp(low, high),
                "icepop": w * ((w >= low) & (w <= high)),
                "seq-mask-tis": w * ((mean >= low) & (mean <= high)),
            }[options.get("vllm_is_correction_type", "tis")]
        )
    if gspo or not options.get("token_level_loss", True):
        want = ((loss * m).sum(1) / m.sum(1)).sum() / counts.get("global_batch_size", B)
    else:
        want = (loss * m).sum() / counts.get("batch_num_tokens", m.sum())
    module = shapes.PolicyLoss(**options)
    ours, clip, kl, vllm_kl = module(f.logp, f.old, f.advantage, f.mask, f.rollout, **counts)
    assert_same(ours, f.logp, want * counts.get("dp_size", 1), b.logp)
    clipped = ((log_ratio.exp() > 1.2) & (b.advantage > 0)) | ((log_ratio.exp() < 0.8) & (b.advantage < 0))
    assert clip.item() == pytest.approx(mean_of(clipped, m), abs=1e-6)
    assert kl.item() == pytest.approx(mean_of(b.old - b.logp.detach(), m), abs=1e-5)
    assert (vllm_kl is None) != bool(correct)
    if correct:
        assert vllm_kl.item() == pytest.approx(mean_of(b.rollout - b.old, m), abs=1e-5)


def test_openrlhf_refuses():
    with pytest.raises(ValueError, match="policy_loss_type must be 'ppo' or 'gspo'"):
        shapes.PolicyLoss(policy_loss_type="reinforce")
    with pytest.raises(ValueError, match="vllm_is_correction_type must be 'tis'"):
        shapes.PolicyLoss(vllm_is_correction_type="mis")
    b = batch()
    for kind in ("ppo", "gspo"):
        module = shapes.PolicyLoss(
            policy_loss_type=kind, enable_vllm_is_correction=True, vllm_is_truncated_threshold=[0.5, 2]
        )
        with pytest.raises(ValueError, match="rollout_log_probs must be given with"):
            module(b.logp, b.old, b.advantage, b.mask)


# ------------------------------------------------------------------------------------------- SkyRL


def skyrl_config(kind, **more):
    return SimpleNamespace(
        policy_loss_type=kind,
        eps_clip_low=0.2,
        eps_clip_high=0.3,
        clip_ratio_c=1.4,
        cispo=SimpleNamespace(cispo_eps_clip_low=0.1, cispo_eps_clip_high=0.2, cispo_anchor="old"),
        sapo=SimpleNamespace(tau_pos=1.5, tau_neg=0.5),
        off_policy_correction=SimpleNamespace(tis_ratio_type=None, token_tis_ratio_clip_high=2.0),
        **more,
    )


@pytest.mark.parametrize("kind", ["regular", "dual_clip", "gspo", "cispo", "sapo"])
def test_skyrl(kind):
    f, b = batch(), wide(batch())
    m = b.mask
    log_ratio = b.logp - b.old
    ratio, a = log_ratio.exp(), b.advantage
    clipped = ((ratio > 1.3) & (a > 0)) | ((ratio < 0.8) & (a < 0))
    if kind == "gspo":
        mean = ((log_ratio * m).sum(1) / m.sum(1)).unsqueeze(1)
        ratio = (b.logp - b.logp.detach() + mean.detach()).exp()
        clipped = ((ratio > 1.3) & (a > 0)) | ((ratio < 0.8) & (a < 0))
    loss = ppo(ratio, a, 0.2, 0.3, 1.4 if kind == "dual_clip" else None)
    if kind == "cispo":
        loss = -a * ratio.clamp(0.9, 1.2).detach() * b.logp
        clipped = (ratio < 0.9) | (ratio > 1.2)
    if kind == "sapo":
        tau = torch.where(a > 0, 1.5, 0.5)
        loss, clipped = -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * a, torch.zeros_like(m)
    ours, metrics = shapes.skyrl_policy_loss(f.logp, f.old, f.advantage, skyrl_config(kind), f.mask)
    assert_same(ours, f.logp, (loss * m).sum(), b.logp)
    assert metrics["clip_ratio"] == pytest.approx(mean_of(clipped, m), abs=1e-6)


def test_skyrl_refuses():
    b = batch()
    with pytest.raises(ValueError, match="config.policy_loss_type must be regular"):
        shapes.skyrl_policy_loss(b.logp, b.old, b.advantage, skyrl_config("kl_cov"))
    config = skyrl_config("regular")
    config.off_policy_correction.tis_ratio_type = "token"
    with pytest.raises(ValueError, match="off_policy_correction.tis_ratio_type must be None"):
        shapes.skyrl_policy_loss(b.logp, b.old, b.advantage, config)
    config = skyrl_config("cispo")
    config.cispo.cispo_anchor = "rollout"
    with pytest.raises(ValueError, match="cispo_anchor must be 'old'"):
        shapes.skyrl_policy_loss(b.logp, b.old, b.advantage, config)


# ----------------------------------------------------------------------------------------- NeMo-RL


def nemo(b, **cfg):
    """Return (loss, metrics) of tokfuse's object. The data has one more position at the start, as in NeMo-RL."""

    def data(x):
        return torch.nn.functional.pad(x, (1, 0))

    loss = shapes.NemoPolicyLoss(SimpleNamespace(reference_policy_kl_penalty=0.0, **cfg))
    return loss(
        next_token_logprobs=b.logp,
        global_valid_seqs=torch.tensor(5),
        global_valid_toks=torch.tensor(19),
        data={
            "token_mask": data(b.mask),
            "sample_mask": torch.tensor([1.0, 1.0, 0.0]),
            "advantages": data(b.advantage),
            "prev_logprobs": data(b.old),
            "generation_logprobs": data(b.rollout),
        },
    )


@pytest.mark.parametrize(
    "cfg",
    [
        {},
        {"ratio_clip_c": 1.3},
        {"ratio_clip_min": 0.1, "ratio_clip_max": 0.4},
        {"disable_ppo_ratio": True},
        {"use_cispo": True},
        {"force_on_policy_ratio": True},
        {"token_level_loss": False},
        {"token_level_loss": False, "sequence_level_importance_ratios": True},
        {"use_importance_sampling_correction": True},
        {"truncated_importance_sampling_type": "tis", "truncated_importance_sampling_ratio": 1.2},
        {
            "truncated_importance_sampling_type": "icepop",
            "truncated_importance_sampling_ratio": 1.4,
            "truncated_importance_sampling_ratio_min": 0.7,
        },
    ],
)
def test_nemo(cfg):
    f, b = batch(), wide(batch())
    m = b.mask * torch.tensor([1.0, 1.0, 0.0]).unsqueeze(1)
    if "truncated_importance_sampling_type" in cfg:
        cfg = {**cfg, "use_importance_sampling_correction": True}
    log_ratio = b.logp - (b.logp.detach() if "force_on_policy_ratio" in cfg else b.old)
    if "sequence_level_importance_ratios" in cfg:
        log_ratio = ((log_ratio * m).sum(1) / m.sum(1).clamp(min=1)).unsqueeze(1) + 0 * m
    low, high = cfg.get("ratio_clip_min", 0.2), cfg.get("ratio_clip_max", 0.2)
    loss = ppo(log_ratio.exp(), b.advantage, low, high, cfg.get("ratio_clip_c"))
    if "disable_ppo_ratio" in cfg:
        loss = -b.advantage * b.logp
    if "use_cispo" in cfg:
        loss = -b.advantage * log_ratio.exp().clamp(0.8, 1.2).detach() * b.logp
    if "use_importance_sampling_correction" in cfg:
        w = (b.old - b.rollout).exp()
        kind = cfg.get("truncated_importance_sampling_type")
        w = w.clamp(0, 1.2) if kind == "tis" else w
        loss = loss * (w * ((w >= 0.7) & (w <= 1.4)) if kind == "icepop" else w)
    want = (loss * m).sum() / 19
    if not cfg.get("token_level_loss", True):
        want = ((loss * m).sum(1) / m.sum(1).clamp(min=1)).sum() / 5
    ours, metrics = nemo(f, **cfg)
    assert_same(ours, f.logp, want, b.logp)
    assert metrics["num_valid_samples"] == 2
    assert metrics["probs_ratio_min"] <= 1.0 + 1e-6


def nemo_data(f, **more):
    def data(x):
        return torch.nn.functional.pad(x, (1, 0))

    return {
        "token_mask": data(f.mask),
        "sample_mask": torch.tensor([1.0, 1.0, 0.0]),
        "advantages": data(f.advantage),
        "prev_logprobs": data(f.old),
        "generation_logprobs": data(f.rollout),
        **more,
    }


def nemo_call(f, cfg=None, toks=19, **more):
    loss = shapes.NemoPolicyLoss({"reference_policy_kl_penalty": 0.0, **(cfg or {})})
    return loss(f.logp, nemo_data(f, **more), torch.tensor(5), torch.tensor(toks))


CORRECTED = {"use_importance_sampling_correction": True}
TRUNCATED = {"truncated_importance_sampling_ratio": 1.4, "truncated_importance_sampling_ratio_min": 0.7}


@pytest.mark.parametrize("kind", [None, "tis", "icepop"])
def test_nemo_zeroes_a_sampling_ratio_that_is_not_finite(kind):
    """As its nan_to_num, which comes before the truncation: tis then clamps the 0 to its lower bound."""
    f = batch()
    f.rollout[0, 0], f.rollout[0, 1], f.rollout[1, 2] = -torch.inf, torch.nan, torch.inf
    cfg = CORRECTED | ({} if kind is None else TRUNCATED | {"truncated_importance_sampling_type": kind})
    b = wide(f)
    w = (b.old - b.rollout).exp().nan_to_num(nan=0, posinf=0, neginf=0)
    inside = (w >= 0.7) & (w <= 1.4)
    w = {None: w, "tis": w.clamp(0.7, 1.4), "icepop": w * inside}[kind]
    m = b.mask * torch.tensor([1.0, 1.0, 0.0]).unsqueeze(1)
    want = (w * ppo((b.logp - b.old).exp(), b.advantage, 0.2, 0.2) * m).sum() / 19
    ours, metrics = nemo_call(f, cfg)
    assert_same(ours, f.logp, want, b.logp)
    assert metrics["sampling_importance_ratio"] == pytest.approx(float((w * m).sum() / 19), rel=1e-5)
    if kind is not None:
        assert metrics["is_oob_ratio"] == pytest.approx(float((~inside * m).sum() / 19), rel=1e-5)


@pytest.mark.parametrize("cfg", [{}, {"token_level_loss": False}, {"force_on_policy_ratio": True}])
def test_nemo_keep_mask_and_weighted_samples(cfg):
    f, b = batch(), wide(batch())
    keep = torch.ones(B, L)
    keep[0, 1] = keep[1, 3:5] = 0
    samples = torch.tensor([0.5, 1.0, 0.0])
    tokens = b.mask * keep
    log_ratio = b.logp - (b.logp.detach() if cfg.get("force_on_policy_ratio") else b.old)
    loss = ppo(log_ratio.exp(), b.advantage, 0.2, 0.2)
    want = (loss * tokens * samples.unsqueeze(1)).sum() / 19
    if "token_level_loss" in cfg:
        want = ((loss * tokens).sum(1) / tokens.sum(1) * samples).sum() / 5
    ours, metrics = nemo_call(f, cfg, sample_mask=samples, curr_logprobs_keep_mask=keep)
    assert_same(ours, f.logp, want, b.logp)
    ratio = (log_ratio.detach().exp() * tokens * samples.unsqueeze(1)).sum() / 19
    assert metrics["probs_ratio"] == pytest.approx(float(ratio), rel=1e-5)


@pytest.mark.parametrize("toks", [0, 19])
def test_nemo_without_a_valid_token(toks):
    """On this rank, or on all."""
    f = batch()
    for cfg in ({}, {"token_level_loss": False}, {"use_cispo": True}, CORRECTED):
        loss, metrics = nemo_call(f, cfg, toks=toks, sample_mask=torch.zeros(B))
        assert loss.item() == 0.0 and metrics["probs_ratio"] == 0.0
        assert (metrics["probs_ratio_min"], metrics["probs_ratio_max"]) == (torch.inf, -torch.inf)
        (grad,) = torch.autograd.grad(loss, f.logp)
        assert not grad.any()


@pytest.mark.parametrize("cfg", [{}, {"sequence_level_importance_ratios": True, "token_level_loss": False}])
def test_nemo_metrics(cfg):
    b = wide(batch())
    m = b.mask * torch.tensor([1.0, 1.0, 0.0]).unsqueeze(1)
    logp, old, gen = b.logp.detach(), b.old, b.rollout

    def mean(x):
        return float((x * m).sum() / 19)

    ratio, weight = (logp - old).exp(), mean((old - gen).exp())
    if cfg:
        ratio = (((logp - old) * m).sum(1) / m.sum(1).clamp(min=1)).exp().unsqueeze(1).expand(B, L)
        weight = float((((old - gen) * m).sum(1).exp() * torch.tensor([1.0, 1.0, 0.0])).sum() / 5)
    clamped, mixture = ratio.clamp(0.8, 1.2), (0.5 * old.exp() + 0.5 * gen.exp()).log()
    want = {
        "probs_ratio": mean(ratio),
        "probs_ratio_clamped": mean(clamped),
        "probs_ratio_min": float(ratio[m.bool()].min()),
        "probs_ratio_max": float(ratio[m.bool()].max()),
        "probs_ratio_clamped_min": float(clamped[m.bool()].min()),
        "probs_ratio_clamped_max": float(clamped[m.bool()].max()),
        "kl_penalty": 0.0,
        "token_mult_prob_error": mean((gen - old).abs().exp()),
        "gen_kl_error": mean((old - gen).exp() - (old - gen) - 1),
        "policy_kl_error": mean((gen - old).exp() - (gen - old) - 1),
        "js_divergence_error": 0.5
        * mean((old - mixture).exp() - (old - mixture) - 1 + (gen - mixture).exp() - (gen - mixture) - 1),
        "sampling_importance_ratio": weight,
        "num_valid_samples": 2.0,
        "approx_entropy": -mean((logp - gen).exp() * logp),
        "positive_nll_loss": 0.0,
    }
    loss, metrics = nemo_call(batch(), cfg)
    assert metrics.pop("loss") == loss.item()
    assert metrics == pytest.approx(want, rel=2e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("cfg", "name"),
    [
        ({"truncated_importance_sampling_type": "mis"}, "type"),
        ({"truncated_importance_sampling_type": "tis"}, "type"),
        (CORRECTED | {"truncated_importance_sampling_type": "tis"}, "ratio"),
        (CORRECTED | {"truncated_importance_sampling_ratio": 2.0}, "ratio"),
        (
            CORRECTED
            | {"truncated_importance_sampling_type": "seq-mask-tis", "truncated_importance_sampling_ratio": 2.0},
            "ratio_min",
        ),
        (
            CORRECTED
            | TRUNCATED
            | {
                "truncated_importance_sampling_type": "seq-mask-tis",
                "sequence_level_importance_ratios": True,
                "token_level_loss": False,
            },
            "type",
        ),
    ],
)
def test_nemo_refuses(cfg, name):
    with pytest.raises(ValueError, match=f"nemo_loss: cfg.truncated_importance_sampling_{name} must be"):
        nemo(batch(), **cfg)


PENALTY = {"reference_policy_kl_penalty": 0.3}
# A value that is not the default, with what it needs.
NEMO_FIELDS = {
    "disable_ppo_ratio": {"disable_ppo_ratio": True},
    "token_level_loss": {"token_level_loss": False},
    "sequence_level_importance_ratios": {"sequence_level_importance_ratios": True, "token_level_loss": False},
    "ratio_clip_min": {"ratio_clip_min": 0.05},
    "ratio_clip_max": {"ratio_clip_max": 0.05},
    "ratio_clip_c": {"ratio_clip_c": 1.01},
    "reference_policy_kl_penalty": PENALTY,
    "reference_policy_kl_type": PENALTY | {"reference_policy_kl_type": "k1"},
    "kl_input_clamp_value": PENALTY | {"kl_input_clamp_value": 0.2},
    "kl_output_clamp_value": PENALTY | {"kl_output_clamp_value": 0.05},
    "use_kl_in_reward": PENALTY | {"use_kl_in_reward": True},
    "use_importance_sampling_correction": CORRECTED,
    "truncated_importance_sampling_type": CORRECTED | TRUNCATED | {"truncated_importance_sampling_type": "icepop"},
    "truncated_importance_sampling_ratio": CORRECTED
    | TRUNCATED
    | {"truncated_importance_sampling_type": "tis", "truncated_importance_sampling_ratio": 1.1},
    "truncated_importance_sampling_ratio_min": CORRECTED
    | TRUNCATED
    | {"truncated_importance_sampling_type": "tis", "truncated_importance_sampling_ratio_min": 0.9},
    "use_on_policy_kl_approximation": PENALTY | {"use_on_policy_kl_approximation": True},
    "force_on_policy_ratio": {"force_on_policy_ratio": True},
    "use_cispo": {"use_cispo": True},
    "positive_example_nll_weight": {"positive_example_nll_weight": 0.1},
}


def test_every_field_of_nemos_config_changes_the_result():
    """Each one against the same configuration without it."""
    assert set(NEMO_FIELDS) == set(nemo_loss.NEMO_DEFAULTS)
    more = {"reference_policy_logprobs": torch.nn.functional.pad(batch(1).rollout, (1, 0))}
    more["rewards"] = torch.tensor([1.0, 0.0, 1.0])
    for name, cfg in NEMO_FIELDS.items():
        without = {key: value for key, value in cfg.items() if key != name}
        if name == "truncated_importance_sampling_type":
            without = CORRECTED
        if name == "truncated_importance_sampling_ratio":
            without[name] = TRUNCATED[name]
        if name in ("sequence_level_importance_ratios", "token_level_loss"):
            without = {}
        assert nemo_call(batch(), cfg, **more)[1] != nemo_call(batch(), without, **more)[1], name
    with pytest.raises(ValueError, match=r"cfg\.new_option must be a field of ClippedPGLossConfig; got 0\.5"):
        nemo_call(batch(), {"new_option": 0.5})
    for clash in ("disable_ppo_ratio", "force_on_policy_ratio"):
        with pytest.raises(ValueError, match=f"cfg.{clash} must be left out with use_cispo"):
            nemo_call(batch(), {"use_cispo": True, clash: True})
    with pytest.raises(ValueError, match="cfg.token_level_loss must be False with sequence"):
        nemo_call(batch(), {"sequence_level_importance_ratios": True})


# The parameters of the host's function in the version that the docstring of call_shapes names.
SIGNATURES = {
    shapes.triton_grpo_loss: "logits old_logp ref_logp completion_ids advantages completion_mask temperature beta "
    "eps_low eps_high inplace loss_type max_completion_length importance_sampling_level reduce sapo_temperature_pos "
    "sapo_temperature_neg vllm_is_ratio delta use_bias_correction_kl num_items_in_batch vespo_k_pos vespo_lambda_pos "
    "vespo_k_neg vespo_lambda_neg",
    shapes.PolicyLoss: "clip_eps_low clip_eps_high dual_clip token_level_loss policy_loss_type "
    "enable_vllm_is_correction vllm_is_truncated_threshold vllm_is_correction_type",
    shapes.PolicyLoss.forward: "self log_probs old_log_probs advantages action_mask rollout_log_probs dp_size "
    "batch_num_tokens global_batch_size",
    shapes.skyrl_policy_loss: "log_probs old_log_probs advantages config loss_mask rollout_logprobs",
    shapes.NemoPolicyLoss: "cfg use_fused_linear_logprobs",
    shapes.NemoPolicyLoss.__call__: "self next_token_logprobs data global_valid_seqs global_valid_toks",
    shapes.prime_rl_default_loss: "inputs dppo_mask_low dppo_mask_high adv_tau kl_tau",
    shapes.prime_rl_ipo_loss: "inputs ipo_threshold adv_tau kl_tau",
    shapes.prime_rl_ref_kl_loss: "inputs",
    shapes.slime_policy_loss: "ppo_kl advantages eps_clip eps_clip_high eps_clip_c",
}


def test_signatures_are_the_hosts():
    for function, names in SIGNATURES.items():
        assert list(inspect.signature(function).parameters) == names.split(), function


LIGER_OPTIONS = {
    "temperature": 0.5,
    "beta": 0.0,
    "eps_low": 0.05,
    "eps_high": 0.05,
    "loss_type": "grpo",
    "importance_sampling_level": "sequence",
    "vllm_is_ratio": torch.full((B, L), 0.5),
    "delta": 1.5,
    "use_bias_correction_kl": True,
    "num_items_in_batch": 40,
    "completion_mask": torch.ones(B, L),
}
OF_LOSS_TYPE = {
    "max_completion_length": ("dr_grpo", 9),
    "sapo_temperature_pos": ("sapo", 2.0),
    "sapo_temperature_neg": ("sapo", 2.0),
    "vespo_k_pos": ("vespo", 1.0),
    "vespo_k_neg": ("vespo", 1.0),
    "vespo_lambda_pos": ("vespo", 1.0),
    "vespo_lambda_neg": ("vespo", 1.0),
}


def test_every_option_of_liger_changes_the_loss():
    names = set(SIGNATURES[shapes.triton_grpo_loss].split())
    tensors = {"logits", "old_logp", "ref_logp", "completion_ids", "advantages"}
    assert names - tensors - {"inplace", "reduce"} == set(LIGER_OPTIONS) | set(OF_LOSS_TYPE)
    b, gen = batch(), torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(B, L + 1, V, generator=gen)
    ids, a = torch.randint(V, (B, L), generator=gen), torch.tensor([1.0, -0.5, -0.7])
    logp = (logits[:, :-1] / 0.9).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    old = logp + 3 * (b.old - b.logp.detach())

    def loss(**options):
        options = {"completion_mask": b.mask, "beta": 0.04, **options}
        return shapes.triton_grpo_loss(logits, old, b.rollout, ids, a, reduce=True, **options)[0]

    for name, value in LIGER_OPTIONS.items():
        assert loss(**{name: value}) != loss(), name
    for name, (kind, value) in OF_LOSS_TYPE.items():
        kind = {"loss_type": kind, "beta": 0.0}
        assert loss(**kind, **{name: value}) != loss(**kind), name


def test_micro_batches_without_a_token():
    b, nothing = batch(), torch.zeros(B, L)
    for kind in ("regular", "dual_clip", "gspo", "cispo", "sapo"):
        loss, metrics = shapes.skyrl_policy_loss(b.logp, b.old, b.advantage, skyrl_config(kind), nothing)
        assert loss.item() == 0.0 and metrics["clip_ratio"] == 0.0, kind
    for options in ({}, {"policy_loss_type": "gspo"}):
        out = shapes.PolicyLoss(**options)(b.logp, b.old, b.advantage, nothing, batch_num_tokens=7)
        assert [x.item() for x in out[:3]] == [0.0, 0.0, 0.0]
    module = shapes.PolicyLoss(enable_vllm_is_correction=True, vllm_is_truncated_threshold=[0.5, 2.0])
    assert module(b.logp, b.old, b.advantage, nothing, b.rollout)[3].item() == 0.0
    logits, ids = torch.zeros(B, L + 1, V), torch.zeros(B, L, dtype=torch.int64)
    for kind in LIGER:
        args = (logits, b.old, b.rollout, ids, torch.ones(B), nothing)
        loss, metrics = shapes.triton_grpo_loss(*args, loss_type=kind, reduce=True)
        assert [x.item() for x in (loss, *metrics)] == [0.0, 0.0, 0.0], kind


@pytest.mark.parametrize("value", [-torch.inf, torch.inf])
def test_openrlhf_truncates_an_infinite_ratio(value):
    f = batch()
    f.rollout[0, 0] = value
    b = wide(f)
    want = (
        (b.old - b.rollout).exp().clamp(0.7, 1.4) * ppo((b.logp - b.old).exp(), b.advantage, 0.2, 0.2) * b.mask
    ).sum()
    module = shapes.PolicyLoss(enable_vllm_is_correction=True, vllm_is_truncated_threshold=[0.7, 1.4])
    ours, *_ = module(f.logp, f.old, f.advantage, f.mask, f.rollout)
    assert_same(ours, f.logp, want / b.mask.sum(), b.logp)


def test_skyrl_mask_weights_and_unused_options():
    """A float mask multiplies, as in SkyRL's sums. Options that change SkyRL's result change ours or are refused."""
    f, b = batch(), wide(batch())
    weights = b.mask * torch.linspace(0.2, 2, L)
    want = (ppo((b.logp - b.old).exp(), b.advantage, 0.2, 0.3) * weights).sum()
    ours, _ = shapes.skyrl_policy_loss(f.logp, f.old, f.advantage, skyrl_config("regular"), weights.float())
    assert_same(ours, f.logp, want, b.logp)
    for name in ("tis_ratio_type", "sequence_mask_metric", "outlier_token_is_threshold_low"):
        config = skyrl_config("regular")
        setattr(config.off_policy_correction, name, 0.5)
        with pytest.raises(ValueError, match=rf"off_policy_correction\.{name} must be None"):
            shapes.skyrl_policy_loss(f.logp, f.old, f.advantage, config, f.mask)


def test_nemo_enums_come_from_the_host(monkeypatch):
    interfaces = types.ModuleType("nemo_rl.algorithms.loss.interfaces")
    interfaces.LossType = SimpleNamespace(TOKEN_LEVEL="t", SEQUENCE_LEVEL="s")
    interfaces.LossInputType = SimpleNamespace(LOGPROB="logprob")
    interfaces.MetricNormalizer = SimpleNamespace(TOKENS="t", SEQUENCES="s", NONE=None)
    for name in ("nemo_rl", "nemo_rl.algorithms", "nemo_rl.algorithms.loss"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, interfaces.__name__, interfaces)
    loss = shapes.NemoPolicyLoss(SimpleNamespace(reference_policy_kl_penalty=0.0))
    assert (loss.loss_type, loss.input_type) == ("t", "logprob")
    assert set(loss.metric_normalizations) == set(nemo_call(batch())[1])


# ------------------------------------------------------------------------------------------- slime


@pytest.mark.parametrize("dual", [None, 1.4])
def test_slime(dual):
    b = batch()
    kl, a = (b.old - b.logp)[b.mask.bool()].detach().requires_grad_(), b.advantage[b.mask.bool()]
    exact = kl.detach().double().requires_grad_()
    weight = torch.linspace(0.5, 2, len(kl))  # slime's reducer gives weights to samples
    ours, clipped = shapes.slime_policy_loss(kl, a, 0.2, 0.3, dual)
    ratio = (-exact).exp()
    want = ppo(ratio, a.double(), 0.2, 0.3, dual)
    compare(ours, want, rtol=2e-6, atol=1e-6)
    with pytest.raises(ValueError, match="slime_policy_loss: create_graph must be False"):
        torch.autograd.grad(ours.sum(), kl, create_graph=True)
    assert_same((ours * weight).sum(), kl, (want * weight).sum(), exact)
    assert torch.equal(clipped.bool(), ((ratio > 1.3) & (a > 0)) | ((ratio < 0.8) & (a < 0)))


# ------------------------------------------------------------------------------------- cloudpickle


@pytest.mark.parametrize(
    "thing",
    [
        shapes.triton_grpo_loss,
        shapes.skyrl_policy_loss,
        shapes.slime_policy_loss,
        shapes.prime_rl_loss,
        shapes.prime_rl_default_loss,
        shapes.prime_rl_ipo_loss,
        shapes.prime_rl_ref_kl_loss,
        shapes.PolicyLoss(dual_clip=2.0),
        shapes.NemoPolicyLoss(SimpleNamespace(reference_policy_kl_penalty=0.0)),
    ],
    ids=lambda x: getattr(x, "__name__", type(x).__name__),
)
def test_everything_survives_cloudpickle(thing):
    cloudpickle = pytest.importorskip("cloudpickle", reason="needs the group `hosts`")
    again = importlib.import_module("pickle").loads(cloudpickle.dumps(thing))
    assert type(again) is type(thing)
    if callable(getattr(thing, "__name__", None)) or isinstance(thing, types.FunctionType):
        assert again is thing  # the error names the argument and does not mention the extension
