"""Losses with the call signatures of other trainers, on `policy_step` and `policy_loss`.

Pass one where the trainer accepts a function or a module; nothing is installed or patched. The docstring of each names
the supported options. All other options raise an error. All functions and classes are module-level, so cloudpickle
sends them by name to Ray actors.

| here | replaces |
| --- | --- |
| `triton_grpo_loss` | Liger-Kernel 0.8.5 `liger_kernel.transformers.grpo_loss.triton_grpo_loss` |
| `PolicyLoss` | OpenRLHF 0.11 `openrlhf.models.PolicyLoss` (`actor.actor_loss_fn`) |
| `skyrl_policy_loss` | SkyRL 0.4 functions of `@register_policy_loss` |
| `NemoPolicyLoss` | NeMo-RL `ClippedPGLossFn` |
| `slime_policy_loss` | slime `slime.utils.ppo_utils.compute_policy_loss` |
| `prime_rl_default_loss`, `_ipo_loss`, `_ref_kl_loss`, `prime_rl_loss` | prime-rl 0.8 losses, see prime_rl_losses.py |
"""

from types import SimpleNamespace
from typing import Any

import torch

from tokfuse.integrations import trl_objective
from tokfuse.integrations.nemo_loss import NemoPolicyLoss as NemoPolicyLoss
from tokfuse.integrations.padded import Padding, padded_loss
from tokfuse.integrations.prime_rl_losses import prime_rl_default_loss as prime_rl_default_loss
from tokfuse.integrations.prime_rl_losses import prime_rl_ipo_loss as prime_rl_ipo_loss
from tokfuse.integrations.prime_rl_losses import prime_rl_loss as prime_rl_loss
from tokfuse.integrations.prime_rl_losses import prime_rl_ref_kl_loss as prime_rl_ref_kl_loss
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.core.first_order import first_order
from tokfuse.runtime.ops.offpolicy_weights import offpolicy_weights
from tokfuse.runtime.ops.policy_loss import policy_loss
from tokfuse.runtime.ops.policy_step import policy_step
from tokfuse.runtime.policy.keep_rule import KeepRule
from tokfuse.runtime.policy.objective import Objective
from tokfuse.runtime.policy.shapes import PPOClip, SigmoidGate, StopGradClip

OP = "integrations.call_shapes"
Scalar = float | torch.Tensor


def _refused(name: str, want: str, actual: object, next_step: str) -> ValueError:
    return refuse(OP, name, want, actual, next_step)


def _world_size() -> int:
    on = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if on else 1


