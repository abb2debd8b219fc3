"""Test the parts of the verl plug-in that do not need verl. `make test-verl` compares with verl."""

import logging
from types import SimpleNamespace

import pytest
import torch
from harness import compare

import tokfuse
from tokfuse.integrations import hosts, verl_heads, verl_losses, verl_plugin

WITHOUT_VERL = verl_plugin.HOST.installed is None
needs_no_verl = pytest.mark.skipif(not WITHOUT_VERL, reason="verl is installed here")


class Config(SimpleNamespace):
    """An actor's configuration: attributes, and `get` as in verl."""

    def get(self, name, default=None):
        return getattr(self, name, default)


def call(info=None, mode="token-mean", **changed):
    gen = torch.Generator().manual_seed(0)
    old = -torch.rand(3, 4, generator=gen)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    config = Config(
        clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=0.28, clip_ratio_c=3.0, global_batch_info=info or {}
    )
    difference, advantages = (torch.randn(3, 4, generator=gen) for _ in range(2))
    difference[0, 0], advantages[0, 0] = 5.0, -1.0  # a ratio of 4.5 reaches the dual clip
    fields = {
        "old_log_prob": old,
        "log_prob": old + difference * 0.3,
        "advantages": advantages,
        "response_mask": mask,
        "loss_agg_mode": mode,
        "config": config,
        "rollout_is_weights": None,
    }
    return verl_losses.Call(**{**fields, **changed})


def test_a_device_without_kernels_keeps_verls_own_heads(monkeypatch):
    """verl runs on npu, where linear_token_stats would compute all logits in float64."""

    class Own(torch.nn.Module):
        def __init__(self, chunk_size):
            super().__init__()
            self.chunk_size = chunk_size

        def forward(self, *args):
            return "module", self.chunk_size, args

    monkeypatch.setattr(hosts, "has_kernels", lambda op, device, dtype: False)
    stock = {"FusedLinearForPPO": Own, "linear_cross_entropy": lambda *args: ("function", args)}
    monkeypatch.setattr(verl_heads, "STOCK", stock)
    hidden, weight, ids = torch.zeros(2, 4), torch.zeros(5, 4), torch.zeros(2, dtype=torch.int64)
    with pytest.warns(UserWarning, match="tokfuse has no kernels for float32 on cpu: verl's own code runs there"):
        hosts.tell_unchanged.cache_clear()
        found = verl_heads.FusedLinearForPPO(64)(hidden, weight, ids, 0.7)
    assert found == ("module", 64, (hidden, weight, ids, 0.7))
    found = verl_heads.linear_cross_entropy(hidden, weight, ids, 0.7)
    assert found == ("function", (hidden, weight, ids, 0.7, "none", None))


@pytest.mark.parametrize(
    ("mode", "info", "want"),
    [
        ("token-mean", {}, ("batch", 1.0)),
        ("token-mean", {"dp_size": 4, "batch_num_tokens": 100}, (25.0, 1.0)),
        ("token-sum", {"dp_size": 4}, (0.25, 1.0)),
        ("seq-mean-token-sum", {"dp_size": 2, "global_batch_size": 6}, (3.0, 1.0)),
        ("seq-mean-token-sum-norm", {"global_batch_size": 6}, (6.0, 4.0)),
        ("seq-mean-token-sum-norm", {"loss_scale_factor": 50}, ("batch", 50.0)),
        ("seq-mean-token-mean", {"dp_size": 1, "global_batch_size": None}, ("batch", 1.0)),
        ("token-mean", {"batch_num_tokens": 0}, (1.0, 1.0)),
    ],
)
def test_denominators(mode, info, want):
    assert verl_losses.normalizer(call(info), mode) == want


def test_vanilla_is_a_policy_loss():
    c = call({"dp_size": 2, "batch_num_tokens": 12})
    logp = c.log_prob.requires_grad_()
    loss, metrics = verl_losses.vanilla(c)
    shape = tokfuse.PPOClip(low=0.2, high=0.28, dual=3.0)
    out = tokfuse.policy_loss(
        logp.flatten(),
        old_logp=c.old_log_prob.flatten(),
        advantage=c.advantages.flatten(),
        objective=tokfuse.Objective(shape=shape),
        mask=c.response_mask.flatten() > 0,
        normalizer=6.0,
    )
    assert torch.equal(loss, out.loss)
    assert metrics["actor/ppo_kl"] == out.metrics["kl_k1"]
    ours, want = (torch.autograd.grad(x, logp)[0] for x in (loss, out.loss))
    assert torch.equal(ours, want)


def test_importance_weights_and_masks_multiply():
    weights = torch.rand(3, 4)
    plain, weighted = call(), call(rollout_is_weights=weights)
    objective = tokfuse.Objective(shape=tokfuse.LinearLogp())
    keep = (torch.rand(3, 4) < 0.5).float()
    got = verl_losses.run(weighted, objective, weight=keep).token_loss
    want = verl_losses.run(plain, objective).token_loss
    compare(got, want * (weights * keep).flatten(), rtol=1e-6, atol=1e-9)


def test_weights_outside_vespos_gate_are_refused():
    """The authors add the log-weights inside the gate; a factor is another loss."""
    of_call = {f: getattr(call(), f) for f in ("old_log_prob", "log_prob", "advantages", "response_mask")}
    plain, _ = verl_losses.algorithm_loss("vespo", {}, **of_call, config=call().config)
    assert bool(plain.isfinite())
    with pytest.raises(ValueError, match="rollout_is_weights must be None with 'vespo'"):
        verl_losses.algorithm_loss(
            "vespo", {}, **of_call, config=call().config, rollout_is_weights=torch.full((3, 4), 0.5)
        )


def test_the_head_takes_a_temperature_of_any_shape():
    h, w, ids = torch.randn(2, 3, 8), torch.randn(20, 8), torch.randint(20, (2, 3))
    t = torch.rand(2, 3) + 0.5
    logp, entropy = verl_heads.fused_head(h, w, ids, t)
    logits = (h @ w.t()) / t.unsqueeze(-1)
    want = torch.log_softmax(logits, -1)
    compare(logp, want.gather(-1, ids.unsqueeze(-1)).squeeze(-1), atol=1e-5)
    compare(entropy, -(want.exp() * want).sum(-1), atol=1e-5)
    assert getattr(logp, verl_heads.SUM_SQ).shape == (6,)
    one = verl_heads.fused_head(h, w, ids, torch.tensor(0.5))[0]
    assert torch.equal(one, verl_heads.fused_head(h, w, ids, 0.5)[0])


@needs_no_verl
def test_without_verl_the_module_imports_and_says_what_is_missing():
    for function in (verl_plugin.install, verl_plugin.register):
        with pytest.raises(ValueError, match="verl must be installed"):
            function()
    assert verl_plugin.describe()["host"].startswith("verl None")
    assert verl_plugin.describe()["losses"]["tokfuse_vanilla"].startswith("policy_loss (cpu: ")


@needs_no_verl
def test_a_failure_at_load_is_logged_as_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        verl_plugin._load()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "did not load" in record.getMessage()


def test_the_entry_point_names_the_module():
    import importlib.metadata

    found = importlib.metadata.entry_points(group="verl.plugins")
    assert {e.value for e in found if e.name == "tokfuse"} == {"tokfuse.integrations.verl_plugin"}
