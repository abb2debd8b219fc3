"""Test the cuda backend without a GPU: its errors, and its launches counted on the CPU.

The tests of each op compare the values of its kernels, in a process with TOKFUSE_CUDA_HOST (marker
cuda_host). This file tests the parts that only this backend has.
"""

import collections

import pytest
import torch
from harness import bits
from op_calls import WIDE, Call, Problem, calls

import tokfuse
from tokfuse import BackendUnavailable, Objective, PPOClip
from tokfuse.runtime.backends import cuda_backend, cuda_packed, cuda_policy, cuda_rows, packed_args
from tokfuse.runtime.core import native
from tokfuse.runtime.core.logit_options import LogitOptions

built = pytest.mark.skipif(getattr(native.module(), "cuda", None) is None, reason="built without CUDA kernels")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
hosted = pytest.mark.skipif(not cuda_backend.hosted(), reason="needs TOKFUSE_CUDA_HOST")


# ------------------------------------------------------------------------------------ without a GPU


@built
@no_gpu
def test_a_launch_without_a_driver_names_op_and_launch():
    module, x = native.module().cuda, torch.zeros(4)
    args = packed_args.gae_args(
        module,
        reward=x,
        value=x,
        cu_seqlens=torch.tensor([0, 4], dtype=torch.int32),
        gamma=0.9,
        lam=0.9,
        length_adaptive_alpha=None,
        mask=None,
        finished=None,
        advantage=x,
        returns=x,
    )
    with pytest.raises(RuntimeError) as caught:
        module.gae(module.Place(device=0, stream=0), args)
    assert str(caught.value).startswith("gae: launching gae_kernel on CUDA device 0 failed: ")
    assert "doctor" in str(caught.value)


@built
@no_gpu
@pytest.mark.skipif(cuda_backend.hosted(), reason="the kernels run on the CPU here")
def test_the_forced_backend_is_refused_with_the_reason():
    with tokfuse.backend("cuda"), pytest.raises(BackendUnavailable, match="cuda: runs on cuda"):
        tokfuse.whiten(torch.randn(8))


@built
def test_the_module_says_what_it_was_built_for():
    module = native.module()
    assert module.cuda_version
    assert module.cuda_archs.split(",")[0] == "80"


X = torch.zeros(4)
WHITEN = {"tokens": 4, "mask": None, "shift_mean": False, "eps": 0.0}
OPE = {"rows": 4, "mask": None, "q_pi": None}
SKETCH = {"tokens": 0, "seqs": -1, "rank": 0, "cu_seqlens": None}


@built
@pytest.mark.parametrize(
    ("name", "record", "fields", "message"),
    [
        ("whiten", "WhitenArgs", {**WHITEN, "x": X, "out": X, "mean": X, "var": None}, "mean and var come together"),
        ("whiten", "WhitenArgs", {**WHITEN, "x": X, "out": X, "mean": None, "var": None}, "scratch memory is missing"),
        ("ope", "OpeArgs", {**OPE, "weight": X, "reward": X, "q_a": X, "out": X}, "q_a needs q_pi"),
        ("sketch", "SketchArgs", {**SKETCH, "left": X, "right": X, "out": X}, "a size must be >= 0"),
    ],
)
def test_the_binding_refuses(name: str, record: str, fields: dict, message: str):
    module = native.module().cuda
    args = getattr(module, record)(**fields)
    with pytest.raises(ValueError, match=message):
        getattr(module, name)(module.Place(device=0, stream=0), args)


@built
def test_a_launch_takes_a_place_and_the_structs_of_its_kernel():
    module = native.module().cuda
    args = module.OpeArgs(**OPE, weight=X, reward=X, q_a=None, out=X)
    for wrong in ((args,), ((0, 0), args), (module.Place(device=0, stream=0), ())):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            module.ope(*wrong)


@built
@pytest.mark.skipif(native.eager() is None, reason="a torch without the DLPack exchange API")
def test_whole_calls_take_tensors_on_a_gpu_only():
    module, z, y = native.reader(native.module().cuda), torch.zeros(2, 5), torch.tensor([0, 1])
    plain = LogitOptions(1.0, None, 1.0, None)
    assert native.eager().eager_token_stats(z, y, plain, 1, False) is not None
    assert module.eager_token_stats(z, y, plain, 1, False) is None
    assert cuda_backend.hosted() or cuda_backend.eager(z) is None


# --------------------------------------------------------------------------- launches, on the CPU


class Counted:
    """The launchers, with a count of the launches."""

    def __init__(self) -> None:
        self.calls: collections.Counter[str] = collections.Counter()

    def __getattr__(self, name: str):
        found = getattr(cuda_backend.launchers(), name)
        asks = name in ("moments_parts", "offpolicy_spans", "policy_partials")
        if not callable(found) or isinstance(found, type) or asks:
            return found

        def call(*arguments, **named):
            self.calls[name] += 1
            return found(*arguments, **named)

        return call


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    counter = Counted()
    for module in (cuda_packed, cuda_policy, cuda_rows):
        monkeypatch.setattr(module, "launchers", lambda: counter)
    return counter


