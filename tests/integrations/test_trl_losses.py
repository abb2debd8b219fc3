"""Test FusedGRPOTrainer against TRL's GRPOTrainer: real training steps, every loss type and option.

All trainers train the same tiny model from the same seed with plain SGD, because Adam amplifies rounding if a
gradient is nearly 0. The reference is the stock trainer with its head and its loss in float64. Over the steps,
no loss, gradient norm, entropy, KL or other metric of TRL may be farther from it than the stock float32
trainer, and no weight after the last step (`host_parity`).
"""

import math
from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("trl", reason="needs the group `hosts`")

import tiny_grpo
from host_parity import FLOOR, assert_no_farther, trl_in_float64
from trl import GRPOTrainer

from tokfuse.integrations import trl_kept
from tokfuse.integrations.padded import Padding
from tokfuse.integrations.trl import CompletionInfluence, FusedGRPOTrainer

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
CLOCKS = ("time", "per_second", "runtime")
SGD = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
# Two passes over each rollout and micro-batches of different lengths: ratios move, and some tokens are clipped.
REUSED = {**SGD, "num_iterations": 2, "max_steps": 3, "epsilon": 0.02}


class Sampled:
    """TRL's trainer with simulated vLLM sampling: log-probabilities differ a little, and one is unknown."""

    def _generate(self, prompts):
        self.use_vllm = False
        out = list(super()._generate(prompts))
        out[4] = [[-3.2 + 0.4 * ((3 * i + 5 * j) % 5) for j, _ in enumerate(ids)] for i, ids in enumerate(out[1])]
        out[4][0][0] = None
        self.use_vllm = True
        return tuple(out)


class Tools:
    """Completions in which a tool wrote every third token: the model sees them, but does not train on them."""

    def _generate(self, prompts):
        out = list(super()._generate(prompts))
        out[2] = [[int(j % 3 != 1) for j, _ in enumerate(ids)] for ids in out[1]]
        return tuple(out)


def train(cls, tmp_path, mixin=None, exact=False, **options):
    if mixin is not None:
        cls = type(cls.__name__, (mixin, cls), {})
    trainer = tiny_grpo.trainer(cls, tmp_path, **options)
    with trl_in_float64() if exact else nullcontext():
        trainer.train()
    return trainer


def history(trainer):
    """Return every logged number, without times."""
    return [
        {name: x for name, x in row.items() if not any(clock in name for clock in CLOCKS)}
        for row in trainer.state.log_history
    ]


def assert_same(ours, stock, exact):
    # VESPO's weight W^k exp(lambda (1 - W)) contains the product W of six ratios. The rounding of a log-probability of
    # 4 nats is 2.4e-7, six of them are 1.4e-6, and |k - lambda W| < 5 multiplies this sum: 7e-6 of the gradient.
    floor = 8 * FLOOR if ours.args.loss_type == "vespo" else FLOOR
    runs = [history(x) for x in (ours, stock, exact)]
    assert len({tuple(tuple(row) for row in run) for run in runs}) == 1, "the same names at every step"
    for name in {name: None for row in runs[2] for name in row}:
        figures = [torch.tensor([row[name] for row in run if name in row]).double() for run in runs]
        assert torch.equal(figures[0].isnan(), figures[2].isnan()), name
        mine, theirs, truth = (x.nan_to_num() for x in figures)
        assert_no_farther(mine, theirs, truth, floor=floor, size=max(1.0, float(truth.abs().max())), what=name)
    weights = [torch.cat([x.flatten() for x in run.model.state_dict().values()]) for run in (ours, stock, exact)]
    assert_no_farther(*weights, floor=floor, what="weights")


def both(tmp_path, **options):
    stock, ours = (train(cls, tmp_path, **options) for cls in (GRPOTrainer, FusedGRPOTrainer))
    assert_same(ours, stock, train(GRPOTrainer, tmp_path, exact=True, **options))
    return ours, stock


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_on_policy(loss_type, tmp_path):
    ours, _ = both(tmp_path, **SGD, loss_type=loss_type)
    assert "one policy_step" in ours.describe()


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_reused_rollout(loss_type, level, tmp_path):
    both(tmp_path, **REUSED, loss_type=loss_type, importance_sampling_level=level)


