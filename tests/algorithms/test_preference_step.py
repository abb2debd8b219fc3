"""Test preference_step on every backend: it equals the composition of the simple ops, in one pass.

The bounds are those of linear_token_stats. The coefficients are functions of sums of log-probabilities, so
their errors enter the gradients relative to beta.
"""

import dataclasses

import pytest
import torch
from harness import Backend, assert_untouched, backends, bits, compare, half_ulp
from preference_cases import LENGTHS, LOSSES, PAIRS, TOKENS, example, example_batch, pair_batch
from torch.utils._python_dispatch import TorchDispatchMode

import tokfuse
from tokfuse.algorithms import PreferenceBatch, preference_step

HIDDEN, VOCAB = 12, 700
ONE_ROW, ALL_ROWS = 4 * (VOCAB + 2 * HIDDEN + 16), 1 << 40


@pytest.fixture(params=backends("linear_token_stats", interpreted=False))
def backend(request):
    with request.param.forced():
        yield request.param


# Runs on Triton's interpreter too.
everywhere = pytest.mark.parametrize("backend", backends("linear_token_stats"), indirect=True)


def head(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return {
        "hidden": torch.randn(TOKENS, HIDDEN, generator=gen).to(dtype),
        "weight": torch.randn(VOCAB, HIDDEN, generator=gen).mul(0.5).to(dtype),
        "bias": torch.randn(VOCAB, generator=gen).to(dtype),
        "target": torch.randint(0, VOCAB, (TOKENS,), generator=gen),
    }


def put(backend: Backend, batch: PreferenceBatch) -> PreferenceBatch:
    return dataclasses.replace(
        batch, **{f.name: backend.put(getattr(batch, f.name)) for f in dataclasses.fields(batch)}
    )


def evaluate(backend: Backend, name: str, needs: str = "hwb", dtype=torch.float32, **given):
    """Return (step, gradients) from hidden states."""
    tensors = {k: backend.put(v) for k, v in head(dtype).items()}
    for key in ("hidden", "weight", "bias"):
        tensors[key] = tensors[key].detach().requires_grad_(key[0] in needs)
    loss = example(name, **given.pop("options", {}))
    batch = put(backend, given.pop("batch", None) or example_batch(loss))
    step = preference_step(loss=loss, batch=batch, normalizer="batch", **tensors, **given)
    if needs:
        step.loss.backward()
    return step, {key: tensors[key].grad for key in ("hidden", "weight", "bias")}


def composed(backend: Backend, name: str, dtype=torch.float32, **given):
    """Return the same through linear_token_stats of the reference, in float64."""
    loss = example(name, **given.pop("options", {}))
    batch = given.pop("batch", None) or example_batch(loss)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in head(dtype).items()}
    leaves = {k: v.requires_grad_() for k, v in wide.items() if k != "target"}
    with tokfuse.backend("reference"):
        step = preference_step(loss=loss, batch=batch, normalizer="batch", target=wide["target"], **leaves, **given)
        step.loss.backward()
    return step, {k: v.grad for k, v in leaves.items()}


def check(backend: Backend, name: str, needs: str = "hwb", dtype=torch.float32, **given):
    budget = given.pop("memory_budget", None)
    want, expected = composed(backend, name, dtype, **given)
    step, grads = evaluate(backend, name, needs, dtype, memory_budget=budget, **given)
    compare(step.losses, want.losses, rtol=1e-4, atol=1e-5, what="losses")
    compare(step.loss, want.loss, rtol=1e-4, atol=1e-5, what="loss")
    for found, right in zip(step.rewards, want.rewards, strict=True):
        compare(found, right, rtol=1e-4, atol=1e-4)
    for key, grad in grads.items():
        if key[0] not in needs:
            assert grad is None
            continue
        atol = 2e-5 * float(expected[key].abs().max())
        if dtype != torch.float32:
            atol = atol * 20 + half_ulp(expected[key], dtype)
        compare(grad, expected[key], atol=atol, what=f"grad_{key}")
    return step


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_from_hidden_states(name: str, backend: Backend):
    check(backend, name)


