"""Test FusedDPOTrainer against TRL's DPOTrainer, and preference losses of tokfuse in TRL's trainer.

The reference is the stock trainer with its head and its loss in float64 (`host_parity`). Single batches cover every
loss type and option; real training steps cover what happens around the loss.
"""

import copy
import dataclasses
import math
from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("trl", reason="needs the group `hosts`")

import tiny_dpo
import tiny_grpo
from harness import compare
from host_parity import assert_no_farther, trl_in_float64
from preference_cases import LOSSES
from trl import DPOConfig, DPOTrainer

import tokfuse
from tokfuse import algorithms
from tokfuse.algorithms import Likelihood, Mixed, PreferenceBatch, preference_step
from tokfuse.integrations import trl_dpo_losses as losses
from tokfuse.integrations.trl import FusedDPOTrainer

CLOCKS = ("time", "per_second", "runtime")
ATTRIBUTES = ("ld_alpha", "f_divergence_type", "f_alpha_divergence_coef", "label_smoothing", "use_weighting", "beta")


def moved(model, seed=7):
    """Move a policy away from its reference, the same way at every call."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.03 * torch.randn(p.shape, generator=gen))
    return model


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A stock and a fused trainer whose options a test sets."""
    folder = tmp_path_factory.mktemp("dpo")
    trainers = [tiny_dpo.trainer(cls, folder, use_weighting=True, beta=0.3) for cls in (DPOTrainer, FusedDPOTrainer)]
    for trainer in trainers:
        moved(trainer.model)
    return trainers


def batch_inputs(trainer, rows=range(5)):
    return trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in rows]))


def one_batch(trainer, inputs, exact=False):
    """Return the loss, the gradient of all parameters and TRL's metrics of one batch."""
    trainer.model.train()
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    trainer._total_train_tokens = 0
    with trl_in_float64() if exact else nullcontext():
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
    grads = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    return loss.detach(), grads, {name: x[-1] for name, x in trainer._metrics["train"].items()}


def set_options(trainer, **options):
    """Give a trainer other options of DPOConfig, without building it again."""
    args = copy.copy(trainer.args)  # dataclasses.replace would reset accelerate
    for name, value in {"use_weighting": False, **options}.items():
        setattr(args, name, [value] if name == "loss_type" and isinstance(value, str) else value)
    trainer.args.discopop_tau = args.discopop_tau
    trainer.loss_types, trainer.loss_weights = args.loss_type, args.loss_weights or [1.0] * len(args.loss_type)
    for name in ATTRIBUTES:
        setattr(trainer, name, getattr(args, name))
    if isinstance(trainer, FusedDPOTrainer):
        trainer._loss = losses.loss_of(args)


SMOOTH = {"exo_pair": 0.01, "robust": 0.1, "aot": 0.2, "aot_unpaired": 0.2}
TYPES = (*losses.CONTRASTS, *losses.POINTWISE, "bco_pair", "aot", "aot_unpaired", "sft")
CASES = {
    **{name: {"loss_type": name, "label_smoothing": SMOOTH.get(name, 0.0)} for name in TYPES},
    "ignored smoothing": {"label_smoothing": 0.3},
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "unweighted list": {"loss_type": ["ipo", "aot", "discopop"], "discopop_tau": 0.2},
    "one weight": {"loss_weights": [0.25]},
    "ld": {"ld_alpha": 0.3, "loss_type": ["sigmoid", "sppo_hard"]},
    "ld without a tail": {"ld_alpha": 0.0},
    "wpo": {"use_weighting": True},
    "wpo of a list": {"use_weighting": True, "loss_type": ["ipo", "apo_zero"], "ld_alpha": 0.5},
    "forward kl": {"f_divergence_type": "forward_kl"},
    "js": {"f_divergence_type": "js_divergence", "loss_type": ["hinge", "robust"], "label_smoothing": 0.1},
    "alpha 1": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
}


