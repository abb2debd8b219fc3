"""Write rows in the CSV columns of Liger-Kernel's benchmarks, so that Liger's plotter can read them.

A row becomes two lines: speed in ms with its 20th and 80th percentile, and memory in MB. Only rows with
status "pass" are written, because the format has no column for a status. Values without a column (shape,
dtype, variant, backend, share of the limit) are stored as JSON in `extra_benchmark_config_str`.
"""

import csv
import json
from typing import TextIO

from tokfuse.bench.row import Row

COLUMNS = (
    "kernel_name",
    "kernel_provider",
    "kernel_operation_mode",
    "metric_name",
    "metric_unit",
    "x_name",
    "x_label",
    "x_value",
    "y_value_50",
    "y_value_20",
    "y_value_80",
    "extra_benchmark_config_str",
    "gpu_name",
    "timestamp",
    "liger_version",
)
# Liger's names of the modes.
MODES = {"forward+backward": "full", "step": "full", "call": "forward"}
# sweep -> (x_name, x_label)
AXES = {
    "tokens": ("T", "tokens"),
    "vocab": ("V", "vocabulary size"),
    "hidden": ("H", "hidden size"),
    "threads": ("threads", "threads"),
    "rows": ("rows", "share of rows with gradient"),
}


def append(row: Row, sink: TextIO) -> None:
    """Write the lines of one row, and the header if the file is empty."""
    writer = csv.writer(sink, lineterminator="\n")
    if sink.tell() == 0:
        writer.writerow(COLUMNS)
    for line in lines(row):
        writer.writerow(line)
    sink.flush()


def lines(row: Row) -> list[list[object]]:
    """Return the lines for speed and memory of a row with status "pass"; nothing for other rows."""
    if row.status != "pass" or row.median_ms is None:
        return []
    axis = row.sweep or "vocab"
    value = row.variant.partition("=")[2] if axis == "rows" else getattr(row, axis)
    extra = {
        "shape": row.shape,
        "dtype": row.dtype,
        "mode": row.mode,
        "variant": row.variant,
        "backend": row.backend,
        "device": row.device,
        "limit_share": row.limit_share,
        "tokens_per_s": row.tokens_per_s,
        "gb_per_s": row.gb_per_s,
        "gflop_per_s": row.gflop_per_s,
    }
    head = [row.op, row.provider, MODES.get(row.mode, row.mode)]
    middle = [*AXES[axis], value]
    tail = [json.dumps(extra), row.gpu or row.cpu_model, row.timestamp, f"tokfuse {row.tokfuse}"]
    out = [[*head, "speed", "ms", *middle, row.median_ms, row.p20_ms, row.p80_ms, *tail]]
    if row.peak_extra_bytes is not None:
        megabytes = row.peak_extra_bytes / 2**20
        out.append([*head, "memory", "MB", *middle, megabytes, megabytes, megabytes, *tail])
    return out