CU = torch.tensor([0, 3, 3, 40, 64], dtype=torch.int32)


def head(rows: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 8, generator=generator)
    weight = torch.randn(200, 8, generator=generator)
    return hidden, weight, torch.randint(200, (rows,), generator=generator)


def budget_of(rows: int) -> int:
    """Return a memory_budget for chunks of that many rows: float32 logits, two rows of hidden states."""
    return rows * (4 * 208 + 8 * 8 + 64)


@hosted
@pytest.mark.cuda_host
def test_linear_statistics_take_one_row_launch_per_chunk(counted: Counted):
    hidden, weight, target = head()
    with tokfuse.backend("cuda"):
        tokfuse.linear_token_stats(hidden, weight, target, memory_budget=budget_of(16))
    assert counted.calls == {"token_stats_fwd": 4}


@hosted
@pytest.mark.cuda_host
@pytest.mark.parametrize("masked", [False, True])
def test_a_step_from_hidden_states_takes_one_row_launch_per_chunk(masked: bool, counted: Counted):
    hidden, weight, target = head()
    mask = torch.arange(64) % 2 == 0 if masked else None
    chunks = 2 if masked else 4
    products, gathers = collections.Counter(), []

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.overloadpacket.__name__
            if name in ("mm", "addmm", "addmm_"):
                products[name.rstrip("_")] += 1
            if name == "index" and args[0].shape == hidden.shape:
                gathers.append(name)
            return function(*args, **(kwargs or {}))

    clip = Objective(shape=PPOClip(low=0.2, high=0.2))
    with tokfuse.backend("cuda"), Products():
        tokfuse.policy_step(
            hidden=hidden.requires_grad_(),
            weight=weight.requires_grad_(),
            target=target,
            old_logp=torch.full((64,), -5.0),
            advantage=torch.ones(64),
            objective=clip,
            mask=mask,
            memory_budget=budget_of(16),
        )
    # Per chunk: logits, gradient of the hidden states, gradient of the weight.
    assert sum(products.values()) == 3 * chunks
    assert counted.calls == {"policy_step": chunks, "policy_metrics": 1}
    # If all rows have a gradient, a chunk of hidden states is a slice.
    assert len(gathers) == (chunks if masked else 0)


@hosted
@pytest.mark.cuda_host
@pytest.mark.parametrize("call", calls("packed"), ids=lambda call: call.name)
def test_packed_ops_take_one_launch(call: Call, counted: Counted):
    with tokfuse.backend("cuda"):
        call.run(Problem(WIDE))
    assert counted.calls == {call.row.op: 1}


@hosted
@pytest.mark.cuda_host
def test_a_launch_goes_to_the_device_of_its_tensors():
    """There is one device here. A request for another device raises an error that names it."""
    x = torch.ones(8)
    module = cuda_backend.launchers()
    args = module.WhitenArgs(**{**WHITEN, "tokens": 8}, x=x, out=x, mean=None, var=None, scratch=x.new_empty(6))
    with pytest.raises(RuntimeError, match="whiten: launching whiten_kernel on CUDA device 1"):
        module.whiten(module.Place(device=1, stream=0), args)


# --------------------------------------------------------------------- guarantees of the layouts


@hosted
@pytest.mark.cuda_host
def test_a_long_segment_is_shared_by_blocks():
    rows = 1 << 15
    assert cuda_backend.launchers().moments_parts(rows=rows, segments=2) > 1
    x = torch.randn(rows, generator=torch.Generator().manual_seed(1))
    cu = torch.tensor([0, 20000, rows], dtype=torch.int32)
    with tokfuse.backend("cuda"):
        got = tokfuse.segment_moments(x, cu_seqlens=cu)
    want = tokfuse.segment_moments(x.double(), cu_seqlens=cu)
    torch.testing.assert_close(got.sum.double(), want.sum, atol=1e-3, rtol=1e-6)
    assert torch.equal(got.count, want.count)
    assert torch.equal(got.max.double(), want.max)


@hosted
@pytest.mark.cuda_host
def test_results_repeat_bitwise():
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(2, 9000, generator=generator).unbind(0)
    with tokfuse.backend("cuda"):
        pairs = [(tokfuse.whiten(x), tokfuse.ope(x.abs(), y).ips_se) for _ in range(2)]
    assert [bits(a) for a in pairs[0]] == [bits(a) for a in pairs[1]]


@hosted
@pytest.mark.cuda_host
@pytest.mark.parametrize("rank", [8, 65])
def test_sketches_are_sums_of_outer_products(rank: int):
    generator = torch.Generator().manual_seed(3)
    left, right = torch.randn(2, 64, rank, generator=generator).unbind(0)
    got = cuda_packed.launch_sketch(left, right, CU)
    for s in range(len(CU) - 1):
        own = slice(int(CU[s]), int(CU[s + 1]))
        torch.testing.assert_close(got[s], left[own].T @ right[own], atol=1e-4, rtol=1e-5)
