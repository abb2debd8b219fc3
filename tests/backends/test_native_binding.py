"""The binding layer: wrong sizes, strides, codes and records end in an exception, never in a crash.

Every case runs in a subprocess, so that a crash is a failed test and not the end of the run.
"""

import os
import subprocess
import sys
import textwrap

import pytest

from tokfuse.runtime.core import native

pytestmark = pytest.mark.skipif(native.module() is None, reason="the native module is not built")

PRELUDE = """
import torch, tokfuse
from tokfuse.runtime.core import native
from tokfuse.runtime.backends import cpu_policy, cpu_rows
from tokfuse.runtime.core.logit_options import LogitOptions
from tokfuse.runtime.policy.inputs import PolicyInputs
M = native.module()
z, y = torch.randn(4, 9), torch.tensor([0, 1, 2, 8])
record, alive = cpu_rows.logits_record(z, y, LogitOptions(1.0, None, 1.0, None))
out = [torch.empty(4) for _ in range(7)]
P = [x.data_ptr() for x in out]
cu = torch.tensor([0, 2, 4], dtype=torch.int32)
inputs = PolicyInputs(torch.zeros(4), torch.ones(4), cu_seqlens=cu)
terms = cpu_policy.native_outputs(4)
policy, alive2 = cpu_policy.native_record(out[0], out[1], inputs, tokfuse.Objective(), 1.0, terms)

def set_(record, i, value):
    return record[:i] + (value,) + record[i + 1:]

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


def test_broken_logits_records_are_refused():
    text = run(
        """
        bad = {0: [0], 1: [-1], 2: [-1, 3, 99], 3: [-1], 4: [0, -5], 5: [0], 8: [0.0, -1.0],
               9: [-1.0], 10: [0.0, -2.0], 12: [-3], 14: [0, -1, 10**6], 16: [3, -1],
               17: [-2048, 100], 18: [0]}
        for i, values in bad.items():
            for value in values:
                r = set_(record, i, value)
                if i == 18:
                    r = set_(r, 17, 2048)
                print(i, refused(lambda: M.token_stats_fwd(r, *P, 0, 0, 0, 1.0)))
        for r in (record[:-1], record + (0,), (), ("x",) * len(record), None):
            refused(lambda: M.token_stats_fwd(r, *P, 0, 0, 0, 1.0))
        for i in range(7):
            refused(lambda: M.token_stats_fwd(record, *P[:i], 0, *P[i + 1:], 0, 0, 0, 1.0))
        index = torch.tensor([0, 1, 2, 4])
        r = set_(record, 15, index.data_ptr())
        print(refused(lambda: M.token_stats_fwd(r, *P, 0, 0, 0, 1.0)))
        """
    )
    assert "dtype code must be 0 (float32), 1 (bfloat16) or 2 (float16)" in text
    assert "index out of range" in text


def test_bad_targets_are_reported_before_anything_is_written():
    run(
        """
        for x in out:
            x.fill_(7)
        y[2] = 9
        assert M.token_stats_fwd(record, *P, 0, 0, 0, 1.0) == 2
        y[2] = -1
        before = z.clone()
        code = M.policy_step(7, record, policy, *P[2:], z.data_ptr(), z.stride(0), 0)
        assert code == 2 and torch.equal(z, before)
        assert all(bool((x == 7).all()) for x in out)
        """
    )


def test_broken_policy_records_are_refused():
    run(
        """
        bad = {1: [-1], 2: [-1], 4: [0], 5: [0], 17: [0], 18: [0], 19: [0], 20: [0], 21: [0, -4],
               22: [0]}
        for i, values in bad.items():
            for value in values:
                refused(lambda: M.policy_loss(set_(policy, i, value)))
        for spec in ((99,) + policy[0][1:], policy[0][:-1], (0, 9) + policy[0][2:],
                     policy[0][:2] + (77,) + policy[0][3:],
                     policy[0][:4] + ((1.0,),) + policy[0][5:]):
            refused(lambda: M.policy_loss(set_(policy, 0, spec)))
        for offsets in ([1, 2, 4], [0, 3, 2], [0, 2, 5], [0, -1, 4]):
            cu.copy_(torch.tensor(offsets, dtype=torch.int32))
            refused(lambda: M.policy_loss(policy))
        cu.copy_(torch.tensor([0, 2, 4], dtype=torch.int32))
        M.policy_loss(policy)
        refused(lambda: M.policy_loss(policy[:-1]))
        needs_ref = set_(policy, 0, policy[0][:2] + (3,) + policy[0][3:])
        refused(lambda: M.policy_loss(needs_ref))
        """
    )


def test_random_records_never_crash():
    run(
        """
        import random
        rng = random.Random(0)
        numbers = [0, 1, -1, 2, 3, 4, 5, 9, 2048, 4096, -2**63, 2**31, 0.0, 1.5, -1.5,
                   float("nan"), float("inf"), None, "a", (), 10**30]
        fields = [i for i in range(len(record)) if i not in (0, 5, 6, 7, 11, 15)]  # not addresses
        sizes = (1, 3, 4, 12)  # larger sizes than the tensors have are the caller's promise
        done = 0
        for _ in range(3000):
            r = record
            for i in rng.sample(fields, rng.randint(1, 3)):
                value = rng.choice(numbers)
                if i in sizes and isinstance(value, (int, float)) and value > record[i]:
                    continue
                r = set_(r, i, value)
            try:
                M.token_stats_fwd(r, *P, 0, 0, 0, 1.0)
                done += 1
            except (ValueError, TypeError, RuntimeError, OverflowError):
                pass
        print(done)
        """
    )


LEVELS = {"v2": "x86-64-v2", "v3": "x86-64-v3", "v4": "x86-64-v4"}


@pytest.mark.parametrize("level", list(LEVELS))
def test_every_instruction_set_level_is_right(level):
    """All three objects are in the module; a level the processor lacks is refused at import."""
    module = native.module()
    assert module is not None
    if LEVELS[level] > module.active_isa():
        pytest.skip(f"this processor runs {module.active_isa()}")
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


@pytest.mark.skipif(getattr(native.module(), "sanitizers", "") != "", reason="the sanitized module has one level")
def test_an_impossible_instruction_set_is_refused_and_named():
    out = subprocess.run(
        [sys.executable, "-P", "-c", "from tokfuse.runtime.core import native; print(native.why_unusable())"],
        capture_output=True,
        text=True,
        env={**os.environ, "TOKFUSE_ISA": "v9"},
    )
    assert "TOKFUSE_ISA must be v2, v3 or v4" in out.stdout
