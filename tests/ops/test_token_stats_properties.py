"""Test token_stats: bitwise invariances, autograd behaviour, rows beyond 2^31 elements."""

import pytest
import torch
from harness import FLOAT_DTYPES, Backend, backends, bits, compare
from logit_cases import INF, Case

import tokfuse


@pytest.fixture(params=backends("token_stats"))
def backend(request):
    with request.param.forced():
        yield request.param


@pytest.fixture(params=backends("token_stats", without="reference"))
def kernel(request):
    """The backends with bitwise guarantees. Torch's reductions depend on batch, threads and strides."""
    with request.param.forced():
        yield request.param


def run(backend: Backend, logits, target, **options):
    """Return [statistics..., gradient of sum(cos logp + sin entropy)] on the CPU."""
    z = backend.put(logits).detach().requires_grad_()
    options = {name: backend.put(value) for name, value in options.items()}
    stats = tokfuse.token_stats(z, backend.put(target), **options)
    (stats.logp.cos().sum() + stats.entropy.sin().sum()).backward()
    return [x.detach().cpu() for x in (*stats, z.grad)]


def same(left, right) -> bool:
    return all(bits(a) == bits(b) for a, b in zip(left, right, strict=True))


def agree(backend: Backend, left, right) -> None:
    """Check bitwise equality, except if a reduction depends on the memory layout.

    This is the case in torch, and in Triton, which reads rows that start at multiples of 16 bytes in vectors and
    other rows by single elements.
    """
    if backend.name not in ("reference", "triton"):
        assert same(left, right)
    for a, b in zip(left, right, strict=True):
        compare(a, b, atol=4e-6)


def batch(dtype=torch.float32, tokens=9, vocab=5003):
    logits, target, _ = Case("properties", tokens, vocab).make(dtype)
    logits[2, : vocab // 2] = -INF
    logits[4:5] = -INF
    target[2] = vocab - 1
    return logits, target


# -------------------------------------------------------------------------------------- invariances


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_a_row_alone_equals_the_row_in_its_batch(dtype: torch.dtype, kernel: Backend):
    logits, target = batch(dtype)
    whole = run(kernel, logits, target)
    for t in range(len(target)):
        alone = run(kernel, logits[t : t + 1].clone(), target[t : t + 1])
        assert same(alone, [x[t : t + 1] for x in whole]), t
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(0))
    assert same(run(kernel, logits[order], target[order]), [x[order] for x in whole])
    wide = torch.zeros(len(target), 5050, dtype=dtype)
    wide[:, 11:5014] = logits
    assert same(run(kernel, wide[:, 11:5014], target), whole)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_the_thread_count_changes_no_bit(dtype: torch.dtype, kernel: Backend):
    if kernel.name in ("cuda", "triton"):
        pytest.skip("runs on no CPU threads")
    logits, target = batch(dtype, tokens=40)
    mask = torch.arange(40) % 3 != 1
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(kernel, logits, target, mask=mask, softcap=20.0))
            results.append(run(kernel, logits, target, mask=mask))
    finally:
        torch.set_num_threads(threads)
    assert same(results[0], results[2]) and same(results[0], results[4])
    assert same(results[1], results[3]) and same(results[1], results[5])
    assert not same(results[0], results[1])


def test_two_runs_are_bitwise_equal(backend: Backend):
    logits, target = batch(torch.bfloat16)
    assert same(run(backend, logits, target), run(backend, logits, target))


def test_packing_order_does_not_matter(backend: Backend):
    logits, target = batch()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    whole, moved = run(backend, logits, target), run(backend, logits[order], target[order])
    for a, b in zip(whole, moved, strict=True):
        compare(b, a[order].nan_to_num(0), atol=2e-6) if a.dim() == 2 else compare(b, a[order])


