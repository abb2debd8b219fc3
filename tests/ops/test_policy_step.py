"""Test policy_step and policy_step_: the fused step equals the composition of the simple ops.

On the cpu backend, loss and metrics are bitwise those of policy_loss(token_stats(...)). Gradients agree with
a float64 composition within 4e-6 of the largest entry (2e-6 of the statistics, and the float32 log-prob in
the ratio). A row without a coefficient has a zero gradient.
"""

import pytest
import torch

import tokfuse
from tokfuse import KL, Objective, PPOClip
from tokfuse.runtime.core import native

pytestmark = pytest.mark.skipif(native.module() is None, reason="the native module is not built: cpu backend missing")

TOKENS, HIDDEN, VOCAB = 41, 24, 4099  # two column blocks and a tail of 3
OBJECTIVES = {
    "clip": Objective(shape=PPOClip(low=0.1, high=0.1, dual=2.0)),
    "kl_entropy": Objective(kl=KL(coef=0.05), entropy_coef=0.02, aggregation="seq_mean_token_mean"),
    "anchor": Objective(kl=KL(coef=0.05), anchor=KL(estimator="k1", coef=-0.3), shape=PPOClip(low=0.1, high=0.1)),
    "gspo": Objective(level="sequence", aggregation="seq_mean_token_mean"),
    "gspo_token": Objective(level="sequence_token", entropy_coef=0.01),
    "cispo": Objective(shape=tokfuse.StopGradClip(ratio_max=1.2), aggregation="token_sum"),
}


def problem(objective=OBJECTIVES["clip"], dtype=torch.float32):
    g = torch.Generator().manual_seed(3)
    rand = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    hidden, weight, bias = rand(TOKENS, HIDDEN), rand(VOCAB, HIDDEN) * 0.4, rand(VOCAB) * 0.3
    target = torch.randint(0, VOCAB, (TOKENS,), generator=g)
    logits = hidden @ weight.t() + bias
    old = torch.log_softmax(logits / 1.2, -1).gather(1, target[:, None])[:, 0] + 0.2 * rand(TOKENS)
    advantage = rand(TOKENS)
    advantage[::3] = 0
    mask = torch.rand(TOKENS, generator=g) > 0.2
    keywords = {
        "target": target,
        "old_logp": old,
        "advantage": advantage,
        "mask": mask,
        "cu_seqlens": torch.tensor([0, 7, 7, 20, 41], dtype=torch.int32),
        "objective": objective,
        "normalizer": 3.0,
        "temperature": 1.2,
    }
    if objective.kl is not None:
        keywords["ref_logp"] = old + 0.1 * rand(TOKENS)
    if objective.anchor is not None:
        keywords["anchor_logp"] = torch.zeros(TOKENS)
        keywords["anchor_weight"] = (torch.arange(TOKENS) % 2).float()
    return [x.to(dtype) for x in (hidden, weight, bias)], logits, keywords


def doubled(keywords):
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in keywords.items()}


def exact(tensors, keywords):
    """Return loss and gradients of the float64 reference, by autograd through the full logits."""
    leaves = [x.double().requires_grad_() for x in tensors]
    with tokfuse.backend("reference"):
        step = tokfuse.policy_step(hidden=leaves[0], weight=leaves[1], bias=leaves[2], **doubled(keywords))
        step.loss.backward()
    return step, [x.grad for x in leaves]


def close(actual, expected, bound=4e-6):
    assert actual.shape == expected.shape
    error = (actual.detach().double() - expected).abs().max() / expected.abs().max()
    assert float(error) <= bound


@pytest.mark.parametrize("name", OBJECTIVES)
def test_equals_the_composition_bitwise(name):
    _, logits, keywords = problem(OBJECTIVES[name])
    step = tokfuse.policy_step(logits=logits, **keywords)
    inputs = dict(keywords)
    target, temperature = inputs.pop("target"), inputs.pop("temperature")
    stats = tokfuse.token_stats(logits, target, temperature=temperature, mask=inputs["mask"])
    loss = tokfuse.policy_loss(stats.logp, entropy=stats.entropy, **inputs)
    assert torch.equal(step.loss, loss.loss)
    assert torch.equal(step.token_loss, loss.token_loss)
    assert torch.equal(step.metrics.sums, loss.metrics.sums)
    assert torch.equal(step.loss_sum, loss.loss_sum) and torch.equal(step.count, loss.count)
    for fused, simple in zip(step.stats, stats, strict=True):
        assert torch.equal(fused, simple)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("budget", [None, 1, 11 * 4 * (VOCAB + 64)])
