"""Test the table of shapes: its copies are current, its flags are correct, and no shape runs without its signal."""

import ctypes
import dataclasses
import importlib.util
import math
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harness import Backend, backends
from policy_cases import LENGTHS, SHAPES, batch

import tokfuse
from tokfuse import KL, NFT, Objective, PPOClip, distributed
from tokfuse.algorithms.base import Plan
from tokfuse.runtime.core import dispatch, native
from tokfuse.runtime.core.errors import BackendUnavailable
from tokfuse.runtime.core.logit_options import LogitOptions
from tokfuse.runtime.lm_head.problem import HeadProblem
from tokfuse.runtime.policy import shapes
from tokfuse.runtime.policy.inputs import PolicyInputs
from tokfuse.runtime.policy.shapes import Shape, TermInputs
from tokfuse.runtime.reference import policy_loss as reference

ROOT = Path(__file__).resolve().parents[2]
NEEDING = [name for name, shape in SHAPES.items() if shape.needs_signal]
ONE_OF_EACH = {type(shape): name for name, shape in reversed(SHAPES.items())}
INF = math.inf


def writer():
    spec = importlib.util.spec_from_file_location("write_shapes", ROOT / "tools" / "write_shapes.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ----------------------------------------------------------------------------------------- copies


def test_the_files_that_kernels_compile_are_current():
    module = writer()
    for name, text in module.FILES.items():
        assert (ROOT / name).read_text() == text(), "run python tools/write_shapes.py"


def test_the_native_module_was_compiled_with_the_table():
    module = native.module()
    if module is None:
        pytest.skip("no native module")
    assert module.shapes == shapes.table(), "build the native module again"


def test_another_table_in_the_native_module_is_an_error(monkeypatch):
    old = {name: row for name, row in shapes.table().items() if name != "NFT"}
    monkeypatch.setattr(native, "module", lambda: SimpleNamespace(shapes=old))
    shapes.require_compiled_table.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=r"different table of shapes \(differing shapes: NFT\)"):
            _ = Objective().record
    finally:
        shapes.require_compiled_table.cache_clear()


def test_every_shape_is_public_and_tested():
    assert {type(shape) for shape in SHAPES.values()} == set(shapes.SHAPES)
    assert {shape.__name__ for shape in shapes.SHAPES} <= set(tokfuse._PUBLIC)


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_fill_the_slots_in_order(name: str):
    shape = SHAPES[name]
    assert len(shape.parameters()) == len(shape.slots()) <= shapes.SLOTS
    for slot, value in zip(shape.slots(), shape.parameters(), strict=True):
        if (own := getattr(shape, slot, None)) is not None:  # a bound may be passed as a width
            assert value == own


@pytest.mark.parametrize("name", SHAPES)
def test_no_parameter_takes_what_is_no_number(name: str):
    for field in dataclasses.fields(SHAPES[name]):
        for value in (math.nan, "1"):
            with pytest.raises(ValueError, match=f"{type(SHAPES[name]).__name__}: {field.name} must be"):
                dataclasses.replace(SHAPES[name], **{field.name: value})


HOST_PROGRAM = """
#include "common/objective.h"
using namespace tokfuse;
extern "C" int term(int shape, const float* p, float log_ratio, float logp, float a, float signal, float* out) {
  ObjectiveParams o = {};
  o.shape = static_cast<Shape>(shape);
  for (int i = 0; i < kShapeSlots; i++) o.p[i] = p[i];
  const PolicyTerm t = policy_term(o, log_ratio, logp, a, signal);
  out[0] = t.loss;
  out[1] = t.d_log_ratio;
  out[2] = t.d_logp;
  return needs_signal(o.shape);
}
"""


