"""verl's policy losses on `tokfuse.policy_loss`: the same numbers from one fused pass.

Every function has the signature of verl's registry. All are module-level, so Ray workers get them by name. verl's
padded (batch, length) tensors are already a packed batch: `length` tokens per response, with a mask. Values, gradients,
metrics and aggregation equal verl 0.9's, including `config.global_batch_info`. The docstrings name every
difference.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from tokfuse.algorithms import registry
from tokfuse.algorithms.batch import Batch
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.ops.policy_loss import policy_loss
from tokfuse.runtime.policy.metrics import Metrics
from tokfuse.runtime.policy.objective import KL, Objective
from tokfuse.runtime.policy.results import PolicyLoss
from tokfuse.runtime.policy.shapes import Gamma, LinearLogp, LinearRatio, PPOClip, SigmoidGate, StopGradClip

Loss = tuple[torch.Tensor, dict[str, Any]]
UNBOUNDED = 1e30  # for terms that verl does not clamp; a log-ratio is always clamped at 80
FREE = 80.0
BATCH_INFO = ("dp_size", "batch_num_tokens", "global_batch_size", "loss_scale_factor")
AGGREGATIONS = {
    "token-mean": "token_mean",
    "token-sum": "token_sum",
    "seq-mean-token-sum": "seq_mean_token_sum",
    "seq-mean-token-sum-norm": "seq_mean_token_sum",
    "seq-mean-token-mean": "seq_mean_token_mean",
}


class Call(NamedTuple):
    """The arguments of one call of a loss by verl; tensors are (batch, length)."""

    old_log_prob: torch.Tensor
    log_prob: torch.Tensor
    advantages: torch.Tensor
    response_mask: torch.Tensor
    loss_agg_mode: str
    config: Any
    rollout_is_weights: torch.Tensor | None

    @property
    def mask(self) -> torch.Tensor:
        """The tokens that count, (tokens,) bool."""
        return self.response_mask.reshape(-1) > 0

    @property
    def cu_seqlens(self) -> torch.Tensor:
        """Offsets of the responses, (batch + 1,) int32: each has `length` tokens, including padding."""
        rows, length = self.log_prob.shape
        return torch.arange(rows + 1, dtype=torch.int32, device=self.log_prob.device) * length

    @property
    def widths(self) -> tuple[float, float]:
        """(clip_ratio_low, clip_ratio_high), each replaced by clip_ratio if it is None."""
        low, high = self.config.clip_ratio_low, self.config.clip_ratio_high
        both = self.config.clip_ratio
        return both if low is None else low, both if high is None else high

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """Return the mean over the counting tokens, as verl's masked_mean; 0 without one."""
        mask = self.response_mask > 0
        return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def normalizer(call: Call, mode: str) -> tuple[float | str, float]:
    """Return (normalizer of policy_loss, divisor of the loss) that reproduce verl's `agg_loss`.

    With D = dp_size, verl multiplies by D what it divides by a global count. If a count is not given, the count of this
    batch is used. Without a valid token the loss is 0 (verl: NaN).
    """
    info = dict(call.config.global_batch_info)
    unknown = set(info) - set(BATCH_INFO)
    if unknown or mode not in AGGREGATIONS:
        what, known = ("global_batch_info", BATCH_INFO) if unknown else ("loss_agg_mode", AGGREGATIONS)
        raise refuse(
            "verl_plugin",
            what,
            f"among {', '.join(known)}",
            sorted(unknown) if unknown else repr(mode),
            "This version of verl was not tested.",
        )
    ranks = info.get("dp_size") or 1
    if mode == "token-sum":
        return 1.0 / ranks, 1.0
    key = "batch_num_tokens" if mode == "token-mean" else "global_batch_size"
    count = info.get(key)
    divisor = 1.0
    if mode == "seq-mean-token-sum-norm":
        divisor = float(info.get("loss_scale_factor") or call.response_mask.shape[-1])
    if count is None:
        if ranks > 1:
            raise refuse(
                "verl_plugin",
                f"global_batch_info[{key!r}]",
                f"given with dp_size={ranks}",
                None,
                "verl's trainer sets it.",
            )
        return "batch", divisor
    return (float(count) or 1.0) / ranks, divisor


