"""Test every loss of verl against tokfuse: value, gradient and metrics, for every aggregation.

`import verl` loads the plug-in through its entry point, as for a user. The values of surrogates such as CISPO's
have little meaning, so gradients are compared too.
"""

import copy

import pytest
import torch
from harness import compare
from host_parity import assert_no_farther

# The imports below find verl only in its environment.
pytest.importorskip("verl")

import cloudpickle
from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig, PolicyLossConfig

from tokfuse.integrations import verl_losses, verl_plugin

MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
GLOBAL = {"dp_size": 4, "batch_num_tokens": 91, "global_batch_size": 24, "loss_scale_factor": 50}
LOSSES = (
    "vanilla",
    "dppo_tv",
    "dppo_kl",
    "gspo",
    "sapo",
    "gpg",
    "clip_cov",
    "kl_cov",
    "geo_mean",
    "dro",
    "cispo",
    "bypass_mode",
)


CORRECTION = {"loss_type": "ppo_clip", "rollout_is": None, "rollout_rs": None}


def config(info=None, correction=None, **changed):
    """Return an actor's configuration in which every option affects this small batch."""
    policy = PolicyLossConfig(
        dro_beta=0.3,
        clip_cov_ratio=0.2,
        clip_cov_lb=0.05,
        kl_cov_ratio=0.2,
        ppo_kl_coef=0.7,
        rollout_correction={**CORRECTION, **(correction or {})},
    )
    widths = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}
    return ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_mini_batch_size=4,
        ppo_micro_batch_size_per_gpu=4,
        policy_loss=policy,
        global_batch_info=dict(info or {}),
        **{**widths, **changed},
    )


def batch(seed=0):
    """Return six responses of up to nine tokens with gaps; log-ratios on both sides of every clip."""
    gen = torch.Generator().manual_seed(seed)
    old = -torch.rand(6, 9, generator=gen) * 3 - 0.05
    logp = old + torch.randn(6, 9, generator=gen) * 0.4
    logp[0, 0], logp[1, 1] = old[0, 0] + 1.5, old[1, 1] + 2.0
    advantages = torch.randn(6, 9, generator=gen)
    advantages[:, 4], advantages[1, 1] = 0.0, -1.3
    mask = (torch.arange(9) < torch.tensor([[9], [7], [4], [9], [2], [5]])).long()
    mask[0, 3] = 0
    return {"old_log_prob": old, "log_prob": logp.clamp(max=-1e-3), "advantages": advantages, "response_mask": mask}


def call(function, given, mode, settings, weights=None):
    logp = given["log_prob"].clone().requires_grad_()
    torch.manual_seed(7)  # clip_cov draws random numbers
    loss, metrics = function(
        **{**given, "log_prob": logp}, loss_agg_mode=mode, config=copy.deepcopy(settings), rollout_is_weights=weights
    )
    loss.backward()
    return loss.detach(), logp.grad, metrics


def doubled(given):
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in given.items()}


def same(name, given, mode, settings, weights=None, metrics_too=True):
    """Check that tokfuse is no farther from verl's function in float64 than that function in float32."""
    function = core_algos.get_policy_loss_fn(name)
    theirs = call(function, given, mode, settings, weights)
    exact = call(function, doubled(given), mode, settings, None if weights is None else weights.double())
    ours = call(core_algos.get_policy_loss_fn(f"tokfuse_{name}"), given, mode, settings, weights)
    assert exact[0].dtype == exact[1].dtype == torch.float64
    for mine, stock, truth, what in zip(ours, theirs, exact, ("loss", "gradient"), strict=False):
        assert_no_farther(mine, stock, truth, what=f"{name} {mode} {what}")
    assert set(ours[2]) == set(theirs[2]) == set(exact[2])
    for key, value in exact[2].items():
        size = max(1.0, abs(float(value)))
        assert_no_farther(float(ours[2][key]), float(theirs[2][key]), float(value), size=size, what=f"{name} {key}")


def test_every_loss_of_verl_is_covered():
    builtin = {n for n in core_algos.POLICY_LOSS_REGISTRY if not n.startswith("tokfuse_")}
    assert builtin == set(LOSSES) == set(verl_losses.OF_VERL)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("mode", MODES)
def test_value_gradient_and_metrics(name, mode):
    same(name, batch(), mode, config())
    if name != "geo_mean":  # verl's loss ignores the global counts; see the next test
        same(name, batch(1), mode, config(GLOBAL))


