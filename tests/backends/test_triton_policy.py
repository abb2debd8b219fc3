"""Test the Triton objective, policy_loss and policy_step kernels in the interpreter against float64.

Every shape runs with every KL estimator at token level, and with every sequence level. The bounds are those of
test_policy_loss_grid. The fused step uses tiles of one warp, so that a short row has edges and several whole
tiles. Its statistics and gradient have the bounds of token_stats.
"""

import importlib

import pytest
import torch
from harness import FLOAT_DTYPES, backends, bits, compare, half_ulp
from logit_cases import FORWARD_ATOL, INF
from policy_cases import SHAPES

import tokfuse
from tokfuse import KL, Objective, PPOClip
from tokfuse.runtime.backends import policy_runs
from tokfuse.runtime.policy.metrics import SLOTS
from tokfuse.runtime.policy.objective import KL_ESTIMATORS, LEVELS

launch = pytest.importorskip("tokfuse.triton_kernels.launch")
for _kernel in ("policy_step", "token_stats"):  # the imports declare launch records, which tests replace
    importlib.import_module(f"tokfuse.triton_kernels.{_kernel}")


@pytest.fixture(params=[p for p in backends("policy_loss") if p.id == "triton"])
def backend(request):
    with request.param.forced():
        yield request.param


# --------------------------------------------------------------------------------------- objective

LENGTHS = (40, 0, 1, 59)


