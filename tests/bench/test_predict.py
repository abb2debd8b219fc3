"""Test the predicted times of the benchmark's cases on GPUs: both backends, from the committed tables."""

from dataclasses import replace
from pathlib import Path

import pytest
from bench_rows import our_row

from tokfuse.bench import predict
from tokfuse.inspection import kernel_table
from tokfuse.runtime.core.codes import DIVERGENCES

STEP = our_row("policy_step", "step", "entropy=0.01", "8192x151936", dtype="bfloat16", device="cuda", backend="cuda")
LOGITS = 8192 * 151936


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("gpu", kernel_table.GPUS)
def test_no_case_is_faster_than_its_bytes(gpu: str, backend: str) -> None:
    bandwidth = kernel_table.GPUS[gpu][3] * 1e9  # bytes per millisecond
    streams = {("token_stats", "forward"): 1, ("token_stats", "forward+backward"): 3, ("policy_step", "step"): 2}
    streams |= {("paired_divergence", "forward"): 2, ("paired_divergence", "forward+backward"): 5}
    assert streams.keys() == predict.ROW_KERNELS.keys()
    for (op, mode), count in streams.items():
        row = replace(STEP, op=op, mode=mode, variant="jsd", backend=backend)
        bytes_alone = count * 2 * LOGITS / bandwidth
        assert bytes_alone * 0.999 <= predict.milliseconds(row, gpu) <= 8 * bytes_alone


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("gpu", kernel_table.GPUS)
def test_a_kl_takes_fewer_instructions_than_a_mixture(gpu: str, backend: str) -> None:
    row = replace(STEP, op="paired_divergence", mode="forward+backward", backend=backend, dtype="bfloat16")
    times = {kind: predict.milliseconds(replace(row, variant=kind), gpu) for kind in DIVERGENCES}
    bytes_alone = 5 * 2 * LOGITS / (kernel_table.GPUS[gpu][3] * 1e9)
    assert all(bytes_alone * 0.999 <= t for t in times.values())
    kls = [predict.distill(gpu, kind, 8192, 64, 64, 151936, backend).instructions for kind in ("kl_forward", "jsd")]
    assert times["kl_forward"] <= times["jsd"] and kls[0] < kls[1]


def test_a_distillation_step_takes_its_products_and_its_row_kernels() -> None:
    row = replace(STEP, op="distill_step", variant="kl_reverse", hidden=4096)
    product = 2 * 8192 * 4096 * 151936 / 989e9
    bandwidth = kernel_table.GPUS["H100"][3] * 1e9
    step = predict.distill("H100", "kl_reverse", 8192, 4096, 4096, 151936)
    assert step.limit_ms == pytest.approx(4 * product, rel=1e-6)
    assert step.milliseconds >= 4 * product + 56 * LOGITS / bandwidth  # bytes of the row kernels
    assert step.launches == 8 * 15 and 0.5 < step.share < 1.0
    assert predict.milliseconds(replace(row, backend="triton"), "H100") == step.milliseconds
    wide = predict.milliseconds(replace(row, variant="kl_reverse,teacher=2x", backend="triton"), "H100")
    assert wide == pytest.approx(step.milliseconds + product, rel=1e-6)


def test_the_table_of_the_page_is_the_prediction() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "distillation.md").read_text()
    assert predict.distill_table() in text, "run `python -m tokfuse.bench.predict` and paste its table"


def test_a_step_on_hopper_takes_as_long_as_its_memory() -> None:
    for backend in ("cuda", "triton"):
        got = predict.milliseconds(replace(STEP, backend=backend), "H200")
        assert got == pytest.approx(4 * LOGITS / 4.8e9, rel=1e-6)


def test_a_head_takes_its_three_products_and_its_row_kernel() -> None:
    row = replace(STEP, op="policy_step_hidden", variant="rows=1", hidden=4096)
    product = 2 * 8192 * 4096 * 151936 / 989e9  # longer than the time of the bytes of every product at this width
    assert predict.milliseconds(row, "H100") == pytest.approx(3 * product + 6 * LOGITS / 3.35e9, rel=1e-6)
    narrow = predict.milliseconds(replace(row, hidden=64), "H100")
    assert narrow > 3 * product / 64 + 6 * LOGITS / 3.35e9  # here the bytes limit the products


def test_what_is_not_predicted() -> None:
    for changed in (
        {"backend": "cpu"},
        {"dtype": "float16"},
        {"op": "gae"},
        {"op": "distill_step", "variant": "jsd", "hidden": 64, "dtype": "float32"},
        {"op": "policy_step_hidden", "variant": "rows=1", "dtype": "float32"},
    ):
        assert predict.milliseconds(replace(STEP, **changed), "H100") is None
    assert predict.gpu_of("NVIDIA H100 80GB HBM3") == "H100" and predict.gpu_of("Quadro") is None
