"""Test group_advantage against per-group formulas in Python floats, on every backend.

Every backend accumulates in float64 and rounds once. The bound is one float32 rounding plus the last bit of
a float64 sum: 2e-7 relative.
"""

import math
import statistics
from collections.abc import Iterator

import hypothesis
import pytest
import torch
from harness import backends, on_its_device
from hypothesis import strategies as st

from tokfuse.runtime.core.codes import BASELINES, SCALES
from tokfuse.runtime.ops.group_advantage import GROUPLESS, KINDS, group_advantage

group_advantage = on_its_device(group_advantage)
TOLERANCE = {"rtol": 2e-7, "atol": 1e-12}


@pytest.fixture(params=backends("group_advantage"), autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with request.param.forced():
        yield request.param.name


def centre_of(i, members, x, baseline, lengths):
    """Return the baseline of member i in a group of two or more."""
    values = [x[j] for j in members]
    if baseline == "mean":
        return math.fsum(values) / len(values)
    if baseline == "leave_one_out":
        return math.fsum(x[j] for j in members if j != i) / (len(members) - 1)
    if baseline == "length_weighted":
        total = sum(lengths[j] for j in members)
        if total == 0:
            return math.fsum(values) / len(values)
        return math.fsum(lengths[j] * x[j] for j in members) / total
    if baseline == "median":
        return statistics.median(values)
    assert baseline == "second_best"
    ranked = sorted(values)
    return ranked[-2] if x[i] == ranked[-1] else x[i]


def deviation(values, ddof):
    if len(values) == 1:
        return 1.0
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - ddof))


def expected(x, ids, baseline, scale, *, ddof=1, eps=None, singleton="reward", lengths=None):
    eps = {"mean": 1e-8, "none": 0.0}.get(scale, 1e-6) if eps is None else eps
    out = []
    for i in range(len(x)):
        members = [j for j in range(len(x)) if ids[j] == ids[i]]
        values = [x[j] for j in members]
        alone = len(members) == 1
        if len(members) > 1 and min(values) == max(values) or alone and singleton == "zero":
            out.append(0.0)
            continue
        gain = x[i] if alone else x[i] - centre_of(i, members, x, baseline, lengths)
        divisor = {
            "none": lambda v: 1.0,
            "std": lambda v: deviation(v, ddof) + eps,
            "batch_std": lambda v: deviation(x, ddof) + eps,
            "mean": lambda v: (1.0 if len(v) == 1 else math.fsum(v) / len(v)) + eps,
        }[scale](values)
        out.append(gain / divisor)
    return torch.tensor(out, dtype=torch.float64)


def check(actual, wanted):
    assert actual.dtype == torch.float32 and not actual.requires_grad
    torch.testing.assert_close(actual.double(), wanted, **TOLERANCE)


def batch(num_seqs=40, groups=9, seed=0):
    gen = torch.Generator().manual_seed(seed)
    reward = torch.randn(num_seqs, generator=gen)
    ids = torch.randint(-4, groups - 4, (num_seqs,), generator=gen) * 1_000_003
    lengths = torch.randint(0, 50, (num_seqs,), generator=gen)
    return reward, ids, lengths


def options(baseline, lengths):
    return {"lengths": lengths} if baseline == "length_weighted" else {}


GROUPED = [name for name in BASELINES if name not in GROUPLESS]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", GROUPED)
def test_every_baseline_and_scale(baseline, scale):
    reward, ids, lengths = batch()
    kwargs = options(baseline, lengths)
    out = group_advantage(reward, ids, baseline=baseline, scale=scale, **kwargs)
    want = expected(reward.tolist(), ids.tolist(), baseline, scale, lengths=lengths.tolist())
    check(out, want)


rewards = st.one_of(
    st.sampled_from([0.0, 1.0, 0.1, 1.1, -1.0, 2.0]), st.floats(-1e4, 1e4, width=32, allow_subnormal=False)
)
group_numbers = st.sampled_from([0, 1, 2, 7, -1, -(2**63), 2**63 - 1])


