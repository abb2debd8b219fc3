"""Metrics of answers sampled in groups: pass@k, majority@k, best of n."""

import math
from collections.abc import Hashable, Sequence

import torch

from tokfuse.algorithms.registry import register
from tokfuse.runtime.core.checks import INTS, Rows, check_integer, check_number, check_vector
from tokfuse.runtime.core.errors import refuse

FACTS = {
    "kind": "causal",
    "system": "Test-time scaling survey",
    "label": "utility",
    "source": "arXiv 2503.24235 tabulates it",
}


@register(
    "pass_rate_at_k",
    summary="1 - C(n - c, k) / C(n, k): unbiased probability that one of k answers is correct",
    differs="A metric; the survey proposes no method. The estimator is openai/human-eval's.",
    **FACTS,
)
def pass_rate_at_k(samples: torch.Tensor, correct: torch.Tensor, *, k: int) -> torch.Tensor:
    """Return the unbiased pass@k of every prompt, from n answers of which c are correct. Utility.

    1 - prod_{i=n-c+1..n} (1 - k / i), which neither overflows nor cancels.

    Args:
        samples: (prompts,), int, n >= k.
        correct: (prompts,), int, c in [0, n].
        k: number of answers, >= 1.

    Returns:
        (prompts,) float64.
    """
    op = "answer_metrics.pass_rate_at_k"
    check_vector(op, "samples", samples, dtypes=INTS)
    check_vector(op, "correct", correct, Rows(samples.shape[0], "samples", samples.device), INTS)
    check_integer(op, "k", k, 1)
    if bool((samples < k).any()):
        raise refuse(op, "samples", f">= k = {k}", int(samples.min()), "Sample more answers, or lower k.")
    if bool(((correct < 0) | (correct > samples)).any()):
        raise refuse(op, "correct", "in [0, samples]", "others", "Pass the number of correct answers.")
    n, c = samples.double()[:, None], correct.double()[:, None]
    i = torch.arange(1, int(samples.max()) + 1 if samples.numel() else 1, device=samples.device)
    used = (i > n - c) & (i <= n)
    # Factors at i <= k are <= 0 only if fewer than k answers are wrong. pass@k is then 1.
    factor = torch.where(used, (1 - k / i.double()).clamp_min(0.0), 1.0)
    return 1 - factor.prod(1)


@register(
    "majority_at_k",
    summary="the most frequent of k answers, optionally weighted; of equal ones the first",
    differs="A metric; the survey proposes no method. Of equal answers, the first wins.",
    **FACTS,
)
def majority_at_k(answers: Sequence[Hashable], *, weight: Sequence[float] | None = None) -> Hashable:
    """Return the answer with the largest total weight (cons@k). Utility.

    Args:
        answers: k answers to one prompt, in canonical form. None means no answer, which never wins unless
            there is nothing else.
        weight: one weight per answer, >= 0. None: 1 each.

    Returns:
        The winner; of equal ones the first. None for an empty sequence.
    """
    op = "answer_metrics.majority_at_k"
    given = [1.0] * len(answers) if weight is None else list(weight)
    if len(given) != len(answers):
        raise refuse(op, "weight", f"one per answer, {len(answers)}", len(given), "Pass one weight per answer.")
    totals: dict[Hashable, float] = {}
    for answer, w in zip(answers, given, strict=True):
        check_number(op, "weight", w, 0.0)
        if answer is not None:
            totals[answer] = totals.get(answer, 0.0) + w
    return max(totals, key=lambda answer: totals[answer]) if totals else None


@register(
    "best_of_n",
    summary="index of the answer with the best score; weighted: of the answer with the largest sum of scores",
    differs="A metric; the survey proposes no method. Of equal answers, the first wins.",
    **FACTS,
)
def best_of_n(score: Sequence[float], answers: Sequence[Hashable] | None = None, *, weighted: bool = False) -> int:
    """Return the index of the best of n sampled answers. Utility.

    Args:
        score: one finite score per answer, n >= 1. NaN has no rank and raises ValueError.
        answers: the answers in canonical form. Needed with weighted, and only then.
        weighted: first add the scores (>= 0) of equal answers (weighted best-of-N), then return the member of the
            winner with the best score.
    """
    op = "answer_metrics.best_of_n"
    if len(score) == 0:
        raise refuse(op, "score", "of at least one answer", "none", "Pass at least one score.")
    if weighted != (answers is not None):
        raise refuse(op, "answers", "given exactly if weighted=True", f"weighted={weighted}", "Pass both or none.")
    for one in score:
        check_number(op, "score", one, 0.0 if weighted else -math.inf)
    if answers is not None and len(answers) != len(score):
        raise refuse(op, "answers", f"one per score, {len(score)}", len(answers), "Pass one answer per score.")
    if answers is None:
        return max(range(len(score)), key=lambda i: (score[i], -i))
    winner = majority_at_k(answers, weight=score)
    return max((i for i in range(len(score)) if answers[i] == winner), key=lambda i: (score[i], -i))
