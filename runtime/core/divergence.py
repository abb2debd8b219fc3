"""The caller's choice of a divergence: its kind, and the one number that some kinds have."""

import math
from typing import Any

from tokfuse.runtime.core import checks
from tokfuse.runtime.core.codes import DIVERGENCES, SKEW
from tokfuse.runtime.core.errors import refuse

# The defaults, which mean "not given" to a kind without that parameter.
BETA, ALPHA = 0.5, 0.1


def generalised_jsd(beta: float) -> dict[str, Any]:
    """Return `kind` and `beta` for the divergence that GKD and TRL call JSD(beta): forward KL at 0, reverse KL at 1."""
    if beta in (0.0, 1.0):
        return {"kind": "kl_reverse" if beta else "kl_forward"}
    return {"kind": "jsd", "beta": beta}


def mix_weight_of(op: str, kind: str, beta: float, alpha: float) -> float:
    """The weight in the mixture: alpha for the skew kinds, else beta. Refuses one that `kind` does not use."""
    checks.check_choice(op, "kind", kind, DIVERGENCES)
    beta, alpha = checks.number(beta), checks.number(alpha)
    if not 0.0 < checks.check_number(op, "beta", beta, -math.inf) < 1.0:
        raise refuse(op, "beta", "in (0, 1)", repr(beta), 'Its limits are kind="kl_forward" (0) and "kl_reverse" (1).')
    if not 0.0 < checks.check_number(op, "alpha", alpha, -math.inf) < 1.0:
        hint = 'Its limit 0 is kind="kl_forward" or "kl_reverse".'
        raise refuse(op, "alpha", "in (0, 1)", repr(alpha), hint)
    if kind != "jsd" and beta != BETA:
        raise refuse(op, "beta", f'left out with kind="{kind}"', repr(beta), 'It weights the mixture of kind="jsd".')
    if kind not in SKEW and alpha != ALPHA:
        hint = 'It weights the mixture of kind="skew_forward" and "skew_reverse".'
        raise refuse(op, "alpha", f'left out with kind="{kind}"', repr(alpha), hint)
    return alpha if kind in SKEW else beta
