"""The ops over packed vectors inside torch.compile: same results, one clean graph break on CPU."""

import warnings
from collections.abc import Callable

import pytest
import torch

from tokfuse.runtime import dispatch
from tokfuse.runtime.ops.gae import gae
from tokfuse.runtime.ops.group_advantage import group_advantage
from tokfuse.runtime.ops.offpolicy_weights import KeepRule, offpolicy_weights
from tokfuse.runtime.ops.ope import ope
from tokfuse.runtime.ops.segment_moments import segment_moments
from tokfuse.runtime.ops.vtrace import vtrace
from tokfuse.runtime.ops.whiten import whiten

GEN = torch.Generator().manual_seed(0)
X, Y = torch.randn(12, generator=GEN), torch.randn(12, generator=GEN)
CU, IDS = torch.tensor([0, 5, 5, 12], dtype=torch.int32), torch.arange(12) // 4
MASK = torch.arange(12) != 3
RULES = (KeepRule("k3", "mean", high=1.0),)
CALLS = {
    "gae": lambda x: gae(x, Y, CU, gamma=0.9, lam=0.8, mask=MASK),
    "vtrace": lambda x: vtrace(x, x, Y, CU, gamma=0.9),
    "whiten": lambda x: (whiten(x, MASK),),
    "group_advantage": lambda x: (group_advantage(x, IDS),),
    "segment_moments": lambda x: segment_moments(x, IDS, num_segments=3),
    "offpolicy_weights": lambda x: offpolicy_weights(x, Y, cu_seqlens=CU, rules=RULES),
    "ope": lambda x: ope(x.exp(), Y)[:2],
}


@pytest.mark.parametrize(
    "backend",
    [
        "cpu",
        "reference",
        pytest.param("triton", marks=pytest.mark.interpreter),
        pytest.param("cuda", marks=pytest.mark.cuda_host),
    ],
)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_compiled_equals_eager(
    call: Callable[[torch.Tensor], tuple[torch.Tensor, ...]],
    backend: str,
    request: pytest.FixtureRequest,
) -> None:
    name = request.node.callspec.id.removesuffix(f"-{backend}").removeprefix(f"{backend}-")
    rows = {row["backend"]: row for row in dispatch.table() if row["op"] == name}
    if not rows[backend]["usable"]:
        pytest.skip(f"{backend}: {rows[backend]['why']}")

    def scaled(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(y * 2 for y in call(x * 0.5))

    torch.compiler.reset()
    with dispatch.backend(backend), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compiled = torch.compile(scaled, backend="eager")(X)
        for got, want in zip(compiled, scaled(X), strict=True):
            torch.testing.assert_close(got, want, equal_nan=True)