def run(
    call: Call,
    objective: Objective,
    *,
    mode: str | None = None,
    weight: torch.Tensor | None = None,
    logp: torch.Tensor | None = None,
    advantage: torch.Tensor | None = None,
    **given: Any,
) -> PolicyLoss:
    """Return `tokfuse.policy_loss` of the call. `weight` (batch, length) multiplies verl's own weights."""
    mode = call.loss_agg_mode if mode is None else mode
    count, divisor = given.pop("count", None) or normalizer(call, mode)
    objective = replace(objective, aggregation=AGGREGATIONS[mode])
    weights = [w for w in (weight, call.rollout_is_weights) if w is not None]
    product = None if not weights else torch.stack(weights).prod(0).detach().reshape(-1)
    level = "token" if advantage is None else "sequence"
    out = policy_loss(
        (call.log_prob if logp is None else logp).reshape(-1),
        old_logp=call.old_log_prob.detach().reshape(-1),
        advantage=(call.advantages.reshape(-1) if advantage is None else advantage).detach(),
        objective=objective,
        mask=call.mask,
        cu_seqlens=call.cu_seqlens,
        normalizer=count,
        token_weight=product,
        advantage_level=level,
        **given,
    )
    return out if divisor == 1.0 else replace(out, loss=out.loss / divisor)


def report(call: Call, metrics: Metrics | None, **tensors: torch.Tensor) -> dict[str, float]:
    """Return verl's actor/ metrics, read from the device at once."""
    names = list(tensors)
    values = [tensors[name].detach().double() for name in names]
    fused: dict[str, float] = {}
    if metrics is not None:
        numbers = metrics.mean()
        fused = {
            "actor/pg_clipfrac": numbers["clip_low"] + numbers["clip_high"],
            "actor/ppo_kl": numbers["kl_k1"],
            "actor/pg_clipfrac_lower": numbers["dual_clip"],
        }
    read = torch.stack(values).tolist() if values else []
    return fused | {f"actor/{name}": value for name, value in zip(names, read, strict=True)}


# -------------------------------------------------------------------------- the losses of verl 0.9


def vanilla(call: Call) -> Loss:
    """PPO with a clip and a dual clip."""
    low, high = call.widths
    shape = PPOClip(low=low, high=high, dual=call.config.get("clip_ratio_c", 3.0))
    out = run(call, Objective(shape=shape))
    return out.loss, report(call, out.metrics)


def gspo(call: Call) -> Loss:
    """GSPO: sequence ratio, with the gradient through each token. verl sets the gradient to 0 above a ratio of e^10."""
    low, high = call.widths
    objective = Objective(shape=PPOClip(low=low, high=high), level="sequence_token", log_ratio_clamp=FREE)
    out = run(call, objective)
    return out.loss, report(call, out.metrics)


def sapo(call: Call) -> Loss:
    """SAPO: sigmoid gates, always averaged by sequence, as in verl."""
    shape = SigmoidGate(tau_positive=call.config.tau_pos, tau_negative=call.config.tau_neg)
    out = run(call, Objective(shape=shape), mode="seq-mean-token-mean")
    return out.loss, report(call, out.metrics)


def gpg(call: Call) -> Loss:
    """GPG: -A logp."""
    return run(call, Objective(shape=LinearLogp())).loss, {}


