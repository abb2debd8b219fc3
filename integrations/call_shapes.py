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
| `prime_rl_loss` | prime-rl `trainer.loss = {type = "custom", import_path = ...}` |
"""

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from tokfuse.integrations import trl_objective
from tokfuse.integrations.padded import Padding
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.core.first_order import first_order
from tokfuse.runtime.ops.offpolicy_weights import offpolicy_weights
from tokfuse.runtime.ops.policy_loss import policy_loss
from tokfuse.runtime.ops.policy_step import policy_step
from tokfuse.runtime.policy.keep_rule import KeepRule
from tokfuse.runtime.policy.objective import KL, Objective
from tokfuse.runtime.policy.results import PolicyLoss as PolicyLossResult
from tokfuse.runtime.policy.shapes import LinearLogp, PPOClip, SigmoidGate, StopGradClip

OP = "integrations.call_shapes"
Scalar = float | torch.Tensor


def _refused(name: str, want: str, actual: object, next_step: str) -> ValueError:
    return refuse(OP, name, want, actual, next_step)


def _world_size() -> int:
    on = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if on else 1


def _mask(mask: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(like, dtype=torch.bool) if mask is None else mask.bool()


def _padded_loss(
    log_probs: torch.Tensor,
    old: torch.Tensor | None,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    objective: Objective,
    normalizer: Scalar | str | None,
    weight: torch.Tensor | None = None,
) -> PolicyLossResult:
    """Return `policy_loss` of the counting tokens in padded (batch, length) tensors."""
    padding = Padding(mask)
    return policy_loss(
        padding.pack(log_probs),
        old_logp=None if old is None else padding.pack(old),
        advantage=padding.pack(advantages),
        objective=objective,
        normalizer=normalizer,
        cu_seqlens=padding.cu_seqlens,
        token_weight=None if weight is None else padding.pack(weight),
    )


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
    items = mask.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
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
    clipped = torch.tensor(mean["clip_low"] + mean["clip_high"], device=logits.device)
    kl = [torch.tensor(mean["ref_kl_k3"], device=logits.device)] if beta != 0.0 else []
    return step.loss, [*kl, clipped]


# ---------------------------------------------------------------------------------------- OpenRLHF


class PolicyLoss(torch.nn.Module):
    """(loss, clip fraction, policy KL, vLLM KL or None), with the arguments of OpenRLHF 0.11's PolicyLoss.

    Supported: policy_loss_type "ppo" with dual clip and the corrections tis, icepop and seq-mask-tis; and "gspo". Not
    supported: "gspo" with enable_vllm_is_correction, whose ratio is against the rollout engine. Pass the engine's
    log-probabilities as old_log_probs instead.
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
        if gspo and enable_vllm_is_correction:
            raise _refused(
                "enable_vllm_is_correction",
                "False with policy_loss_type='gspo'",
                True,
                "Pass rollout_log_probs as old_log_probs.",
            )
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
        self.correction = vllm_is_correction_type if enable_vllm_is_correction else None
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
        weight, vllm_kl = None, None
        if self.correction is not None:
            if rollout_log_probs is None:
                raise _refused(
                    "rollout_log_probs",
                    "given with enable_vllm_is_correction",
                    None,
                    "Pass the log-probabilities of the rollout engine.",
                )
            weight = self._weight(old_log_probs, rollout_log_probs, mask)
            gap = (rollout_log_probs - old_log_probs)[mask]
            vllm_kl = gap.sum() / max(1, gap.numel())
        normalizer = "batch" if count is None else count / dp_size
        out = _padded_loss(log_probs, old_log_probs, advantages, mask, self.objective, normalizer, weight)
        mean = out.metrics.mean()
        clip = log_probs.new_tensor(mean["clip_low"] + mean["clip_high"])
        return out.loss, clip, log_probs.new_tensor(mean["kl_k1"]), vllm_kl

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
    out = _padded_loss(log_probs, old_log_probs, advantages, mask, objective, None, weight)
    if kind == "cispo":  # SkyRL counts both bounds, for either sign of the advantage
        ratio, (low, high) = (log_probs - old_log_probs).detach().exp()[mask], shape.bounds
        clipped = ((ratio < low) | (ratio > high)).float()
        return out.loss, {"clip_ratio": float(clipped.sum() / max(1, clipped.numel()))}
    mean = out.metrics.mean()
    return out.loss, {"clip_ratio": mean["clip_low"] + mean["clip_high"]}


