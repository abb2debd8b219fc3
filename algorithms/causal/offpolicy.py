"""Tempered group weights, and the registry entries of methods that an op of the runtime implements directly."""

import torch

from tokfuse.algorithms.registry import Entry, add, register
from tokfuse.runtime.core.checks import INTS, Rows, check_number, check_values, check_vector
from tokfuse.runtime.ops.offpolicy_weights import offpolicy_weights
from tokfuse.runtime.ops.ope import ope
from tokfuse.runtime.ops.paired_divergence import paired_divergence
from tokfuse.runtime.ops.token_stats import token_stats
from tokfuse.runtime.ops.vtrace import vtrace
from tokfuse.runtime.reference.segments import groups_of, segment_sum


@register(
    "tempered_group_weights",
    kind="causal",
    system="Policy-guided diffusion",
    label="analogue",
    source="inspired by arXiv 2404.06356; github.com/EmptyJackson/policy-guided-diffusion",
    summary="softmax of power * sequence log-prob inside each group of samples",
    differs=(
        "The discrete counterpart of the tilted target p_off(tau) prod pi(a|s)^lambda, which is "
        "itself reconstructed. It is biased, sharpens, and favours short answers. Nothing uses it by "
        "default."
    ),
)
def tempered_group_weights(seq_logp: torch.Tensor, group_ids: torch.Tensor, *, power: float = 1.0) -> torch.Tensor:
    """Return w_i = exp(power l_i) / sum over the group of exp(power l_j), detached. Analogue.

    Args:
        seq_logp: (seqs,), nats, l: log-probabilities summed over each response. Finite or -inf.
        group_ids: (seqs,), int, any numbers.
        power: lambda in [0, 4]; 0 gives uniform weights in the group.

    Returns:
        (seqs,) in the dtype of seq_logp, sum 1 in every group, computed in float64. A group with only -inf gets
        equal weights.
    """
    op = "tempered_group_weights"
    check_vector(op, "seq_logp", seq_logp)
    check_vector(op, "group_ids", group_ids, Rows(seq_logp.shape[0], "seq_logp", seq_logp.device), INTS)
    check_number(op, "power", power, 0.0, 4.0)
    check_values(op, "seq_logp", seq_logp, where=seq_logp != -torch.inf)
    member = groups_of(group_ids).member
    x = seq_logp.detach().double()
    x = torch.where(x == -torch.inf, torch.finfo(torch.float64).min / 8, x) * power
    top = x.new_full((x.shape[0],), -torch.inf).scatter_reduce_(0, member, x, "amax")
    e = (x - top[member]).exp()
    total = segment_sum(e, member, x.shape[0])
    return (e / total[member]).to(seq_logp.dtype)


# name, op, system, source, summary, difference from the paper
_SERVED = (
    (
        "offpolicy_weights",
        offpolicy_weights,
        "Ad-load balancing",
        "arXiv 2309.11518; estimators as in st-tech/zr-obp",
        "importance weights: IPS, truncated, switched, shrunk, sub-Gaussian; with ESS and kept rows",
        "The paper's reward mix was not found. Weights and estimators are the standard ones.",
    ),
    (
        "ope",
        ope,
        "Ad-load balancing",
        "arXiv 2309.11518; st-tech/zr-obp",
        "value of a policy from logged data: IPS, SNIPS, DM, DR, SNDR, with errors",
        "See `offpolicy_weights`.",
    ),
    (
        "vtrace",
        vtrace,
        "Ad-load balancing",
        "arXiv 2309.11518; IMPALA (arXiv 1802.01561)",
        "sequential doubly robust returns: one reverse scan over the responses",
        "For sequences, the paper's q(x, pi) is intractable. The scan with a critic replaces it.",
    ),
    (
        "paired_divergence",
        paired_divergence,
        "CDAS",
        "arXiv 2602.05234; github.com/colored-dye/concept_das",
        "per-token JSD or KL of two logits tensors, with a gradient for one of them",
        "Only the divergence; activation hooks belong to the model. Statistics are float32. The "
        "released loss uses the dtype of the logits and may return NaN.",
    ),
    (
        "debiased_token_stats",
        token_stats,
        "CausalInfoMin",
        "arXiv 2311.16941; github.com/Vaidehi99/CausalInfoMin (TE-D)",
        "`bias_logits` subtracts the logits of a frozen bias model inside the pass",
        "Only TE-D; the rate term and the dictionary of ATE-D are missing. The old and the new policy of a "
        "ratio must use the same bias.",
    ),
)

_EXACT = {
    "offpolicy_weights": "exact (paper)",
    "ope": "exact (paper)",
    "vtrace": "exact (paper)",
    "paired_divergence": "exact (released code)",
    "debiased_token_stats": "exact (released code)",
}

for _name, _op, _system, _source, _summary, _differs in _SERVED:
    add(
        Entry(
            name=_name,
            cls=_op,
            table=__name__,
            kind="causal",
            system=_system,
            label=_EXACT[_name],
            source=_source,
            summary=_summary,
            differs=_differs,
        )
    )
