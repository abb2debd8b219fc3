"""Test policy_step from hidden states against policy_loss over linear_token_stats, on every backend.

Loss, metrics and statistics agree up to the rounding of GEMMs with other splits. Gradients agree within 1e-5
of the largest entry; 16-bit gradients within one ulp more, because both sides round once.
"""

import pytest
import torch
from harness import FLOAT_DTYPES, Backend, assert_untouched, backends, bits, compare, half_ulp
from head_cases import SIZES, head_case, peak_growth
from policy_cases import SHAPES

import tokfuse
from tokfuse import KL, Objective, PPOClip, TargetRatio
from tokfuse.runtime.policy.objective import LEVELS

NAMES = ("hidden", "weight", "bias")


@pytest.fixture(params=backends("policy_step_hidden", interpreted=False))
def backend(request):
    with request.param.forced():
        yield request.param


def keywords_of(size: str, case, dtype: torch.dtype, signal: bool = False, temperature=1.0):
    """Return log-ratios on both sides of the clips, zero advantages, masked tokens, an empty sequence."""
    tokens = SIZES[size][0]
    gen = torch.Generator().manual_seed(23)
    logits = case.hidden.float() @ case.weight.float().t() + case.bias.float()
    logp = (logits / temperature).log_softmax(1).gather(1, case.target[:, None])[:, 0]
    out = {
        "target": case.target,
        "old_logp": logp + 0.3 * torch.randn(tokens, generator=gen),
        "ref_logp": logp + 0.3 * torch.randn(tokens, generator=gen),
        "advantage": torch.where(torch.arange(tokens) % 4 == 1, 0.0, torch.randn(tokens, generator=gen)),
        "mask": torch.arange(tokens) % 5 != 3,
        "cu_seqlens": torch.tensor([0, 4, 4, tokens - 6, tokens]).int(),
        "normalizer": 3.0,
        "temperature": temperature,
    }
    return out | ({"signal": torch.rand(tokens, generator=gen)} if signal else {})


def leaves(backend: Backend, case, needs: str):
    out = {n: backend.put(getattr(case, n)).detach().clone() for n in NAMES}
    for name, tensor in out.items():
        tensor.requires_grad_(name[0] in needs)
    return out


def composed(backend: Backend, case, objective: Objective, needs: str, **keywords):
    """Return policy_loss over linear_token_stats with autograd, in float64."""
    tensors = {n: x.detach().double().requires_grad_(x.requires_grad) for n, x in leaves(backend, case, needs).items()}
    inputs = {
        k: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for k, x in keywords.items()
    }
    options = {k: inputs.pop(k) for k in ("temperature", "softcap", "logit_scale") if k in inputs}
    inputs.pop("memory_budget", None)
    stats = tokfuse.linear_token_stats(target=inputs.pop("target"), mask=inputs.get("mask"), **tensors, **options)
    out = tokfuse.policy_loss(stats.logp, entropy=stats.entropy, objective=objective, **inputs)
    if out.loss.requires_grad:
        out.loss.backward()
    return out, stats, {name: tensor.grad for name, tensor in tensors.items()}


def check(backend: Backend, case, objective: Objective, *, needs: str = "hwb", **keywords):
    keywords = {k: backend.put(v) for k, v in keywords.items()}
    tensors = leaves(backend, case, needs)
    step = tokfuse.policy_step(**tensors, objective=objective, **keywords)
    held = {name: getattr(step, f"grad_{name}") for name in NAMES}
    held = {name: None if x is None else x.clone() for name, x in held.items()}
    if needs:
        step.loss.backward()
    with tokfuse.backend("reference"):
        want, stats, grads = composed(backend, case, objective, needs, **keywords)
    scale = max(1.0, float(want.token_loss.abs().max()))
    compare(step.token_loss, want.token_loss, atol=1e-5 * scale)
    compare(step.loss, want.loss, atol=1e-5 * scale * len(case.target) ** 0.5)
    compare(step.metrics.sums, want.metrics.sums, rtol=1e-4, atol=1e-4)
    for got, expected in zip(step.stats, stats, strict=True):
        compare(got, expected, atol=1e-5)
    for name, tensor in tensors.items():
        if name[0] not in needs:
            assert tensor.grad is None and held[name] is None
            continue
        assert tensor.grad.dtype == tensor.dtype and bits(tensor.grad) == bits(held[name])
        atol = 1e-5 * float(grads[name].abs().max())
        if tensor.dtype != torch.float32:
            atol = atol + 2 * half_ulp(grads[name].cpu(), tensor.dtype)
        compare(tensor.grad, grads[name], atol=atol, what=f"grad_{name}")
    return step, tensors


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_objective(shape: str, level: str, backend: Backend):
    case = head_case("one_tile")
    objective = Objective(
        shape=SHAPES[shape], level=level, kl=KL(coef=0.05), entropy_coef=0.02, aggregation="seq_mean_token_mean"
    )
    check(backend, case, objective, **keywords_of("one_tile", case, torch.float32, SHAPES[shape].needs_signal))


