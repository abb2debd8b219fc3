"""The folder of one run: settings, result rows, checkpoint. Also stops a run without losing work."""

import dataclasses
import json
import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import torch


class RunFolder:
    """Files of one run.

    metrics.jsonl   one row per step, flushed immediately
    checkpoint.pt   model, optimizer, random state, settings and position: enough to resume exactly
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.checkpoint = path / "checkpoint.pt"

    def start(self) -> None:
        """Create the folder of a new run. Exit if it already contains a run."""
        if self.metrics.exists() or self.checkpoint.exists():
            raise SystemExit(
                f"train_grpo: {self.path} already holds a run. "
                f"Resume it with `--resume {self.path}`, or choose another --out."
            )
        self.path.mkdir(parents=True, exist_ok=True)

    def rows(self) -> list[dict[str, Any]]:
        """Return the result rows written so far."""
        if not self.metrics.exists():
            return []
        return [json.loads(line) for line in self.metrics.read_text().splitlines()]

    def append(self, row: dict[str, Any]) -> None:
        """Append one row. It is on disk when this returns."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def keep_rows_before(self, step: int) -> None:
        """Delete rows of steps after the checkpoint, because these steps will run again."""
        rows = [row for row in self.rows() if row["step"] < step]
        write_atomically(self.metrics, lambda path: path.write_text("".join(json.dumps(r) + "\n" for r in rows)))

    def save(self, state: dict[str, Any]) -> None:
        """Write the checkpoint. If the write is interrupted, the previous checkpoint remains."""
        write_atomically(self.checkpoint, lambda path: torch.save(state, path))

    def load(self) -> dict[str, Any]:
        """Read the checkpoint."""
        if not self.checkpoint.exists():
            raise SystemExit(
                f"train_grpo: --resume {self.path} has no checkpoint.pt. A run writes it on Ctrl-C, and with "
                "--save-every also at its end and every that many steps."
            )
        return torch.load(self.checkpoint, weights_only=True)


def write_atomically(path: Path, write: Any) -> None:
    """Call `write(temporary path)`, then rename the result to `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class StopRequest:
    """Within `with StopRequest() as stop:`, Ctrl-C sets `stop.asked` instead of interrupting.

    An interrupted optimizer update could not be resumed exactly, so the current step is finished first. A second Ctrl-C
    interrupts immediately.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "StopRequest":
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nStopping after this step, then saving. Press Ctrl-C again to stop immediately.", flush=True)


def merge_settings(saved: Any, given: dict[str, Any], free: set[str]) -> Any:
    """Return the settings of a resumed run: the saved ones, with the given options in `free` replaced.

    Any other given option must have its saved value.
    """
    changed = [
        f"--{name.replace('_', '-')} {getattr(saved, name)}"
        for name, value in given.items()
        if name not in free and value != getattr(saved, name)
    ]
    if changed:
        raise SystemExit(
            f"train_grpo: the run to resume was started with {', '.join(changed)}. "
            "Leave these options out, or start a new run."
        )
    return dataclasses.replace(saved, **{n: v for n, v in given.items() if n in free})