def test_shifting_the_logits_shifts_lse_only(backend: Backend):
    logits = torch.randint(-512, 512, (6, 700), generator=torch.Generator().manual_seed(3)) / 64.0
    target = torch.arange(6) * 100
    plain, moved = run(backend, logits, target), run(backend, logits + 16.0, target)
    for i, name in enumerate(("logp", "entropy", "lse", "sum_sq", "top1")):
        shift = 16.0 if name == "lse" else 0.0
        compare(moved[i], plain[i] + shift, atol=4e-6, what=name)
    compare(moved[5], plain[5], atol=1e-6)


def test_permuting_the_vocabulary_permutes_the_gradient(backend: Backend):
    logits, target = batch()
    order = torch.randperm(5003, generator=torch.Generator().manual_seed(5))
    plain = run(backend, logits, target)
    moved = run(backend, logits[:, order], order.argsort()[target])
    for a, b in zip(plain[:5], moved[:5], strict=True):
        compare(b, a, atol=4e-6)
    compare(moved[5], plain[5][:, order], atol=4e-6)


def test_sum_over_splits_equals_the_whole(backend: Backend):
    logits, target = batch()
    whole = run(backend, logits, target)
    parts = [run(backend, logits[i : i + 4], target[i : i + 4]) for i in (0, 4, 8)]
    for i in range(6):
        compare(torch.cat([p[i] for p in parts]), whole[i], atol=2e-6)


def test_strides_do_not_matter(backend: Backend):
    logits, target = batch(tokens=4, vocab=2050)
    plain = run(backend, logits, target)
    wide = torch.full((4, 3, 2050), float("nan"))
    wide[:, 1] = logits
    agree(backend, run(backend, wide[:, 1], target), plain)
    agree(backend, run(backend, logits.t().contiguous().t(), target), plain)
    agree(backend, run(backend, logits.repeat(2, 1)[4:], target), plain)
    long = torch.stack([target, target * 0 - 1], 1)
    agree(backend, run(backend, logits, long[:, 0]), plain)
    mask = torch.tensor([True, False, True, True])
    agree(
        backend,
        run(backend, logits, target, mask=mask.repeat_interleave(2)[::2]),
        run(backend, logits, target, mask=mask),
    )


def test_sum_sq_and_logp_give_the_squared_gradient_norm(backend: Backend):
    """|| d logp / d logits ||^2 = 1 - 2 p_y + sum p^2 at temperature 1."""
    logits, target, _ = Case("norm", 5, 900, scale=1.5).make(torch.float32)
    z = backend.put(logits).requires_grad_()
    stats = tokfuse.token_stats(z, backend.put(target))
    stats.logp.sum().backward()
    assert z.grad is not None
    norm = z.grad.double().square().sum(1)
    compare(1 - 2 * stats.logp.double().exp() + stats.sum_sq.double(), norm.cpu(), atol=1e-6)


# ----------------------------------------------------------------------------------------- autograd


def test_only_logp_entropy_and_lse_carry_gradients(backend: Backend):
    logits, target = batch(tokens=3, vocab=50)
    z = backend.put(logits).requires_grad_()
    stats = tokfuse.token_stats(z, backend.put(target))
    assert [x.requires_grad for x in stats] == [True, True, True, False, False]
    (grad_logp,) = torch.autograd.grad(stats.logp.sum(), z, retain_graph=True)
    (grad_entropy,) = torch.autograd.grad(stats.entropy.sum(), z, retain_graph=True)
    (both,) = torch.autograd.grad(stats.logp.sum() + stats.entropy.sum(), z)
    compare(both, grad_logp + grad_entropy, atol=2e-7)
    assert not torch.equal(grad_logp, grad_entropy)


def test_no_graph_without_grad(backend: Backend):
    logits, target = (backend.put(x) for x in batch(tokens=3, vocab=50))
    with_grad = tokfuse.token_stats(logits.clone().requires_grad_(), target)
    assert not any(x.requires_grad for x in tokfuse.token_stats(logits, target))
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            stats = tokfuse.token_stats(logits.clone().requires_grad_(), target)
            assert not any(x.requires_grad for x in stats)
            assert same(stats, with_grad)


