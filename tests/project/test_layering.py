"""Test the rules of the folder structure.

Imports go one way: api -> integrations -> algorithms -> runtime -> triton_kernels | csrc; bench may import
anything. csrc includes no torch header. Each folder has only one import name. The rules are checked on the source
text if possible, so that modules which cannot be imported here are checked too.
"""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import tokfuse
from tokfuse.runtime.core import native

ROOT = Path(__file__).resolve().parents[2]
# layer -> the other layers that it may import
MAY_IMPORT = {
    "api": {"integrations", "algorithms", "runtime", "triton_kernels", "native", "inspection"},
    "integrations": {"algorithms", "runtime", "triton_kernels", "native"},
    "algorithms": {"runtime", "triton_kernels", "native"},
    "runtime": {"triton_kernels", "native"},
    "triton_kernels": set(),
    "inspection": {"algorithms", "runtime", "triton_kernels", "native"},
    "bench": {"api", "integrations", "algorithms", "runtime", "triton_kernels", "native", "inspection"},
}
# Kernel files with several ops, or with parts of ops: file stem -> its ops.
SHARED_KERNELS = {"scan": {"gae", "vtrace"}}
# Ops that are specified as the composition of simpler ops, whose references they use.
COMPOSED = {
    "policy_step": {"token_stats", "policy_loss"},
    "policy_step_hidden": {"linear_token_stats", "policy_loss"},
    "linear_token_stats_at": {"linear_token_stats", "token_stats_at"},
    "distill_step": {"linear_paired_divergence"},
    "linear_cross_entropy": {"linear_token_stats", "cross_entropy"},
}
# Ops with their own rows in the doctor's table that are called through another public name.
CALLED_THROUGH = {
    "policy_step_hidden": "policy_step",
    "token_stats_at": "token_stats",
    "linear_token_stats_at": "linear_token_stats",
}
# Modules of ops/ that use the capability records of another op.
WITHOUT_ROWS = {"unit_step", "distill_terms"}


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
    """Return every import of a file; `from tokfuse import name` counts as `tokfuse.name`."""
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
    """Return the layer of an imported module; None for a module of another package."""
    parts = module.split(".")
    if parts[0] != "tokfuse":
        return None
    if len(parts) > 1 and parts[1] == "_native":
        return "native"
    return parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else "api"


def all_imports() -> list[tuple[str, Import]]:
    return [(layer, one) for layer in MAY_IMPORT for file in sources(layer) for one in imports(file)]


# Folders of runtime/. Each one imports only those to its left.
ROOMS = ("core", "policy", "reference", "backends", "lm_head", "ops", "distributed")


def modules() -> dict[str, Path]:
    """Return import name -> file of every module of the package."""
    found = {}
    for layer in MAY_IMPORT:
        for file in sources(layer):
            parts = file.relative_to(ROOT / layer).with_suffix("").parts
            name = ".".join(("tokfuse", *(() if layer == "api" else (layer,)), *parts))
            found[name.removesuffix(".__init__")] = file
    return found


