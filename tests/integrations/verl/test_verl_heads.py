"""Test the replacement of verl's fused heads: equal results, options that verl does not support, and uninstall."""

import subprocess
import sys

import pytest
import torch
from harness import compare
from host_parity import assert_no_farther

pytest.importorskip("verl")

from transformers import LlamaConfig, LlamaForCausalLM
from verl.models.transformers import dense_common
from verl.utils import tensordict_utils as tu
from verl.utils.experimental import torch_functional as heads
from verl.utils.kernel import linear_cross_entropy as triton_head
from verl.workers.engine.fsdp import transformer_impl

from tokfuse.integrations import hosts, verl_heads, verl_plugin

VOCAB = 64


@pytest.fixture
def installed():
    verl_plugin.install()
    yield
    verl_plugin.uninstall()


def problem(dtype=torch.float32):
    gen = torch.Generator().manual_seed(0)
    h = torch.randn(1, 12, 32, generator=gen).to(dtype).requires_grad_()
    w = (torch.randn(VOCAB, 32, generator=gen) * 0.3).to(dtype).requires_grad_()
    return h, w, torch.randint(VOCAB, (1, 12), generator=gen)


def stock(h, w, ids, temperature):
    out = heads.FusedLinearForPPO()(h, w, ids, temperature)
    return out, torch.autograd.grad(out[0].sum() + (out[1] ** 2).sum(), (h, w))


def exact(h, w, ids, temperature):
    """Return (logp, entropy, gradients of `stock`) in float64; verl's head computes in float32."""
    h, w = (x.detach().double().requires_grad_() for x in (h, w))
    log_p = (h @ w.t() / temperature).log_softmax(-1)
    logp, entropy = log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)
    return logp, entropy, *torch.autograd.grad(logp.sum() + (entropy**2).sum(), (h, w))


@pytest.mark.parametrize("head", ["torch", "triton"])
def test_heads_agree_with_verls_own(head):
    h, w, ids = problem()
    (logp, entropy), grads = stock(h, w, ids, 0.7)
    verl_plugin.install()
    try:
        if head == "torch":
            assert heads.FusedLinearForPPO is verl_heads.FusedLinearForPPO
            got = heads.FusedLinearForPPO(impl_backend="liger")(h, w, ids, 0.7)
        else:
            got = triton_head.linear_cross_entropy(h, w, ids, 0.7, "none")
            assert got[0].shape == (12,)
            got = tuple(x.view(1, 12) for x in got)
    finally:
        verl_plugin.uninstall()
    ours = torch.autograd.grad(got[0].sum() + (got[1] ** 2).sum(), (h, w))
    for mine, verls, truth in zip((*got, *ours), (logp, entropy, *grads), exact(h, w, ids, 0.7), strict=True):
        assert_no_farther(mine, verls, truth)


def tiny_model():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )


@pytest.mark.parametrize("forward", ["torch", "triton"])
def test_the_patched_forward_of_a_model_uses_it(installed, forward):
    model, ids = tiny_model(), torch.randint(VOCAB, (1, 9))
    run = getattr(dense_common, f"forward_with_{forward}_backend")
    temperature = torch.linspace(0.5, 2.0, 9).unsqueeze(0)
    out = run(model, input_ids=ids, return_dict=True, temperature=temperature)
    hidden = model.model(input_ids=ids).last_hidden_state
    logp = torch.log_softmax(hidden.double() @ model.lm_head.weight.double().t() / temperature.unsqueeze(-1), -1)
    target = ids.roll(-1, -1)
    want = logp.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    compare(out.log_probs.view(1, 9), want, atol=3e-6)
    compare(out.entropy.view(1, 9), -(logp.exp() * logp).sum(-1), atol=3e-6)
    square = getattr(out.log_probs, verl_heads.SUM_SQ)
    compare(square, (logp.exp() ** 2).sum(-1).view(-1), atol=3e-6)


def engine():
    """Return an FSDP engine without a model, with the attributes that its two methods read."""
    out = object.__new__(transformer_impl.FSDPEngineWithLMHead)
    out.pad_to_length, out.use_ulysses_sp, out.ulysses_sequence_parallel_size = False, False, 1
    return out


def micro_batch(**flags):
    ids = torch.nested.nested_tensor([torch.arange(4) + 3, torch.arange(6) + 9], layout=torch.jagged)
    positions = torch.nested.nested_tensor([torch.arange(4), torch.arange(6)], layout=torch.jagged)
    tensors = {"input_ids": ids, "position_ids": positions, "temperature": torch.tensor([0.5, 2.0])}
    return tu.get_tensordict(tensors, {"use_fused_kernels": True, **flags})


def test_a_temperature_per_sample_reaches_the_fused_head():
    method = transformer_impl.FSDPEngineWithLMHead
    with pytest.raises(AssertionError, match="per sample temperature"):
        method.prepare_model_inputs(engine(), micro_batch())
    verl_plugin.install()
    try:
        inputs, arguments = method.prepare_model_inputs(engine(), micro_batch())
    finally:
        verl_plugin.uninstall()
    assert inputs["temperature"].tolist() == [[0.5] * 4 + [2.0] * 6]
    assert inputs["return_dict"] is True
    rolled = arguments["input_ids_rmpad_rolled"].unsqueeze(0)
    assert torch.equal(inputs["shift_labels"], rolled)