def cispo(call: Call) -> Loss:
    """CISPO: -sg(clip(r)) A logp, with a width on both sides."""
    low, high = call.widths
    shape = StopGradClip(low=low, high=high, ratio_min=None, ratio_max=None)
    out = run(call, Objective(shape=shape))
    ratio = (call.log_prob - call.old_log_prob).detach().clamp(-20, 20).exp()
    clipped = call.mean(((ratio < 1 - low) | (ratio > 1 + high)).float())
    return out.loss, report(call, out.metrics, pg_clipfrac=clipped) | {"actor/pg_clipfrac_lower": 0.0}


def dro(call: Call) -> Loss:
    """DRO: -A logp + beta / 2 (logp - old)^2."""
    beta = call.config.policy_loss.dro_beta
    if beta is None or beta <= 0:
        raise refuse("verl_plugin", "policy_loss.dro_beta", "> 0 with loss dro", beta, "Set policy_loss.dro_beta.")
    kl = KL(estimator="k2", coef=beta, clamp=UNBOUNDED)
    out = run(call, Objective(shape=LinearLogp(), kl=kl), **_against_old(call))
    return out.loss, report(call, None, ppo_kl=call.mean(call.old_log_prob - call.log_prob))


def _against_old(call: Call, chosen: torch.Tensor | None = None) -> dict[str, Any]:
    """Return arguments that make the old policy the reference. verl's importance weights also multiply that term."""
    factors = [x.float() for x in (chosen, call.rollout_is_weights) if x is not None]
    out: dict[str, Any] = {"ref_logp": call.old_log_prob.detach().reshape(-1)}
    if factors:
        out["kl_weight"] = torch.stack(factors).prod(0).detach().reshape(-1)
    return out


def _dppo(call: Call, keep: torch.Tensor) -> Loss:
    """Return -A sg(min(r, cap)) logp on the kept tokens."""
    cap = call.config.get("clip_ratio_c", 20.0)
    shape = StopGradClip(ratio_min=0.0, ratio_max=cap)
    out = run(call, Objective(shape=shape), weight=keep.to(call.log_prob.dtype))
    ratio = (call.log_prob - call.old_log_prob).detach().clamp(-20, 20).exp()
    return out.loss, report(
        call,
        out.metrics,
        pg_clipfrac=call.mean((~keep).float()),
        pg_clipfrac_lower=call.mean(((ratio > cap) & keep).float()),
    )


def dppo_tv(call: Call) -> Loss:
    """DPPO-TV: masks tokens by the change of their probability."""
    low, high = call.widths
    change = call.log_prob.detach().exp() - call.old_log_prob.exp()
    return _dppo(call, torch.where(call.advantages > 0, change <= high, change >= -low))


def dppo_kl(call: Call) -> Loss:
    """DPPO-KL: masks tokens by their binary KL."""
    low, high = call.widths
    p, old = call.log_prob.detach().exp(), call.old_log_prob.exp()
    kl = old * (call.old_log_prob - call.log_prob.detach()) + (1 - old) * torch.log((1 - old + 1e-8) / (1 - p + 1e-8))
    up, down = (kl <= high) | (p <= old), (kl <= low) | (p >= old)
    return _dppo(call, torch.where(call.advantages > 0, up, down))


def _covariance(call: Call) -> torch.Tensor:
    logp = call.log_prob.detach()
    return (call.advantages - call.mean(call.advantages)) * (logp - call.mean(logp))


def clip_cov(call: Call) -> Loss:
    """Clip-Cov: a few random tokens with high covariance get no gradient. The draws equal verl's."""
    low, high = call.widths
    options = call.config.policy_loss
    ratio_of_tokens = _or(options.clip_cov_ratio, 0.0002)
    bottom, top = _or(options.clip_cov_lb, 1.0), _or(options.clip_cov_ub, 5.0)
    mask = call.response_mask > 0
    ratio = (call.log_prob - call.old_log_prob).detach().exp()
    a, bounded = call.advantages, ratio.clamp(1 - low, 1 + high)
    cov = torch.where((-a * bounded > -a * ratio) | ~mask, -torch.inf, _covariance(call))
    place = ((cov < top) & (cov > bottom) & mask).nonzero()
    keep = torch.ones_like(a)
    if len(place) > 0:
        count = max(int(ratio_of_tokens * int(mask.sum())), 1)
        place = place[torch.randperm(len(place))[: min(count, len(place))]]
        keep[place[:, 0], place[:, 1]] = 0
    objective = Objective(shape=PPOClip(low=low, high=high), log_ratio_clamp=FREE)
    out = run(call, objective, weight=keep)
    numbers = report(call, out.metrics, pg_clipfrac=call.mean((keep == 0).float()))
    numbers.pop("actor/pg_clipfrac_lower")
    return out.loss, numbers