def import_graph() -> dict[str, set[str]]:
    """Return module -> the modules of the package that it imports anywhere, also under TYPE_CHECKING."""
    files = modules()
    graph: dict[str, set[str]] = {}
    for name, file in files.items():
        edges = graph[name] = set()
        for node in ast.walk(ast.parse(file.read_text(), str(file))):
            if isinstance(node, ast.Import):
                edges |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                whole = {f"{node.module}.{alias.name}" for alias in node.names}
                edges |= {x if x in files else node.module for x in whole}
        edges.intersection_update(files)
        edges.discard(name)
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return modules that import each other: the modules that remain after repeatedly removing ends."""
    left = {name: set(edges) for name, edges in graph.items()}
    while ends := [name for name, edges in left.items() if not edges & left.keys()]:
        for name in ends:
            del left[name]
    # A module that only leads to a circle is not a part of it.
    while starts := [name for name in left if not any(name in edges for edges in left.values())]:
        for name in starts:
            del left[name]
    return [[name, *sorted(edges & left.keys())] for name, edges in sorted(left.items())]


def test_no_circle_of_imports():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"], ["c", "b"]]
    found = circles(import_graph())
    assert not found, "\n".join(f"{name} imports {', '.join(others)}" for name, *others in found)


def test_rooms_of_the_runtime_are_in_order():
    rooms = {f"tokfuse.runtime.{room}": place for place, room in enumerate(ROOMS)}

    def place(module: str) -> int | None:
        return rooms.get(".".join(module.split(".")[:3]))

    wrong = [
        f"{name} imports {other}"
        for name, others in import_graph().items()
        for other in sorted(others)
        if (own := place(name)) is not None and (there := place(other)) is not None and there > own
    ]
    assert not wrong, "\n".join(wrong)
    folders = {f.name for f in (ROOT / "runtime").iterdir() if f.is_dir() and f.name != "__pycache__"}
    assert folders == set(ROOMS) and [f.name for f in (ROOT / "runtime").glob("*.py")] == ["__init__.py"]


def test_the_runtime_holds_nothing_but_what_a_call_runs_through():
    """Every module of a folder of runtime/ is reachable from a public name through imports."""
    graph = import_graph()
    reached: set[str] = set()
    front = ["tokfuse.distributed", "tokfuse.influence", "tokfuse.algorithms", *set(tokfuse._PUBLIC.values())]
    while front:
        name = front.pop()
        if name not in reached:
            reached.add(name)
            front += graph[name]
    packages = {f"tokfuse.runtime.{room}" for room in ROOMS} | {"tokfuse.runtime"}
    rooms = {name for name in graph if name.startswith("tokfuse.runtime.")}
    assert not rooms - reached - packages


def test_no_private_name_crosses_a_module():
    """Neither imported nor accessed through an imported module. Tests may do this."""
    wrong = []
    files = modules()
    for name, file in files.items():
        tree = ast.parse(file.read_text(), str(file))
        bound = {}  # local name of an imported module of the package
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tokfuse":
                for alias in node.names:
                    if f"{node.module}.{alias.name}" in files:
                        bound[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                    if alias.name.startswith("_") and alias.name != "_native":
                        wrong.append(f"{name}:{node.lineno} imports {node.module}.{alias.name}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in bound:
                if node.attr.startswith("_") and not node.attr.startswith("__"):
                    wrong.append(f"{name}:{node.lineno} reads {bound[node.value.id]}.{node.attr}")
    assert not wrong, "\n".join(wrong)


def test_only_listed_packages():
    """setup.py maps every folder with Python code, and no other folder."""
    listed = ast.literal_eval(re.search(r"PACKAGE_DIR = (\{.*?\n\})", (ROOT / "setup.py").read_text(), re.S)[1])
    folders = {file.parent.relative_to(ROOT).as_posix() for layer in MAY_IMPORT for file in sources(layer)}
    assert folders == set(listed.values())
    assert all(f"tokfuse.{folder.replace('/', '.')}" == name for name, folder in listed.items() if folder != "api")


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
    """Return the output of a new interpreter, outside the repository."""
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


@pytest.mark.skipif(native.eager() is None, reason="no native module, or a torch without the DLPack exchange API")
def test_a_plain_call_runs_through_four_files():
    """A reader of token_stats on the CPU follows these modules and then the native function."""
    code = """
import sys, torch, tokfuse
logits, target = torch.zeros(2, 5), torch.tensor([0, 1])
tokfuse.token_stats(logits, target)
names = set()
def note(frame, event, argument):
    if event == "call":
        names.add(frame.f_globals.get("__name__", ""))
