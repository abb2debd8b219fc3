"""Test the documentation: examples run, names and defaults exist, tables are current.

A fenced `python` block of a page is a program that must run unchanged. Inline code of the form
`tokfuse.name(argument=value)` states defaults.
"""

import ast
import datetime
import inspect
import re
import subprocess
from pathlib import Path

import pytest
from page_examples import run_example

import tokfuse
from tokfuse.inspection import doctor
from tokfuse.runtime.core import native

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
DOCS = ROOT / "docs"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def inline_code(page: Path) -> list[str]:
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", prose)


@pytest.mark.parametrize(
    ("page", "number"),
    [(page, n) for page in PAGES for n in range(len(blocks(page, "python")))],
    ids=lambda value: value.name if isinstance(value, Path) else str(value),
)
def test_examples_run(page: Path, number: int, tmp_path: Path):
    status, errors = run_example(blocks(page, "python")[number], tmp_path)
    assert status == 0, errors[-4000:]


@pytest.mark.parametrize(
    ("code", "status", "message"),
    [
        ("print(1)", 0, ""),
        ("import tokfuse\ntokfuse.no_such_op", 1, "no_such_op"),
        ("raise SystemExit(3)", 3, ""),
        ("import os\nos.abort()", -6, ""),
        ("import time\ntime.sleep(60)", None, ""),
    ],
)
def test_a_failing_example_is_seen(code: str, status: int | None, message: str, tmp_path: Path):
    seen, errors = run_example(code, tmp_path, timeout=60.0 if status is not None else 0.5)
    assert seen == status and message in errors


def test_the_readme_is_short():
    readme = ROOT / "README.md"
    assert len(readme.read_text().splitlines()) <= 150
    lines = [line for line in blocks(readme, "python")[0].splitlines() if line.strip() and "import" not in line]
    assert len(lines) <= 10


@pytest.mark.parametrize("code", blocks(ROOT / "README.md", "py"))
def test_trainer_examples_run(code: str, tmp_path: Path):
    """The `py` blocks need a trainer. They are installed by `make test TEST_GROUPS="test demo hosts"`."""
    host = {"trl": "trl", "hf": "transformers"}[code.split(" import ")[1].split()[0]]
    pytest.importorskip(host)
    model = (
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)\n"
        "model = LlamaForCausalLM(LlamaConfig(**sizes))\n"
    )
    status, errors = run_example(model * (host == "transformers") + code, tmp_path)
    assert status == 0, errors[-4000:]


def quoted_calls() -> list[tuple[str, str]]:
    """Return (page, code) of every inline `tokfuse.` expression."""
    return [
        (name, code)
        for name, page in zip(IDS, PAGES, strict=True)
        for code in inline_code(page)
        if re.fullmatch(r"tokfuse(\.\w+)+(\(.*\))?", code)
    ]


@pytest.mark.parametrize(("page", "code"), quoted_calls())
def test_quoted_names_and_defaults_exist(page: str, code: str):
    tree = ast.parse(code, mode="eval").body
    call = tree if isinstance(tree, ast.Call) else None
    path = ast.unparse(call.func if call else tree).split(".")[1:]
    if path[:2] == ["_native", "cuda"] and not hasattr(native.module(), "cuda"):
        pytest.skip("the native module is built without CUDA")
    value: object = tokfuse
    for position, part in enumerate(path):
        if not hasattr(value, part):  # a sub-package that is not imported yet
            __import__(".".join(["tokfuse", *path[: position + 1]]))
        value = getattr(value, part)
    for keyword in call.keywords if call else ():
        parameters = inspect.signature(value).parameters  # type: ignore[arg-type]
        assert keyword.arg in parameters, f"{page}: {code}: no argument {keyword.arg}"
        stated = ast.literal_eval(keyword.value)
        assert parameters[keyword.arg].default == stated, f"{page}: {code}: another default"


def test_support_table_is_current():
    page = (DOCS / "backends.md").read_text()
    written = page.split(doctor.SUPPORT_BEGIN)[1].split(doctor.SUPPORT_END)[0].strip()
    assert written == doctor.markdown(), "run `python -m tokfuse doctor --markdown docs/backends.md`"


def test_environment_table_is_current():
    page = (DOCS / "configuration.md").read_text()
    assert dict(re.findall(r"^\| `([A-Z_]+)` \| (.*) \|$", page, re.MULTILINE)) == doctor.ENVIRONMENT
    assert set(re.findall(r"`([A-Z_]{3,})`", page.split("\n## ")[1])) == set(doctor.ENVIRONMENT)


def test_folder_map_is_complete():
    page = (DOCS / "layout.md").read_text()
    listed = set(re.findall(r"^\| `(\w+)/` \|", page, re.MULTILINE))
    rooms = set(re.findall(r"^\| `runtime/(\w+)/` \|", page, re.MULTILINE))
    assert rooms == {path.parent.name for path in (ROOT / "runtime").glob("*/__init__.py")}
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    folders = {name.split("/")[0] for name in done.stdout.splitlines() if "/" in name}
    assert {folder for folder in folders if not folder.startswith(".")} == listed | {"docs"} & folders


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_quoted_targets_and_files_exist(page: Path):
    makefile = (ROOT / "Makefile").read_text()
    text = page.read_text()
    for target in re.findall(r"(?:`|^)make ([\w-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"no target {target}"
    for code in inline_code(page):
        if re.fullmatch(r"\.?\w[\w./-]*\.(py|md|txt|toml|h|cpp|sh)", code) and "/" in code:
            assert (ROOT / code).is_file(), f"{code} does not exist"
    for link in re.findall(r"\]\((?!https?:)([^)#]+)|(?:src|srcset)=\"([^\"]+)\"", text):
        assert (page.parent / (link[0] or link[1])).exists(), f"broken link {link}"


def test_the_version_is_the_same_everywhere():
    stated = {"pyproject.toml": r'^version = "(.+)"', "CITATION.cff": r"^version: (.+)", "CHANGELOG.md": r"^## (\S+)"}
    for file, pattern in stated.items():
        found = re.search(pattern, (ROOT / file).read_text(), re.MULTILINE)
        assert found and found[1] == tokfuse.__version__, file


def test_the_date_of_a_release_is_the_same_everywhere():
    """In the changelog and the citation. A version without a release is "unreleased" and has no date."""
    changelog = re.search(r"^## \S+ \((.+)\)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = re.search(r'^date-released: "(.+)"', (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert changelog and (changelog[1] == "unreleased" or datetime.date.fromisoformat(changelog[1]))
    assert (citation[1] if citation else "unreleased") == changelog[1]
