"""Test the divergences over vocabulary shards, on every backend, with threads as ranks.

The truth is the reference op over the whole vocabulary in float64. Bounds are those of the whole op: values 2e-6
absolute and relative, gradients 4e-6 of the row's largest term p (1 + |log(p / q)|), and the error of a softcap.
"""

import numpy as np
import pytest
import thread_ranks
import torch
from confident_cases import cap_error
from harness import Backend, backends, bits, compare, crossed, half_ulp
from head_cases import SIZES
from pair_cases import KINDS, PairCase, logits_of, pair_case, pair_truth

import tokfuse
from tokfuse import distributed as D
from tokfuse.runtime.lm_head.probe import ProbeSource, open_source

INF = float("inf")
LEAVES = ("hidden", "weight", "bias")
CUTS = {"two": (0, 700, 1001), "uneven": (0, 1, 1, 640, 1000, 1001)}
OPTIONS = {
    "plain": {},
    "rows": {"temperature": torch.linspace(0.6, 1.8, 14), "logit_scale": 0.7},
    "softcap": {"softcap": 30.0, "logit_scale": 1.5},
    "numpy": {"temperature": np.float32(1.3), "logit_scale": np.float32(0.7)},
}


@pytest.fixture(params=backends("paired_divergence"))
def backend(request):
    return request.param


def rows(dtype: torch.dtype = torch.float32):
    """(logits of P, of Q, mask, incoming gradient): peaks at cuts, close and equal rows, excluded columns."""
    gen = torch.Generator().manual_seed(6)
    p = torch.randn(14, 1001, generator=gen) * 3
    q = p + torch.randn(14, 1001, generator=gen)
    p[0, [0, 699, 700, 1000]] = 20.0
    p[1] += 90.0
    q[1] -= 90.0
    q[2] = p[2]
    q[3] = p[3] + 1e-3 * torch.randn(1001, generator=gen)
    p[4, :700] = q[4, :700] = -INF  # a shard without a distribution
    p[5, 640:] = -INF  # excluded by P alone, a whole shard of it
    q[6, :5] = -INF
    q[7] = -INF
    p[8, :690] -= 300.0  # the shard's part underflows on one side
    q[9, 0] = 60.0
    p[10], q[10] = p[10] * 0.01, q[10] * 0.01
    mask = torch.ones(14, dtype=torch.bool)
    mask[11] = False
    p, q = p.to(dtype), q.to(dtype)
    p[11] = float("nan")
    grad = torch.randn(14, generator=gen)
    grad[12] = 0.0
    return p, q, mask, grad


def whole(p, q, mask, grad, kind, rtol=4e-6, **options):
    """(divergence, gradient, bound of the gradient: rtol times the largest term of each row) in float64."""
    with tokfuse.backend("reference"):
        leaf = p.double().requires_grad_()
        value = tokfuse.paired_divergence(leaf, q.double(), mask=mask, **kind, **options)
        usable = torch.where(value.isfinite(), value, 0.0)
        (usable @ grad.double()).backward()
    scale, softcap = options.get("logit_scale", 1.0), options.get("softcap")

    def log_probs(z):
        u = z.double() * scale
        u = u if softcap is None else torch.where(u == -INF, u, softcap * torch.tanh(u / softcap))
        divisor = torch.as_tensor(options.get("temperature", 1.0), dtype=torch.float64).reshape(-1, 1)
        return torch.log_softmax(u / divisor, -1), scale / divisor

    (log_p, slope), (log_q, _) = log_probs(p), log_probs(q)
    gap = torch.where(log_p == -INF, 0.0, (log_p - log_q).abs()).nan_to_num(0.0, 0.0, 0.0)
    term = slope * (torch.maximum(log_p.exp(), log_q.exp()) + log_p.exp() * gap)
    term = term.nan_to_num(0.0).amax(-1, keepdim=True) * grad.abs().unsqueeze(-1)
    near = (log_p - log_q).abs() < 1e-5 if kind["kind"] == "tvd" else torch.zeros_like(p, dtype=torch.bool)
    slack = torch.where(near, log_p.exp() * slope * grad.abs().unsqueeze(-1), 0.0)
    return value.detach(), leaf.grad, rtol * term + slack + slack.sum(-1, keepdim=True) * log_p.exp().nan_to_num(0.0)


