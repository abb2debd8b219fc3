"""TRL's distillation losses on tokfuse's divergence ops: two lm_heads, or two tensors of logits.

* `DistillationTrainer` computes its loss from the hidden states and heads of both models, in
  `_chunked_divergence_loss`. Here it is one `tokfuse.distill_step`, which also computes the gradients.
* `AsyncDistillationTrainer` computes its loss from the student's head and the teacher's ids and log-probabilities, in
  `_chunked_jsd_loss`: `tokfuse.linear_token_stats` at these ids.
* GKD, GOLD and IW-OPD compute theirs from two tensors of logits, in `generalized_jsd_loss`: `tokfuse.distill_step`
  over the labelled rows.
* SDFT and SDPO need one value per token, over all logits (`tokfuse.paired_divergence`) or over the student's top-k
  (`tokfuse.token_stats` at these ids).

beta and alpha are TRL's: 0 is KL(teacher || student), 1 is KL(student || teacher). Between them is the generalised
Jensen-Shannon divergence, in whose mixture the teacher has this weight. A function returns None for what it leaves to
TRL's own code; `LEFT_TO_TRL` lists these cases.
"""

import functools
import importlib
import inspect
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tokfuse.integrations.hosts import Rebinding, on_kernels, where
from tokfuse.integrations.zero3 import is_partitioned
from tokfuse.runtime.core.divergence import generalised_jsd
from tokfuse.runtime.ops.distill_step import distill_step
from tokfuse.runtime.ops.linear_paired_divergence import linear_paired_divergence
from tokfuse.runtime.ops.linear_token_stats import linear_token_stats
from tokfuse.runtime.ops.paired_divergence import paired_divergence
from tokfuse.runtime.ops.token_stats import token_stats

UNLABELLED = -100
LEFT_TO_TRL = (
    "ServerDistillationTrainer, the server modes of SDFT, SDPO and IW-OPD",
    "top_k of IW-OPD, GOLD with use_uld_loss, reduction='none', a teacher whose logits require grad",
    "DeepSpeed ZeRO-3, devices without kernels",
)

Loss = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


# ------------------------------------------------------------------------------------- two heads


def divergence_loss(
    student_hidden_states: torch.Tensor,
    teacher_hidden_states: torch.Tensor,
    student_lm_head_weight: torch.Tensor,
    teacher_lm_head_weight: torch.Tensor,
    completion_mask: torch.Tensor,
    beta: float,
    num_items_in_batch: torch.Tensor | int | None,
    student_lm_head_bias: torch.Tensor | None,
    teacher_lm_head_bias: torch.Tensor | None,
    student_logit_scale: float,
    teacher_logit_scale: float,
    student_final_logit_softcapping: float | None,
    teacher_final_logit_softcapping: float | None,
    temperature: float,
) -> Loss | None:
    """Return what TRL's `_chunked_divergence_loss` returns: loss, sum of the student's entropy, valid tokens.

    Args:
        student_hidden_states: (B, K, H), of the completion tokens.
        teacher_hidden_states: (B, K, H_teacher), of the same tokens.
        student_lm_head_weight: (V, H); a DTensor is gathered, as in TRL.
        teacher_lm_head_weight: (V, H_teacher).
        completion_mask: (B, K), 0 leaves a token out.
        beta: see the module.
        num_items_in_batch: divisor of the loss. None: the valid tokens of this batch.
        student_lm_head_bias: (V,) or None.
        teacher_lm_head_bias: (V,) or None.
        student_logit_scale: factor of the student's logits before the cap.
        teacher_logit_scale: factor of the teacher's logits before the cap.
        student_final_logit_softcapping: cap of the student's logits, or None.
        teacher_final_logit_softcapping: cap of the teacher's logits, or None.
        temperature: divides the logits of both sides.
    """
    weights = (student_lm_head_weight, teacher_lm_head_weight)
    if not all(_supported("linear_paired_divergence", weight) for weight in weights):
        return None
    student = _operands(student_hidden_states, student_lm_head_weight, student_lm_head_bias)
    teacher = _operands(teacher_hidden_states, teacher_lm_head_weight, teacher_lm_head_bias)
    valid = completion_mask.reshape(-1) != 0
    given: dict[str, Any] = {
        **student,
        **{f"teacher_{name}": x if x is None else x.detach() for name, x in teacher.items()},
        "mask": valid,
        "temperature": temperature,
        "softcap": student_final_logit_softcapping,
        "logit_scale": student_logit_scale,
        "teacher_temperature": temperature,
        "teacher_softcap": teacher_final_logit_softcapping,
        "teacher_logit_scale": teacher_logit_scale,
        **generalised_jsd(beta),
    }
    count = valid.sum()
    if given["hidden"].dtype == torch.float16:
        # A gradient that was computed in the forward would not be scaled yet, and small values would underflow.
        stats = linear_paired_divergence(**given)
        total = count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return stats.divergence.sum() / total, stats.entropy.detach().sum(), count
    step = distill_step(**given, normalizer="batch" if num_items_in_batch is None else num_items_in_batch)
    return step.loss, step.stats.entropy.sum(), count


