"""Test that the table of calls (tests/support/op_calls.py) covers every op, public function, keyword and feature.

If an op, an option or a feature is missing in the table, the tests that iterate over the table would pass
without it. This file fails instead.
"""

import inspect
import operator
import re
from collections import defaultdict
from fractions import Fraction

import numpy as np
import op_calls
import pytest
import torch
from harness import bits
from op_calls import ROWS, SMALL, Call, Problem, calls, scalar
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import tokfuse
from tokfuse.inspection import doctor
from tokfuse.runtime.core import dispatch, native
from tokfuse.runtime.policy.shapes import WITHOUT_KERNELS

doctor.import_ops()
REGISTRY = [row for row in dispatch.table() if row["built"]]
# Public functions by name: lower-case names of `tokfuse.runtime.ops` are functions, the others are records.
FUNCTIONS = {
    name for name, module in tokfuse._PUBLIC.items() if name.islower() and module.startswith("tokfuse.runtime.ops.")
} | {f"influence.{name}" for name in ("logit_norms", "head_norms", "hidden_norms", "sketch")}
# Functions of a higher layer through which an op of the registry is called.
FUNCTIONS |= {"algorithms.preference_step"}


def given(function: str) -> dict[str, set[str]]:
    """Return keyword -> distinct values that the calls of a function pass, as text."""
    values: dict[str, set[str]] = defaultdict(set)
    for call in calls():
        if call.row.function == function:
            for name, value in call.arguments(Problem(SMALL)).items():
                values[name].add("a tensor" if isinstance(value, torch.Tensor) else repr(value))
    return values


def test_every_op_of_the_registry_has_a_row():
    assert {row.op for row in ROWS} == {row["op"] for row in REGISTRY}


def test_every_public_function_has_a_row():
    assert {row.function for row in ROWS} == FUNCTIONS


@pytest.mark.parametrize("function", sorted(FUNCTIONS))
def test_every_keyword_of_a_function_is_given(function: str):
    signature = inspect.signature(operator.attrgetter(function)(tokfuse))
    assert set(signature.parameters) == set(given(function))


def test_names_are_unique():
    names = [call.name for call in calls()]
    assert len(set(names)) == len(names)
    assert op_calls.named("policy_loss/sequence").row.function == "policy_loss"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: Call(row).name)
def test_every_backend_takes_the_dtypes_of_a_row(row: op_calls.Row):
    dtypes = {str(dtype).removeprefix("torch.") for dtype in row.dtypes}
    for backend in (r for r in REGISTRY if r["op"] == row.op):
        assert dtypes <= set(backend["dtypes"]), backend["backend"]


def test_calls_reach_the_op_that_they_name_with_every_feature_that_a_backend_declares(monkeypatch):
    asked: dict[str, set[str]] = defaultdict(set)
    for call in calls():
        choices: dict = {}
        monkeypatch.setattr(dispatch, "_CHOICES", choices)
        with tokfuse.backend("reference"):
            call.run(Problem(SMALL))
        ops = {op for op, *_ in choices}
        assert (call.row.op in ops) == call.row.registered, call.name
        for op, _, _, features, _ in choices:
            asked[op] |= features
    for row in REGISTRY:
        declared = set(row["features"]) - {WITHOUT_KERNELS}  # a shape of the user: tests/project/test_adding_a_shape.py
        assert declared <= asked[row["op"]], f"{row['op']} on {row['backend']}"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: Call(row).name)
def test_what_is_said_to_be_differentiable_gets_a_gradient(row: op_calls.Row):
    for option in row.options:
        call = Call(row, option)
        arguments = call.arguments(Problem(SMALL))
        wanted = {f"grad {name}" for name in call.differentiable(arguments)}
        assert {name for name in call.apply(arguments) if name.startswith("grad ")} == wanted, call.name


def test_values_do_not_depend_on_the_dtype():
    call = op_calls.named("policy_step/everything")
    first, second = (call.arguments(Problem(SMALL, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16))
    for name, value in first.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value.to(second[name].dtype), second[name]), name


def test_a_result_is_named_by_its_public_fields():
    step = op_calls.named("policy_step/everything").run(Problem(SMALL))
    assert {"loss", "token_loss", "metrics.sums", "metrics.sampler_kl_k3", "stats.logp", "grad logits"} <= set(step)
    assert not any(name.startswith("_") for name in step)


