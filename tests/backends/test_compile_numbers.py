"""Test numbers inside torch.compile: a value that changes does not compile a new graph.

torch.compile turns a number that changed once into a symbol. Plain torch then compiles twice for any number
of values. Every op must do the same, for every number that users change between steps.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import bits, host_backends

import tokfuse
from tokfuse.runtime.core.graph_ops import graph_op
from tokfuse.runtime.policy import graph_form, shapes

TOKENS, VOCAB, HIDDEN = 6, 19, 5
GEN = torch.Generator().manual_seed(0)
Z = torch.randn(TOKENS, VOCAB, generator=GEN)
OTHER = torch.randn(TOKENS, VOCAB, generator=GEN)
HEAD = torch.randn(VOCAB, HIDDEN, generator=GEN)
TARGET = torch.randint(0, VOCAB, (TOKENS,), generator=GEN)
KEPT = torch.arange(12) % VOCAB  # two ids per row
OLD = -torch.rand(TOKENS, generator=GEN) * 3
ADVANTAGE = torch.randn(TOKENS, generator=GEN)
CU = torch.tensor([0, 2, TOKENS], dtype=torch.int32)
POLICY = {"old_logp": OLD, "advantage": ADVANTAGE, "ref_logp": OLD + 0.1}
ONE = tokfuse.Objective(kl=tokfuse.KL(coef=0.05), entropy_coef=0.01)


def token_stats(z: torch.Tensor, x: float, **options: Any) -> torch.Tensor:
    stats = tokfuse.token_stats(z, TARGET, temperature=x, **options)
    return (stats.logp + 0.3 * stats.entropy).sum()


def linear(z: torch.Tensor, x: float) -> torch.Tensor:
    stats = tokfuse.linear_token_stats(z[:, :HIDDEN], HEAD, TARGET, temperature=x)
    return (stats.logp + 0.3 * stats.entropy).sum()


def policy_loss(z: torch.Tensor, x: Any, objective: tokfuse.Objective = ONE) -> torch.Tensor:
    return tokfuse.policy_loss(z[:, 0], entropy=z[:, 1], objective=objective, normalizer=x, **POLICY).loss


def policy_step(z: torch.Tensor, objective: tokfuse.Objective = ONE, **options: Any) -> torch.Tensor:
    step = tokfuse.policy_step(logits=z, target=TARGET, objective=objective, **POLICY, **options)
    return step.loss + step.loss_sum


def policy_step_hidden(z: torch.Tensor, x: Any, temperature: float = 1.0) -> torch.Tensor:
    hidden = z[:, :HIDDEN]
    step = tokfuse.policy_step(
        hidden=hidden, weight=HEAD, target=TARGET, objective=ONE, normalizer=x, temperature=temperature, **POLICY
    )
    return step.loss


def distill_step(z: torch.Tensor, term: tokfuse.CrossEntropy) -> torch.Tensor:
    return tokfuse.distill_step(logits=z, teacher_logits=OTHER, kind="jsd", target=TARGET, cross_entropy=term).loss


def coefficients(x: float) -> tokfuse.Objective:
    """Return an objective with three changing numbers, created outside of the graph like in trainers."""
    return tokfuse.Objective(shape=tokfuse.PPOClip(low=x), kl=tokfuse.KL(coef=0.1 * x), entropy_coef=0.02 * x)


# The first values are not 0 or 1, because torch.compile always keeps these as constants.
VALUES = [0.3 + k / 16 for k in range(4)]
CALLS: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "token_stats/temperature": token_stats,
    "token_stats/second_temperature": lambda z, x: token_stats(z, 0.9, second_temperature=x, moments=True),
    "token_stats/temperature, extended": lambda z, x: token_stats(z, x, moments=True),
    "token_stats/bias_scale": lambda z, x: token_stats(z, 0.9, bias_logits=OTHER, bias_scale=x),
    "linear_token_stats/temperature": linear,
    "kept_token_stats/temperature": lambda z, x: (
        tokfuse.kept_token_stats(z, TARGET, TARGET, torch.arange(TOKENS + 1), temperature=x).entropy.sum() + z.sum()
    ),
    "paired_divergence/temperature": lambda z, x: tokfuse.paired_divergence(z, OTHER, temperature=x).sum(),
    "paired_divergence/beta": lambda z, x: tokfuse.paired_divergence(z, OTHER, kind="jsd", beta=x).sum(),
    "paired_divergence/alpha": lambda z, x: tokfuse.paired_divergence(z, OTHER, kind="skew_forward", alpha=x).sum(),
    "policy_loss/normalizer": policy_loss,
    "distill_step/label_smoothing": lambda z, x: distill_step(z, tokfuse.CrossEntropy(label_smoothing=x)),
    "distill_step/z_loss and coef": lambda z, x: distill_step(z, tokfuse.CrossEntropy(x, z_loss=x)),
    "policy_step/temperature": lambda z, x: policy_step(z, temperature=x),
    "policy_step/normalizer": lambda z, x: policy_step(z, normalizer=x),
    "policy_step/temperature and normalizer": lambda z, x: policy_step(z, normalizer=x, temperature=x + 0.5),
    "policy_step_hidden/normalizer": policy_step_hidden,
    "policy_step_hidden/temperature": lambda z, x: policy_step_hidden(z, 3.0, temperature=x),
    "gae/lam": lambda z, x: z.sum() * tokfuse.gae(OLD, ADVANTAGE, CU, gamma=0.9, lam=x)[0].sum(),
    "vtrace/rho_bar": lambda z, x: z.sum() * tokfuse.vtrace(OLD, OLD, ADVANTAGE, CU, rho_bar=x)[0].sum(),
    "whiten/eps": lambda z, x: z.sum() * tokfuse.whiten(OLD, eps=x).square().sum(),
    "group_advantage/eps": lambda z, x: z.sum() * tokfuse.group_advantage(OLD, TARGET // 9, eps=x).square().sum(),
    "offpolicy_weights/high": lambda z, x: (
        z.sum() * tokfuse.offpolicy_weights(OLD, ADVANTAGE, mode="truncate", high=x)[0].sum()
    ),
    "offpolicy_weights/rules": lambda z, x: (
        z.sum() * tokfuse.offpolicy_weights(OLD, ADVANTAGE, rules=(tokfuse.KeepRule("ratio", high=x),))[0].sum()
    ),
}


def graphs_of(call: Callable[..., torch.Tensor], arguments: list[tuple[Any, ...]]) -> int:
    """Return the number of graphs that the calls compile. Values and gradients must equal those of eager calls."""
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend=count)
    for given in arguments:
        results = []
        for run in (call, compiled):
            z = Z.clone().requires_grad_()
            value = run(z, *given)
            value.backward()
            results.append((bits(value.detach()), bits(z.grad)))
        assert results[0] == results[1], given
    return len(graphs)


@pytest.fixture(params=host_backends("policy_step_hidden", "reference"))
def backend(request: pytest.FixtureRequest) -> Any:
    with tokfuse.backend(request.param):
        yield request.param


# The custom ops do not depend on the backend, which an op selects when it runs. So kernels that run on the CPU, where a
# call takes a second, get one call of each kind: rows, vectors and the head.
FEW = ("token_stats/temperature, extended", "policy_loss/normalizer", "policy_step_hidden/temperature")
CASES = [
    pytest.param(name, *backend.values, id=f"{backend.id}-{name}", marks=backend.marks)
    for backend in host_backends("policy_step_hidden", "reference")
    for name in (CALLS if backend.values[0] == "cpu" else FEW)
]


@pytest.mark.parametrize(("name", "backend_name"), CASES)
def test_a_changing_float_compiles_twice(name: str, backend_name: str) -> None:
    with tokfuse.backend(backend_name):
        assert graphs_of(CALLS[name], [(x,) for x in VALUES]) == 2


@pytest.mark.parametrize("name", ["policy_loss/normalizer", "policy_step/normalizer", "policy_step_hidden/normalizer"])
def test_a_changing_token_count_compiles_twice(name: str, backend: str) -> None:
    assert graphs_of(CALLS[name], [(count,) for count in range(3, 7)]) == 2


@pytest.mark.parametrize("name", ["policy_loss/normalizer", "policy_step/normalizer", "policy_step_hidden/normalizer"])
def test_a_normalizer_in_a_tensor_compiles_once(name: str, backend: str) -> None:
    call = CALLS[name]
    assert graphs_of(call, [(torch.tensor(float(count)),) for count in range(3, 7)]) == 1
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for bad in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"normalizer must be a finite number .* got a tensor with another value"):
            compiled(Z.clone(), torch.tensor(bad))


@pytest.mark.parametrize("call", [lambda z, o: policy_loss(z, 3.0, o), policy_step], ids=["policy_loss", "policy_step"])
def test_changing_coefficients_compile_twice(call: Callable[..., torch.Tensor], backend: str) -> None:
    assert graphs_of(call, [(coefficients(x),) for x in VALUES]) == 2


@pytest.mark.parametrize(
    "made",
    [
        lambda: tokfuse.Objective(entropy_coef=0.01),
        lambda: tokfuse.Objective(shape=tokfuse.PPOClip(high=0.28), kl=tokfuse.KL(coef=0.05, estimator="k2")),
        lambda: tokfuse.Objective(shape=tokfuse.StopGradClip(), aggregation="token_sum"),
    ],
)
@pytest.mark.parametrize("old_logp", [None, OLD], ids=["on policy", "off policy"])
def test_an_objective_may_be_made_inside(made: Callable[[], tokfuse.Objective], old_logp: Any, backend: str) -> None:
    def loss(z: torch.Tensor) -> torch.Tensor:
        objective = made()
        ref_logp = None if objective.kl is None else OLD
        return tokfuse.policy_step(
            logits=z, target=TARGET, old_logp=old_logp, advantage=ADVANTAGE, objective=objective, ref_logp=ref_logp
        ).loss

    assert graphs_of(loss, [()]) == 1


SHAPES = {shape.__name__: shape() for shape in shapes.SHAPES if shape is not shapes.Quadratic} | {
    "Quadratic": shapes.Quadratic(penalty=0.3),
    "PPOClip/bounds": tokfuse.PPOClip(low=None, ratio_min=0.5, high=None, ratio_max=3.0, dual=4.0, cap=5.0),
    "PPOClip/integers": tokfuse.PPOClip(low=1, high=2),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kl", [None, tokfuse.KL(estimator="k3_straight", coef=-0.3, clamp=5.0)], ids=["", "kl"])
def test_an_objective_survives_the_way_into_a_graph(name: str, kl: tokfuse.KL | None) -> None:
    objective = tokfuse.Objective(
        shape=SHAPES[name],
        level="sequence",
        kl=kl,
        entropy_coef=0.125,
        aggregation="seq_mean_token_sum",
        log_ratio_clamp=7.0,
    )
    again = graph_form.objective_of(*graph_form.flat_objective(objective))
    assert again == objective and again.record == objective.record


def test_a_shape_that_renames_another_one_goes_into_a_graph_as_that() -> None:
    class Narrow(tokfuse.PPOClip):
        pass

    again = graph_form.objective_of(*graph_form.flat_objective(tokfuse.Objective(shape=Narrow(low=0.1))))
    assert again == tokfuse.Objective(shape=tokfuse.PPOClip(low=0.1))


@graph_op("tokfuse_test::numbers", "(Tensor x, float a, float? b, float[] c, int n) -> Tensor")
def numbers(x: torch.Tensor, a: float, b: float | None, c: list[float], n: int) -> torch.Tensor:
    assert type(a) is float and type(b) in (float, type(None)) and [type(v) for v in c] == [float] * len(c)
    return x.new_tensor([a, torch.nan if b is None else b, *c, n])


def test_every_number_comes_through_a_custom_op() -> None:
    """Constants, tensors, and both in one list, outside and inside of torch.compile."""
    x = torch.zeros(1, dtype=torch.float64)
    held = [torch.tensor(v, dtype=torch.float64) for v in (0.1, 0.2, 0.3)]
    assert numbers(x, 0.5, None, [], 7).tolist()[::2] == [0.5, 7]
    assert numbers(x, 0.5, 1.5, [2.5], 7).tolist() == [0.5, 1.5, 2.5, 7]
    assert numbers(x, 1, held[0], [2.5, held[1]], 7).tolist() == [1, 0.1, 2.5, 0.2, 7]
    assert numbers(x, held[2], 4.5, [held[1], held[0]], 7).tolist() == [0.3, 4.5, 0.2, 0.1, 7]