def kl(**options):
    return {"beta": 0.2, **options}


OPTIONS = {
    "two-sided clip": {"delta": 1.05, "epsilon_high": 0.03},
    "asymmetric clip": {"epsilon_high": 0.001},
    "cispo bound": {"loss_type": "cispo", "epsilon_high": 0.95},
    "sapo temperatures": {"loss_type": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 0.5},
    "vespo weights": {
        "loss_type": "vespo",
        "vespo_k_pos": 1.0,
        "vespo_lambda_pos": 0.0,
        "vespo_k_neg": 0.5,
        "vespo_lambda_neg": 1.5,
        "learning_rate": 0.002,
    },
    "kl": kl(),
    "kl of grpo": kl(loss_type="grpo"),
    "kl of luspo": kl(loss_type="luspo", learning_rate=0.03),
    "plain kl": kl(use_bias_correction_kl=False),
    "kl of gspo": kl(importance_sampling_level="sequence", loss_type="grpo"),
    "kl of gspo over tokens": kl(importance_sampling_level="sequence"),
    "plain kl of gspo": kl(importance_sampling_level="sequence", use_bias_correction_kl=False),
    "entropy bonus": {"entropy_coef": 0.1},
    "entropy bonus of grpo": {"entropy_coef": 0.1, "loss_type": "grpo"},
    "entropy bonus of dr_grpo": {"entropy_coef": -0.1, "loss_type": "dr_grpo"},
    "adaptive entropy": {
        "use_adaptive_entropy": True,
        "entropy_target": 3.4,
        "entropy_coef_delta": 0.05,
        "entropy_coef": 0.1,
        "max_steps": 4,
    },
    # 0.57 (tokens - 1) is not an integer. At an integer the quantile is one token's entropy, and rounding decides.
    "high-entropy tokens": {"top_entropy_quantile": 0.43},
    "high-entropy tokens, bonus, kl": kl(top_entropy_quantile=0.43, entropy_coef=0.1, loss_type="grpo"),
    "off-policy mask": {"off_policy_mask_threshold": 1e-4},
    "truncated completions": {"mask_truncated_completions": True, "loss_type": "grpo"},
    "rewards over the batch": {"scale_rewards": "batch"},
    "uneven accumulation": {"steps_per_generation": 4, "gradient_accumulation_steps": 1},
    "other temperature": {"temperature": 0.5},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_option(option, tmp_path, plain_history):
    _, stock = both(tmp_path, **{**REUSED, **OPTIONS[option]})
    assert history(stock) != plain_history  # otherwise an ignored option would pass


@pytest.fixture(scope="module")
def plain_history(tmp_path_factory):
    return history(train(GRPOTrainer, tmp_path_factory.mktemp("plain"), **REUSED))


SAMPLER = {
    "token_truncate": {"vllm_importance_sampling_clip_max": 1.3},
    "token_mask": {"vllm_importance_sampling_clip_max": 1.3},
    "sequence_truncate": {"vllm_importance_sampling_clip_max": 1.3},
    "sequence_mask": {"vllm_importance_sampling_clip_min": 0.5},
}


@pytest.mark.parametrize("loss_type", ["dapo", "vespo"])
@pytest.mark.parametrize("mode", SAMPLER)
def test_vllm_correction(mode, loss_type, tmp_path):
    options = {"loss_type": loss_type, "vllm_importance_sampling_mode": mode, **SAMPLER[mode]}
    ours, _ = both(tmp_path, mixin=Sampled, **REUSED, **options)
    assert not math.isnan(ours.state.log_history[0]["loss"])


def test_kl_of_vespo_corrected_for_the_sampler(tmp_path):
    both(tmp_path, mixin=Sampled, **REUSED, **kl(loss_type="vespo"))


def test_off_policy_mask_against_the_sampler(tmp_path):
    both(tmp_path, mixin=Sampled, **REUSED, off_policy_mask_threshold=0.3)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_tool_tokens_are_not_trained(loss_type, tmp_path):
    both(tmp_path, mixin=Tools, **REUSED, loss_type=loss_type, entropy_coef=0.1)


def test_evaluation(tmp_path):
    values = []
    for cls, exact in ((FusedGRPOTrainer, False), (GRPOTrainer, False), (GRPOTrainer, True)):
        extra = {"eval_dataset": tiny_grpo.prompts(4)}
        trainer = tiny_grpo.trainer(cls, tmp_path, per_device_eval_batch_size=4, extra=extra)
        torch.manual_seed(5)
        with trl_in_float64() if exact else nullcontext():
            values.append({k: x for k, x in trainer.evaluate().items() if not any(clock in k for clock in CLOCKS)})
        assert all(p.grad is None for p in trainer.model.parameters())
    assert values[0].keys() == values[1].keys() == values[2].keys()
    for name in values[0]:
        assert_no_farther(*(x[name] for x in values), size=max(1.0, abs(values[2][name])), what=name)


def test_lora_and_a_frozen_head(tmp_path):
    from peft import LoraConfig

    extra = {"peft_config": LoraConfig(target_modules=["q_proj", "v_proj"], r=4)}
    both(tmp_path, **{**REUSED, **kl()}, extra=extra)


def test_an_untied_head_with_bias_and_softcap(tmp_path):
    """The kernel receives the values that TRL reads from the model."""

    def run(cls, exact=False):
        model = tiny_grpo.load(tied=False)
        model.config.final_logit_softcapping = 2.0
        model.config.logit_scale = 0.7
        with torch.no_grad():
            model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, model.lm_head.out_features))
        return train(cls, tmp_path, exact=exact, model=model, gradient_checkpointing=True, **REUSED)

    assert_same(run(FusedGRPOTrainer), run(GRPOTrainer), run(GRPOTrainer, exact=True))


