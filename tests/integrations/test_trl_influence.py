"""Test `FusedGRPOTrainer(influence=...)` against cosines of explicit gradients of single completions."""

import pytest

pytest.importorskip("trl", reason="needs the group `hosts`")

import tiny_grpo
import torch

from tokfuse.integrations.trl import CompletionInfluence, FusedGRPOTrainer


def captured_weights(model):
    """Return the weights that the scores see by default: linear layers and norms without the head."""
    found = {name: p for name, p in model.named_parameters() if name.endswith(".weight")}
    return [p for name, p in found.items() if not {"embed_tokens", "lm_head"} & set(name.split("."))]


def validation(model):
    ids = torch.arange(3, 15).view(2, 6)
    logits = model(input_ids=ids).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def flat(loss, model):
    grads = torch.autograd.grad(loss, captured_weights(model), allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in grads])


@pytest.mark.parametrize("loss_type", ["grpo", "method", "statistics"])
def test_scores_are_cosines_of_gradients(loss_type, tmp_path):
    seen, wanted, model = [], [], tiny_grpo.load(tied=False)
    whole = max(max(w.shape) for w in captured_weights(model))  # a rank without projection: features are gradients
    options = {
        "grpo": {"loss_type": "grpo"},
        "method": {"extra": {"algorithm": "rloo"}},
        "statistics": {"loss_type": "grpo", "top_entropy_quantile": 0.5},
    }[loss_type]

    def on_scores(scores, inputs):
        seen.append(scores)
        if len(wanted) or loss_type != "grpo":
            return
        anchor, rows = flat(validation(trainer.model), trainer.model), []
        for i in range(scores.shape[0]):
            # The other completions get no advantage, so they have no gradient.
            alone = torch.where(torch.arange(scores.shape[0]) == i, inputs["advantages"], 0.0)
            rows.append(flat(trainer._compute_loss(trainer.model, inputs | {"advantages": alone}), trainer.model))
        wanted.append(torch.nn.functional.cosine_similarity(torch.stack(rows), anchor[None]))

    extra = options.pop("extra", {})
    extra["influence"] = CompletionInfluence(
        validation=validation, rank=whole if loss_type == "grpo" else 8, on_scores=on_scores
    )
    trainer = tiny_grpo.trainer(FusedGRPOTrainer, tmp_path, model=model, extra=extra, max_steps=1, **options)
    trainer.train()
    assert len(seen) == 2 and all(x.shape == (4,) for x in seen)  # one per micro-batch
    assert any((x != 0).any() for x in seen)
    logged = trainer.state.log_history[0]
    assert logged["influence/mean"] == pytest.approx(float(torch.stack(seen).mean()), abs=1e-5)
    assert 0 <= logged["influence/helpful"] <= 1 and logged["influence/std"] > 0
    for x, want in zip(seen, wanted, strict=False):
        torch.testing.assert_close(x, want, rtol=1e-3, atol=1e-4)


def test_training_does_not_change(tmp_path):
    weights = []
    for influence in (None, CompletionInfluence(validation=validation)):
        trainer = tiny_grpo.trainer(FusedGRPOTrainer, tmp_path, extra={"influence": influence})
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        assert ("influence/mean" in trainer.state.log_history[0]) == (influence is not None)
    assert torch.equal(*weights)


def test_wrong_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match="refresh must be"):
        CompletionInfluence(validation=validation, refresh=0)
    with pytest.raises(TypeError, match="CompletionInfluence; got 3"):
        tiny_grpo.trainer(FusedGRPOTrainer, tmp_path, extra={"influence": 3})
