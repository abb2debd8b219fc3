"""Write the table of shapes (runtime/policy/shapes.py) for the kernels.

    python tools/write_shapes.py [--check]

C++ and CUDA read csrc/common/shapes.h, and Triton reads triton_kernels/shape_codes.py. Both contain the
codes of the shapes, levels and KL estimators, the names of the parameter slots, and the shapes that need
a signal. With --check the script writes nothing and returns exit status 1 if a file is out of date.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from tokfuse.runtime.policy.objective import KL_ESTIMATORS, LEVELS
from tokfuse.runtime.policy.shapes import SHAPES, SLOTS, Shape

ROOT = Path(__file__).resolve().parent.parent
NOTE = "Written by tools/write_shapes.py from runtime/policy/shapes.py and objective.py; do not edit."


def snake(name: str) -> str:
    """Convert PPOClip to ppo_clip."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def camel(name: str) -> str:
    """Convert sequence_token to SequenceToken."""
    return "".join(word[0].upper() + word[1:] for word in name.split("_"))


def enum(name: str, codes: Mapping[str, int | None]) -> Iterator[str]:
    """Yield the lines of a C++ enumeration with values 0, 1, ... and of the number of its values."""
    if list(codes.values()) != list(range(len(codes))):
        raise SystemExit(f"write_shapes: codes of {name} must be 0, 1, 2, ... in order; got {dict(codes)}.")
    yield f"enum class {name} : int32_t {{"
    yield from (f"  k{camel(value)} = {code}," for value, code in codes.items())
    yield "};"
    yield f"constexpr int k{name}Count = {len(codes)};"
    yield ""


def codes() -> dict[str, int | None]:
    """Return the code of each shape."""
    return {shape.__name__: shape.code for shape in SHAPES}


def check(shape: type[Shape]) -> None:
    """Raise an error if a shape has more parameters than the kernels support."""
    if len(shape.slots()) > SLOTS:
        got = len(shape.slots())
        raise SystemExit(f"write_shapes: {shape.__name__} must have at most {SLOTS} parameters; got {got}.")


def header() -> str:
    """Return the text of csrc/common/shapes.h."""
    lines = [f"// {NOTE}", "#pragma once", "", "#include <cstdint>", "", '#include "common/host_device.h"', ""]
    lines += ["// clang-format off", "namespace tokfuse {", ""]
    lines += [*enum("Shape", codes()), *enum("Level", LEVELS), *enum("Kl", {"none": 0, **KL_ESTIMATORS})]
    lines += [f"constexpr int kShapeSlots = {SLOTS};  // slots for the parameters of a shape", ""]
    lines += ["// True for a shape whose term reads `signal`.", "TOKFUSE_HD bool needs_signal(Shape shape) {"]
    needing = [f"shape == Shape::k{shape.__name__}" for shape in SHAPES if shape.needs_signal]
    lines += [f"  return {' || '.join(needing) or 'false'};", "}", ""]
    lines += ["// The parameters of each shape by name. `p` is ObjectiveParams::p."]
    for shape in SHAPES:
        check(shape)
        if names := shape.slots():
            kind = f"{shape.__name__}Parameters"
            slots = ", ".join(f"p[{i}]" for i in range(len(names)))
            lines += [f"struct {kind} {{", f"  float {', '.join(names)};", "};"]
            lines += [f"TOKFUSE_HD {kind} {snake(shape.__name__)}_parameters(const float* p) {{"]
            lines += [f"  return {{{slots}}};", "}", ""]
    lines += ["// X(name, code, needs_signal, zero_without_advantage, parameters) for every shape."]
    rows = [
        f'  X({s.__name__}, {s.code}, {int(s.needs_signal)}, {int(s.zero_without_advantage)}, "{" ".join(s.slots())}")'
        for s in SHAPES
    ]
    lines += ["#define TOKFUSE_EACH_SHAPE(X) \\", " \\\n".join(rows), "", "}  // namespace tokfuse"]
    return "\n".join([*lines, "// clang-format on", ""])


def triton_module() -> str:
    """Return the text of triton_kernels/shape_codes.py."""
    lines = ['"""Codes of shapes, KL estimators and levels, and the parameters of each shape by name.', ""]
    lines += [NOTE, '"""', "", "import triton", "import triton.language as tl", ""]
    lines += [f"{snake(name).upper()} = tl.constexpr({code})" for name, code in codes().items()]
    for prefix, values in (("KL", {"none": 0, **KL_ESTIMATORS}), ("LEVEL", LEVELS)):
        lines += ["", *(f"{prefix}_{name.upper()} = tl.constexpr({code})" for name, code in values.items())]
    needing = ", ".join(f'{s.code}: "{s.__name__}"' for s in SHAPES if s.needs_signal)
    lines += ["", "# Code -> name of each shape whose term reads `signal`.", f"NEEDS_SIGNAL = {{{needing}}}", ""]
    for shape in SHAPES:
        if names := shape.slots():
            slots = ", ".join(f"o.p{i}" for i in range(len(names)))
            lines += ["", "@triton.jit", f"def {snake(shape.__name__)}_parameters(o):"]
            lines += [f'    """Return {", ".join(names)}."""', f"    return {slots}", ""]
    return "\n".join(lines)


FILES = {"csrc/common/shapes.h": header, "triton_kernels/shape_codes.py": triton_module}


def main(arguments: list[str]) -> int:
    """Write the files. With --check, print the files that are out of date."""
    status = 0
    for name, text in FILES.items():
        path, wanted = ROOT / name, text()
        if path.exists() and path.read_text() == wanted:
            continue
        if "--check" in arguments:
            print(f"{name} is out of date: run python tools/write_shapes.py")
            status = 1
        else:
            path.write_text(wanted)
            print(f"wrote {name}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
