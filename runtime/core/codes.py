"""Names of the options that kernels take as integer codes. The code is the index of the name.

The order must match csrc. The codes of objectives are in runtime/policy/objective.py.
"""

# csrc/common/packed_args.h
BASELINES = ("mean", "leave_one_out", "length_weighted", "median", "second_best", "greedy", "none")
SCALES = ("none", "std", "batch_std", "mean")
WEIGHT_LEVELS = ("token", "sequence", "geometric", "external")
WEIGHT_MODES = ("ips", "truncate", "mask", "switch", "shrink", "subgaussian", "tempered", "keep")
NORMALIZE = ("none", "batch", "group")
RULE_STATISTICS = ("ratio", "k1", "k2", "k3")
RULE_OVER = ("token", "sum", "mean", "max")

# csrc/common/row_args.h
DIVERGENCES = ("jsd", "kl_forward", "kl_reverse", "skew_forward", "skew_reverse", "tvd")
SKEW = ("skew_forward", "skew_reverse")

ESTIMATES = ("ips", "snips", "dm", "dr", "sndr")
"""Names of the results of `ope`, in the order of the rows that the kernels return."""