@pytest.mark.parametrize("rows", [6, TOKENS])
@pytest.mark.parametrize("name", ["dpo", "kto", "aot", "wpo"])
@everywhere
def test_every_kind_of_unit(name: str, rows: int, backend: Backend):
    check(backend, name, memory_budget=rows * ONE_ROW)


@pytest.mark.parametrize("name", ["dpo", "slic", "aot", "kto", "ld_dpo"])
@pytest.mark.parametrize("rows", [1, 3, 6, 9, TOKENS])
def test_any_memory_budget(name: str, rows: int, backend: Backend):
    step = check(backend, name, memory_budget=rows * ONE_ROW)
    if backend.name == "cpu" and name == "dpo":
        assert (step.read_twice > 0) == (rows < 9)  # the largest pair has 9 rows
    if backend.name == "reference":
        assert step.read_twice == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@everywhere
def test_sixteen_bits(dtype: torch.dtype, backend: Backend):
    check(backend, "dpo", dtype=dtype)


@pytest.mark.parametrize("needs", ["", "h", "w", "b", "hw"])
@everywhere
def test_gradients_only_where_asked(needs: str, backend: Backend):
    step = check(backend, "simpo", needs=needs)
    assert step.loss.requires_grad == bool(needs)


@pytest.mark.parametrize("option", [{"temperature": 1.4}, {"softcap": 5.0}, {"logit_scale": 0.3}], ids=str)
@everywhere
def test_logit_options_are_honoured(option: dict, backend: Backend):
    plain, _ = evaluate(backend, "dpo")
    step = check(backend, "dpo", **option)
    assert step.loss.item() != plain.loss.item()


@pytest.mark.parametrize("name", ["dpo", "kto", "aot"])
@everywhere
def test_from_logits(name: str, backend: Backend):
    """The logits of the head give the same results as the head, and their own gradient."""
    given = {k: backend.put(v) for k, v in head().items()}
    loss = example(name)
    batch = put(backend, example_batch(loss))
    logits = (given["hidden"] @ given["weight"].t() + given["bias"]).requires_grad_()
    step = preference_step(loss=loss, batch=batch, logits=logits, target=given["target"], normalizer="batch")
    step.loss.backward()
    want, grads = evaluate(backend, name)
    compare(step.loss, want.loss, rtol=1e-5)
    compare(logits.grad @ given["weight"], grads["hidden"], atol=2e-5 * float(grads["hidden"].abs().max()))
    assert not logits.grad[~(batch.mask & (logits.grad != 0).any(1))].any()
    outside = [t for i in (2, 9) for t in range(sum(LENGTHS[:i]), sum(LENGTHS[: i + 1]))]
    if name != "kto":
        assert not logits.grad[outside].any()


# -------------------------------------------------------------------------- work that is done once


