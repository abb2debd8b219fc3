"""verl's distillation losses on tokfuse: top-k forward KL from `tokfuse.token_stats`, and one-sample estimators.

verl computes a top-k loss in two parts. The engine calls `compute_topk_loss` with the student's logits of every token,
for every name of a loss. The registered function then selects the responses and reports metrics. `topk_loss` therefore
replaces `compute_topk_loss`. It runs tokfuse for names with the prefix, and verl's code for all other names. With the
fused heads of `verl_heads` there are no logits: the teacher's ids are attached to the engine's inputs, and the head
attaches the log-probabilities at these ids to its output. Values, gradients and metrics equal verl 0.9's FSDP losses;
docs/verl.md names every difference.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.ops.token_stats import token_stats

Loss = tuple[torch.Tensor, dict[str, Any]]
OP = "verl_plugin"
PREFIX = "tokfuse_"
TOP_K = "forward_kl_topk"
TOP_K_TAIL = "forward_kl_topk_tail"
BIASED = ("kl", "k1")  # their own gradient does not depend on the teacher
ESTIMATORS = (*BIASED, "abs", "mse", "k2", "low_var_kl", "k3")
STRATEGIES = ("fsdp", "fsdp2", "veomni")  # those whose logits have the whole vocabulary
TAIL_FLOOR = 1e-7
TOP_K_OUTPUTS = ("distillation_losses", "student_mass", "teacher_mass")
HEADS = "TOKFUSE_VERL_HEADS"
IDS = "_tokfuse_ids"  # attribute of the labels that a fused head receives: (tokens, K), the teacher's ids
LOGP_AT = "_tokfuse_logp_at"  # attribute of the log_probs that it returns: (tokens, K), log-probabilities at these ids
K3_RATIO, K3_BOUND = 20.0, 10.0  # verl's clamps of the log-ratio and of the value of k3


class AtIds(NamedTuple):
    """The student's log-probabilities at the teacher's ids, in place of logits. (tokens, K), with gradient."""

    logp: torch.Tensor


# -------------------------------------------------------------------------------------- top-k


def topk_loss(
    stock: Callable[..., Any],
    config: Any,
    distillation_config: Any,
    data: Any,
    student_logits: torch.Tensor | AtIds,
    data_format: str,
) -> Any:
    """Return what verl's `compute_topk_loss` returns: named tensors, (1, tokens) each.

    Without logits, the overlap of the two top-k sets is left out, as in verl's own fused kernels.

    Args:
        stock: verl's function, for the names of verl.
        config: the actor's configuration.
        distillation_config: its distillation_loss has the name of the loss and its options.
        data: micro-batch with teacher_logprobs and teacher_ids, nested (sequence, K).
        student_logits: (1, tokens, vocab), of this rank's part of the packed sequences; or what a fused head computed.
        data_format: "thd" or "bshd", for verl.
    """
    options = distillation_config.distillation_loss
    if not options.loss_mode.startswith(PREFIX):
        return stock(config, distillation_config, data, student_logits, data_format)
    if config.strategy not in STRATEGIES:
        raise refuse(
            OP,
            "actor.strategy",
            f"one of {', '.join(STRATEGIES)} with loss_mode {options.loss_mode}",
            repr(config.strategy),
            "Use verl's forward_kl_topk, whose Megatron form takes vocabulary shards.",
        )
    teacher_logps, ids = (_local(data[name]) for name in ("teacher_logprobs", "teacher_ids"))
    if isinstance(student_logits, AtIds):
        logits, p = None, student_logits.logp
    else:
        logits = student_logits.reshape(-1, student_logits.shape[-1])
        p = token_stats(logits, ids[:, 0], ids=ids).logp_at
    tail = options.loss_mode == PREFIX + TOP_K_TAIL
    if tail and options.log_prob_min_clamp is not None:
        raise refuse(
            OP,
            "distillation_loss.log_prob_min_clamp",
            f"null with {PREFIX}{TOP_K_TAIL}",
            options.log_prob_min_clamp,
            "The tail has the mass that the clamp would add.",
        )
    q = teacher_logps.float()
    found = {"student_mass": p.detach().exp().sum(-1), "teacher_mass": q.exp().sum(-1)}
    if options.log_prob_min_clamp is not None:
        p, q = (x.clamp_min(options.log_prob_min_clamp) for x in (p, q))
    found["distillation_losses"] = _with_tail(p, q) if tail else _as_given(p, q)
    if logits is not None:
        shared = _among(ids, torch.topk(logits.detach(), ids.shape[-1], dim=-1).indices)
        count = shared.sum(-1)
        gain = (q.exp() * (p.detach() - q) * shared).sum(-1) / count.clamp_min(1)
        found |= {"overlap_count": count, "overlap_token_advantage": gain}
    return {name: x.unsqueeze(0) for name, x in found.items()}


def _local(packed: torch.Tensor) -> torch.Tensor:
    """Return the rows of a nested (sequence, K) tensor that belong to this rank, (tokens, K)."""
    from verl.utils.ulysses import get_ulysses_sequence_parallel_world_size, slice_input_tensor

    rows: torch.Tensor = packed.values()
    return slice_input_tensor(rows, dim=0) if get_ulysses_sequence_parallel_world_size() > 1 else rows


def _among(ids: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return for each of (tokens, K) ids whether it is in the same row of `others`, without a (K, K) table."""
    table = others.sort(-1).values
    place = torch.searchsorted(table, ids.contiguous()).clamp_max(table.shape[-1] - 1)
    return table.gather(-1, place) == ids