def needs_kernels() -> None:
    if native.module() is None:
        pytest.skip("cpu: the native module is not built")


SECOND = [call for call in calls(options="none") if call.row.differentiable and call.row.op != "segment_moments"]


@pytest.mark.parametrize("call", SECOND, ids=lambda call: call.name)
def test_second_derivative_is_refused_not_wrong(call):
    """On the kernels of every op. segment_moments is differentiable twice, because its backward is torch's."""
    needs_kernels()
    with tokfuse.backend("cpu"):
        given = call.arguments(Problem(SMALL, "cpu", torch.float32))
        loss = scalar(call.function()(**given))
        leaves = [given[name] for name in call.differentiable(given)]
        with pytest.raises(ValueError, match=r"create_graph must be False .*; got True"):
            torch.autograd.grad(loss, leaves, create_graph=True)


@pytest.mark.parametrize("call", SECOND, ids=lambda call: call.name)
def test_a_batch_of_gradients_is_refused_or_right(call):
    needs_kernels()
    with tokfuse.backend("cpu"):
        given = call.arguments(Problem(SMALL, "cpu", torch.float32))
        loss = scalar(call.function()(**given)).unsqueeze(0)
        leaves = [given[name] for name in call.differentiable(given)]
        try:
            batch = torch.autograd.grad(loss, leaves, torch.tensor([[1.0], [-2.0]]), is_grads_batched=True)
        except ValueError as error:
            assert re.search("the gradient that arrives must be a plain tensor .* got a batch of", str(error))
            return
        given = call.arguments(Problem(SMALL, "cpu", torch.float32))
        plain = torch.autograd.grad(scalar(call.function()(**given)), [given[x] for x in call.differentiable(given)])
        assert all(torch.allclose(b, torch.stack([g, -2 * g])) for b, g in zip(batch, plain, strict=True))


def test_a_tangent_of_forward_mode_is_refused_not_dropped():
    z, tangent, target = torch.randn(2, 9), torch.randn(2, 9), torch.tensor([1, 2])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(z, tangent)
        if native.module() is not None:
            for call in (tokfuse.token_stats, tokfuse.cross_entropy):
                with (
                    tokfuse.backend("cpu"),
                    pytest.raises(ValueError, match="logits must be a tensor without a tangent"),
                ):
                    call(dual, target)
        with tokfuse.backend("reference"):
            logp = tokfuse.token_stats(dual, target).logp
        got = torch.autograd.forward_ad.unpack_dual(logp).tangent
    want = torch.func.jvp(lambda x: x.double().log_softmax(1)[[0, 1], target], (z,), (tangent,))[1]
    torch.testing.assert_close(got.double(), want)


def test_second_derivative_of_a_custom_op_is_refused():
    z, target = torch.randn(2, 9).requires_grad_(), torch.tensor([1, 2])
    out = torch.ops.tokfuse.token_stats.default(z, target, None, 1.0, None, 1.0, None, None, 1.0, None)
    with tokfuse.backend("cpu"), pytest.raises(ValueError, match="token_stats: create_graph must be False"):
        torch.autograd.grad(out[0].sum(), z, create_graph=True)


def test_segment_moments_is_differentiable_twice():
    values = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
    square = tokfuse.segment_moments(values, cu_seqlens=torch.tensor([0, 1, 3]).int()).sum_sq.sum()
    (grad,) = torch.autograd.grad(square, values, create_graph=True)
    (second,) = torch.autograd.grad((grad * values).sum(), values)
    assert grad.tolist() == [2.0, -4.0, 6.0] and second.tolist() == [4.0, -8.0, 12.0]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("call", [*calls()], ids=lambda call: call.name)
def test_defaults_of_torch_change_nothing(call, backend):
    """An op takes device and dtype from its arguments, not from torch.set_default_device and set_default_dtype."""
    if backend == "cpu":
        needs_kernels()
    with tokfuse.backend(backend):
        plain = call.run(Problem(SMALL))
        given = call.arguments(Problem(SMALL))
        with torch.device("meta"):
            results = [call.apply(given)]
        given = call.arguments(Problem(SMALL))
        torch.set_default_dtype(torch.bfloat16)
        try:
            results.append(call.apply(given))
        finally:
            torch.set_default_dtype(torch.float32)
    for result in results:
        assert result.keys() == plain.keys()
        assert all(bits(result[name]) == bits(plain[name]) for name in plain)


