"""TRL 1.16: its per-token head and its logits op on tokfuse's kernels, for all of its trainers.

    from tokfuse.integrations import trl
    trl.install()                # GRPO, RLOO, DPO, KTO, SFT, ...: same options, numbers, metrics
    trl.uninstall()              # every attribute is again the object that it was
    with trl.installed(): ...    # the same, scoped

`trl.FusedGRPOTrainer` goes further: the whole policy loss is one `tokfuse.policy_step`.

What is replaced, in `trl.trainer.utils`, where every trainer finds it:
* `_ChunkedLogProbFunction`, the head: `tokfuse.linear_token_stats`.
* `_use_triton`, by which TRL decides to score labelled rows alone: also on a CPU.
* `_fused_logprob_entropy` and `_supports_trl_loss_kernel`, the logits op: `tokfuse.token_stats`,
  also on a CPU. Without triton TRL has no such seam, and its own torch code stays.

Numerics: float32 statistics, equal to TRL's to rounding. Two definitions differ: `is_top1` counts a
tie with another token (TRL: only with a later one), and under autocast the gradient of a float32
head is rounded once to the autocast dtype, as in torch's own linear layer. Labels' rows whose
incoming gradient is zero are not computed again in the backward.
"""

from typing import TYPE_CHECKING, Any

from tokfuse.integrations.trl_seams import describe, install, installed, uninstall

if TYPE_CHECKING:
    from tokfuse.integrations.trl_trainer import FusedGRPOTrainer as FusedGRPOTrainer

__all__ = ["FusedGRPOTrainer", "describe", "install", "installed", "uninstall"]


def __getattr__(name: str) -> Any:
    if name == "FusedGRPOTrainer":  # a subclass of TRL's: made when it is asked for
        from tokfuse.integrations.trl_trainer import FusedGRPOTrainer

        return FusedGRPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
