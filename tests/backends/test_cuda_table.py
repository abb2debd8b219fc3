"""Test the CUDA kernels that nvcc compiled: complete, within their budget, and equal to the committed table."""

import json
import re
import shutil
from pathlib import Path

import pytest

from tokfuse.inspection import cuda_table, roofline

ROOT = Path(__file__).resolve().parents[2]
TABLE = cuda_table.committed()
NAMES = {(kernel.name, kernel.arch): kernel for kernel in TABLE}
needs_module = pytest.mark.skipif(cuda_table.why_not() is not None, reason=str(cuda_table.why_not()))


def plain(base: str, arch: str, dtype: str = "bfloat16") -> cuda_table.Kernel:
    """Return the instance without options."""
    (kernel,) = [k for k in TABLE if k.base == base and k.arch == arch and k.dtype[0] == dtype and roofline._plain(k)]
    return kernel


def divergence(way: str, kind: int) -> cuda_table.Kernel:
    """The bfloat16 instance of one kind, without softcap, on sm_90."""
    return NAMES[f"paired_divergence_{way}_kernel<BFloat16, false, {kind}>", "90"]


def test_every_kernel_was_compiled_for_every_architecture():
    names, architectures = {kernel.name for kernel in TABLE}, {kernel.arch for kernel in TABLE}
    assert architectures >= {"80", "90", "100"}
    assert {(name, arch) for name in names for arch in architectures} == set(NAMES)
    bases = {kernel.base for kernel in TABLE}
    assert bases >= set(cuda_table.ROW_KERNELS) | set(roofline.PACKED)


def test_no_kernel_is_empty_on_an_architecture():
    """A kernel for newer architectures traps on the others. An empty one would leave its outputs unwritten."""
    text = "\n".join(path.read_text() for path in sorted((ROOT / "csrc" / "cuda").glob("*.cuh")))
    kernels = re.findall(r"__global__[^;{]*?(\w+_kernel)\(.*?\n}\n", text, re.DOTALL)
    bodies = re.findall(r"__global__.*?\n}\n", text, re.DOTALL)
    assert len(kernels) == len(bodies) and {k.base for k in TABLE} == set(kernels)
    guarded = {name for name, body in zip(kernels, bodies, strict=True) if "#if TOKFUSE_ARCH" in body}
    trapped = {name for name, body in zip(kernels, bodies, strict=True) if "#else\n  trap();\n#endif\n}" in body}
    assert guarded == trapped == {"policy_step_cluster_kernel"}


# Processing the target's tile separately costs this kernel a few registers, in bytes, which it spills outside its loop.
FRAMES = {("token_stats_fwd_kernel", "80"): 24, ("token_stats_fwd_kernel", "100"): 16}


def test_no_kernel_has_a_stack_but_the_known_small_frames():
    assert [k.key for k in TABLE if k.stack_bytes > FRAMES.get((k.name.split("<")[0], k.arch), 0)] == []


def test_registers_and_shared_memory_are_within_the_launch_bounds():
    for k in TABLE:
        assert k.threads in (128, 256, 512, 1024), k.key
        assert k.registers * k.threads <= roofline.REGISTERS, k.key
        assert k.shared_bytes <= 48 * 1024, k.key
        assert roofline.occupancy(k) > 0, k.key


@pytest.mark.parametrize(
    ("base", "arch", "limit"),
    [
        ("token_stats_fwd_kernel", "90", 10.0),
        ("token_stats_fwd_kernel", "100", 8.0),
        ("policy_step_kernel", "80", 20.0),
        ("policy_step_cluster_kernel", "90", 20.0),
        ("policy_step_cluster_kernel", "100", 20.0),
    ],
)
def test_instructions_per_element_are_within_budget(base: str, arch: str, limit: float):
    assert 0 < plain(base, arch).per_element <= limit


@pytest.mark.parametrize(
    ("way", "kind", "limit"),
    [("fwd", 0, 44.5), ("fwd", 1, 16.0), ("fwd", 2, 16.0), ("bwd", 0, 24.0), ("bwd", 1, 23.0), ("bwd", 2, 16.0)],
)
def test_divergences_are_within_budget(way: str, kind: int, limit: float):
    """Of the loops that rows take which are at least 1e-4 apart: one for a KL, two for the JSD (0)."""
    assert 0 < divergence(way, kind).per_element <= limit


@pytest.mark.parametrize("gpu", ["A100", "H100", "H200"])
def test_the_forward_is_predicted_to_be_bound_by_bandwidth(gpu: str):
    where = roofline.GPUS[gpu]
    assert roofline.share(plain("token_stats_fwd_kernel", where.arch), where) == 1.0


def test_policy_step_moves_four_bytes_per_bfloat16_element():
    kernel = plain("policy_step_cluster_kernel", "90")
    assert cuda_table.ROW_KERNELS[kernel.base].traffic * kernel.dtype[1] == 4
    assert roofline.share(kernel, roofline.GPUS["H100"]) == 1.0


def test_the_page_is_the_table():
    if not roofline.PAGE.parent.is_dir():
        pytest.skip("not a source tree")
    assert roofline.PAGE.read_text() == roofline.as_markdown(TABLE)


