"""Test token_stats, linear_token_stats and policy_step with leading dimensions and ignore_index.

A call on (batch, length, ...) tensors must give bitwise what the packed call gives, in the leading shape.
"""

import numpy as np
import pytest
import torch
from harness import Backend, backends, bits

import tokfuse
from tokfuse import Objective
from tokfuse.runtime.core import native

B, L, H, V = 2, 3, 8, 21


@pytest.fixture(params=backends("policy_step", interpreted=False))
def backend(request):
    with request.param.forced():
        yield request.param


def tensors(backend: Backend):
    gen = torch.Generator().manual_seed(0)
    target = torch.randint(0, V, (B, L), generator=gen)
    target[0, 2] = target[1, 0] = -100
    out = {
        "logits": torch.randn(B, L, V, generator=gen),
        "hidden": torch.randn(B, L, H, generator=gen),
        "weight": torch.randn(V, H, generator=gen),
        "target": target,
        "mask": torch.tensor([[True, True, True], [True, True, False]]),
        "temperature": torch.linspace(0.5, 1.5, B * L).view(B, L),
        "ids": torch.randint(0, V, (B, L, 4), generator=gen),
        "old_logp": torch.randn(B, L, generator=gen) - 3,
        "advantage": torch.randn(B, L, generator=gen),
    }
    return {name: backend.put(x) for name, x in out.items()}


def flat(x, columns: bool = False):
    return x.reshape(-1, x.shape[-1]) if columns else x.reshape(-1)


def same(got, want):
    """Check every field: the values of the packed result, in the leading shape."""
    for name, x in want._asdict().items():
        y = getattr(got, name)
        if x is None:
            assert y is None
            continue
        assert y.shape == (B, L, *x.shape[1:]), name
        assert bits(y.reshape(x.shape)) == bits(x), name


STATS = {"plain": (), "mask": ("mask",), "temperature": ("temperature", "mask"), "ids": ("ids",)}


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("option", STATS)
def test_statistics(option: str, head: bool, backend: Backend):
    t = tensors(backend)
    main = "hidden" if head else "logits"
    function = tokfuse.linear_token_stats if head else tokfuse.token_stats
    more = (t["weight"],) if head else ()
    leaf = t[main].clone().requires_grad_()
    given = {name: t[name] for name in STATS[option]}
    got = function(leaf, *more, t["target"], ignore_index=-100, **given)
    packed = {name: flat(x, name == "ids") for name, x in given.items()}
    rows = flat(t["target"]) != -100
    packed["mask"] = rows & packed["mask"] if "mask" in packed else rows
    twin = flat(t[main], True).clone().requires_grad_()
    want = function(twin, *more, flat(t["target"]), **packed)
    same(got, want)
    got.logp.sum().backward()
    want.logp.sum().backward()
    assert leaf.grad.shape == leaf.shape and bits(flat(leaf.grad, True)) == bits(twin.grad)
    assert got.logp[0, 2] == 0.0 and not leaf.grad[0, 2].any()


@pytest.mark.parametrize("shape", [(), (6,), (1, 6), (2, 1, 3), (0, 4)])
def test_any_number_of_leading_dimensions(shape, backend: Backend):
    logits = backend.put(torch.randn(*shape, V))
    target = backend.put(torch.zeros(shape, dtype=torch.int64))
    got = tokfuse.token_stats(logits, target)
    want = tokfuse.token_stats(logits.reshape(-1, V), target.reshape(-1))
    assert got.logp.shape == shape and bits(got.logp.reshape(-1)) == bits(want.logp)


def test_outputs_of_the_extended_statistics_and_top_k(backend: Backend):
    t = tensors(backend)
    target = t["target"].clamp(min=0)
    for more in ({"moments": True}, {"second_temperature": 0.5}, {"top_k": 2}):
        same(
            tokfuse.token_stats(t["logits"], target, **more),
            tokfuse.token_stats(flat(t["logits"], True), flat(target), **more),
        )
    ids, offsets = flat(t["ids"]), backend.put(torch.arange(B * L + 1) * 4)
    got = tokfuse.token_stats(t["logits"], target, ids=ids, ids_offsets=offsets)
    want = tokfuse.token_stats(flat(t["logits"], True), flat(target), ids=ids, ids_offsets=offsets)
    assert got.logp.shape == (B, L) and bits(got.logp_at) == bits(want.logp_at)