class Products(TorchDispatchMode):
    """Counts the multiply-adds of matrix products, times two."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removesuffix("_").removeprefix("aten::")
        if name in ("mm", "addmm"):
            a, b = args[-2:] if len(args) > 2 else args[:2]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        assert name not in ("bmm", "matmul", "baddbmm", "linear"), name
        return func(*args, **(kwargs or {}))


def count(backend: Backend, name: str, **given) -> float:
    """Return the operations of matrix products over tokens of pairs, hidden and vocabulary."""
    with Products() as products:
        step, _ = evaluate(backend, name, **given)
    rows = int(step.stats.lse.ne(0).sum())
    return products.flops / (rows * HIDDEN * VOCAB)


@pytest.mark.parametrize("backend", backends("linear_token_stats", without="reference"), indirect=True)
def test_matrix_products_are_counted(backend: Backend):
    """6 T H V with both gradients, 4 with a frozen lm_head, 8 only for pairs larger than the budget."""
    assert count(backend, "dpo") == 6.0
    assert count(backend, "orpo") == 6.0 and count(backend, "kto") == 6.0
    assert count(backend, "aot") == 6.0  # one unit, and it fits
    assert count(backend, "dpo", needs="h") == 4.0
    assert count(backend, "dpo", needs="") == 2.0
    assert count(backend, "dpo", memory_budget=ONE_ROW) == 8.0


@pytest.mark.parametrize(
    "backend", backends("linear_token_stats", without="reference", interpreted=False), indirect=True
)
def test_pairs_without_gradient_enter_no_gradient_product(backend: Backend):
    """A hinge beyond its margin: (2 + 4 f) T H V, and exact zeros."""
    if backend.name != "cpu":
        pytest.skip("a GPU does not wait for the coefficients")
    gen = torch.Generator().manual_seed(3)
    batch = pair_batch(ref_logp=-6 - 4 * torch.rand(TOKENS, generator=gen))
    step, grads = evaluate(backend, "slic", batch=batch, options={"beta": 0.3})
    live = step.losses > 0
    assert 0 < int(live.sum()) < len(PAIRS)
    border = batch.cu_seqlens.tolist()
    rows = [sum(int(batch.mask[t]) for i in pair for t in range(border[i], border[i + 1])) for pair in PAIRS]
    share = sum(n for n, alive in zip(rows, live.tolist(), strict=True) if alive) / sum(rows)
    assert count(backend, "slic", batch=batch, options={"beta": 0.3}) == pytest.approx(2 + 4 * share)
    dead = [
        t
        for pair, alive in zip(PAIRS, live.tolist(), strict=True)
        if not alive
        for i in pair
        for t in range(border[i], border[i + 1])
    ]
    assert not grads["hidden"][dead].any()
    check(backend, "slic", batch=batch, options={"beta": 0.3})


# --------------------------------------------------------------------------------------- edge cases


class TestEdges:
    def test_no_pairs(self, backend: Backend):
        batch = pair_batch(pairs=torch.zeros(0, 2, dtype=torch.int64))
        step, grads = evaluate(backend, "dpo", batch=batch)
        assert step.loss.item() == 0.0 and step.losses.shape == (0,)
        assert all(g is not None and not g.any() for g in grads.values())

    def test_an_empty_response_and_a_masked_one(self, backend: Backend):
        mask = torch.ones(TOKENS, dtype=torch.bool)
        mask[-LENGTHS[-1] :] = False
        for name in ("dpo", "ipo", "simpo", "orpo", "wpo"):
            reference = example(name).needs_reference
            batch = pair_batch(reference=reference, pairs=torch.tensor([[2, 1], [0, 9]]), mask=mask)
            step, grads = evaluate(backend, name, batch=batch)
            assert bool(step.loss.isfinite()) or name == "orpo"  # mean logp 0 has infinite odds
            assert name == "orpo" or all(bool(g.isfinite().all()) for g in grads.values())

    def test_masked_tokens_and_those_of_no_pair_are_never_used(self, backend: Backend):
        want, grads = evaluate(backend, "dpo")
        given = head()
        batch = example_batch(example("dpo"))
        used = torch.zeros(TOKENS, dtype=torch.bool)
        for i in torch.tensor(PAIRS).flatten().tolist():
            used[batch.cu_seqlens[i] : batch.cu_seqlens[i + 1]] = True
        used &= batch.mask
        given["target"][~used] = -100
        if backend.name != "reference":  # a full GEMM multiplies the masked rows' NaN by 0
            given["hidden"][~used] = float("nan")
        tensors = {k: backend.put(v) for k, v in given.items()}
        leaves = {k: v.requires_grad_() for k, v in tensors.items() if k != "target"}
        step = preference_step(
            loss=example("dpo"), batch=put(backend, batch), normalizer="batch", target=tensors["target"], **leaves
        )
        step.loss.backward()
        assert bits(step.loss) == bits(want.loss)
        assert bits(leaves["weight"].grad) == bits(grads["weight"])

    def test_a_bad_token_poisons_its_pair_only(self, backend: Backend):
        bad = 2  # a token of sequence 0, chosen in pair 1 (with sequence 7)
        given = {k: backend.put(v) for k, v in head().items()}
        given["hidden"][bad] = float("nan")
        hidden = given["hidden"].requires_grad_()
        batch = put(backend, pair_batch())
        step = preference_step(loss=example("dpo"), batch=batch, normalizer="batch", **given)
        step.loss.backward()
        want, grads = evaluate(backend, "dpo")
        assert step.losses.isnan().tolist() == [False, True, False, False]
        own = torch.zeros(TOKENS, dtype=torch.bool)
        for i in PAIRS[1]:
            own[batch.cu_seqlens[i] : batch.cu_seqlens[i + 1]] = True
        compare(hidden.grad[~own], grads["hidden"][~own], atol=1e-6)
        assert bool(hidden.grad[own & pair_batch().mask].isnan().all())

    def test_bitwise_repeatable_and_nothing_of_the_user_is_written(self, backend: Backend):
        runs = [evaluate(backend, "dpo", memory_budget=9 * ONE_ROW) for _ in range(2)]
        assert [bits(g) for g in runs[0][1].values()] == [bits(g) for g in runs[1][1].values()]
        batch = example_batch(example("dpo"))
        fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
        assert_untouched(lambda: evaluate(backend, "dpo", batch=batch), fields)

    def test_reference_sums_are_the_reference(self, backend: Backend):
        batch = pair_batch()
        border, rows = batch.cu_seqlens.tolist(), torch.arange(TOKENS)
        total = torch.stack(
            [
                batch.ref_logp[(rows >= i) & (rows < j) & batch.mask].sum()
                for i, j in zip(border, border[1:], strict=False)
            ]
        )
        one, grads = evaluate(backend, "dpo", batch=batch)
        two, others = evaluate(backend, "dpo", batch=pair_batch(ref_sum=total))
        compare(two.loss, one.loss, rtol=1e-6)
        compare(others["weight"], grads["weight"], atol=1e-6)

    def test_weights_and_normalizer(self, backend: Backend):
        weight = torch.tensor([0.0, 2.0, 1.0, 0.5])
        plain, _ = evaluate(backend, "dpo")
        step = check(backend, "dpo", batch=pair_batch(pair_weight=weight))
        compare(step.losses, plain.losses * weight.double(), rtol=1e-6)
        given = {k: backend.put(v) for k, v in head().items()}
        batch = put(backend, pair_batch())
        total, tenth = (preference_step(loss=example("dpo"), batch=batch, normalizer=n, **given) for n in (None, 10))
        compare(total.loss, plain.losses.sum(), rtol=1e-5)
        compare(tenth.loss, total.loss / 10, rtol=1e-6)

    def test_backward_scales_and_runs_once(self, backend: Backend):
        _, grads = evaluate(backend, "dpo")
        given = {k: backend.put(v) for k, v in head().items()}
        hidden = given["hidden"].requires_grad_()
        batch = put(backend, pair_batch())
        step = preference_step(loss=example("dpo"), batch=batch, normalizer="batch", **given)
        (step.loss * 3).backward(retain_graph=True)
        compare(hidden.grad, 3 * grads["hidden"], rtol=1e-5, atol=1e-7)
        step.loss.backward()
        compare(hidden.grad, 4 * grads["hidden"], rtol=1e-5, atol=1e-7)
        if backend.name != "reference":
            with pytest.raises(RuntimeError, match="preference_step: backward ran twice"):
                step.loss.backward()
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                quiet = preference_step(loss=example("dpo"), batch=batch, normalizer="batch", **given)
            assert not quiet.loss.requires_grad and quiet.loss.item() == step.loss.item()


def test_traced_by_torch_compile():
    """A graph break for the borders, then the composition: the results are equal."""
    given, batch, loss = head(), pair_batch(), example("dpo")

    def run(hidden: torch.Tensor) -> torch.Tensor:
        step = preference_step(
            loss=loss,
            batch=batch,
            hidden=hidden * 1.0,
            normalizer="batch",
            weight=given["weight"],
            bias=given["bias"],
            target=given["target"],
        )
        return step.loss

    plain, traced = (given["hidden"].clone().requires_grad_() for _ in range(2))
    run(plain).backward()
    torch.compile(run, backend="eager")(traced).backward()
    compare(traced.grad, plain.grad, atol=1e-6)
