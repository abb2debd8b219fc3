"""Losses over many ranks with torch.distributed. No other part of tokfuse communicates.

    shard = tokfuse.distributed.VocabShard.even(151_936, tensor_parallel_group)
    step = tokfuse.distributed.policy_step(hidden=h, weight=w_of_this_rank, shard=shard, ...)

* `token_stats`, `linear_token_stats`, `policy_step`, `paired_divergence`, `linear_paired_divergence` and
  `distill_step` are the ops of `tokfuse` for lm_heads whose rows are sharded over ranks.
* `global_normalizer` and `merge_metrics` make losses and metrics independent of the split over data-parallel
  ranks.
* `TokenSlice` and `shifted_targets` support context parallelism.
* `head_weight` and `vocab_shard` support FSDP2 and DTensor heads.

Every docstring states the communication of its function. `docs/distributed.md` shows how to combine them.
"""

from tokfuse.runtime.distributed.counts import global_normalizer, head_weight, merge_metrics, vocab_shard
from tokfuse.runtime.distributed.token_slice import TokenSlice, shifted_targets
from tokfuse.runtime.distributed.vocab_distill import distill_step
from tokfuse.runtime.distributed.vocab_pair import linear_paired_divergence, paired_divergence
from tokfuse.runtime.distributed.vocab_parallel import linear_token_stats, policy_step, token_stats
from tokfuse.runtime.distributed.vocab_shard import VocabShard

__all__ = [
    "TokenSlice",
    "VocabShard",
    "distill_step",
    "global_normalizer",
    "head_weight",
    "linear_paired_divergence",
    "linear_token_stats",
    "merge_metrics",
    "paired_divergence",
    "policy_step",
    "shifted_targets",
    "token_stats",
    "vocab_shard",
]
