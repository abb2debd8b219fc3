"""tokfuse: one-pass kernels for the loss side of LLM reinforcement learning.

Public names load on first use, so `import tokfuse` touches no device, no driver and no kernel.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> module that defines it
_PUBLIC = {
    "BackendUnavailable": "tokfuse.runtime.errors",
    "backend": "tokfuse.runtime.dispatch",
    "Gamma": "tokfuse.runtime.objective",
    "KL": "tokfuse.runtime.objective",
    "LinearLogp": "tokfuse.runtime.objective",
    "LinearRatio": "tokfuse.runtime.objective",
    "LogClamp": "tokfuse.runtime.objective",
    "Metrics": "tokfuse.runtime.metrics",
    "NFT": "tokfuse.runtime.objective",
    "Objective": "tokfuse.runtime.objective",
    "PPOClip": "tokfuse.runtime.objective",
    "PolicyLoss": "tokfuse.runtime.ops.policy_loss",
    "PolicyStep": "tokfuse.runtime.ops.policy_step",
    "Quadratic": "tokfuse.runtime.objective",
    "SigmoidGate": "tokfuse.runtime.objective",
    "StopGradClip": "tokfuse.runtime.objective",
    "TargetRatio": "tokfuse.runtime.objective",
    "TokenStats": "tokfuse.runtime.ops.token_stats",
    "linear_token_stats": "tokfuse.runtime.ops.linear_token_stats",
    "policy_loss": "tokfuse.runtime.ops.policy_loss",
    "policy_step": "tokfuse.runtime.ops.policy_step",
    "policy_step_": "tokfuse.runtime.ops.policy_step",
    "release_workspace": "tokfuse.runtime.head",
    "token_stats": "tokfuse.runtime.ops.token_stats",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from tokfuse.runtime.dispatch import backend as backend
    from tokfuse.runtime.errors import BackendUnavailable as BackendUnavailable
    from tokfuse.runtime.ops.token_stats import TokenStats as TokenStats
    from tokfuse.runtime.ops.token_stats import token_stats as token_stats


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'tokfuse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