@pytest.mark.parametrize("case", CASES)
def test_loss_gradient_and_metrics_of_a_batch(case, pair):
    stock, ours = pair
    for trainer in pair:
        set_options(trainer, **CASES[case])
    inputs = batch_inputs(stock)
    exact = one_batch(stock, inputs, exact=True)
    theirs = one_batch(stock, inputs)
    mine = one_batch(ours, inputs)
    assert mine[0].dtype == torch.float32 and exact[1].any()
    assert_no_farther(mine[0], theirs[0], exact[0], size=max(1.0, abs(float(exact[0]))), what="loss")
    assert_no_farther(mine[1], theirs[1], exact[1], what="gradient")
    assert mine[2].keys() == theirs[2].keys() >= {"rewards/margins", "logits/chosen", "mean_token_accuracy", "entropy"}
    for name, truth in exact[2].items():
        assert_no_farther(mine[2][name], theirs[2][name], truth, size=max(1.0, abs(truth)), what=name)


def test_the_alpha_divergence(pair):
    """TRL's code for it has no float64."""
    stock, ours = pair
    for trainer in pair:
        set_options(trainer, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.3)
    inputs = batch_inputs(stock)
    mine, theirs = one_batch(ours, inputs), one_batch(stock, inputs)
    assert mine[0].item() == pytest.approx(theirs[0].item(), rel=1e-6)
    compare(mine[1], theirs[1].double(), atol=1e-6 * float(theirs[1].abs().max()))


def test_every_loss_type_of_trl_is_covered():
    """TRL's message about an unknown loss type lists them."""
    text = next(f.metadata["help"] for f in dataclasses.fields(DPOConfig) if f.name == "loss_type")
    assert all(f"'{name}'" in text for name in TYPES) and text.count("`'") == len(TYPES)


# --------------------------------------------------------------------------------------- training


def train(cls, tmp_path, exact=False, **options):
    trainer = tiny_dpo.trainer(cls, tmp_path, **options)
    with trl_in_float64() if exact else nullcontext():
        trainer.train()
    return trainer


def history(trainer):
    return [{k: x for k, x in row.items() if not any(c in k for c in CLOCKS)} for row in trainer.state.log_history]


def assert_same_run(tmp_path, **options):
    """Train the three arms and compare every logged number and the last weights. Return the fused trainer."""

    def make():  # `extra` may hold a model, which training changes
        return {k: v() if callable(v) else v for k, v in options.items()}

    arms = ((FusedDPOTrainer, False), (DPOTrainer, False), (DPOTrainer, True))
    ours, stock, exact = (train(cls, tmp_path, exact=e, **make()) for cls, e in arms)
    runs = [history(x) for x in (ours, stock, exact)]
    assert len({tuple(tuple(row) for row in run) for run in runs}) == 1, "the same names at every step"
    for name in {name: None for row in runs[2] for name in row}:
        figures = [torch.tensor([row[name] for row in run if name in row]).double() for run in runs]
        assert_no_farther(*figures, size=max(1.0, float(figures[2].abs().max())), what=name)
    weights = [torch.cat([x.flatten() for x in run.model.state_dict().values()]) for run in (ours, stock, exact)]
    assert_no_farther(*weights, what="weights")
    return ours


def lora():
    from peft import LoraConfig

    return {"peft_config": LoraConfig(target_modules=["q_proj", "v_proj"], r=4)}


def odd_model():
    """An untied head with bias, softcap and scale."""
    model = tiny_grpo.load(tied=False)
    model.config.final_logit_softcapping, model.config.logit_scale = 2.0, 0.7
    with torch.no_grad():
        model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, model.lm_head.out_features))
    return model


def own_reference():
    return {"ref_model": moved(tiny_grpo.load())}