def test_sum_of_squares_with_fused_kernels(installed):
    method = transformer_impl.FSDPEngineWithLMHead
    mb = micro_batch(calculate_sum_pi_squared=True, calculate_entropy=True)
    inputs, arguments = method.prepare_model_inputs(engine(), mb)
    model = tiny_model()
    out = dense_common.forward_with_torch_backend(model, **inputs)
    made = method.prepare_model_outputs(engine(), out, arguments, mb, None)
    assert set(made) >= {"log_probs", "entropy", "sum_pi_squared"}
    square = getattr(out.log_probs, verl_heads.SUM_SQ)
    assert torch.equal(made["sum_pi_squared"].values(), square)
    assert torch.equal(made["sum_pi_squared"].offsets(), mb["input_ids"].offsets())
    verl_plugin.uninstall()
    with pytest.raises(NotImplementedError, match="calculate_sum_pi_squared"):
        method.prepare_model_outputs(engine(), out, arguments, mb, None)
    verl_plugin.install()
    out.log_probs = out.log_probs.clone()
    with pytest.raises(ValueError, match="the installed fused head"):
        method.prepare_model_outputs(engine(), out, arguments, mb, None)


def test_sum_of_squares_of_padded_rows(installed):
    """Without remove_padding the head receives (batch, length), and the padding is removed."""
    method = transformer_impl.FSDPEngineWithLMHead
    mb = micro_batch(calculate_sum_pi_squared=True, use_remove_padding=False)
    mb["temperature"] = torch.ones(2)
    logp = torch.zeros(2, 6)
    setattr(logp, verl_heads.SUM_SQ, torch.arange(12.0))
    out = dense_common.CausalLMOutputForPPO(log_probs=logp, entropy=logp)
    made = method.prepare_model_outputs(engine(), out, {}, mb, None)
    assert made["sum_pi_squared"].values().tolist() == [0, 1, 2, 3, 6, 7, 8, 9, 10, 11]


def test_install_is_idempotent_and_uninstall_restores_identity():
    method = transformer_impl.FSDPEngineWithLMHead
    owners = (
        (heads, "FusedLinearForPPO"),
        (triton_head, "linear_cross_entropy"),
        (method, "prepare_model_inputs"),
        (method, "prepare_model_outputs"),
    )
    before = [vars(owner)[name] for owner, name in owners]
    verl_plugin.install()
    during = [vars(owner)[name] for owner, name in owners]
    verl_plugin.install()
    assert [vars(owner)[name] for owner, name in owners] == during
    assert all(a is not b for a, b in zip(before, during, strict=True))
    assert verl_plugin.describe()["heads"].startswith("linear_token_stats")
    verl_plugin.uninstall()
    verl_plugin.uninstall()
    assert all(vars(o)[n] is b for (o, n), b in zip(owners, before, strict=True))
    assert verl_plugin.describe()["heads"] == "verl's own"


def test_refusals(installed):
    h, w, ids = problem()
    with pytest.raises(ValueError, match="reduction"):
        triton_head.linear_cross_entropy(h, w, ids, 1.0, "mean")
    with pytest.raises(ValueError, match="one per token"):
        heads.FusedLinearForPPO()(h, w, ids, torch.ones(5))
    with pytest.raises(ValueError, match="impl_backend"):
        heads.FusedLinearForPPO(impl_backend="triton")


def test_an_older_version_is_refused_and_a_newer_one_warns(monkeypatch):
    monkeypatch.setattr(type(verl_plugin.HOST), "installed", property(lambda self: "0.1"))
    for use in (verl_plugin.install, verl_plugin.register):
        with pytest.raises(ValueError, match=r"verl must be .* got 0\.1"):
            use()
    monkeypatch.setattr(type(verl_plugin.HOST), "installed", property(lambda self: "0.10.2"))
    hosts._warn_untested.cache_clear()
    with pytest.warns(UserWarning, match=r"^tokfuse was tested with verl .*; version 0\.10\.2 is installed\.$"):
        assert verl_plugin.register()


def run(code: str, **environment: str) -> str:
    import os

    done = subprocess.run(
        [sys.executable, "-c", code], cwd="/", env=os.environ | environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_loading_in_a_fresh_process():
    """As in a Ray worker: only `import verl`. The variable installs the heads there."""
    code = (
        "import verl\n"
        "from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY as r\n"
        "from verl.utils.experimental import torch_functional as f\n"
        "print('tokfuse_vanilla' in r, f.FusedLinearForPPO.__module__)"
    )
    assert "True tokfuse.integrations.verl_heads" in run(code, TOKFUSE_VERL_HEADS="1")
    failed = run(code, TOKFUSE_VERL_HEADS="perhaps")
    assert "WARNING" in failed.upper() and "TOKFUSE_VERL_HEADS must be 0 or 1" in failed
