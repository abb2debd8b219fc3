"""Test the Triton head in the interpreter: statistics without logits in memory, chunks, row classes.

Bounds are those of test_linear_token_stats and test_policy_step_hidden. The interpreter runs on the CPU, where
the chunks' GEMMs are float32 also for a 16-bit head. On a GPU the gradient of the logits is rounded to 16 bits.
This is tested for the kernel here, and for the whole op in tests marked `gpu`.
"""

import importlib

import pytest
import torch
from harness import assert_untouched, backends, bits, compare, half_ulp
from head_cases import HeadCase, head_truth
from logit_cases import FORWARD_ATOL

import tokfuse
from tokfuse import KL, Objective, PPOClip, Quadratic
from tokfuse.influence import InfluenceSpec
from tokfuse.runtime.lm_head import device_head
from tokfuse.runtime.lm_head.problem import HeadProblem
from tokfuse.runtime.policy import inputs as policy_inputs

launch = pytest.importorskip("tokfuse.triton_kernels.launch")
for _kernel in ("head_gradient", "linear_token_stats", "policy_step", "token_stats"):
    importlib.import_module(f"tokfuse.triton_kernels.{_kernel}")

TOKENS, HIDDEN, VOCAB = 9, 20, 300
NAMES = ("hidden", "weight", "bias")
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(params=[p for p in backends("linear_token_stats") if p.id == "triton"])
def backend(request):
    with request.param.forced():
        yield request.param


@pytest.fixture
def small_tiles(monkeypatch):
    """Three splits of 128 columns with two tiles each, two steps along hidden, two blocks of tokens."""
    module = importlib.import_module("tokfuse.triton_kernels.linear_token_stats")
    tile = launch.LaunchConfig(block_t=8, block_v=64, block_h=16, num_warps=1)
    monkeypatch.setattr(module, "SPLIT", 128)
    monkeypatch.setitem(launch.DEFAULTS, "linear_token_stats", {80: tile})
    square = launch.LaunchConfig(block_t=16, block_v=64, block_h=16, num_warps=1)
    for kernel in ("head_grad_hidden", "head_grad_weight"):
        monkeypatch.setitem(launch.DEFAULTS, kernel, {80: square})
        monkeypatch.setitem(launch.DEFAULTS, f"{kernel}_f32", {80: square})
    one_warp = launch.LaunchConfig(block_v=256, num_warps=1)
    for kernel in ("policy_step", "token_stats_fwd", "token_stats_bwd"):
        monkeypatch.setitem(launch.DEFAULTS, kernel, {80: one_warp})


def case_of(dtype: torch.dtype) -> HeadCase:
    gen = torch.Generator().manual_seed(4)
    hidden = torch.randn(TOKENS, HIDDEN, generator=gen).to(dtype)
    weight = torch.randn(VOCAB, HIDDEN, generator=gen).mul(0.5).to(dtype)
    target = torch.randint(0, VOCAB, (TOKENS,), generator=gen)
    target[:2] = torch.tensor([0, VOCAB - 1])
    return HeadCase(hidden, weight, torch.randn(VOCAB, generator=gen).to(dtype), target)


def coefficients() -> tuple[torch.Tensor, torch.Tensor]:
    i = torch.arange(TOKENS)
    return torch.where(i % 4 == 3, 0.0, torch.cos(1.7 * i)), torch.where(i % 2 == 1, 0.0, 0.5)


