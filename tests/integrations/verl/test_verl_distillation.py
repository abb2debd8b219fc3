"""Test the distillation losses against verl's: value, gradient by the logits and metrics, through verl's own entry.

`distillation_ppo_loss` is called as verl's engine calls it: with the logits first, then with the model's outputs. The
reference is verl's code in float64.
"""

import functools
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from host_parity import assert_no_farther

# The imports below find verl only in its environment.
pytest.importorskip("verl")

import cloudpickle
from tensordict import TensorDict
from transformers import LlamaConfig, LlamaForCausalLM
from verl.models.transformers import dense_common
from verl.trainer.distillation import losses as host
from verl.utils import tensordict_utils as tu
from verl.utils.metric import Metric
from verl.workers.config import ActorConfig, DistillationConfig, DistillationLossConfig
from verl.workers.engine.fsdp import transformer_impl

from tokfuse.integrations import verl_distillation, verl_plugin

V, K = 29, 4
PROMPTS, RESPONSES = (2, 3, 1), (4, 2, 5)
COUNTS = {"dp_size": 2, "batch_num_tokens": 31, "global_batch_size": 8}
DIRECT = {"use_policy_gradient": False, "use_task_rewards": False}
MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")


def config(**changed):
    sizes = {"rollout_n": 1, "ppo_mini_batch_size": 4, "ppo_micro_batch_size_per_gpu": 4}
    return ActorConfig(strategy="fsdp", **sizes, **changed)


def nested(rows):
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def batch(dtype=torch.float32, seed=0):
    """Return verl's micro-batch of three packed sequences, and the student's logits, (1, tokens, V)."""
    gen = torch.Generator().manual_seed(seed)
    lengths = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    teacher = [torch.randn(n, V, generator=gen).mul(2).log_softmax(-1) for n in lengths]
    top = [x.topk(K, -1) for x in teacher]
    mask = [torch.ones(r, dtype=torch.long) for r in RESPONSES]
    mask[0][1] = 0
    sampled = [torch.rand(n, generator=gen).mul(-3).to(dtype) for n in lengths]
    data = TensorDict(
        {
            "prompts": nested([torch.zeros(n, dtype=torch.long) for n in PROMPTS]),
            "responses": nested([torch.zeros(n, dtype=torch.long) for n in RESPONSES]),
            "response_mask": nested(mask),
            "teacher_logprobs": nested([x.values.to(dtype) for x in top]),
            "teacher_ids": nested([x.indices for x in top]),
            "advantages": nested([torch.zeros(n, dtype=dtype) for n in RESPONSES]),
            "old_log_probs": nested([x[-r:] + 0.1 for x, r in zip(sampled, RESPONSES, strict=True)]),
        },
        batch_size=[3],
    )
    tu.assign_non_tensor(data, **COUNTS)
    # Near the teacher at every third token only, so that both clamps and both overlaps occur.
    logits = torch.cat(teacher) + torch.randn(sum(lengths), V, generator=gen) * 3.0
    logits[::3] = torch.cat(teacher)[::3] + 0.01 * torch.randn(logits[::3].shape, generator=gen)
    return data, logits.to(dtype).unsqueeze(0), torch.cat(sampled)


def options(name, **changed):
    loss = DistillationLossConfig(loss_mode=name, **{"topk": K, **DIRECT, **changed})
    return DistillationConfig(distillation_loss=loss)


def topk_step(name, mode="token-mean", dtype=torch.float32, **changed):
    """Run both parts of a top-k loss; return loss, gradient by the logits, metrics."""
    data, logits, _ = batch(dtype)
    actor, distilled = config(loss_agg_mode=mode), options(name, **changed)
    logits.requires_grad_()
    found = host.distillation_ppo_loss(actor, distilled, data=data, student_logits=logits)
    offsets = data["teacher_ids"].offsets()
    output = {k: torch.nested.nested_tensor_from_jagged(x.squeeze(0), offsets) for k, x in found.items()}
    loss, metrics = host.distillation_ppo_loss(actor, distilled, model_output=output, data=data)
    loss.backward()
    return loss, logits.grad, metrics


