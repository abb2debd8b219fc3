"""Compare two benchmark files by the share of the limit: `python -m tokfuse bench compare OLD NEW`.

Other load on a shared machine changes the seconds of a run. The share of a limit that was timed in the
same rounds changes much less. A case fails if its share decreased by more than the tolerance. OLD and
NEW are files of `bench --json` or of `pytest bench --benchmark-json`.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from tokfuse.bench.row import Row, check_one_machine
from tokfuse.bench.verdict import Verdict

TOLERANCE = 0.15
Case = tuple[str, ...]


def read(file: Path) -> dict[Case, Row]:
    """Return the tokfuse rows of a file by case. A later row of a case replaces an earlier one.

    Raises:
        ValueError: the file has neither format.
    """
    text = file.read_text(encoding="utf-8")
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        whole = None  # JSON lines
    if isinstance(whole, dict) and "benchmarks" in whole:
        values = [bench["extra_info"] for bench in whole["benchmarks"]]
    else:
        try:
            values = [json.loads(line) for line in text.splitlines() if line.strip()]
        except json.JSONDecodeError as error:
            raise ValueError(
                f"bench: {file} must be JSON lines of `bench --json`, or a file of `--benchmark-json`; got {error}."
            ) from error
    rows = [Row.from_json(json.dumps(v)) for v in values if "provider" in v and "schema" in v]
    return {
        (r.op, r.mode, r.variant, r.shape, r.dtype, r.device, r.provider, str(r.threads)): r
        for r in rows
        if r.role == "ours" and r.status == "pass" and r.limit_share
    }


def compare(old: Mapping[Case, Row], new: Mapping[Case, Row], tolerance: float = TOLERANCE) -> list[Verdict]:
    """Return one verdict for each case that is in both files.

    Raises:
        ValueError: the rows come from different machines.
    """
    check_one_machine([*old.values(), *new.values()], "both files")
    verdicts = []
    for case in [case for case in old if case in new]:
        before, after = old[case].limit_share or 0.0, new[case].limit_share or 0.0
        kept = after >= before * (1 - tolerance)
        limits = dict.fromkeys((old[case].limit, new[case].limit))
        text = f"{before:.3f} -> {after:.3f} of {' / '.join(limits)} ({after / before - 1:+.1%})"
        verdicts.append(Verdict("kept" if kept else "FELL", " ".join(case), text, kept))
    return verdicts