def test_an_anchor_alone_needs_every_row(backend: Backend):
    """Rows without advantage enter the gradient GEMMs if the anchor gives them a weight."""
    case = head_case("one_tile")
    keywords = keywords_of("one_tile", case, torch.float32)
    del keywords["ref_logp"]
    keywords["advantage"] = torch.zeros_like(keywords["advantage"])
    keywords["anchor_logp"] = torch.zeros_like(keywords["old_logp"])
    keywords["anchor_weight"] = (torch.arange(len(keywords["old_logp"])) % 3 > 0).float()
    _, tensors = check(backend, case, Objective(anchor=KL(estimator="k1", coef=-0.5)), **keywords)
    assert tensors["hidden"].grad.abs().sum() > 0


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_sizes_and_dtypes(size: str, dtype: torch.dtype, level: str, backend: Backend):
    case = head_case(size, dtype)
    objective = Objective(level=level, kl=KL(coef=0.05))
    check(backend, case, objective, **keywords_of(size, case, dtype))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("wide", ["hidden", "weight"])
def test_mixed_dtypes(wide: str, level: str, backend: Backend):
    case = head_case("tiles")
    case = case._replace(**{name: getattr(case, name).bfloat16() for name in ("hidden", "weight") if name != wide})
    step, tensors = check(backend, case, Objective(level=level), **keywords_of("tiles", case, torch.float32))
    assert tensors[wide].grad.dtype == torch.float32


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("budget", [1, 400_000, 1 << 40])
def test_any_memory_budget(budget: int, size: str, backend: Backend):
    case = head_case(size)
    keywords = keywords_of(size, case, torch.float32)
    check(backend, case, Objective(kl=KL(coef=0.05)), memory_budget=budget, **keywords)