@hypothesis.given(st.data())
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_against_formulas_on_any_groups(data):
    rows = data.draw(st.lists(st.tuples(rewards, group_numbers, st.integers(0, 9)), max_size=24))
    x = [torch.tensor(r, dtype=torch.float32).item() for r, _, _ in rows]
    ids, lengths = [g for _, g, _ in rows], [n for _, _, n in rows]
    baseline, scale = data.draw(st.sampled_from(GROUPED)), data.draw(st.sampled_from(SCALES[:3]))
    std = data.draw(st.sampled_from(["sample", "population"]))
    kwargs = options(baseline, torch.tensor(lengths, dtype=torch.int64))
    if scale != "none":
        kwargs["std"] = std
    out = group_advantage(
        torch.tensor(x, dtype=torch.float32),
        torch.tensor(ids, dtype=torch.int64),
        baseline=baseline,
        scale=scale,
        **kwargs,
    )
    ddof = 1 if std == "sample" else 0
    want = expected(x, ids, baseline, scale, ddof=ddof, lengths=lengths)
    # Differences of nearly equal rewards lose digits, so the bound is the rounding of the input.
    slack = 1e-12 * max((abs(v) for v in x), default=0.0) / (1e-6 if scale != "none" else 1.0)
    torch.testing.assert_close(out.double(), want, rtol=3e-7, atol=1e-9 + slack)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_each_kind_is_its_preset(kind):
    reward, ids, lengths = batch()
    baseline, scale = KINDS[kind]
    kwargs = options(baseline, lengths)
    if baseline == "greedy":
        kwargs["greedy_reward"] = reward.roll(1)
    by_kind = group_advantage(reward, ids, kind, **kwargs)
    by_parts = group_advantage(reward, ids, baseline=baseline, scale=scale, **kwargs)
    assert torch.equal(by_kind, by_parts)


def test_published_numbers():
    reward = torch.tensor([1.0, 0.0, 0.0, 1.0, 2.0, 5.0])
    ids = torch.tensor([0, 0, 0, 1, 1, 1])

    def close(kind, wanted, **kwargs):
        out = group_advantage(reward, ids, kind, **kwargs)
        torch.testing.assert_close(out, torch.tensor(wanted), rtol=1e-5, atol=1e-6)

    close("dr_grpo", [2 / 3, -1 / 3, -1 / 3, -5 / 3, -2 / 3, 7 / 3])
    close("rloo", [1.0, -0.5, -0.5, -2.5, -1.0, 3.5])
    close("grpo", [1.1547, -0.57735, -0.57735, -0.80064, -0.32026, 1.12090])
    close("pass_at_k", [1.73205, 0.0, 0.0, 0.0, 0.0, 3 / 2.081666])
    close("gbpo_target", [1.73205, 0.0, 0.0, -1 / 2.081666, 0.0, 3 / 2.081666])
    close("maxrl", [2.0, -1.0, -1.0, -0.625, -0.25, 0.875])
    close("opo", [0.5, -0.5, -0.5, -2.0, -1.0, 2.0], lengths=torch.tensor([2, 1, 1, 2, 0, 2]))
    close("remax", [0.5, -0.5, 0.0, 0.5, 1.5, 5.0], greedy_reward=torch.tensor([0.5, 0.5, 0.0, 0.5, 0.5, 0.0]))
    close("reinforce", reward.tolist())


def test_median_of_an_even_group_averages_its_middle():
    reward, ids = torch.tensor([4.0, 1.0, 2.0, 9.0]), torch.zeros(4, dtype=torch.int64)
    out = group_advantage(reward, ids, baseline="median", scale="none")
    assert out.tolist() == [1.0, -2.0, -1.0, 6.0]


@pytest.mark.parametrize("size", [33, 100])
def test_median_of_a_large_group(size):
    reward = torch.randn(size, generator=torch.Generator().manual_seed(1))
    reward[: size // 3] = reward[0]  # ties
    ids = torch.zeros(size, dtype=torch.int64)
    out = group_advantage(reward, ids, baseline="median", scale="none")
    want = reward.double() - torch.quantile(reward.double(), 0.5)
    torch.testing.assert_close(out.double(), want, **TOLERANCE)


@pytest.mark.parametrize("value", [0.1, 1.1, 0.0, -3.3, 1e30, 7e-30])
@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"remax", "reinforce"}))
def test_equal_rewards_give_exactly_zero(kind, value):
    reward = torch.full((7,), value)
    kwargs = {"lengths": torch.tensor([3, 1, 4, 1, 5, 9, 2])} if kind == "opo" else {}
    out = group_advantage(reward, torch.zeros(7, dtype=torch.int64), kind, **kwargs)
    assert out.tolist() == [0.0] * 7


def test_equal_rewards_divided_by_a_batch_deviation_of_zero():
    reward, ids = torch.full((6,), 1.1), torch.tensor([0, 0, 0, 1, 1, 1])
    assert group_advantage(reward, ids, scale="batch_std", eps=0.0).tolist() == [0.0] * 6


