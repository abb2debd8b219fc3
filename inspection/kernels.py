"""`python -m tokfuse kernels [--cuda]`: print, check or write the resource tables of the compiled kernels."""

import argparse
import sys
from collections.abc import Sequence

from tokfuse.inspection import cuda_table, kernel_table, roofline, tables


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    out = argparse.ArgumentParser(
        prog="python -m tokfuse kernels",
        description="Show registers, spills and instructions per element of the kernels. No GPU is needed.",
        epilog="example: python -m tokfuse kernels policy_step",
    )
    form = out.add_mutually_exclusive_group()
    form.add_argument("--check", action="store_true", help="compile the kernels and compare them with the table")
    form.add_argument("--write", action="store_true", help="compile the changed kernels and write the table")
    out.add_argument("--cuda", action="store_true", help="inspect the CUDA kernels of the native module")
    out.add_argument("cases", nargs="*", help="only cases whose name starts with one of these")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    command = parser()
    options = command.parse_args(argv)
    if options.cuda:
        if options.cases:
            command.error("--cuda reads the whole module and takes no cases; remove the cases")
        return _cuda(options.check, options.write)
    return _triton(options.cases, options.check, options.write)


def _triton(cases: Sequence[str], check: bool, write: bool) -> int:
    rows = kernel_table.compile_all(cases, known=kernel_table.committed() if write else ())
    if not rows:
        known = ", ".join(dict.fromkeys(row.case for row in kernel_table.committed()))
        what = f"no case begins with {' or '.join(cases)}. The cases are {known}."
        print(f"python -m tokfuse kernels: error: {what}", file=sys.stderr)
        return 2
    if write:
        if cases:
            kept = [r for r in kernel_table.committed() if not r.case.startswith(tuple(cases))]
            rows = [*kept, *rows]
        kernel_table.TABLE.write_text(kernel_table.as_json(rows))
        kernel_table.PAGE.parent.mkdir(exist_ok=True)
        kernel_table.PAGE.write_text(kernel_table.as_markdown(rows))
        print(f"wrote {kernel_table.TABLE} and {kernel_table.PAGE}")
        return 0
    tables.show(kernel_table.as_markdown(rows).rstrip("\n"), *kernel_table.as_tables(rows))
    if not check:
        return 0
    before = [r for r in kernel_table.committed() if not cases or r.case.startswith(tuple(cases))]
    found = kernel_table.differences(rows, before)
    print("\n".join(found) or "no difference from the table", file=sys.stderr)
    return 1 if found else 0


def _cuda(check: bool, write: bool) -> int:
    rows = cuda_table.read_module()
    if write:
        cuda_table.TABLE.write_text(cuda_table.as_json(rows))
        roofline.PAGE.write_text(roofline.as_markdown(rows))
        print(f"wrote {cuda_table.TABLE} and {roofline.PAGE}")
        return 0
    lines = [
        f"{k.key}: {k.registers} registers, {k.stack_bytes} B stack, {k.shared_bytes} B "
        f"shared, {k.threads} threads, {k.per_element:.1f} instructions per element"
        for k in rows
    ]
    cells = [
        [k.key, *map(str, (k.registers, k.stack_bytes, k.shared_bytes, k.threads)), f"{k.per_element:.1f}"]
        for k in rows
    ]
    heads = ["kernel", "registers", "stack B", "shared B", "threads", "instructions per element"]
    tables.show("\n".join(lines), tables.Table(heads, cells, numbers=heads[1:]))
    found = cuda_table.differences(rows, cuda_table.committed()) if check else []
    print("\n".join(found), file=sys.stderr)
    return 1 if found else 0