def check(backend, case: HeadCase, bias: bool = True, **options):
    """Compare statistics and gradients of linear_token_stats with float64 formulas."""
    ga, gh = coefficients()
    tensors = {n: backend.put(getattr(case, n)).requires_grad_() for n in ("hidden", "weight")}
    if bias:
        tensors["bias"] = backend.put(case.bias).requires_grad_()
    given = {k: backend.put(v) for k, v in options.items()}
    stats = tokfuse.linear_token_stats(**tensors, target=backend.put(case.target), **given)
    torch.autograd.backward([stats.logp, stats.entropy], [backend.put(ga), backend.put(gh)])
    options.pop("memory_budget", None)
    want = head_truth(case, ga, gh, bias, **options)
    for name in ("logp", "entropy", "lse"):
        compare(getattr(stats, name), getattr(want.stats, name), atol=FORWARD_ATOL, what=name)
    compare(stats.sum_sq, want.stats.sum_sq, rtol=2e-5, what="sum_sq")
    compare(stats.top1, want.stats.top1, what="top1")
    for name, tensor in tensors.items():
        # The second part is for entries where log p + entropy cancels: its error is the rounding of its terms.
        atol = 1e-5 * want.scales[name] + 1e-6 * want.grads[name].abs().max()
        if tensor.dtype != torch.float32:
            atol = atol + half_ulp(want.grads[name], tensor.dtype)
        compare(tensor.grad, want.grads[name], atol=atol, what=f"grad_{name}")
    return stats


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16)]
)
def test_mixed_dtypes(dtypes, backend, small_tiles, monkeypatch):
    monkeypatch.setattr(device_head, "WIDE_BYTES", 4 * HIDDEN * 128)  # three tiles of the weight
    case = case_of(torch.float32)
    check(backend, case._replace(hidden=case.hidden.to(dtypes[0]), weight=case.weight.to(dtypes[1])))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_values_and_gradients(dtype: torch.dtype, bias: bool, backend, small_tiles):
    check(backend, case_of(dtype), bias)