def test_singleton_keeps_its_reward_or_gives_zero():
    reward, ids = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([5, 8, 8])
    keeps = {"grpo": 3.0 / (1 + 1e-6), "dr_grpo": 3.0, "rloo": 3.0, "maxrl": 3.0}
    for kind, value in keeps.items():
        assert group_advantage(reward, ids, kind)[0].item() == pytest.approx(value, rel=1e-7)
        same = group_advantage(reward, ids, kind, singleton="reward")
        assert torch.equal(same, group_advantage(reward, ids, kind))
        assert group_advantage(reward, ids, kind, singleton="zero")[0].item() == 0.0
    batch_std = reward.double().std()
    out = group_advantage(reward, ids, scale="batch_std")[0].item()
    assert out == pytest.approx(3.0 / (batch_std.item() + 1e-6), rel=1e-6)


def test_one_reward_in_all():
    one, ids = torch.tensor([2.0]), torch.tensor([4])
    assert group_advantage(one, ids).item() == pytest.approx(2.0, rel=1e-5)
    # A batch of one has deviation 1 by definition.
    assert group_advantage(one, ids, scale="batch_std").item() == pytest.approx(2.0, rel=1e-5)


def test_no_rewards():
    empty = torch.zeros(0)
    for kind in ("grpo", "gbpo_target", "pass_at_k"):
        out = group_advantage(empty, torch.zeros(0, dtype=torch.int64), kind)
        assert out.shape == (0,) and out.dtype == torch.float32
    assert group_advantage(empty, None, "reinforce", scale="batch_std").shape == (0,)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"remax", "reinforce"}))
def test_nan_stays_in_its_group(kind):
    reward = torch.tensor([1.0, float("nan"), 1.0, 5.0, 6.0, float("nan")])
    ids = torch.tensor([0, 0, 0, 1, 1, 2])
    kwargs = {"lengths": torch.ones(6, dtype=torch.int64)} if kind == "opo" else {}
    for extra in ({}, {"singleton": "zero"}):
        out = group_advantage(reward, ids, kind, **kwargs, **extra)
        assert out.isnan().tolist() == [True, True, True, False, False, True]


def test_options_are_honoured():
    reward, ids, lengths = batch()
    base = group_advantage(reward, ids)
    x, g = reward.tolist(), ids.tolist()
    check(group_advantage(reward, ids, std="population"), expected(x, g, "mean", "std", ddof=0))
    check(group_advantage(reward, ids, eps=0.5), expected(x, g, "mean", "std", eps=0.5))
    check(group_advantage(reward, ids, eps=1e-4), expected(x, g, "mean", "std", eps=1e-4))
    changed = [
        group_advantage(reward, ids, std="population"),
        group_advantage(reward, ids, eps=0.5),
        group_advantage(reward, ids, scale="batch_std"),
        group_advantage(reward, ids, scale="batch_std", std="population"),
        group_advantage(reward, ids, baseline="median"),
        group_advantage(reward, ids, baseline="length_weighted", lengths=lengths),
        group_advantage(reward, ids, baseline="length_weighted", lengths=lengths.flip(0)),
        group_advantage(reward, ids, "maxrl"),
        group_advantage(reward, ids, "maxrl", eps=0.5),
        group_advantage(reward, ids, "remax", greedy_reward=reward * 0.5),
    ]
    for i, one in enumerate(changed):
        for other in [base, *changed[:i]]:
            assert not torch.equal(one, other)


def test_population_deviation_of_a_binary_group():
    """The form of NFT on policy: sqrt(p (1 - p)) without eps."""
    reward, ids = torch.tensor([1.0, 0, 0, 0]), torch.zeros(4, dtype=torch.int64)
    out = group_advantage(reward, ids, std="population", eps=0.0)
    torch.testing.assert_close(out[0].item(), 0.75 / math.sqrt(0.25 * 0.75), rtol=1e-6, atol=0)