def sharded(backend: Backend, p, q, mask, grad, cuts, kind, **options):
    """[(divergence, gradient of its columns)] of the ranks; the tensors have padding columns of NaN."""
    options = {name: backend.put(x) for name, x in options.items()}

    def cut(z, shard):
        out = torch.full((len(z), shard.size + 3), float("nan"), dtype=z.dtype)
        out[:, : shard.size] = z[:, shard.start : shard.stop]
        return backend.put(out).detach()

    def of_rank(shard):
        leaf = cut(p, shard).requires_grad_()
        value = D.paired_divergence(leaf, cut(q, shard), shard=shard, mask=backend.put(mask), **kind, **options)
        torch.where(value.isfinite(), value, 0.0).backward(backend.put(grad).to(value.dtype))
        assert not leaf.grad[:, shard.size :].any()
        return value.detach(), leaf.grad[:, : shard.size]

    return thread_ranks.run(backend, CUTS[cuts], of_rank)


@pytest.mark.parametrize(
    "kind, name, cuts",
    [(kind, "plain", "uneven") for kind in KINDS]
    + [(kind, name, "two") for kind in ("kl_reverse", "skew_forward") for name in OPTIONS],
)
def test_shards_give_the_whole_divergence(backend, cuts, name, kind):
    p, q, mask, grad = rows()
    got = sharded(backend, p, q, mask, grad, cuts, KINDS[kind], **OPTIONS[name])
    rtol = 4e-6 + cap_error(OPTIONS[name], backend.name)
    value, want, bound = whole(p, q, mask, grad, KINDS[kind], rtol, **OPTIONS[name])
    exact = backend.name == "reference"
    assert all(bits(x) == bits(got[0][0]) for x, _ in got), "ranks differ"
    compare(got[0][0], value, atol=1e-7 if exact else 2e-6, rtol=1e-7 if exact else 2e-6, what="divergence")
    assert float(got[0][0][2]) == 0.0, "equal rows"
    compare(torch.cat([x.cpu() for _, x in got], 1), want, atol=bound + 1e-9, what="gradient")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["kl_forward", "jsd 0.2"])
def test_other_dtypes(backend, kind, dtype):
    if dtype == torch.float64 and backend.name != "reference":
        pytest.skip(f"{backend.name} takes no float64")
    p, q, mask, grad = rows(dtype)
    got = sharded(backend, p, q, mask, grad, "uneven", KINDS[kind])
    value, want, bound = whole(p, q, mask, grad, KINDS[kind])
    tight = 1e-12 if dtype == torch.float64 else 2e-6
    compare(got[0][0], value, atol=tight, rtol=tight, what="divergence")
    if dtype == torch.bfloat16:  # the interpreter truncates; hardware rounds
        bound = bound + half_ulp(want, dtype) * (2 if backend.name == "triton" else 1)
    compare(torch.cat([x.cpu() for _, x in got], 1), want, atol=bound + 1e-9, what="gradient")


# ------------------------------------------------------------------------------ from hidden states

HEAD_CUTS = {"tiles": (0, 700, 701, 701, SIZES["tiles"][2]), "one_tile": (0, 300, SIZES["one_tile"][2])}
HEAD_OPTIONS = {
    "plain": {},
    "own": {"temperature": torch.linspace(0.6, 1.8, 37), "teacher_softcap": 9.0, "teacher_logit_scale": 0.8},
    "softcap": {"softcap": 5.0, "teacher_temperature": 1.5},
}


def own_rows(backend: Backend, x: torch.Tensor, shard, axis: int = 0) -> torch.Tensor:
    """A rank's part, with two padding rows or columns of NaN."""
    part = x.narrow(axis, shard.start, shard.size)
    shape = list(part.shape)
    shape[axis] += 2
    out = torch.full(shape, float("nan"), dtype=x.dtype)
    out.narrow(axis, 0, shard.size).copy_(part)
    return backend.put(out).detach()


def heads(backend: Backend, case: PairCase, shard, teacher: str):
    """Arguments of a rank; the first three require grad."""
    given = {
        n: own_rows(backend, getattr(case, n), shard) for n in ("weight", "bias", "teacher_weight", "teacher_bias")
    }
    given |= {n: backend.put(getattr(case, n)).detach() for n in ("hidden", "teacher_hidden", "target")}
    if teacher == "logits":
        for name in ("teacher_hidden", "teacher_weight", "teacher_bias"):
            del given[name]
        given["teacher_logits"] = own_rows(backend, logits_of(case)[1].to(case.hidden.dtype), shard, 1)
    leaves = {n: given[n].requires_grad_() for n in LEAVES}
    return given, leaves