def _as_given(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (q.exp() * (q - p)).sum(-1)


def _with_tail(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Forward KL over the K ids and one more category with the rest of the mass, at least `TAIL_FLOOR`."""
    p_rest, q_rest = (_log_rest(x) for x in (p, q))
    return _as_given(p, q) + q_rest.exp() * (q_rest - p_rest)


def _log_rest(logps: torch.Tensor) -> torch.Tensor:
    return torch.log(-torch.expm1(logps.logsumexp(-1).clamp_max(-TAIL_FLOOR)))


def topk_result(config: Any, distillation_config: Any, model_output: Any, data: Any) -> Loss:
    """Return verl's loss of the responses, (batch, length), and its metrics, read from the device at once."""
    from verl.utils.metric import AggregationType, Metric

    overlap = "overlap_count" in model_output
    if "distillation_losses" not in model_output or (config.strategy == "veomni" and not overlap):
        raise refuse(
            OP,
            "model.use_fused_kernels",
            f"False with loss_mode {distillation_config.distillation_loss.loss_mode}",
            "a head that does not compute it",
            f"Set it, or set {HEADS}=1 for the FSDP engine without padding.",
        )
    losses, student, teacher = (_responses(model_output[name], data) for name in TOP_K_OUTPUTS)
    mask = _mask(data)
    found: dict[str, torch.Tensor] = {}
    if overlap:
        count, advantage = (_responses(model_output[f"overlap_{name}"], data) for name in ("count", "token_advantage"))
        overlapping = mask & (count > 0)
        found["overlap_ratio"] = count[mask].float().mean() / distillation_config.distillation_loss.topk
        gain = torch.where(overlapping, advantage, 0.0).sum() / overlapping.sum().clamp(min=1)
        found["overlap_token_advantage"] = gain
    for side, mass in (("student", student[mask]), ("teacher", teacher[mask])):
        found |= {f"{side}_mass": mass.mean(), f"{side}_mass_min": mass.min(), f"{side}_mass_max": mass.max()}
    metrics: dict[str, Any] = dict(
        zip((f"distillation/{name}" for name in found), torch.stack(list(found.values())).tolist(), strict=True)
    )
    for side in ("student", "teacher"):
        for end in AggregationType.MIN, AggregationType.MAX:
            name = f"distillation/{side}_mass_{end.value}"
            metrics[name] = Metric(end, metrics[name])
    return losses.clamp_min(0.0), metrics  # without a tail the K terms can add up to less than 0


# -------------------------------------------------------------------------- top-k with fused heads


def _top_k_of_fused_heads(micro_batch: Any) -> bool:
    tu = importlib.import_module("verl.utils.tensordict_utils")
    flags = {"use_fused_kernels": False, "distillation_use_topk": False, "use_remove_padding": True}
    return all(tu.get_non_tensor_data(data=micro_batch, key=key, default=value) for key, value in flags.items())


def prepare_model_inputs(original: Any) -> Any:
    """Wrap the engine's method, so that the labels of a fused head carry the teacher's ids."""

    @functools.wraps(original)
    def call(self: Any, micro_batch: Any, *args: Any, **kwargs: Any) -> Any:
        inputs, arguments = original(self, micro_batch, *args, **kwargs)
        if _top_k_of_fused_heads(micro_batch):
            if "shift_labels" not in inputs:
                inputs["shift_labels"] = arguments["input_ids_rmpad_rolled"].unsqueeze(0)
            setattr(inputs["shift_labels"], IDS, _local(micro_batch["teacher_ids"]))
        return inputs, arguments

    return call


def prepare_model_outputs(original: Any) -> Any:
    """Wrap the engine's method, so that it computes tokfuse's top-k losses from what the fused head attached."""

    @functools.wraps(original)
    def call(self: Any, output: Any, output_args: Any, micro_batch: Any, logits_processor_func: Any) -> Any:
        made = original(self, output, output_args, micro_batch, logits_processor_func)
        settings = getattr(logits_processor_func, "keywords", {}).get("distillation_config")
        if not _top_k_of_fused_heads(micro_batch) or settings is None:
            return made
        if not settings.distillation_loss.loss_mode.startswith(PREFIX):
            return made
        logp = getattr(output.log_probs, LOGP_AT, None)
        if logp is None:
            raise refuse(
                OP,
                "output.log_probs",
                "what the installed fused head returned",
                "a different tensor",
                "Use a model whose forward verl patches, without casting its inputs and outputs.",
            )
        found = logits_processor_func(student_logits=AtIds(logp), data=micro_batch)
        offsets = micro_batch["input_ids"].offsets()
        for name, x in found.items():
            whole = self._gather_and_unpad_packed(x.squeeze(0), output_args["pad_size"])
            made[name] = torch.nested.nested_tensor_from_jagged(whole, offsets)
        return made

    return call


# --------------------------------------------------------------------------------- estimators


def estimate(kind: str, logp: torch.Tensor, teacher_logp: torch.Tensor) -> torch.Tensor:
    """Return verl's one-sample estimate `kind` of KL(student || teacher), token by token.

    k3 is expm1(-k) + k, which keeps the digits of close policies.

    Args:
        kind: one of `ESTIMATORS`.
        logp: the student's log-probability of the sampled token.
        teacher_logp: the teacher's.
    """
    k = logp - teacher_logp
    if kind in BIASED:
        return k
    if kind == "abs":
        return k.abs()
    if kind in ("mse", "k2"):
        return 0.5 * k.square()
    k = k.clamp(-K3_RATIO, K3_RATIO)
    return (torch.expm1(-k) + k).clamp(-K3_BOUND, K3_BOUND)


def estimator(kind: str, config: Any, distillation_config: Any, model_output: Any, data: Any) -> Loss:
    """Return verl's one-sample loss of the responses, (batch, length), and its metrics."""
    from verl.utils.metric import AggregationType, Metric

    if kind in BIASED and not distillation_config.distillation_loss.use_policy_gradient:
        raise refuse(
            OP,
            "distillation_loss.use_policy_gradient",
            f"True with {PREFIX}{kind}, whose own gradient does not depend on the teacher",
            False,
            f"Set it, or use {PREFIX}k2 or {PREFIX}k3.",
        )
    logp = _responses(model_output["log_probs"], data)
    losses = estimate(kind, logp, _responses(data["teacher_logprobs"], data).squeeze(-1))
    mean = losses.detach()[_mask(data)].abs().mean()
    return losses, {"distillation/abs_loss": Metric(AggregationType.MEAN, mean)}


# ------------------------------------------------------------------------------------ registry


def _responses(packed: torch.Tensor, data: Any) -> torch.Tensor:
    from verl.workers.utils.padding import no_padding_2_padding

    out: torch.Tensor = no_padding_2_padding(packed, data)
    return out


def _mask(data: Any) -> torch.Tensor:
    mask: torch.Tensor = data["response_mask"].bool()
    return mask.to_padded_tensor(False) if mask.is_nested else mask


def names() -> list[str]:
    """Return the registered names."""
    return [PREFIX + name for name in (TOP_K, TOP_K_TAIL, *ESTIMATORS)]


def register() -> list[str]:
    """Register every loss under its prefixed name, and return the names. Idempotent."""
    from verl.trainer.distillation import losses as host

    for name in (TOP_K, TOP_K_TAIL):
        _add(host, name, topk_result, use_topk=True)
    for name in ESTIMATORS:
        _add(host, name, functools.partial(estimator, name), use_estimator=True)
    if not isinstance(host.compute_topk_loss, functools.partial):
        host.compute_topk_loss = functools.partial(topk_loss, host.compute_topk_loss)
    return names()


def _add(host: Any, name: str, loss: Callable[..., Loss], **settings: bool) -> None:
    if PREFIX + name not in host.DISTILLATION_LOSS_REGISTRY:
        host.register_distillation_loss(host.DistillationLossSettings(names=[PREFIX + name], **settings))(loss)