def _mask(mask: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(like, dtype=torch.bool) if mask is None else mask.bool()


# ------------------------------------------------------------------------------------------- Liger


def triton_grpo_loss(
    logits: torch.Tensor,
    old_logp: torch.Tensor | None,
    ref_logp: torch.Tensor | None,
    completion_ids: torch.Tensor,
    advantages: torch.Tensor,
    completion_mask: torch.Tensor | None = None,
    temperature: float = 0.9,
    beta: float = 0.04,
    eps_low: float = 0.2,
    eps_high: float = 0.4,
    inplace: bool = True,
    loss_type: str = "dapo",
    max_completion_length: int | None = None,
    importance_sampling_level: str = "token",
    reduce: bool = False,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vllm_is_ratio: torch.Tensor | None = None,
    delta: float | None = None,
    use_bias_correction_kl: bool = False,
    num_items_in_batch: Scalar | None = None,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return (loss, [mean KL if beta, clip fraction]) in one pass over logits (batch, length + 1, vocab).

    Arguments and defaults match Liger-Kernel 0.8.5. The last position is dropped, as in Liger. `inplace` has no
    effect, because logits are never overwritten. Not supported: reduce=False (per-token losses), loss_type "luspo"
    (unlike TRL, Liger divides it by padded positions), and a bias-corrected KL with a sequence ratio.
    """
    if not reduce:
        raise _refused(
            "reduce", "True (only the whole loss is computed)", False, "Pass reduce=True, or use tokfuse.policy_loss."
        )
    if loss_type == "luspo" or loss_type not in trl_objective.AGGREGATIONS:
        known = ", ".join(sorted(set(trl_objective.AGGREGATIONS) - {"luspo"}))
        raise _refused("loss_type", f"one of {known}", repr(loss_type), "Use tokfuse.policy_step.")
    mask = _mask(completion_mask, completion_ids)
    args = SimpleNamespace(
        delta=delta,
        use_bias_correction_kl=use_bias_correction_kl,
        steps_per_generation=1,
        sapo_temperature_pos=sapo_temperature_pos,
        sapo_temperature_neg=sapo_temperature_neg,
        vespo_k_pos=vespo_k_pos,
        vespo_lambda_pos=vespo_lambda_pos,
        vespo_k_neg=vespo_k_neg,
        vespo_lambda_neg=vespo_lambda_neg,
    )
    options = SimpleNamespace(  # Liger's formulas equal TRL's
        args=args,
        loss_type=loss_type,
        importance_sampling_level=importance_sampling_level,
        beta=beta,
        epsilon_low=eps_low,
        epsilon_high=eps_high,
        _entropy_bonus_enabled=False,
        use_vllm=vllm_is_ratio is not None,
        vllm_importance_sampling_correction=True,
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(num_processes=1 if num_items_in_batch is None else _world_size()),
        max_completion_length=max_completion_length or completion_ids.shape[1],
    )
    if trl_objective.adds_kl(options):
        raise _refused(
            "use_bias_correction_kl",
            "False with importance_sampling_level='sequence'",
            True,
            "Use trl.FusedGRPOTrainer.",
        )
    if vllm_is_ratio is not None and vllm_is_ratio.dim() == 1:
        vllm_is_ratio = vllm_is_ratio.unsqueeze(-1)
    items = mask.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=logits.device)
    padding = Padding(mask)
    given = trl_objective.policy_inputs(
        options,
        {
            "advantages": advantages,
            "old_per_token_logps": old_logp,
            "ref_per_token_logps": ref_logp,
            "importance_sampling_ratio": vllm_is_ratio,
            "num_items_in_batch": items,
        },
        padding,
        mask,
    )
    if beta == 0.0:
        given["ref_logp"] = None
    step = policy_step(logits=logits[:, :-1][mask], target=completion_ids[mask], temperature=temperature, **given)
    mean = step.metrics.mean()
    clipped = torch.tensor(mean["clip_low"] + mean["clip_high"], dtype=torch.float32, device=logits.device)
    kl = [torch.tensor(mean["ref_kl_k3"], dtype=torch.float32, device=logits.device)] if beta != 0.0 else []
    return step.loss, [*kl, clipped]


# ---------------------------------------------------------------------------------------- OpenRLHF


def _mean_at(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return x[mask].sum() / mask.sum().clamp(min=1)


class PolicyLoss(torch.nn.Module):
    """(loss, clip fraction, policy KL, vLLM KL or None), with the arguments of OpenRLHF 0.11's PolicyLoss.

    Supported: policy_loss_type "ppo" with dual clip and the corrections tis, icepop and seq-mask-tis; and "gspo". With
    enable_vllm_is_correction, the ratio of "gspo" is against the rollout engine, without a weight and without bounds:
    as in OpenRLHF, its type and its thresholds then have no effect.
    """

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        enable_vllm_is_correction: bool = False,
        vllm_is_truncated_threshold: list[float] | None = None,
        vllm_is_correction_type: str = "tis",
    ) -> None:
        super().__init__()
        if policy_loss_type not in ("ppo", "gspo"):
            raise _refused("policy_loss_type", "'ppo' or 'gspo'", repr(policy_loss_type), "Use tokfuse.policy_loss.")
        gspo = policy_loss_type == "gspo"
        if vllm_is_correction_type not in ("tis", "icepop", "seq-mask-tis"):
            raise _refused(
                "vllm_is_correction_type",
                "'tis', 'icepop' or 'seq-mask-tis'",
                repr(vllm_is_correction_type),
                "Check the spelling.",
            )
        self.objective = Objective(
            shape=PPOClip(low=clip_eps_low, high=clip_eps_high, dual=dual_clip),
            level="sequence" if gspo else "token",
            aggregation="token_mean" if token_level_loss and not gspo else "seq_mean_token_mean",
        )
        self.against_rollout = gspo and enable_vllm_is_correction
        self.correction = vllm_is_correction_type if enable_vllm_is_correction and not gspo else None
        self.bounds = vllm_is_truncated_threshold

    def forward(
        self,
        log_probs: torch.Tensor,
        old_log_probs: torch.Tensor,
        advantages: torch.Tensor,
        action_mask: torch.Tensor | None = None,
        rollout_log_probs: torch.Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: Scalar | None = None,
        global_batch_size: Scalar | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return the loss of padded (batch, length) tensors, divided by the global count and multiplied by dp_size."""
        mask = _mask(action_mask, log_probs)
        by_token = self.objective.aggregation == "token_mean"
        count = batch_num_tokens if by_token else global_batch_size
        weight, vllm_kl, start = None, None, old_log_probs
        if self.correction is not None or self.against_rollout:
            if rollout_log_probs is None:
                raise _refused(
                    "rollout_log_probs",
                    "given with enable_vllm_is_correction",
                    None,
                    "Pass the log-probabilities of the rollout engine.",
                )
            if self.against_rollout:
                start = rollout_log_probs
            else:
                weight = self._weight(old_log_probs, rollout_log_probs, mask)
                vllm_kl = _mean_at(rollout_log_probs - old_log_probs, mask)
        normalizer = "batch" if count is None else count / dp_size
        out = padded_loss(log_probs, start, advantages, mask, self.objective, normalizer, weight)
        mean = out.metrics.mean()
        clip = log_probs.new_tensor(mean["clip_low"] + mean["clip_high"])
        return out.loss, clip, _mean_at(old_log_probs - log_probs.detach(), mask), vllm_kl

    def _weight(self, old: torch.Tensor, rollout: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        assert self.bounds is not None
        low, high = self.bounds
        padding = Padding(mask)
        options: dict[str, Any] = {"mode": "truncate" if self.correction == "tis" else "mask", "low": low, "high": high}
        if self.correction == "seq-mask-tis":
            options = {"mode": "ips", "rules": (KeepRule("ratio", "mean", low, high),)}
        weights = offpolicy_weights(
            padding.pack(old), padding.pack(rollout), level="token", cu_seqlens=padding.cu_seqlens, **options
        )
        return padding.pad(weights.weight)


# ------------------------------------------------------------------------------------------- SkyRL


def skyrl_policy_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    config: Any,
    loss_mask: torch.Tensor | None = None,
    rollout_logprobs: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Return (masked sum of the token losses, {"clip_ratio"}). SkyRL scales the advantages before the call.

    Supported values of config.policy_loss_type: regular, dual_clip, gspo, cispo (anchored on the old policy) and sapo,
    with SkyRL's option names. Not supported: other types, and any config.off_policy_correction. A mask that is not
    bool multiplies the token losses. With gspo, log-ratios are bounded by +-10 (SkyRL: from above only), else by +-20.
    """
    kind = str(getattr(config.policy_loss_type, "value", config.policy_loss_type))
    correction = vars(getattr(config, "off_policy_correction", None) or SimpleNamespace())
    for name, value in correction.items():
        if value is not None and (name.endswith(("_type", "_metric")) or "outlier" in name):
            raise _refused(
                f"config.off_policy_correction.{name}",
                "None",
                repr(value),
                "Weight the advantages with tokfuse.offpolicy_weights.",
            )
    if kind not in ("regular", "dual_clip", "gspo", "cispo", "sapo"):
        raise _refused(
            "config.policy_loss_type", "regular, dual_clip, gspo, cispo or sapo", kind, "Use tokfuse.policy_loss."
        )
    if kind == "sapo":
        shape: Any = SigmoidGate(tau_positive=config.sapo.tau_pos, tau_negative=config.sapo.tau_neg)
    elif kind == "cispo":
        if getattr(config.cispo, "cispo_anchor", "old") != "old":
            raise _refused(
                "config.cispo.cispo_anchor",
                "'old'",
                repr(config.cispo.cispo_anchor),
                "Pass rollout_logprobs as old_log_probs.",
            )
        shape = StopGradClip(
            low=config.cispo.cispo_eps_clip_low, ratio_min=None, ratio_max=None, high=config.cispo.cispo_eps_clip_high
        )
    else:
        dual = config.clip_ratio_c if kind == "dual_clip" else None
        shape = PPOClip(low=config.eps_clip_low, high=config.eps_clip_high, dual=dual)
    gspo: dict[str, Any] = {"level": "sequence_token", "log_ratio_clamp": 10.0} if kind == "gspo" else {}
    objective = Objective(shape=shape, aggregation="token_sum", **gspo)
    mask = _mask(loss_mask, log_probs)
    weight = None if loss_mask is None or loss_mask.dtype == torch.bool else loss_mask.float()
    out = padded_loss(log_probs, old_log_probs, advantages, mask, objective, None, weight)
    if kind == "cispo":  # SkyRL counts both bounds, for either sign of the advantage
        ratio, (low, high) = (log_probs - old_log_probs).detach().exp()[mask], shape.bounds
        clipped = ((ratio < low) | (ratio > high)).float()
        return out.loss, {"clip_ratio": float(clipped.sum() / max(1, clipped.numel()))}
    mean = out.metrics.mean()
    return out.loss, {"clip_ratio": mean["clip_low"] + mean["clip_high"]}


# ------------------------------------------------------------------------------------------- slime


def slime_policy_loss(
    ppo_kl: torch.Tensor,
    advantages: torch.Tensor,
    eps_clip: float,
    eps_clip_high: float,
    eps_clip_c: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (token losses, 1.0 where clipped), (tokens,) each, from ppo_kl = old_logp - logp.

    The losses are differentiable in ppo_kl, and slime reduces them. Only token ratios are supported: with
    compute_gspo_kl, the value of a token depends on the other tokens.
    """
    shape = PPOClip(low=eps_clip, high=eps_clip_high, dual=eps_clip_c)
    objective = Objective(shape=shape, aggregation="token_sum")
    logp = -ppo_kl
    leaf = logp.detach().requires_grad_()
    with torch.enable_grad():
        out = policy_loss(leaf, old_logp=torch.zeros_like(leaf), advantage=advantages, objective=objective)
        (slope,) = torch.autograd.grad(out.loss, leaf)
    ratio, (low, high) = leaf.detach().exp(), shape.bounds
    clipped = ((advantages > 0) & (ratio > high)) | ((advantages < 0) & (ratio < low))
    return _WithSlope.apply(logp, out.token_loss, slope), clipped.float()


class _WithSlope(torch.autograd.Function):
    """Return `value`, whose derivative by `x` is `slope`, element by element."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, value: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(slope)
        ctx.dtype = x.dtype
        return value.clone()

    @staticmethod
    @first_order(f"{OP}.slime_policy_loss")
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return (grad * ctx.saved_tensors[0]).to(ctx.dtype), None, None