def test_retained_graph_gives_the_same_gradient_twice(backend: Backend):
    logits, target = batch(tokens=3, vocab=50)
    z = backend.put(logits).requires_grad_()
    loss = tokfuse.token_stats(z, backend.put(target)).logp[:2].sum()
    first = torch.autograd.grad(loss, z, retain_graph=True)
    assert same(first, torch.autograd.grad(loss, z))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, z)


def test_logits_changed_between_forward_and_backward_are_noticed(kernel: Backend):
    logits, target = batch(tokens=3, vocab=50)
    z = kernel.put(logits).requires_grad_() * 1.0
    loss = tokfuse.token_stats(z, kernel.put(target)).logp[:2].sum()
    z.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(dtype: torch.dtype, backend: Backend):
    logits, target = batch(dtype, tokens=5, vocab=300)
    plain = run(backend, logits, target, softcap=15.0)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        assert same(run(backend, logits, target, softcap=15.0), plain)


def test_gradient_reaches_what_produced_the_logits(backend: Backend):
    logits, target = batch(tokens=3, vocab=50)
    scale = torch.tensor(1.5, device=backend.device, requires_grad=True)
    stats = tokfuse.token_stats(backend.put(logits)[:2] * scale, backend.put(target)[:2])
    stats.logp.sum().backward()
    x = logits[:2].double()
    s = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    torch.log_softmax(x * s, 1).gather(1, target[:2, None]).sum().backward()
    assert scale.grad is not None and s.grad is not None
    compare(scale.grad, s.grad, rtol=1e-5)


def test_no_tokens_give_empty_outputs_that_touch_the_logits(backend: Backend):
    z = backend.put(torch.zeros(0, 17)).requires_grad_()
    stats = tokfuse.token_stats(z, backend.put(torch.zeros(0, dtype=torch.int64)))
    assert [tuple(x.shape) for x in stats] == [(0,)] * 5
    (stats.logp.sum() + stats.entropy.sum()).backward()
    assert z.grad is not None and z.grad.shape == (0, 17)


# ------------------------------------------------------------------------------------ 2^31 elements


def test_rows_beyond_two_to_the_31_elements(kernel: Backend):
    """Rows in a buffer of 2^31 + 4096 bfloat16, half of it apart. Only two pages are touched."""
    far = 1 << 31
    buffer = torch.empty(far + 4096, dtype=torch.bfloat16, device=kernel.device)
    near, _, _ = Case("far", 2, 2056).make(torch.bfloat16)
    logits = buffer.as_strided((2, 2056), (far, 1))
    logits.copy_(near)
    target = torch.tensor([2055, 3])
    stats = tokfuse.token_stats(logits, kernel.put(target))
    assert same(stats, run(kernel, near, target)[:5])


def test_more_than_two_to_the_31_elements_in_a_batch(kernel: Backend):
    """More than 2^31 elements: one row of 2^16 + 8 columns, viewed 2^15 times."""
    if kernel.name in ("cuda", "triton") and kernel.device == "cpu":
        pytest.skip("32768 rows take minutes in the interpreter and in the execution on the CPU")
    tokens, vocab = 1 << 15, (1 << 16) + 8
    mask = torch.zeros(tokens, dtype=torch.bool)
    mask[[0, -2, -1]] = True
    row = torch.randn(1, vocab, generator=torch.Generator().manual_seed(8)).bfloat16()
    target = torch.full((tokens,), vocab - 1)
    stats = tokfuse.token_stats(kernel.put(row).expand(tokens, -1), kernel.put(target), mask=kernel.put(mask))
    alone = run(kernel, row, target[:1])
    for got, want in zip(stats, alone[:5], strict=True):
        assert bits(got[[0, -2, -1]]) == bits(want) * 3
        assert int((got != 0).sum()) in (0, 3)