def check_gradients(case: PairCase, grads, truth):
    """grads: {name: gradient} of the ranks; the summed one of hidden is the same on all."""
    expected, scales = truth.through_head(case)
    whole = {"hidden": grads[0]["hidden"]} | {n: torch.cat([g[n][:-2] for g in grads]) for n in ("weight", "bias")}
    for name, got in whole.items():
        atol = 1.5e-5 * scales[name]
        assert got.dtype == getattr(case, name).dtype
        if got.dtype != torch.float32:
            atol = atol + 2 * half_ulp(expected[name], got.dtype)
            if name == "hidden":  # the parts of the ranks are rounded before their sum
                atol = atol + 2.0**-7 * expected[name].abs().max()
        compare(got, expected[name], atol=atol, what=f"grad_{name}")
    assert all(bits(g["hidden"]) == bits(grads[0]["hidden"]) for g in grads)
    assert not any(g[n][-2:].any() for g in grads for n in ("weight", "bias")), "padding"


HEADS = {
    "kl_reverse": ("kl_reverse", "plain", "hidden", torch.float32),
    "kl_forward": ("kl_forward", "softcap", "hidden", torch.float32),
    "jsd": ("jsd 0.2", "own", "hidden", torch.float32),
    "teacher logits": ("skew_reverse", "plain", "logits", torch.float32),
    "16 bits": ("tvd", "plain", "hidden", torch.bfloat16),
    "mixed": ("jsd", "plain", "hidden", "mixed"),
}


@pytest.mark.parametrize(
    "kind, name, teacher, dtype, backend",
    # The interpreter needs 20 s for some.
    crossed("paired_divergence", HEADS, ("kl_forward", "mixed")),
    indirect=["backend"],
)
def test_heads(backend, kind, name, teacher, dtype):
    """linear_paired_divergence through all three outputs, then distill_step with its loss as coefficients."""
    size, options = "tiles", HEAD_OPTIONS[name]
    if dtype == "mixed":  # both heads are computed in float32
        size, dtype = "one_tile", torch.bfloat16
        case = pair_case(size, dtype)
        case = case._replace(weight=case.weight.float(), teacher_hidden=case.teacher_hidden.float())
    else:
        case = pair_case(size, dtype)
    c = tuple(torch.cos(torch.arange(37) + shift * 1.7) for shift in range(3))
    c[0][::5] = c[1][::5] = c[2][::5] = 0.0
    mask = torch.arange(37) % 7 != 3
    z, of_teacher = logits_of(case)
    if teacher == "logits":
        of_teacher = of_teacher.to(dtype)
    truth = pair_truth(z, of_teacher, case.target, c, KINDS[kind], mask=mask, **options)
    put = {n: backend.put(x) for n, x in options.items()} | {"mask": backend.put(mask)} | KINDS[kind]

    def differentiated(shard):
        given, leaves = heads(backend, case, shard, teacher)
        stats = D.linear_paired_divergence(shard=shard, memory_budget=300_000, **given, **put)
        torch.autograd.backward([stats.divergence, stats.entropy, stats.logp], [backend.put(x) for x in c])
        return stats, {n: x.grad for n, x in leaves.items()}

    results = thread_ranks.run(backend, HEAD_CUTS[size], differentiated)
    for stats, _ in results:
        for field, want in truth.stats.items():
            compare(getattr(stats, field), want, atol=4e-6, rtol=4e-6, what=field)
            assert bits(getattr(stats, field)) == bits(getattr(results[0][0], field))
    check_gradients(case, [g for _, g in results], truth)

    def step(shard):
        given, leaves = heads(backend, case, shard, teacher)
        coef = backend.put(c[0])
        out = D.distill_step(shard=shard, coef=coef, normalizer=1, memory_budget=300_000, **given, **put)
        out.loss.backward()
        return out, {n: x.grad for n, x in leaves.items()}

    results = thread_ranks.run(backend, HEAD_CUTS[size], step)
    counts = mask & (c[0] != 0)
    none = torch.zeros(37)
    truth = pair_truth(z, of_teacher, case.target, (c[0], none, none), KINDS[kind], mask=counts, **options)
    for out, _ in results:
        for field, want in truth.stats.items():
            compare(getattr(out.stats, field), want, atol=4e-6, rtol=4e-6, what=field)
        assert bits(out.loss) == bits(results[0][0].loss)
        compare(out.loss, (c[0].double() * truth.stats["divergence"]).sum(), atol=2e-4, what="loss")
        assert float(out.count) == int(mask.sum())
    check_gradients(case, [g for _, g in results], truth)