def sampled_step(name, mode="token-mean", dtype=torch.float32, **changed):
    """Run a one-sample loss; return loss, gradient by the log-probabilities, metrics."""
    data, _, logp = batch(dtype)
    data["teacher_logprobs"] = torch.nested.nested_tensor_from_jagged(
        data["teacher_logprobs"].values()[:, :1], data["teacher_logprobs"].offsets()
    )
    logp.requires_grad_()
    output = {"log_probs": torch.nested.nested_tensor_from_jagged(logp, data["teacher_ids"].offsets())}
    actor = config(loss_agg_mode=mode)
    loss, metrics = host.distillation_ppo_loss(actor, options(name, **changed), model_output=output, data=data)
    loss.backward()
    return loss, logp.grad, metrics


@contextmanager
def in_float64():
    """Keep float64 where verl's formulas convert to float32."""
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        yield


def number(x):
    return float(x.aggregate()) if isinstance(x, Metric) else float(x)


def same(step, name, **given):
    ours, stock = step(f"tokfuse_{name}", **given), step(name, **given)
    with in_float64():
        exact = step(name, dtype=torch.float64, **given)
    assert exact[1].dtype == torch.float64 and exact[1].any()
    for mine, theirs, truth, what in zip(ours, stock, exact, ("loss", "gradient"), strict=False):
        assert_no_farther(mine, theirs, truth, what=f"{name} {what}")
    assert {k: type(x) for k, x in ours[2].items()} == {k: type(x) for k, x in stock[2].items()}
    for key, x in exact[2].items():
        values = [number(run[2][key]) for run in (ours, stock)]
        assert_no_farther(*values, number(x), size=max(1.0, abs(number(x))), what=f"{name} {key}")
    return stock


def test_every_loss_of_verl_is_covered():
    builtin = {n for n in host.DISTILLATION_LOSS_REGISTRY if not n.startswith("tokfuse_")}
    assert builtin == {verl_distillation.TOP_K, *verl_distillation.ESTIMATORS}
    assert set(verl_distillation.names()) == set(host.DISTILLATION_LOSS_REGISTRY) - builtin
    assert verl_distillation.register() == verl_distillation.names()  # again: no error, and no second route
    assert not hasattr(host.compute_topk_loss.args[0], "args")
    assert set(verl_plugin.describe()["distillation"]) == set(verl_distillation.names())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("least", [None, -3.0])
def test_topk(least, mode):
    same(topk_step, "forward_kl_topk", mode=mode, log_prob_min_clamp=least, loss_max_clamp=None)


@pytest.mark.parametrize("changed", [{"loss_max_clamp": 0.5}, {"use_chunked_topk": True}])
def test_options_of_topk(changed):
    same(topk_step, "forward_kl_topk", log_prob_min_clamp=None, **changed)


def test_topk_with_a_policy_gradient():
    data, logits, logp = batch()
    runs = []
    for name in ("tokfuse_forward_kl_topk", "forward_kl_topk"):
        actor, distilled = config(), options(name, use_policy_gradient=True)
        found = host.distillation_ppo_loss(actor, distilled, data=data, student_logits=logits)
        leaf = logp.clone().requires_grad_()
        offsets = data["teacher_ids"].offsets()
        output = {k: torch.nested.nested_tensor_from_jagged(x.squeeze(0), offsets) for k, x in found.items()} | {
            "log_probs": torch.nested.nested_tensor_from_jagged(leaf, offsets)
        }
        loss = host.distillation_loss(actor, distilled, output, data)[0]
        loss.backward()
        runs.append((loss.detach(), leaf.grad))
    for mine, theirs in zip(*runs, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=2e-7)


