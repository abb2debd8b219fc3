"""Test the influence study on a random model of a few thousand weights: its gradients and its rows."""

import copy

import pytest
import torch

pytest.importorskip("transformers")
from tiny_llama import tiny_llama  # noqa: E402

from tokfuse.bench import study_influence as study  # noqa: E402
from tokfuse.bench.study_pool import Sample  # noqa: E402

FACTS = {"cpu_model": "a processor", "threads": 2, "torch": "2", "commit": "abc"}


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def warm(data):
    """A model after a few steps, and its optimizer."""
    model = tiny_llama()
    return model, study.warm_up(model, data.train, steps=3, batch=2, lr=1e-3)


@pytest.fixture(scope="module")
def data() -> study.DataSet:
    gen = torch.Generator().manual_seed(1)
    samples = [
        Sample(torch.randint(61, (6 + i % 3,), generator=gen), 3, 1.0 - i % 4, i % 2)
        for i in range(16)
        if i % 4 != 1  # with an advantage of zero there is no gradient to rank
    ]
    return study.DataSet("random", samples[:8], samples[8:])


def test_true_gradient_is_autograd_of_the_tied_model(model, data) -> None:
    true, sample = study.TrueGradients(model), data.train[0]
    logits = model(sample.ids.unsqueeze(0)).logits[0, sample.prompt - 1 : -1]
    chosen = torch.log_softmax(logits, -1).gather(1, sample.ids[sample.prompt :].unsqueeze(1))
    want = torch.autograd.grad(-sample.advantage * chosen.mean(), list(model.parameters()))
    found = true.gradient(sample)
    for a, b in zip(found[:-1], want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_adapter_feature_is_the_gradient_of_an_adapter(model, data) -> None:
    """h -> h + M h with M = 0, the definition of the sketch without projection."""
    true = study.TrueGradients(model)
    packed = study.pack(true, data.train)
    features = packed.by_products(true.head.detach(), None, 0).sketches
    for sample, feature in zip(data.train, features, strict=True):
        hidden = true.hidden(sample).detach()
        adapter = torch.zeros(16, 16, requires_grad=True)
        logp = torch.log_softmax((hidden + hidden @ adapter.t()) @ true.head.detach().t(), -1)
        loss = -sample.advantage * logp.gather(1, sample.ids[sample.prompt :].unsqueeze(1)).mean()
        (want,) = torch.autograd.grad(loss, adapter)
        torch.testing.assert_close(feature, want, rtol=1e-4, atol=1e-6)


def test_rows_cover_every_score_and_slice(warm, data) -> None:
    model, optimizer = warm
    found = list(study.rows(study.TrueGradients(model), data, optimizer, FACTS))
    by_name = {(row.kind, row.score, row.slice): row for row in found}
    assert len(by_name) == len(found) == 3 * (7 + 13 + 4) + 9
    assert by_name["direction", "control: true gradient of lm_head", "lm_head"].spearman == 1.0
    sketch = by_name["direction", "sketch, rank 64", "all"]
    assert sketch.seeds == study.SEEDS and sketch.spearman_low < sketch.spearman_high
    assert sketch.spearman_low <= sketch.spearman <= sketch.spearman_high
    assert all(-1.0 <= row.spearman <= 1.0 and row.samples == 8 for row in found)
    text = study.table(found, "direction")
    assert len(text.splitlines()) == 2 + 7 + 13 and " to " in text and "alike" in text
    assert study.table(found, "adam").splitlines()[0] == "| data | score | linear layers and norms |"


def test_samples_that_are_alike(data) -> None:
    """The family of the group; samples of one sign, if the advantages have two."""
    first = Sample(torch.arange(4), 2, 1.0, 0)
    mixture = study.DataSet("mixture", [first, first._replace(group=1), first._replace(group=2)], [first])
    assert [x.tolist() for x in study.alike(mixture, 0)] == [[True, False, False]]
    up, down = study.alike(data, 0)
    assert up.tolist() == [s.advantage > 0 for s in data.train] and torch.equal(down, ~up)


def test_spearman_is_of_ranks() -> None:
    x = torch.tensor([0.1, 0.2, 0.3, 5.0])
    assert study.spearman(x, x.exp()) == pytest.approx(1.0)
    assert study.spearman(x, -x) == pytest.approx(-1.0)


def test_captured_features_without_projection_are_the_true_gradients(warm, data, monkeypatch) -> None:
    """Of all linear layers and norms: plain, and divided by the rank-1 form of the second moment."""
    model, optimizer = warm
    monkeypatch.setattr(study, "RANKS", (64,))
    captures = study.Captures(model, data, optimizer)
    found = study.TrueGradients(model).scores(data, optimizer, captures)
    for adam, name in ((False, "none"), (True, "rank 1")):
        torch.testing.assert_close(captures.scores(64, "*", adam=adam).double(), found.adam[name], rtol=1e-3, atol=1e-5)
    assert not torch.allclose(found.adam["none"], found.adam["rank 1"], atol=1e-2)


def test_the_exact_adam_direction_is_the_step_of_the_optimizer(warm, data) -> None:
    """Without momentum and with a second moment that does not move, AdamW steps by lr g / (sqrt(v) + eps)."""
    model, optimizer = copy.deepcopy(warm)
    true = study.TrueGradients(model)
    roots = study.adam_roots(true, optimizer)
    linear = model.model.layers[1].mlp.down_proj.weight
    at = true.names.index("model.layers.1.mlp.down_proj.weight")
    state, group = optimizer.state[linear], optimizer.param_groups[0]
    state["exp_avg"].zero_()
    before, step = linear.detach().clone(), float(state["step"])
    grad = true.gradient(data.train[0])[at]
    moment = state["exp_avg_sq"] / (1 - 0.999**step)
    linear.grad = grad
    group["betas"] = (0.0, 0.999)
    state["exp_avg_sq"].copy_((moment * (1 - 0.999 ** (step + 1)) - 0.001 * grad.square()) / 0.999)
    optimizer.step()
    torch.testing.assert_close((before - linear) / group["lr"], grad * roots[at][0].view_as(grad), rtol=1e-3, atol=1e-3)
