"""Test the memory of large CPU results, which is kept when they are freed (csrc/bindings/buffers.h)."""

import os
import subprocess
import sys
import threading

import pytest
import torch

import tokfuse
from tokfuse.runtime.core import native

MODULE = native.eager()
pytestmark = pytest.mark.skipif(MODULE is None, reason="the native module cannot make tensors here")
MIB = 1 << 20
ROWS, VOCAB = 256, 4096  # 4 MiB of float32


@pytest.fixture(autouse=True)
def nothing_kept():
    tokfuse.release_workspace()
    yield
    tokfuse.release_workspace()


def gradient(seed: int = 0, rows: int = ROWS) -> torch.Tensor:
    """Return grad_logits of a step, which is a large result."""
    gen = torch.Generator().manual_seed(seed)
    step = tokfuse.policy_step(
        logits=torch.randn(rows, VOCAB, generator=gen),
        target=torch.zeros(rows, dtype=torch.int64),
        old_logp=torch.full((rows,), -8.0),
        advantage=torch.ones(rows),
        objective=tokfuse.Objective(),
        normalizer=1.0,
    )
    grad = step.grad_logits
    assert grad is not None
    return grad


def test_the_memory_of_a_freed_result_serves_the_next():
    first = gradient(0)
    address, values = first.data_ptr(), first.clone()
    del first
    assert MODULE.kept_bytes() >= ROWS * VOCAB * 4
    again = gradient(0)
    assert again.data_ptr() == address
    assert torch.equal(again, values)
    assert MODULE.kept_bytes() == 0


def test_a_live_result_is_never_handed_out_again():
    first = gradient(0)
    kept = first.clone()
    view = first[7]  # a view keeps the memory too
    del first
    second = gradient(1)
    assert torch.equal(view, kept[7])
    assert second.data_ptr() != view.data_ptr() - 7 * VOCAB * 4


def test_a_smaller_result_takes_a_buffer_of_at_most_twice_its_size():
    big = gradient(rows=4 * ROWS)
    address = big.data_ptr()
    del big
    small = gradient(rows=ROWS)
    assert small.data_ptr() != address
    nearly = gradient(rows=3 * ROWS)
    assert nearly.data_ptr() == address


def test_release_workspace_gives_the_memory_back_and_spares_live_results():
    live = gradient(0)
    values = live.clone()
    del values
    dead = gradient(1)
    del dead
    assert MODULE.kept_bytes() > 0
    tokfuse.release_workspace()
    assert MODULE.kept_bytes() == 0
    assert torch.equal(live, gradient(0))


def test_results_freed_by_other_threads_come_back():
    results = [gradient(i) for i in range(4)]

    def drop() -> None:
        results.pop()

    threads = [threading.Thread(target=drop) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert MODULE.kept_bytes() == 4 * ROWS * VOCAB * 4


def test_threads_at_once_get_memory_of_their_own():
    wanted = [gradient(i) for i in range(4)]
    found: dict[int, torch.Tensor] = {}

    def work(seed: int) -> None:
        for _ in range(5):
            found[seed] = gradient(seed)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], wanted[i]) for i in range(4))


def test_tensors_are_ordinary_ones():
    x = native.empty((3, VOCAB, 100), torch.bfloat16)
    assert x.shape == (3, VOCAB, 100) and x.dtype == torch.bfloat16 and x.is_contiguous()
    x.fill_(2.0)
    leaf = native.empty((ROWS, VOCAB)).fill_(1.0).requires_grad_()
    (leaf * 3).sum().backward()
    assert leaf.grad is not None and float(leaf.grad[0, 0]) == 3.0
    with torch.inference_mode():
        assert native.empty((ROWS, VOCAB)).is_inference()
    assert native.empty((0, VOCAB)).numel() == 0


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )


KEEP = """
import torch
from tokfuse.runtime.core import native
m = native.eager()
x = native.empty((8 << 20,)); y = native.empty((2 << 20,))  # 32 and 8 MiB
del x, y
print(m.kept_bytes() >> 20, m.kept_limit() >> 20)
"""


@pytest.mark.parametrize(("mib", "kept"), [("0", "0 0"), ("16", "8 16"), ("100", "40 100")])
def test_no_more_is_kept_than_the_environment_allows(mib, kept):
    assert run(KEEP, TOKFUSE_KEEP_MIB=mib).stdout.strip() == kept


def test_a_result_larger_than_the_limit_does_not_push_out_others():
    assert run(KEEP.replace("del x, y", "del y, x"), TOKFUSE_KEEP_MIB="16").stdout.strip() == "8 16"


def test_a_limit_that_is_no_number_is_refused():
    code = "import tokfuse._native"
    out = run(f"import torch; {code}", TOKFUSE_KEEP_MIB="64M")
    assert out.returncode != 0
    assert 'TOKFUSE_KEEP_MIB must be a number of MiB; got "64M".' in out.stderr


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="a size is negative"):
        MODULE.empty((-1, 4), 0)
    with pytest.raises(ValueError, match="larger than the address space"):
        MODULE.empty((2**40, 2**40), 0)
    with pytest.raises(ValueError, match="0 to 4 dimensions"):
        MODULE.empty((1, 1, 1, 1, 1), 0)
    with pytest.raises(ValueError, match="dtype code"):
        MODULE.empty((4,), 7)
