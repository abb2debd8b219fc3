"""A copy of the repository that a test may change, and Python processes that import tokfuse from it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("api", "algorithms", "bench", "csrc", "docs", "inspection", "integrations", "runtime", "tests", "tools")
FOLDERS += ("triton_kernels",)
FILES = ("setup.py", "pyproject.toml", "README.md", "CHANGELOG.md", "mkdocs.yml")


def copied(root: Path) -> None:
    """Copy the sources of the repository, without the native module."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.png", "*.jsonl")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, root / folder, ignore=ignore)
    for file in FILES:
        shutil.copy(ROOT / file, root / file)


def linked(root: Path) -> None:
    """Make the sources of the copy importable as `tokfuse`. Call it again after a file was added."""
    python(root, "tools/typing_tree.py", ".typing")
    (root / ".typing" / "tokfuse" / "_native.py").write_text("raise ImportError('not built in the copy')\n")


def python(root: Path, *arguments: str, fails: bool = False, **environment: str) -> str:
    """Return the output of a Python process that imports tokfuse from the copy. `fails` expects exit status 1."""
    env = {**os.environ, "PYTHONPATH": str(root / ".typing"), "OMP_NUM_THREADS": "1", **environment}
    env.pop("TOKFUSE_CUDA_HOST", None)
    done = subprocess.run(
        [sys.executable, *arguments], cwd=root, env=env, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == int(fails), (done.stdout + done.stderr)[-6000:]
    return done.stdout


def tests(root: Path, *arguments: str, fails: bool = False, **environment: str) -> str:
    """Return the report of pytest in the copy, one line per test."""
    run = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    options = ("-q", "-rA", "--tb=short", "--show-capture=no", "-p", "no:cacheprovider", "-p", "no:randomly")
    return python(root, "-c", run, *options, *arguments, fails=fails, **environment)