def kl_cov(call: Call) -> Loss:
    """KL-Cov: -A r, plus |log r| on the tokens with the highest covariance."""
    options = call.config.policy_loss
    fraction, coef = _or(options.kl_cov_ratio, 0.0002), _or(options.ppo_kl_coef, 1.0)
    mask = call.response_mask > 0
    place = mask.reshape(-1).nonzero().squeeze(1)
    chosen = torch.zeros_like(call.advantages)
    if len(place) > 0 and fraction > 0:
        count = max(1, int(len(place) * fraction))
        top = torch.topk(_covariance(call).reshape(-1)[place], count).indices
        chosen.view(-1)[place[top]] = 1
    kl = KL(estimator="abs", coef=coef, clamp=UNBOUNDED)
    objective = Objective(shape=LinearRatio(), kl=kl, log_ratio_clamp=FREE)
    out = run(call, objective, **_against_old(call, chosen))
    return out.loss, report(call, None, ppo_kl=call.mean((call.log_prob - call.old_log_prob).abs()))


def geo_mean(call: Call) -> Loss:
    """GMPO: exp of the sequence's mean clamped log-ratio, times its mean advantage.

    verl averages over all rows and ignores global_batch_info. Here global_batch_size and dp_size are used if they are
    given.
    """
    low, high = call.widths
    mask = call.response_mask > 0
    difference = call.log_prob - call.old_log_prob
    a = call.advantages
    bounded = difference.clamp(-low, high)
    pessimistic = torch.where(
        a > 0, torch.minimum(difference, bounded), torch.where(a < 0, torch.maximum(difference, bounded), 0.0)
    )
    tokens = mask.sum(-1).clamp(min=1)
    per_response = torch.where(mask, a, 0.0).sum(-1) / tokens
    weights = call.rollout_is_weights
    if weights is not None:
        logs = torch.where(mask, torch.log(weights + 1e-10), 0.0).sum(-1) / tokens
        per_response = per_response * logs.exp()
    info = dict(call.config.global_batch_info)
    count = info.get("global_batch_size")
    rows = call.log_prob.shape[0] if count is None else float(count) / (info.get("dp_size") or 1)
    out = run(
        call._replace(rollout_is_weights=None),
        Objective(shape=LinearRatio(), level="sequence", log_ratio_clamp=FREE),
        mode="seq-mean-token-mean",
        logp=call.old_log_prob + pessimistic,
        advantage=per_response,
        count=(rows, 1.0),
    )
    clipped = difference.detach() != bounded.detach()
    return out.loss, report(
        call,
        None,
        pg_clipfrac=call.mean((clipped & (a > 0)).float()),
        ppo_kl=call.mean(-difference),
        pg_clipfrac_lower=call.mean((clipped & (a < 0)).float()),
    )