def test_from_hidden_against_float64(name, budget):
    tensors, _, keywords = problem(OBJECTIVES[name])
    reference, expected = exact(tensors, keywords)
    leaves = [x.clone().requires_grad_() for x in tensors]
    step = tokfuse.policy_step(hidden=leaves[0], weight=leaves[1], bias=leaves[2], memory_budget=budget, **keywords)
    step.loss.backward()
    close(step.loss, reference.loss.detach(), 1e-5)
    for leaf, gradient in zip(leaves, expected, strict=True):
        close(leaf.grad, gradient)


def test_wide_hidden_takes_the_buffer_inside_dw():
    """hidden > tokens: the logits of all rows fit into the memory of dW, in two tiles."""
    g = torch.Generator().manual_seed(5)
    tensors = [
        torch.randn(20, 64, generator=g),
        torch.randn(6000, 64, generator=g) * 0.3,
        torch.randn(6000, generator=g),
    ]
    target = torch.randint(0, 6000, (20,), generator=g)
    keywords = {
        "target": target,
        "old_logp": torch.full((20,), -8.0),
        "objective": Objective(),
        "advantage": torch.randn(20, generator=g),
    }
    _, expected = exact(tensors, keywords)
    leaves = [x.clone().requires_grad_() for x in tensors]
    tokfuse.policy_step(hidden=leaves[0], weight=leaves[1], bias=leaves[2], **keywords).loss.backward()
    for leaf, gradient in zip(leaves, expected, strict=True):
        close(leaf.grad, gradient)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_from_logits_out_of_place_and_over_the_logits(name):
    tensors, logits, keywords = problem(OBJECTIVES[name])
    _, expected = exact(tensors, keywords)
    leaf = logits.clone().requires_grad_()
    before = logits.clone()
    step = tokfuse.policy_step(logits=leaf, **keywords)
    assert torch.equal(leaf.detach(), before)
    written = step.grad_logits.clone()
    step.loss.backward()
    assert torch.equal(leaf.grad, written)
    # The logits were rounded to float32 here.
    close(leaf.grad.double() @ tensors[1].double(), expected[0], 6e-6)

    over = logits.clone()
    version = over._version
    in_place = tokfuse.policy_step_(over, **keywords)
    assert in_place.grad_logits.data_ptr() == over.data_ptr()
    assert torch.equal(over, written) and over._version > version
    assert torch.equal(in_place.loss, step.loss.detach())


def test_in_place_feeds_the_layers_below():
    (hidden, weight, bias), _, keywords = problem()
    grads = []
    for over in (False, True):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logits = h @ w.t() + bias
        if over:
            step = tokfuse.policy_step_(logits, **keywords)
        else:
            step = tokfuse.policy_step(logits=logits, **keywords)
        (2.5 * step.loss).backward()
        grads.append((h.grad, w.grad))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_head(dtype):
    tensors, _, keywords = problem(OBJECTIVES["kl_entropy"], dtype)
    _, expected = exact(tensors, keywords)
    leaves = [x.clone().requires_grad_() for x in tensors]
    step = tokfuse.policy_step(hidden=leaves[0], weight=leaves[1], bias=leaves[2], **keywords)
    step.loss.backward()
    ulp = {torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    for leaf, gradient in zip(leaves, expected, strict=True):
        assert leaf.grad.dtype == dtype
        bound = ulp * gradient.abs() + 4e-6 * gradient.abs().max() + 1e-7
        assert bool(((leaf.grad.double() - gradient).abs() <= bound).all())


def test_rows_without_coefficient_have_exactly_no_gradient():
    _, logits, keywords = problem()
    step = tokfuse.policy_step(logits=logits, **keywords)
    rows = step.grad_logits.abs().amax(-1) > 0
    dead = ~keywords["mask"] | (keywords["advantage"] == 0)
    assert bool((~rows[dead]).all())
    assert int(rows.sum()) == int(step.metrics.sums[-1]) < int(keywords["mask"].sum())
    logits[dead] = float("nan")  # a masked row is not read
    logits[keywords["mask"] & dead] = 0.0
    again = tokfuse.policy_step(logits=logits, **keywords)
    assert torch.equal(again.grad_logits, step.grad_logits)


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 1, 1), (0, 0, 0)])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradients_only_where_asked(needs, backend):
    tensors, _, keywords = problem()
    leaves = [x.clone().requires_grad_(bool(n)) for x, n in zip(tensors, needs, strict=True)]
    with tokfuse.backend(backend):
        step = tokfuse.policy_step(hidden=leaves[0], weight=leaves[1], bias=leaves[2], **keywords)
    held = (step.grad_hidden, step.grad_weight, step.grad_bias)
    assert [x is not None for x in held] == [bool(n) for n in needs]
    assert step.loss.requires_grad == any(needs)


