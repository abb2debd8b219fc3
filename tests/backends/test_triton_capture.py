"""What CUDA-graph capture asks of the Triton ops, shown without a GPU.

Every op runs forward and backward on tensors of the meta device, which have shapes and no values.
So an operation that would wait for the device raises here (`.item()`, `.tolist()`, `nonzero`, a
boolean index), and what is allocated and launched cannot depend on values: it is the same at every
replay. Launches are recorded and not run. That a graph replays to the same bits is shown by the
tests marked `gpu` in test_triton_gpu.py, test_triton_rows.py and test_triton_packed.py.
"""

import contextlib
import dataclasses
import importlib

import pytest
import torch
from harness import bits
from torch.utils._python_dispatch import TorchDispatchMode

import tokfuse
from tokfuse import KL, Objective
from tokfuse.influence import InfluenceSpec
from tokfuse.runtime.backends import triton_backend
from tokfuse.runtime.core import dispatch
from tokfuse.runtime.lm_head import device_head
from tokfuse.triton_kernels.compile_cases import meta

triton = pytest.importorskip("triton")

TOKENS, VOCAB, HIDDEN, SEQUENCES = 70_000, 151_936, 64, 70_000 // 2
LONG = torch.int64


def vector(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return meta(TOKENS, dtype=dtype)


def borders(sequences: int = SEQUENCES) -> torch.Tensor:
    return meta(sequences + 1, dtype=torch.int32)


def matrix(columns: int = VOCAB, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return meta(TOKENS, columns, dtype=dtype).requires_grad_()


def batch() -> dict:
    return {
        "target": vector(LONG),
        "old_logp": vector(),
        "advantage": vector(),
        "mask": vector(torch.bool),
        "cu_seqlens": borders(),
        "normalizer": "batch",
    }


def head(dtype: torch.dtype = torch.float32) -> dict:
    return {"hidden": matrix(HIDDEN, dtype), "weight": meta(VOCAB, HIDDEN, dtype=dtype).requires_grad_()}


def policy_loss(level: str) -> None:
    given = batch()
    del given["target"]
    logp = vector().requires_grad_()
    objective = Objective(level=level, kl=KL(coef=0.1))
    tokfuse.policy_loss(logp, objective=objective, ref_logp=vector(), **given).loss.backward()


def policy_step(level: str, in_place: bool = False) -> None:
    objective = Objective(level=level, entropy_coef=0.1)
    if in_place:
        logits = meta(TOKENS, VOCAB, dtype=torch.bfloat16)
        tokfuse.policy_step_(logits, objective=objective, **batch())
    else:
        tokfuse.policy_step(logits=matrix(), objective=objective, **batch()).loss.backward()


def from_hidden(level: str, **options) -> None:
    """The batch shares one chunk, whose buffers are as large as all logits."""
    given = batch() | head() | options
    objective = Objective(level=level)
    tokfuse.policy_step(objective=objective, memory_budget=1 << 60, **given).loss.backward()


def statistics(out) -> None:
    (out.logp.sum() + out.entropy.sum()).backward()


CALLS = {
    "token_stats": lambda: statistics(
        tokfuse.token_stats(matrix(), vector(LONG), temperature=vector(), mask=vector(torch.bool))
    ),
    "extended_token_stats": lambda: statistics(
        tokfuse.token_stats(matrix(), vector(LONG), second_temperature=0.7, moments=True)
    ),
    "kept_token_stats": lambda: statistics(
        tokfuse.kept_token_stats(matrix(), vector(LONG), meta(1 << 20, dtype=LONG), meta(TOKENS + 1, dtype=LONG))
    ),
    "paired_divergence": lambda: tokfuse.paired_divergence(matrix(), matrix().detach()).sum().backward(),
    "linear_token_stats": lambda: tokfuse.linear_token_stats(
        **head(torch.bfloat16), target=vector(LONG), mask=vector(torch.bool)
    ),
    "linear_token_stats/float32": lambda: statistics(
        tokfuse.linear_token_stats(**head(), target=vector(LONG), memory_budget=1 << 60)
    ),
    "policy_loss": lambda: policy_loss("token"),
    "policy_loss/sequence": lambda: policy_loss("sequence"),
    "policy_step": lambda: policy_step("token"),
    "policy_step/sequence": lambda: policy_step("sequence"),
    "policy_step_": lambda: policy_step("token", in_place=True),
    "policy_step/hidden": lambda: from_hidden("token"),
    "policy_step/hidden_compact": lambda: from_hidden("token", compact_clipped=True),
    "policy_step/hidden_sequence": lambda: from_hidden("sequence"),
    "influence": lambda: from_hidden("token", influence=InfluenceSpec(rank=8)),
    "gae": lambda: tokfuse.gae(vector(), vector(), borders(), mask=vector(torch.bool)),
    "vtrace": lambda: tokfuse.vtrace(vector(), vector(), vector(), borders(), finished=None),
    "whiten": lambda: tokfuse.whiten(vector(), vector(torch.bool)),
    "group_advantage": lambda: tokfuse.group_advantage(vector(), vector(LONG), "gbpo_target"),
    "segment_moments": lambda: (
        tokfuse.segment_moments(vector().requires_grad_(), vector(LONG), num_segments=TOKENS).sum.sum().backward()
    ),
    "offpolicy_weights": lambda: tokfuse.offpolicy_weights(
        vector(), vector(), mode="snips", cu_seqlens=borders(), group_ids=meta(SEQUENCES, dtype=LONG)
    ),
    "ope": lambda: tokfuse.ope(vector(), vector(), vector(), vector(), mask=vector(torch.bool)),
}


@pytest.fixture
def launches(monkeypatch):
    """[(kernel, grid)] of what is launched while the backend serves tensors without values."""
    importlib.import_module("tokfuse.inspection.doctor").import_ops()
    table = {}
    for op, rows in dispatch._REGISTRY.items():
        row = dataclasses.replace(rows["triton"], devices=frozenset({"meta"}), unusable=lambda: None, only_forced=False)
        table[op] = rows | {"triton": row}
    monkeypatch.setattr(dispatch, "_REGISTRY", table)
    monkeypatch.setattr(dispatch, "_CHOICES", {})
    monkeypatch.setattr(device_head, "capturing", lambda x: True)
    monkeypatch.setattr(triton_backend, "why_unusable", lambda: None)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    found = []

    def run(kernel, *args, grid, warmup, **kwargs):
        found.append((kernel.__name__, grid))

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", run)
    with tokfuse.backend("triton"):
        yield found


@pytest.mark.skipif(triton_backend.interpreting(), reason="the interpreter reads what it launches")
@pytest.mark.parametrize("name", CALLS)
def test_no_value_reaches_the_host_and_no_grid_meets_a_limit(name, launches):
    CALLS[name]()
    assert launches
    for kernel, grid in launches:
        # Only the first axis of a grid holds more than 65,535 programs.
        assert len(grid) == 1 and 0 < grid[0] < 2**31, (kernel, grid)


@pytest.mark.skipif(triton_backend.interpreting(), reason="the interpreter reads what it launches")
def test_every_op_with_triton_kernels_is_among_them(launches):
    with_kernels = {op for op, rows in dispatch._REGISTRY.items() if "triton" in rows}
    covered = {name.split("/")[0].rstrip("_") for name in CALLS} | {"policy_step_hidden"}
    assert with_kernels == covered


@pytest.mark.skipif(triton_backend.interpreting(), reason="the interpreter reads what it launches")
def test_reading_a_value_would_be_seen(launches, monkeypatch):
    """The one read of a step from hidden states, that of the row classes, raises here."""
    monkeypatch.setattr(device_head, "capturing", lambda x: False)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        CALLS["policy_step/hidden"]()


class Products(TorchDispatchMode):
    """Bytes that matrix products read and write, by the shape of their result."""

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
    """docs/cuda.md, "A chunk of the head"; backend cuda has the same products (device_head)."""
    rows, vocab, hidden, e = TOKENS // 4, VOCAB, HIDDEN, dtype.itemsize
    d = 4 if e == 4 else 2
    per_row = (4 + (0 if e == 4 else d)) * vocab + 8 * hidden + 64
    given = batch() | head(dtype)
    if frozen:
        given["weight"] = given["weight"].detach()
    with Products() as products:
        tokfuse.policy_step(objective=Objective(), memory_budget=rows * per_row, **given)
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
    """Of a buffer of 4 GB, of which only the rows' own pages are ever touched."""
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
            statistics(stats)
            results.append([*stats, z.grad, tokfuse.policy_step_(logits, **given).grad_logits])
    for a, b in zip(*results, strict=True):
        assert bits(a) == bits(b)
