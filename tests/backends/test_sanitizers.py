"""Test that the build of `make test-sanitize` detects errors: kernels with wrong buffer sizes end with a report.

Every call here is undefined behaviour in an ordinary build, where these tests are skipped.
"""

import os
import subprocess
import sys
import textwrap

import pytest

from tokfuse.runtime.core import native

MODULE = native.module()
pytestmark = pytest.mark.skipif(
    not getattr(MODULE, "sanitizers", ""), reason="the native module is built without sanitizers"
)

# (4, 9) float32 logits. The binding layer cannot check the size of the memory at an address.
PRELUDE = """
import torch
from tokfuse.runtime.core import native
from tokfuse.runtime.backends import row_args
from tokfuse.runtime.core.logit_options import LogitOptions
M = native.module()
torch.set_num_threads(1)
z, y = torch.randn(4, 9), torch.tensor([0, 1, 2, 8])

class Fields:  # the builders then return the fields of a struct as a dict
    LogitsArgs = TokenStatsOut = dict

class At:
    def __init__(self, address):
        self.address = address
    def data_ptr(self):
        return self.address

record = row_args.logits_args(Fields, z, y, LogitOptions(1.0, None, 1.0, None))
out = [torch.empty(4) for _ in range(7)]
def call(logits=z, out=out, offset=0):
    fields = {**record, "logits": At(logits.data_ptr() + offset)}
    stats = row_args.token_stats_out(M, row_args.RowStats(*out))
    M.token_stats_fwd(M.LogitsArgs(**fields), stats)
"""


def report(body: str) -> tuple[int, str]:
    """Return exit status and error output of a child process. The reports go to the error output, not to files."""
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", PRELUDE + textwrap.dedent(body)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    return done.returncode, done.stderr


def test_what_is_right_is_not_reported() -> None:
    status, text = report("call()")
    assert status == 0, text


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("call(logits=torch.randn(35))", "heap-buffer-overflow"),
        ("call(out=[torch.empty(3), *out[1:]])", "heap-buffer-overflow"),
        ("freed = torch.empty(36).data_ptr(); call(logits=z, offset=freed - z.data_ptr())", "heap-use-after-free"),
        ("call(logits=torch.randn(40), offset=2)", "misaligned address"),
    ],
    ids=["read past the logits", "write past an output", "freed logits", "misaligned logits"],
)
def test_a_lie_about_a_buffer_is_reported(body: str, found: str) -> None:
    status, text = report(body)
    assert status != 0 and found in text, f"exit {status}: {text[-2000:]}"
