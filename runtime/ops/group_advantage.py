"""`tokfuse.group_advantage`: advantages of responses relative to their prompt group."""

import torch

from tokfuse.runtime.backends import cpu_packed, cuda_packed, triton_packed
from tokfuse.runtime.backends.registration import register_cpu, register_cuda, register_reference, register_triton
from tokfuse.runtime.core.checks import (
    FLOATS,
    INTS,
    Rows,
    Runs,
    check_choice,
    check_number,
    check_optional,
    check_unused,
    check_vector,
    plain,
    working_dtype,
)
from tokfuse.runtime.core.codes import BASELINES, SCALES
from tokfuse.runtime.core.dispatch import backend_of
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.core.graph_ops import GraphForm, traceable
from tokfuse.runtime.core.ranges import ranged
from tokfuse.runtime.reference.group_advantage import group_advantage as reference

OP = "group_advantage"

# kind -> (baseline, scale)
KINDS = {
    "grpo": ("mean", "std"),
    "dr_grpo": ("mean", "none"),
    "rloo": ("leave_one_out", "none"),
    "opo": ("length_weighted", "none"),
    "remax": ("greedy", "none"),
    "gbpo_target": ("median", "std"),
    "pass_at_k": ("second_best", "std"),
    "maxrl": ("mean", "mean"),
    "reinforce": ("none", "none"),
}
GROUPLESS = ("greedy", "none")
DEFAULT_EPS = {"std": 1e-6, "batch_std": 1e-6, "mean": 1e-8, "none": 0.0}


