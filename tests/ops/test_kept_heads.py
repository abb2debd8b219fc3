"""Test kept_ids of linear_token_stats and policy_step: they equal kept_token_stats of all logits, on every backend.

Expected values are those of kept_token_stats in float64. Bounds: 2e-5 for statistics, 1e-5 of the largest entry for
gradients, half an ulp more for a 16-bit head.
"""

import pytest
import torch
from harness import Backend, backends, bits, compare, crossed, half_ulp
from torch import Tensor

import tokfuse
from tokfuse import KL, Objective
from tokfuse.runtime.backends import kept_rows
from tokfuse.runtime.core.token_ids import TokenIds
from tokfuse.runtime.lm_head import device_head

INF = float("inf")
EMPTY, WHOLE, EXCLUDED, MASKED = 3, 5, 7, 4  # rows without ids, with all ids, with another target, masked
FORMS = ("hidden", "logits", "in_place")


@pytest.fixture(params=backends("policy_step_hidden", interpreted=False))
def backend(request):
    with request.param.forced():
        yield request.param


def case(vocab: int = 300, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return a head and kept ids of every kind. The ids of the masked row are no ids."""
    tokens, width = 17, 24
    gen = torch.Generator().manual_seed(vocab)
    sizes = torch.randint(1, 40, (tokens,), generator=gen)
    sizes[EMPTY], sizes[WHOLE] = 0, vocab
    rows = [torch.randperm(vocab, generator=gen)[:size] for size in sizes]
    target = torch.tensor([int(row[len(row) // 2]) if len(row) else 0 for row in rows])
    target[EXCLUDED] = int((~torch.isin(torch.arange(vocab), rows[EXCLUDED])).nonzero()[0])
    rows[MASKED] = torch.full_like(rows[MASKED], -7)
    return {
        "hidden": torch.randn(tokens, width, generator=gen).to(dtype),
        "weight": torch.randn(vocab, width, generator=gen).mul(0.5).to(dtype),
        "bias": torch.randn(vocab, generator=gen).to(dtype),
        "target": target,
        "kept_ids": torch.cat(rows),
        "kept_offsets": torch.tensor([0, *sizes]).cumsum(0),
        "mask": torch.arange(tokens) != MASKED,
    }


def leaves(given: dict[str, Tensor], needs: str = "hwb", dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return copies of hidden, weight and bias; `needs` names those that require grad."""
    out = {n: given[n].detach().to(dtype or given[n].dtype).clone() for n in ("hidden", "weight", "bias")}
    return {n: x.requires_grad_(n[0] in needs) for n, x in out.items()}


def expected(given, loss_of, **options):
    """Return (statistics, gradients of hidden, weight, bias and logits) of a loss of float64 statistics."""
    x = leaves(given, dtype=torch.float64)
    logits = x["hidden"] @ x["weight"].t() + x["bias"]
    logits.retain_grad()
    with tokfuse.backend("reference"):
        kept = (given["target"], given["kept_ids"], given["kept_offsets"])
        stats = tokfuse.kept_token_stats(logits, *kept, mask=given["mask"], **options)
        loss_of(stats).backward()
    return stats, {n: v.grad for n, v in x.items()} | {"logits": logits.grad}


def check_gradient(name: str, got: Tensor, want: Tensor):
    atol = 1e-5 * float(want.abs().max())
    compare(got, want, atol=atol + (half_ulp(want, got.dtype) * 2 if got.dtype != torch.float32 else 0), what=name)


OPTIONS = {
    "plain": {},
    "all": {"temperature": 0.7, "softcap": 6.0, "logit_scale": 1.5},
    "temperatures": {"temperature": torch.linspace(0.5, 2.0, 17), "memory_budget": 20_000},
}


LINEAR = {f"{name}-{dtype}": (name, dtype) for name in OPTIONS for dtype in (torch.float32, torch.bfloat16)}


@pytest.mark.parametrize(
    ("name", "dtype", "backend"), crossed("linear_token_stats", LINEAR, {"temperatures-torch.bfloat16"})
)
def test_linear_token_stats_is_kept_token_stats(name: str, dtype: torch.dtype, backend: Backend):
    with backend.forced():
        check_linear(name, dtype, backend)


def check_linear(name: str, dtype: torch.dtype, backend: Backend):
    given, options = case(dtype=dtype), OPTIONS[name]
    ga, gh = torch.linspace(-1, 2, 17), torch.linspace(1, -1, 17)

    def loss(stats):
        ga_, gh_ = (x.to(stats.logp) for x in (ga, gh))
        return (torch.where(stats.logp.isinf(), 0.0, stats.logp) * ga_ + stats.entropy * gh_).sum()

    want, grads = expected(given, loss, **{k: v for k, v in options.items() if k != "memory_budget"})
    x = {n: backend.put(v).detach().requires_grad_() for n, v in leaves(given).items()}
    rest = {n: backend.put(v) for n, v in (given | options).items() if n not in x}
    stats = tokfuse.linear_token_stats(**x, **rest)
    loss(stats).backward()
    for field in ("logp", "entropy", "lse"):
        compare(getattr(stats, field), getattr(want, field), atol=2e-5, what=field)
    assert stats.logp[[EMPTY, EXCLUDED]].tolist() == [-INF, -INF] and stats.entropy[EXCLUDED] > 0
    for n, v in x.items():
        check_gradient(n, v.grad, grads[n])


def test_a_target_that_is_not_kept_has_no_gradient(backend: Backend):
    given = case()
    x = {n: backend.put(v).detach().requires_grad_() for n, v in leaves(given).items()}
    stats = tokfuse.linear_token_stats(**x, **{n: backend.put(v) for n, v in given.items() if n not in x})
    stats.logp.backward(backend.put((torch.arange(17) == EXCLUDED).float()))
    assert all(float(v.grad.abs().max()) == 0.0 for v in x.values())


def test_a_tiny_kept_mass_loses_no_digits(backend: Backend):
    """The kept ids of row 0 have a mass of e^-80. Both of them count to the last digit."""
    weight = torch.tensor([[80.0], [0.25], [0.125], [-40.0]])
    ids, offsets = torch.tensor([1, 2]), torch.tensor([0, 2])
    given = (torch.ones(1, 1), weight, torch.tensor([2]))
    stats = tokfuse.linear_token_stats(*map(backend.put, given), kept_ids=backend.put(ids), kept_offsets=offsets)
    compare(stats.logp, torch.tensor([0.125, 0.25], dtype=torch.float64).log_softmax(0)[:1], rtol=2e-6)


OBJECTIVES = {
    "token": Objective(kl=KL(coef=0.05), entropy_coef=0.02),
    "sequence": Objective(level="sequence", entropy_coef=0.02, aggregation="seq_mean_token_mean"),
    "on_policy": Objective(entropy_coef=-0.1),
}


def policy(given: dict[str, Tensor], name: str) -> dict:
    """Return the batch of an objective. The rows without a finite logp are masked, too."""
    tokens, gen = 17, torch.Generator().manual_seed(3)
    with tokfuse.backend("reference"):
        logits = given["hidden"].double() @ given["weight"].double().t() + given["bias"].double()
        kept = (given["kept_ids"], given["kept_offsets"])
        logp = tokfuse.kept_token_stats(logits, given["target"], *kept, mask=given["mask"], temperature=0.8).logp
    out = {
        "advantage": torch.where(torch.arange(tokens) % 4 == 1, 0.0, torch.randn(tokens, generator=gen)),
        "old_logp": None if name == "on_policy" else (logp + 0.3 * torch.randn(tokens, generator=gen)).float(),
        "cu_seqlens": torch.tensor([0, 4, 4, 10, tokens]).int(),
        "normalizer": 3.0,
        "objective": OBJECTIVES[name],
    }
    return out | ({"ref_logp": (logp - 0.2).float()} if name == "token" else {})


STEPS = {f"{name}-{form}": (name, form) for name in OBJECTIVES for form in FORMS}


@pytest.mark.parametrize(
    ("name", "form", "backend"), crossed("policy_step_hidden", STEPS, {"token-hidden", "sequence-in_place"})
)
def test_policy_step_is_policy_loss_of_kept_token_stats(name: str, form: str, backend: Backend):
    with backend.forced():
        check_step(name, form, backend)


def check_step(name: str, form: str, backend: Backend):
    given = case()
    given["mask"] = given["mask"] & ~torch.isin(torch.arange(17), torch.tensor([EMPTY, EXCLUDED]))
    batch = policy(given, name)

    def loss(stats):
        inputs = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}
        return tokfuse.policy_loss(stats.logp, entropy=stats.entropy, mask=given["mask"], **inputs).loss

    want, grads = expected(given, loss, temperature=0.8)
    x = {n: backend.put(v).detach().requires_grad_() for n, v in leaves(given).items()}
    rest = {n: backend.put(v) for n, v in (given | batch).items() if n not in x} | {"temperature": 0.8}
    if form == "hidden":
        step = tokfuse.policy_step(**x, **rest, memory_budget=20_000)
    else:
        x = {"logits": (x["hidden"] @ x["weight"].t() + x["bias"]).detach()}
        if form == "logits":
            x["logits"].requires_grad_()
            step = tokfuse.policy_step(**x, **rest)
        else:
            step = tokfuse.policy_step_(**x, **rest)
            assert step.grad_logits.data_ptr() == x["logits"].data_ptr()
    for field in ("logp", "entropy", "lse"):
        compare(getattr(step.stats, field), getattr(want, field), atol=2e-5, what=field)
    found = {n: getattr(step, f"grad_{n}") for n in x}
    for n, v in found.items():
        check_gradient(n, v, grads[n])


