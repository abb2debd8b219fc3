"""Run the examples of the documentation, each in a fork of a process that has imported tokfuse.

Importing torch takes 2 s and an example takes milliseconds, so a new interpreter per example would spend its
time on imports. No fork sees what another example did.
"""

import multiprocessing
import os
import runpy
from pathlib import Path


def _main(script: str, folder: str, errors: str) -> None:
    os.chdir(folder)
    # Messages of native code go to the file descriptor, not to sys.stderr.
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    runpy.run_path(script, run_name="__main__")


def run_example(code: str, folder: Path, timeout: float = 120.0) -> tuple[int | None, str]:
    """Run code in `folder` as a program. Return (exit status, error output); the status is None after a timeout."""
    script, errors = folder / "example.py", folder / "errors.txt"
    script.write_text(code)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tokfuse", "torch._dynamo"])
    process = context.Process(target=_main, args=(str(script), str(folder), str(errors)))
    process.start()
    process.join(timeout)
    status = process.exitcode
    if status is None:
        process.kill()
        process.join()
    return status, errors.read_text() if errors.exists() else ""