OBJECTIVES = {"token": Objective(), "sequence": Objective(level="sequence", aggregation="seq_mean_token_mean")}


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("per_sequence", [False, True])
def test_policy_step(objective: str, head: bool, per_sequence: bool, backend: Backend):
    """Rows of a (batch, length) tensor are sequences where the objective or the advantage needs them."""
    t = tensors(backend)
    main = "hidden" if head else "logits"
    more = {"weight": t["weight"].requires_grad_()} if head else {}
    more |= {"objective": OBJECTIVES[objective], "normalizer": "batch"}
    more["advantage_level"] = "sequence" if per_sequence else "token"
    advantage = t["advantage"][:, 0] if per_sequence else t["advantage"]
    leaf = t[main].clone().requires_grad_()
    got = tokfuse.policy_step(
        **{main: leaf},
        target=t["target"],
        old_logp=t["old_logp"],
        advantage=advantage,
        temperature=t["temperature"],
        mask=t["mask"],
        ignore_index=-100,
        **more,
    )
    twin = flat(t[main], True).clone().requires_grad_()
    cu = backend.put(torch.tensor([0, L, 2 * L]).int())
    want = tokfuse.policy_step(
        **{main: twin},
        target=flat(t["target"]),
        old_logp=flat(t["old_logp"]),
        advantage=advantage if per_sequence else flat(advantage),
        temperature=flat(t["temperature"]),
        mask=flat(t["mask"] & (t["target"] != -100)),
        cu_seqlens=cu if per_sequence or objective == "sequence" else None,
        **more,
    )
    same(got.stats, want.stats)
    assert got.token_loss.shape == (B, L) and bits(flat(got.token_loss)) == bits(want.token_loss)
    assert bits(got.loss) == bits(want.loss) and bits(got.metrics.sums) == bits(want.metrics.sums)
    grad = got.grad_hidden if head else got.grad_logits
    assert grad.shape == leaf.shape
    held = grad.clone()
    got.loss.backward()
    want.loss.backward()
    assert bits(leaf.grad) == bits(held) and bits(flat(leaf.grad, True)) == bits(twin.grad)


def test_a_contiguous_tensor_is_not_copied():
    t = torch.randn(B, L, V, requires_grad=True)
    with tokfuse.backend("cpu"):
        logp = tokfuse.token_stats(t, torch.zeros(B, L, dtype=torch.int64)).logp
    function = logp.grad_fn.next_functions[0][0]  # of the view of the result
    assert function.saved_tensors[0].data_ptr() == t.data_ptr()


def test_refusals():
    t = tensors(Backend("reference", "cpu"))
    target, old = t["target"].clamp(min=0), flat(t["old_logp"])
    with pytest.raises(ValueError, match=r"mask must be of shape .* with the leading dimensions \(2, 3\) of logits"):
        tokfuse.token_stats(t["logits"], target, mask=flat(t["mask"]))
    with pytest.raises(ValueError, match=r"target must be of shape .* with the leading dimensions \(2, 3\) of hidden"):
        tokfuse.linear_token_stats(t["hidden"], t["weight"], flat(target))
    with pytest.raises(ValueError, match=r"ignore_index must be an int or None; got 'x'"):
        tokfuse.token_stats(t["logits"], target, ignore_index="x")
    for name, value in (("mask", [True]), ("ids", [[1]]), ("bias_logits", [0.0])):
        with pytest.raises(TypeError, match=f"token_stats: {name} must be a torch.Tensor; got list"):
            tokfuse.token_stats(t["logits"], target, ignore_index=np.int64(-100), **{name: value})
    with pytest.raises(ValueError, match="logits must be at least one column wide"):
        tokfuse.token_stats(t["logits"][..., :0], target)
    with pytest.raises(
        ValueError,
        match=r"target must be in \[0, 21\) .*; got -100 .* mask=\(target != -100\), or by ignore_index=-100",
    ):
        tokfuse.token_stats(t["logits"], t["target"])
    with pytest.raises(ValueError, match=r"old_logp must be of shape"):
        tokfuse.policy_step(
            logits=t["logits"], target=target, old_logp=old, advantage=t["advantage"], objective=Objective()
        )


@pytest.mark.skipif(native.module() is None, reason="cpu: the native module is not built")
def test_inside_a_compiled_graph():
    t = tensors(Backend("cpu", "cpu"))

    def loss(z, labels):
        step = tokfuse.policy_step(
            logits=z,
            target=labels,
            old_logp=t["old_logp"],
            advantage=t["advantage"],
            objective=Objective(level="sequence"),
            ignore_index=-100,
        )
        return step.loss + tokfuse.token_stats(z, labels, ignore_index=-100).logp.square().sum()

    eager, traced = (t["logits"].clone().requires_grad_() for _ in range(2))
    torch._dynamo.reset()
    loss(eager, t["target"]).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(traced, t["target"]).backward()
    torch.testing.assert_close(traced.grad, eager.grad)