@pytest.fixture(scope="module")
def header(tmp_path_factory):
    """Return policy_term of csrc/common/objective.h, compiled separately."""
    folder = tmp_path_factory.mktemp("header")
    source, library = folder / "term.cpp", folder / "term.so"
    source.write_text(HOST_PROGRAM)
    command = ["c++", "-std=c++17", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, str(source), "-o", str(library)], check=True)
    function = ctypes.CDLL(str(library)).term
    function.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_float), *[ctypes.c_float] * 4]
    function.argtypes.append(ctypes.POINTER(ctypes.c_float))
    return function


@pytest.mark.parametrize("name", SHAPES)
def test_the_header_has_the_formula(name: str, header):
    shape = SHAPES[name]
    assert shape.code is not None
    p = [*shape.parameters(), *[0.0] * (shapes.SLOTS - len(shape.parameters()))]
    given, out = (ctypes.c_float * shapes.SLOTS)(*p), (ctypes.c_float * 3)()
    for log_ratio in (-1.4, -0.3, 0.0, 0.12, 0.9):
        for a in (-1.5, 0.0, 0.75):
            log_r, logp = (torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (log_ratio, -0.7))
            signal = torch.tensor([0.6], dtype=torch.float64) if shape.needs_signal else None
            advantage = torch.tensor([a], dtype=torch.float64)
            loss, _ = shape.term(TermInputs(log_r, log_r.exp(), logp, advantage, signal))
            slopes = torch.autograd.grad(loss.sum(), (log_r, logp), allow_unused=True, materialize_grads=True)
            assert header(shape.code, given, log_ratio, -0.7, a, 0.6, out) == shape.needs_signal
            wanted = [float(x) for x in (loss.detach(), *slopes)]
            assert list(out) == pytest.approx(wanted, rel=2e-5, abs=2e-6), (log_ratio, a)


# ------------------------------------------------------------------------------------- properties


def run(shape: Shape, backend: Backend, dtype: torch.dtype = torch.float32, **changes):
    data = batch(*(["signal"] if shape.needs_signal else []))
    logp, other = data.cast(dtype)
    logp = backend.put(logp).requires_grad_()
    other = {name: backend.put(x) for name, x in (other | changes).items()}
    with backend.forced():
        out = tokfuse.policy_loss(logp, objective=Objective(shape=shape), normalizer="batch", **other)
    out.loss.backward()
    return out.token_loss, logp.grad


@pytest.mark.parametrize("backend", backends("policy_loss"))
@pytest.mark.parametrize("name", ONE_OF_EACH.values())
def test_zero_without_advantage_is_what_it_says(name: str, backend: Backend):
    _, grad = run(SHAPES[name], backend, advantage=torch.zeros(sum(LENGTHS)))
    assert bool((grad == 0).all()) == SHAPES[name].zero_without_advantage


@pytest.mark.parametrize("backend", backends("policy_loss"))
@pytest.mark.parametrize("name", NEEDING)
def test_the_signal_changes_the_loss(name: str, backend: Backend):
    losses = [run(SHAPES[name], backend, signal=torch.full((sum(LENGTHS),), x))[0] for x in (0.3, 0.7)]
    assert not torch.equal(*losses)


@pytest.mark.parametrize("name", SHAPES)
def test_a_plan_may_leave_rows_out_where_the_table_says_so(name: str):
    batch = SimpleNamespace(old_logp=torch.zeros(2))
    objective = Objective(shape=SHAPES[name])
    plan = Plan(batch=batch, objective=objective, advantage=torch.zeros(2), advantage_level="token", mask=None)
    assert plan.needs_every_row != SHAPES[name].zero_without_advantage


# ------------------------------------------------------------------ every path requires the signal

