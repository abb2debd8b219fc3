"""Test the binding layer: wrong sizes, strides, codes and records raise an exception and never crash.

Every case runs in a subprocess, so that a crash fails only its test.
"""

import ast
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import tokfuse
from tokfuse.runtime.core import native

STRUCTS = (
    "LogitsArgs TokenStatsOut TokenStatsGrad GradRows KeptArgs DivergenceArgs DivergenceOut DivergenceGrad "
    "ObjectiveArgs TokenObjectiveArgs PrepareArgs MetricsArgs GroupAdvantageArgs GaeArgs VtraceArgs WhitenArgs "
    "OpeArgs MomentsArgs KeepRule OffPolicyArgs SketchArgs"
).split()

pytestmark = pytest.mark.skipif(native.module() is None, reason="the native module is not built")

PRELUDE = """
import torch, tokfuse
from tokfuse.runtime.core import native
from tokfuse.runtime.backends import objective_args, row_args
from tokfuse.runtime.backends.objective_args import ObjectiveOut
from tokfuse.runtime.core.logit_options import LogitOptions
from tokfuse.runtime.policy.inputs import PolicyInputs
M = native.module()

class Fields:  # the builders then return the fields of a struct as a dict
    def __getattr__(self, name):
        return dict

fields = Fields()
z, y = torch.randn(4, 9), torch.tensor([0, 1, 2, 8])
logits = row_args.logits_args(fields, z, y, LogitOptions(1.0, None, 1.0, None))
out = [torch.empty(4) for _ in range(7)]
stats = row_args.token_stats_out(fields, row_args.RowStats(*out))
cu = torch.tensor([0, 2, 4], dtype=torch.int32)
inputs = PolicyInputs(torch.zeros(4), torch.ones(4), cu_seqlens=cu)
policy = objective_args.objective_args(fields, logp=out[0], entropy=out[1], inputs=inputs,
    objective=tokfuse.Objective(), inv_normalizer=1.0, out=ObjectiveOut.empty(4), scratch=torch.empty(16))

def forward(logits=logits, stats=stats):
    return M.token_stats_fwd(M.LogitsArgs(**logits), M.TokenStatsOut(**stats))

def loss(policy=policy):
    M.policy_loss(M.ObjectiveArgs(**policy))

def without(fields, name):
    return {k: v for k, v in fields.items() if k != name}

def refused(call):
    try:
        call()
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        return str(error)
    raise SystemExit("not refused")
"""