def test_topk_in_bfloat16_is_rounded_once():
    """verl rounds each log-probability to bfloat16; the gradient of tokfuse is rounded once."""
    ours = topk_step("tokfuse_forward_kl_topk", dtype=torch.bfloat16, log_prob_min_clamp=None)
    data, logits, _ = batch(torch.bfloat16)
    leaf = logits.double().requires_grad_()
    teacher, ids = data["teacher_logprobs"].values().double(), data["teacher_ids"].values()
    loss = (teacher.exp() * (teacher - leaf.squeeze(0).log_softmax(-1).gather(-1, ids))).sum(-1)
    mask = torch.zeros(len(ids))
    ends = data["teacher_ids"].offsets().tolist()[1:]
    for end, size, keep in zip(ends, RESPONSES, data["response_mask"].unbind(), strict=True):
        mask[end - size - 1 : end - 1] = keep.float()
    loss = (loss.clamp(0, 10) * mask).sum() * COUNTS["dp_size"] / COUNTS["batch_num_tokens"]
    loss.backward()
    assert abs(ours[0].item() - loss.item()) <= 2e-6 * abs(loss.item())
    worst = (ours[1].double() - leaf.grad.to(torch.bfloat16)).abs().max().item()
    assert worst <= torch.finfo(torch.bfloat16).eps * leaf.grad.abs().max().item()


def test_tail_is_the_forward_kl_of_k_plus_one_categories():
    data, logits, _ = batch(torch.float64)
    actor, distilled = config(), options("tokfuse_forward_kl_topk_tail", log_prob_min_clamp=None)
    leaf = logits.clone().requires_grad_()
    found = host.distillation_ppo_loss(actor, distilled, data=data, student_logits=leaf)
    ids, q = data["teacher_ids"].values(), data["teacher_logprobs"].values()
    exact = logits.clone().requires_grad_()
    p = exact.squeeze(0).softmax(-1).gather(-1, ids)
    p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q.exp()))
    want = (q * (q / p).log()).sum(-1)
    # The teacher's log-probabilities become float32 here, like verl's.
    torch.testing.assert_close(found["distillation_losses"].squeeze(0), want, rtol=1e-5, atol=1e-6, check_dtype=False)
    found["distillation_losses"].sum().backward()
    want.sum().backward()
    torch.testing.assert_close(leaf.grad, exact.grad, rtol=1e-5, atol=1e-6)
    assert bool((want >= 0).all())


def test_among_equals_the_table_of_all_pairs():
    gen = torch.Generator().manual_seed(3)
    ids, others = (torch.rand(50, 12, generator=gen).argsort(-1)[:, :5] for _ in range(2))
    want = (ids.unsqueeze(-1) == others.unsqueeze(-2)).any(-1)
    assert want.any() and not want.all()
    assert torch.equal(verl_distillation._among(ids, others), want)


@pytest.mark.parametrize("name", verl_distillation.ESTIMATORS)
def test_estimators(name):
    if name not in verl_distillation.BIASED:
        same(sampled_step, name, mode="token-mean")
    data, _, logp = batch()
    teacher = data["teacher_logprobs"].values()[:, 0]
    wide = torch.cat([logp, teacher + 1e-4, teacher - 40.0])
    ours, stock, exact = (
        f(x, torch.cat([teacher] * 3).to(x.dtype))
        for f, x in (
            (lambda p, q: verl_distillation.estimate(name, p, q), wide),
            (lambda p, q: host.kl_penalty(p, q, name), wide),
            (lambda p, q: host.kl_penalty(p, q, name), wide.double()),
        )
    )
    assert_no_farther(ours, stock, exact, what=name)


def test_k1_as_an_advantage():
    """With use_policy_gradient, verl applies its policy loss to the negative estimate."""
    same(sampled_step_with_gradient, "k1")
    same(sampled_step_with_gradient, "kl")


