"""The rules that hold the folders together.

Imports go one way: api -> integrations -> algorithms -> runtime -> triton_kernels | csrc; bench may
import anything. No torch header in csrc. A folder is known by one import name only. Read from the
source text where possible, so that a module that cannot be imported here is checked as well.
"""

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import tokfuse

ROOT = Path(__file__).resolve().parents[2]
# layer -> the layers that it may import besides itself
MAY_IMPORT = {
    "api": {"integrations", "algorithms", "runtime", "triton_kernels", "native", "inspection"},
    "integrations": {"algorithms", "runtime", "triton_kernels", "native"},
    "algorithms": {"runtime", "triton_kernels", "native"},
    "runtime": {"triton_kernels", "native"},
    "triton_kernels": set(),
    "inspection": {"runtime", "triton_kernels", "native"},
    "bench": {"api", "integrations", "algorithms", "runtime", "triton_kernels", "native", "inspection"},
}
# Kernel files that hold several ops, or parts of them: file stem -> ops it serves.
SHARED_KERNELS = {"scan": {"gae", "vtrace"}}
# Ops specified as the composition of simpler ones, whose references are theirs.
COMPOSED = {
    "policy_step": {"token_stats", "policy_loss"},
    "policy_step_hidden": {"linear_token_stats", "policy_loss"},
    "unit_step": {"linear_token_stats"},
}
# Ops that have their own rows in the doctor's table and are called through another public name.
CALLED_THROUGH = {"policy_step_hidden": "policy_step", "unit_step": "linear_token_stats"}


class Import(NamedTuple):
    """One import statement of the package."""

    file: Path
    line: int
    module: str
    relative: bool

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.module}"


def sources(layer: str) -> list[Path]:
    return sorted((ROOT / layer).rglob("*.py"))


def imports(file: Path) -> Iterator[Import]:
    """Every import of a file; `from tokfuse import name` counts as `tokfuse.name`."""
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name, False)
        elif isinstance(node, ast.ImportFrom):
            if node.module == "tokfuse" or node.module is None:
                for alias in node.names:
                    yield Import(file, node.lineno, f"tokfuse.{alias.name}", node.level > 0)
            else:
                yield Import(file, node.lineno, node.module, node.level > 0)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant):
                    yield Import(file, node.lineno, str(argument.value), False)


def layer_of(module: str) -> str | None:
    """The layer of an imported module, None for a module of someone else."""
    parts = module.split(".")
    if parts[0] != "tokfuse":
        return None
    if len(parts) > 1 and parts[1] == "_native":
        return "native"
    return parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else "api"


def all_imports() -> list[tuple[str, Import]]:
    return [(layer, one) for layer in MAY_IMPORT for file in sources(layer) for one in imports(file)]


def test_imports_go_one_way():
    wrong = [
        str(one)
        for layer, one in all_imports()
        if (target := layer_of(one.module)) not in (None, layer) and target not in MAY_IMPORT[layer]
    ]
    assert not wrong, "\n".join(wrong)


def test_imports_are_absolute_and_by_package_name():
    wrong = [str(one) for _, one in all_imports() if one.relative or one.module.split(".")[0] in (*MAY_IMPORT, "csrc")]
    assert not wrong, "\n".join(wrong)


