"""The specification: every op in plain torch, computed in float64 whatever the input dtype.

Results are rounded once: to float32, or not at all for float64 inputs; gradients once to the dtype
of their input (to 16 bits by way of float32, as torch rounds). An op that is specified by several
of these functions carries float64 from one to the next, so `policy_step` rounds its loss, not its
log-probabilities. The error of a result is therefore that one rounding, on every CPU; autograd
differentiates all of it, also twice.

Memory, beyond the inputs: `token_stats` and what is made of it hold 44 bytes per logit, and 62 at
the peak of the backward; a head has its logits and copies of hidden and weight in float64;
`paired_divergence` holds 180 bytes per logit of P. The kernels are what saves memory.
"""
