"""The DPO family and related losses: one row per method, with its values of the options of its class.

`source` names the paper and the code that the formula was read from: TRL `dpo_trainer.py` and experimental/cpo,
Liger-Kernel chunked_loss, or the authors' repository.
"""

from collections.abc import Callable
from typing import Any

from tokfuse.algorithms.preference.contrast import Contrast
from tokfuse.algorithms.preference.likelihood import NLL
from tokfuse.algorithms.preference.pointwise import AOT, FAMILY, Pointwise
from tokfuse.algorithms.registry import Entry, add, exact


def _row(
    name: str,
    source: str,
    summary: str,
    *,
    cls: Callable[..., Any] = Contrast,
    label: str | None = None,
    differs: str = "",
    required: tuple[str, ...] = (),
    system: str = FAMILY,
    **preset: Any,
) -> None:
    add(
        Entry(
            name=name,
            cls=cls,
            kind="preference",
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


# --------------------------------------------------------------------------------- with a reference

_row("dpo", "arXiv 2305.18290; TRL", "-log sig(beta Delta), with Delta the difference of log-ratios")
_row(
    "conservative_dpo",
    "ericmitchell.ai/cdpo.pdf; TRL before its DPO refactor",
    "DPO for labels that are wrong at a known rate",
    smoothing=0.1,
    differs="Known as cDPO, which is too close to `cdpo`, another method. TRL's current 'sigmoid' ignores "
    "its label smoothing. Liger's comment calls `robust_dpo` cDPO, but the two losses differ.",
)
_row(
    "robust_dpo",
    "arXiv 2403.00409; TRL",
    "DPO that is unbiased if labels are flipped at a known rate",
    link="robust",
    smoothing=0.1,
)
_row(
    "slic",
    "arXiv 2305.10425; TRL 'hinge'",
    "hinge on beta Delta",
    link="hinge",
    differs="SLiC-HF has no reference and adds a likelihood term: use reference=False, nll=NLL(...).",
)
_row(
    "ipo",
    "arXiv 2310.12036 Eq. 17; TRL",
    "(mean-token log-ratio difference - 1 / (2 beta))^2",
    link="square",
    length="mean",
    differs="Averaged over tokens, the form that the authors confirmed to TRL. beta is their tau.",
)
_row(
    "ipo_sum",
    "arXiv 2310.12036 Eq. 17",
    "(Delta - 1 / (2 beta))^2 of summed log-ratios",
    link="square",
    differs="Eq. 17 as written, which grows with the length; see `ipo`.",
)
_row("dpo_norm", "TRL 'sigmoid_norm'; Tulu 3", "DPO on log-ratios per token", length="mean")
_row("exo_pair", "arXiv 2402.00856 Eq. 16; TRL", "reverse KL to the smoothed label", link="exo", smoothing=1e-3)
_row(
    "discopop",
    "arXiv 2406.08414; TRL",
    "logistic and exponential loss, mixed by a sigmoid of the margin",
    link="discopop",
    beta=0.05,
    tau=0.05,
)
_row(
    "wpo",
    "arXiv 2406.11827; TRL use_weighting",
    "DPO, weighted by how likely the policy is to generate the pair",
    weighting="wpo",
    differs="The weight is not clamped, as in the current TRL.",
)
_row(
    "ld_dpo",
    "arXiv 2409.06411; TRL ld_alpha",
    "DPO with a smaller weight on tokens beyond the shorter response",
    tail_weight=0.5,
    differs="The paper tunes the weight for each model; 0.5 is in the middle of its range.",
)
_row(
    "f_dpo",
    "arXiv 2309.16240; TRL f_divergence_type",
    "DPO with another f-divergence: forward KL, Jensen-Shannon, alpha",
    divergence="js",
    differs="divergence='forward_kl' is the limit alpha = 0 of divergence='alpha'. Constants of f' cancel "
    "between chosen and rejected, so length='mean' is refused. Exponents are at most 80. TRL clamps them in the "
    "alpha divergence only, and its forward KL overflows.",
)
_row(
    "apo_zero", "arXiv 2408.06266; TRL", "raises chosen, lowers rejected, each relative to the reference", cls=Pointwise
)
_row("apo_down", "arXiv 2408.06266; TRL", "lowers both, rejected more", cls=Pointwise, form="apo_down")
_row("nca_pair", "arXiv 2402.05369; TRL", "noise contrastive alignment of a pair", cls=Pointwise, form="nca")
_row(
    "sppo_hard",
    "arXiv 2405.00675 Eq. 4.7; TRL",
    "self-play: regresses log-ratios onto +-1 / (2 beta)",
    cls=Pointwise,
    form="sppo_hard",
    differs="The hard form, with win rates 1 and 0. The paper's soft win rates need a ranker.",
)
_row(
    "aot",
    "arXiv 2406.05882; TRL",
    "margins exceed the reference's margins at every quantile of the batch",
    cls=AOT,
    differs="Quantiles are over this process's batch, as in TRL.",
)
_row(
    "aot_unpaired",
    "arXiv 2406.05882; TRL",
    "chosen log-ratios exceed rejected ones at every quantile of the batch",
    cls=AOT,
    paired=False,
    differs="Quantiles are over this process's batch, as in TRL.",
)

# ------------------------------------------------------------------------------ without a reference

_row(
    "simpo",
    "arXiv 2405.14734; princeton-nlp/SimPO",
    "mean log-probabilities with a margin, no reference",
    beta=2.0,
    margin=1.0,
    length="mean",
    reference=False,
    differs="margin is gamma itself. In the code, gamma = beta * gamma_beta_ratio with ratio 0.5.",
)
_row(
    "cpo",
    "arXiv 2401.08417; TRL experimental/cpo",
    "DPO without a reference, plus the likelihood of the chosen response",
    reference=False,
    nll=NLL(coef=1.0, reduction="batch_mean"),
    differs="TRL takes the token mean of each micro-batch. Here it is over the whole step: see "
    "`PreferenceBatch.counts`.",
)

# ------------------------------------------------------------------------------------------- others

_row(
    "rpo",
    "arXiv 2405.16436; YSLIU627/Regularized-Preference-Optimization",
    "DPO - eta beta logp of the chosen response, summed over its tokens",
    system="RPO",
    beta=0.01,
    nll=NLL(coef=0.005, reduction="sum", times_beta=True),
    differs="The sum of the main text; `rpo_mean` is Appendix F. beta and eta are zephyr-7b-beta's. "
    "TRL's recipe ['sigmoid', 'sft'] with weights [1, 0.005] drops beta and averages. It is another "
    "loss: nll=NLL(coef=0.005, reduction='batch_mean'). TRL's rpo_alpha (Iterative RPO) is another one, too.",
)
_row(
    "rpo_mean",
    "arXiv 2405.16436 App. F; released rpo_trainer nll_loss_coef",
    "DPO plus eta times the mean negative log-likelihood of the chosen response",
    system="RPO",
    beta=0.01,
    required=("nll",),
    differs="Appendix F gives no eta for the mean, so nll=NLL(coef=eta, reduction='mean') must be given.",
)
_row(
    "hpl",
    "arXiv 2510.03253; SandRiverDDL/HPL (copy)",
    "DPO at trajectory, step and action-group level, plus behaviour cloning",
    system="HPL",
    label="recon",
    beta=0.3,
    level_weight=(1.0, 1.0, 1.0),
    nll=NLL(coef=1.0, reduction="mean", level=0),
    differs="Levels 0, 1, 2 are trajectory, step and group: three masks, one loss. Two notes on "
    "the paper disagree on the weights of the levels, so each is 1. Assumed: cloning is the token "
    "mean over a chosen trajectory, averaged over the trajectory pairs.",
)
_row(
    "aries",
    "inspired by arXiv 2502.05605 (later EVOLVE); abstract and reviews",
    "DPO on direct answers plus DPO on refinements of the rejected answer",
    system="ARIES",
    label="analogue",
    required=("level_weight",),
    differs="A substitute: level 0 pairs condition on the prompt; level 1 pairs on the prompt, the "
    "rejected answer and a refinement template; level_weight=(1, c). The paper's conditioning, c and "
    "any further term could not be confirmed.",
)