@pytest.mark.parametrize(
    "option",
    [
        {"temperature": 1.4},
        {"temperature": torch.linspace(0.6, 1.8, TOKENS)},
        {"softcap": 5.0},
        {"logit_scale": 0.3},
        {"mask": torch.arange(TOKENS) % 3 != 1},
        {"mask": torch.zeros(TOKENS, dtype=torch.bool)},
        {"memory_budget": 1},
    ],
    ids=lambda option: "-".join(map(str, option)),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_options(dtype: torch.dtype, option, backend, small_tiles):
    plain = check(backend, case_of(dtype))
    stats = check(backend, case_of(dtype), **option)
    if "memory_budget" not in option:
        assert not torch.equal(stats.logp, plain.logp)


def test_a_token_does_not_depend_on_its_batch(backend, small_tiles):
    """Splits are fixed parts of the vocabulary. The position in a block of tokens has no effect."""
    case = case_of(torch.bfloat16)
    hidden, weight, target = (backend.put(x) for x in (*case[:2], case.target))
    whole = tokfuse.linear_token_stats(hidden, weight, target)
    part = tokfuse.linear_token_stats(hidden[5:], weight, target[5:])
    for a, b in zip(whole, part, strict=True):
        assert bits(a[5:]) == bits(b)


def test_masked_tokens_are_never_used(backend, small_tiles):
    for dtype in (torch.float32, torch.bfloat16):
        case, mask = case_of(dtype), torch.arange(TOKENS) % 3 != 1
        want = check(backend, case, mask=mask)
        bad = case._replace(hidden=case.hidden.clone(), target=case.target.clone())
        bad.hidden[~mask], bad.target[~mask] = float("nan"), -100
        hidden, weight, bias, target, keep = (backend.put(x) for x in (*bad, mask))
        got = tokfuse.linear_token_stats(hidden, weight, target, bias=bias, mask=keep)
        for a, b in zip(got, want, strict=True):
            assert bits(a) == bits(b)


# ------------------------------------------------------------------------------------- policy_step


def keywords_of(case: HeadCase):
    gen = torch.Generator().manual_seed(8)
    logits = case.hidden.float() @ case.weight.float().t() + case.bias.float()
    logp = logits.log_softmax(1).gather(1, case.target[:, None])[:, 0]
    advantage = torch.randn(TOKENS, generator=gen)
    advantage[2::3] = 0.0
    mask = torch.ones(TOKENS, dtype=torch.bool)
    mask[4] = False
    return {
        "target": case.target,
        "old_logp": logp + 0.2 * torch.randn(TOKENS, generator=gen),
        "advantage": advantage,
        "mask": mask,
        "normalizer": 3.0,
        "cu_seqlens": torch.tensor([0, 4, 4, 9]).int(),
    }


def leaves(backend, case: HeadCase, needs: str = "hwb") -> dict[str, torch.Tensor]:
    """Return hidden, weight and bias on the device. They require grad if `needs` contains their letter."""
    return {n: backend.put(getattr(case, n)).clone().requires_grad_(n[0] in needs) for n in NAMES}


def step_check(backend, case: HeadCase, objective: Objective, needs="hwb", **keywords):
    """Compare loss, metrics and gradients of a step with the float64 reference."""
    exact = {n: getattr(case, n).double().requires_grad_() for n in NAMES}
    inputs = {
        k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in keywords.items()
    }
    with tokfuse.backend("reference"):
        want = tokfuse.policy_step(**exact, objective=objective, **inputs)
        want.loss.backward()
    tensors = leaves(backend, case, needs)
    given = {k: backend.put(v) for k, v in keywords.items()}
    got = tokfuse.policy_step(**tensors, objective=objective, **given)
    held = {n: getattr(got, f"grad_{n}") for n in NAMES}
    compare(got.loss, want.loss, atol=1e-5)
    compare(got.metrics.sums, want.metrics.sums, atol=1e-4, what="metric sums")
    for name, grad in held.items():
        if name[0] not in needs:
            assert grad is None
            continue
        expected = exact[name].grad
        atol = 1e-5 * expected.abs().max()
        if grad.dtype != torch.float32:
            atol = atol + half_ulp(expected, grad.dtype)
        compare(grad, expected, atol=atol, what=f"grad_{name}")
    return got


SPEC = Objective(shape=PPOClip(low=0.2, high=0.2))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("budget", [None, 1])
def test_step_from_hidden(dtype: torch.dtype, budget, backend, small_tiles):
    case = case_of(dtype)
    keywords = keywords_of(case) | {"memory_budget": budget}
    keywords["ref_logp"] = keywords["old_logp"] - 0.1
    step_check(backend, case, Objective(kl=KL(coef=0.05), entropy_coef=0.02), **keywords)


@pytest.mark.parametrize("needs", ["", "h", "w", "wb"])
def test_gradients_only_where_asked(needs: str, backend, small_tiles):
    case = case_of(torch.float32)
    step_check(backend, case, SPEC, needs=needs, **keywords_of(case))


@pytest.mark.parametrize("level", ["sequence", "sequence_token"])
def test_step_of_a_sequence_level_objective(level: str, backend, small_tiles):
    case = case_of(torch.bfloat16)
    objective = Objective(level=level, aggregation="seq_mean_token_mean")
    step_check(backend, case, objective, **keywords_of(case))


def test_step_under_capture_computes_every_row(backend, small_tiles, monkeypatch):
    """No value may be read then. Masked rows, NaN here, must contribute exact zeros."""
    case = case_of(torch.float32)
    keywords = keywords_of(case)
    want = step_check(backend, case, SPEC, **keywords)
    monkeypatch.setattr(device_head, "capturing", lambda x: True)
    monkeypatch.setattr(torch.Tensor, "tolist", None)
    bad = case._replace(hidden=case.hidden.clone())
    bad.hidden[4] = float("nan")
    given = {k: backend.put(v) for k, v in keywords.items()}
    got = tokfuse.policy_step(**leaves(backend, bad), objective=SPEC, **given)
    monkeypatch.undo()
    for name in NAMES:
        a, b = getattr(got, f"grad_{name}"), getattr(want, f"grad_{name}")
        compare(a, b, atol=1e-6 * float(b.abs().max()), what=name)
    assert not got.grad_hidden[4].any()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("needs", ["hwb", "h", "w"])
def test_clipped_rows_enter_no_gradient_gemm_where_asked(dtype, needs, backend, small_tiles, monkeypatch):
    """Half of 24 tokens have a gradient. Chunks of 8 find them without a value on the host."""
    gen = torch.Generator().manual_seed(6)
    hidden = torch.randn(24, HIDDEN, generator=gen).to(dtype)
    case = case_of(dtype)._replace(hidden=hidden, target=torch.arange(24) * 12)
    logits = hidden.float() @ case.weight.float().t() + case.bias.float()
    logp = logits.log_softmax(1).gather(1, case.target[:, None])[:, 0]
    alive = torch.arange(24) % 4 % 3 > 0
    old_logp = logp - torch.where(alive, 0.0, 1.0)  # ratios of 1 and e
    keywords = {"target": case.target, "old_logp": old_logp, "advantage": torch.ones(24)}
    budget = 8 * (304 * 8 + 8 * HIDDEN + 64)
    kernels = importlib.import_module("tokfuse.triton_kernels.head_gradient")
    found, first = [], kernels.live_first

    def recorded(live):
        rows, count = first(live)
        found.append(rows[: int(count)].tolist())
        return rows, count

    monkeypatch.setattr(kernels, "live_first", recorded)
    step_check(backend, case, SPEC, needs=needs, memory_budget=budget, **keywords)
    assert found == []
    options = {"memory_budget": budget, "compact_clipped": True}
    step = step_check(backend, case, SPEC, needs=needs, **options, **keywords)
    assert len(found) > 1
    assert sum(len(rows) for rows in found) == 12
    again = step_check(backend, case, SPEC, needs=needs, **options, **keywords)
    for name in NAMES:
        a, b = getattr(step, f"grad_{name}"), getattr(again, f"grad_{name}")
        assert (a is None) == (b is None) and (a is None or bits(a) == bits(b))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_compact_clipped_under_capture(level: str, backend, small_tiles, monkeypatch):
    """Masked rows, NaN here, are computed but enter neither gradient GEMM. No value is read."""
    case = case_of(torch.bfloat16)
    keywords = keywords_of(case)
    spec = Objective(level=level, entropy_coef=0.02)
    want = step_check(backend, case, spec, **keywords)
    entered = []
    add = device_head.DeviceHead.add_live
    monkeypatch.setattr(device_head.DeviceHead, "add_live", lambda *given: entered.append(add(*given)))
    monkeypatch.setattr(device_head, "capturing", lambda x: True)
    monkeypatch.setattr(torch.Tensor, "tolist", None)
    bad = case._replace(hidden=case.hidden.clone())
    bad.hidden[4] = float("nan")
    given = {k: backend.put(v) for k, v in keywords.items()}
    got = tokfuse.policy_step(**leaves(backend, bad), objective=spec, compact_clipped=True, **given)
    monkeypatch.undo()
    for name in NAMES:
        a, b = getattr(got, f"grad_{name}").float(), getattr(want, f"grad_{name}").float()
        compare(a, b, atol=5e-3 * float(b.abs().max()), what=name)
    assert entered and not got.grad_hidden[4].any()


def test_compact_clipped_takes_a_transposed_hidden(backend, small_tiles):
    case = case_of(torch.float32)
    turned = case._replace(hidden=case.hidden.t().contiguous().t())
    step_check(backend, turned, SPEC, compact_clipped=True, **keywords_of(case))


def test_compact_clipped_is_refused_where_it_cannot_be_honoured(backend, small_tiles, monkeypatch):
    case = case_of(torch.float32)
    keywords = {k: backend.put(v) for k, v in keywords_of(case).items()}
    with pytest.raises(ValueError, match="compact_clipped must be False with logits="):
        tokfuse.policy_step(
            logits=backend.put(torch.zeros(TOKENS, VOCAB)), objective=SPEC, compact_clipped=True, **keywords
        )
    monkeypatch.setattr(device_head.triton_backend, "why_unusable", lambda: "no CUDA device")
    want = "compact_clipped must be False if Triton kernels cannot run; got no CUDA device"
    with pytest.raises(ValueError, match=want):
        tokfuse.policy_step(**leaves(backend, case), objective=SPEC, compact_clipped=True, **keywords)


# (rows, live ones, hidden size, vocabulary); tiles are 16 rows x 64 columns x 16 of hidden
SHAPES = [
    (24, (), 20, 300),
    (24, (5,), 20, 300),
    (24, range(24), 16, 256),
    (24, range(0, 24, 2), 20, 300),
    (23, (0, 22), 17, 301),
    (8, range(8), 1, 1),
    (9, range(1, 9), 33, 65),
    (1, (0,), 16, 64),
]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize(("rows", "live", "size", "vocab"), SHAPES)
def test_head_gradient_over_live_rows(rows, live, size, vocab, dtype, backend, monkeypatch):
    """Compared with float64 over the live rows. The other rows contain NaN and must not be read."""
    kernels = importlib.import_module("tokfuse.triton_kernels.head_gradient")
    tile = launch.LaunchConfig(block_t=16, block_v=64, block_h=16, num_warps=1)
    for name in ("head_grad_hidden", "head_grad_weight"):
        monkeypatch.setitem(launch.DEFAULTS, name, {80: tile})
        monkeypatch.setitem(launch.DEFAULTS, f"{name}_f32", {80: tile})
    gen = torch.Generator().manual_seed(rows + vocab)
    keep = torch.zeros(rows, dtype=torch.bool)
    keep[list(live)] = True
    wide = torch.full((rows, vocab + 3), float("nan"), dtype=dtype)
    dz = wide[:, :vocab]
    dz.copy_(torch.randn(rows, vocab, generator=gen))
    hidden = torch.randn(rows, size, generator=gen).to(dtype)
    weight = torch.randn(vocab, size, generator=gen).to(dtype)
    z, h, w = (x.double() for x in (dz[keep], hidden[keep], weight))
    wide[~keep] = hidden[~keep] = float("nan")
    token = torch.randperm(rows + 4, generator=gen)[:rows]

    grads, sums = torch.full((rows + 4, size), 7.0, dtype=dtype), torch.full((vocab, size), 3.0)
    put = backend.put
    order, count = kernels.live_first(put(keep))
    assert order[: int(count)].tolist() == list(live) and sorted(order.tolist()) == list(range(rows))
    grads, sums = put(grads), put(sums)
    kernels.grad_hidden(put(wide)[:, :vocab], put(weight), order, count, put(token), grads)
    kernels.grad_weight(put(wide)[:, :vocab], put(hidden), order, count, sums, False)
    want, sizes = z @ w, 3e-7 * (z.abs() @ w.abs())
    compare(grads[token[keep]], want, atol=sizes + half_ulp(want, dtype), what="hidden")
    untouched = torch.ones(rows + 4, dtype=torch.bool)
    untouched[token[keep]] = False
    assert bool((grads.cpu()[untouched] == 7.0).all())
    want, sizes = z.t() @ h, 3e-7 * (z.abs().t() @ h.abs())
    compare(sums, want, atol=sizes, what="weight")
    kernels.grad_weight(put(wide)[:, :vocab], put(hidden), order, count, sums, True)
    compare(sums, 2 * want, atol=3 * sizes, what="weight, twice")


def test_row_classes(backend):
    """Which rows enter which GEMM: the order of the classes, and the rule for the first one."""
    case = case_of(torch.float32)
    problem = HeadProblem("linear_token_stats", *(backend.put(x) for x in case), None, 1)
    needed = torch.tensor([1, 0, 1, 1, 1, 0, 1, 1, 1]).bool()
    gradient = torch.tensor([0, 1, 1, 0, 1, 0, 0, 0, 1]).bool()
    rows = device_head.classify(problem, backend.put(needed), backend.put(gradient))
    assert rows.order.tolist() == [2, 4, 8, 0, 3, 6, 7, 1, 5]
    assert (rows.gradient, rows.forward, rows.keep) == (3, 7, None)
    everything = device_head.classify(problem, None, None)
    assert (everything.gradient, everything.forward) == (TOKENS, TOKENS)


@pytest.mark.parametrize(
    ("objective", "given", "expected"),
    [
        (SPEC, {}, [True, False, True]),
        (SPEC, {"token_weight": [1.0, 1.0, 0.0]}, [True, False, False]),
        (Objective(shape=Quadratic(penalty=0.1)), {}, None),
        (Objective(kl=KL(coef=0.1)), {}, None),
        (Objective(kl=KL(coef=0.1)), {"kl_weight": [0.0, 1.0, 0.0]}, [True, True, True]),
        (Objective(kl=KL(coef=0.0)), {}, [True, False, True]),
        (Objective(entropy_coef=0.1), {}, None),
        (Objective(entropy_coef=0.1), {"entropy_weight": [0.0, 0.0, 1.0]}, [True, False, True]),
    ],
)
def test_what_may_carry_gradient(objective: Objective, given, expected):
    module = importlib.import_module("tokfuse.triton_kernels.objective")
    vectors = {name: torch.tensor(value) for name, value in given.items()}
    x = module.TokenPointers(*[None] * 11)._replace(advantage=torch.tensor([1.0, 0.0, -1.0]))
    found = policy_inputs.may_carry_gradient(x._replace(**vectors), objective)
    assert (None if found is None else found.tolist()) == expected


def test_gradient_of_float32_logits_in_16_bits(backend, small_tiles):
    """As on a GPU with a 16-bit head: the row kernel rounds the gradient once."""
    module = importlib.import_module("tokfuse.triton_kernels.token_stats")
    gen = torch.Generator().manual_seed(1)
    buffer = torch.randn(3, 304, generator=gen)
    logits, target = backend.put(buffer)[:, :VOCAB], backend.put(torch.tensor([0, 7, VOCAB - 1]))
    ga, gh = (backend.put(torch.tensor(x)) for x in ([1.0, 0.0, -2.0], [0.3, 0.0, 0.0]))
    options = {"temperature": 1.3, "softcap": None, "logit_scale": 1.0, "mask": None}
    stats = module.token_stats_fwd(logits, target, **options)
    arguments = (logits, target, stats[5], stats[6], *stats[:2], ga, gh)
    want = module.token_stats_bwd(*arguments, **options)
    for dtype in HALF:
        wide = torch.full((3, 304), 9.0, dtype=dtype, device=backend.device)
        module.token_stats_bwd(*arguments, out=wide[:, :VOCAB], **options)
        assert bits(wide[:, :VOCAB]) == bits(want.to(dtype))
        assert bool((wide[:, VOCAB:] == 9.0).all())


def test_influence_of_a_step(backend, small_tiles):
    case = case_of(torch.float32)
    keywords = {k: backend.put(v) for k, v in keywords_of(case).items()}
    tensors = leaves(backend, case)
    spec = InfluenceSpec(rank=8)
    got = tokfuse.policy_step(**tensors, objective=SPEC, influence=spec, **keywords).influence
    with tokfuse.backend("reference"):
        want = tokfuse.policy_step(**tensors, objective=SPEC, influence=spec, **keywords).influence
    for name in ("token_norms", "head_norms", "hidden_norms", "sketches"):
        expected = getattr(want, name)
        compare(getattr(got, name), expected, atol=1e-5 * float(expected.abs().max()), what=name)


def test_nothing_is_written_and_two_runs_agree(backend, small_tiles):
    case = case_of(torch.bfloat16)
    given = leaves(backend, case) | {k: backend.put(v) for k, v in keywords_of(case).items()}
    runs = [assert_untouched(lambda: tokfuse.policy_step(objective=SPEC, **given), given) for _ in range(2)]
    for name in NAMES:
        assert bits(getattr(runs[0], f"grad_{name}")) == bits(getattr(runs[1], f"grad_{name}"))


def test_no_tokens(backend):
    case = case_of(torch.bfloat16)
    case = case._replace(hidden=case.hidden[:0], target=case.target[:0])
    given, target = leaves(backend, case, "hw"), backend.put(case.target)
    stats = tokfuse.linear_token_stats(**given, target=target)
    assert stats.logp.shape == (0,)
    step = tokfuse.policy_step(
        **given,
        target=target,
        old_logp=stats.logp.detach(),
        advantage=stats.logp.detach(),
        objective=SPEC,
        normalizer="batch",
    )
    assert float(step.loss.detach()) == 0.0 and not step.grad_weight.any()
