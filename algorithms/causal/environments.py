"""Weights of environments from their risks, and invariance penalties from statistics of the loss.

An environment is a source, a template or a difficulty: anything over which the risk should not vary. Pass a true risk
(negative log-likelihood, pairwise loss, minus the mean reward). The value of a clipped policy surrogate is not a
risk: on policy it is about 0, whatever the policy does.
"""

import math
from dataclasses import dataclass

import torch

from tokfuse.algorithms.registry import register
from tokfuse.algorithms.stateful import State, Stateful
from tokfuse.runtime.core.checks import (
    BOOL,
    INTS,
    Rows,
    check_integer,
    check_number,
    check_optional,
    check_values,
    check_vector,
)
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.ops.segment_moments import segment_moments


@register(
    "vrex",
    kind="causal",
    system="IDUM",
    label="utility",
    source="V-REx (arXiv 2003.00688); IDUM (ICML 2025) uses similar environment weights",
    summary="weights 1 + 2 lambda (L_e - mean L): the gradient of mean + lambda variance of risks",
    differs="Not IDUM: its network, mask and balance terms are missing, and its weights are unknown.",
)
def vrex_weights(risk: torch.Tensor, *, penalty: float = 1.0) -> torch.Tensor:
    """Return d (mean_e L_e + lambda Var_e L) / d L_e, times the number of environments. Utility.

    w_e = 1 + 2 lambda (L_e - mean L), where Var is the population variance. A weight may be negative: the risk of an
    environment far below the mean is raised.

    Args:
        risk: (environments,), finite. One NaN would make all weights NaN.
        penalty: lambda >= 0.

    Returns:
        (environments,) in the dtype of risk, mean 1, detached. Multiply each environment's mean loss by its
        weight, and average.
    """
    op = "environments.vrex_weights"
    check_vector(op, "risk", risk)
    check_values(op, "risk", risk)
    check_number(op, "penalty", penalty, 0.0)
    x = risk.detach().double()
    return (1 + 2 * penalty * (x - x.mean())).to(risk.dtype)


@register(
    "group_dro",
    kind="causal",
    system="Causal minimax invariance",
    label="analogue",
    source="GroupDRO (arXiv 1911.08731), in the spirit of arXiv 2107.01876",
    summary="q_e grows by exp(eta L_e): the environment with the largest risk gets the most weight",
    required=("environments",),
    differs=(
        "Another method: the paper searches subsets of stable features on a causal graph. GroupDRO "
        "is the nearest primitive, worst-group risk."
    ),
)
@dataclass(frozen=True, kw_only=True)
class GroupDRO(Stateful):
    """q_e <- q_e exp(step_size L_e), normalised. The loss is sum_e q_e L_e. Analogue.

    Args:
        environments: number of environments, >= 1.
        step_size: eta >= 0.

    State: log q, initially uniform. Logarithms, so that no weight underflows to 0 for ever.
    """

    environments: int = 0
    step_size: float = 0.01

    def __post_init__(self) -> None:
        check_integer(self._op, "environments", self.environments, 1)
        check_number(self._op, "step_size", self.step_size, 0.0)

    def initial_state(self) -> State:
        """Return uniform weights."""
        return {"log_weight": [-math.log(self.environments)] * self.environments}

    def observe(self, state: State, risk: torch.Tensor) -> State:
        """Return the state after the risks of a step, (environments,).

        NaN marks an environment that was not seen: its weight does not grow. An infinite risk raises ValueError: the
        weights could never recover from it.
        """
        check_vector(self._op, "risk", risk)
        check_values(self._op, "risk", risk, where=~risk.isnan(), always=True)
        if risk.shape[0] != self.environments:
            raise refuse(
                self._op,
                "risk",
                f"of shape ({self.environments},)",
                f"shape {tuple(risk.shape)}",
                "Pass NaN for an environment that was not seen.",
            )
        growth = self.step_size * risk.detach().double().cpu()
        growth = torch.where(growth.isnan(), 0.0, growth)
        log = torch.tensor(state["log_weight"], dtype=torch.float64, device="cpu") + growth
        return {"log_weight": torch.log_softmax(log, 0).tolist()}

    def weights(self, state: State) -> torch.Tensor:
        """Return the weights, (environments,) float64, sum 1."""
        return torch.tensor(state["log_weight"], dtype=torch.float64, device="cpu").exp()


@register(
    "irm_v1",
    kind="causal",
    system="IDUM",
    label="utility",
    source="IRMv1 (arXiv 1907.02893) by an identity of the softmax",
    summary="sum over environments of (mean (NLL - entropy))^2, from two outputs of token_stats",
    differs="Not IDUM's penalty, whose form was not found, but the standard one of invariant learning.",
)
def irm_penalty(
    logp: torch.Tensor,
    entropy: torch.Tensor,
    environment: torch.Tensor,
    *,
    environments: int,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return sum_e (mean over tokens of e of (-logp - entropy))^2, differentiable. Utility.

    IRMv1 squares the gradient of each environment's cross-entropy with respect to a dummy factor of the logits. At
    factor 1 this gradient is exactly sum_v p_v z_v - z_y = NLL - entropy per token.

    Args:
        logp: (tokens,), from `token_stats`.
        entropy: (tokens,), from `token_stats`.
        environment: (tokens,), int, in [0, environments).
        environments: number of environments, >= 1. One without tokens adds 0.
        mask: (tokens,), bool. None: all tokens count.

    Returns:
        () in the dtype of logp. Use it for data that the model did not sample itself. On its own samples the mean
        of NLL - entropy is 0 in expectation, so the penalty is noise.
    """
    op = "environments.irm_penalty"
    rows = Rows(check_vector(op, "logp", logp).shape[0], "logp", logp.device)
    check_vector(op, "entropy", entropy, rows)
    check_vector(op, "environment", environment, rows, INTS)
    check_optional(op, "mask", mask, rows, BOOL)
    environments = check_integer(op, "environments", environments, 1)
    check_values(op, "environment", environment, 0, environments, open_high=True, where=mask)
    gap = -logp - entropy
    moments = segment_moments(gap, environment, num_segments=environments, mask=mask)
    return (moments.sum / moments.count.clamp_min(1)).square().sum()