def bypass_mode(call: Call) -> Loss:
    """Apply verl's own importance weights and rejection mask, then tokfuse's REINFORCE or PPO loss."""
    from verl.trainer.ppo import rollout_corr_helper as helper

    policy = getattr(call.config, "policy_loss", None)
    options = None if policy is None else policy.get("rollout_correction", None)
    if options is None:
        raise refuse(
            "verl_plugin",
            "policy_loss.rollout_correction",
            "given with loss bypass_mode",
            None,
            "Set it, or choose another loss.",
        )
    names = ("rollout_is", "rollout_rs", "rollout_rs_threshold")
    weights, mask, metrics = None, call.response_mask, {}
    if bool(mask.any()):  # verl's helper raises an error for a micro-batch without a valid token
        with torch.no_grad():
            weights, mask, metrics = helper.compute_rollout_correction_and_rejection_mask(
                old_log_prob=call.log_prob,
                rollout_log_prob=call.old_log_prob,
                response_mask=call.response_mask,
                rollout_is_threshold=options.get("rollout_is_threshold", 2.0),
                rollout_is_batch_normalize=options.get("rollout_is_batch_normalize", False),
                **{name: options.get(name, None) for name in names},
            )
    call = call._replace(response_mask=mask, rollout_is_weights=None)
    kind = options.get("loss_type", "ppo_clip")
    if kind == "ppo_clip":
        loss, numbers = vanilla(call)
    elif kind == "reinforce":
        own = weights.batch["rollout_is_weights"] if weights else None
        loss, _ = gpg(call._replace(rollout_is_weights=own))
        numbers = report(call, None, ppo_kl=call.mean(call.old_log_prob - call.log_prob))
    else:
        raise refuse(
            "verl_plugin", "rollout_correction.loss_type", "'ppo_clip' or 'reinforce'", repr(kind), "Choose one."
        )
    return loss, numbers | metrics


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


OF_VERL: dict[str, Callable[[Call], Loss]] = {
    f.__name__: f
    for f in (vanilla, dppo_tv, dppo_kl, gspo, sapo, gpg, clip_cov, kl_cov, geo_mean, dro, cispo, bypass_mode)
}

# Methods whose loss needs only log-probs and advantages, and whose options all have defaults.
OF_ALGORITHMS = ("bapo", "gmpo", "gspo_token", "vespo")


def verl_loss(
    name: str,
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: torch.Tensor | None = None,
) -> Loss:
    """Return verl's loss `name`, computed by tokfuse. Registered as `tokfuse_<name>`."""
    return OF_VERL[name](
        Call(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights)
    )


def algorithm_loss(
    name: str,
    options: Mapping[str, Any],
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: torch.Tensor | None = None,
) -> Loss:
    """Return the loss of `tokfuse.algorithms.make(name, **options)` with verl's advantages.

    Clip bounds are the method's own options, not actor.clip_ratio. loss_agg_mode and global_batch_info are verl's. If
    the method computes statistics of the batch, it computes them from this micro-batch.
    """
    call = Call(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights)
    method = registry.make(name, **options)
    state = method.initial_state()
    if state:
        raise refuse(
            "verl_plugin",
            "algorithm",
            "a method without state",
            repr(name),
            "verl's losses are functions without state; call tokfuse.algorithms in your own trainer.",
        )
    detached = log_prob.detach().reshape(-1)
    batch = Batch(
        reward=advantages.new_zeros(advantages.shape[0]),
        cu_seqlens=call.cu_seqlens,
        old_logp=old_log_prob.detach().reshape(-1),
        mask=call.mask,
        logp=detached,
        advantage=advantages.detach().reshape(-1),
        advantage_level="token",
    )
    plan = method.objective(batch, state)
    count, divisor = normalizer(call, loss_agg_mode)
    plan = replace(plan, normalizer=count, objective=replace(plan.objective, aggregation=AGGREGATIONS[loss_agg_mode]))
    if rollout_is_weights is not None:
        if isinstance(plan.objective.shape, Gamma):
            raise refuse(
                "verl_plugin",
                "rollout_is_weights",
                f"None with {name!r} (the weight belongs inside its gate)",
                "a tensor",
                "Set algorithm.rollout_correction.rollout_is to null.",
            )
        plan = plan.weigh(rollout_is_weights.detach().reshape(-1))
    out = plan.loss(log_prob.reshape(-1))
    return out.loss / divisor, report(call, out.metrics)