RUNS = {
    "accumulation and evaluation": {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "extra": lambda: {"eval_dataset": tiny_dpo.pairs(5)},
        "per_device_eval_batch_size": 2,
    },
    "precomputed reference": {
        "precompute_ref_log_probs": True,
        "ld_alpha": 0.4,
        "loss_type": ["sigmoid", "nca_pair"],
        "extra": own_reference,
    },
    "lora": {"extra": lora, "learning_rate": 3.0},
    "odd head, own reference": {"model": odd_model, "extra": own_reference, "gradient_checkpointing": True},
    "moving reference": {"sync_ref_model": True, "ref_model_sync_steps": 1, "max_steps": 3},
}


@pytest.mark.parametrize("run", RUNS)
def test_training(run, tmp_path):
    trainer = assert_same_run(tmp_path, **RUNS[run])
    assert "loss_type sigmoid" in trainer.describe() and "one preference_step" in trainer.describe()


def test_no_padding(tmp_path):
    """TRL ignores the option, so the padded run is the reference. Some pairs have an empty response."""
    options = {"padding_free": True, "loss_type": ["ipo", "sigmoid_norm"], "max_length": 5, "learning_rate": 1e-3}
    seen = []

    class Watched(FusedDPOTrainer):
        def _forward_of(self, model):
            forward = super()._forward_of(model)
            return lambda **given: seen.append(type(forward).__name__) or forward(**given)

    ours = tiny_dpo.trainer(Watched, tmp_path, **options)
    ours.train()
    assert set(seen) == {"OneRow"} and ours.args.padding_free
    stock, exact = (train(DPOTrainer, tmp_path, exact=e, **options) for e in (False, True))
    for row in zip(*map(history, (ours, stock, exact)), strict=True):
        for name, truth in row[2].items():
            assert_no_farther(row[0][name], row[1][name], truth, size=max(1.0, abs(truth)), what=name)


def test_no_logits_of_the_responses_exist(pair, monkeypatch):
    """The head is called twice, once per model, with the scored rows of both sides together."""
    stock, ours = pair
    set_options(ours)
    inputs, rows = batch_inputs(stock), []
    head = tokfuse.integrations.trl_seams.operands
    monkeypatch.setattr(
        tokfuse.integrations.trl_seams, "operands", lambda h, *rest: rows.append(len(h)) or head(h, *rest)
    )
    ours.model.lm_head.register_forward_hook(lambda *_: pytest.fail("the model computed logits"))
    one_batch(ours, inputs)
    ours.model.lm_head._forward_hooks.clear()
    assert rows == [int(inputs["completion_mask"][:, 1:].sum())] * 2


def test_logits_for_compute_metrics_come_from_another_forward(tmp_path):
    trainer = tiny_dpo.trainer(FusedDPOTrainer, tmp_path)
    with pytest.warns(FutureWarning, match="return_outputs"):
        loss, logits, ids = trainer.prediction_step(trainer.model, batch_inputs(trainer), prediction_loss_only=False)
    assert logits.shape == (*ids.shape, trainer.model.config.vocab_size) and not loss.requires_grad


class Scaler:
    """A GradScaler's scale."""

    def get_scale(self):
        return 2.0**12


def test_float16_scaling_happens_before_the_gradient_is_rounded(pair, monkeypatch):
    _, ours = pair
    inputs, seen = batch_inputs(ours), []
    for loss_type in (["sigmoid"], ["sigmoid", "sft"]):
        set_options(ours, loss_type=loss_type)
        plain = one_batch(ours, inputs)
        with monkeypatch.context() as patch:
            patch.setattr(ours.accelerator, "scaler", Scaler())
            step = ours._step
            patch.setattr(ours, "_step", lambda *a, step=step: seen.append(step(*a)) or seen[-1])
            scaled = one_batch(ours, inputs)
        assert scaled[0].item() == pytest.approx(plain[0].item(), rel=1e-6)
        compare(scaled[1], plain[1].double(), atol=1e-6 * float(plain[1].abs().max()))
        assert seen[-1][0].loss.item() == pytest.approx(4096 * plain[0].item(), rel=1e-6)