def test_json_survives():
    rows = json.loads(cuda_table.as_json(TABLE))["kernels"]
    assert [cuda_table.Kernel(**row) for row in rows] == sorted(TABLE, key=lambda k: k.key)


def test_a_worse_kernel_is_reported():
    good = TABLE[0]
    worse = cuda_table.Kernel(**{**good.__dict__, "registers": good.registers + 9})
    found = cuda_table.differences([worse, *TABLE[1:]], TABLE)
    assert found == [f"{good.key}: registers {worse.registers}, the table has {good.registers}"]
    assert cuda_table.differences(TABLE[1:], TABLE) == [f"{good.key}: is in the table, not in the module"]


def listing(*loops: tuple[int, int]) -> str:
    """Return loops inside an outer loop: 16-byte loads and stores of each, four exps, a branch back."""
    lines = [".L_x_0:"]
    for number, (loads, stores) in enumerate(loops, 1):
        body = ["LDG.E.128.CONSTANT R4, desc[UR4][R2.64]"] * loads + ["MUFU.EX2 R8, R4"] * 4
        body += ["STG.E.128 desc[UR4][R2.64], R4"] * stores
        lines += [f".L_x_{number}:", *body, f"@P0 BRA `(.L_x_{number})"]
    lines += ["BRA `(.L_x_0)", "EXIT", ".L_x_99:", "BRA `(.L_x_99)"]
    return "\n".join(x if x.startswith(".L") else f"        /*0010*/  {x} ;" for x in lines)


def test_instructions_are_counted_in_the_innermost_loops():
    """The longest loop that reads, and the longest that also writes. Other loops read no vectors."""
    text = listing((1, 0), (2, 0), (0, 0), (1, 1))
    assert [len(loop) for loop in cuda_table._loops(text)] == [6, 7, 5, 7]
    forward = "token_stats_fwd_kernel<float, false, false>"
    assert cuda_table._per_element(forward, text) == (round(7 / 8, 2), 0.5)
    step = "policy_step_kernel<float, float, false>"
    assert cuda_table._per_element(step, text) == (round(7 / 8 + 7 / 4, 2), 1.5)
    assert cuda_table._per_element("whiten_kernel", text) == (0.0, 0.0)


def test_the_second_loop_of_a_softcap_loads_float32():
    text = listing((4, 0), (2, 1)).replace("LDG", "LDS").replace("EX2", "RCP")
    capped = "policy_step_cluster_kernel<BFloat16, BFloat16, true>"
    assert cuda_table._per_element(capped, text) == (round(9 / 32 + 8 / 8, 2), round(4 / 32 + 4 / 8, 2))
    plain_step = "policy_step_cluster_kernel<BFloat16, BFloat16, false>"
    assert cuda_table._per_element(plain_step, text) == (round(9 / 32 + 8 / 16, 2), round(4 / 32 + 4 / 16, 2))


def test_the_page_has_the_kernels_with_a_softcap():
    rows = list(roofline.softcap_rows(TABLE))
    assert {k.base for k, *_ in rows} == {"policy_step_kernel", "policy_step_cluster_kernel"} and len(rows) == 7
    cluster = next(k for k, *_ in rows if k.base == "policy_step_cluster_kernel" and k.arch == "90")
    assert roofline.occupancy(cluster) == 0.25 and cluster.per_element < 35


@needs_module
def test_names_are_those_of_the_source():
    names = {
        "_ZN7tokfuse4cuda13whiten_kernelENS_10WhitenArgsE": "whiten_kernel",
        "_ZN7tokfuse4cuda22segment_moments_kernelIdEEvNS_11MomentsArgsENS0_14MomentsScratchE": (
            "segment_moments_kernel<double>"
        ),
    }
    assert {mangled: cuda_table.readable(mangled) for mangled in names} == names


@needs_module
@pytest.mark.compiler
def test_the_table_is_what_the_module_holds():
    if json.loads(cuda_table.TABLE.read_text())["nvcc"] != cuda_table.nvcc_version():
        pytest.skip("another nvcc built the module")
    # One architecture, because disassembling takes 8 s each. `kernels --cuda --check` checks all.
    now = cuda_table.read_module("90")
    assert cuda_table.differences(now, [k for k in TABLE if k.arch == "90"]) == []


def test_tools_that_are_too_old_for_the_module_are_named(monkeypatch):
    """cuobjdump 12.8 finds no kernel in a module of nvcc 13.0, so every kernel seemed to be missing."""
    if cuda_table.tools() is None or shutil.which("c++filt") is None:
        pytest.skip("needs cuobjdump and c++filt")
    monkeypatch.setattr(cuda_table, "nvcc_version", lambda: "13.0.88")
    monkeypatch.setattr(cuda_table, "tools_version", lambda: "12.8")
    assert cuda_table.why_not() == ("the cuobjdump of this triton reads CUDA 12, and the module was built with CUDA 13")
    monkeypatch.setattr(cuda_table, "tools_version", lambda: "13.0")
    assert cuda_table.why_not() is None
