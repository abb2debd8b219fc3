"""A method of `tokfuse.algorithms` inside TRL's GRPO loop.

TRL samples, scores and buffers. The method computes advantages, selection and loss. TRL shuffles a rollout and splits
it into micro-batches; the results of `prepare` for the whole rollout go through this as padded tensors whose names
start with `PREFIX`.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from tokfuse import algorithms
from tokfuse.algorithms import Algorithm, Batch, Plan, State, World
from tokfuse.algorithms.batch import PER_SEQUENCE, PER_TOKEN
from tokfuse.integrations import trl_objective
from tokfuse.integrations.padded import Padding
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.policy.metrics import SLOT, Metrics

OP = "FusedGRPOTrainer"
PREFIX = "tokfuse/"
COUNT = PREFIX + "count"
STATE_FILE = "tokfuse_algorithm.pt"

# Options of GRPOConfig that the method replaces. A value that is not the default raises an error.
REPLACED = (
    "loss_type",
    "importance_sampling_level",
    "epsilon",
    "epsilon_high",
    "delta",
    "scale_rewards",
    "multi_objective_aggregation",
    "use_bias_correction_kl",
    "off_policy_mask_threshold",
    "top_entropy_quantile",
    "entropy_coef",
    "use_adaptive_entropy",
    "sapo_temperature_pos",
    "sapo_temperature_neg",
    "vespo_k_pos",
    "vespo_lambda_pos",
    "vespo_k_neg",
    "vespo_lambda_neg",
    "vllm_importance_sampling_mode",
    "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min",
)

LossAndScores = tuple[torch.Tensor, Any]


class Method:
    """A method and its state inside a trainer.

    The loss is divided by the count of the accumulation window: the method's own denominator over the rollout of all
    ranks, times (accumulation steps / steps per rollout), as in TRL's dapo.

    Args:
        algorithm: name or instance.
        trainer: a `FusedGRPOTrainer`, after TRL's own initialisation.
        solved_above: a response is correct if its reward is above this value, for methods that need `correct`.
    """

    def __init__(self, algorithm: str | Algorithm, trainer: Any, solved_above: float) -> None:
        self.algorithm: Algorithm = algorithms.make(algorithm) if isinstance(algorithm, str) else algorithm
        _check(self.algorithm, trainer)
        self.state: State = self.algorithm.initial_state()
        self._solved = solved_above
        self._level = "sequence"
        self._fixed = False
        self._rollout: Batch | None = None  # the rollout in use, for `advance`
        self._measured: dict[str, torch.Tensor] = {}
        self._rewards: torch.Tensor | None = None

    def describe(self) -> str:
        """Return the name of the method, and how many calls its loss takes."""
        calls = "statistics, then policy_loss" if self.algorithm.needs_policy else "one policy_step"
        return f"algorithm {self.algorithm.name or type(self.algorithm).__name__}: {calls}"

    # ------------------------------------------------------------------------------------ rollout

    @contextlib.contextmanager
    def watching_rewards(self, trainer: Any) -> Iterator[None]:
        """Context manager: keep the results of TRL's reward functions, because TRL returns advantages only."""
        score = trainer._calculate_rewards

        def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
            self._rewards = score(*args, **kwargs)
            return self._rewards

        with mock.patch.object(trainer, "_calculate_rewards", watched):
            yield

    def prepare(self, trainer: Any, out: dict[str, Any]) -> dict[str, Any]:
        """Return TRL's rollout with the method's advantages and selection added."""
        training = trainer.model.training
        size = trainer.args.per_device_train_batch_size if training else (trainer.args.per_device_eval_batch_size)
        with torch.no_grad():
            logps, entropies, _ = trainer.scores(trainer.model, out, batch_size=size)
        padding, mask = padding_of(out)
        batch = self._batch(trainer, out, padding, mask, logps, entropies)
        if training and self._rollout is not None:
            self.state = self.algorithm.advance(self.state, self._rollout)
        batch = self.algorithm.prepare(batch, self.state)
        if training:
            self._rollout = batch
        self._level = batch.advantage_level
        whole = self.algorithm.objective(batch.with_policy(batch.old_logp), self.state)
        out["old_per_token_logps"] = logps
        out[COUNT] = trainer.accelerator.gather(whole.count()).sum()
        self._fixed = whole.fixed
        for name in _fields(batch):
            value = getattr(batch, name)
            out[PREFIX + name] = padding.pad(value) if self._per_token(name) else value
        return out

    def _batch(
        self,
        trainer: Any,
        out: dict[str, Any],
        padding: Padding,
        mask: torch.Tensor,
        logps: torch.Tensor,
        entropies: torch.Tensor,
    ) -> Batch:
        accelerator, seqs = trainer.accelerator, mask.shape[0]
        group = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
        if seqs % group:
            raise refuse(
                OP,
                "the sequences of a rank",
                f"whole groups of {group} (the method computes a baseline per group)",
                seqs,
                "Change per_device_train_batch_size or steps_per_generation.",
            )
        assert self._rewards is not None
        weights = trainer.reward_weights.to(self._rewards.device)
        rewards = (self._rewards * weights.unsqueeze(0)).nansum(dim=1)
        first = accelerator.process_index * seqs
        old = padding.pack(logps)
        sampler = out.get("sampling_per_token_logps")
        if sampler is not None:
            packed = padding.pack(sampler)
            sampler = torch.where(packed.isnan(), old, packed)  # NaN: unknown to vLLM, so no correction
        ref = out.get("ref_per_token_logps")
        reward = rewards[first : first + seqs].float()
        return Batch(
            reward=reward,
            correct=reward > self._solved,
            group_ids=torch.arange(first, first + seqs, device=old.device) // group,
            cu_seqlens=padding.cu_seqlens,
            old_logp=old,
            entropy=padding.pack(entropies),
            mask=padding.pack(mask),
            sampler_logp=sampler,
            ref_logp=None if ref is None else padding.pack(ref),
            finished=_finished(trainer, out),
            world=world_of(accelerator),
        )

    def _per_token(self, name: str) -> bool:
        return self._level == "token" if name == "advantage" else name in PER_TOKEN

    # --------------------------------------------------------------------------------------- loss

    def loss(self, trainer: Any, model: Any, inputs: dict[str, Any], padding: Padding) -> LossAndScores:
        """Return the loss of a micro-batch, and TRL's padded scores. Metrics and state are updated."""
        values = {
            name.removeprefix(PREFIX): value
            for name, value in inputs.items()
            if name.startswith(PREFIX) and name != COUNT
        }
        packed = {n: padding.pack(x) if self._per_token(n) else x for n, x in values.items()}
        batch = Batch(
            cu_seqlens=padding.cu_seqlens, advantage_level=self._level, world=world_of(trainer.accelerator), **packed
        )
        divisor = self._divisor(trainer, inputs)
        if self.algorithm.needs_policy or trainer.args.fp16:
            scores = trainer.scores(model, inputs)
            logp, entropy = padding.pack(scores[0]), padding.pack(scores[1])
            plan = self.algorithm.objective(batch.with_policy(logp, entropy), self.state)
            out = plan.loss(logp, entropy, divisor)
            loss, metrics = out.loss, out.metrics
        else:
            plan = self.algorithm.objective(batch, self.state)
            step, scores = trainer.step(model, inputs, plan.inputs(divisor))
            loss, metrics = step.loss, step.metrics
            logp, entropy = step.stats.logp, step.stats.entropy
        loss = loss + plan.offset(divisor)
        _log(trainer, metrics)
        if trainer.model.training:
            self._step_state(trainer, plan, logp.detach(), entropy.detach())
        return loss, scores

    def _divisor(self, trainer: Any, inputs: dict[str, Any]) -> torch.Tensor:
        window: torch.Tensor = inputs[COUNT].clamp(min=1.0) / trainer.accelerator.num_processes
        if not trainer.model.training or self._fixed:
            return window
        steps = trl_objective.accumulation(trainer)
        scaled: torch.Tensor = window * steps / trainer.args.steps_per_generation
        return scaled

    def _step_state(self, trainer: Any, plan: Plan, logp: torch.Tensor, entropy: torch.Tensor) -> None:
        for name, value in self.algorithm.measure(plan, logp, entropy).items():
            self._measured[name] = self._measured[name] + value if name in self._measured else value
        if not trainer.accelerator.sync_gradients:
            return
        total = {name: trainer.accelerator.reduce(value, reduction="sum") for name, value in self._measured.items()}
        self.state = self.algorithm.update(self.state, total)
        self._measured = {}

    # --------------------------------------------------------------------------------- checkpoints

    def save(self, folder: str) -> None:
        """Save the state in the folder of TRL's checkpoint."""
        torch.save(self.algorithm.state_dict(self.state), f"{folder}/{STATE_FILE}")

    def load(self, folder: str) -> None:
        """Load the state from a checkpoint of the same method."""
        saved = torch.load(f"{folder}/{STATE_FILE}", weights_only=True)
        self.state = self.algorithm.load_state_dict(saved)