def test_geo_mean_honours_the_global_batch():
    alone = call(core_algos.get_policy_loss_fn("tokfuse_geo_mean"), batch(), MODES[0], config())
    ours = call(core_algos.get_policy_loss_fn("tokfuse_geo_mean"), batch(), MODES[0], config(GLOBAL))
    compare(ours[0], alone[0] * 6 * 4 / 24, rtol=1e-6)
    compare(ours[1], alone[1] * 6 * 4 / 24, rtol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_importance_weights(name):
    weights = torch.rand(6, 9, generator=torch.Generator().manual_seed(3)) + 0.5
    same(name, batch(2), "token-mean", config(GLOBAL if name != "geo_mean" else None), weights)


def test_bypass_with_reinforce_and_rejection():
    correction = {"loss_type": "reinforce", "rollout_is": "token", "rollout_is_threshold": 1.5}
    settings = config(correction=correction)
    same("bypass_mode", batch(4), "token-mean", settings)


@pytest.mark.parametrize("name", ["vanilla", "gspo", "sapo", "cispo"])
def test_options_of_the_actor_are_read(name):
    """Other clip widths, dual clip and temperatures change the loss, as in verl."""
    changed = {"clip_ratio_c": 1.5, "tau_pos": 2.0, "tau_neg": 3.0}
    settings = config(clip_ratio_low=0.05, clip_ratio_high=0.6, **changed)
    same(name, batch(5), "token-mean", settings)
    one = call(core_algos.get_policy_loss_fn(f"tokfuse_{name}"), batch(5), MODES[0], settings)
    two = call(core_algos.get_policy_loss_fn(f"tokfuse_{name}"), batch(5), MODES[0], config())
    assert abs(float(one[0] - two[0])) > 1e-4


@pytest.mark.parametrize("name", LOSSES)
def test_no_valid_token_gives_a_differentiable_zero(name):
    given = batch()
    given["response_mask"] = torch.zeros_like(given["response_mask"])
    loss, grad, _ = call(core_algos.get_policy_loss_fn(f"tokfuse_{name}"), given, "token-mean", config(GLOBAL))
    assert float(loss) == 0.0 and not bool(grad.any())


@pytest.mark.parametrize("name", verl_losses.OF_ALGORITHMS)
def test_methods_of_tokfuse_are_losses_of_verl(name):
    function = core_algos.get_policy_loss_fn(f"tokfuse_{name}")
    loss, grad, metrics = call(function, batch(), "token-mean", config())
    assert loss.isfinite() and bool(grad.isfinite().all()) and bool(grad.any())
    # The global counts scale it like verl's aggregation.
    scaled, scaled_grad, _ = call(function, batch(), "token-mean", config(GLOBAL))
    tokens = int(batch()["response_mask"].sum())
    compare(scaled, loss * tokens * 4 / 91, rtol=2e-6, what="loss")
    compare(scaled_grad, grad * tokens * 4 / 91, rtol=1e-5, atol=1e-9, what="gradient")
    assert "actor/ppo_kl" in metrics


def test_bapo_is_the_algorithm():
    import tokfuse
    from tokfuse.algorithms import Batch

    given, method = batch(), tokfuse.algorithms.make("bapo")
    flat = {k: v.reshape(-1) for k, v in given.items()}
    cu = torch.arange(7, dtype=torch.int32) * 9
    b = Batch(
        reward=torch.zeros(6),
        cu_seqlens=cu,
        old_logp=flat["old_log_prob"],
        mask=flat["response_mask"] > 0,
        logp=flat["log_prob"],
        advantage=flat["advantages"],
        advantage_level="token",
    )
    want = method.objective(b, method.initial_state()).loss(flat["log_prob"]).loss
    got, _, _ = call(core_algos.get_policy_loss_fn("tokfuse_bapo"), given, "token-mean", config())
    compare(got, want, rtol=1e-6)


def test_refusals():
    vanilla = core_algos.get_policy_loss_fn("tokfuse_vanilla")
    cases = (
        ("loss_agg_mode", "mean", config()),
        ("global_batch_info", "token-mean", config({"new_key": 1})),
        ("batch_num_tokens", "token-mean", config({"dp_size": 2})),
    )
    for word, mode, settings in cases:
        with pytest.raises(ValueError, match=word):
            call(vanilla, batch(), mode, settings)
    with pytest.raises(ValueError, match="without state"):
        name = verl_plugin.register_algorithm("clip_cov", register_as="tokfuse_test_state")
        call(core_algos.get_policy_loss_fn(name), batch(), "token-mean", config())
    with pytest.raises(ValueError, match="among"):
        verl_plugin.register_algorithm("bapo", no_such_option=1)


def test_registered_functions_survive_cloudpickle():
    names = [n for n in core_algos.POLICY_LOSS_REGISTRY if n.startswith("tokfuse_")]
    assert len(names) >= len(LOSSES) + len(verl_losses.OF_ALGORITHMS)
    given = batch()
    for name in (f"tokfuse_{n}" for n in (*LOSSES, *verl_losses.OF_ALGORITHMS)):
        function = core_algos.get_policy_loss_fn(name)
        again = cloudpickle.loads(cloudpickle.dumps(function))
        a, b = (call(f, given, "token-mean", config()) for f in (function, again))
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    for name, function in core_algos.ADV_ESTIMATOR_REGISTRY.items():
        if name.startswith("tokfuse_"):
            assert callable(cloudpickle.loads(cloudpickle.dumps(function)))
