"""Write `.typing/tokfuse`, a tree of symbolic links that type checkers can read.

    python tools/typing_tree.py [FOLDER]

The editable install finds packages by an import hook, which mypy and pyright do not follow. The tree
contains the folders under their import names. pyproject.toml and editors point to `.typing`. If a tree
is on PYTHONPATH, Python imports it before the installed package. `make test-sanitize` uses this to
import another build of the native module.
"""

import ast
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def package_dirs() -> dict[str, str]:
    """Return the literal `PACKAGE_DIR` of setup.py without running setup.py."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "PACKAGE_DIR":
            table: dict[str, str] = ast.literal_eval(node.value)
            return table
    raise SystemExit("setup.py must assign PACKAGE_DIR at top level.")


def wanted_links() -> dict[str, Path]:
    """Return the target file or folder of each relative path in the tree."""
    links = {}
    for package, folder in package_dirs().items():
        source = ROOT / folder
        if "." not in package:
            for file in source.iterdir():
                if file.suffix in (".py", ".pyi", ".typed"):
                    links[f"{package}/{file.name}"] = file
        elif package.count(".") == 1:  # the link of the parent folder contains the deeper packages
            links[package.replace(".", "/")] = source
    return links


def write_tree(tree: Path) -> None:
    """Make `tree` contain exactly the wanted links. A correct tree is not rewritten."""
    wanted = wanted_links()
    present = {str(path.relative_to(tree)): path.readlink() for path in tree.glob("*/*") if path.is_symlink()}
    if present == wanted:
        return
    if tree.exists():
        shutil.rmtree(tree)
    for place, source in wanted.items():
        (tree / place).parent.mkdir(parents=True, exist_ok=True)
        (tree / place).symlink_to(source)


if __name__ == "__main__":
    write_tree(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / ".typing")
