"""Write the tables of the documentation from recorded rows: `python -m tokfuse bench numbers FILES`.

    python -m tokfuse bench numbers bench/results/*.jsonl --write README.md --write docs/performance.md \\
        --pictures docs/pictures

`--write` replaces the text between the markers of a page: `headline` is a short table, `numbers` is all
tables. A test compares the pages with the rows in `bench/results`. A later row of the same case and provider
replaces an earlier row.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokfuse.bench import growth
from tokfuse.bench.report import mebibytes
from tokfuse.bench.row import Row, check_one_machine

MARKERS = {name: (f"<!-- {name} -->", f"<!-- /{name} -->") for name in ("headline", "numbers")}
# Scores of study_influence.py that the text below its table compares.
SKETCH, HEAD = "sketch, rank 64", "control: true gradient of lm_head"
NO_GRADIENT = "control: mean hidden state, no gradient"
Case = tuple[str, ...]


def read(files: Sequence[str | Path]) -> tuple[list[Row], list[dict[str, Any]]]:
    """Return the rows of the benchmarks, and the rows of the influence study, which have no provider.

    Raises:
        ValueError: the rows come from different machines, or a line is no row.
    """
    rows, study = [], []
    for file in files:
        for line in Path(file).read_text(encoding="utf-8").splitlines():
            if not line.strip():
                continue
            try:
                values = json.loads(line)
                if isinstance(values, dict) and "slice" in values:
                    study.append(values)
                else:
                    rows.append(Row.from_json(line))
            except ValueError:  # no JSON, or no row
                what = f"{file} must contain rows of `bench --json`; got {line[:60]!r}. Pass another file."
                raise ValueError(what) from None
    check_one_machine(rows, ", ".join(map(str, files)))
    return rows, study


def section(rows: Sequence[Row], study: Sequence[dict[str, Any]] = ()) -> str:
    """Return the text between the markers."""
    timed = [row for row in rows if not row.sweep]
    swept = [row for row in rows if row.sweep]
    parts = [
        _from_logits(timed) + _load(timed, "policy_step"),
        _from_hidden(timed) + _load(timed, "policy_step_hidden"),
        _distillation(timed) + _load(timed, "distill_step"),
        _price(timed) + _load(timed, "influence"),
        _advantages(timed) + _load(timed, "advantage"),
        _study(study),
        _growth(swept) + _load(swept, *{row.op for row in swept}),
        _machine([row for row in rows if row.status != "predicted"]),
        _predicted(rows),
    ]
    return "\n\n".join(part for part in parts if part)


def _load(rows: Sequence[Row], *ops: str) -> str:
    """Return a sentence with the load average. A load above the number of cores increases every time."""
    loads = [row.load_average for row in rows if row.op in ops and row.load_average is not None]
    if not loads:
        return ""
    is_busy = max(loads) > 2 * max(row.threads for row in rows)
    busy = "; other work increased these times" if is_busy else ""
    return f"\n\nLoad average while measuring: {min(loads):.1f} to {max(loads):.1f}{busy}."


def blocks(page: str) -> dict[str, str]:
    """Return the text between the markers of a page, by block name."""
    pairs = ((name, *marks) for name, marks in MARKERS.items())
    return {name: page.split(begin)[1].split(end)[0].strip() for name, begin, end in pairs if begin in page}


def write(file: Path, texts: dict[str, str]) -> None:
    """Replace the text between the markers of a file, for each block that it contains.

    Raises:
        ValueError: the file contains no block, or an end marker is missing.
    """
    page = old = file.read_text(encoding="utf-8")
    found = False
    for name, (begin, end) in MARKERS.items():
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        page, count = pattern.subn(lambda _, new=f"{begin}\n{texts[name]}\n{end}": new, page)
        found = found or count == 1
        if count != old.count(begin) or count > 1:
            raise ValueError(f"bench: {file} must contain {begin} and {end} at most once each.")
    if not found:
        marks = " or ".join(f"{begin} and {end}" for begin, end in MARKERS.values())
        raise ValueError(f"bench: a page of --write must contain {marks}; {file} does not.")
    file.write_text(page, encoding="utf-8")


# Rows of the short table: what is computed, op, variant, shape, dtype, provider of tokfuse, baselines.
COMPILED = ("torch_compile", "torch_compile_f32")
HEADLINES = (
    (
        "policy loss from logits, in place",
        "policy_step",
        "entropy=0.01",
        "256x151936",
        "bfloat16",
        "tokfuse_",
        COMPILED,
    ),
    ("policy loss from logits, in place", "policy_step", "entropy=0.01", "256x128256", "float32", "tokfuse_", COMPILED),
    ("policy loss with the lm_head", "policy_step_hidden", "rows=1", "128x896x151936", "float32", "tokfuse", COMPILED),
    ("policy loss with the lm_head", "policy_step_hidden", "rows=1", "128x896x151936", "float32", "tokfuse", ("trl",)),
    (
        "the same, 25% of tokens with gradient",
        "policy_step_hidden",
        "rows=0.25",
        "512x576x49152",
        "float32",
        "tokfuse",
        COMPILED,
    ),
)


def headline(rows: Sequence[Row]) -> str:
    """Return the short table: time and workspace of tokfuse and of a baseline, and the machine."""
    timed = [row for row in rows if not row.sweep]
    used, lines = [], []
    for work, op, variant, shape, dtype, name, baselines in HEADLINES:
        found = _cases(timed, op, variant).get((shape, dtype, variant), {})
        ours, base = found.get(name), _fastest(found, *baselines)
        if ours is None or base is None:
            continue
        used += [ours, base]
        label = "torch.compile" if base.provider in COMPILED else f"{base.provider.upper()} {base.provider_version}"
        speedup = f"{_ratio(base, ours):.1f}x"
        lines.append([work, f"{_spaced(shape)}, {dtype}", _short(ours), f"{label}: {_short(base)}", speedup])
    if not lines:
        return ""
    heads = ["work", "tokens x (hidden x) vocabulary", "tokfuse", "baseline", "speedup"]
    first = used[0]
    return (
        f"{_grid(heads, lines)}\n\n"
        f"Machine: {first.cpu_model}, {first.machine}, {first.threads} threads, torch {first.torch}. Times are\n"
        "medians of interleaved rounds with cold caches. Memory is the peak of a call without the tensors that it\n"
        "returns."
    )


def _short(row: Row) -> str:
    return f"{row.median_ms:.{1 if (row.median_ms or 0.0) < 100 else 0}f} ms, {mebibytes(row.workspace_bytes)}"


def _cases(rows: Sequence[Row], op: str, variant: str | None = None) -> dict[Case, dict[str, Row]]:
    """Return the rows of an op by case and provider, in their order in the files."""
    out: dict[Case, dict[str, Row]] = {}
    for row in rows:
        if row.op == op and row.status == "pass" and row.median_ms and variant in (None, row.variant):
            out.setdefault((row.shape, row.dtype, row.variant), {})[row.provider] = row
    return out


def _fastest(found: dict[str, Row], *names: str) -> Row | None:
    rows = [found[name] for name in names if name in found]
    return min(rows, key=lambda row: row.median_ms or 0.0) if rows else None


def _grid(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    table = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in table)


def _times(row: Row | None, base: Row | None) -> str:
    if row is None or row.median_ms is None:
        return "-"
    times = f" ({_ratio(row, base):.1f}x)" if base and base.median_ms else ""
    return f"{row.median_ms:.1f}{times}"


def _ratio(row: Row, base: Row) -> float:
    """Return the time relative to `base`, in the rounds that measured both if there are such rounds."""
    if row.baseline == base.provider and row.ratio is not None:
        return row.ratio
    return (row.median_ms or 0.0) / (base.median_ms or 1.0)


def _cpu(row: Row, base: Row | None) -> str:
    return f"{row.cpu_ms / base.cpu_ms:.1f}x" if row.cpu_ms and base and base.cpu_ms else "-"


def _spaced(shape: str) -> str:
    return shape.replace("x", " x ")


def _from_logits(rows: Sequence[Row]) -> str:
    lines = []
    for (shape, dtype, _), found in _cases(rows, "policy_step", "entropy=0.01").items():
        base = found.get("tokfuse_")
        lines.append(
            [
                _spaced(shape),
                dtype,
                _times(base, None),
                _times(found.get("tokfuse"), base),
                _times(_fastest(found, "torch_compile", "torch_compile_f32"), base),
                _times(_fastest(found, "torch_eager", "torch_eager_f32"), base),
                _times(found.get("cross_entropy"), base),
                _times(found.get("limit_copy"), None),
            ]
        )
    if not lines:
        return ""
    return (
        "### Loss from logits\n\n"
        "The work is: statistics, clipped objective with an entropy bonus, gradient. Times are milliseconds,\n"
        "the median of interleaved rounds with cold caches. The number in brackets is the time relative to\n"
        "tokfuse in place. The torch columns show the faster of the input's dtype and float32. `limit` is a\n"
        "copy of the same bytes in the same run.\n\n"
    ) + _grid(
        [
            "tokens x vocab",
            "dtype",
            "tokfuse, in place",
            "tokfuse, out of place",
            "torch.compile",
            "torch eager",
            "F.cross_entropy only",
            "limit",
        ],
        lines,
    )


def _from_hidden(rows: Sequence[Row]) -> str:
    lines = []
    for (shape, dtype, variant), found in _cases(rows, "policy_step_hidden").items():
        base = found.get("tokfuse")
        for name, row in sorted(found.items(), key=lambda item: item[1].median_ms or 0.0):
            if row.role == "limit" and name != "limit_gemm":
                continue
            label = "matrix products only" if name == "limit_gemm" else name
            lines.append(
                [
                    _spaced(shape),
                    dtype,
                    variant,
                    label,
                    _times(row, base),
                    _cpu(row, base),
                    "-" if row.role == "limit" else mebibytes(row.workspace_bytes),
                    row.note or "-",
                ]
            )
    if not lines:
        return ""
    return (
        "### Loss from hidden states and the lm_head\n\n"
        "The work includes the gradients of the hidden states and of the weight (`frozen`: only of the hidden\n"
        "states). `rows` is the share of rows with gradient. The number in brackets is the time relative to\n"
        "tokfuse. CPU is the CPU time of all threads relative to tokfuse; other load on the machine affects it\n"
        "less than the time. Workspace is the peak memory of a call without the tensors that it returns.\n\n"
    ) + _grid(
        ["tokens x hidden x vocab", "dtype", "variant", "provider", "ms (relative)", "CPU", "workspace", "note"], lines
    )


def _distillation(rows: Sequence[Row]) -> str:
    """Return one line per case of `distill_step`: the time and the workspace of every provider."""
    peers = {"trl": "TRL", "liger": "Liger", "liger_compile": "Liger, compiled", "torch_compile": "torch.compile"}
    lines = []
    for (shape, _, variant), found in _cases(rows, "distill_step").items():
        base = found.get("tokfuse")
        if base is None or not base.median_ms:
            continue
        cells = [f"{base.median_ms:.0f} ms, {mebibytes(base.workspace_bytes)}"]
        limit = found.get("limit_gemm")
        cells.append(f"{limit.median_ms / base.median_ms:.2f}x" if limit and limit.median_ms else "-")
        for name in (*peers, "torch_eager"):
            row = found.get(name)
            timed = row is not None and row.median_ms
            cells.append(f"{row.median_ms / base.median_ms:.1f}x, {mebibytes(row.workspace_bytes)}" if timed else "-")
        lines.append([_spaced(shape), variant.replace(",", ", "), *cells])
    if not lines:
        return ""
    return (
        "### Distillation from two lm_heads\n\n"
        "The work is the mean divergence and the student's gradients, of hidden states and weight, in float32.\n"
        "`teacher=2x`: the teacher's hidden size is twice the student's. Other times are relative to tokfuse. The\n"
        "memory is the peak of a call without the tensors that it returns. Liger computes no entropy.\n\n"
    ) + _grid(["tokens x hidden x vocab", "divergence", "tokfuse", "GEMMs only", *peers.values(), "torch eager"], lines)


def _price(rows: Sequence[Row]) -> str:
    lines = []
    for (shape, dtype, variant), found in _cases(rows, "influence").items():
        base = found.get("tokfuse")
        for name, label in (
            ("tokfuse", "step only"),
            ("tokfuse_norms", "with norms"),
            ("tokfuse_sketches", "with norms and sketches"),
        ):
            row = found.get(name)
            if row is None or base is None or not row.median_ms or not base.median_ms:
                continue
            cpu = f"{row.cpu_ms / base.cpu_ms:.3f}x" if row.cpu_ms and base.cpu_ms else "-"
            lines.append(
                [
                    _spaced(shape),
                    dtype,
                    variant,
                    label,
                    f"{row.median_ms:.1f}",
                    f"{row.median_ms / base.median_ms:.3f}x",
                    cpu,
                ]
            )
    if not lines:
        return ""
    heads = ["tokens x hidden x vocab", "dtype", "sketch", "step", "ms", "time", "CPU"]
    text = "The table compares a step from hidden states with and without gradient norms and sketches."
    return f"### Overhead of gradient influence\n\n{text}\n\n{_grid(heads, lines)}"


def _advantages(rows: Sequence[Row]) -> str:
    lines = []
    for (shape, _, variant), found in _cases(rows, "advantage").items():
        ours, peer = found.get("tokfuse"), found.get("torch_eager")
        if ours and peer:
            lines.append([f"`{variant}`", _spaced(shape), _times(ours, None), _times(peer, ours)])
    if not lines:
        return ""
    text = "Times are milliseconds, compared with vectorised torch code that computes the same result."
    return f"### Advantages and weights\n\n{text}\n\n" + _grid(["op", "sequences x longest", "tokfuse", "torch"], lines)


def _study(study: Sequence[dict[str, Any]]) -> str:
    if not study:
        return ""
    slices = list(dict.fromkeys(row["slice"] for row in study))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in study:
        if row["kind"] == "direction":
            text = f"{row['spearman']:.2f}"
            if row["seeds"] > 1:
                text += f" ({row['spearman_low']:.2f} to {row['spearman_high']:.2f})"
            name = f"{row['data']} ({row['samples']})"
            cells.setdefault((name, row["score"]), {})[row["slice"]] = text
    lines = [[*key, *(found.get(name, "-") for name in slices)] for key, found in cells.items()]
    first = study[0]
    readings = [
        f"- {name}: correlation with the gradients of all layers. Sketch of rank 64: {cells[name, SKETCH]['all']}; "
        f"true gradient of the lm_head: {cells[name, HEAD]['all']}; "
        f"mean hidden state (no gradient): {cells[name, NO_GRADIENT]['all']}."
        for name in dict.fromkeys(name for name, _ in cells)
        if {(name, SKETCH), (name, HEAD), (name, NO_GRADIENT)} <= set(cells)
    ]
    return (
        "### Agreement of sketches with true gradients\n\n"
        "Each sample is scored by the cosine with a validation mean. The table shows the Spearman correlation\n"
        "between this score and the score of the true per-sample gradients: of all layers, of the lm_head and\n"
        f"of the last block. Model: {first['model']}. The range in brackets is over projection seeds.\n"
        "The scores of `influence.capture` have the default layers, unless the name says otherwise.\n\n"
    ) + "\n\n".join([_grid(["data (samples)", "score", *slices], lines), "\n".join(readings)]).strip()


def _predicted(rows: Sequence[Row]) -> str:
    """Return the table of predicted GPU times. Its column heads say that they are predicted."""
    times: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        if row.status == "predicted" and row.dtype == "bfloat16" and row.median_ms:
            case = (f"`{row.op}` {row.mode}", _spaced(row.shape))
            bound = "" if row.limit_share == 1.0 else " (issue)"
            times.setdefault(case, {})[row.gpu] = f"{row.median_ms:.2f}{bound}"
    if not times:
        return ""
    gpus = list(dict.fromkeys(gpu for found in times.values() for gpu in found))
    lines = [[*case, *(found.get(gpu, "-") for gpu in gpus)] for case, found in times.items()]
    return (
        "### Predicted GPU times\n\n"
        "**Predicted, nothing ran**: milliseconds of the Triton kernels in bfloat16, computed from data sheets\n"
        "(`python -m tokfuse bench predict`). The time is the longer of bytes / bandwidth and (marked `issue`)\n"
        "instructions / issue rate of the SMs. Real runs are slower.\n\n"
    ) + _grid(["kernel", "tokens x vocab", *(f"{gpu}, predicted" for gpu in gpus)], lines)


def _growth(rows: Sequence[Row]) -> str:
    text = growth.tables(rows)
    about = "Each table varies one axis and keeps the rest constant."
    return f"### Scaling\n\n{about}\n\n{text}" if text else ""


def _machine(rows: Sequence[Row]) -> str:
    if not rows:
        return ""

    def all_of(value: Callable[[Row], object]) -> str:
        return ", ".join(dict.fromkeys(str(value(row)) for row in rows))

    commands = dict.fromkeys(re.sub(r" --(json|md)( \S+\.jsonl)?", "", r.command) for r in rows)
    return (
        "### Machine and commands\n\n"
        f"Machine: {all_of(lambda r: r.cpu_model)} ({all_of(lambda r: r.machine)}), threads "
        f"{all_of(lambda r: r.threads)}, kernels at {all_of(lambda r: r.isa)}, torch "
        f"{all_of(lambda r: r.torch)}, commits {all_of(lambda r: r.commit)}.\n"
        "The machine is a shared virtual machine. Ratios come from interleaved rounds, but other virtual machines "
        "add noise. Commands:\n\n" + "\n".join(f"- `{command}`" for command in commands)
    )