def run(body: str, **environment: str) -> str:
    out = subprocess.run(
        [sys.executable, "-P", "-c", PRELUDE + textwrap.dedent(body)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert out.returncode == 0, f"exit {out.returncode}: {out.stderr[-2000:]}"
    return out.stdout


def test_broken_logits_are_refused():
    text = run(
        """
        bad = {"logits": [None], "stride": [-1], "dtype": [-1, 3, 99], "rows": [-1], "vocab": [0, -5],
               "target": [None], "temperature": [0.0, -1.0], "softcap": [-1.0], "logit_scale": [0.0, -2.0],
               "bias_stride": [-3], "threads": [0, -1, 10**6], "tokens": [3, -1], "tile": [-2048, 100],
               "tile_stride": [1]}
        for name, values in bad.items():
            for value in values:
                print(name, refused(lambda: forward({**logits, name: value})))
        print(refused(lambda: forward({**logits, "tile": 2048, "tile_stride": 0})))
        for name in ("logp", "entropy", "lse", "sum_sq", "top1", "row_max", "inv_sum"):
            refused(lambda: forward(stats={**stats, name: None}))
        index = torch.tensor([0, 1, 2, 4])
        print(refused(lambda: forward({**logits, "index": index})))
        """
    )
    assert "LogitsArgs.dtype: dtype code must be 0 (float32), 1 (bfloat16) or 2 (float16)" in text
    assert "index out of range" in text


def test_every_struct_names_a_missing_and_a_superfluous_field():
    text = run(
        """
        for name in STRUCTS:
            kind = getattr(M, name)
            required = [f for f in kind.FIELDS if f not in kind.OPTIONAL]
            print(refused(lambda: kind(**dict.fromkeys(required[1:]))), "|", required[0])
            print(refused(lambda: kind(1)))
            refused(lambda: kind.__new__(kind))  # an object whose pointers are all null
            refused(lambda: type("Derived", (kind,), {}))
        print(refused(lambda: M.LogitsArgs(**without(logits, "stride"))))
        print(refused(lambda: M.LogitsArgs(**without(logits, "stride"), strides=9)))
        print(refused(lambda: M.LogitsArgs(**logits, strides=9)))
        print(refused(lambda: M.LogitsArgs(**{**logits, "logits": z.data_ptr()})))
        print(refused(lambda: M.LogitsArgs(**{**logits, "stride": 1.5})))
        print(refused(lambda: M.KeptArgs(logits=stats, ids=y, offsets=y, num_ids=4)))
        print(refused(lambda: M.token_stats_fwd(M.TokenStatsOut(**stats), M.LogitsArgs(**logits))))
        """.replace("STRUCTS", repr(STRUCTS))
    )
    lines = [line.split(" | ") for line in text.splitlines() if " | " in line]
    assert len(lines) == len(STRUCTS)
    assert all(message.endswith(f"lacks the field {field}") for message, field in lines)
    assert text.count("takes its fields by keyword only") == len(STRUCTS)
    assert text.count("LogitsArgs lacks the field stride") == 2
    assert "LogitsArgs has no field strides" in text
    assert "LogitsArgs.logits: neither a tensor nor None but a int" in text
    assert "LogitsArgs.stride: 'float' object cannot be interpreted as an integer" in text
    assert "KeptArgs.logits: of type dict" in text
    assert "incompatible function arguments" in text


def test_a_struct_keeps_its_tensors():
    run(
        """
        import gc, weakref
        x = torch.randn(4, 9)
        args, alive = M.LogitsArgs(**{**logits, "logits": x}), weakref.ref(x)
        kept = M.KeptArgs(logits=args, ids=y, offsets=y, num_ids=4)
        del x, args
        gc.collect()
        assert alive() is not None
        del kept
        gc.collect()
        assert alive() is None
        """
    )


def test_bad_targets_are_reported_before_anything_is_written():
    run(
        """
        for x in out:
            x.fill_(7)
        y[2] = 9
        assert forward() == 2
        y[2] = -1
        before = z.clone()
        code = M.policy_step(
            logits=M.LogitsArgs(**logits), stats=M.TokenStatsOut(**stats),
            objective=M.ObjectiveArgs(**policy), grad=row_args.grad_rows(M, z), phases=7)
        assert code == 2 and torch.equal(z, before)
        assert all(bool((x == 7).all()) for x in out)
        """
    )


def test_a_fused_step_takes_the_same_statistics_twice():
    """The objective reads logp and entropy from where the statistics are written."""
    run(
        """
        other = M.TokenStatsOut(**{**stats, "logp": torch.empty(4)})
        assert "those that the statistics are written to" in refused(lambda: M.policy_step(
            logits=M.LogitsArgs(**logits), stats=other, objective=M.ObjectiveArgs(**policy),
            grad=row_args.grad_rows(M, z), phases=7))
        """
    )


def test_broken_objectives_are_refused():
    run(
        """
        bad = {"tokens": [-1], "seqs": [-1], "old_logp": [None], "advantage": [None],
               "token_loss": [None], "d_logp": [None], "d_entropy": [None], "sums": [None],
               "threads": [0, -4], "scratch": [None]}
        for name, values in bad.items():
            for value in values:
                refused(lambda: loss({**policy, name: value}))
        params = policy["params"]
        for spec in (tuple(params), tuple(params)[:-1], params._replace(shape=99),
                     params._replace(level=9), params._replace(kl=77), params._replace(p=(1.0,)),
                     params._replace(kl_coef="a"), None):
            refused(lambda: loss({**policy, "params": spec}))
        for offsets in ([1, 2, 4], [0, 3, 2], [0, 2, 5], [0, -1, 4]):
            cu.copy_(torch.tensor(offsets, dtype=torch.int32))
            refused(loss)
        cu.copy_(torch.tensor([0, 2, 4], dtype=torch.int32))
        loss()
        refused(lambda: loss({**policy, "params": params._replace(kl=3)}))
        """
    )


def test_a_named_tuple_is_read_by_name():
    """Another order of the fields works. Another name raises an error that names it."""
    run(
        """
        from collections import namedtuple
        params = policy["params"]
        names = list(params._fields)
        turned = namedtuple("Turned", names[::-1])(**params._asdict())
        results = []
        for spec in (params, turned):
            loss({**policy, "params": spec})
            results.append(policy["token_loss"].clone())
        assert torch.equal(*results)
        short = namedtuple("Short", names[1:])(*params[1:])
        assert "ObjectiveRecord lacks the field shape" in refused(lambda: loss({**policy, "params": short}))
        odd = namedtuple("Odd", ["form", *names[1:]])(*params)
        assert "C++ lacks: form" in refused(lambda: loss({**policy, "params": odd}))
        long = namedtuple("Long", [*names, "more"])(*params, 1)
        assert "C++ lacks: more" in refused(lambda: loss({**policy, "params": long}))
        """
    )


def test_the_eager_path_reads_its_tuples_by_name():
    """An unknown field raises an error. A silent switch to the slow path would not be noticed."""
    run(
        """
        from collections import namedtuple
        module = native.eager()
        if module is not None:
            o = LogitOptions(1.0, None, 1.0, None)
            turned = namedtuple("Turned", o._fields[::-1])(**o._asdict())
            found = [module.eager_token_stats(z, y, options, 1, False) for options in (o, turned)]
            assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
            odd = namedtuple("Odd", [*o._fields[:-1], "bias_factor"])(*o)
            assert "C++ lacks: bias_factor" in refused(lambda: module.eager_token_stats(z, y, odd, 1, False))
            record = tokfuse.Objective().record
            odd = namedtuple("Odd", ["before", *inputs._fields[1:]])(*inputs)
            assert "C++ lacks: before" in refused(
                lambda: module.eager_policy_loss(out[0], out[1], odd, record, False, 1.0, 1))
        """
    )


def test_random_fields_never_crash():
    run(
        """
        import random
        rng = random.Random(0)
        numbers = [0, 1, -1, 2, 3, 4, 5, 9, 2048, 4096, -2**63, 2**31, 0.0, 1.5, -1.5,
                   float("nan"), float("inf"), None, "a", (), 10**30]
        pointers = ("logits", "index", "target", "mask", "temperatures", "bias_logits")
        names = [name for name in logits if name not in pointers]
        sizes = ("stride", "rows", "vocab", "bias_stride")  # a larger one than its tensor has is the caller's promise
        done = 0
        for _ in range(3000):
            given = dict(logits)
            for name in rng.sample(names, rng.randint(1, 3)):
                value = rng.choice(numbers)
                if name in sizes and isinstance(value, (int, float)) and value > logits[name]:
                    continue
                given[name] = value
            if given["index"] is None and given["rows"] != given["tokens"]:
                given["tokens"] = given["rows"]
            try:
                forward(given)
                done += 1
            except (ValueError, TypeError, RuntimeError, OverflowError):
                pass
        print(done)
        """
    )


LEVELS = {"v2": "x86-64-v2", "v3": "x86-64-v3", "v4": "x86-64-v4"}


def skip_unless_it_runs(level: str) -> None:
    module = native.module()
    assert module is not None
    if LEVELS[level] > module.active_isa():
        pytest.skip(f"this processor runs {module.active_isa()}")


@pytest.mark.parametrize("level", list(LEVELS))
def test_every_instruction_set_level_is_right(level):
    """The module contains all three levels. A level that the processor does not support raises an error at import."""
    skip_unless_it_runs(level)
    run(
        f"""
        assert M.active_isa() == {LEVELS[level]!r}
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for vocab in (1, 7, 31, 2048, 5003):
                for softcap in (None, 15.0):
                    g = torch.Generator().manual_seed(vocab)
                    z = (torch.randn(5, vocab, generator=g) * 8).to(dtype)
                    y = torch.randint(0, vocab, (5,), generator=g)
                    grads, values = [], []
                    for name, x in (("cpu", z), ("reference", z.double())):
                        x = x.clone().requires_grad_()
                        with tokfuse.backend(name):
                            s = tokfuse.token_stats(x, y, softcap=softcap, temperature=0.7)
                        (s.logp.sum() + 0.5 * s.entropy.sum()).backward()
                        values.append(torch.stack(s).double())
                        grads.append(x.grad.double())
                    assert (values[0] - values[1]).abs().max() <= 2e-5
                    rounding = {{torch.float32: 0, torch.bfloat16: 2**-8, torch.float16: 2**-11}}
                    bound = 2e-6 * grads[1].abs().max() + rounding[dtype] * grads[1].abs() + 3e-7
                    assert bool(((grads[0] - grads[1]).abs() <= bound).all())
        """,
        TOKFUSE_ISA=level,
    )


# A flush-to-zero mode or an unfinished MMX state would break other libraries in the process.
@pytest.mark.parametrize("level", list(LEVELS))
def test_the_kernels_leave_the_floating_point_units_as_they_were(level: str) -> None:
    skip_unless_it_runs(level)
    run(
        f"""
        import sys
        import numpy as np
        sys.path.insert(0, {str(Path(__file__).parents[1] / "support")!r})
        from op_calls import SMALL, Problem, calls
        third, smallest = np.longdouble(1) / 3, np.float64(5e-324)
        for call in calls():
            if call.needs_triton:
                continue
            call.run(Problem(SMALL))
            assert np.longdouble(1) / 3 == third, call.name
            assert smallest * np.float64(1.0) == smallest, call.name
        """,
        TOKFUSE_ISA=level,
    )


# g++ 12 uses them for moves and leaves out emms; the next x87 instruction then returns NaN.
@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is missing")
def test_no_instruction_uses_an_mmx_register() -> None:
    code = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", native.module().__file__], capture_output=True, text=True, check=True
    ).stdout
    assert "%xmm0" in code or platform.machine() not in ("x86_64", "AMD64")
    assert re.findall(r".*%mm[0-7].*", code) == []


@pytest.mark.skipif(getattr(native.module(), "sanitizers", "") != "", reason="the sanitized module has one level")
def test_an_impossible_instruction_set_is_refused_and_named():
    out = subprocess.run(
        [sys.executable, "-P", "-c", "from tokfuse.runtime.core import native; print(native.why_unusable())"],
        capture_output=True,
        text=True,
        env={**os.environ, "TOKFUSE_ISA": "v9"},
    )
    assert "TOKFUSE_ISA must be v2, v3 or v4" in out.stdout


def test_the_stub_has_the_names_and_parameters_of_the_module() -> None:
    module = native.module()
    stub = ast.parse((Path(tokfuse.__file__).parent / "_native.pyi").read_text())
    declared = {}
    for node in stub.body:
        if isinstance(node, ast.FunctionDef):
            given = node.args
            declared[node.name] = None if given.vararg else [*given.posonlyargs, *given.args, *given.kwonlyargs]
        elif isinstance(node, ast.ClassDef | ast.AnnAssign):
            name = node.name if isinstance(node, ast.ClassDef) else node.target.id
            declared[name] = None
    del declared["_Arguments"]
    names = {name for name in dir(module) if not name.startswith("__")} | {"cuda"}
    assert declared.keys() == names, "update api/_native.pyi"
    for name, parameters in declared.items():
        signature = re.search(rf"^{name}\((.*)\)", getattr(getattr(module, name, None), "__doc__", None) or "")
        if parameters is not None and signature:
            assert len(re.findall(r"\w+: ", signature[1])) == len(parameters), name
