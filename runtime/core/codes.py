"""Names of options whose index is the code that the kernels take. Their order is that of csrc.

Objectives have their own codes, in runtime/policy/objective.py.
"""

# csrc/common/packed_args.h
BASELINES = ("mean", "leave_one_out", "length_weighted", "median", "second_best", "greedy", "none")
SCALES = ("none", "std", "batch_std", "mean")
WEIGHT_LEVELS = ("token", "sequence", "geometric", "external")
WEIGHT_MODES = ("ips", "truncate", "mask", "switch", "shrink", "subgaussian", "tempered", "keep")
NORMALIZE = ("none", "batch", "group")
RULE_STATISTICS = ("ratio", "k1", "k2", "k3")
RULE_OVER = ("token", "sum", "mean", "max")

# csrc/cpu/distribution_kernels.h and csrc/cuda/kernels.h
DIVERGENCES = ("jsd", "kl_forward", "kl_reverse")

ESTIMATES = ("ips", "snips", "dm", "dr", "sndr")
"""The rows of the results of `ope`."""
