"""Writes `.typing/tokfuse`, a tree of symbolic links that type checkers can read.

    python tools/typing_tree.py [FOLDER]

The editable install finds packages by an import hook, which mypy and pyright do not follow. The
tree has the folders under their import names; pyproject.toml and editors point at `.typing`. On
PYTHONPATH a tree comes before the install, so another build of the native module, put into it, is
the one that is imported (`make test-sanitize`).
"""

import ast
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def package_dirs() -> dict[str, str]:
    """The literal `PACKAGE_DIR` of setup.py, read without running it."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "PACKAGE_DIR":
            table: dict[str, str] = ast.literal_eval(node.value)
            return table
    raise SystemExit("setup.py must assign PACKAGE_DIR at top level.")


def wanted_links() -> dict[str, Path]:
    """Relative place in the tree -> the file or folder it stands for."""
    links = {}
    for package, folder in package_dirs().items():
        source = ROOT / folder
        if "." not in package:
            for file in source.iterdir():
                if file.suffix in (".py", ".pyi", ".typed"):
                    links[f"{package}/{file.name}"] = file
        elif package.count(".") == 1:  # a deeper package lies inside the folder of its parent
            links[package.replace(".", "/")] = source
    return links


def write_tree(tree: Path) -> None:
    """Make `tree` hold exactly the wanted links; leaves a tree that is right untouched."""
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
