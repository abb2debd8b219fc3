"""Test without a GPU that the Triton ops meet the requirements of CUDA graph capture.

Every op runs forward and backward on tensors of the meta device, which have shapes but no values. An operation
that would synchronise with the device raises an error here (`.item()`, `.tolist()`, `nonzero`, a boolean
index). Allocations and launches cannot depend on values, so they are the same in every replay. Launches are
recorded but do not run. Tests marked `gpu` in test_triton_gpu.py, test_triton_rows.py and
test_triton_packed.py check that the replay of a graph gives bitwise the same results.
"""

import inspect

import pytest
import torch
from harness import bits
from op_calls import LARGE, Problem, calls
from torch.utils._python_dispatch import TorchDispatchMode

import tokfuse
from tokfuse import Objective
from tokfuse.runtime.backends import triton_backend
from tokfuse.runtime.lm_head import device_head

pytest.importorskip("triton")
from meta_launches import recorded  # noqa: E402

TOKENS, VOCAB, HIDDEN = LARGE.tokens, LARGE.vocab, LARGE.hidden
CALLS = {call.name: call for call in calls() if call.row.registered and not call.row.reads_host}


@pytest.fixture
def launches():
    """Return [(kernel, grid)] of the launches while the backend accepts tensors without values."""
    with recorded() as found:
        yield found


@pytest.mark.skipif(triton_backend.interpreting(), reason="the interpreter reads what it launches")
@pytest.mark.parametrize("name", CALLS)
def test_no_value_reaches_the_host_and_no_grid_meets_a_limit(name, launches):
    call = CALLS[name]
    for dtype in {torch.bfloat16, torch.float32} & set(call.row.dtypes):
        given = call.arguments(Problem(LARGE, "meta", dtype))
        if "hidden" in given and "memory_budget" in inspect.signature(call.function()).parameters:
            given = {"memory_budget": 2**38} | given  # a few chunks of up to 70,000 rows, not 1,000 small ones
        call.apply(given)
    assert launches
    for kernel, grid in launches:
        # Only the first axis of a grid may have more than 65,535 programs.
        assert len(grid) == 1 and 0 < grid[0] < 2**31, (kernel, grid)


@pytest.mark.skipif(triton_backend.interpreting(), reason="the interpreter reads what it launches")
def test_reading_a_value_would_be_seen(launches, monkeypatch):
    """The only read of a step from hidden states, the row classes, raises an error here."""
    monkeypatch.setattr(device_head, "capturing", lambda x: False)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        CALLS["policy_step_hidden:policy_step"].run(Problem(LARGE, "meta", torch.float32))


class Products(TorchDispatchMode):
    """Counts the bytes that matrix products read and write, by the shape of their result."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: list[tuple[tuple[int, ...], int, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__.rstrip("_")
        out = function(*args, **(kwargs or {}))
        if name in ("mm", "addmm"):
            read = {id(x): x.numel() * x.itemsize for x in args if isinstance(x, torch.Tensor)}
            self.moved.append((tuple(out.shape), sum(read.values()), out.numel() * out.itemsize))
        return out


@pytest.mark.skipif(triton_backend.interpreting(), reason="the interpreter reads what it launches")
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_chunk_of_the_head_moves_what_the_docs_say(dtype, frozen, launches):
    """docs/cuda.md, "A chunk of the head". The backend cuda has the same products (device_head)."""
    rows, vocab, hidden, e = TOKENS // 4, VOCAB, HIDDEN, dtype.itemsize
    d = 4 if e == 4 else 2
    per_row = (4 + (0 if e == 4 else d)) * vocab + 8 * hidden + 64
    call = CALLS["policy_step_hidden:policy_step/frozen" if frozen else "policy_step_hidden:policy_step"]
    given = call.arguments(Problem(LARGE, "meta", dtype))
    with Products() as products:
        call.function()(**given | {"memory_budget": rows * per_row})
    steps = [name for name, _ in launches if name == "policy_step_kernel"]
    assert len(steps) == 4
    weight, states, logits, gradient = (vocab * hidden * e, rows * hidden * e, rows * vocab * 4, (rows * vocab * d))
    want = []
    for chunk in range(4):
        want.append(((rows, vocab), states + weight, logits))
        want.append(((rows, hidden), gradient + weight, 4 * rows * hidden))
        if not frozen:
            sum_so_far = 4 * vocab * hidden
            before = sum_so_far if chunk else 0
            want.append(((vocab, hidden), gradient + states + before, sum_so_far))
    assert products.moved == want


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_rows_that_lie_beyond_2_to_the_31_elements():
    """Rows of a 4 GB buffer; only the pages of the rows are touched."""
    if not triton_backend.interpreting():
        pytest.skip("needs the interpreter")
    stride, vocab = 2**30 + 64, 300
    far = torch.empty(2 * stride + vocab, dtype=torch.bfloat16).as_strided((3, vocab), (stride, 1))
    near = torch.randn(3, 304, generator=torch.Generator().manual_seed(0)).bfloat16()[:, :vocab]
    far.copy_(near)
    given = {
        "target": torch.tensor([0, 7, vocab - 1]),
        "advantage": torch.ones(3),
        "old_logp": torch.full((3,), -6.0),
        "objective": Objective(entropy_coef=0.1),
    }
    with tokfuse.backend("triton"):
        results = []
        for logits in (near, far):
            z = logits.detach().requires_grad_()
            stats = tokfuse.token_stats(z, given["target"])
            (stats.logp.sum() + stats.entropy.sum()).backward()
            results.append([*stats, z.grad, tokfuse.policy_step_(logits, **given).grad_logits])
    for a, b in zip(*results, strict=True):
        assert bits(a) == bits(b)
