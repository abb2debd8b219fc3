"""Translates TRL's GRPO options to a `tokfuse.Objective` and its inputs, for TRL 1.16.

loss = 1 / normalizer * sum over tokens of aggregation(
           weight * policy term + beta * KL - entropy_coef * entropy_weight * entropy)

`loss_type` and `importance_sampling_level` select the policy term. The weight is the product of vLLM's importance
ratio, the off-policy mask and the top-entropy mask, as far as they are enabled.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch

from tokfuse.integrations.padded import Padding
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.policy.objective import KL, Objective
from tokfuse.runtime.policy.shapes import Gamma, PPOClip, Shape, SigmoidGate, StopGradClip

OP = "FusedGRPOTrainer"
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
# loss_type -> aggregation; `normalizer` returns the denominator of each type
AGGREGATIONS = {
    "grpo": "seq_mean_token_mean",
    "sapo": "seq_mean_token_mean",
    "bnpo": "token_mean",
    "dr_grpo": "token_sum",
    "luspo": "seq_mean_token_sum",
    "cispo": "token_mean",
    "dapo": "token_mean",
    "vespo": "token_mean",
}
WINDOW_MEAN = ("cispo", "dapo", "vespo")  # these divide by the tokens of the accumulation window
LEVELS = ("token", "sequence")
# VESPO's smallest weight is 1e-8, so it bounds the log of the sequence ratio from below by log(1e-8).
VESPO_LOG_CLAMP = -math.log(1e-8)
VESPO_LAMBDA_MIN = 1e-4

Inputs = Mapping[str, Any]


def check(trainer: Any) -> None:
    """Raise an error for options that are not supported. Building the objective checks the numbers."""
    if trainer.loss_type not in AGGREGATIONS:
        raise refuse(
            OP,
            "loss_type",
            f"one of {', '.join(AGGREGATIONS)}",
            repr(trainer.loss_type),
            "Use TRL's GRPOTrainer under install().",
        )
    if trainer.importance_sampling_level not in LEVELS:
        raise refuse(
            OP,
            "importance_sampling_level",
            f"one of {', '.join(LEVELS)}",
            repr(trainer.importance_sampling_level),
            "See GRPOConfig.",
        )
    objective(trainer, 0.0)


def corrects_sampler(trainer: Any) -> bool:
    """Return whether the batch contains vLLM's importance ratio."""
    return bool(trainer.use_vllm and trainer.vllm_importance_sampling_correction)


def adds_kl(trainer: Any) -> bool:
    """Return whether the KL term must be computed by `ratio_times_kl`, outside the objective.

    This is the case if the KL term is multiplied by another ratio than the token ratio of the policy term: by the
    sequence ratio, or by VESPO's ratio that includes the sampler's.
    """
    if trainer.beta == 0.0 or not trainer.args.use_bias_correction_kl:
        return False
    of_sampler = trainer.loss_type == "vespo" and corrects_sampler(trainer)
    return bool(of_sampler or trainer.importance_sampling_level == "sequence")


def objective(trainer: Any, entropy_coef: float) -> Objective:
    """Return the objective for the trainer's options."""
    kl = None
    if trainer.beta != 0.0 and not adds_kl(trainer):
        estimator = "ratio_k3" if trainer.args.use_bias_correction_kl else "k3"
        kl = KL(estimator=estimator, coef=trainer.beta)
    vespo = trainer.loss_type == "vespo"
    objective = Objective(
        shape=_shape(trainer),
        level="sequence_sum" if vespo else trainer.importance_sampling_level,
        aggregation=AGGREGATIONS[trainer.loss_type],
        kl=kl,
        entropy_coef=entropy_coef,
    )
    return dataclasses.replace(objective, log_ratio_clamp=VESPO_LOG_CLAMP) if vespo else objective


def _shape(trainer: Any) -> Shape:
    args, kind = trainer.args, trainer.loss_type
    if kind in CLIPPED:
        return PPOClip(low=trainer.epsilon_low, high=trainer.epsilon_high, cap=args.delta)
    if kind == "cispo":
        return StopGradClip(ratio_min=0.0, ratio_max=trainer.epsilon_high)
    if kind == "sapo":
        return SigmoidGate(tau_positive=args.sapo_temperature_pos, tau_negative=args.sapo_temperature_neg)
    lam = {"lam_positive": args.vespo_lambda_pos, "lam_negative": args.vespo_lambda_neg}
    return Gamma(
        k_positive=args.vespo_k_pos,
        k_negative=args.vespo_k_neg,
        **{name: max(x, VESPO_LAMBDA_MIN) for name, x in lam.items()},
    )


def entropy_coef(trainer: Any) -> float:
    """Return the current entropy coefficient. TRL disables an adaptive bonus above its target."""
    if not trainer._entropy_bonus_enabled:
        return 0.0
    if trainer.use_adaptive_entropy and trainer._last_world_entropy > trainer.args.entropy_target:
        return 0.0
    return float(trainer.entropy_coef)


def accumulation(trainer: Any) -> float:
    """Return the number of micro-batches by which TRL divides the mean of each."""
    training = trainer.model.training
    return float(trainer.current_gradient_accumulation_steps) if training else 1.0


