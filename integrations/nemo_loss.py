"""NeMo-RL's `ClippedPGLossFn` on `tokfuse.policy_loss`."""

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from tokfuse.integrations.padded import padded_loss
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.policy.objective import Objective
from tokfuse.runtime.policy.shapes import LinearLogp, PPOClip, StopGradClip

OP = "integrations.nemo_loss"


def _refused(name: str, want: str, actual: object, next_step: str) -> ValueError:
    return refuse(OP, name, want, actual, next_step)


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


class _Sampling(NamedTuple):
    """The importance weights of the generation policy, and the sums of two metrics."""

    weight: torch.Tensor
    """(batch, length) or (batch, 1)."""
    total: torch.Tensor
    out_of_bounds: torch.Tensor


class NemoPolicyLoss:
    """NeMo-RL's loss protocol: (next_token_logprobs, data, global_valid_seqs, global_valid_toks).

    `cfg` has the fields of ClippedPGLossConfig, as an object or a dict, and all of them have the same effect as in
    NeMo-RL: the clipped ratio, its dual clip and CISPO; sequence ratios; the KL penalty with both clamps, the sampling
    weight of its estimate and `curr_logprobs_unfiltered`; the importance correction with tis, icepop and seq-mask-tis;
    the NLL of the samples with a positive reward. A combination that NeMo-RL refuses, and a field that tokfuse does not
    know, raise an error.

    A call returns (loss, metrics), with all metrics of NeMo-RL. The loss is a sum divided by the given global count. A
    sampling ratio that is not finite becomes 0. `curr_logprobs_keep_mask` of the data removes tokens from the loss. A
    sample mask between 0 and 1 multiplies the loss of its sample. A micro-batch without a valid token gives 0.
    The ratio is bounded by exp(+-20). Values outside the mask are never used. The metric sampling_importance_ratio of
    sequence ratios is the mean over the samples (NeMo-RL multiplies it by the number of valid samples).
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
        self.penalty = 0.0 if c.use_kl_in_reward else c.reference_policy_kl_penalty
        self.kl_type = c.reference_policy_kl_type
        self.kl_clamps = (c.kl_input_clamp_value, c.kl_output_clamp_value)
        self.kl_of_generation = c.use_on_policy_kl_approximation
        self.nll_weight = c.positive_example_nll_weight
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
        if self._by_sequence:
            out["sampling_importance_ratio"] = By.SEQUENCES
        if self.correction is not None:
            out["is_oob_ratio"] = By.SEQUENCES if self.correction == "seq-mask-tis" else By.TOKENS
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
        tokens_of, samples = data["token_mask"][:, 1:], data["sample_mask"]
        all_valid = tokens_of * samples.unsqueeze(-1)
        keep = data.get("curr_logprobs_keep_mask")
        valid = all_valid if keep is None else all_valid * keep
        current, sampled = next_token_logprobs.detach(), data["generation_logprobs"][:, 1:]
        old = current if self.on_policy else data["prev_logprobs"][:, 1:]
        of_old = valid if self.on_policy else all_valid  # old is current then, and equally filtered
        seqs, tokens = (torch.as_tensor(x).clamp(min=1) for x in (global_valid_seqs, global_valid_toks))
        sampling = self._sampling_weight(old, sampled, tokens_of, of_old, samples)
        out = padded_loss(
            next_token_logprobs,
            old,
            data["advantages"][:, 1:],
            valid.bool(),
            self.objective,
            tokens if self._by_token else seqs,
            valid * sampling.weight if self.corrects else valid,
        )
        loss, extra = out.loss, {"kl_penalty": 0.0, "positive_nll_loss": 0.0}
        if self.penalty != 0:
            kl = self._kl_penalty(data, next_token_logprobs, sampled, tokens_of, samples, (tokens, seqs))
            loss, extra["kl_penalty"] = loss + self.penalty * kl, kl.item()
        if self.nll_weight > 0 and "rewards" in data:
            nll = self._positive_nll(next_token_logprobs, valid, data["rewards"])
            loss, extra["positive_nll_loss"] = loss + self.nll_weight * nll, nll.item()
        metrics = self._metrics(current, old, sampled, valid, of_old, tokens)
        metrics["sampling_importance_ratio"] = float(sampling.total / (seqs if self._by_sequence else tokens))
        if self.correction is not None:
            count = seqs if self.correction == "seq-mask-tis" else tokens
            metrics["is_oob_ratio"] = float(sampling.out_of_bounds / count)
        return loss, {"loss": loss.item(), **metrics, **extra, "num_valid_samples": samples.sum().item()}

    @property
    def _by_sequence(self) -> bool:
        return self.objective.level == "sequence"

    def _sampling_weight(
        self,
        old: torch.Tensor,
        sampled: torch.Tensor,
        tokens_of: torch.Tensor,
        of_old: torch.Tensor,
        samples: torch.Tensor,
    ) -> "_Sampling":
        """Return exp(old - sampled) of the tokens, or of the sequences, within the bounds of the correction."""
        gap = old - sampled
        if self._by_sequence:
            gap = torch.where(of_old.bool(), gap * of_old, 0.0).sum(1, keepdim=True)
        weight = gap.exp().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        outside = torch.zeros_like(weight, dtype=torch.bool)
        low = 0.0 if self.low is None else self.low
        if self.correction in ("tis", "icepop"):
            outside = (weight < low) | (weight > self.high)
            weight = weight.clamp(low, self.high) if self.correction == "tis" else weight.masked_fill(outside, 0.0)
        elif self.correction == "seq-mask-tis":
            finite = gap.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
            mean = _row_mean(finite, tokens_of).exp()
            outside = (mean < low) | (mean > self.high)
            weight = weight.masked_fill(outside.unsqueeze(1), 0.0)
            return _Sampling(weight, _sum_at(weight, of_old), (outside * samples).sum())
        total = (weight.squeeze(1) * samples).sum() if self._by_sequence else _sum_at(weight, of_old)
        return _Sampling(weight, total, _sum_at(outside.expand_as(old), of_old))

    def _kl_penalty(
        self,
        data: Any,
        logp: torch.Tensor,
        sampled: torch.Tensor,
        tokens_of: torch.Tensor,
        samples: torch.Tensor,
        counts: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Return the mean KL estimate to the reference policy, differentiable in the log-probabilities.

        The samples come from the policy that is optimised. Each estimate is therefore multiplied by the ratio of this
        policy to itself (or to the generation policy). The ratio to itself is 1, but has a gradient (arXiv 2506.09477).
        A clamp stops the gradient. If the data has log-probabilities without top-k and top-p filters, they are used.
        """
        unfiltered = data.get("curr_logprobs_unfiltered")
        unfiltered = logp if unfiltered is None else unfiltered
        rows = (tokens_of * samples.unsqueeze(-1)).bool()
        current, reference = unfiltered[rows], data["reference_policy_logprobs"][:, 1:][rows]
        weight = (current - (sampled[rows] if self.kl_of_generation else current.detach())).exp()
        weight = weight.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        gap, (bound, output_bound) = reference - current, self.kl_clamps
        if bound is not None:
            inside = gap.clamp(-bound, bound)
            weight = torch.where(gap == inside, weight, weight.detach())
            gap = inside
        kl = weight * _estimate(gap, self.kl_type)
        if output_bound is not None:
            kl = kl.clamp(-output_bound, output_bound)
        tokens, seqs = counts
        of_token = tokens_of * samples.unsqueeze(-1)
        if not self._by_token:
            of_token = of_token / tokens_of.sum(1, keepdim=True).clamp(min=1)
        return (kl * of_token[rows]).sum() / (tokens if self._by_token else seqs)

    @staticmethod
    def _positive_nll(logp: torch.Tensor, valid: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
        """Return the mean of -logp over the tokens of samples with a positive reward, and 0 without one."""
        counts = valid * (rewards > 0).unsqueeze(-1)
        rows = counts.bool()
        return (-logp[rows] * counts[rows]).sum() / counts.sum().clamp(min=1e-8)

    @torch.no_grad()
    def _metrics(
        self,
        current: torch.Tensor,
        old: torch.Tensor,
        sampled: torch.Tensor,
        valid: torch.Tensor,
        of_old: torch.Tensor,
        tokens: torch.Tensor,
    ) -> dict[str, float]:
        """Return NeMo-RL's metrics. `valid`: tokens of the loss; `of_old`: tokens of a comparison with `old`."""
        ratio = (current - old).exp()
        clamped = ratio.clamp(1.0 - self.clip["low"], 1.0 + self.clip["high"])
        if self._by_sequence:
            ratio = _row_mean(current - old, valid.bool()).exp().unsqueeze(1).expand_as(current)
            clamped = ratio.clamp(1.0 - self.clip["low"], 1.0 + self.clip["high"])
        elif isinstance(self.objective.shape, LinearLogp):
            ratio = clamped = current
        elif self.on_policy:
            clamped = ratio
        log_mixture = torch.logaddexp(old, sampled) - math.log(2.0)
        js = 0.5 * (_estimate(old - log_mixture, "k3") + _estimate(sampled - log_mixture, "k3"))
        sums = {
            "probs_ratio": _sum_at(ratio, valid),
            "probs_ratio_clamped": _sum_at(clamped, valid),
            "token_mult_prob_error": _sum_at((sampled - old).abs().exp(), of_old),
            "gen_kl_error": _sum_at(_estimate(old - sampled, self.kl_type), of_old),
            "policy_kl_error": _sum_at(_estimate(sampled - old, self.kl_type), of_old),
            "js_divergence_error": _sum_at(js, of_old),
            "approx_entropy": _sum_at(-(current - sampled).exp() * current, valid),
        }
        extremes = [x[valid.bool()] for x in (ratio, clamped)]
        ends = [
            (x.min(), x.max()) if x.numel() else (x.new_tensor(math.inf), x.new_tensor(-math.inf)) for x in extremes
        ]
        found = torch.stack([*(x / tokens for x in sums.values()), *ends[0], *ends[1]]).tolist()
        names = (*sums, "probs_ratio_min", "probs_ratio_max", "probs_ratio_clamped_min", "probs_ratio_clamped_max")
        return dict(zip(names, found, strict=True))


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
    """Raise an error for the values and combinations that NeMo-RL refuses."""
    if c.reference_policy_kl_type not in ("k1", "k2", "k3"):
        raise _refused(
            "cfg.reference_policy_kl_type",
            "'k1', 'k2' or 'k3'",
            repr(c.reference_policy_kl_type),
            "Check the spelling.",
        )
    kind, name = c.truncated_importance_sampling_type, "cfg.truncated_importance_sampling_type"
    if kind not in (None, "tis", "icepop", "seq-mask-tis"):
        raise _refused(name, "None, 'tis', 'icepop' or 'seq-mask-tis'", repr(kind), "Check the spelling.")
    if kind is not None and not c.use_importance_sampling_correction:
        raise _refused(name, "None without use_importance_sampling_correction", repr(kind), "Set both, as in NeMo-RL.")
    if kind == "seq-mask-tis" and c.sequence_level_importance_ratios:
        raise _refused(name, "'tis' or 'icepop' with sequence ratios", repr(kind), "Its weights are those of tokens.")
    high, low = c.truncated_importance_sampling_ratio, c.truncated_importance_sampling_ratio_min
    bound, least = "cfg.truncated_importance_sampling_ratio", "cfg.truncated_importance_sampling_ratio_min"
    if (high is not None) != (kind is not None) or (high is not None and high <= 0):
        raise _refused(bound, "a number > 0 with a type, else None", high, "Set both or neither.")
    if low is None and kind in ("icepop", "seq-mask-tis"):
        raise _refused(least, f"a number with {kind}", low, "Set the lower bound.")
    if low is not None and (high is None or low > high):
        raise _refused(least, "a number up to the ratio, or None", low, "Set a smaller one, or the ratio too.")
    if c.sequence_level_importance_ratios and c.token_level_loss:
        raise _refused("cfg.token_level_loss", "False with sequence_level_importance_ratios", True, "Set it to False.")
    against = ("disable_ppo_ratio", "force_on_policy_ratio", "sequence_level_importance_ratios", "ratio_clip_c")
    for option in against:
        if c.use_cispo and getattr(c, option):
            raise _refused(f"cfg.{option}", "left out with use_cispo", getattr(c, option), "Choose one of them.")
    if c.use_cispo and not c.token_level_loss:
        raise _refused("cfg.token_level_loss", "True with use_cispo", False, "Set it to True.")


def _estimate(gap: torch.Tensor, kind: str) -> torch.Tensor:
    """Return the estimator k1, k2 or k3 of KL(p || q) from samples of p, with gap = log q - log p."""
    if kind == "k3":
        return gap.expm1() - gap
    return -gap if kind == "k1" else 0.5 * gap.square()


def _sum_at(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask.bool(), x * mask, 0.0).sum()


def _row_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean of each row over its mask, (batch,), and 0 for a row without a token."""
    return torch.where(mask.bool(), x * mask, 0.0).sum(1) / mask.sum(1).clamp(min=1)