def test_order_and_names_of_groups_do_not_matter():
    reward, ids, _ = batch()
    base = group_advantage(reward, ids)
    perm = torch.randperm(reward.shape[0], generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(group_advantage(reward[perm], ids[perm]), base[perm], **TOLERANCE)
    renamed = ids.unique(return_inverse=True)[1]
    assert torch.equal(group_advantage(reward, renamed), base)
    assert torch.equal(group_advantage(reward, renamed.to(torch.int32)), base)


def test_advantages_of_a_group_sum_to_zero_and_shift_is_ignored():
    reward, ids = torch.randn(64).round(decimals=2), torch.arange(64) // 8
    for kind in ("grpo", "dr_grpo", "rloo"):
        out = group_advantage(reward, ids, kind)
        assert out.view(8, 8).sum(1).abs().max() < 1e-5
        torch.testing.assert_close(group_advantage(reward + 16.0, ids, kind), out, rtol=0, atol=2e-5)


def test_leave_one_out_is_the_scaled_centring():
    reward, ids = torch.randn(60), torch.arange(60) % 5
    loo, centred = group_advantage(reward, ids, "rloo"), group_advantage(reward, ids, "dr_grpo")
    torch.testing.assert_close(loo, centred * 12 / 11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype, backend):
    if dtype == torch.float64 and backend in ("cuda", "cpu"):
        with pytest.raises(RuntimeError, match=f"{backend}: takes float32, the input is float64"):
            group_advantage(torch.ones(2, dtype=dtype), torch.zeros(2, dtype=torch.int64))
        return
    reward, ids, _ = batch()
    out = group_advantage(reward.to(dtype), ids)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    want = expected(reward.to(dtype).tolist(), ids.tolist(), "mean", "std")
    torch.testing.assert_close(out.double(), want, **TOLERANCE)


def test_strided_and_differentiable_rewards_give_a_constant():
    reward, ids, _ = batch()
    wide = torch.stack([reward, reward * 7], dim=1).requires_grad_()
    out = group_advantage(wide[:, 0], torch.stack([ids, ids + 1], dim=1)[:, 0])
    assert torch.equal(out, group_advantage(reward, ids)) and not out.requires_grad


def test_the_result_is_a_new_tensor(backend):
    reward = torch.ones(3, dtype=torch.float64 if backend == "reference" else torch.float32)
    group_advantage(reward, None, "reinforce").mul_(5)
    assert reward.tolist() == [1.0] * 3


def test_bits_do_not_depend_on_the_thread_count(backend):
    gen = torch.Generator().manual_seed(5)
    size, groups = (300, 9) if backend == "triton" else (20_000, 900)
    reward = torch.randn(size, generator=gen)
    ids = torch.randint(0, groups, (size,), generator=gen)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(group_advantage(reward, ids, scale="batch_std"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


X, IDS = torch.ones(3), torch.zeros(3, dtype=torch.int64)
REFUSALS = [
    ((X, IDS, "grop"), {}, "kind must be one of grpo, dr_grpo, rloo"),
    ((X, IDS), {"baseline": "min"}, "baseline must be one of mean, leave_one_out"),
    ((X, IDS), {"scale": "max"}, "scale must be one of none, std, batch_std, mean"),
    ((X, IDS), {"std": "unbiased"}, "std must be one of sample, population"),
    ((X, IDS), {"singleton": "one"}, "singleton must be one of reward, zero"),
    ((X, IDS), {"eps": -1.0}, r"eps must be a finite number in \[0, inf\)"),
    ((X, IDS), {"eps": float("nan")}, "eps must be a finite number"),
    ((X, None), {}, "group_ids must be given with baseline 'mean'"),
    ((X, IDS[:2]), {}, r"group_ids must be of shape \(3,\) to match reward; got shape \(2,\)"),
    ((X, IDS.float()), {}, "group_ids must be of dtype int32 or int64; got float32"),
    ((IDS, IDS), {}, "reward must be of dtype bfloat16 or .*; got int64"),
    ((X[:, None], IDS), {}, r"reward must be a 1-D tensor; got shape \(3, 1\)"),
    ((X, IDS, "dr_grpo"), {"std": "sample"}, "std must be left out with scale 'none'"),
    ((X, IDS, "dr_grpo"), {"eps": 1e-6}, "eps must be left out with scale 'none'"),
    ((X, IDS, "maxrl"), {"std": "sample"}, "std must be left out with scale 'mean'"),
    ((X, IDS), {"lengths": IDS}, "lengths must be left out with baseline 'mean'; got a tensor"),
    ((X, IDS), {"greedy_reward": X}, "greedy_reward must be left out with baseline 'mean'"),
    ((X, IDS, "opo"), {}, "lengths must be given with baseline 'length_weighted'"),
    ((X, IDS, "opo"), {"lengths": X}, "lengths must be of dtype int32 or int64"),
    ((X, IDS, "remax"), {}, "greedy_reward must be given with baseline 'greedy'"),
    ((X, IDS, "remax"), {"greedy_reward": X[:1]}, r"greedy_reward must be of shape \(3,\)"),
    ((X, IDS, "reinforce"), {"singleton": "zero"}, "singleton must be left out with baseline"),
    ((X, IDS, "reinforce"), {"scale": "std"}, "scale must be 'none' or 'batch_std' with baseline"),
]


@pytest.mark.parametrize(("args", "kwargs", "message"), REFUSALS, ids=range(len(REFUSALS)))
def test_refusals(args, kwargs, message):
    with pytest.raises(ValueError, match=f"^group_advantage: {message}"):
        group_advantage(*args, **kwargs)


def test_wrong_types():
    with pytest.raises(TypeError, match="reward must be a torch.Tensor; got list"):
        group_advantage([1.0], IDS)
    with pytest.raises(TypeError, match="eps must be a number; got '1e-6'"):
        group_advantage(X, IDS, eps="1e-6")
