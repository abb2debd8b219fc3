"""Test the native whole-call path of the eager mode: same results and same errors as the general path."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from eager_cases import OBJECTIVES, TARGET, TOKENS, Call, Spy, batch, flat, logits_of
from hypothesis import given
from hypothesis import strategies as st

import tokfuse
from tokfuse.runtime.core import forced, native
from tokfuse.runtime.ops import policy_loss as losses
from tokfuse.runtime.ops import policy_step as steps
from tokfuse.runtime.ops import token_stats as stats
from tokfuse.runtime.ops import token_stats_at as at

pytestmark = pytest.mark.skipif(
    native.eager() is None, reason="no native module, or a torch without the DLPack exchange API"
)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spy]:
    spy = Spy(native.eager())
    for op in (stats, at, losses, steps):
        monkeypatch.setattr(op, "eager_cpu", lambda main: spy)
    yield spy


def both_ways(call: Call, spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run `call` on the eager path, then on the general path: the results are bitwise equal."""
    fast = call()
    assert len(spy.answered) == 1, "the native function did not answer a plain call"
    for op in (stats, at, losses, steps):
        monkeypatch.setattr(op, "eager_cpu", lambda main: None)
    slow = call()
    for a, b in zip(flat(fast), flat(slow), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(a, b), (a, b)
    if isinstance(fast, tokfuse.PolicyLoss | tokfuse.PolicyStep):
        assert fast.metrics.mean() == slow.metrics.mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"temperature": torch.linspace(0.5, 2.0, TOKENS)},
        {"softcap": 5.0, "logit_scale": 0.5},
        {"mask": batch()["mask"]},
    ],
    ids=["plain", "temperature", "per_token", "softcap", "mask"],
)
def test_token_stats(options: dict[str, Any], dtype: torch.dtype, spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    z = logits_of(dtype)
    both_ways(lambda: tokfuse.token_stats(z, TARGET, **options), spy, monkeypatch)


def test_row_stride(spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    z = logits_of()[::2, 3:]
    both_ways(lambda: tokfuse.token_stats(z, TARGET[::2].clone() // 4), spy, monkeypatch)


def test_token_stats_gradient(spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    def call() -> torch.Tensor:
        z = logits_of().requires_grad_()
        out = tokfuse.token_stats(z, TARGET)
        assert out.lse.requires_grad and not out.sum_sq.requires_grad
        (grad,) = torch.autograd.grad((out.logp * 2 - out.entropy + 0.3 * out.lse).sum(), z)
        return grad

    both_ways(call, spy, monkeypatch)


class Subclass(torch.Tensor):
    pass


# A target, a duplicate and a padding id among them.
IDS = torch.tensor([3, 0, 32, -1, 4, 4, 1, 2, 8, -1, -1, -1, 0, 1, 2, 3, 16, 5, 5, 31, 20, 0, 0, 0, 7, 6, 5, 24])
IDS = IDS.view(TOKENS, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"mask": batch()["mask"]}], ids=["plain", "softcap", "mask"])
@pytest.mark.parametrize("width", [0, 1, 4])
def test_ids(
    width: int, options: dict[str, Any], dtype: torch.dtype, spy: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = IDS[:, :width].contiguous()

    def call() -> list[torch.Tensor]:
        z = logits_of(dtype).requires_grad_()
        out = tokfuse.token_stats(z, TARGET, ids=ids, **options)
        with torch.no_grad():
            assert tokfuse.token_stats(z, TARGET, ids=ids, **options).logp_at.shape == ids.shape
        (grad,) = torch.autograd.grad((out.logp - out.entropy).sum() + (out.logp_at * 0.3).sum(), z)
        return [*(x for x in out if x is not None), grad]

    fast = call()
    assert spy.answered == ["eager_token_stats_at"] * 2
    monkeypatch.setattr(at, "eager_cpu", lambda main: None)
    assert all(torch.equal(a, b) for a, b in zip(fast, call(), strict=True))


@pytest.mark.parametrize(
    "change",
    [
        {"ids": IDS.int()},
        {"ids": IDS.repeat(1, 2)[:, ::2]},
        {"ids": IDS.as_subclass(Subclass)},
        {"ids": IDS.reshape(-1), "ids_offsets": torch.arange(TOKENS + 1) * 4},
        {"ids": None, "top_k": 4},
        {"ignore_index": -100},
        {"bias_logits": torch.zeros_like(logits_of())},
    ],
    ids=["int32", "strided", "subclass", "offsets", "top_k", "ignore_index", "bias_logits"],
)
def test_ids_that_need_the_general_path(change: dict[str, Any], spy: Spy) -> None:
    given = {"ids": IDS, **change}
    logp_at = tokfuse.token_stats(logits_of(), TARGET, **given).logp_at
    assert bool(logp_at.isfinite().all())
    # ignore_index is a mask for the packed call inside.
    assert spy.answered == (["eager_token_stats_at"] if "ignore_index" in change else [])


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (IDS + 1000, r"ids must be .* got 1003"),
        (IDS - 5, r"ids must be .* got -2"),
        (IDS[:-1], r"ids must be of shape \(7, K\)"),
        (IDS.float(), "ids must be of dtype"),
    ],
    ids=["above", "below", "rows", "dtype"],
)
def test_wrong_ids(ids: torch.Tensor, words: str, spy: Spy) -> None:
    with pytest.raises(ValueError, match=words):
        tokfuse.token_stats(logits_of(), TARGET, ids=ids)
    assert spy.answered == []


@pytest.mark.parametrize("name", OBJECTIVES)
def test_policy_loss(name: str, spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, extra = OBJECTIVES[name]

    def call() -> list[torch.Tensor]:
        logp = torch.linspace(-4, -3, TOKENS, requires_grad=True)
        entropy = torch.linspace(0, 2, TOKENS, requires_grad=True)
        given = {**batch(), **extra}
        out = tokfuse.policy_loss(logp, entropy=entropy, objective=objective, **given)
        grads = torch.autograd.grad(out.loss, [logp, entropy], materialize_grads=True)
        return [*flat(out), *grads]

    both_ways(call, spy, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_policy_step(name: str, in_place: bool, dtype: torch.dtype, spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, extra = OBJECTIVES[name]
    given = {**batch(), **extra, "target": TARGET, "objective": objective}

    def call() -> Any:
        z = logits_of(dtype)
        if in_place:
            version = z._version
            step = tokfuse.policy_step_(z, **given)
            assert z._version > version and step.grad_logits.data_ptr() == z.data_ptr()
            return step
        return tokfuse.policy_step(logits=z, **given)

    both_ways(call, spy, monkeypatch)


@pytest.mark.parametrize("in_place", [False, True])
def test_policy_step_gradient(in_place: bool, spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {**batch(), "target": TARGET, "objective": tokfuse.Objective()}

    def call() -> torch.Tensor:
        leaf = logits_of().requires_grad_()
        z = leaf * 1.0
        step = tokfuse.policy_step_(z, **given) if in_place else tokfuse.policy_step(logits=z, **given)
        (step.loss * 3).backward()
        assert leaf.grad is not None
        return leaf.grad

    both_ways(call, spy, monkeypatch)


@pytest.mark.parametrize(
    "change",
    [
        {"old_logp": batch()["old_logp"].double()},
        {"old_logp": batch()["old_logp"].bfloat16()},
        {"advantage": torch.randn(2 * TOKENS)[::2]},
        {"mask": torch.ones(2 * TOKENS, dtype=torch.bool)[::2]},
        {"old_logp": batch()["old_logp"].as_subclass(Subclass)},
        {"sampler_logp": batch()["old_logp"]},
    ],
    ids=["float64", "bfloat16", "strided", "strided_mask", "subclass", "sampler"],
)
def test_what_must_be_converted_takes_the_general_path(change: dict[str, Any], spy: Spy) -> None:
    given = {**batch(), **change}
    out = tokfuse.policy_loss(torch.full((TOKENS,), -3.5), objective=tokfuse.Objective(), **given)
    assert spy.answered == [] and bool(out.loss.isfinite())


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target": TARGET + 30}, "target must be in"),
        ({"target": TARGET[:-1]}, "target must be of shape"),
        ({"target": TARGET.int()}, "target must be of dtype int64"),
        ({"temperature": 0.0}, "temperature must be"),
        ({"temperature": torch.zeros(TOKENS)}, "temperature must be > 0"),
        ({"softcap": -1.0}, "softcap must be"),
        ({"logit_scale": float("nan")}, "logit_scale must be"),
        ({"old_logp": torch.zeros(TOKENS, requires_grad=True)}, "old_logp must be detached"),
        ({"advantage": torch.zeros(3)}, "advantage must be of shape"),
        ({"mask": torch.ones(TOKENS)}, "mask must be of dtype bool"),
        ({"signal": torch.zeros(TOKENS)}, "signal must be None"),
        ({"kl_weight": torch.zeros(TOKENS)}, "kl_weight must be None"),
        ({"cu_seqlens": torch.tensor([0, 9], dtype=torch.int32)}, "cu_seqlens must be"),
        ({"cu_seqlens": torch.tensor([0, 5, 3, 7], dtype=torch.int32)}, "non-decreasing"),
        ({"cu_seqlens": torch.tensor([1, 7], dtype=torch.int32)}, "starts at 0"),
        ({"advantage_level": "row"}, "advantage_level must be"),
        ({"normalizer": 0.0}, "normalizer must be"),
    ],
)
def test_refused_before_anything_is_written(change: dict[str, Any], words: str, in_place: bool, spy: Spy) -> None:
    z = logits_of()
    kept = z.clone()
    given = {**batch(), "target": TARGET, "objective": tokfuse.Objective(), **change}
    with pytest.raises(ValueError, match=words):
        if in_place:
            tokfuse.policy_step_(z, **given)
        else:
            tokfuse.policy_step(logits=z, **given)
    assert torch.equal(z, kept) and spy.answered == []


def test_a_forced_backend_is_not_bypassed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert forced.eager_cpu(TARGET) is not None
    with tokfuse.backend("cpu"):
        assert forced.eager_cpu(TARGET) is not None
    with tokfuse.backend("reference"):
        assert forced.eager_cpu(TARGET) is None
    monkeypatch.setenv("TOKFUSE_BACKEND", "reference")  # after the import, because it is read at every call
    assert forced.eager_cpu(TARGET) is None
    monkeypatch.setenv("TOKFUSE_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="TOKFUSE_BACKEND must be one of"):
        tokfuse.token_stats(logits_of(), TARGET)


def test_a_torch_without_the_exchange_api_takes_the_general_path(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tokfuse.token_stats(logits_of(), TARGET)
    native.eager.cache_clear()
    monkeypatch.setattr(torch.Tensor, "__dlpack_c_exchange_api__", None, raising=False)
    try:
        assert native.eager() is None
        out = tokfuse.token_stats(logits_of(), TARGET)
    finally:
        monkeypatch.undo()
        native.eager.cache_clear()
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


ODD = st.sampled_from(
    [
        None,
        0,
        -1,
        1.5,
        "token",
        b"",
        (),
        (1, 2),
        [],
        object(),
        torch.zeros(3),
        torch.zeros(2, 3),
        torch.zeros(0, 5),
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(3, dtype=torch.bool),
        torch.zeros(()),
        torch.zeros(1, 1, 1),
        torch.zeros(3).as_subclass(Subclass),
        2**70,
        float("nan"),
        True,
    ]
)


@given(
    name=st.sampled_from(["eager_token_stats", "eager_token_stats_at", "eager_policy_loss", "eager_policy_step"]),
    args=st.lists(st.one_of(ODD, st.tuples(*[ODD] * 6), st.tuples(*[ODD] * 10)), max_size=10),
)
def test_any_arguments_end_in_none_or_a_result(name: str, args: list[Any]) -> None:
    try:
        out = getattr(native.eager(), name)(*args)
    except TypeError as error:  # loud, because with None a wrong record of the build would only be slow
        assert re.search(r"^\w+ expected; got", str(error))
        return
    assert out is None or isinstance(out, tuple)