def sampled_step_with_gradient(name, **given):
    return sampled_step(name, **given, use_policy_gradient=True)


def test_refusals():
    for name in ("k1", "kl"):
        with pytest.raises(ValueError, match=r"use_policy_gradient must be True with tokfuse_k"):
            sampled_step(f"tokfuse_{name}")
    with pytest.raises(ValueError, match=r"log_prob_min_clamp must be null with tokfuse_forward_kl_topk_tail"):
        topk_step("tokfuse_forward_kl_topk_tail", log_prob_min_clamp=-10.0)
    data, logits, _ = batch()
    with pytest.raises(ValueError, match=r"actor\.strategy must be one of fsdp"):
        actor = mock.Mock(strategy="megatron")
        host.distillation_ppo_loss(actor, options("tokfuse_forward_kl_topk"), data=data, student_logits=logits)
    with pytest.raises(ValueError, match="use_fused_kernels"):
        host.distillation_loss(config(), options("tokfuse_forward_kl_topk"), {"log_probs": None}, data)


def engine():
    """Return an FSDP engine without a model, with the attributes that its two methods read."""
    out = object.__new__(transformer_impl.FSDPEngineWithLMHead)
    out.pad_to_length, out.use_ulysses_sp, out.ulysses_sequence_parallel_size = False, False, 1
    return out


@pytest.mark.parametrize("name", ["forward_kl_topk", "forward_kl_topk_tail"])
@pytest.mark.parametrize("forward", ["torch", "triton"])
def test_topk_with_fused_heads(name, forward):
    """Inputs, fused head and outputs of verl's engine, against the same loss from the logits of the model."""
    method = transformer_impl.FSDPEngineWithLMHead
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V, num_key_value_heads=2, **sizes))
    data, _, _ = batch()
    lengths = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    data["input_ids"] = nested([torch.arange(n) + 5 for n in lengths])
    data["position_ids"] = nested([torch.arange(n) for n in lengths])
    data["temperature"] = torch.tensor([0.8, 0.8, 0.8])
    tu.assign_non_tensor(data, use_fused_kernels=True, distillation_use_topk=True, calculate_entropy=True)
    actor, distilled = config(), options(f"tokfuse_{name}", log_prob_min_clamp=None)
    processor = functools.partial(host.distillation_ppo_loss, config=actor, distillation_config=distilled)
    weight = model.lm_head.weight
    verl_plugin.install()
    try:
        inputs, arguments = method.prepare_model_inputs(engine(), data)
        out = getattr(dense_common, f"forward_with_{forward}_backend")(model, **inputs)
        made = method.prepare_model_outputs(engine(), out, arguments, data, processor)
    finally:
        verl_plugin.uninstall()
    loss, metrics = processor(model_output=made, data=data)
    (grad,) = torch.autograd.grad(loss, weight)
    logits = model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"]).logits / 0.8
    found = processor(data=data, student_logits=logits)
    offsets = data["teacher_ids"].offsets()
    output = {k: torch.nested.nested_tensor_from_jagged(x.squeeze(0), offsets) for k, x in found.items()}
    want, expected = processor(model_output=output, data=data)
    torch.testing.assert_close(loss, want, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(grad, torch.autograd.grad(want, weight)[0], rtol=2e-5, atol=1e-7)
    overlap = {"distillation/overlap_ratio", "distillation/overlap_token_advantage"}
    assert set(metrics) == set(expected) - overlap
    out.log_probs = out.log_probs.clone()
    verl_plugin.install()
    try:
        with pytest.raises(ValueError, match="the installed fused head"):
            method.prepare_model_outputs(engine(), out, arguments, data, processor)
    finally:
        verl_plugin.uninstall()


def test_functions_survive_cloudpickle():
    for name in verl_distillation.names():
        assert callable(cloudpickle.loads(cloudpickle.dumps(host.get_distillation_loss_fn(name))))