sys.setprofile(note)
tokfuse.token_stats(logits, target)
sys.setprofile(None)
print(*sorted(name for name in names if name.startswith("tokfuse.")))
"""
    assert run_python(code).split() == [
        "tokfuse.runtime.core.forced",
        "tokfuse.runtime.core.native",
        "tokfuse.runtime.core.ranges",
        "tokfuse.runtime.ops.token_stats",
    ]


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


def public() -> dict[str, object]:
    """Return every public name of the package, of its public modules and of the preference losses."""
    found = {name: getattr(tokfuse, name) for name in tokfuse._PUBLIC}
    for module in ("distributed", "influence"):
        of_module = importlib.import_module(f"tokfuse.{module}")
        found |= {f"{module}.{name}": getattr(of_module, name) for name in of_module.__all__}
    return found | {"algorithms.preference_step": tokfuse.algorithms.preference_step}


@pytest.mark.parametrize("name", sorted(public()))
def test_public_names_are_documented(name: str):
    """The docstring of a function documents each of its arguments."""
    value = public()[name]
    text = inspect.getdoc(value)
    assert text, f"{name} has no docstring"
    assert not text.startswith(f"{name}("), f"the docstring of {name} was made by a decorator"
    if inspect.isfunction(value):
        arguments = inspect.signature(value).parameters
        missing = [p for p in arguments if not re.search(rf"^ +[\w, ]*\b{p}\b[\w, ]*:", text, re.MULTILINE)]
        assert not missing, f"{name}: undocumented {missing}"


def test_public_names_are_known_to_type_checkers():
    """The lazy table and the imports under TYPE_CHECKING contain the same names."""
    typed = {}
    for node in ast.walk(ast.parse((ROOT / "api" / "__init__.py").read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tokfuse."):
            for alias in node.names:
                assert alias.asname == alias.name, "`as` marks a re-export"
                typed[alias.name] = node.module
    assert typed == tokfuse._PUBLIC


def test_version_is_stated_once_and_for_all():
    assert f'version = "{tokfuse.__version__}"' in (ROOT / "pyproject.toml").read_text()


# --------------------------------------------------------------------------- one file name per op


def stems(folder: str, pattern: str) -> set[str]:
    return {f.stem for f in (ROOT / folder).glob(pattern) if not f.stem.startswith("_")}


def test_every_op_has_a_reference_and_a_test_of_its_name():
    ops = stems("runtime/ops", "*.py") - WITHOUT_ROWS
    assert ops
    references = stems("runtime/reference", "*.py")
    assert not {op for op in ops if not COMPOSED.get(op, {op}) <= references}
    tests = {stem.removeprefix("test_") for stem in stems("tests/ops", "test_*.py")}
    assert not {CALLED_THROUGH.get(op, op) for op in ops} - tests, "ops without tests/ops/test_<op>.py"


def test_every_op_is_public():
    ops = stems("runtime/ops", "*.py") - WITHOUT_ROWS
    assert not {CALLED_THROUGH.get(op, op) for op in ops} - set(tokfuse.__all__)


@pytest.mark.parametrize(
    ("folder", "pattern"), [("csrc/cpu", "*.cpp"), ("csrc/cuda", "*.cu"), ("triton_kernels", "*.py")]
)
def test_kernel_files_are_named_after_their_op(folder: str, pattern: str):
    ops = stems("runtime/ops", "*.py") - WITHOUT_ROWS
    for file in (ROOT / folder).glob(pattern):
        is_kernel = file.suffix != ".py" or "_fwd_kernel" in file.read_text()
        if is_kernel and file.stem not in ops:
            assert SHARED_KERNELS.get(file.stem, {file.stem}) <= ops, file


# ------------------------------------------------------------------------ source text of the files


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
    """Papers and code; no address of a machine, and one package index: PyTorch's, in one file."""
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
    namespaces = {"www.w3.org", "purl.org", "creativecommons.org"}  # names in a picture, not links
    found = [
        f"{file.relative_to(ROOT)}: {host}"
        for file in project_files()
        for host in re.findall(r"https?://([^/\s\"'`<>)]+)", file.read_text())
        if host not in hosts and (file, host) != torch_index and not (file.suffix == ".svg" and host in namespaces)
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