def test_an_excluded_target_has_the_smallest_ratio_and_no_gradient(backend: Backend):
    """Its log-probability is -inf, and a log-ratio is bounded by -20: a token that the policy would never sample."""
    given = case() | {"mask": torch.arange(17) == EXCLUDED}
    batch = {"advantage": torch.ones(17), "old_logp": torch.full((17,), -1.0), "objective": Objective()}
    x = {n: backend.put(v).detach().requires_grad_() for n, v in leaves(given).items()}
    step = tokfuse.policy_step(**x, **{n: backend.put(v) for n, v in (given | batch).items() if n not in x})
    assert step.stats.logp[EXCLUDED] == -INF and float(step.grad_hidden.abs().max()) == 0.0
    compare(step.loss, torch.tensor(-20.0).double().exp().neg(), rtol=1e-6)


def test_a_frozen_head_and_the_tiles_of_its_gradient():
    """On the CPU the logits are stored in tiles inside dW; without dW they are not. Both are the same rows."""
    given = case(vocab=9001)
    batch = policy(given, "token")
    batch["advantage"] = torch.where(torch.isin(torch.arange(17), torch.tensor([EMPTY, EXCLUDED])), 0.0, 1.0)
    del batch["ref_logp"]
    batch["objective"], batch["old_logp"] = Objective(), batch["old_logp"].clamp(min=-50.0)
    rest = {n: v for n, v in (given | batch).items() if n not in ("hidden", "weight", "bias")}
    with tokfuse.backend("cpu"):
        steps = [tokfuse.policy_step(**leaves(given, needs), **rest) for needs in ("hwb", "h")]
    assert steps[1].grad_weight is None
    compare(steps[0].grad_hidden, steps[1].grad_hidden.double(), atol=1e-6)
    with tokfuse.backend("reference"):
        want = tokfuse.policy_step(**leaves(given), **rest)
    check_gradient("weight", steps[0].grad_weight, want.grad_weight.double())


