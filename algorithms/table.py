"""The standard family: one row per method, with its values of the options of `Standard`.

A row lists only what differs from `Standard()`: GRPO advantages, PPO clip 0.2, token mean, no KL. `source` names the
paper and the code that the formula was read from: verl `core_algos.py`, TRL `grpo_trainer.py`, OpenRLHF `loss.py`,
NeMo-RL, or the authors' repository.
"""

from typing import Any

from tokfuse.algorithms.registry import Entry, add, exact
from tokfuse.algorithms.rules import ClipCov, Correction, DampRare, HighEntropy, KLCov, PositiveLikelihood
from tokfuse.algorithms.standard import Overlong, Standard
from tokfuse.runtime.policy.keep_rule import KeepRule
from tokfuse.runtime.policy.objective import KL
from tokfuse.runtime.policy.shapes import Gamma, LinearLogp, LinearRatio, LogClamp, PPOClip, SigmoidGate, StopGradClip

FAMILY = "The standard family"
SEQ_MEAN = "seq_mean_token_mean"
DAPO_CLIP = PPOClip(low=0.2, high=0.28)
GSPO_CLIP = PPOClip(low=3e-4, high=4e-4)


def _row(
    name: str,
    source: str,
    summary: str,
    *,
    label: str | None = None,
    differs: str = "",
    required: tuple[str, ...] = (),
    system: str = FAMILY,
    **preset: Any,
) -> None:
    add(
        Entry(
            name=name,
            cls=Standard,
            table=__name__,
            system=system,
            label=label or exact(source),
            source=source,
            summary=summary,
            differs=differs,
            preset=preset,
            required=required,
        )
    )


# -------------------------------------------------------------------------------------------- clips

_row(
    "ppo",
    "arXiv 1707.06347; verl",
    "clipped ratio with whitened GAE advantages",
    advantage="gae",
    differs="gamma and lam default to 1, as in verl. The value loss is `critic.value_loss`.",
)
_row(
    "ppo_dual",
    "arXiv 1912.09729; verl",
    "PPO with a second clip: the loss of negative advantages is at most 3 |A|",
    advantage="gae",
    shape=PPOClip(dual=3.0),
)
_row(
    "grpo",
    "arXiv 2402.03300; verl, TRL",
    "group z-scores, sequence means, k3 KL to a reference policy",
    aggregation=SEQ_MEAN,
    kl=KL(coef=0.04),
    differs="eps, added to the deviation, is 1e-6 as in verl (TRL: 1e-4). Frameworks now set kl=None. verl caps "
    "the value of k3 at 10, with gradient 0 beyond; here only |k| is bounded, by 20.",
)
_row(
    "dr_grpo",
    "arXiv 2503.20783; TRL",
    "R - mean, divided by sequences * max_length",
    advantage="dr_grpo",
    aggregation="token_sum",
    required=("max_length",),
    differs="verl's version does not divide by the number of sequences.",
)
_row(
    "dapo",
    "arXiv 2503.14476; verl",
    "clip 0.2 / 0.28, token mean, length penalty, groups with equal rewards removed",
    shape=DAPO_CLIP,
    overlong=Overlong(),
    skip_uniform=True,
    differs="Groups with equal rewards are masked out. The data loader must refill the batch.",
)
_row(
    "rloo",
    "arXiv 2402.14740; verl",
    "leave-one-out baseline, clipped ratio",
    advantage="rloo",
    differs="The paper's REINFORCE loss is shape=LinearLogp(). On policy, both have the same gradient.",
)
_row(
    "remax",
    "arXiv 2310.10505; verl",
    "the greedy response's reward as baseline",
    advantage="remax",
    differs="The ratio is clipped as in verl. The paper's loss is shape=LinearLogp().",
)
_row(
    "opo", "arXiv 2505.23585; verl", "length-weighted baseline, strictly on policy", advantage="opo", shape=LinearLogp()
)
_row(
    "reinforce_pp",
    "arXiv 2501.03262; verl",
    "reward to go with a k1 KL penalty inside, whitened over tokens",
    advantage="reinforce_pp",
    required=("reward_kl",),
)
_row(
    "reinforce_pp_baseline",
    "arXiv 2501.03262; verl",
    "R - group mean, whitened over tokens",
    advantage="reinforce_pp_baseline",
)
_row(
    "gpg",
    "arXiv 2504.02546; official trainer",
    "-A logp, divided by the share of responses in groups with unequal rewards",
    advantage="gpg",
    shape=LinearLogp(),
    differs="verl counts nonzero rewards instead: use advantage='gpg_verl'.",
)
_row("pass_at_k", "verl", "only the best of a group: (max - second) / deviation", advantage="pass_at_k")
_row(
    "maxrl",
    "third-party code",
    "(R - mean) / mean, for rewards 0 and 1",
    advantage="maxrl",
    label="recon",
    differs="The paper was not read.",
)
_row(
    "otb",
    "verl",
    "per-position baseline weighted by the squared score",
    advantage="otb",
    differs="With importance weights, verl multiplies by w^2; this version assumes an on-policy batch. "
    "A masked token has no weight and no reward. A group of one has no baseline, as in verl; verl's option "
    "handle_zero_tail (default: off) is in `integrations.verl_advantages` only.",
)

# ------------------------------------------------------------------------------ other ratios, gates