def _supported(op: str, x: torch.Tensor) -> bool:
    """Return whether `op` has kernels for this tensor, which is no parameter under DeepSpeed ZeRO-3."""
    return on_kernels("TRL", op, x) and not is_partitioned(x)


def _operands(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> dict[str, torch.Tensor | None]:
    """Return a head as hidden, weight and bias, in the autocast dtype or the dtype of its hidden states."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    head: dict[str, Any] = {"hidden": hidden.reshape(-1, hidden.shape[-1]), "weight": weight, "bias": bias}
    if hasattr(weight, "full_tensor"):  # a DTensor, under FSDP2
        head |= {name: head[name].full_tensor() for name in ("weight", "bias") if head[name] is not None}
    return {name: x if x is None else x.to(dtype) for name, x in head.items()}


def candidates_loss(
    hidden_valid: torch.Tensor,
    lm_head_weight: torch.Tensor,
    lm_head_bias: torch.Tensor | None,
    logit_scale: float,
    final_logit_softcapping: float | None,
    target_ids: torch.Tensor,
    teacher_target_logps: torch.Tensor,
    valid_candidate_mask: torch.Tensor,
    beta: float,
    temperature: float,
    add_tail_bucket: bool,
    teacher_id_idx: torch.Tensor | None,
    num_teachers: int,
    chunk_size: int,
) -> tuple[torch.Tensor, ...] | None:
    """Return what TRL's `_chunked_jsd_loss` returns: the loss, and the sums of four figures.

    These are the divergence, the student's entropy, the teacher's entropy over its candidates, and for each teacher
    its number of rows, divergence and entropy. The divergence of (N, K) log-probabilities is TRL's.

    Args:
        hidden_valid: (N, H).
        lm_head_weight: (V, H).
        lm_head_bias: (V,) or None.
        logit_scale: factor of the logits before the cap.
        final_logit_softcapping: cap of the logits, or None.
        target_ids: (N, K), the teacher's candidates.
        teacher_target_logps: (N, K), their log-probabilities.
        valid_candidate_mask: (N, K) bool, False is padding.
        beta: see the module.
        temperature: divides the student's logits.
        add_tail_bucket: True: one more category with the rest of the mass. False: renormalise.
        teacher_id_idx: (N,), the teacher of each row. None: there is one.
        num_teachers: number of teachers.
        chunk_size: TRL's rows per chunk. Ignored, because `linear_token_stats` has a memory budget.
    """
    from trl.experimental.async_distillation import async_distillation_trainer as host

    if not _supported("linear_token_stats_at", lm_head_weight) or torch.is_autocast_enabled(hidden_valid.device.type):
        return None
    dtype = torch.promote_types(hidden_valid.dtype, lm_head_weight.dtype)
    stats = linear_token_stats(
        hidden_valid.to(dtype),
        lm_head_weight.to(dtype),
        target_ids[:, 0].clamp_min(0),
        bias=None if lm_head_bias is None else lm_head_bias.to(dtype),
        ids=torch.where(valid_candidate_mask, target_ids, -1),
        logit_scale=logit_scale,
        softcap=final_logit_softcapping,
        temperature=temperature,
    )
    support = valid_candidate_mask
    sides = [torch.where(support, x, -torch.inf) for x in (stats.logp_at, teacher_target_logps)]
    if add_tail_bucket:
        sides = [host._add_tail_bucket(x, support)[0] for x in sides]
        support = torch.nn.functional.pad(support, (0, 1), value=True)
    else:
        sides = [x.log_softmax(-1) for x in sides]
    loss = host._jsd_divergence(*sides, beta=beta, support_mask=support).sum(-1)
    q = torch.where(support, sides[1], 0.0)
    entropy = -(q.exp() * q * support).sum(-1)
    figures = torch.stack([torch.ones_like(entropy), loss.detach(), entropy], 1)
    by_teacher = figures.new_zeros(num_teachers, 3)
    if teacher_id_idx is not None:
        by_teacher.index_add_(0, teacher_id_idx, figures)
    return loss.sum(), loss.detach().sum(), stats.entropy.detach().sum(), entropy.sum(), by_teacher.flatten()


# ----------------------------------------------------------------------------- two tensors of logits


def jsd_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor | None,
    beta: float,
    temperature: float,
    reduction: str,
    num_items_in_batch: torch.Tensor | int | None,
    logits_are_probs: bool = False,
    top_k: int = 0,
    add_tail: bool = True,
) -> torch.Tensor | None:
    """Return what `generalized_jsd_loss` of GKD, GOLD and IW-OPD returns, ().

    Args:
        student_logits: (..., V).
        teacher_logits: (..., V).
        labels: (...), -100 leaves a row out. None: no row is left out.
        beta: see the module.
        temperature: divides the logits of both sides.
        reduction: without `num_items_in_batch`, "batchmean" divides by the labelled rows (without labels by the
            batch), "mean" by all elements, and "sum" does not divide.
        num_items_in_batch: divisor of the loss.
        logits_are_probs: of GOLD, for two tokenizers.
        top_k: of IW-OPD, restricts the vocabulary.
        add_tail: of IW-OPD, for `top_k`.
    """
    vocab = student_logits.shape[-1]
    if logits_are_probs or 0 < top_k < vocab or not _comparable("distill_step", student_logits, teacher_logits):
        return None
    keep = None if labels is None else labels != UNLABELLED
    student, teacher = _rows(student_logits, keep), _rows(teacher_logits, keep)
    normalizer: torch.Tensor | float | None
    if num_items_in_batch is not None:
        normalizer = num_items_in_batch
    elif reduction == "batchmean":
        normalizer = max(1, student_logits.shape[0] if keep is None else student.shape[0])
    elif reduction == "mean":
        normalizer = max(1, student.numel())
    elif reduction == "sum":
        normalizer = None
    else:
        return None
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    given: dict[str, Any] = {"temperature": temperature, **generalised_jsd(beta)}
    if dtype == torch.float16:  # the loss is scaled before the gradient is computed, see `divergence_loss`
        total = paired_divergence(student.to(dtype), teacher.to(dtype), **given).sum()
        return total if normalizer is None else total / normalizer
    step = distill_step(
        logits=student.to(dtype),
        teacher_logits=teacher.to(dtype),
        teacher_temperature=temperature,
        normalizer=normalizer,
        **given,
    )
    return step.loss


def full_logits(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, distillation_alpha: float
) -> torch.Tensor | None:
    """Return what `compute_full_logit_self_distillation_loss` of SDFT and SDPO returns, one value per row.

    Args:
        student_logits: (..., V).
        teacher_logits: (..., V).
        distillation_alpha: see the module.
    """
    if not _comparable("paired_divergence", student_logits, teacher_logits):
        return None
    dtype = torch.promote_types(student_logits.dtype, teacher_logits.dtype)
    student, teacher = (_rows(x).to(dtype) for x in (student_logits, teacher_logits))
    return paired_divergence(student, teacher, **generalised_jsd(distillation_alpha)).view(student_logits.shape[:-1])


def topk_logits(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    distillation_topk: int,
    distillation_alpha: float,
    distillation_add_tail: bool,
) -> torch.Tensor | None:
    """Return what `compute_topk_self_distillation_loss` of SDFT and SDPO returns, one value per row.

    The log-probabilities at the student's top-k ids are tokfuse's; their divergence, over (rows, k) values, is TRL's.

    Args:
        student_logits: (..., V).
        teacher_logits: (..., V).
        distillation_topk: number of ids per row.
        distillation_alpha: see the module.
        distillation_add_tail: True: one more category with the rest of the mass. False: renormalise.
    """
    from trl.experimental.sdft.loss_utils import add_tail_bucket, compute_divergence

    if not _comparable("token_stats_at", student_logits, teacher_logits):
        return None
    student, teacher = _rows(student_logits), _rows(teacher_logits)
    ids = torch.topk(student.detach(), distillation_topk, dim=-1).indices
    sides = [token_stats(x, ids[:, 0], ids=ids).logp_at for x in (student, teacher)]
    if distillation_add_tail:
        sides = [add_tail_bucket(x) for x in sides]
    else:
        sides = [x.log_softmax(-1) for x in sides]
    loss: torch.Tensor = compute_divergence(*sides, distillation_alpha)
    return loss.view(student_logits.shape[:-1])


def _comparable(op: str, student: torch.Tensor, teacher: torch.Tensor) -> bool:
    """Return whether `op` can compare these logits: kernels for the device, one shape, no gradient for the teacher."""
    return student.shape == teacher.shape and not teacher.requires_grad and on_kernels("TRL", op, student)


def _rows(logits: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
    """Return the kept rows, (rows, V)."""
    return logits.reshape(-1, logits.shape[-1]) if keep is None else _Kept.apply(logits, keep)


class _Kept(torch.autograd.Function):
    """`logits[keep]`. Torch's own backward adds every element into zeros; these rows are distinct, so it can copy."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(keep)
        ctx.shape = logits.shape
        return logits[keep]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (keep,) = ctx.saved_tensors
        out = grad.new_zeros(ctx.shape)
        out[keep] = grad
        return out, None


# ------------------------------------------------------------------------------------- rebinding


class Part(NamedTuple):
    """A function of TRL and the one that replaces it."""

    trainer: str
    module: str
    attribute: str
    replacement: Callable[..., Any]
    op: str

    def owner(self) -> Any:
        """Return the module or class that has the attribute; None if this installation cannot import it."""
        module, _, cls = self.module.partition(":")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # TRL's notice about trl.experimental, which the user did not import
                found: Any = importlib.import_module(module)
        except ImportError:
            return None
        found = getattr(found, cls, None) if cls else found
        return found if hasattr(found, self.attribute) else None


_SELF = ("compute_full_logit_self_distillation_loss", full_logits, "paired_divergence")
_SELF_TOP_K = ("compute_topk_self_distillation_loss", topk_logits, "token_stats_at")
_JSD = ("generalized_jsd_loss", jsd_loss, "distill_step")
_TRAINERS: tuple[tuple[str, str, tuple[str, Callable[..., Any], str]], ...] = (
    (
        "DistillationTrainer",
        "trl.trainer.distillation_trainer",
        ("_chunked_divergence_loss", divergence_loss, "linear_paired_divergence"),
    ),
    (
        "AsyncDistillationTrainer",
        "trl.experimental.async_distillation.async_distillation_trainer",
        ("_chunked_jsd_loss", candidates_loss, "linear_token_stats_at"),
    ),
    ("GKDTrainer", "trl.experimental.gkd.gkd_trainer:GKDTrainer", _JSD),
    ("GOLDTrainer", "trl.experimental.gold.gold_trainer:GOLDTrainer", _JSD),
    ("IWOPDTrainer", "trl.experimental.iw_opd.iw_opd_trainer:IWOPDTrainer", _JSD),
    ("SDFTTrainer", "trl.experimental.sdft.sdft_trainer", _SELF),
    ("SDFTTrainer, top-k", "trl.experimental.sdft.sdft_trainer", _SELF_TOP_K),
    ("SDPOTrainer", "trl.experimental.sdpo.sdpo_trainer", _SELF),
    ("SDPOTrainer, top-k", "trl.experimental.sdpo.sdpo_trainer", _SELF_TOP_K),
)
PARTS = tuple(Part(trainer, module, *rest) for trainer, module, rest in _TRAINERS)


def with_fallback(stock: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function with the signature of `stock` that runs `replacement`, and `stock` where that returns None."""
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        found = replacement(**given.arguments)
        return stock(*args, **kwargs) if found is None else found

    return call


def bind(into: Rebinding) -> None:
    """Replace the losses of all distillation trainers of TRL that this installation can import."""
    for part in PARTS:
        owner = part.owner()
        if owner is not None:
            function = with_fallback(getattr(owner, part.attribute), part.replacement)
            into.set(owner, part.attribute, staticmethod(function) if inspect.isclass(owner) else function)


def describe() -> list[str]:
    """Return one line per trainer with the backend of its loss, and what is left to TRL."""
    lines = [
        f"  {part.trainer}: {where(part.op) if part.owner() is not None else 'not importable here'}" for part in PARTS
    ]
    return [*lines, *(f"  left to TRL: {text}" for text in LEFT_TO_TRL)]