def padding_of(inputs: dict[str, Any]) -> tuple[Padding, torch.Tensor]:
    """Return the completion tokens of TRL's batch, and the counting ones, (batch, length) bool."""
    padding = Padding(inputs["completion_mask"].bool())
    if inputs.get("tool_mask") is None:
        return padding, padding.rows
    return padding, padding.rows & inputs["tool_mask"].bool()


def _check(algorithm: Algorithm, trainer: Any) -> None:
    if not isinstance(algorithm, Algorithm):
        raise refuse(
            OP,
            "algorithm",
            "a method that works on tokens",
            type(algorithm).__name__,
            "`python -m tokfuse algorithms` lists the methods.",
        )
    name = algorithm.name or type(algorithm).__name__
    for hook in ("plans", "before", "replay", "passes"):
        if getattr(type(algorithm), hook) is not getattr(Algorithm, hook):
            raise refuse(
                OP,
                "algorithm",
                "a method with one loss per optimizer step, which is all that TRL supports",
                f"{name}, which has several",
                "Write the loop yourself, as examples/train_grpo.py does.",
            )
    args = trainer.args
    defaults = {f.name: f.default for f in dataclasses.fields(args)}
    for option in REPLACED:
        given, default = getattr(args, option), defaults[option]
        if given != default:
            want = f"its default {default!r} with algorithm={name!r}, which replaces this option"
            raise refuse(OP, option, want, repr(given), "Set the option of the method instead.")
    kl = getattr(algorithm, "kl", None)
    coef = 0.0 if kl is None else kl.coef
    if trainer.beta != coef:
        want = f"{coef:g}, the KL coefficient of algorithm={name!r} (TRL loads the reference model if it is not 0)"
        raise refuse(OP, "beta", want, trainer.beta, "Set both to the same value.")