def test_backward_twice():
    tensors, _, keywords = problem()
    leaves = [x.clone().requires_grad_() for x in tensors]
    step = tokfuse.policy_step(hidden=leaves[0], weight=leaves[1], bias=leaves[2], **keywords)
    step.loss.backward(retain_graph=True)
    first = [x.grad.clone() for x in leaves]
    for x in leaves:
        x.grad.zero_()  # must not change the gradients that the graph still stores
    (3 * step.loss).backward()
    for x, once in zip(leaves, first, strict=True):
        torch.testing.assert_close(x.grad, 3 * once, rtol=1e-6, atol=0)
    assert step.grad_weight is None
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        step.loss.backward()


def test_autocast_changes_nothing():
    tensors, _, keywords = problem()
    results = []
    for enabled in (False, True):
        leaves = [x.clone().requires_grad_() for x in tensors]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            step = tokfuse.policy_step(hidden=leaves[0], weight=leaves[1], bias=leaves[2], **keywords)
        step.loss.backward()
        results.append([step.loss.detach(), *(x.grad for x in leaves)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("from_hidden", [False, True])
@pytest.mark.parametrize("empty", ["no tokens", "all masked"])
def test_empty_batch_is_a_differentiable_zero(from_hidden, empty):
    tokens = 0 if empty == "no tokens" else 3
    hidden, weight = torch.randn(tokens, 8).requires_grad_(), torch.randn(50, 8).requires_grad_()
    keywords = {
        "target": torch.zeros(tokens, dtype=torch.int64),
        "old_logp": torch.zeros(tokens),
        "advantage": torch.ones(tokens),
        "objective": Objective(),
        "normalizer": "batch",
        "mask": torch.zeros(tokens, dtype=torch.bool),
    }
    if from_hidden:
        step = tokfuse.policy_step(hidden=hidden, weight=weight, **keywords)
    else:
        step = tokfuse.policy_step(logits=hidden @ weight.t(), **keywords)
    assert float(step.loss.detach()) == 0.0 and float(step.count) == 0.0
    step.loss.backward()
    for x in (hidden, weight):
        assert x.grad is not None and bool((x.grad == 0).all())


def test_normalizer_is_invariant_to_micro_batches():
    _, logits, keywords = problem(Objective())
    total = float(keywords["mask"].sum())
    whole = tokfuse.policy_step(logits=logits, **{**keywords, "normalizer": total})
    parts, split = [], [(0, 20), (20, 41)]
    for a, b in split:
        rows = {k: v[a:b] for k, v in keywords.items() if k in ("target", "old_logp", "advantage", "mask")}
        part = {**keywords, **rows, "normalizer": total, "cu_seqlens": None}
        parts.append(tokfuse.policy_step(logits=logits[a:b], **part))
    assert torch.equal(torch.cat([p.grad_logits for p in parts]), whole.grad_logits)
    torch.testing.assert_close(sum(p.loss for p in parts), whole.loss)
    merged = parts[0].metrics + parts[1].metrics
    torch.testing.assert_close(merged.sums[3:], whole.metrics.sums[3:])


def test_no_argument_is_mutated():
    tensors, logits, keywords = problem(OBJECTIVES["kl_entropy"])
    given = [*tensors, logits, *(v for v in keywords.values() if isinstance(v, torch.Tensor))]
    copies = [x.clone() for x in given]
    tokfuse.policy_step(logits=logits, **keywords)
    leaves = [x.requires_grad_() for x in tensors]
    tokfuse.policy_step(hidden=leaves[0], weight=leaves[1], bias=leaves[2], **keywords).loss.backward()
    for x, copy in zip(given, copies, strict=True):
        assert torch.equal(x.detach(), copy)


def test_threads_and_repetition_give_the_same_bits():
    _, logits, keywords = problem(OBJECTIVES["kl_entropy"])
    threads = torch.get_num_threads()
    results = []
    for n in (1, 2, 2):
        torch.set_num_threads(n)
        step = tokfuse.policy_step(logits=logits, **keywords)
        results.append((step.loss, step.grad_logits, step.metrics.sums))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


REFUSALS = {
    "neither input": ({"logits": None}, "either logits= or hidden= with weight=; got neither"),
    "both inputs": ({"hidden": torch.zeros(TOKENS, 2)}, "got both"),
    "weight with logits": ({"weight": torch.zeros(VOCAB, 2)}, "weight must be left out with log"),
    "bad target": ({"target": torch.full((TOKENS,), VOCAB)}, rf"in \[0, {VOCAB}\) in every row where mask"),
    "old_logp": ({"old_logp": torch.zeros(3)}, r"old_logp must be of shape \(41,\) to match"),
    "normalizer": ({"normalizer": 0}, r"normalizer must be a finite number in \(0, inf\); got 0"),
    "unused signal": ({"signal": torch.zeros(TOKENS)}, "signal must be None with shape PPOClip"),
    "kl without ref": ({"objective": OBJECTIVES["kl_entropy"]}, "ref_logp must be given for a KL term; got None"),
    "temperature": ({"temperature": -1.0}, "temperature must be a finite number .*; got -1.0"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_come_before_anything_is_written(case):
    change, message = REFUSALS[case]
    _, logits, keywords = problem()
    before = logits.clone()
    with pytest.raises(ValueError, match=message):
        tokfuse.policy_step(**{"logits": logits, **keywords, **change})
    if not change.keys() & {"logits", "hidden", "weight"}:
        with pytest.raises(ValueError, match=message.replace("policy_step:", "")):
            tokfuse.policy_step_(logits, **{**keywords, **change})
    assert torch.equal(logits, before)


def test_in_place_refuses_what_it_cannot_write():
    _, logits, keywords = problem()
    with pytest.raises(ValueError, match="no leaf that requires grad"):
        tokfuse.policy_step_(logits.clone().requires_grad_(), **keywords)
    for broken in (logits.t().contiguous().t(), logits[:1].expand(TOKENS, VOCAB)):
        with pytest.raises(ValueError, match="writable in place"):
            tokfuse.policy_step_(broken, **keywords)


def test_head_refusals():
    (hidden, weight, bias), _, keywords = problem()
    cases = [
        ({"weight": None}, "weight must be given with hidden="),
        ({"weight": weight[:, 1:]}, r"weight must be of shape \(vocab, hidden\) with hidden = 24"),
        ({"weight": weight.long()}, "weight must be of dtype .* got int64"),
        ({"bias": bias[1:]}, rf"bias must be of shape \({VOCAB},\) to match the rows of weight"),
        ({"memory_budget": 0}, "memory_budget must be a whole number of bytes >= 1; got 0"),
        ({"target": torch.full((TOKENS,), -1)}, r"in \[0, 4099\) in every row where mask is True"),
    ]
    for change, message in cases:
        arguments = {"hidden": hidden, "weight": weight, "bias": bias, **keywords, **change}
        with pytest.raises(ValueError, match=message):
            tokfuse.policy_step(**arguments)