_row(
    "gspo",
    "arXiv 2507.18071; verl, TRL",
    "one geometric-mean ratio per sequence, clipped",
    level="sequence",
    shape=GSPO_CLIP,
    aggregation=SEQ_MEAN,
)
_row(
    "gspo_token",
    "arXiv 2507.18071; verl",
    "the value of GSPO, with gradients through each token's own ratio",
    level="sequence_token",
    shape=GSPO_CLIP,
    aggregation=SEQ_MEAN,
    differs="verl bounds the log-ratio by 10 from above; here the bounds are +-20.",
)
_row(
    "cispo",
    "arXiv 2506.13585; TRL",
    "stop-gradient clipped ratio times A logp",
    shape=StopGradClip(),
    differs="ratio_max=5 is an absolute bound, as in TRL and ScaleRL. verl's clip_ratio_high is a width.",
)
_row(
    "gmpo",
    "arXiv 2507.20673; official code",
    "geometric mean of clipped token ratios",
    level="sequence",
    shape=LogClamp(bound=0.4),
    aggregation=SEQ_MEAN,
)
_row(
    "sapo",
    "arXiv 2511.20347; TRL",
    "sigmoid gate instead of a clip",
    shape=SigmoidGate(),
    aggregation=SEQ_MEAN,
    differs="The loss at ratio 1 is -2 A / tau. Compare its gradients with other methods, not its loss.",
)
_row(
    "vespo",
    "TRL",
    "stop-gradient gamma gate of the sequence ratio",
    level="sequence_sum",
    shape=Gamma(),
    differs="The authors add the log-weights of the rollout mismatch to the sequence's log-ratio. bypass=True does the "
    "same, without bounds on the weights. A `Correction` would multiply the gate and is refused.",
)

# ------------------------------------------------------------------------------- tokens, likelihood

_row(
    "high_entropy",
    "arXiv 2506.01939; TRL",
    "DAPO on the 20% of tokens with the highest entropy",
    shape=DAPO_CLIP,
    rules=(HighEntropy(),),
    differs="The threshold is computed over all ranks. The denominator counts all tokens, as in TRL.",
)
_row(
    "clip_cov",
    "arXiv 2505.22617; official code",
    "no gradient for a few high-covariance tokens",
    shape=PPOClip(low=1.0, high=1.0),
    rules=(ClipCov(),),
    differs="Ratios are clipped to [0, 2] as in both official scripts (clip_ratio_low=1, "
    "clip_ratio_high=1). Means and counts are computed over all ranks (verl: over the micro-batch).",
)
_row(
    "kl_cov",
    "arXiv 2505.22617; official code",
    "|logp - old_logp| on the high-covariance tokens",
    shape=LinearRatio(),
    rules=(KLCov(),),
    differs="The count is over all ranks. 'k_percent 0.2' in the 7B script is fraction=2e-3.",
)
_row(
    "ar",
    "arXiv 2505.12929; official code",
    "reduced advantages of rare tokens",
    rules=(DampRare(alpha=0.2),),
    differs="Use alpha=0.3 together with `lopti`.",
)
_row(
    "vapo",
    "arXiv 2504.05118; NeMo-RL",
    "length-adaptive GAE, clip 0.2 / 0.28, NLL of the correct responses",
    advantage="gae",
    length_adaptive_alpha=0.05,
    shape=DAPO_CLIP,
    rules=(PositiveLikelihood(),),
    differs="The critic's returns (lam 1) are `critic.returns`. The trainer must pre-train the value model.",
)

# ------------------------------------------------------------------- rollout engine against trainer

_row(
    "tis",
    "verl, TRL, OpenRLHF",
    "token weights min(w, 2)",
    correction=Correction(high=2.0),
    differs="The bound is verl's. OpenRLHF clamps to [0.5, 5].",
)
_row("seq_tis", "verl", "sequence weights min(w, 2)", correction=Correction(level="sequence", high=2.0))
_row("mis", "TRL", "sequence weights, dropped above 3", correction=Correction(level="sequence", mode="mask", high=3.0))
_row(
    "icepop",
    "TRL, verl",
    "token weights, dropped outside [0.5, 5]",
    correction=Correction(mode="mask", low=0.5, high=5.0),
    differs="The bounds are OpenRLHF's. The frameworks publish no common values.",
)
_row(
    "geo_rs",
    "verl",
    "sequences dropped by their geometric-mean ratio, weight 1",
    correction=Correction(mode="keep", dropped="leave", keep_rules=(KeepRule("ratio", "mean", 0.999, 1.001),)),
)
_row(
    "seq_mask_tis",
    "OpenRLHF",
    "token weights, sequences kept by their geometric mean in [0.5, 5]",
    correction=Correction(mode="ips", keep_rules=(KeepRule("ratio", "mean", 0.5, 5.0),)),
    differs="The weight is not truncated, as in OpenRLHF's code (whose comment says that it is).",
)
_row(
    "opsm",
    "DeepSeek-V3.2; TRL",
    "stale negative sequences dropped",
    correction=Correction(
        mode="keep", policy="current", keep_rules=(KeepRule("k1", "mean", high=0.5, negative_only=True),)
    ),
    differs="delta 0.5 is TRL's suggestion. The report gives no value.",
)

# ---------------------------------------------------------------------------------------- repulsion

_row(
    "cdpo",
    "arXiv 2605.01324; VideoThinker trainer",
    "k3 with coefficient -0.01: moves the policy away from a frozen bias model",
    system="CDPO (VideoThinker)",
    aggregation=SEQ_MEAN,
    eps=1e-4,
    shape=DAPO_CLIP,
    kl=KL(coef=-0.01, clamp=11.0),
    differs="The clip is 0.2 / 0.28 as in the authors' trainer, where it never acts: one step per rollout. ref_logp "
    "comes from the bias model. The gradient reaches 0.01 e^11. The authors clip the gradient norm at 20: this is part "
    "of the method, and the trainer must do it.",
)