@pytest.mark.parametrize("kind, name", [("kl_reverse", "plain"), ("jsd", "own"), ("skew_forward", "softcap")])
def test_a_step_from_logits(backend, kind, name):
    case, options = pair_case("one_tile"), HEAD_OPTIONS[name]
    z, teacher = (x.float() for x in logits_of(case))
    coef = torch.where(torch.arange(37) % 4 == 1, 0.0, torch.cos(torch.arange(37) * 1.3))
    none = torch.zeros(37)
    truth = pair_truth(z, teacher, case.target, (coef, none, none), KINDS[kind], mask=coef != 0, **options)
    z[coef == 0] = float("nan")  # rows without a weight are never used
    put = {n: backend.put(x) for n, x in options.items()} | KINDS[kind]

    def step(shard):
        leaf = own_rows(backend, z, shard, 1).requires_grad_()
        teacher_logits, target = own_rows(backend, teacher, shard, 1), backend.put(case.target)
        weights = {"coef": backend.put(coef), "target": target}
        out = D.distill_step(shard=shard, logits=leaf, teacher_logits=teacher_logits, **weights, **put)
        out.loss.backward()
        assert not leaf.grad[:, shard.size :].any() and not leaf.grad[backend.put(coef == 0)].any()
        return out, leaf.grad[:, : shard.size].cpu()

    results = thread_ranks.run(backend, HEAD_CUTS["one_tile"], step)
    for field, want in truth.stats.items():
        compare(getattr(results[0][0].stats, field), want, atol=4e-6, rtol=4e-6, what=field)
    bound = 1e-5 * truth.terms.amax(-1, keepdim=True) + 1e-9
    compare(torch.cat([g for _, g in results], 1), truth.grad_logits, atol=bound, what="gradient")
    assert bits(results[0][0].loss) == bits(results[1][0].loss)


# ------------------------------------------------------------------------------------ limits of all

IDS = torch.zeros(37, 2, dtype=torch.int64)
CALLS = {
    "token_stats": lambda x, shard: D.token_stats(x["z"], x["target"], shard=shard, ids=IDS).logp_at,
    "linear_token_stats": lambda x, shard: (
        D.linear_token_stats(x["hidden"], x["weight"], x["target"], shard=shard, ids=IDS).logp_at
    ),
    "paired_divergence": lambda x, shard: D.paired_divergence(x["z"], x["teacher"], shard=shard),
    "linear_paired_divergence": lambda x, shard: (
        (
            D.linear_paired_divergence(x["hidden"], x["weight"], kind="jsd", teacher_logits=x["teacher"], shard=shard)
        ).divergence
    ),
    "distill_step": lambda x, shard: (
        (
            D.distill_step(hidden=x["hidden"], weight=x["weight"], kind="jsd", teacher_logits=x["teacher"], shard=shard)
        ).loss
    ),
}


def of_one_rank(name: str, use):
    """Call an op with a shard that is the whole vocabulary, on the reference."""
    case = pair_case("one_tile")
    z, teacher = (x.float() for x in logits_of(case))
    given = {"z": z, "teacher": teacher, "hidden": case.hidden, "weight": case.weight, "target": case.target}
    given = {n: x.detach().clone() for n, x in given.items()}
    leaves = ["z"] if name in ("token_stats", "paired_divergence") else ["hidden", "weight"]

    def of_rank(shard):
        used = [given[n].requires_grad_() for n in leaves]
        return use(lambda: CALLS[name](given, shard), used)

    thread_ranks.run(Backend("reference", "cpu"), (0, case.weight.shape[0]), of_rank)


@pytest.mark.parametrize("name", CALLS)
def test_a_second_derivative_is_refused(name):
    def use(call, leaves):
        with pytest.raises(ValueError, match="create_graph must be False"):
            torch.autograd.grad(call().sum(), leaves, create_graph=True)

    of_one_rank(name, use)


class CapturesAll(ProbeSource):
    """An open capture of every lm_head."""

    def probe(self, op, hidden, weight, cu_seqlens):
        raise AssertionError

    def captures_head(self, hidden_size):
        return True


@pytest.mark.parametrize("name", [name for name in CALLS if name not in ("token_stats", "paired_divergence")])
def test_a_captured_head_is_refused(name):
    def use(call, leaves):
        with (
            open_source(CapturesAll()),
            pytest.raises(ValueError, match="got the captured lm_head split over ranks. Capture the other layers"),
        ):
            call()

    of_one_rank(name, use)