# ------------------------------------------------------------------------------------------ NeMo-RL


NEMO_DEFAULTS: dict[str, Any] = {
    "disable_ppo_ratio": False,
    "token_level_loss": True,
    "sequence_level_importance_ratios": False,
    "ratio_clip_min": 0.2,
    "ratio_clip_max": 0.2,
    "ratio_clip_c": None,
    "reference_policy_kl_penalty": 0.01,
    "reference_policy_kl_type": "k3",
    "kl_input_clamp_value": 20.0,
    "kl_output_clamp_value": 10.0,
    "use_kl_in_reward": False,
    "use_importance_sampling_correction": False,
    "truncated_importance_sampling_type": None,
    "truncated_importance_sampling_ratio": None,
    "truncated_importance_sampling_ratio_min": None,
    "use_on_policy_kl_approximation": False,
    "force_on_policy_ratio": False,
    "use_cispo": False,
    "positive_example_nll_weight": 0.0,
}
"""The fields of NeMo-RL's ClippedPGLossConfig and their defaults."""


class NemoPolicyLoss:
    """NeMo-RL's loss protocol: (next_token_logprobs, data, global_valid_seqs, global_valid_toks).

    `cfg` has the fields of ClippedPGLossConfig, as an object or a dict. Supported: ratio_clip_min, ratio_clip_max,
    ratio_clip_c, token_level_loss, sequence_level_importance_ratios, disable_ppo_ratio, force_on_policy_ratio,
    use_cispo, and use_importance_sampling_correction with tis or icepop at token level. Not supported: the KL penalty
    (its output clamp has no equivalent; add it to the reward), seq-mask-tis, sequence-level correction, and the NLL
    term. The fields kl_input_clamp_value, kl_output_clamp_value and use_on_policy_kl_approximation belong to the KL
    penalty only; reference_policy_kl_type also selects the estimator of the metrics. A combination that NeMo-RL
    refuses, and a field that tokfuse does not know, raise an error.

    A call returns (loss, metrics), with all metrics of NeMo-RL. The loss is a sum divided by the given global count. A
    sampling ratio that is not finite becomes 0, `curr_logprobs_keep_mask` of the data removes tokens from the loss,
    a sample mask between 0 and 1 multiplies the loss of its sample, and a micro-batch without a valid token gives 0.
    The ratio is bounded by exp(+-20).
    """

    def __init__(self, cfg: Any, use_fused_linear_logprobs: bool = False) -> None:
        given = cfg if isinstance(cfg, Mapping) else {**vars(cfg), **(getattr(cfg, "model_extra", None) or {})}
        for name, value in given.items():
            if name not in NEMO_DEFAULTS and value:
                raise _refused(f"cfg.{name}", "a field of ClippedPGLossConfig", repr(value), "Remove it.")
        c = SimpleNamespace(**{name: given.get(name, default) for name, default in NEMO_DEFAULTS.items()})
        _check_nemo(c)
        self.use_fused_linear_logprobs = use_fused_linear_logprobs
        self.correction = c.truncated_importance_sampling_type
        self.corrects = c.use_importance_sampling_correction
        self.low, self.high = c.truncated_importance_sampling_ratio_min, c.truncated_importance_sampling_ratio
        self.kl_type = c.reference_policy_kl_type
        self.clip = {"low": c.ratio_clip_min, "high": c.ratio_clip_max}
        self.on_policy = c.force_on_policy_ratio
        shape: Any = PPOClip(**self.clip, dual=c.ratio_clip_c)
        if c.disable_ppo_ratio and not self.on_policy:
            shape = LinearLogp()
        elif c.use_cispo:
            shape = StopGradClip(**self.clip, ratio_min=None, ratio_max=None)
        self.objective = Objective(
            shape=shape,
            level="sequence" if c.sequence_level_importance_ratios else "token",
            aggregation="token_mean" if c.token_level_loss else "seq_mean_token_mean",
        )

    @property
    def loss_type(self) -> Any:
        """NeMo-RL's enum, imported on first use."""
        from nemo_rl.algorithms.loss.interfaces import LossType

        return LossType.TOKEN_LEVEL if self._by_token else LossType.SEQUENCE_LEVEL

    @property
    def input_type(self) -> Any:
        """NeMo-RL's enum for log-probabilities of the next tokens."""
        from nemo_rl.algorithms.loss.interfaces import LossInputType

        return LossInputType.LOGPROB

    @property
    def metric_normalizations(self) -> dict[str, Any]:
        """NeMo-RL's enum of the global count that divides each metric."""
        from nemo_rl.algorithms.loss.interfaces import MetricNormalizer as By

        loss = By.TOKENS if self._by_token else By.SEQUENCES
        out = dict.fromkeys(NEMO_SUMS, By.TOKENS) | {"loss": loss, "kl_penalty": loss}
        if self.objective.level == "sequence":
            out["sampling_importance_ratio"] = By.SEQUENCES
        if self.correction is not None:
            out["is_oob_ratio"] = By.TOKENS
        plain = [f"probs_ratio{x}_{end}" for x in ("", "_clamped") for end in ("min", "max")]
        return out | dict.fromkeys(("num_valid_samples", "positive_nll_loss", *plain), By.NONE)

    @property
    def _by_token(self) -> bool:
        return self.objective.aggregation == "token_mean"

    def __call__(
        self,
        next_token_logprobs: torch.Tensor,
        data: Any,
        global_valid_seqs: torch.Tensor,
        global_valid_toks: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        all_valid = data["token_mask"][:, 1:] * data["sample_mask"].unsqueeze(-1)
        keep = data.get("curr_logprobs_keep_mask")
        valid = all_valid if keep is None else all_valid * keep
        current, sampled = next_token_logprobs.detach(), data["generation_logprobs"][:, 1:]
        old = current if self.on_policy else data["prev_logprobs"][:, 1:]
        ratio = (old - sampled).exp().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        weight, out_of_bounds = self._truncated(ratio)
        seqs, tokens = (torch.as_tensor(x).clamp(min=1) for x in (global_valid_seqs, global_valid_toks))
        out = _padded_loss(
            next_token_logprobs,
            old,
            data["advantages"][:, 1:],
            valid.bool(),
            self.objective,
            tokens if self._by_token else seqs,
            valid * weight if self.corrects else valid,
        )
        of_old = valid if self.on_policy else all_valid  # old is current then, and equally filtered
        metrics = self._metrics(current, old, sampled, valid, of_old, weight, tokens, seqs)
        if self.correction is not None:
            metrics["is_oob_ratio"] = float((out_of_bounds * of_old).sum() / tokens)
        return out.loss, {"loss": out.loss.item(), **metrics, "num_valid_samples": data["sample_mask"].sum().item()}

    def _truncated(self, ratio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sampling ratio within the bounds of tis or icepop, and which elements were outside."""
        if self.correction is None:
            return ratio, torch.zeros_like(ratio)
        low = 0.0 if self.low is None else self.low
        outside = (ratio < low) | (ratio > self.high)
        if self.correction == "tis":
            return ratio.clamp(low, self.high), outside.float()
        return ratio.masked_fill(outside, 0.0), outside.float()

    @torch.no_grad()
    def _metrics(
        self,
        current: torch.Tensor,
        old: torch.Tensor,
        sampled: torch.Tensor,
        valid: torch.Tensor,
        of_old: torch.Tensor,
        weight: torch.Tensor,
        tokens: torch.Tensor,
        seqs: torch.Tensor,
    ) -> dict[str, float]:
        """Return NeMo-RL's metrics. `valid` are the tokens of the loss, `of_old` those of a comparison with `old`."""
        ratio = (current - old).exp()
        clamped = ratio.clamp(1.0 - self.clip["low"], 1.0 + self.clip["high"])
        mean_weight = (weight * of_old).sum() / tokens
        if self.objective.level == "sequence":
            inside = valid.bool()
            mean = torch.where(inside, current - old, 0.0).sum(1, keepdim=True) / inside.sum(1, keepdim=True).clamp(
                min=1
            )
            ratio = mean.exp().expand_as(current)
            clamped = ratio.clamp(1.0 - self.clip["low"], 1.0 + self.clip["high"])
            whole = (torch.where(of_old.bool(), old - sampled, 0.0)).sum(1).exp()
            whole = whole.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
            mean_weight = (whole * of_old.amax(1)).sum() / seqs
        elif isinstance(self.objective.shape, LinearLogp):
            ratio = clamped = current
        elif self.on_policy:
            clamped = ratio
        log_mixture = torch.logaddexp(old, sampled) - math.log(2.0)
        js = 0.5 * (_kl(log_mixture, old, "k3") + _kl(log_mixture, sampled, "k3"))
        sums = {
            "probs_ratio": _sum_at(ratio, valid),
            "probs_ratio_clamped": _sum_at(clamped, valid),
            "token_mult_prob_error": _sum_at((sampled - old).abs().exp(), of_old),
            "gen_kl_error": _sum_at(_kl(sampled, old, self.kl_type), of_old),
            "policy_kl_error": _sum_at(_kl(old, sampled, self.kl_type), of_old),
            "js_divergence_error": _sum_at(js, of_old),
            "approx_entropy": _sum_at(-(current - sampled).exp() * current, valid),
        }
        extremes = [x[valid.bool()] for x in (ratio, clamped)]
        ends = [
            (x.min(), x.max()) if x.numel() else (x.new_tensor(math.inf), x.new_tensor(-math.inf)) for x in extremes
        ]
        found = torch.stack([*(x / tokens for x in sums.values()), mean_weight, *ends[0], *ends[1]]).tolist()
        names = (
            *sums,
            "sampling_importance_ratio",
            "probs_ratio_min",
            "probs_ratio_max",
            "probs_ratio_clamped_min",
            "probs_ratio_clamped_max",
        )
        return dict(zip(names, found, strict=True)) | {"kl_penalty": 0.0, "positive_nll_loss": 0.0}


NEMO_SUMS = (
    "probs_ratio",
    "probs_ratio_clamped",
    "token_mult_prob_error",
    "gen_kl_error",
    "policy_kl_error",
    "js_divergence_error",
    "approx_entropy",
    "sampling_importance_ratio",
)


def _check_nemo(c: SimpleNamespace) -> None:
    """Raise an error for what the shim does not compute, and for what NeMo-RL refuses."""
    another = "Use NeMo-RL's ClippedPGLossFn."
    for name in ("reference_policy_kl_penalty", "positive_example_nll_weight"):
        if getattr(c, name) and not (name == "reference_policy_kl_penalty" and c.use_kl_in_reward):
            raise _refused(f"cfg.{name}", "0", getattr(c, name), another)
    if c.reference_policy_kl_type not in ("k1", "k2", "k3"):
        raise _refused("cfg.reference_policy_kl_type", "'k1', 'k2' or 'k3'", repr(c.reference_policy_kl_type), another)
    kind, name = c.truncated_importance_sampling_type, "cfg.truncated_importance_sampling_type"
    if kind not in (None, "tis", "icepop") or (
        c.sequence_level_importance_ratios and c.use_importance_sampling_correction
    ):
        raise _refused(name, "None, 'tis' or 'icepop' at token level", repr(kind), another)
    if kind is not None and not c.use_importance_sampling_correction:
        raise _refused(name, "None without use_importance_sampling_correction", repr(kind), "Set both, as in NeMo-RL.")
    high, low = c.truncated_importance_sampling_ratio, c.truncated_importance_sampling_ratio_min
    if (high is not None) != (kind is not None) or (high is not None and high <= 0):
        raise _refused("cfg.truncated_importance_sampling_ratio", "a number > 0 with a type, else None", high, another)
    if (low is None) == (kind == "icepop") and kind != "tis" or (low is not None and low > high):
        raise _refused(
            "cfg.truncated_importance_sampling_ratio_min", "a number up to the ratio", low, "icepop needs it."
        )
    if c.sequence_level_importance_ratios and c.token_level_loss:
        raise _refused("cfg.token_level_loss", "False with sequence_level_importance_ratios", True, "Set it to False.")
    against = ("disable_ppo_ratio", "force_on_policy_ratio", "sequence_level_importance_ratios", "ratio_clip_c")
    for option in against:
        if c.use_cispo and getattr(c, option):
            raise _refused(f"cfg.{option}", "left out with use_cispo", getattr(c, option), "Choose one of them.")
    if c.use_cispo and not c.token_level_loss:
        raise _refused("cfg.token_level_loss", "True with use_cispo", False, "Set it to True.")


def _kl(logp: torch.Tensor, other: torch.Tensor, kind: str) -> torch.Tensor:
    """Return the estimator of KL(p || other) from samples of p: k1, k2 or k3."""
    gap = other - logp
    if kind == "k3":
        return gap.exp() - 1.0 - gap
    return -gap if kind == "k1" else 0.5 * gap.square()


def _sum_at(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask.bool(), x * mask, 0.0).sum()


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


# ---------------------------------------------------------------------------------------- prime-rl


def prime_rl_loss(
    inputs: Any,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual: float | None = None,
    level: str = "token",
    kl_coef: float = 0.0,
) -> Any:
    """Return prime-rl's LossOutputs of one sequence: the *sum* of its token losses, and metrics.

    `[trainer.loss.kwargs]` sets the keyword arguments.

    Args:
        inputs: prime-rl's LossInputs. The old policy is inference_logprobs; loss_weights multiply every token's loss.
        clip_low, clip_high: widths of the clip: the ratio is kept in [1 - clip_low, 1 + clip_high].
        dual: bound of the dual clip. None: no dual clip.
        level: level of the ratio, see `tokfuse.Objective`.
        kl_coef: coefficient of a k3 KL to ref_logprobs. 0: none.
    """
    from prime_rl.trainer.rl.loss import LossOutputs

    kl = KL(coef=kl_coef) if kl_coef else None
    tokens = inputs.trainer_logprobs.shape[0]
    weight = inputs.loss_weights
    out = policy_loss(
        inputs.trainer_logprobs,
        old_logp=inputs.inference_logprobs,
        advantage=inputs.advantages,
        objective=Objective(
            shape=PPOClip(low=clip_low, high=clip_high, dual=dual), level=level, kl=kl, aggregation="token_sum"
        ),
        mask=inputs.loss_mask,
        ref_logp=inputs.ref_logprobs if kl else None,
        token_weight=weight,
        kl_weight=weight if kl else None,
        cu_seqlens=torch.tensor([0, tokens], dtype=torch.int32, device=inputs.loss_mask.device),
    )
    mean = out.metrics.mean()
    names = ("clip_low", "clip_high", "kl_k1", "ratio", "ref_kl_k3")
    device = inputs.loss_mask.device
    metrics = {name: torch.tensor(mean[name], device=device) for name in names if name in mean}
    return LossOutputs(loss=out.loss, metrics=metrics)