def test_triton_kernels_import_torch_triton_and_themselves_only():
    allowed = {"torch", "triton", "tokfuse", "__future__", *sys.stdlib_module_names}
    wrong = [
        str(one)
        for file in sources("triton_kernels")
        for one in imports(file)
        if one.module.split(".")[0] not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_algorithms_hold_no_device_code():
    wrong = [
        str(one) for file in sources("algorithms") for one in imports(file) if one.module.split(".")[0] == "triton"
    ]
    assert not wrong, "\n".join(wrong)


def test_native_code_includes_no_torch_header():
    pattern = re.compile(r"^\s*#\s*include\s*[<\"](torch|ATen|c10)/", re.MULTILINE)
    files = [file for file in (ROOT / "csrc").rglob("*") if file.is_file()]
    assert files
    assert not [str(file) for file in files if pattern.search(file.read_text())]


def run_python(code: str) -> str:
    """Output of a fresh interpreter, away from the repository."""
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip()


def test_import_touches_nothing():
    """`import tokfuse` loads no framework, and the public names open no driver."""
    code = """
import sys
opened = []
def audit(event, arguments):
    if event in ("open", "ctypes.dlopen"):
        opened.append(str(arguments[0]))
sys.addaudithook(audit)
import tokfuse
heavy = {"torch", "triton", "numpy"} & set(sys.modules)
assert not heavy, f"imported {heavy}"
for name in tokfuse.__all__:
    getattr(tokfuse, name)
import torch
assert not torch.cuda.is_initialized()
drivers = [file for file in opened if "/dev/nvidia" in file or "libcuda.so" in file]
assert not drivers, drivers
"""
    run_python(code)


def test_folders_are_known_by_one_name_only():
    code = f"""
import importlib, pkgutil, sys
import tokfuse
for module in pkgutil.walk_packages(tokfuse.__path__, "tokfuse."):
    if module.name.endswith(("__main__", ".conftest")) or ".bench_" in module.name:
        continue
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        assert not (error.name or "").startswith("tokfuse"), error
print(sorted({set(MAY_IMPORT)!r} & set(sys.modules)))
"""
    assert run_python(code) == "[]"
    assert not set(MAY_IMPORT) & set(sys.modules), "a test imported a folder by its folder name"


@pytest.mark.parametrize("name", sorted(tokfuse._PUBLIC))
def test_public_names_are_importable_and_documented(name: str):
    value = getattr(tokfuse, name)
    text = inspect.getdoc(value)
    assert text, f"{name} has no docstring"
    assert not text.startswith(f"{name}("), f"the docstring of {name} was made by a decorator"
    if inspect.isfunction(value):
        # "keywords as in policy_loss" is documentation too, where policy_loss documents them.
        others = [other for other in tokfuse._PUBLIC if re.search(rf"\b{other}\b", text)]
        text += "".join(inspect.getdoc(getattr(tokfuse, other)) or "" for other in others)
        missing = [p for p in inspect.signature(value).parameters if not re.search(rf"\b{p}\b", text)]
        assert not missing, f"{name}: undocumented {missing}"


def test_public_names_are_known_to_type_checkers():
    """The lazy table and the imports under TYPE_CHECKING name the same things."""
    typed = {}
    for node in ast.walk(ast.parse((ROOT / "api" / "__init__.py").read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tokfuse."):
            for alias in node.names:
                assert alias.asname == alias.name, "`as` marks a re-export"
                typed[alias.name] = node.module
    assert typed == tokfuse._PUBLIC


def test_version_is_stated_once_and_for_all():
    assert f'version = "{tokfuse.__version__}"' in (ROOT / "pyproject.toml").read_text()


# ------------------------------------------------------------------------------- one stem, one op


def stems(folder: str, pattern: str) -> set[str]:
    return {f.stem for f in (ROOT / folder).glob(pattern) if not f.stem.startswith("_")}


def test_every_op_has_a_reference_and_a_test_of_its_name():
    ops = stems("runtime/ops", "*.py")
    assert ops
    references = stems("runtime/reference", "*.py")
    assert not {op for op in ops if not COMPOSED.get(op, {op}) <= references}
    tests = {stem.removeprefix("test_") for stem in stems("tests/ops", "test_*.py")}
    assert not {CALLED_THROUGH.get(op, op) for op in ops} - tests, "ops without tests/ops/test_<op>.py"


def test_every_op_is_public():
    ops = stems("runtime/ops", "*.py")
    assert not {CALLED_THROUGH.get(op, op) for op in ops} - set(tokfuse.__all__)


@pytest.mark.parametrize(
    ("folder", "pattern"), [("csrc/cpu", "*.cpp"), ("csrc/cuda", "*.cu"), ("triton_kernels", "*.py")]
)
def test_kernel_files_are_named_after_their_op(folder: str, pattern: str):
    ops = stems("runtime/ops", "*.py")
    for file in (ROOT / folder).glob(pattern):
        is_kernel = file.suffix != ".py" or "_fwd_kernel" in file.read_text()
        if is_kernel and file.stem not in ops:
            assert SHARED_KERNELS.get(file.stem, {file.stem}) <= ops, file


# --------------------------------------------------------------------------- the text of the files


def project_files() -> list[Path]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in sorted(set(done.stdout.splitlines()))]
    return [f for f in files if f.is_file() and f.suffix not in (".png", ".npz", ".pt")]


def test_files_name_no_place_of_one_machine():
    places = "|".join(("work", "root", "home", "opt", "mnt", "Users"))
    pattern = re.compile(rf"(?<![\w.\-/*~$}})]){'/'}({places})/\w")
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for file in project_files()
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, "\n".join(found)


def test_links_lead_to_sources_only():
    """Papers and code; no address of one machine, and one index of packages: PyTorch's own, in one file."""
    hosts = {
        "arxiv.org",
        "doi.org",
        "github.com",
        "huggingface.co",
        "openreview.net",
        "pytorch.org",
        "docs.pytorch.org",
        "docs.nvidia.com",
        "triton-lang.org",
        "www.apache.org",
        "aclanthology.org",
        "proceedings.mlr.press",
        "www.kernel.org",
    }
    torch_index = (ROOT / "tools" / "torch_build.py", "download.pytorch.org")
    found = [
        f"{file.relative_to(ROOT)}: {host}"
        for file in project_files()
        for host in re.findall(r"https?://([^/\s\"'`<>)]+)", file.read_text())
        if host not in hosts and (file, host) != torch_index
    ]
    assert not found, "\n".join(found)


def test_every_module_says_what_it_is():
    wrong = [
        str(file.relative_to(ROOT))
        for layer in (*MAY_IMPORT, "tests", "tools", "examples")
        for file in sources(layer)
        if file.read_text().strip() and not ast.get_docstring(ast.parse(file.read_text()))
    ]
    assert not wrong, "\n".join(wrong)
