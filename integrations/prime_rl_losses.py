"""prime-rl's losses on `tokfuse.policy_loss`, for `trainer.loss = {type = "custom", import_path = ...}`.

| here | prime-rl 0.8 |
| --- | --- |
| `prime_rl_default_loss` | `default_loss_fn`, the loss of `trainer.loss.type = "default"` |
| `prime_rl_ipo_loss` | `ipo_loss_fn`, the loss of `trainer.loss.type = "ipo"` |
| `prime_rl_ref_kl_loss` | `ref_kl_loss_fn`, the fixed loss of distillation samples |
| `prime_rl_loss` | - (a clipped ratio with a KL to the reference) |

Each takes prime-rl's LossInputs of one sequence and returns its LossOutputs: the *sum* of the token losses, and
metrics. `[trainer.loss.kwargs]` sets the keyword arguments, with the names and defaults of prime-rl's configuration.
The configuration cannot replace the loss of distillation samples; assign
`prime_rl.trainer.rl.loss.ref_kl_loss_fn = prime_rl_ref_kl_loss`.
"""

from typing import Any

import torch

from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.ops.policy_loss import policy_loss
from tokfuse.runtime.policy.objective import KL, Objective
from tokfuse.runtime.policy.shapes import LinearRatio, PPOClip

OP = "integrations.prime_rl_losses"
LARGEST_LOG_RATIO = 80.0  # exp(80) is finite in float32. prime-rl has no bound
NO_CLAMP = 1e30
REF_KL_LOW = 0.2  # ref_kl_loss_fn has these two as literals
REF_KL_TAU = 1e-3


def prime_rl_loss(
    inputs: Any,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual: float | None = None,
    level: str = "token",
    kl_coef: float = 0.0,
) -> Any:
    """Return prime-rl's LossOutputs of one sequence: the *sum* of its token losses, and metrics.

    Args:
        inputs: prime-rl's LossInputs. The old policy is inference_logprobs; loss_weights multiply every token's loss.
        clip_low, clip_high: widths of the clip: the ratio is kept in [1 - clip_low, 1 + clip_high].
        dual: bound of the dual clip. None: no dual clip.
        level: level of the ratio, see `tokfuse.Objective`.
        kl_coef: coefficient of a k3 KL to ref_logprobs. 0: none.
    """
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
    return _outputs(
        out.loss, {name: torch.tensor(mean[name], dtype=torch.float32, device=device) for name in names if name in mean}
    )


def prime_rl_default_loss(
    inputs: Any, dppo_mask_low: float = 0.2, dppo_mask_high: float = 0.2, adv_tau: float = 1.0, kl_tau: float = 1e-3
) -> Any:
    """Return the LossOutputs of prime-rl's default loss: DPPO's trust region and a squared log-ratio.

    The loss of a token is -keep adv_tau A r + kl_tau log(r)^2, with r = p / p_inference. `keep` is 0 if p left its
    region in the direction of the advantage: p - p_inference > dppo_mask_high for A > 0, < -dppo_mask_low else.
    Options and metrics are prime-rl's. log(r) is bounded by +-80 in the first term, where prime-rl overflows.
    A token outside the mask has no effect, even if it is not finite.
    """
    change, positive = _change(inputs), inputs.advantages > 0
    masked = torch.where(positive, change > dppo_mask_high, change < -dppo_mask_low)
    loss = _trust_region_loss(inputs, adv_tau * inputs.advantages, masked, kl_tau)
    mask, low = inputs.loss_mask, masked & (inputs.advantages < 0)
    dropped = mask & masked
    return _outputs(
        loss,
        _mismatch(inputs, masked)
        | {
            "is_masked_low": _mean(low, mask),
            "is_masked_high": _mean(masked & positive, mask),
            "masked_advantage_positive": _mean(positive, dropped),
            "masked_advantage_negative": _mean(inputs.advantages < 0, dropped),
        },
    )


def prime_rl_ipo_loss(inputs: Any, ipo_threshold: float = 0.1, adv_tau: float = 1.0, kl_tau: float = 1e-3) -> Any:
    """Return the LossOutputs of prime-rl's IPO loss: the default loss with a trust region of both signs.

    `keep` is 0 where |p - p_inference| > ipo_threshold. Options and metrics are prime-rl's.
    """
    masked = _change(inputs).abs() > ipo_threshold
    loss = _trust_region_loss(inputs, adv_tau * inputs.advantages, masked, kl_tau)
    return _outputs(loss, _mismatch(inputs, masked))


def prime_rl_ref_kl_loss(inputs: Any) -> Any:
    """Return the LossOutputs of prime-rl's distillation loss: log p_ref - log p is the advantage of a token.

    `keep` is 0 if p fell by more than 0.2, and kl_tau is 1e-3, as in prime-rl. `inputs.advantages` is not read.
    """
    if inputs.ref_logprobs is None:
        raise refuse(OP, "ref_logprobs", "given for ref_kl", None, "Use prime-rl's algorithm 'opd' or 'opsd'.")
    gap = (inputs.ref_logprobs - inputs.trainer_logprobs).detach()
    masked = _change(inputs) < -REF_KL_LOW
    loss = _trust_region_loss(inputs, gap, masked, REF_KL_TAU)
    metrics = {f"ref_kl/{name}": value for name, value in _mismatch(inputs, masked).items()}
    return _outputs(loss, metrics | {"ref_kl": _mean(gap, inputs.loss_mask)})


def _trust_region_loss(inputs: Any, advantage: torch.Tensor, masked: torch.Tensor, kl_tau: float) -> torch.Tensor:
    """Return the sum of weight (-keep A r + kl_tau log(r)^2) over the tokens of the loss mask."""
    logp, weight = inputs.trainer_logprobs, inputs.loss_weights
    keep = (~masked).to(logp.dtype)
    return policy_loss(
        logp,
        old_logp=inputs.inference_logprobs,
        advantage=advantage.to(logp.dtype),
        # k2 is log(r)^2 / 2.
        objective=Objective(
            shape=LinearRatio(),
            kl=KL(estimator="k2", coef=2 * kl_tau, clamp=NO_CLAMP),
            aggregation="token_sum",
            log_ratio_clamp=LARGEST_LOG_RATIO,
        ),
        mask=inputs.loss_mask,
        token_weight=keep if weight is None else keep * weight,
        ref_logp=inputs.inference_logprobs,
        kl_weight=weight,
    ).loss


def _change(inputs: Any) -> torch.Tensor:
    """Return p - p_inference of every token."""
    change: torch.Tensor = inputs.trainer_logprobs.detach().exp() - inputs.inference_logprobs.exp()
    return change


def _mismatch(inputs: Any, masked: torch.Tensor) -> dict[str, torch.Tensor]:
    log_ratio = inputs.trainer_logprobs.detach() - inputs.inference_logprobs
    kl = log_ratio.expm1() - log_ratio
    mask = inputs.loss_mask
    return {
        "masked_mismatch_kl": _mean(kl, mask & masked),
        "unmasked_mismatch_kl": _mean(kl, mask & ~masked),
        "is_masked": _mean(masked, mask),
    }


def _mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean over the mask, and 0 without a token, without a synchronisation."""
    return torch.where(mask, x, 0).sum() / mask.sum().clamp(min=1)


def _outputs(loss: torch.Tensor, metrics: dict[str, torch.Tensor]) -> Any:
    from prime_rl.trainer.rl.loss import LossOutputs

    return LossOutputs(loss=loss, metrics=metrics)