def numpy_numbers(given: dict, kind: type) -> dict:
    return {name: kind(value) if type(value) is float else value for name, value in given.items()}


OF_NUMBERS = [call for call in calls() if any(type(x) is float for x in call.arguments(Problem(SMALL)).values())]


@pytest.mark.parametrize("call", OF_NUMBERS, ids=lambda call: call.name)
def test_numbers_of_numpy_are_numbers(call):
    """The same bits as with the same number as a float."""
    needs_kernels()
    with tokfuse.backend("cpu"):
        given = numpy_numbers(call.arguments(Problem(SMALL, "cpu", torch.float32)), np.float32)
        results = [call.apply(given)]
        given = call.arguments(Problem(SMALL, "cpu", torch.float32))
        results.append(call.apply({k: float(np.float32(v)) if type(v) is float else v for k, v in given.items()}))
    assert results[0].keys() == results[1].keys()
    assert all(bits(results[0][name]) == bits(results[1][name]) for name in results[0])


NUMBERS = (np.float16, np.float32, np.float64, np.int32, Fraction)


@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_of_an_objective(kind):
    one = kind(1)
    objective = tokfuse.Objective(
        shape=tokfuse.PPOClip(low=one, high=one, dual=kind(3)),
        kl=tokfuse.KL(coef=one, clamp=kind(2)),
        entropy_coef=kind(2),
        log_ratio_clamp=kind(5),
    )
    plain = tokfuse.Objective(
        shape=tokfuse.PPOClip(low=1.0, high=1.0, dual=3.0),
        kl=tokfuse.KL(coef=1.0, clamp=2.0),
        entropy_coef=2.0,
        log_ratio_clamp=5.0,
    )
    assert objective == plain and objective.record == plain.record
    assert all(isinstance(x, int | float) for x in objective.record.p)
    assert tokfuse.KeepRule("ratio", low=kind(1)).low == 1.0
    with pytest.raises(ValueError, match="PPOClip: low must be >= 0 and <= 1; got"):
        tokfuse.PPOClip(low=kind(3))


def test_integers_of_numpy():
    hidden, weight, target = torch.ones(3, 4), torch.ones(5, 4), torch.zeros(3, dtype=torch.int64)
    got = tokfuse.linear_token_stats(hidden, weight, target, memory_budget=np.int64(1 << 20))
    assert bits(got.logp) == bits(tokfuse.linear_token_stats(hidden, weight, target, memory_budget=1 << 20).logp)
    moments = tokfuse.segment_moments(torch.ones(2), segment_ids=torch.tensor([0, 1]), num_segments=np.int64(2))
    assert moments.sum.tolist() == [1.0, 1.0]
    cu = torch.tensor([0, 3]).int()
    assert tokfuse.influence.sketch(hidden, hidden, cu, rank=np.int64(2), seed=np.int64(0)).shape == (1, 2, 2)


def fake(x):
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return mode.from_tensor(x)


def subclass(x):
    """A DTensor needs a process group, so this is its kind: a tensor that holds others."""
    return TwoTensor(x, x)


UNUSUAL = {"FakeTensor": fake, "TwoTensor": subclass, "meta tensor": lambda x: x.to("meta")}


@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.parametrize("call", list(calls(options="none")), ids=lambda call: call.name)
def test_tensors_without_memory_get_one_sentence(call, kind):
    given = call.arguments(Problem(SMALL, "cpu", torch.float32))
    given = {k: UNUSUAL[kind](v.detach()) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    with pytest.raises(
        ValueError, match=rf": [\w ]+ must be a (plain tensor|tensor with values); got a {kind}\. |; got meta\. "
    ):
        call.function()(**given)


def test_transforms_of_torch_func_get_one_sentence():
    logits, target = torch.randn(4, 7), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"token_stats: logits must be a plain tensor .* torch.func.vmap\. Use"):
        torch.func.vmap(lambda z: tokfuse.token_stats(z, target).logp)(logits[None])

    def loss(z):
        return tokfuse.token_stats(z, target).logp.sum()

    with tokfuse.backend("cpu"), pytest.raises(ValueError, match=r"logits must be .* torch.func.grad\. Use torch"):
        torch.func.grad(loss)(logits)
    with tokfuse.backend("reference"):
        found = torch.func.grad(loss)(logits)
    torch.testing.assert_close(found, torch.nn.functional.one_hot(target, 7) - logits.softmax(1))
