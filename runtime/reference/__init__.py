"""The reference: the specification of every op in plain torch, computed in float64 for every input dtype.

Results are rounded once to float32; for float64 inputs they are not rounded. Gradients are rounded once to
the dtype of their input; torch rounds to 16 bits via float32. If several functions together specify an op,
they pass float64 to each other: `policy_step` rounds its loss, but not its log-probabilities. The error of
a result is therefore one rounding, on every CPU. Autograd differentiates every function, also twice.

Memory beyond the inputs: `token_stats` and the ops built on it hold 44 bytes per logit, and 62 at the peak
of the backward. A head also holds its logits and copies of hidden and weight in float64.
`paired_divergence` holds 180 bytes per logit of P. Only the kernels save memory.
"""