def tokens_of(signal: bool):
    """Return 100 tokens with log-ratios near every clip, beyond the clamps and 0; every input is given."""
    tokens = sum(LENGTHS)
    gen = torch.Generator().manual_seed(5)

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(tokens, generator=gen) * (high - low) + low

    old = uniform(-3.0, -0.2)
    width = torch.tensor([0.1, 0.5, 2.0, 9.0]).repeat(tokens // 4)
    log_ratio = uniform(-1.0, 1.0) * width
    log_ratio[:3] = torch.tensor([0.0, 25.0, -26.0])
    logp = old + log_ratio
    inputs = {
        "old_logp": old,
        "advantage": uniform(-2.0, 2.0),
        "mask": torch.arange(tokens) % 9 != 4,
        "ref_logp": logp + uniform(-1.5, 1.5),
        "token_weight": uniform(0.2, 2.0),
        "kl_weight": uniform(0.0, 1.0),
        "entropy_weight": uniform(0.0, 1.0),
        "cu_seqlens": torch.tensor([0, *LENGTHS]).cumsum(0).int(),
        "anchor_logp": logp + uniform(-1.5, 1.5),
        "anchor_weight": uniform(0.0, 1.0),
    }
    inputs["advantage"][7] = 0.0
    inputs["ref_logp"][11:13] = logp[11:13] + torch.tensor([30.0, 0.0])
    if signal:
        inputs["signal"] = uniform(0.1, 0.9)
    return logp, uniform(0.1, 4.0), inputs


def evaluate(backend, objective, dtype, logp, entropy, inputs, **options):
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    x, h = (backend.put(v.to(dtype)).requires_grad_() for v in (logp, entropy))
    out = tokfuse.policy_loss(
        x, entropy=h, objective=objective, **{k: backend.put(v) for k, v in inputs.items()}, **options
    )
    out.loss.backward()
    return out, x.grad, h.grad


def check(backend, objective, signal, **options):
    data = tokens_of(signal)
    if objective.kl is None:
        del data[2]["kl_weight"]
    if objective.anchor is None:
        del data[2]["anchor_logp"], data[2]["anchor_weight"]
    with tokfuse.backend("reference"):
        want = evaluate(backend, objective, torch.float64, *data, **options)
    got = evaluate(backend, objective, torch.float32, *data, **options)
    for i, what in ((1, "d logp"), (2, "d entropy")):
        scale = max(1.0, float(want[i].abs().max()))
        compare(got[i], want[i], atol=1e-6 * scale, rtol=1e-5, what=what)
    largest = max(1.0, float(want[0].token_loss.abs().max()))
    compare(got[0].token_loss, want[0].token_loss, atol=1e-6 * largest, rtol=1e-5)
    atol = torch.zeros(len(SLOTS))
    atol[SLOTS.index("loss")] = 1e-5 * max(1.0, float(want[0].token_loss.abs().sum()))
    compare(got[0].metrics.sums, want[0].metrics.sums, atol=atol, rtol=3e-6, what="metric sums")


@pytest.mark.parametrize("shape", SHAPES)
def test_token_objectives_with_every_estimator(shape: str, backend):
    for estimator in (None, *KL_ESTIMATORS):
        kl = None if estimator is None else KL(estimator=estimator, coef=0.07, clamp=12.0)
        objective = Objective(shape=SHAPES[shape], kl=kl, entropy_coef=0.013, log_ratio_clamp=15.0)
        check(backend, objective, SHAPES[shape].needs_signal)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_an_anchor_beside_a_kl(estimator: str, level: str, backend):
    anchor = KL(estimator=estimator, coef=-0.05, clamp=0.9)
    for kl in (KL(coef=0.07, clamp=12.0), None):
        check(backend, Objective(level=level, kl=kl, anchor=anchor, entropy_coef=0.013, log_ratio_clamp=15.0), False)


@pytest.mark.parametrize("level", [level for level in LEVELS if level != "token"])
@pytest.mark.parametrize("shape", SHAPES)
def test_sequence_objectives(shape: str, level: str, backend):
    turn = list(SHAPES).index(shape) + 3 * list(LEVELS).index(level)
    objective = Objective(
        shape=SHAPES[shape],
        level=level,
        kl=KL(estimator=list(KL_ESTIMATORS)[turn % 7], coef=0.07),
        aggregation=("seq_mean_token_mean", "seq_mean_token_sum", "token_sum")[turn % 3],
        entropy_coef=0.013,
        log_ratio_clamp=15.0,
    )
    check(backend, objective, SHAPES[shape].needs_signal)


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_batch_as_its_own_normalizer(level: str, aggregation: str, backend):
    objective = Objective(level=level, aggregation=aggregation, kl=KL(coef=0.07), entropy_coef=0.1)
    check(backend, objective, False, normalizer="batch")


def test_advantage_per_sequence(backend):
    """Bitwise equal to the same advantages passed per token."""
    logp, entropy, inputs = tokens_of(False)
    per_seq = torch.tensor([1.5, 9.0, -0.75, -1.25])
    for name in ("kl_weight", "entropy_weight", "anchor_logp", "anchor_weight"):
        del inputs[name]
    for level in ("token", "sequence"):
        objective = Objective(level=level)
        inputs["advantage"] = per_seq.repeat_interleave(torch.tensor(LENGTHS))
        want = evaluate(backend, objective, torch.float32, logp, entropy, inputs)
        inputs["advantage"] = per_seq
        got = evaluate(backend, objective, torch.float32, logp, entropy, inputs, advantage_level="sequence")
        assert bits(got[1]) == bits(want[1]) and bits(got[0].loss) == bits(want[0].loss)


def test_partial_sums_of_many_blocks_are_those_of_one(backend, monkeypatch):
    """Sums are added in block order: every slot is equal, and the loss is bitwise repeatable."""
    objective = Objective(shape=PPOClip(dual=3.0), kl=KL(coef=0.07), entropy_coef=0.013)
    data = tokens_of(False)
    del data[2]["anchor_logp"], data[2]["anchor_weight"]
    one = evaluate(backend, objective, torch.float32, *data)[0]
    small = launch.LaunchConfig(block_t=32, num_warps=1)
    monkeypatch.setitem(launch.DEFAULTS, "policy_metrics", {80: small})
    many, again = (evaluate(backend, objective, torch.float32, *data)[0] for _ in range(2))
    compare(many.metrics.sums, one.metrics.sums, rtol=1e-13, what="metric sums")
    assert bits(many.metrics.sums) == bits(again.metrics.sums)


# ------------------------------------------------------------------------------------- policy_step

TOKENS, VOCAB = 7, 1101


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 256 16-bit elements: a row of 1101 has four whole tiles, and edges."""
    one_warp = launch.LaunchConfig(block_v=256, num_warps=1)
    for kernel in ("policy_step", "policy_step_softcap", "token_stats_fwd", "token_stats_bwd"):
        monkeypatch.setitem(launch.DEFAULTS, kernel, {80: one_warp})


def logits_of(dtype: torch.dtype, vocab: int = VOCAB):
    """Return (logits, keywords): clipped, zero-advantage and masked rows, an excluded vocabulary."""
    gen = torch.Generator().manual_seed(2)
    logits = (torch.randn(TOKENS, vocab, generator=gen) * 3).to(dtype)
    target = torch.randint(0, vocab, (TOKENS,), generator=gen)
    logits[1, torch.rand(vocab, generator=gen) < 0.5] = -INF
    logits[1, target[1]] = 2.0
    logp = logits.float().log_softmax(1).gather(1, target[:, None])[:, 0]
    keywords = {
        "target": target,
        "old_logp": logp - torch.tensor([0.1, -0.05, 0.5, 0.0, 0.02, -0.02, 0.03]),
        "advantage": torch.tensor([1.0, -1.5, 2.0, 1.0, 0.0, -0.5, 0.7]),  # row 2 is clipped
        "mask": torch.tensor([1, 1, 1, 0, 1, 1, 1]).bool(),
        "normalizer": 3.0,
    }
    return logits, keywords


def step_of(backend, logits, objective, **keywords):
    """Run policy_step on the device of the backend."""
    given = {k: backend.put(v) for k, v in keywords.items()}
    return tokfuse.policy_step(logits=backend.put(logits), objective=objective, **given)


def step_check(backend, logits, objective, **keywords):
    """Compare loss, statistics and gradient with the float64 reference."""
    exact = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in keywords.items()}
    with tokfuse.backend("reference"):
        want = tokfuse.policy_step(logits=logits.double(), objective=objective, **exact)
    got = step_of(backend, logits, objective, **keywords)
    for name in ("logp", "entropy", "lse", "sum_sq", "top1"):
        compare(getattr(got.stats, name), getattr(want.stats, name), atol=FORWARD_ATOL, what=name)
    compare(got.loss, want.loss, atol=1e-5)
    compare(got.token_loss, want.token_loss, atol=1e-5)
    compare(got.metrics.sums, want.metrics.sums, atol=1e-4, what="metric sums")
    assert want.grad_logits is not None and got.grad_logits is not None
    # The ratio has the float32 rounding of its log-prob: 1e-6 in addition to the 2e-6 of token_stats.
    atol = 4e-6 * want.grad_logits.abs().amax(1, keepdim=True)
    if logits.dtype != torch.float32:
        atol = atol + half_ulp(want.grad_logits, logits.dtype)
    compare(got.grad_logits, want.grad_logits, atol=atol, what="grad_logits")
    return got


SPEC = Objective(shape=PPOClip(low=0.2, high=0.2))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_step_in_every_dtype(dtype: torch.dtype, backend, small_tiles):
    logits, keywords = logits_of(dtype)
    step = step_check(backend, logits, SPEC, **keywords)
    rows = step.grad_logits.abs().amax(1) > 0
    assert rows.tolist() == [True, True, False, False, False, True, True]
    again = step_of(backend, logits, SPEC, **keywords)
    assert bits(again.grad_logits) == bits(step.grad_logits)
    assert bits(again.loss) == bits(step.loss)


@pytest.mark.parametrize("vocab", [1, 255, 1024, 1032])
def test_step_at_the_borders_of_a_tile(vocab: int, backend, small_tiles):
    logits, keywords = logits_of(torch.bfloat16, vocab)
    step_check(backend, logits, Objective(entropy_coef=0.1), **keywords)


def test_step_with_the_shipped_tiles(backend):
    logits, keywords = logits_of(torch.float32)
    step_check(
        backend, logits[:2], SPEC, **{k: v[:2] if isinstance(v, torch.Tensor) else v for k, v in keywords.items()}
    )


@pytest.mark.parametrize(
    "option",
    [
        {"temperature": 0.7},
        {"temperature": torch.linspace(0.5, 1.5, TOKENS)},
        {"softcap": 4.0},
        {"logit_scale": 0.5},
        {"token_weight": torch.linspace(0.0, 2.0, TOKENS)},
        {"normalizer": "batch"},
    ],
    ids=lambda option: "-".join(map(str, option)),
)
def test_step_options(option, backend, small_tiles):
    logits, keywords = logits_of(torch.float32)
    objective = Objective(entropy_coef=0.1)
    plain = step_of(backend, logits, objective, **keywords)
    step = step_check(backend, logits, objective, **keywords | option)
    assert not torch.equal(step.loss, plain.loss)


def test_step_of_a_sequence_level_objective(backend, small_tiles):
    logits, keywords = logits_of(torch.float32)
    objective = Objective(level="sequence", aggregation="seq_mean_token_mean", entropy_coef=0.01)
    step_check(backend, logits, objective, cu_seqlens=torch.tensor([0, 4, 7]).int(), **keywords)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_step_over_the_logits(level: str, backend, small_tiles):
    """In place, in rows of a wider tensor. The masked row contains NaN and is not read."""
    logits, keywords = logits_of(torch.bfloat16, 1104)
    keywords["cu_seqlens"] = torch.tensor([0, 4, 7]).int()
    keywords = {k: backend.put(v) for k, v in keywords.items()}
    objective = Objective(level=level, entropy_coef=0.1)
    want = tokfuse.policy_step(logits=backend.put(logits), objective=objective, **keywords)
    wide = torch.full((TOKENS, 1136), 9.0, dtype=torch.bfloat16, device=backend.device)
    view = wide[:, 16:-16]
    view.copy_(logits)
    view[3] = float("nan")
    step = tokfuse.policy_step_(view, objective=objective, **keywords)
    assert bits(view) == bits(want.grad_logits) == bits(step.grad_logits)
    assert bits(step.loss) == bits(want.loss)
    view.fill_(9.0)
    assert bool((wide == 9.0).all())


def test_rows_without_a_distribution_and_poisoned_rows(backend, small_tiles):
    logits, keywords = logits_of(torch.float32)
    clean = step_of(backend, logits, Objective(), **keywords)
    logits[0], logits[5, 3] = -INF, float("nan")
    step = step_of(backend, logits, Objective(), **keywords)
    assert float(step.stats.logp[0]) == -INF and not step.grad_logits[0].any()
    assert bool(step.grad_logits[5].isnan().all()) and bool(step.stats.logp[5].isnan())
    for row in (1, 2, 6):
        assert bits(step.grad_logits[row]) == bits(clean.grad_logits[row])


def test_a_bad_target(backend, small_tiles, monkeypatch):
    """Raises an error before anything is written if values may be read; otherwise its row is NaN."""
    logits, keywords = logits_of(torch.float32)
    before = logits.clone()
    with monkeypatch.context() as unread:
        unread.setattr(policy_runs, "may_read", lambda x: False)
        wrong = keywords | {"target": keywords["target"].clone()}
        wrong["target"][1] = VOCAB
        step = step_of(backend, logits, SPEC, **wrong)
        assert bool(step.grad_logits[1].isnan().all()) and bool(step.stats.logp[1].isnan())
        assert bool(step.grad_logits[5].isfinite().all())
    if backend.device != "cpu":
        return
    keywords["target"] = torch.full((TOKENS,), VOCAB)
    with pytest.raises(ValueError, match=rf"target must be in \[0, {VOCAB}\) in every row where"):
        tokfuse.policy_step_(logits, objective=SPEC, **keywords)
    assert torch.equal(logits, before)


def test_no_tokens(backend):
    step = tokfuse.policy_step(
        logits=backend.put(torch.zeros(0, 9)),
        objective=SPEC,
        normalizer="batch",
        target=backend.put(torch.zeros(0, dtype=torch.int64)),
        old_logp=backend.put(torch.zeros(0)),
        advantage=backend.put(torch.zeros(0)),
    )
    assert float(step.loss) == 0.0 and float(step.count) == 0.0
    assert step.grad_logits.shape == (0, 9)


# ---------------------------------------------------------------------------------- torch.compile


def test_compiled_whole_it_is_the_eager_step(backend, small_tiles):
    """One graph without a break. The custom op runs the same kernels."""
    logits, keywords = logits_of(torch.float32)
    keywords = {k: backend.put(v) for k, v in keywords.items()}

    def step(z):
        out = tokfuse.policy_step(logits=z, objective=SPEC, **keywords)
        return out.loss, out.stats.entropy

    def loss(x):
        inputs = {k: v for k, v in keywords.items() if k != "target"}
        out = tokfuse.policy_loss(x, objective=SPEC, **inputs)
        return out.loss, out.metrics.sums

    for function, argument in ((step, logits), (loss, keywords["old_logp"] + 0.05)):
        results = []
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for run in (function, compiled):
            x = backend.put(argument).clone().requires_grad_()
            value, other = run(x)
            value.backward()
            results.append([bits(value), bits(other), bits(x.grad)])
        assert results[0] == results[1]