@ranged("group_advantage.fwd")
def group_advantage(
    reward: torch.Tensor,
    group_ids: torch.Tensor | None,
    kind: str = "grpo",
    *,
    baseline: str | None = None,
    scale: str | None = None,
    std: str | None = None,
    eps: float | None = None,
    singleton: str | None = None,
    lengths: torch.Tensor | None = None,
    greedy_reward: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the advantage of every response in its prompt group: (reward - baseline) / scale.

    `kind` is a preset of `baseline` and `scale`. Both can also be set separately.

        kind          baseline          scale   advantage of response i, group of size G
        grpo          mean              std     (R_i - mean) / (std + eps)
        dr_grpo       mean              none    R_i - mean
        rloo          leave_one_out     none    R_i - mean of the others = (R_i - mean) G / (G - 1)
        opo           length_weighted   none    R_i - sum_j n_j R_j / sum_j n_j
        remax         greedy            none    R_i - reward of the greedy response
        gbpo_target   median            std     (R_i - median) / (std + eps), not divided by tau
        pass_at_k     second_best       std     best: (R_max - R_2nd) / (std + eps); others 0
        maxrl         mean              mean    (R_i - mean) / (mean + eps); for rewards >= 0
        reinforce     none              none    R_i

    Args:
        reward: (seqs,), float. One reward per response.
        group_ids: (seqs,), int32 or int64. Prompt of each response: any integers, in any order.
            None is allowed for the baselines "greedy" and "none", which do not use groups.
        kind: preset, one of the table.
        baseline: "mean", "leave_one_out", "length_weighted", "median", "second_best", "greedy" or
            "none". The median of an even group is the mean of its two middle rewards. None: use the
            baseline of the preset.
        scale: "none", "std" (standard deviation of the group), "batch_std" (standard deviation of all
            rewards of this call; TRL `scale_rewards="batch"`) or "mean" (mean of the group). The
            baselines "greedy" and "none" support only "none" and "batch_std". None: use the scale of
            the preset.
        std: "sample" (divisor G - 1, as in verl and TRL) or "population" (divisor G). None: "sample".
        eps: added to the scale. None: 1e-6 for a standard deviation (verl; TRL uses 1e-4), 1e-8
            for a mean.
        singleton: advantage of a group of one. "reward": baseline 0 and group scale 1, so
            A = R / (1 + eps), or R without a scale. This is REINFORCE without a baseline, the
            convention of verl for all these estimators. "zero": A = 0, so the response does not train.
            None: "reward".
        lengths: (seqs,), int. Response lengths n_j in tokens, for "length_weighted" only. A group
            of total length 0 uses its unweighted mean.
        greedy_reward: (seqs,), float. Reward of the greedy response to the same prompt, for "greedy"
            only.

    Returns:
        advantage: (seqs,), float32 (float64 for float64 rewards). Detached.

    Numerics:
        Statistics accumulate in float64, a deviation in two passes. The result is rounded once.
        A group of two or more equal rewards gets exactly 0. Equality is found by comparison, because
        the rounding error of a mean, divided by eps, can be 0.1. A NaN makes its own group NaN, and with
        "batch_std" every group. Results are bitwise repeatable for any number of threads. Zero rewards
        give an empty result.

    Gradients and memory:
        No gradients: advantages are constants of the loss. O(seqs) extra memory and O(seqs) time
        ("median" and "second_best" also sort each group).

    Examples:
        >>> reward, prompt = torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1])
        >>> tokfuse.group_advantage(reward, prompt, kind="dr_grpo")
        tensor([ 0.5000, -0.5000,  0.0000,  0.0000])

    Raises:
        ValueError: wrong shape or dtype, an unknown name, an option that would be ignored.

    Source:
        verl `core_algos.py` (grpo, dr_grpo, rloo, opo, remax, pass@k) and TRL `grpo_trainer.py`
        (batch scale), exact. GBPO target: bounded_ratio_rl `core_algos.py`, exact. maxrl:
        reconstructed from third-party code, for binary rewards.
    """
    check_choice(OP, "kind", kind, KINDS)
    baseline = KINDS[kind][0] if baseline is None else baseline
    scale = KINDS[kind][1] if scale is None else scale
    _check(reward, group_ids, baseline, scale, std, eps, singleton, lengths, greedy_reward)
    grouped = baseline not in GROUPLESS
    dtype = working_dtype(reward, greedy_reward)
    run = _RUNS[backend_of(OP, reward.device.type, dtype)]
    out: torch.Tensor = run(
        plain(reward, dtype),
        plain(group_ids, torch.int64) if grouped else None,
        baseline=baseline,
        scale=scale,
        sample_std=std != "population",
        eps=DEFAULT_EPS[scale] if eps is None else float(eps),
        singleton_reward=singleton != "zero",
        lengths=plain(lengths, torch.int64),
        greedy_reward=plain(greedy_reward, dtype),
    )
    return out


def _check(
    reward: torch.Tensor,
    group_ids: torch.Tensor | None,
    baseline: str,
    scale: str,
    std: str | None,
    eps: float | None,
    singleton: str | None,
    lengths: torch.Tensor | None,
    greedy_reward: torch.Tensor | None,
) -> None:
    check_choice(OP, "baseline", baseline, BASELINES)
    check_choice(OP, "scale", scale, SCALES)
    num_seqs, device = check_vector(OP, "reward", reward).shape[0], reward.device
    rows = Rows(num_seqs, "reward", device)
    if group_ids is None and baseline not in GROUPLESS:
        want = f"given with baseline {baseline!r}"
        raise refuse(OP, "group_ids", want, None, "Pass the prompt index of every response.")
    check_optional(OP, "group_ids", group_ids, rows, INTS)
    if baseline in GROUPLESS:
        if scale not in ("none", "batch_std"):
            want = f"'none' or 'batch_std' with baseline {baseline!r} (it has no groups)"
            raise refuse(OP, "scale", want, repr(scale), "Choose a baseline that uses groups.")
        check_unused(OP, f"baseline {baseline!r}", singleton=singleton)
    if scale not in ("std", "batch_std"):
        check_unused(OP, f"scale {scale!r}", std=std)
    if scale == "none":
        check_unused(OP, "scale 'none'", eps=eps)
    if std is not None:
        check_choice(OP, "std", std, ("sample", "population"))
    if eps is not None:
        check_number(OP, "eps", eps, 0.0)
    if singleton is not None:
        check_choice(OP, "singleton", singleton, ("reward", "zero"))
    for name, value, owner, dtypes in (
        ("lengths", lengths, "length_weighted", INTS),
        ("greedy_reward", greedy_reward, "greedy", FLOATS),
    ):
        if baseline != owner:
            check_unused(OP, f"baseline {baseline!r}", **{name: value})
        elif value is None:
            raise refuse(OP, name, f"given with baseline {owner!r}", None, "Pass one value per response.")
        else:
            check_vector(OP, name, value, rows, dtypes)


_FORM = GraphForm(
    "(Tensor reward, Tensor? group_ids, *, str baseline, str scale, bool sample_std, float eps,"
    " bool singleton_reward, Tensor? lengths, Tensor? greedy_reward) -> Tensor",
    lambda reward, *_, **__: torch.empty_like(reward),
)
# A dict by name, because torch.compile can trace a lookup in a module's dict, but not a record of the registry.
_RUNS: Runs = {
    "cuda": traceable(OP, "cuda", cuda_packed.group_advantage, _FORM),
    "triton": traceable(OP, "triton", triton_packed.group_advantage, _FORM),
    "cpu": traceable(OP, "cpu", cpu_packed.group_advantage, _FORM),
    "reference": reference,
}
register_cuda(OP, _RUNS["cuda"], frozenset({torch.float32}))
register_triton(OP, _RUNS["triton"], frozenset({torch.float32, torch.float64}))
register_cpu(OP, _RUNS["cpu"], frozenset({torch.float32}))
register_reference(OP, _RUNS["reference"])
