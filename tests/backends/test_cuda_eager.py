"""Test the native whole calls of the CUDA backend, on the CPU: same results and errors as the general path.

A whole call does not read values of device memory. On the CPU every value may be read, so the general path runs by
default; the tests pretend that it may not.
"""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from eager_cases import CU, OBJECTIVES, TARGET, TOKENS, VOCAB, Call, Spy, batch, flat, logits_of
from hypothesis import given
from hypothesis import strategies as st

import tokfuse
from tokfuse import KL, Objective
from tokfuse.runtime.backends import cuda_backend, cuda_rows

pytestmark = [
    pytest.mark.cuda_host,
    pytest.mark.skipif(not cuda_backend.hosted(), reason="needs TOKFUSE_CUDA_HOST"),
    pytest.mark.skipif(
        not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="a torch without the DLPack exchange API"
    ),
]


@pytest.fixture(autouse=True)
def forced() -> Iterator[None]:
    with tokfuse.backend("cuda"):
        yield


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    spy = Spy(cuda_backend.reader())
    monkeypatch.setattr(cuda_backend, "eager", lambda main: spy)
    return spy


def both_ways(call: Call, spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run `call` as a whole call, then on the general path: the results are bitwise equal."""
    fast = call()
    assert len(spy.answered) == 1, "the native function did not answer a plain call"
    monkeypatch.setattr(cuda_backend, "eager", lambda main: None)
    slow = call()
    for a, b in zip(flat(fast), flat(slow), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
        assert a.requires_grad == b.requires_grad
        assert torch.equal(a, b), (a, b)
    if isinstance(fast, tokfuse.PolicyLoss | tokfuse.PolicyStep):
        assert fast.metrics.mean() == slow.metrics.mean()


OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "per_token": {"temperature": torch.linspace(0.5, 2.0, TOKENS)},
    "softcap": {"softcap": 5.0, "logit_scale": 0.5},
    "mask": {"mask": batch()["mask"]},
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# With those of the CPU: objectives of each level, on policy, with every optional input, and each normaliser.
MORE = {
    "on_policy": (Objective(), {"old_logp": None}),
    "sequence": (Objective(level="sequence"), {"cu_seqlens": CU}),
    "sequence_token": (Objective(level="sequence_token", kl=KL(coef=0.1)), {"cu_seqlens": CU}),
    "sequence_batch": (
        Objective(level="sequence", aggregation="seq_mean_token_mean"),
        {"cu_seqlens": CU, "normalizer": "batch", "advantage_level": "sequence", "advantage": torch.tensor([1.0, -2])},
    ),
    "batch_of_sequences": (
        Objective(aggregation="seq_mean_token_mean"),
        {"cu_seqlens": CU, "normalizer": "batch", "advantage_level": "sequence", "advantage": torch.tensor([1.0, -2])},
    ),
    "batch_without_mask": (Objective(), {"normalizer": "batch", "mask": None}),
    "batch_without_a_token": (Objective(), {"normalizer": "batch", "mask": torch.zeros(TOKENS, dtype=torch.bool)}),
    "unused_sequences": (Objective(), {"cu_seqlens": CU, "normalizer": torch.tensor(5.0)}),
    "every_input": (
        Objective(kl=KL(coef=0.1), anchor=KL(coef=0.2, estimator="k2"), entropy_coef=0.02),
        {
            "ref_logp": torch.full((TOKENS,), -3.4),
            "kl_weight": torch.linspace(0, 1, TOKENS),
            "token_weight": torch.linspace(1, 2, TOKENS),
            "entropy_weight": torch.linspace(2, 0, TOKENS),
            "anchor_logp": torch.full((TOKENS,), -3.0),
            "anchor_weight": torch.linspace(0, 3, TOKENS),
        },
    ),
}
MORE["sequence_token"][1]["ref_logp"] = torch.full((TOKENS,), -3.4)
CASES = OBJECTIVES | MORE


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_token_stats(name: str, dtype: torch.dtype, spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    z = logits_of(dtype)
    both_ways(lambda: tokfuse.token_stats(z, TARGET, **OPTIONS[name]), spy, monkeypatch)


def test_row_stride(spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    z = logits_of()[::2, 3:]
    both_ways(lambda: tokfuse.token_stats(z, TARGET[::2].clone() // 4), spy, monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_token_stats_gradient(name: str, dtype: torch.dtype, spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward is a whole call, too. The reader is left out of the second call."""
    up = torch.linspace(-1, 1, TOKENS)
    backwards = Spy(cuda_backend.reader())
    monkeypatch.setattr(cuda_rows, "launchers", lambda: backwards)

    def call() -> torch.Tensor:
        z = logits_of(dtype).requires_grad_()
        out = tokfuse.token_stats(z, TARGET, **OPTIONS[name])
        assert out.lse.requires_grad and not out.sum_sq.requires_grad
        grads = torch.autograd.grad([out.logp, out.entropy, out.lse], z, [2 * up, -up, up * up])
        monkeypatch.setattr(cuda_rows, "reader", lambda: None)
        return grads[0]

    both_ways(call, spy, monkeypatch)
    assert backwards.answered.count("eager_token_stats_bwd") == 1


@pytest.mark.parametrize("name", CASES)
def test_policy_loss(name: str, spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, extra = CASES[name]

    def call() -> list[torch.Tensor]:
        logp = torch.linspace(-4, -3, TOKENS, requires_grad=True)
        entropy = torch.linspace(0, 2, TOKENS, requires_grad=True)
        out = tokfuse.policy_loss(logp, entropy=entropy, objective=objective, **{**batch(), **extra})
        return [*flat(out), *torch.autograd.grad(out.loss, [logp, entropy], materialize_grads=True)]

    both_ways(call, spy, monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_policy_step(name: str, in_place: bool, dtype: torch.dtype, spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, extra = CASES[name]
    inputs = {**batch(), **extra, "target": TARGET}
    kept = {name: x.clone() for name, x in inputs.items() if isinstance(x, torch.Tensor)}

    def call() -> Any:
        z = logits_of(dtype)
        if in_place:
            version = z._version
            step = tokfuse.policy_step_(z, objective=objective, **inputs)
            assert z._version > version and step.grad_logits.data_ptr() == z.data_ptr()
        else:
            step = tokfuse.policy_step(logits=z, objective=objective, **inputs)
            assert torch.equal(z, logits_of(dtype))
        return step

    both_ways(call, spy, monkeypatch)
    assert all(torch.equal(inputs[name], x) for name, x in kept.items()), "an input was written"


@pytest.mark.parametrize("name", OPTIONS)
def test_policy_step_with_options(name: str, spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {**batch(), **OPTIONS[name], "target": TARGET, "objective": Objective()}
    z = torch.cat([logits_of(), logits_of()], 1)[:, 5 : 5 + VOCAB]
    both_ways(lambda: tokfuse.policy_step(logits=z, **inputs), spy, monkeypatch)


@pytest.mark.parametrize("in_place", [False, True])
def test_policy_step_gradient(in_place: bool, spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {**batch(), "target": TARGET, "objective": Objective()}

    def call() -> torch.Tensor:
        leaf = logits_of().requires_grad_()
        z = leaf * 1.0
        step = tokfuse.policy_step_(z, **inputs) if in_place else tokfuse.policy_step(logits=z, **inputs)
        (step.loss * 3).backward()
        assert leaf.grad is not None
        return leaf.grad

    both_ways(call, spy, monkeypatch)


# ----------------------------------------------------------------------------- the general path


class Subclass(torch.Tensor):
    pass


VECTOR = batch()["old_logp"]
GENERAL = {
    "float64": {"old_logp": VECTOR.double()},
    "bfloat16": {"old_logp": VECTOR.bfloat16()},
    "strided": {"advantage": torch.zeros(2 * TOKENS)[::2]},
    "strided_mask": {"mask": torch.ones(2 * TOKENS, dtype=torch.bool)[::2]},
    "subclass": {"old_logp": VECTOR.as_subclass(Subclass)},
    "sampler": {"sampler_logp": VECTOR},
    "numpy_number": {"temperature": torch.ones(()).numpy()[()]},
    "kept": {
        "kept_ids": torch.arange(VOCAB).repeat(TOKENS),
        "kept_offsets": VOCAB * torch.arange(TOKENS + 1, dtype=torch.int32),
    },
}


@pytest.mark.parametrize("name", GENERAL)
def test_what_takes_the_general_path(name: str, spy: Spy) -> None:
    inputs = {**batch(), "target": TARGET, "objective": Objective(), **GENERAL[name]}
    step = tokfuse.policy_step(logits=logits_of(), **inputs)
    assert spy.answered == [] and bool(step.loss.isfinite())


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target": TARGET[:-1]}, "target must be of shape"),
        ({"target": TARGET.int()}, "target must be of dtype int64"),
        ({"temperature": 0.0}, "temperature must be"),
        ({"softcap": -1.0}, "softcap must be"),
        ({"logit_scale": float("nan")}, "logit_scale must be"),
        ({"old_logp": torch.zeros(TOKENS, requires_grad=True)}, "old_logp must be detached"),
        ({"advantage": torch.zeros(3)}, "advantage must be of shape"),
        ({"mask": torch.ones(TOKENS)}, "mask must be of dtype bool"),
        ({"signal": torch.zeros(TOKENS)}, "signal must be None"),
        ({"kl_weight": torch.zeros(TOKENS)}, "kl_weight must be None"),
        ({"objective": Objective(level="sequence")}, "cu_seqlens must be"),
        ({"advantage_level": "row"}, "advantage_level must be"),
        ({"normalizer": 0.0}, "normalizer must be"),
    ],
)
def test_refused_before_anything_is_written(change: dict[str, Any], words: str, in_place: bool, spy: Spy) -> None:
    z = logits_of()
    inputs = {**batch(), "target": TARGET, "objective": Objective(), **change}
    with pytest.raises(ValueError, match=words):
        if in_place:
            tokfuse.policy_step_(z, **inputs)
        else:
            tokfuse.policy_step(logits=z, **inputs)
    assert torch.equal(z, logits_of()) and spy.answered == []


def test_when_a_whole_call_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    z = logits_of()
    assert cuda_backend.eager(z) is None, "values are checked on the CPU"
    monkeypatch.setattr(cuda_backend, "may_read", lambda tensor: False)
    assert cuda_backend.eager(z) is cuda_backend.launchers()
    assert cuda_backend.eager("logits") is None
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert cuda_backend.eager(z) is None
    monkeypatch.undo()
    monkeypatch.setattr(cuda_backend, "may_read", lambda tensor: False)
    for other in ("cpu", "reference"):
        with tokfuse.backend(other):
            assert cuda_backend.eager(z) is None


def test_a_failed_launch_raises_its_error(spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The general path is not tried: a launch before it may have overwritten the logits."""
    monkeypatch.setenv("TOKFUSE_HOST_ARCH", "80")
    monkeypatch.setenv("TOKFUSE_HOST_CODE", "90,100")
    inputs = {**batch(), "target": TARGET, "objective": Objective()}
    found = []
    for _ in range(2):
        with pytest.raises(RuntimeError, match="policy_step: .*cudaErrorNoKernelImageForDevice") as caught:
            tokfuse.policy_step(logits=logits_of(), **inputs)
        found.append(str(caught.value))
        monkeypatch.setattr(cuda_backend, "eager", lambda main: None)
    assert found[0] == found[1] and spy.answered == []


def test_a_tensor_of_another_kind_takes_the_general_path(spy: Spy) -> None:
    """A torch function mode may replace what torch.empty_like returns."""

    class Subclassed(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            return out.as_subclass(Subclass) if func is torch.empty_like else out

    z = logits_of()
    expected = tokfuse.token_stats(z, TARGET)
    assert spy.answered == ["eager_token_stats"]
    with Subclassed():
        found = tokfuse.token_stats(z, TARGET)
    assert spy.answered == ["eager_token_stats"]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_threads(spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each launch runs without the GIL."""
    monkeypatch.setenv("TOKFUSE_HOST_DRY", "1")

    def call(tokens: int) -> tuple[int, ...]:
        with tokfuse.backend("cuda"):
            vector = torch.zeros(tokens)
            target = torch.zeros(tokens, dtype=torch.long)
            inputs = {"target": target, "old_logp": vector, "advantage": vector, "objective": Objective()}
            step = tokfuse.policy_step(logits=torch.zeros(tokens, VOCAB), **inputs)
        return tuple(len(x) for x in (step.token_loss, *step.stats, step.grad_logits))

    with ThreadPoolExecutor(4) as pool:
        for tokens, found in zip(sizes := [1, 5, 33, 256] * 25, pool.map(call, sizes), strict=True):
            assert found == (tokens,) * 7
    assert len(spy.answered) == 100


ODD = st.sampled_from(
    [None, 0, -1, 1.5, "token", b"", (), (1, 2), object(), torch.zeros(3), torch.zeros(2, 3), torch.zeros(0, 5)]
    + [torch.zeros(3, dtype=torch.int64), torch.zeros(()), torch.zeros(3).as_subclass(Subclass), 2**70, True]
)
NAMES = ["eager_token_stats", "eager_token_stats_bwd", "eager_policy_loss", "eager_policy_step"]


@given(
    name=st.sampled_from(NAMES),
    args=st.lists(st.one_of(ODD, st.tuples(*[ODD] * 6), st.tuples(*[ODD] * 12)), max_size=11),
)
def test_any_arguments_end_in_none_or_a_result(name: str, args: list[Any]) -> None:
    try:
        out = getattr(cuda_backend.reader(), name)(*args)
    except TypeError as error:  # loud, because with None a wrong record of the build would only be slow
        assert re.search(r"^\w+ expected; got", str(error))
        return
    assert out is None or isinstance(out, tuple | torch.Tensor)