@pytest.mark.parametrize("needs", ["", "h", "w", "b", "hw", "wb", "hb"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_gradients_only_where_asked(level: str, needs: str, backend: Backend):
    case = head_case("tiles")
    keywords = keywords_of("tiles", case, torch.float32)
    step, _ = check(backend, case, Objective(level=level, kl=KL(coef=0.1)), needs=needs, **keywords)
    assert step.loss.requires_grad == bool(needs) and step.grad_logits is None


OPTIONS = {
    "temperature": 0.8,
    "temperature_rows": torch.linspace(0.5, 1.5, 37),
    "softcap": 4.0,
    "logit_scale": 0.5,
    "token_weight": torch.linspace(0.0, 2.0, 37),
    "kl_weight": torch.linspace(0.0, 1.0, 37),
    "entropy_weight": torch.linspace(1.0, 0.0, 37),
    "signal": torch.linspace(-2.0, 2.0, 37),
    "mask": torch.arange(37) % 2 == 0,
    "advantage": torch.linspace(-1.0, 1.0, 37),
    "normalizer": "batch",
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_honoured(name: str, backend: Backend):
    case = head_case("one_tile")
    keywords = keywords_of("one_tile", case, torch.float32, signal=True)
    objective = Objective(shape=TargetRatio(), kl=KL(coef=0.1), entropy_coef=0.1)
    plain, before = check(backend, case, objective, **keywords)
    other = keywords | {name.removesuffix("_rows"): OPTIONS[name]}
    step, after = check(backend, case, objective, **other)
    assert not torch.equal(step.loss, plain.loss)
    assert not torch.equal(before["weight"].grad, after["weight"].grad)


# ------------------------------------------------------------------------------------ gradient rows


@pytest.mark.parametrize("kept", [0, 1, 18, 37])
@pytest.mark.parametrize("budget", [None, 1, 400_000])
def test_rows_without_coefficient_enter_no_gemm(budget, kept: int, backend: Backend):
    """Kept rows are at random positions. Masked rows contain infinities that any product would spread."""
    case = head_case("tiles")
    keywords = keywords_of("tiles", case, torch.float32)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(kept))
    keywords |= {"mask": torch.ones(37, dtype=torch.bool), "advantage": torch.zeros(37), "memory_budget": budget}
    keywords["advantage"][order[:kept]] = 1.5
    del keywords["ref_logp"]
    objective = Objective(shape=PPOClip(low=1.0, high=1e9))
    step, tensors = check(backend, case, objective, **keywords)
    rows = tensors["hidden"].grad.abs().amax(1) > 0
    assert sorted(rows.nonzero()[:, 0].tolist()) == sorted(order[:kept].tolist())
    assert step.metrics["grad_rows"] == pytest.approx(kept / 37)
    keywords["mask"] = torch.zeros(37, dtype=torch.bool)
    keywords["mask"][order[:kept]] = True
    bad = case._replace(hidden=case.hidden.clone(), target=case.target.clone())
    bad.hidden[~keywords["mask"]] = float("inf")
    keywords["target"] = torch.where(keywords["mask"], case.target, -100)
    if backend.name != "reference":  # a full GEMM multiplies the masked rows by 0
        masked = tokfuse.policy_step(**leaves(backend, bad, "hwb"), objective=objective, **keywords)
        atol = 1e-6 * max(1e-3, float(tensors["weight"].grad.abs().max()))
        compare(masked.grad_weight, tensors["weight"].grad, atol=atol)
        compare(masked.grad_hidden[rows], tensors["hidden"].grad[rows], atol=atol)
        assert not masked.grad_hidden[~rows].any()


def test_no_tokens_and_nothing_valid(backend: Backend):
    case = head_case("tiles")
    keywords = keywords_of("tiles", case, torch.float32)
    none = case._replace(hidden=case.hidden[:0], target=case.target[:0])
    empty = {k: v[:0] if isinstance(v, torch.Tensor) else v for k, v in keywords.items()}
    masked = keywords | {"mask": torch.zeros(37, dtype=torch.bool)}
    for level in ("token", "sequence"):
        objective = Objective(level=level, kl=KL(coef=0.1), entropy_coef=0.1)
        for given, inputs in ((none, empty | {"cu_seqlens": torch.tensor([0]).int()}), (case, masked)):
            tensors = leaves(backend, given, "hwb")
            step = tokfuse.policy_step(**tensors, objective=objective, **inputs)
            step.loss.backward()
            assert float(step.loss.detach()) == 0.0
            for tensor in tensors.values():
                assert tensor.grad.shape == tensor.shape and not tensor.grad.any()


# --------------------------------------------------------------------------------- other properties


def test_two_runs_are_bitwise_equal_and_no_argument_is_written(backend: Backend):
    case = head_case("tiles", torch.bfloat16)
    keywords = keywords_of("tiles", case, torch.bfloat16)
    objective = Objective(kl=KL(coef=0.05), entropy_coef=0.01)
    results = []
    for _ in range(2):
        tensors = leaves(backend, case, "hwb")
        given = {**tensors, **{k: backend.put(v) for k, v in keywords.items()}}

        def run(given=given):
            step = tokfuse.policy_step(objective=objective, memory_budget=300_000, **given)
            step.loss.backward()
            return step

        step = assert_untouched(run, given)
        results.append([bits(step.loss), *(bits(x.grad) for x in tensors.values())])
    assert results[0] == results[1]


def test_steps_after_one_another_do_not_share_memory(backend: Backend):
    """The workspace is kept between calls, so no result may point into it."""
    case = head_case("tiles")
    keywords = keywords_of("tiles", case, torch.float32)
    objective = Objective(kl=KL(coef=0.05))
    first = tokfuse.policy_step(**leaves(backend, case, "hwb"), objective=objective, **keywords)
    before = [bits(getattr(first, f"grad_{n}")) for n in NAMES]
    other = case._replace(hidden=case.hidden * -2, weight=case.weight * 3)
    tokfuse.policy_step(**leaves(backend, other, "hwb"), objective=objective, **keywords)
    stats = tokfuse.linear_token_stats(other.hidden, other.weight, other.target)
    assert [bits(getattr(first, f"grad_{n}")) for n in NAMES] == before
    assert stats.logp.isfinite().all()


def test_inference_mode(backend: Backend):
    case = head_case("one_tile")
    keywords = keywords_of("one_tile", case, torch.float32)
    for level in ("token", "sequence"):
        objective = Objective(level=level, kl=KL(coef=0.05))
        want = tokfuse.policy_step(**leaves(backend, case, ""), objective=objective, **keywords)
        with torch.inference_mode():
            made = {k: v.clone() if hasattr(v, "clone") else v for k, v in keywords.items()}
            tensors = {k: v.clone() for k, v in leaves(backend, case, "").items()}
            step = tokfuse.policy_step(**tensors, objective=objective, **made)
        assert bits(step.loss) == bits(want.loss) and step.grad_weight is None


def test_tied_weight_collects_both_gradients(backend: Backend):
    """hidden is computed from the same weight, as with tied embeddings."""
    case = head_case("one_tile")
    keywords = {k: backend.put(v) for k, v in keywords_of("one_tile", case, torch.float32).items()}
    weight = backend.put(case.weight).detach().clone().requires_grad_()
    tokens = backend.put(torch.arange(37))
    step = tokfuse.policy_step(hidden=weight[tokens] * 2.0, weight=weight, objective=Objective(), **keywords)
    through_hidden, direct = step.grad_hidden.clone(), step.grad_weight.clone()
    step.loss.backward()
    direct[:37] += 2.0 * through_hidden
    compare(weight.grad, direct, atol=1e-7 * float(direct.abs().max()))


PEAK = """
tokfuse.policy_step(
    hidden=h, weight=w, target=torch.zeros(tokens, dtype=torch.int64), memory_budget=8 << 20,
    old_logp=torch.full((tokens,), -40.0), advantage=torch.randn(tokens),
    objective=tokfuse.Objective(),
).loss.backward()
"""


def test_peak_memory_does_not_grow_with_the_tokens():
    """1024 rows of 30000 float32 logits are 117 MiB; the workspace holds 8 MiB of them."""
    assert peak_growth(PEAK) < 40