# ---------------------------------------------------------------------------------------- methods


def options_of(name):
    return {"aries": {"level_weight": (1.0, 0.5)}, "rpo_mean": {"nll": algorithms.NLL(coef=0.1)}}.get(name, {})


def with_method(trainer, name, **options):
    """Give a trainer another method, without building it again."""
    trainer._method = losses.Method(algorithms.make(name, **options))
    trainer._loss = trainer._method.loss
    trainer._scores_reference = trainer._loss.needs_reference
    trainer.ld_alpha = trainer._loss.token_tail_weight
    return trainer._loss


def stated(trainer, inputs, loss, kl=None):
    """Return the loss and gradient that a method states, from float64 logits of the whole padded batch."""
    rows = inputs["completion_mask"][:, 1:].bool()
    target, ids = inputs["input_ids"][:, 1:][rows], {k: inputs[k] for k in ("input_ids", "attention_mask")}
    trainer.model.zero_grad()
    logits = trainer.model(**ids).logits[:, :-1][rows].double()
    pairs = len(rows) // 2
    given = {"kl": kl, "desirable": torch.arange(2 * pairs) < pairs} if kl is not None else {}
    if kl is None:
        given["pairs"] = torch.stack([torch.arange(pairs), pairs + torch.arange(pairs)], 1)
    if loss.needs_reference:
        with torch.no_grad():
            ref = trainer.ref_model(**ids).logits[:, :-1][rows].double().log_softmax(-1)
        given["ref_logp"] = ref.gather(1, target[:, None])[:, 0]
    if getattr(loss, "level_weight", None):
        given["level"] = inputs["level"]
    cu = torch.nn.functional.pad(rows.sum(1).cumsum(0), (1, 0)).int()
    batch = PreferenceBatch(num_tokens=len(target), cu_seqlens=cu, **given)
    with tokfuse.backend("reference"):
        step = preference_step(loss=loss, batch=batch, logits=logits, target=target, normalizer="batch")
    step.loss.backward()
    return step, torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


def mismatched_kl(trainer, inputs):
    """Return KTO's estimate, one sequence at a time."""
    pairs, ratios = len(inputs["input_ids"]) // 2, []
    for s in range(2 * pairs):
        other = s // pairs * pairs + (s % pairs + 1) % pairs
        prompt = inputs["input_ids"][s][inputs["attention_mask"][s].bool() & ~inputs["completion_mask"][s].bool()]
        response = inputs["input_ids"][other][inputs["completion_mask"][other].bool()]
        ids = torch.cat([prompt, response])[None]
        sums = []
        for model in (trainer.model, trainer.ref_model):
            with torch.no_grad():
                logp = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            sums.append(logp.gather(1, response[:, None]).sum())
        ratios.append(sums[0] - sums[1])
    return torch.stack(ratios).mean().clamp(min=0.0)


@pytest.fixture(scope="module")
def fused(tmp_path_factory):
    trainer = tiny_dpo.trainer(FusedDPOTrainer, tmp_path_factory.mktemp("methods"), extra={"algorithm": "dpo"})
    moved(trainer.model, seed=2)
    return trainer


@pytest.mark.parametrize("name", LOSSES)
def test_every_method_by_name(name, fused):
    loss = with_method(fused, name, **options_of(name))
    inputs = batch_inputs(fused) | {"level": torch.tensor([0, 1, 1, 0, 1])}
    if name == "hpl":
        inputs["level"] = torch.tensor([0, 1, 2, 0, 1])
    if not getattr(loss, "level_weight", None):
        del inputs["level"]
    kl = mismatched_kl(fused, inputs) if name == "kto" else None
    assert kl is None or kl > 0.01
    step, want = stated(fused, inputs, loss, kl)
    found, grad, logged = one_batch(fused, inputs)
    assert found.item() == pytest.approx(step.loss.item(), rel=1e-5, abs=1e-6)
    compare(grad, want.double(), atol=2e-5 * float(want.abs().max()), what="gradient")
    chosen, rejected = step.rewards[0].chunk(2) if name == "kto" else step.rewards
    expected = {"chosen": chosen, "rejected": rejected, "margins": chosen - rejected}
    for key, value in expected.items():
        assert logged[f"rewards/{key}"] == pytest.approx(value.mean().item(), rel=1e-4, abs=1e-5), key
    assert logged["rewards/accuracies"] == pytest.approx((chosen > rejected).float().mean().item())


