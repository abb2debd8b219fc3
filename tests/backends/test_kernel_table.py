"""Test the committed table of compiled Triton kernels: complete, within budget, and up to date."""

import dataclasses
import functools
import json
import subprocess
import sys

import pytest
import torch

from tokfuse.inspection import kernel_table
from tokfuse.runtime.backends import triton_backend

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from tokfuse.triton_kernels import compile_cases, launch  # noqa: E402

needs_compiler = pytest.mark.skipif(triton_backend.interpreting(), reason="the interpreter is on: no compiler")
TABLE = kernel_table.committed()
WRITTEN_BY = json.loads(kernel_table.TABLE.read_text())["triton"]
needs_its_triton = pytest.mark.skipif(
    triton.__version__ != WRITTEN_BY, reason=f"the table was written by Triton {WRITTEN_BY}"
)
# Every test run compiles these: the passes over (tokens, vocab), which take most of the time.
HOT = ("token_stats_fwd/multiple", "token_stats_bwd/odd", "policy_step/softcap")
# (kernel, capability) -> instructions per element of the hot loop, bfloat16. A bandwidth-bound
# forward has 17.7 issue slots per element on an H100, 12.4 on an H200 and 8.8 on a B200; a pass
# that writes as much as it reads has twice that.
BUDGET = {
    ("token_stats_fwd", 90): 10.5,
    ("token_stats_fwd", 100): 8.5,
    ("token_stats_bwd", 80): 12.0,
    ("token_stats_bwd", 90): 12.0,
    ("token_stats_bwd", 100): 12.0,
    ("policy_step", 80): 22.0,
    ("policy_step", 90): 22.0,
    ("policy_step", 100): 22.0,
    ("policy_step/softcap", 80): 46.0,
    ("policy_step/softcap", 90): 46.0,
    ("policy_step/softcap", 100): 42.0,
    ("paired_divergence_fwd/kl_forward", 90): 17.5,
    ("paired_divergence_fwd/kl_reverse", 90): 17.5,
    ("paired_divergence_fwd/jsd", 90): 45.0,
    ("paired_divergence_bwd/kl_forward", 90): 24.0,
    ("paired_divergence_bwd/kl_reverse", 90): 17.0,
    ("paired_divergence_bwd/jsd", 90): 27.0,
}


def test_every_case_stands_in_the_table():
    wanted = {
        (case.name, str(dtype).removeprefix("torch."), capability)
        for case in compile_cases.cases()
        for dtype in case.dtypes
        for capability in compile_cases.CAPABILITIES
    }
    assert {(row.case, row.dtype, row.capability) for row in TABLE} == wanted


@needs_compiler
def test_every_launch_record_is_used_by_a_compiled_case():
    with launch.choices() as asked:
        for case in compile_cases.cases():
            compile_cases.record(case, case.dtypes[0], 90)
    assert launch.DEFAULTS.keys() == set(asked)


def test_nothing_spills():
    assert [row.key for row in TABLE if row.spill_bytes] == []


def test_16_byte_loads_where_rows_are_read_in_order():
    over_logits = ("token_stats", "policy_step", "paired_divergence")
    gathers = {case.name for case in compile_cases.cases() if case.streams == 0}
    narrow = {r.case for r in TABLE if r.load_bytes < 16 and r.case.startswith(over_logits)} - gathers
    # Rows at odd addresses, which a forward adds up in the order of aligned ones.
    assert narrow <= {"token_stats_fwd/odd_vocabulary"}


@pytest.mark.parametrize(("kernel", "capability"), list(BUDGET))
def test_instructions_per_element_are_within_budget(kernel, capability):
    (row,) = (r for r in TABLE if (r.case, r.capability, r.dtype) == (kernel, capability, "bfloat16"))
    assert row.per_element <= BUDGET[kernel, capability]


def test_the_page_is_the_table():
    if not kernel_table.PAGE.parent.is_dir():
        pytest.skip("not a source tree")
    assert kernel_table.PAGE.read_text() == kernel_table.as_markdown(TABLE)