PADDING_FREE = {
    "one pass": {},
    "reference, old policy, entropy": {**kl(), "num_iterations": 2, "max_steps": 3, "entropy_coef": 0.01},
    "tools": {"mixin": Tools},
    "chunks": {"beta": 0.2, "steps_per_generation": 4, "top_entropy_quantile": 0.5},
}


class Seen:
    """Notes the shapes of the transformer's inputs while the loss is computed."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.shapes = []
        self.model.model.register_forward_pre_hook(
            lambda module, args, given: self.shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
        )

    def _compute_loss(self, *args, **kwargs):
        self.shapes.clear()
        return super()._compute_loss(*args, **kwargs)


@pytest.mark.parametrize("case", PADDING_FREE)
def test_no_padding(case, tmp_path):
    """TRL has no such option, so its padded run is the reference."""
    options = {**SGD, **PADDING_FREE[case]}
    mixins = tuple(x for x in (Seen, options.pop("mixin", None)) if x is not None)
    stock = train(GRPOTrainer, tmp_path, mixins[1] if len(mixins) > 1 else None, **options)
    exact = train(GRPOTrainer, tmp_path, mixins[1] if len(mixins) > 1 else None, exact=True, **options)
    mixed = type("FusedGRPOTrainer", (*mixins, FusedGRPOTrainer), {})
    ours = train(mixed, tmp_path, **options, extra={"padding_free": True})
    assert_same(ours, stock, exact)
    assert ours.shapes and all(rows == 1 for rows, _ in ours.shapes)
    assert "without padding" in ours.describe()


def test_padding_free_refusals(tmp_path):
    model = tiny_grpo.load()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="FusedGRPOTrainer: padding_free must be False, or used with an attention"):
        tiny_grpo.trainer(FusedGRPOTrainer, tmp_path, model=model, extra={"padding_free": True})
    watched = {"influence": CompletionInfluence(validation=lambda model: None), "padding_free": True}
    with pytest.raises(ValueError, match="padding_free must be False with influence"):
        tiny_grpo.trainer(FusedGRPOTrainer, tmp_path, extra=watched)


# ---------------------------------------------------------------- the ids that a sampler kept


class Rollout:
    """A rollout_func that samples from known sets: of `size` ids for each token, or of all."""

    def __init__(self, size: int | None, tools: bool = False) -> None:
        self.size, self.tools = size, tools

    def __call__(self, prompts, trainer):
        vocab = trainer.model.config.vocab_size
        gen = torch.Generator().manual_seed(len(prompts) + trainer.state.global_step)
        out = {"prompt_ids": trainer.processing_class(prompts)["input_ids"], "completion_ids": [], "kept_ids": []}
        for i in range(len(prompts)):
            kept = [torch.randperm(vocab, generator=gen)[: self.size or vocab].tolist() for _ in range(3 + i % 3)]
            out["kept_ids"].append(kept)
            out["completion_ids"].append([ids[0] for ids in kept])
        if self.tools:  # a tool wrote every third token, and nobody sampled it
            out["env_mask"] = [[int(j % 3 != 1) for j, _ in enumerate(ids)] for ids in out["completion_ids"]]
            for kept in out["kept_ids"]:
                kept[1] = []
        out["logprobs"] = [[-3.0 for _ in ids] for ids in out["completion_ids"]]
        return out


class WithoutKeptIds(Rollout):
    """The same completions, for a trainer that ignores the field."""

    def __call__(self, prompts, trainer):
        out = super().__call__(prompts, trainer)
        del out["kept_ids"]
        return out


def test_all_ids_kept_is_the_stock_trainer(tmp_path):
    """Two passes over a rollout and a KL term: the old policy and the reference are over the kept ids, too."""
    # A larger rate would amplify the rounding of the first update: its KL is 7 at 0.3.
    options = {**SGD, "learning_rate": 0.03, "num_iterations": 2, "beta": 0.1, "max_steps": 3}
    stock, exact = (
        train(GRPOTrainer, tmp_path, exact=exact, **options, extra={"rollout_func": WithoutKeptIds(None)})
        for exact in (False, True)
    )
    ours = train(FusedGRPOTrainer, tmp_path, **options, extra={"rollout_func": Rollout(None)})
    assert_same(ours, stock, exact)


@pytest.mark.parametrize("padding_free", [False, True])
def test_policy_and_loss_are_over_the_kept_ids(padding_free, tmp_path):
    seen = []

    class Noted(FusedGRPOTrainer):
        def step(self, model, inputs, given):
            out = super().step(model, inputs, given)
            seen.append(([x.detach().clone() for x in model.parameters()], inputs, out[1]))
            return out

    extra = {"rollout_func": Rollout(5, tools=True), "padding_free": padding_free}
    trainer = train(Noted, tmp_path, **SGD, max_steps=1, num_iterations=2, temperature=0.9, extra=extra)
    model = tiny_grpo.load()
    assert not [name for row in history(trainer) for name, x in row.items() if x != x], "no NaN in the logs"
    for before, inputs, (logps, entropies, _) in seen[:2]:
        for x, y in zip(model.parameters(), before, strict=True):
            x.data.copy_(y)
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        length, padding = inputs["completion_ids"].shape[1], Padding(inputs["completion_mask"].bool())
        position = (attention.cumsum(1) - 1).clamp(min=0)
        z = model(input_ids=ids, attention_mask=attention, position_ids=position).logits[:, -length - 1 : -1]
        z = (z / 0.9).double()[padding.rows]
        kept = trl_kept.of_batch(inputs)
        rows = torch.repeat_interleave(torch.arange(len(z)), kept.offsets.diff())
        restricted = torch.full_like(z, -torch.inf)
        restricted[rows, kept.flat] = z[rows, kept.flat.long()]
        sampled = padding.pack(inputs["tool_mask"]).bool()
        log_p = restricted[sampled].log_softmax(1)
        want = log_p.gather(1, padding.pack(inputs["completion_ids"])[sampled][:, None])[:, 0]
        assert (padding.pack(logps)[sampled].double() - want).abs().max() < 1e-5
        entropy = -torch.special.xlogy(log_p.exp(), log_p.exp()).sum(1)
        assert (padding.pack(entropies)[sampled].double() - entropy).abs().max() < 1e-5
        assert (padding.pack(logps)[~sampled] == 0).all()
        old = padding.pack(inputs["old_per_token_logps"])[sampled]
        assert (old.double() - want).abs().max() < 1e-5  # the policy has not moved yet


def test_a_list_without_the_sampled_token_is_refused():
    for kept, message in (
        ([[[1, 2], [3]]], r"with the sampled token in each list; got no 9 at token 1 of completion 0"),
        ([[[7]]], r"one list per token; got 1 for 2 in completion 0"),
        ([], r"one list per completion; got 0 for 1"),
    ):
        with pytest.raises(ValueError, match=message):
            trl_kept.Recorded.of_lists(kept, [[1, 9]], None)
