"""tokfuse: one-pass kernels for the loss side of LLM reinforcement learning.

Public names are imported on first use. So `import tokfuse` uses no device, no driver and no kernel.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

# public name -> module that defines it
_PUBLIC = {
    "backend": "tokfuse.runtime.core.dispatch",
    "BackendUnavailable": "tokfuse.runtime.core.errors",
    "cross_entropy": "tokfuse.runtime.ops.cross_entropy",
    "CrossEntropy": "tokfuse.runtime.lm_head.class_part",
    "CrossEntropyLoss": "tokfuse.runtime.lm_head.class_part",
    "CrossEntropyStats": "tokfuse.runtime.core.statistics",
    "distill_step": "tokfuse.runtime.ops.distill_step",
    "DistillMetrics": "tokfuse.runtime.lm_head.pair_results",
    "DistillStep": "tokfuse.runtime.lm_head.pair_results",
    "ExtendedTokenStats": "tokfuse.runtime.core.statistics",
    "gae": "tokfuse.runtime.ops.gae",
    "Gamma": "tokfuse.runtime.policy.shapes",
    "group_advantage": "tokfuse.runtime.ops.group_advantage",
    "KeepRule": "tokfuse.runtime.policy.keep_rule",
    "kept_token_stats": "tokfuse.runtime.ops.kept_token_stats",
    "KeptTokenStats": "tokfuse.runtime.ops.kept_token_stats",
    "KL": "tokfuse.runtime.policy.objective",
    "linear_cross_entropy": "tokfuse.runtime.ops.linear_cross_entropy",
    "linear_paired_divergence": "tokfuse.runtime.ops.linear_paired_divergence",
    "linear_token_stats": "tokfuse.runtime.ops.linear_token_stats",
    "LinearLogp": "tokfuse.runtime.policy.shapes",
    "LinearRatio": "tokfuse.runtime.policy.shapes",
    "load_tuned": "tokfuse.inspection.tune",
    "LogClamp": "tokfuse.runtime.policy.shapes",
    "Metrics": "tokfuse.runtime.policy.metrics",
    "NFT": "tokfuse.runtime.policy.shapes",
    "Objective": "tokfuse.runtime.policy.objective",
    "offpolicy_weights": "tokfuse.runtime.ops.offpolicy_weights",
    "OffPolicyWeights": "tokfuse.runtime.ops.offpolicy_weights",
    "OPE": "tokfuse.runtime.ops.ope",
    "ope": "tokfuse.runtime.ops.ope",
    "paired_divergence": "tokfuse.runtime.ops.paired_divergence",
    "PairedStats": "tokfuse.runtime.core.statistics",
    "policy_loss": "tokfuse.runtime.ops.policy_loss",
    "policy_step": "tokfuse.runtime.ops.policy_step",
    "policy_step_": "tokfuse.runtime.ops.policy_step",
    "PolicyLoss": "tokfuse.runtime.policy.results",
    "PolicyStep": "tokfuse.runtime.policy.results",
    "PPOClip": "tokfuse.runtime.policy.shapes",
    "Quadratic": "tokfuse.runtime.policy.shapes",
    "release_workspace": "tokfuse.runtime.core.native",
    "segment_moments": "tokfuse.runtime.ops.segment_moments",
    "SegmentMoments": "tokfuse.runtime.ops.segment_moments",
    "SigmoidGate": "tokfuse.runtime.policy.shapes",
    "StopGradClip": "tokfuse.runtime.policy.shapes",
    "TargetRatio": "tokfuse.runtime.policy.shapes",
    "token_stats": "tokfuse.runtime.ops.token_stats",
    "TokenStats": "tokfuse.runtime.core.statistics",
    "TokenStatsAt": "tokfuse.runtime.core.statistics",
    "VTrace": "tokfuse.runtime.ops.vtrace",
    "vtrace": "tokfuse.runtime.ops.vtrace",
    "whiten": "tokfuse.runtime.ops.whiten",
}

# public modules, `tokfuse.<name>`
_MODULES = ("algorithms", "distributed", "influence")

__all__ = ["__version__", *_PUBLIC, *_MODULES]

if TYPE_CHECKING:
    from tokfuse.inspection.tune import load_tuned as load_tuned
    from tokfuse.runtime.core.dispatch import backend as backend
    from tokfuse.runtime.core.errors import BackendUnavailable as BackendUnavailable
    from tokfuse.runtime.core.native import release_workspace as release_workspace
    from tokfuse.runtime.core.statistics import CrossEntropyStats as CrossEntropyStats
    from tokfuse.runtime.core.statistics import ExtendedTokenStats as ExtendedTokenStats
    from tokfuse.runtime.core.statistics import PairedStats as PairedStats
    from tokfuse.runtime.core.statistics import TokenStats as TokenStats
    from tokfuse.runtime.core.statistics import TokenStatsAt as TokenStatsAt
    from tokfuse.runtime.lm_head.class_part import CrossEntropy as CrossEntropy
    from tokfuse.runtime.lm_head.class_part import CrossEntropyLoss as CrossEntropyLoss
    from tokfuse.runtime.lm_head.pair_results import DistillMetrics as DistillMetrics
    from tokfuse.runtime.lm_head.pair_results import DistillStep as DistillStep
    from tokfuse.runtime.ops.cross_entropy import cross_entropy as cross_entropy
    from tokfuse.runtime.ops.distill_step import distill_step as distill_step
    from tokfuse.runtime.ops.gae import gae as gae
    from tokfuse.runtime.ops.group_advantage import group_advantage as group_advantage
    from tokfuse.runtime.ops.kept_token_stats import KeptTokenStats as KeptTokenStats
    from tokfuse.runtime.ops.kept_token_stats import kept_token_stats as kept_token_stats
    from tokfuse.runtime.ops.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
    from tokfuse.runtime.ops.linear_paired_divergence import linear_paired_divergence as linear_paired_divergence
    from tokfuse.runtime.ops.linear_token_stats import linear_token_stats as linear_token_stats
    from tokfuse.runtime.ops.offpolicy_weights import OffPolicyWeights as OffPolicyWeights
    from tokfuse.runtime.ops.offpolicy_weights import offpolicy_weights as offpolicy_weights
    from tokfuse.runtime.ops.ope import OPE as OPE
    from tokfuse.runtime.ops.ope import ope as ope
    from tokfuse.runtime.ops.paired_divergence import paired_divergence as paired_divergence
    from tokfuse.runtime.ops.policy_loss import policy_loss as policy_loss
    from tokfuse.runtime.ops.policy_step import policy_step as policy_step
    from tokfuse.runtime.ops.policy_step import policy_step_ as policy_step_
    from tokfuse.runtime.ops.segment_moments import SegmentMoments as SegmentMoments
    from tokfuse.runtime.ops.segment_moments import segment_moments as segment_moments
    from tokfuse.runtime.ops.token_stats import token_stats as token_stats
    from tokfuse.runtime.ops.vtrace import VTrace as VTrace
    from tokfuse.runtime.ops.vtrace import vtrace as vtrace
    from tokfuse.runtime.ops.whiten import whiten as whiten
    from tokfuse.runtime.policy.keep_rule import KeepRule as KeepRule
    from tokfuse.runtime.policy.metrics import Metrics as Metrics
    from tokfuse.runtime.policy.objective import KL as KL
    from tokfuse.runtime.policy.objective import Objective as Objective
    from tokfuse.runtime.policy.results import PolicyLoss as PolicyLoss
    from tokfuse.runtime.policy.results import PolicyStep as PolicyStep
    from tokfuse.runtime.policy.shapes import NFT as NFT
    from tokfuse.runtime.policy.shapes import Gamma as Gamma
    from tokfuse.runtime.policy.shapes import LinearLogp as LinearLogp
    from tokfuse.runtime.policy.shapes import LinearRatio as LinearRatio
    from tokfuse.runtime.policy.shapes import LogClamp as LogClamp
    from tokfuse.runtime.policy.shapes import PPOClip as PPOClip
    from tokfuse.runtime.policy.shapes import Quadratic as Quadratic
    from tokfuse.runtime.policy.shapes import SigmoidGate as SigmoidGate
    from tokfuse.runtime.policy.shapes import StopGradClip as StopGradClip
    from tokfuse.runtime.policy.shapes import TargetRatio as TargetRatio


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"tokfuse.{name}")
    raise AttributeError(f"module 'tokfuse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