def test_json_survives():
    rows = json.loads(kernel_table.as_json(TABLE))["rows"]
    assert [kernel_table.Resources(**row) for row in rows] == sorted(TABLE, key=lambda r: r.key)


@functools.cache
def hot_rows() -> list[kernel_table.Resources]:
    """Return the rows of the hot kernels with the installed compiler."""
    rows = kernel_table.compile_all(HOT, wanted=lambda dtype, capability: dtype == torch.bfloat16)
    assert len(rows) >= 3 * len(HOT)
    return rows


@needs_compiler
@needs_its_triton
@pytest.mark.compiler
def test_the_table_is_what_the_compiler_says():
    """Compiles the rows whose source changed since the table was written, and always the hot kernels.

    A row contains a digest of everything that determines it, so a row with an unchanged source would compile to
    the same result. `make test-slow` compiles every row.
    """
    now = kernel_table.compile_all(known=TABLE)
    assert kernel_table.differences(now, TABLE) == []
    assert set(hot_rows()) <= set(TABLE)


@needs_compiler
@pytest.mark.compiler
def test_the_hot_kernels_are_as_good_with_every_triton():
    """Bound: 1.4 times the instructions of the table; 3.9 has 10.6 instead of 7.9 in one of them."""
    rows = {row.key: row for row in TABLE}
    for now in hot_rows():
        row = rows[now.key]
        assert now.spill_bytes == 0 and now.load_bytes >= row.load_bytes, now
        assert now.per_element <= 1.4 * row.per_element, (now, row)


@needs_compiler
@needs_its_triton
@pytest.mark.compiler
@pytest.mark.slow
def test_every_row_is_what_the_compiler_says():
    assert kernel_table.differences(kernel_table.compile_all(), TABLE) == []


@triton.jit
def _inner(x):
    """What it does."""
    return x * FACTOR


@triton.jit
def _outer_kernel(x_ptr, out_ptr):
    tl.store(out_ptr, _inner(tl.load(x_ptr)))  # a comment


FACTOR = tl.constexpr(2)


@needs_compiler
def test_a_digest_covers_what_a_kernel_reaches(monkeypatch):
    def code() -> str:
        compile_cases.code_of.cache_clear()
        return compile_cases.code_of(_outer_kernel)

    first = code()
    assert "x * FACTOR" in first and "FACTOR = constexpr[2]" in first
    assert "a comment" not in first and "What it does" not in first
    monkeypatch.setitem(_inner.fn.__globals__, "FACTOR", tl.constexpr(3))
    assert code() != first


@needs_compiler
def test_a_changed_row_is_compiled_and_an_unchanged_one_is_not(monkeypatch):
    case = compile_cases.CompileCase("copy", _copy, (torch.float32,))
    monkeypatch.setattr(compile_cases, "cases", lambda: [case])
    compiled = []

    def resources(case, dtype, capability, launch):
        compiled.append(capability)
        source = kernel_table.source_of(case, dtype, capability, launch)
        return dataclasses.replace(
            TABLE[0], case="copy", kernel="_outer_kernel", dtype="float32", capability=capability, source=source
        )

    monkeypatch.setattr(kernel_table, "resources_of", resources)
    rows = kernel_table.compile_all()
    assert sorted(compiled) == [80, 90, 100]
    compiled.clear()
    stale = dataclasses.replace(rows[1], source="of another kernel")
    assert kernel_table.compile_all(known=[rows[0], stale, rows[2]]) == rows
    assert compiled == [rows[1].capability]


def _copy(dtype: torch.dtype) -> None:
    x = compile_cases.meta(1, dtype=dtype)
    _outer_kernel[(1,)](x, x)


def test_the_interpreter_is_refused():
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            "-c",
            "import os; os.environ['TRITON_INTERPRET'] = '1'\nfrom tokfuse.inspection import kernels; kernels.main([])",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.strip() == ("kernels: TRITON_INTERPRET is set, which disables the compiler. Unset it.")
