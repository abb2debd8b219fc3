"""The committed table of compiled Triton kernels: complete, within budget, and still true."""

import json
import subprocess
import sys

import pytest
import torch

from tokfuse.runtime import kernel_table, triton_backend

pytest.importorskip("triton")
from tokfuse.triton_kernels import compile_cases, launch  # noqa: E402

needs_compiler = pytest.mark.skipif(
    triton_backend.interpreting(), reason="the interpreter is on: no compiler"
)
TABLE = kernel_table.committed()
# (kernel, capability) -> instructions per element of the hot loop, bfloat16. A bandwidth-bound
# forward has 17.7 issue slots per element on an H100, 12.4 on an H200 and 8.8 on a B200; a pass
# that writes as much as it reads has twice that.
BUDGET = {
    ("token_stats_fwd", 90): 10.5,
    ("token_stats_fwd", 100): 8.5,
    ("token_stats_bwd", 80): 12.0,
    ("token_stats_bwd", 90): 12.0,
    ("token_stats_bwd", 100): 12.0,
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
def test_every_launch_record_is_used_by_a_compiled_case(monkeypatch):
    """By the name of its kernel, or chosen on the way to one."""
    chosen = {row.kernel.removesuffix("_kernel") for row in TABLE}
    choose = launch.choose
    monkeypatch.setattr(launch, "choose", lambda name, x: chosen.add(name) or choose(name, x))
    for case in compile_cases.cases():
        compile_cases.record(case, case.dtypes[0], 90)
    assert launch.DEFAULTS.keys() - chosen == set()


def test_nothing_spills():
    assert [row.key for row in TABLE if row.spill_bytes] == []


def test_16_byte_loads_where_rows_are_read_in_order():
    over_logits = ("token_stats", "policy_step", "paired_divergence")
    narrow = {r.case for r in TABLE if r.load_bytes < 16 and r.case.startswith(over_logits)}
    # Rows at odd addresses, which a forward adds up in the order of aligned ones.
    assert narrow <= {"token_stats_fwd/odd_vocabulary"}


@pytest.mark.parametrize(("kernel", "capability"), list(BUDGET))
def test_instructions_per_element_are_within_budget(kernel, capability):
    (row,) = (
        r for r in TABLE if (r.case, r.capability, r.dtype) == (kernel, capability, "bfloat16")
    )
    assert row.per_element <= BUDGET[kernel, capability]


def test_the_page_is_the_table():
    if not kernel_table.PAGE.parent.is_dir():
        pytest.skip("not a source tree")
    assert kernel_table.PAGE.read_text() == kernel_table.as_markdown(TABLE)


def test_json_survives():
    rows = json.loads(kernel_table.as_json(TABLE))["rows"]
    assert [kernel_table.Resources(**row) for row in rows] == sorted(TABLE, key=lambda r: r.key)


@needs_compiler
@pytest.mark.compiler
def test_the_table_is_what_the_compiler_says():
    """bfloat16 on every architecture, and every dtype on one; `kernels --check` does the rest."""

    def wanted(dtype: torch.dtype, capability: int) -> bool:
        return dtype == torch.bfloat16 or capability == 90

    now = kernel_table.compile_all(wanted=wanted)
    keys = {row.key for row in now}
    before = [row for row in TABLE if row.key in keys]
    assert kernel_table.differences(now, before) == []


def test_the_interpreter_is_refused():
    done = subprocess.run(
        [sys.executable, "-P", "-c",
         "import os; os.environ['TRITON_INTERPRET'] = '1'\n"
         "from tokfuse.runtime import kernel_table; kernel_table.main([])"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "kernels: TRITON_INTERPRET is set, which leaves no compiler. Unset it."
    )