def normalizer(trainer: Any, inputs: Inputs, mask: torch.Tensor) -> float | torch.Tensor:
    """Return TRL's denominator. It includes sequences without a token, as in TRL. mask: (batch, length)."""
    steps, batch = accumulation(trainer), mask.shape[0]
    if trainer.loss_type in WINDOW_MEAN:
        items: torch.Tensor = inputs["num_items_in_batch"].clamp(min=1.0)
        window: torch.Tensor = items / trainer.accelerator.num_processes
        if trainer.model.training:
            window = window * steps / trainer.args.steps_per_generation
        return window
    if trainer.loss_type == "bnpo":
        return mask.sum().clamp(min=1) * steps
    if trainer.loss_type == "dr_grpo":
        return float(batch * trainer.max_completion_length * steps)
    return batch * steps


def policy_inputs(
    trainer: Any,
    inputs: Inputs,
    padding: Padding,
    mask: torch.Tensor,
    weights: tuple[torch.Tensor, ...] = (),
    entropy_mask: torch.Tensor | None = None,
) -> dict[str, Any]:
    """Return the keyword arguments of `policy_step`, except the model's.

    Args:
        trainer: the trainer, for its options.
        inputs: TRL's micro-batch.
        padding: the completion tokens of the micro-batch.
        mask: (batch, length) bool, the tokens that count.
        weights: factors of the policy term, (batch, length) or (batch, 1).
        entropy_mask: (batch, length) bool, the tokens that the entropy bonus applies to. None: `mask`.
    """
    advantage = inputs["advantages"]
    old_logp, ref_logp = inputs.get("old_per_token_logps"), inputs.get("ref_per_token_logps")
    if corrects_sampler(trainer):
        ratio = inputs["importance_sampling_ratio"]
        if trainer.loss_type == "vespo":
            if old_logp is None:
                raise refuse(
                    OP,
                    "old_per_token_logps",
                    "given if vLLM's importance ratio is used",
                    "None",
                    "TRL computes them together with vLLM; do not remove them.",
                )
            old_logp = _with_sampler(old_logp, ratio, mask)
        else:
            weights = (*weights, ratio)
    divisor = normalizer(trainer, inputs, mask)
    coef = entropy_coef(trainer)
    level = "sequence" if advantage.dim() == 1 else "token"
    token_weight = None
    if weights:
        token_weight = math.prod(padding.pack(x.float()) for x in weights)
    return {
        "objective": objective(trainer, coef),
        "advantage": advantage if level == "sequence" else padding.pack(advantage),
        "advantage_level": level,
        "old_logp": None if old_logp is None else padding.pack(old_logp),
        "ref_logp": None if ref_logp is None or adds_kl(trainer) else padding.pack(ref_logp),
        "mask": padding.pack(mask),
        "cu_seqlens": padding.cu_seqlens,
        "normalizer": divisor,
        "token_weight": token_weight,
        "entropy_weight": None
        if coef == 0.0
        else padding.pack(_entropy_weight(trainer, mask, mask if entropy_mask is None else entropy_mask, divisor)),
    }


def _with_sampler(old: torch.Tensor, ratio: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return old log-probabilities whose sequence ratio is TRL's: log(current / old) + log(old / sampler).

    TRL adds the sum of the second term over the whole row, so each counting token gets an equal share of it.
    """
    total = ratio.log().clamp(-VESPO_LOG_CLAMP, 20.0).sum(-1, keepdim=True)
    return old - total / mask.sum(-1, keepdim=True).clamp(min=1)


def _entropy_weight(
    trainer: Any, mask: torch.Tensor, acts_on: torch.Tensor, divisor: float | torch.Tensor
) -> torch.Tensor:
    """Return the weight that makes the bonus a mean over its own tokens, as in TRL, for any denominator."""
    weight = acts_on.float() * (divisor / (acts_on.sum().clamp(min=1) * accumulation(trainer)))
    if AGGREGATIONS[trainer.loss_type] == "seq_mean_token_mean":
        weight = weight * mask.sum(-1, keepdim=True)
    return weight


def ratio_times_kl(trainer: Any, inputs: Inputs, logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return beta * ratio * k3, aggregated and divided like the policy term, (), with gradient.

    logps: (batch, length), with gradient. The ratio has a gradient too (DeepSeek-V3.2).
    """
    old, ref = inputs.get("old_per_token_logps"), inputs["ref_per_token_logps"]
    log_ratio = torch.where(mask, logps - (logps.detach() if old is None else old), 0.0)
    counts = mask.sum(-1, keepdim=True).clamp(min=1)
    if trainer.importance_sampling_level == "sequence":
        log_ratio = log_ratio.sum(-1, keepdim=True) / counts
    gap = torch.where(mask, ref - logps, 0.0)
    kl = (gap.exp() - gap - 1) * log_ratio.exp()
    if AGGREGATIONS[trainer.loss_type] == "seq_mean_token_mean":
        kl = kl / counts
    total: torch.Tensor = trainer.beta * kl.sum() / normalizer(trainer, inputs, mask)
    return total
