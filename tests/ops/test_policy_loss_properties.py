"""Test policy_loss: invariances, masking, autograd, and that no option is ignored."""

import math

import pytest
import torch
from harness import Backend, assert_untouched, backends, bits, compare
from policy_cases import batch

import tokfuse
from tokfuse import KL, LinearLogp, LinearRatio, LogClamp, Objective, PPOClip, TargetRatio

FULL = Objective(shape=TargetRatio(), kl=KL(estimator="ratio_k3", coef=0.2), entropy_coef=0.1)
NAMES = ("token_weight", "signal", "ref_logp", "kl_weight", "entropy", "entropy_weight")


@pytest.fixture(params=backends("policy_loss", interpreted=False, hosted=False))
def backend(request):
    with request.param.forced():
        yield request.param


def evaluate(backend: Backend, objective: Objective, logp, entropy=None, **inputs):
    """Return (loss, token_loss, metric sums, d logp, d entropy) of one call, on the CPU."""
    x = backend.put(logp).detach().clone().requires_grad_()
    h = None if entropy is None else backend.put(entropy).detach().clone().requires_grad_()
    inputs = {k: backend.put(v) for k, v in inputs.items()}
    out = tokfuse.policy_loss(x, entropy=h, objective=objective, **inputs)
    out.loss.backward()
    grads = [x.grad]
    if h is not None:  # without an entropy bonus the reference has no path to it
        grads.append(torch.zeros_like(h) if h.grad is None else h.grad)
    return [v.detach().cpu() for v in (out.loss, out.token_loss, out.metrics.sums, *grads)]


def same(left, right) -> bool:
    return all(bits(a) == bits(b) for a, b in zip(left, right, strict=True))