@pytest.mark.parametrize("precomputed", [False, True])
def test_the_tail_of_the_reference_is_weighted_once(precomputed, tmp_path):
    extra = {"algorithm": "ld_dpo", "ref_model": moved(tiny_grpo.load())}
    trainer = tiny_dpo.trainer(FusedDPOTrainer, tmp_path, precompute_ref_log_probs=precomputed, extra=extra)
    inputs = batch_inputs(trainer)
    step, _ = stated(trainer, inputs, trainer._loss)
    assert one_batch(trainer, inputs)[0].item() == pytest.approx(step.loss.item(), rel=1e-5)


def test_an_untrained_policy_has_no_reward(tmp_path):
    trainer = tiny_dpo.trainer(FusedDPOTrainer, tmp_path, extra={"algorithm": "dpo"})
    _, _, logged = one_batch(trainer, batch_inputs(trainer))
    assert [logged[f"rewards/{name}"] for name in ("chosen", "rejected", "accuracies", "margins")] == [0.0] * 4


@pytest.mark.parametrize("name", ["cpo", "hpl", "dpo"])
def test_one_gradient_in_any_number_of_micro_batches(name, tmp_path):
    """A last micro-batch with one pair, and means over a part of the pairs."""
    data = tiny_dpo.pairs(6, level=[0, 1, 2, 0, 1, 1], pair_weight=[1.0, 0.5, 2.0, 1.0, 1.0, 0.25])
    weights = []
    for size, parts in ((6, 1), (3, 2), (4, 2)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts, "max_steps": 1}
        extra = {"algorithm": name, "train_dataset": data}
        trainer = train(FusedDPOTrainer, tmp_path, extra=extra, **options)
        assert trainer.ref_model is None or name != "cpo"
        weights.append(torch.cat([x.flatten() for x in trainer.model.state_dict().values()]))
    for other in weights[1:]:
        compare(other, weights[0].double(), atol=2e-6, what="weights")


def test_state_follows_updates_and_checkpoints(tmp_path):
    """BCO's shift is the mean over the whole optimizer step, and is saved with the checkpoint."""
    bco = algorithms.make("bco_pair", beta=0.3)
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "extra": {"algorithm": bco}}
    trainer = train(FusedDPOTrainer, tmp_path, **options)
    state = trainer._method.state
    rewards = [(row["rewards/chosen"] + row["rewards/rejected"]) / 2 for row in trainer.state.log_history[:2]]
    assert state["batches"] == 2 and state["mean"] == pytest.approx(sum(rewards) / 2, rel=1e-5)
    again = tiny_dpo.trainer(FusedDPOTrainer, tmp_path, max_steps=3, extra={"algorithm": bco})
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again._method.state["batches"] == 3


def test_evaluation_of_a_method_without_reference(tmp_path):
    extra = {"algorithm": "simpo", "eval_dataset": tiny_dpo.pairs(5)}
    trainer = tiny_dpo.trainer(FusedDPOTrainer, tmp_path, extra=extra)
    trainer.train()
    first, second = trainer.evaluate(), trainer.evaluate(tiny_dpo.pairs(5))
    assert trainer.ref_model is None and math.isfinite(first["eval_loss"])
    for name in ("eval_loss", "eval_rewards/margins"):
        assert first[name] == second[name]


