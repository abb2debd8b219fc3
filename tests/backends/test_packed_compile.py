"""The ops over packed vectors inside torch.compile: one graph, same results as outside."""

from collections.abc import Callable

import pytest
import torch

from tokfuse.runtime.core import dispatch
from tokfuse.runtime.ops import offpolicy_weights as offpolicy
from tokfuse.runtime.ops.gae import gae
from tokfuse.runtime.ops.group_advantage import group_advantage
from tokfuse.runtime.ops.offpolicy_weights import offpolicy_weights
from tokfuse.runtime.ops.ope import ope
from tokfuse.runtime.ops.segment_moments import segment_moments
from tokfuse.runtime.ops.vtrace import vtrace
from tokfuse.runtime.ops.whiten import whiten
from tokfuse.runtime.policy.keep_rule import KeepRule

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
    call: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], backend: str, request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.id.removesuffix(f"-{backend}").removeprefix(f"{backend}-")
    skip_unusable(name, backend)

    def scaled(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(y * 2 for y in call(x * 0.5))

    torch.compiler.reset()
    with dispatch.backend(backend):
        compiled = torch.compile(scaled, backend="aot_eager", fullgraph=True)(X)
        for got, want in zip(compiled, scaled(X), strict=True):
            torch.testing.assert_close(got, want, equal_nan=True)


BACKENDS = ["cpu", pytest.param("triton", marks=pytest.mark.interpreter)]


def skip_unusable(name: str, backend: str) -> None:
    (row,) = (r for r in dispatch.table() if (r["op"], r["backend"]) == (name, backend))
    if not row["usable"]:
        pytest.skip(f"{backend}: {row['why']}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_traced_sum_is_differentiable(backend: str) -> None:
    skip_unusable("segment_moments", backend)

    def total(x: torch.Tensor) -> torch.Tensor:
        moments = segment_moments(x, IDS, num_segments=3, mask=MASK)
        return (moments.sum_sq * moments.sum).sum()

    torch.compiler.reset()
    grads = []
    with dispatch.backend(backend):
        for run in (total, torch.compile(total, backend="aot_eager", fullgraph=True)):
            x = X.clone().requires_grad_()
            run(x).backward()
            grads.append(x.grad)
    assert torch.equal(*grads)


RATIO_RULES = {"rules": [0, 4], "bounds": [0.5, float("inf"), -1.0, 2.0]}
ARGUMENTS = {
    "gae": (
        (X, Y, CU),
        {"gamma": 0.9, "lam": 1.0, "seq_lam": Y[:3], "length_adaptive_alpha": None, "mask": MASK, "finished": None},
    ),
    "vtrace": (
        (X, X, Y, CU),
        {"gamma": 0.9, "lam": 1.0, "rho_bar": 1.0, "c_bar": None, "mask": MASK, "finished": None},
    ),
    "whiten": ((X,), {"mask": MASK, "shift_mean": True, "eps": 1e-8, "mean": None, "var": None}),
    "group_advantage": (
        (X, IDS),
        {
            "baseline": "mean",
            "scale": "std",
            "sample_std": True,
            "eps": 1e-6,
            "singleton_reward": True,
            "lengths": None,
            "greedy_reward": None,
        },
    ),
    # Without gradient: opcheck adds its outputs up, and one of them is of integers. The gradient
    # of a traced call is tested above.
    "segment_moments": ((X, IDS, None, 3, MASK), {}),
    "offpolicy_weights": (
        (X, Y),
        {
            "level": "token",
            "mode": "ips",
            "low": None,
            "high": None,
            "lam": None,
            "power": None,
            "normalize": "none",
            **RATIO_RULES,
            "cu_seqlens": CU,
            "mask": MASK,
            "group_ids": None,
            "advantage": None,
        },
    ),
    "ope": ((X.exp(), Y, X, None, MASK), {}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_opcheck(name: str, backend: str) -> None:
    skip_unusable(name, backend)
    args, kwargs = ARGUMENTS[name]
    op = getattr(torch.ops.tokfuse, f"{name}_{backend}")
    torch.library.opcheck(op.default, args, kwargs | {"changing": None})


@pytest.mark.gpu
@pytest.mark.parametrize("name", ARGUMENTS)
def test_opcheck_on_a_gpu(name: str) -> None:
    args, kwargs = ARGUMENTS[name]
    given = [x.cuda() if isinstance(x, torch.Tensor) else x for x in args]
    options = {k: x.cuda() if isinstance(x, torch.Tensor) else x for k, x in kwargs.items()}
    op = getattr(torch.ops.tokfuse, f"{name}_triton")
    torch.library.opcheck(op.default, given, options | {"changing": None})


def test_rules_survive_the_way_into_a_graph() -> None:
    rules = (
        KeepRule("k3", "mean", high=1.0),
        KeepRule("ratio", "token", 0.5, 2.0, negative_only=True),
        KeepRule("k1", "max", low=-0.5),
    )
    again = offpolicy._rich(offpolicy._flat({"rules": rules, "mode": "ips"}))
    assert again == {"rules": rules, "mode": "ips"}