def long_batch(tokens: int):
    gen = torch.Generator().manual_seed(tokens)
    old = torch.rand(tokens, generator=gen) * -3
    cuts = torch.randint(0, tokens + 1, (tokens // 20,), generator=gen).sort().values
    cu = torch.cat([torch.tensor([0]), cuts, torch.tensor([tokens])]).int()
    return old + torch.randn(tokens, generator=gen) * 0.3, {
        "old_logp": old,
        "advantage": torch.randn(tokens, generator=gen),
        "cu_seqlens": cu,
        "mask": torch.rand(tokens, generator=gen) < 0.7,
        "entropy": torch.rand(tokens, generator=gen),
    }


# -------------------------------------------------------------------------------------- invariances


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("tokens", [1, 1023, 1024, 1025, 4095, 4096, 4097, 70_001])
def test_the_thread_count_changes_no_bit(tokens: int, level: str):
    """At the sizes where metric blocks, threads and groups of blocks begin."""
    logp, inputs = long_batch(tokens)
    objective = Objective(level=level, entropy_coef=0.01, aggregation="seq_mean_token_mean")
    threads = torch.get_num_threads()
    for parameter in backends("policy_loss", without="reference"):
        if parameter.marks:
            continue
        with parameter.values[0].forced():
            try:
                results = []
                for count in (1, 2, 3):
                    torch.set_num_threads(count)
                    results.append(evaluate(parameter.values[0], objective, logp, **inputs))
            finally:
                torch.set_num_threads(threads)
        assert same(results[0], results[1]) and same(results[0], results[2])
        with tokfuse.backend("reference"):
            logp64 = logp.double()
            want = evaluate(parameter.values[0], objective, logp64, **inputs)
        compare(results[0][2], want[2], rtol=1e-5, atol=1e-4)
        assert int(results[0][2][0]) == int(inputs["mask"].sum())


def test_two_runs_are_bitwise_equal(backend: Backend):
    logp, inputs = long_batch(3000)
    assert same(*(evaluate(backend, Objective(), logp, **inputs) for _ in range(2)))


def test_token_order_does_not_matter_for_a_token_objective(backend: Backend):
    logp, inputs = long_batch(500)
    del inputs["cu_seqlens"]
    order = torch.randperm(500, generator=torch.Generator().manual_seed(2))
    whole = evaluate(backend, Objective(), logp, **inputs)
    moved = evaluate(backend, Objective(), logp[order], **{k: v[order] for k, v in inputs.items()})
    assert bits(whole[1][order]) == bits(moved[1]) and bits(whole[3][order]) == bits(moved[3])
    compare(moved[2], whole[2], rtol=2e-6, atol=2e-5)


def test_sequence_order_does_not_matter(backend: Backend):
    data = batch("entropy")
    logp, inputs = data.cast(torch.float32)
    cu = inputs.pop("cu_seqlens").tolist()
    spans = [torch.arange(a, b) for a, b in zip(cu, cu[1:], strict=False)]
    spans = [spans[i] for i in (3, 1, 5, 0, 2, 4)]
    order = torch.cat(spans)
    moved_cu = torch.tensor([0, *(len(s) for s in spans)]).cumsum(0).int()
    objective = Objective(level="sequence", aggregation="seq_mean_token_mean", entropy_coef=0.3)
    whole = evaluate(backend, objective, logp, cu_seqlens=torch.tensor(cu).int(), **inputs)
    moved = evaluate(backend, objective, logp[order], cu_seqlens=moved_cu, **{k: v[order] for k, v in inputs.items()})
    compare(moved[1], whole[1][order], rtol=1e-6)
    compare(moved[3], whole[3][order], rtol=1e-6)
    compare(moved[2], whole[2], rtol=2e-6)


def test_empty_sequences_and_strides_change_nothing(backend: Backend):
    logp, inputs = batch("entropy").cast(torch.float32)
    objective = Objective(level="sequence", aggregation="seq_mean_token_mean")
    plain = evaluate(backend, objective, logp, **inputs)
    cu = inputs["cu_seqlens"]
    more = {**inputs, "cu_seqlens": torch.cat([cu[:1], cu, cu[-1:], cu[-1:]])}
    assert same(evaluate(backend, objective, logp, **more), plain)
    spread = {k: v.repeat_interleave(2)[::2] for k, v in inputs.items()}
    assert not spread["old_logp"].is_contiguous()
    assert same(evaluate(backend, objective, logp.repeat_interleave(3)[::3], **spread), plain)


# ------------------------------------------------------------------------------------------ masking


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("level", ["token", "sequence", "sequence_token", "sequence_sum"])
def test_values_at_masked_tokens_are_never_used(level: str, value: float, backend: Backend):
    logp, inputs = batch(*NAMES).cast(torch.float32)
    bad = ~inputs["mask"]
    spoilt = {k: v.clone() for k, v in inputs.items()}
    for name in (*NAMES, "old_logp", "advantage"):
        spoilt[name][bad] = value
    objective = Objective(
        shape=TargetRatio(), level=level, kl=KL(coef=0.2), entropy_coef=0.1, aggregation="seq_mean_token_mean"
    )
    plain = evaluate(backend, objective, logp, **inputs)
    assert same(evaluate(backend, objective, logp.masked_fill(bad, value), **spoilt), plain)
    for v in (plain[1], plain[3], plain[4]):
        assert not v[bad].any()


def test_the_advantage_of_a_masked_sequence_is_never_used(backend: Backend):
    logp, inputs = batch().cast(torch.float32)
    results = []
    for value in (0.0, float("nan")):
        inputs["advantage"] = torch.tensor([1.5, value, -0.75, -1.25, 0.5, value])
        results.append(evaluate(backend, Objective(level="sequence"), logp, advantage_level="sequence", **inputs))
    assert same(*results)


def test_bad_values_at_valid_tokens_are_not_hidden(backend: Backend):
    logp, inputs = batch().cast(torch.float32)
    logp[0] = float("nan")
    loss, token_loss, _, grad = evaluate(backend, Objective(shape=LinearRatio()), logp, **inputs)
    assert loss.isnan() and token_loss.isnan().nonzero().tolist() == [[0]]
    assert grad[1:].isfinite().all()


def test_no_valid_token_gives_a_differentiable_zero_that_touches_every_input(backend: Backend):
    logp, inputs = batch(*NAMES).cast(torch.float32)
    none = {k: v[:0] for k, v in inputs.items()} | {"cu_seqlens": torch.tensor([0]).int()}
    masked = inputs | {"mask": torch.zeros_like(inputs["mask"])}
    for x, given in ((logp, masked), (logp[:0], none)):
        for normalizer in (None, 5.0, "batch"):
            for objective in (
                FULL,
                Objective(
                    level="sequence",
                    shape=TargetRatio(),
                    entropy_coef=0.1,
                    kl=KL(coef=0.1),
                    aggregation="seq_mean_token_mean",
                ),
            ):
                out = evaluate(backend, objective, x, normalizer=normalizer, **given)
                assert float(out[0]) == 0.0 and out[1].shape == x.shape
                for grad in out[3:]:
                    assert bits(grad) == bits(torch.zeros_like(x))


# ----------------------------------------------------------------------------------------- autograd


def test_retained_graph_gives_the_same_gradients_twice(backend: Backend):
    logp, inputs = batch(*NAMES).cast(torch.float32)
    inputs = {k: backend.put(v) for k, v in inputs.items()}
    x = backend.put(logp).requires_grad_()
    h = inputs.pop("entropy").requires_grad_()
    loss = tokfuse.policy_loss(x, entropy=h, objective=FULL, **inputs).loss
    first = torch.autograd.grad(loss, (x, h), retain_graph=True)
    assert same(first, torch.autograd.grad(loss, (x, h)))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, x)


def test_gradient_scales_with_the_incoming_one_and_chains(backend: Backend):
    logp, inputs = batch().cast(torch.float32)
    inputs = {k: backend.put(v) for k, v in inputs.items()}
    x = backend.put(logp).requires_grad_()
    out = tokfuse.policy_loss(x * 1.0, objective=Objective(), **inputs)
    (one,) = torch.autograd.grad(out.loss, x, retain_graph=True)
    (four,) = torch.autograd.grad(out.loss * 4.0, x)
    assert bits(one * 4.0) == bits(four)
    outputs = (out.token_loss, out.loss_sum, out.count, out.metrics.sums)
    assert out.loss.requires_grad and not any(v.requires_grad for v in outputs)


def test_no_graph_without_grad(backend: Backend):
    logp, inputs = batch("entropy").cast(torch.float32)
    inputs = {k: backend.put(v) for k, v in inputs.items()}
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            out = tokfuse.policy_loss(backend.put(logp).clone().requires_grad_(), objective=Objective(), **inputs)
        assert not out.loss.requires_grad
    out = tokfuse.policy_loss(backend.put(logp), objective=Objective(entropy_coef=0.1), **inputs)
    assert not out.loss.requires_grad


def test_gradient_of_entropy_alone(backend: Backend):
    logp, inputs = batch("entropy").cast(torch.float32)
    inputs = {k: backend.put(v) for k, v in inputs.items()}
    h = inputs.pop("entropy").requires_grad_()
    objective = Objective(entropy_coef=0.25)
    out = tokfuse.policy_loss(backend.put(logp), entropy=h, objective=objective, **inputs)
    out.loss.backward()
    assert h.grad.tolist() == torch.where(inputs["mask"], -0.25, 0.0).tolist()


def test_second_derivative_is_refused_not_wrong():
    logp, inputs = batch().cast(torch.float32)
    x, scale = logp.requires_grad_(), torch.ones((), requires_grad=True)
    with tokfuse.backend("cpu"):
        loss = tokfuse.policy_loss(x, objective=Objective(), **inputs).loss
    with pytest.raises(ValueError, match="policy_loss: create_graph must be False"):
        torch.autograd.grad(loss * scale, x, create_graph=True)


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_sum"])
def test_reference_passes_gradcheck(level: str):
    data = batch(*NAMES)
    logp, inputs = data.logp, dict(data.inputs)
    inputs["old_logp"] = logp - 0.1 * (logp - inputs["old_logp"])  # away from every kink
    inputs["ref_logp"] = logp + 0.3
    h = inputs.pop("entropy")
    objective = Objective(shape=tokfuse.SigmoidGate(), level=level, kl=KL(coef=0.2), entropy_coef=0.1)
    inputs.pop("signal")

    def loss(x, y):
        return tokfuse.policy_loss(x, entropy=y, objective=objective, **inputs).loss

    assert torch.autograd.gradcheck(loss, (logp.clone().requires_grad_(), h.requires_grad_()))


# --------------------------------------------------------------------------------- clamps, extremes


def test_sequence_token_keeps_its_gradient_at_the_clamp(backend: Backend):
    """The clamped mean is a constant. Each token's factor exp(l - sg(l)) keeps its gradient."""
    logp = torch.tensor([-0.3, -1.7, -0.21])
    inputs = {
        "old_logp": logp - torch.tensor([2.5, 2.0, 1.9]),
        "advantage": torch.ones(3),
        "cu_seqlens": torch.tensor([0, 1, 2, 3]).int(),
    }
    objective = Objective(shape=LinearRatio(), level="sequence_token", log_ratio_clamp=1.37)
    *_, grad = evaluate(backend, objective, logp, **inputs)
    compare(grad, torch.full((3,), -1.37).exp().reciprocal().neg(), rtol=1e-6)


AT_A_BOUND = {
    "kl": (Objective(shape=LinearLogp(), kl=KL(estimator="k1", coef=0.5, clamp=2.0)), {"ref_logp": -3.0}, -1.0 + 0.5),
    "anchor": (
        Objective(shape=LinearLogp(), anchor=KL(estimator="k1", coef=0.5, clamp=2.0)),
        {"anchor_logp": -3.0},
        -1.0 + 0.5,
    ),
    "ratio": (Objective(shape=LinearRatio(), log_ratio_clamp=2.0), {"old_logp": -3.0}, -math.exp(2.0)),
    "log clamp": (Objective(shape=LogClamp(bound=2.0)), {"old_logp": -3.0}, -math.exp(2.0)),
}


@pytest.mark.parametrize("name", AT_A_BOUND)
def test_at_a_bound_the_gradient_is_that_of_the_inside(name: str, backend: Backend):
    """torch's own clamp has gradient 1, 1/2 or 0 there, depending on its version."""
    objective, given, expected = AT_A_BOUND[name]
    inputs = {name: torch.full((4,), value) for name, value in {"old_logp": -1.0, **given}.items()}
    *_, grad = evaluate(backend, objective, torch.full((4,), -1.0), advantage=torch.ones(4), normalizer=1.0, **inputs)
    compare(grad, torch.full((4,), expected), rtol=1e-6)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_target_without_probability_has_no_gradient_and_no_nan(level: str, backend: Backend):
    logp, inputs = batch("ref_logp").cast(torch.float32)
    logp[3] = float("-inf")
    objective = Objective(level=level, kl=KL(coef=0.1))
    loss, token_loss, _, grad = evaluate(backend, objective, logp, **inputs)
    assert loss.isfinite() and token_loss.isfinite().all() and grad.isfinite().all()
    assert grad[3] == 0.0


# --------------------------------------------------------------------------------- dtypes, options


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_inputs_are_exact_and_their_gradients_rounded_once(dtype, backend: Backend):
    logp, inputs = batch(*NAMES).cast(dtype)
    short = evaluate(backend, FULL, logp, **inputs)
    wide = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    exact = evaluate(backend, FULL, logp.float(), **wide)
    assert same(short[:3], exact[:3])
    assert short[3].dtype == dtype and short[0].dtype == torch.float32
    assert bits(short[3]) == bits(exact[3].to(dtype)) and bits(short[4]) == bits(exact[4].to(dtype))


def test_inputs_of_mixed_dtypes(backend: Backend):
    logp, inputs = batch(*NAMES).cast(torch.float32)
    mixed = dict(inputs)
    for name in ("old_logp", "token_weight", "entropy"):
        mixed[name] = inputs[name].double()
    got, want = (evaluate(backend, FULL, logp, **given) for given in (mixed, inputs))
    assert same(got[:4], want[:4]) and got[4].dtype == torch.float64


def test_autocast_changes_nothing(backend: Backend):
    logp, inputs = batch(*NAMES).cast(torch.float32)
    plain = evaluate(backend, FULL, logp, **inputs)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        assert same(evaluate(backend, FULL, logp, **inputs), plain)


@pytest.mark.parametrize("name", [*NAMES, "old_logp", "advantage", "mask", "cu_seqlens", "logp"])
def test_no_input_is_ignored(name: str, backend: Backend):
    logp, inputs = batch(*NAMES).cast(torch.float32)
    objective = Objective(
        shape=TargetRatio(),
        kl=KL(coef=0.2),
        entropy_coef=0.1,
        level="sequence_token",
        aggregation="seq_mean_token_mean",
    )
    plain = evaluate(backend, objective, logp, **inputs)
    if name == "cu_seqlens":
        inputs[name] = torch.tensor([0, 4, 4, 6, 15, 19, 22]).int()
    elif name == "mask":
        inputs[name] = ~inputs[name]
    elif name == "logp":
        logp = logp + 0.125
    else:
        inputs[name] = inputs[name] + 0.125
    assert not torch.equal(evaluate(backend, objective, logp, **inputs)[1], plain[1])


def test_no_argument_is_written(backend: Backend):
    logp, inputs = batch(*NAMES, "sampler_logp").cast(torch.float32)
    given = {k: backend.put(v) for k, v in {"logp": logp, **inputs}.items()}
    given["logp"].requires_grad_()
    for level in ("token", "sequence"):
        objective = Objective(shape=PPOClip(), level=level, kl=KL(coef=0.1), entropy_coef=0.1)
        rest = {k: v for k, v in given.items() if k != "signal"}
        assert_untouched(lambda o=objective, r=rest: tokfuse.policy_loss(objective=o, **r).loss.backward(), rest)
