"""Test the influence study on a random model of a few thousand weights: its gradients and its rows."""

import pytest
import torch

pytest.importorskip("transformers")
from tiny_llama import tiny_llama  # noqa: E402

from tokfuse.bench import study_influence as study  # noqa: E402

FACTS = {"cpu_model": "a processor", "threads": 2, "torch": "2", "commit": "abc"}


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def data() -> study.DataSet:
    gen = torch.Generator().manual_seed(1)
    samples = [
        study.Sample(torch.randint(61, (6 + i % 3,), generator=gen), 3, 1.0 - i % 4, i % 2)
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


def test_rows_cover_every_score_and_slice(model, data) -> None:
    found = list(study.rows(study.TrueGradients(model), data, FACTS))
    by_name = {(row.kind, row.score, row.slice): row for row in found}
    assert len(by_name) == len(found) == 3 * (7 + 6 + 4)
    assert by_name["direction", "control: true gradient of lm_head", "lm_head"].spearman == 1.0
    sketch = by_name["direction", "sketch, rank 64", "all"]
    assert sketch.seeds == study.SEEDS and sketch.spearman_low < sketch.spearman_high
    assert sketch.spearman_low <= sketch.spearman <= sketch.spearman_high
    assert all(-1.0 <= row.spearman <= 1.0 and row.samples == 8 for row in found)
    text = study.table(found, "direction")
    assert len(text.splitlines()) == 2 + 7 + 6 and " to " in text and "alike" in text


def test_spearman_is_of_ranks() -> None:
    x = torch.tensor([0.1, 0.2, 0.3, 5.0])
    assert study.spearman(x, x.exp()) == pytest.approx(1.0)
    assert study.spearman(x, -x) == pytest.approx(-1.0)


def test_captured_features_of_a_layer_without_projection_are_its_gradients(model, data, monkeypatch):
    monkeypatch.setattr(study, "RANKS", (64,))
    monkeypatch.setattr(study, "PARTS", {})
    true, last = study.TrueGradients(model), "model.layers.1.mlp.down_proj"
    place = true.names.index(f"{last}.weight")

    def gradients(samples):
        return torch.stack([true.gradient(s)[place].flatten() for s in samples])

    means = study.group_means(gradients(data.validation), data.validation, data.groups)
    want = study.selection.matrix(gradients(data.train), means)
    torch.testing.assert_close(study.Captures(true, data).scores(64, last), want, rtol=1e-3, atol=1e-5)