# --------------------------------------------------------------------------------------- refusals

CROSSED = {
    "f_divergence_type": ({"f_divergence_type": "js_divergence", "loss_type": "ipo"}, "'reverse_kl' with loss_type"),
    "truncation_mode": ({"truncation_mode": "keep_end", "loss_type": "sigmoid_norm"}, "'keep_start' with loss_type"),
    "use_weighting": ({"use_weighting": True, "loss_type": ["ipo", "sft"]}, "False with loss_type 'sft'"),
    "loss_type": ({"loss_type": "kto_pair"}, "among sigmoid, .*; got 'kto_pair'"),
}


@pytest.mark.parametrize("option", CROSSED)
def test_what_cannot_be_honoured_is_refused(option, tmp_path):
    options, message = CROSSED[option]
    with pytest.raises(ValueError, match=f"FusedDPOTrainer: {option} must be {message}"):
        tiny_dpo.trainer(FusedDPOTrainer, tmp_path, **options)


REPLACED = {
    "loss_type": {"loss_type": "ipo"},
    "loss_weights": {"loss_weights": [0.5]},
    "label_smoothing": {"label_smoothing": 0.1},
    "ld_alpha": {"ld_alpha": 0.5},
    "f_divergence_type": {"f_divergence_type": "js_divergence"},
    "use_weighting": {"use_weighting": True},
    "beta": {"beta": 0.25},
    "sync_ref_model": {"sync_ref_model": True},
}


@pytest.mark.parametrize("option", REPLACED)
def test_an_option_that_the_method_replaces_is_refused(option, tmp_path):
    options = REPLACED[option]
    with pytest.raises(ValueError, match=f"FusedDPOTrainer: {option} must be "):
        tiny_dpo.trainer(FusedDPOTrainer, tmp_path, **options, extra={"algorithm": "simpo"})


def test_what_is_no_preference_loss_or_has_no_use_is_refused(tmp_path):
    for algorithm, got in (("grpo", "grpo"), (algorithms.make("tr_dpo"), "TRDPO")):
        with pytest.raises(ValueError, match=f"algorithm must be a preference loss; got {got}"):
            tiny_dpo.trainer(FusedDPOTrainer, tmp_path, extra={"algorithm": algorithm})
    with pytest.raises(ValueError, match="ref_model must be left out with algorithm='orpo'"):
        extra = {"algorithm": "orpo", "ref_model": tiny_grpo.load()}
        tiny_dpo.trainer(FusedDPOTrainer, tmp_path, extra=extra)
    images = tiny_dpo.pairs(8, image=list(range(8)))
    with pytest.raises(ValueError, match="train_dataset must be text with algorithm='simpo'"):
        extra = {"algorithm": "simpo", "train_dataset": images}
        tiny_dpo.trainer(FusedDPOTrainer, tmp_path, extra=extra)
    with pytest.raises(ValueError, match="num_seqs must be at least 2"):
        extra = {"algorithm": "kto"}
        tiny_dpo.trainer(FusedDPOTrainer, tmp_path, per_device_train_batch_size=1, extra=extra).train()


def test_padding_free_needs_a_model_that_sees_borders(tmp_path):
    model = tiny_grpo.load()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(
        ValueError, match="padding_free must be False, or used with an attention among sdpa, .*; got flex"
    ):
        tiny_dpo.trainer(FusedDPOTrainer, tmp_path, model=model, padding_free=True)


def test_a_mix_of_methods_is_one_algorithm(tmp_path):
    mpo = Mixed(terms=(algorithms.make("dpo"), algorithms.make("bco_pair"), Likelihood()), weights=(0.8, 0.2, 1.0))
    trainer = train(FusedDPOTrainer, tmp_path, extra={"algorithm": mpo})
    assert trainer._method.state["terms"][1]["batches"] == 2
    assert "algorithm Mixed" in trainer.describe()