def _fields(batch: Batch) -> list[str]:
    """Return the names of the tensors of a prepared batch that a micro-batch needs."""
    names = [*PER_SEQUENCE, *PER_TOKEN]
    return [name for name in names if getattr(batch, name) is not None and name != "logp"]


def _finished(trainer: Any, out: dict[str, Any]) -> torch.Tensor:
    """Return whether each completion ends with an end-of-sequence token, (batch,) bool."""
    ids, rows = out["completion_ids"], out["completion_mask"].bool()
    ends = torch.tensor([*trainer.eos_token_ids, trainer._tokenizer.pad_token_id], device=ids.device)
    last = (rows.sum(1) - 1).clamp(min=0)
    return torch.isin(ids.gather(1, last.unsqueeze(1)).squeeze(1), ends)


def world_of(accelerator: Any) -> World:
    """Return the ranks of the trainer."""
    if accelerator.num_processes == 1:
        return World()
    return World(lambda x: accelerator.gather(x.unsqueeze(0)), accelerator.process_index)


def _log(trainer: Any, metrics: Metrics) -> None:
    """Log the metrics over all ranks, under TRL's names if TRL has the same quantity."""
    accelerator = trainer.accelerator
    sums = accelerator.reduce(metrics.sums, reduction="sum")
    low, high = SLOT["ratio_min"], SLOT["ratio_max"]
    sums[low] = accelerator.gather(metrics.sums[low : low + 1]).min()
    sums[high] = accelerator.gather(metrics.sums[high : high + 1]).max()
    mean = replace(metrics, sums=sums).mean()
    logged = {
        "entropy": mean["entropy"],
        "clip_ratio/low_mean": mean["clip_low"],
        "clip_ratio/high_mean": mean["clip_high"],
        "clip_ratio/region_mean": mean["clip_low"] + mean["clip_high"],
        "ratio/min": mean["ratio_min"],
        "ratio/max": mean["ratio_max"],
        "grad_rows": mean["grad_rows"],
    }
    if "ref_kl_k3" in mean:
        logged["kl"] = mean["ref_kl_k3"]
    mode = "train" if trainer.model.training else "eval"
    for name, value in logged.items():
        trainer._metrics[mode][name].append(value)