TOKENS, VOCAB, WIDTH = 4, 7, 3
VECTORS = {
    "target": torch.arange(TOKENS),
    "old_logp": torch.full((TOKENS,), -1.0),
    "advantage": torch.tensor([1.0, -1.0, 0.5, 0.0]),
}


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    """A process group of this process only, for the path over vocabulary shards."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def flat():
    return torch.zeros(TOKENS, VOCAB)


def step(**options):
    shape = options.pop("shape")
    return {**VECTORS, "objective": Objective(shape=shape), "normalizer": "batch", **options}


def loss(shape: Shape, **signal):
    other = {name: x for name, x in step(shape=shape, **signal).items() if name != "target"}
    return tokfuse.policy_loss(torch.full((TOKENS,), -1.2), **other).loss


def hidden(**options):
    h, w = torch.ones(TOKENS, WIDTH), torch.ones(VOCAB, WIDTH)
    return tokfuse.policy_step(hidden=h, weight=w, **options).loss


def split(**options):
    shard = distributed.VocabShard.even(VOCAB)
    return distributed.policy_step(logits=flat(), shard=shard, **options).loss


PATHS = {
    "policy_loss": loss,
    "policy_loss compiled": lambda shape, **s: torch.compile(loss, backend="eager")(shape, **s),
    "policy_step": lambda shape, **s: (
        tokfuse.policy_step(logits=torch.zeros(TOKENS, VOCAB), **step(shape=shape, **s)).loss
    ),
    "policy_step_": lambda shape, **s: tokfuse.policy_step_(torch.zeros(TOKENS, VOCAB), **step(shape=shape, **s)).loss,
    "policy_step(hidden)": lambda shape, **s: hidden(**step(shape=shape, **s)),
    "distributed.policy_step": lambda shape, **s: split(**step(shape=shape, **s)),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", NEEDING)
def test_a_call_without_the_signal_is_refused(name: str, path: str):
    shape = SHAPES[name]
    with pytest.raises(ValueError, match=f"signal must be given for shape {type(shape).__name__}; got None"):
        PATHS[path](shape)
    assert math.isfinite(PATHS[path](shape, signal=torch.full((TOKENS,), 0.4)))


@pytest.mark.parametrize("path", PATHS)
def test_a_signal_that_would_be_ignored_is_refused(path: str):
    with pytest.raises(ValueError, match="signal must be None with shape PPOClip; got a tensor"):
        PATHS[path](PPOClip(), signal=torch.ones(TOKENS))


@pytest.mark.parametrize("backend", backends("policy_loss"))
@pytest.mark.parametrize("op", ["policy_loss", "policy_step", "policy_step_hidden"])
@pytest.mark.parametrize("name", NEEDING)
def test_no_kernel_runs_without_the_signal(name: str, op: str, backend: Backend):
    """Below the checks of the public functions."""
    given = {key: backend.put(x) for key, x in VECTORS.items()}
    inputs = PolicyInputs(given["old_logp"], given["advantage"])
    problem = backend.put(torch.zeros(TOKENS, VOCAB))
    with backend.forced():
        call = dispatch.select(op, problem.device.type, torch.float32).run
    first: tuple = (backend.put(torch.full((TOKENS,), -1.2)), None)
    last: tuple = ()
    if op == "policy_step":
        first, last = (problem, given["target"], LogitOptions(1.0, None, 1.0, None)), (False,)
    elif op == "policy_step_hidden":
        h, w = (backend.put(torch.ones(n, WIDTH)).requires_grad_() for n in (TOKENS, VOCAB))
        first = (HeadProblem("policy_step", h, w, None, given["target"], LogitOptions(1.0, None, 1.0, None), 1 << 20),)
    with pytest.raises(ValueError, match="signal"):
        call(*first, inputs, Objective(shape=SHAPES[name]), -1.0, *last)


@pytest.mark.parametrize("name", NEEDING)
def test_the_eager_functions_hand_such_a_call_back(name: str):
    module = native.eager()
    if module is None:
        pytest.skip("no native module that reads this torch's tensors")
    objective = Objective(shape=SHAPES[name])
    inputs = PolicyInputs(VECTORS["old_logp"], VECTORS["advantage"])
    call = [torch.full((TOKENS,), -1.2), None, inputs, objective.record, False, -1.0, 1]
    assert module.eager_policy_loss(*call) is None
    call[2] = inputs._replace(signal=torch.full((TOKENS,), 0.4))
    assert module.eager_policy_loss(*call) is not None


def test_the_reference_refuses_too():
    inputs = PolicyInputs(VECTORS["old_logp"], VECTORS["advantage"])
    with pytest.raises(ValueError, match="signal must be given for shape NFT"):
        reference.forward(torch.zeros(TOKENS), None, inputs, Objective(shape=NFT()), 1.0)


# ----------------------------------------------------------------------------- user-defined shapes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Softened(Shape):
    """-A tanh(r - 1), without kernels."""

    scale: shapes.Positive = 1.0

    def term(self, x: TermInputs):
        """-A scale tanh((r - 1) / scale)."""
        return -x.advantage * self.scale * torch.tanh((x.ratio - 1) / self.scale), {}


def test_a_shape_without_kernels_runs_on_the_reference():
    assert Softened.code is None
    logp = torch.tensor([-1.2, -0.4, -0.9, -1.0], requires_grad=True)
    other = {name: x for name, x in step(shape=Softened(scale=0.5)).items() if name != "target"}
    out = tokfuse.policy_loss(logp, **other)
    out.loss.backward()
    again = logp.detach().clone().requires_grad_()
    ratio = (again - VECTORS["old_logp"]).exp()
    (-VECTORS["advantage"] * 0.5 * torch.tanh((ratio - 1) / 0.5)).mean().backward()
    torch.testing.assert_close(logp.grad, again.grad)


def test_it_works_in_every_op_and_with_every_other_axis():
    logits = torch.randn(TOKENS, VOCAB, generator=torch.Generator().manual_seed(0))
    h, w = torch.eye(TOKENS), logits.T.contiguous()
    options = {
        **step(shape=Softened()),
        "objective": Objective(
            shape=Softened(), level="sequence", kl=KL(coef=0.1), entropy_coef=0.01, aggregation="seq_mean_token_mean"
        ),
        "cu_seqlens": torch.tensor([0, 3, TOKENS], dtype=torch.int32),
        "ref_logp": torch.full((TOKENS,), -1.1),
    }
    step_of_logits = tokfuse.policy_step(logits=logits, **options)
    stats = tokfuse.token_stats(logits, VECTORS["target"])
    other = {name: x for name, x in options.items() if name != "target"}
    losses = [
        step_of_logits.loss,
        tokfuse.policy_step(hidden=h, weight=w, **options).loss,
        tokfuse.policy_loss(stats.logp, entropy=stats.entropy, **other).loss,
        torch.compile(lambda z: tokfuse.policy_step(logits=z, **options).loss, backend="eager")(logits),
    ]
    for one in losses[1:]:
        torch.testing.assert_close(one, losses[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", [b for b in backends("policy_loss") if b.id != "reference"])
@pytest.mark.parametrize("path", [path for path in PATHS if "compiled" not in path])
def test_a_backend_without_its_kernel_says_so(path: str, backend: Backend):
    with (
        backend.forced(),
        pytest.raises(BackendUnavailable, match=rf"{backend.name}: does not support shapes without kernels"),
    ):
        PATHS[path](Softened())


def test_another_formula_is_another_shape():
    """A subclass with another formula must not run the kernels of its base class."""

    class Defaults(PPOClip):
        pass

    class Other(PPOClip):
        def term(self, x: TermInputs):
            return x.logp * 0.0, {}

    assert Defaults.code == PPOClip.code and Other.code is None
    assert loss(Other()) == 0.0 != loss(Defaults())


def test_a_shape_must_have_a_formula():
    class Nothing(Shape):
        pass

    with pytest.raises(NotImplementedError, match="Nothing must define term"):
        loss(Nothing())


def test_its_parameters_are_checked():
    with pytest.raises(ValueError, match="Softened: scale must be > 0; got 0"):
        Softened(scale=0)
