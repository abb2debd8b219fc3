"""TRL 1.16: runs its per-token head and its logits op on tokfuse's kernels, for all of its trainers.

    from tokfuse.integrations import trl
    trl.install()                # GRPO, RLOO, DPO, KTO, SFT, distillation, ...: same options, numbers, metrics
    trl.uninstall()              # restores every attribute
    with trl.installed(): ...    # the same, scoped

`trl.FusedGRPOTrainer` goes further: it computes the whole policy loss in one `tokfuse.policy_step`.
`trl.FusedDPOTrainer` computes the whole preference loss in one `tokfuse.algorithms.preference_step`.

These attributes of `trl.trainer.utils`, where every trainer looks them up, are replaced:
* `_ChunkedLogProbFunction`, the head: by `tokfuse.linear_token_stats`.
* `_use_triton`, which decides whether TRL scores only labelled rows: it now does so on a CPU too.
* `_fused_logprob_entropy` and `_supports_trl_loss_kernel`, the logits op: by `tokfuse.token_stats`, on a CPU too.
  Without triton, TRL does not have these two attributes and keeps its own torch code.

The losses of the distillation trainers are replaced too: `tokfuse.integrations.trl_distillation`.

Numerics: float32 statistics, equal to TRL's up to rounding. Two definitions differ. `is_top1` is also true for a tie
with an earlier token (TRL: only with a later one). Under autocast, the gradient of a float32 head is rounded once to
the autocast dtype, as in torch's linear layer. The backward skips labelled rows whose incoming gradient is zero.
"""

from typing import TYPE_CHECKING, Any

from tokfuse.integrations.trl_seams import describe, install, installed, uninstall

if TYPE_CHECKING:
    from tokfuse.integrations.trl_dpo import FusedDPOTrainer as FusedDPOTrainer
    from tokfuse.integrations.trl_influence import CompletionInfluence as CompletionInfluence
    from tokfuse.integrations.trl_trainer import FusedGRPOTrainer as FusedGRPOTrainer

__all__ = [
    "CompletionInfluence",
    "FusedDPOTrainer",
    "FusedGRPOTrainer",
    "describe",
    "install",
    "installed",
    "uninstall",
]


def __getattr__(name: str) -> Any:
    if name == "FusedGRPOTrainer":  # a subclass of TRL's trainer, imported on first use
        from tokfuse.integrations.trl_trainer import FusedGRPOTrainer

        return FusedGRPOTrainer
    if name == "FusedDPOTrainer":
        from tokfuse.integrations.trl_dpo import FusedDPOTrainer

        return FusedDPOTrainer
    if name == "CompletionInfluence":
        from tokfuse.integrations.trl_influence import CompletionInfluence

        return CompletionInfluence
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