@pytest.mark.parametrize("masked", [True, False])
def test_while_a_graph_is_captured_the_host_reads_nothing(masked: bool, backend: Backend, monkeypatch):
    """Without the number of kept ids per chunk, the entries of other chunks go to one more row."""
    if backend.name not in ("cuda", "triton"):
        pytest.skip(f"{backend.name}: captures no graphs")
    given = case()
    if not masked:
        del given["mask"]
        begin, end = given["kept_offsets"][MASKED : MASKED + 2].tolist()
        given["kept_ids"][begin:end] = torch.arange(end - begin)
    rest = {n: backend.put(v) for n, v in (given | {"memory_budget": 20_000}).items()}
    first = tokfuse.linear_token_stats(**rest)
    monkeypatch.setattr(device_head, "capturing", lambda x: True)
    monkeypatch.setattr(kept_rows, "may_read", lambda x: False)
    monkeypatch.setattr(torch.Tensor, "tolist", None)
    second = tokfuse.linear_token_stats(**rest)
    monkeypatch.undo()
    assert [bits(x) for x in first] == [bits(x) for x in second]


def test_where_ids_are_not_checked_a_bad_one_makes_its_row_nan():
    """As on a GPU: the row of the bad id, and no other row or memory."""
    kept = TokenIds(torch.tensor([1, 4, -1, 2]), torch.tensor([0, 1, 3, 4]), torch.Size([4]))
    z = kept_rows.copied(torch.arange(12.0).view(3, 4), kept)
    assert z[0].tolist() == [-INF, 1.0, -INF, -INF] and z[2].tolist() == [-INF, -INF, 10.0, -INF]
    assert z[1].isnan().any()


def test_leading_dimensions_and_ignored_targets():
    given = case()
    flat = tokfuse.linear_token_stats(**given)
    mask = given.pop("mask")
    given["target"] = torch.where(mask, given["target"], -100)
    shaped = {n: x[None] if n in ("hidden", "target") else x for n, x in given.items()}
    stats = tokfuse.linear_token_stats(**shaped, ignore_index=-100)
    assert stats.logp.shape == (1, 17) and torch.equal(stats.logp[0], flat.logp)


def test_errors():
    given = case()
    head = {n: given[n] for n in ("hidden", "weight", "target")}
    ids, offsets = given["kept_ids"].clone(), given["kept_offsets"]
    with pytest.raises(ValueError, match="linear_token_stats: kept_offsets must be given with kept_ids; got None"):
        tokfuse.linear_token_stats(**head, kept_ids=ids)
    with pytest.raises(ValueError, match="kept_ids must be left out with ids or top_k"):
        tokfuse.linear_token_stats(**head, kept_ids=ids, kept_offsets=offsets, top_k=2)
    with pytest.raises(ValueError, match=r"linear_token_stats: kept_ids must be in \[0, 300\).*-7 in row 4"):
        tokfuse.linear_token_stats(**head, kept_ids=ids, kept_offsets=offsets)
    ids[1] = ids[0]
    logits = torch.randn(17, 300)
    before = logits.clone()
    batch = {"advantage": torch.ones(17), "old_logp": None, "objective": Objective(), "mask": given["mask"]}
    with pytest.raises(ValueError, match="policy_step_: kept_ids must be different from each other within a row"):
        tokfuse.policy_step_(logits, target=given["target"], kept_ids=ids, kept_offsets=offsets, **batch)
    assert torch.equal(logits, before)
