"""The forward of a model that hf.install patched, and the losses from logits."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple, get_args

import torch

from tokfuse.integrations import fsdp
from tokfuse.integrations.hf_head import OP, check_own_loss, gathered_head, transformer_of
from tokfuse.integrations.hosts import has_kernels, on_kernels, tell_unchanged
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.ops.linear_cross_entropy import linear_cross_entropy
from tokfuse.runtime.ops.linear_token_stats import linear_token_stats
from tokfuse.runtime.ops.token_stats import token_stats

IGNORE = -100


class Installed(NamedTuple):
    """The options of `install`, stored on the model."""

    temperature: float
    eval_logits: bool


def patched_base(kind: Any) -> Any:
    """Return the class that the patched class of `kind` derives from. None if there is no patched class."""
    return getattr(kind, "_tokfuse_base", None)


@functools.cache
def _output_class(base: Any) -> Any:
    """Return the class of the output of a model's own forward, from its annotation."""
    from transformers.modeling_outputs import CausalLMOutputWithPast
    from transformers.utils import ModelOutput

    found = inspect.signature(base.forward).return_annotation
    kinds = [x for x in (found, *get_args(found)) if isinstance(x, type) and issubclass(x, ModelOutput)]
    return kinds[0] if kinds and {"loss", "logits"} <= {f.name for f in fields(kinds[0])} else CausalLMOutputWithPast


def _output(model: Any, loss: torch.Tensor, outputs: Any) -> Any:
    """Return the model's own output object, without logits, from the output of its transformer."""
    base: Any = patched_base(type(model)) or type(model)
    kind = _output_class(base)
    names = {f.name for f in fields(kind)} - {"loss", "logits"}
    return kind(loss=loss, **{name: getattr(outputs, name) for name in names if hasattr(outputs, name)})


def forward_without_logits(
    model: Any,
    original: Callable[..., Any],
    state: Installed,
    *args: Any,
    labels: torch.Tensor | None = None,
    shift_labels: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = IGNORE,
    token_stats: bool = False,
    skip_logits: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Run `model(...)` with the loss from hidden states. `original` is the model's own forward."""
    if labels is None and shift_labels is None:
        return original(*args, **kwargs)
    weight = model.get_output_embeddings().weight
    if not has_kernels("linear_token_stats", weight.device.type, weight.dtype):
        if token_stats or state.temperature != 1.0:
            raise refuse(
                OP,
                "the model's device",
                "one that tokfuse has kernels for, with token_stats or a temperature",
                f"{weight.device.type} with {weight.dtype}",
                "Use tokfuse.token_stats on the logits.",
            )
        tell_unchanged("transformers", weight.device.type, weight.dtype)
        given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
        given |= {} if ignore_index == IGNORE else {"ignore_index": ignore_index}
        return original(*args, **{k: v for k, v in given.items() if v is not None}, **kwargs)
    _check_forward(model, kwargs)
    if skip_logits is None:
        skip_logits = not state.eval_logits or model.training or torch.is_grad_enabled() or token_stats
    if not skip_logits:
        output = original(*args, **kwargs)
        loss = _loss_of_logits(output.logits, labels, num_items_in_batch, ignore_index, shift_labels, state.temperature)
        return type(output)(loss=loss, **output)
    outputs = transformer_of(model)(*args, **kwargs)
    hidden = outputs.last_hidden_state
    if shift_labels is None:
        hidden, target = hidden[:, :-1], labels[..., 1:]  # type: ignore[index]
    else:
        target = shift_labels
    target = target.to(hidden.device)
    rows = target != ignore_index
    # The loss alone needs no second GEMM for the logits: its gradient is computed in the forward.
    op = linear_token_stats if token_stats else functools.partial(linear_cross_entropy, reduction="sum")
    found = _of_labelled_rows(op, model, hidden, target, rows, state.temperature)
    total = -found.logp.sum() if token_stats else found
    count = rows.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    output = _output(model, total / count, outputs)
    if token_stats:
        output["logp"], output["entropy"] = (
            x.new_zeros(rows.shape).masked_scatter(rows, x) for x in (found.logp, found.entropy)
        )
    return output


def _of_labelled_rows(
    op: Callable[..., Any],
    model: Any,
    hidden: torch.Tensor,
    target: torch.Tensor,
    rows: torch.Tensor,
    temperature: float,
) -> Any:
    """Return what `op` computes from the rows with a label. `rows` is their mask, (batch, length) bool."""
    if hidden.shape[:2] != target.shape:
        raise refuse(
            OP,
            "labels",
            f"of shape (batch, length) = {tuple(hidden.shape[:2])} to match the hidden states",
            tuple(target.shape),
            "Pad labels of soft prompts with -100.",
        )
    layer, score = model.get_output_embeddings(), functools.partial(_of_rows, op, model, target[rows], temperature)
    chosen = hidden[rows]
    return fsdp.call_inside(layer, score, chosen) if fsdp.is_unit(layer) else score(chosen)


def _of_rows(op: Callable[..., Any], model: Any, target: torch.Tensor, temperature: float, chosen: torch.Tensor) -> Any:
    arguments = gathered_head(model).arguments()
    if torch.is_autocast_enabled(chosen.device.type):  # as torch's linear layer
        dtype = torch.get_autocast_dtype(chosen.device.type)
        chosen = chosen.to(dtype)
        arguments |= {name: x.to(dtype) for name in ("weight", "bias") if (x := arguments[name]) is not None}
    return op(chosen, target=target, temperature=temperature, **arguments)


def _check_forward(model: Any, kwargs: dict[str, Any]) -> None:
    config = model.config.get_text_config()
    check_own_loss(model, causal_lm_loss)
    router = kwargs.get("output_router_logits")
    by_default = getattr(model.config, "return_dict", True)
    refused = {
        "logits_to_keep": (kwargs.pop("logits_to_keep", 0), 0),
        "return_dict": (kwargs.pop("return_dict", None) is not False and by_default, True),
        "output_router_logits": (getattr(config, "output_router_logits", False) if router is None else router, False),
    }
    for name, (given, allowed) in refused.items():
        if not isinstance(given, int) or given != allowed:
            raise refuse(
                OP,
                name,
                f"{allowed} with labels (the loss needs every labelled row, an output object, and no auxiliary loss)",
                given,
                "Uninstall tokfuse for this call.",
            )


# ------------------------------------------------------------------------------- losses from logits


def compute_loss_func(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Return the next-token cross-entropy of `outputs.logits`, for `Trainer(compute_loss_func=...)`.

    It equals the model's own loss. The logits are read once, in their dtype; their gradient is the only other tensor
    of their size.
    """
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    return causal_lm_loss(logits, labels, logits.shape[-1], num_items_in_batch)


def causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = IGNORE,
    shift_labels: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Return the loss, with the arguments of transformers' ForCausalLMLoss, for `model.loss_function = ...`.

    loss = -sum log p(label) / num_items_in_batch; without num_items_in_batch, the mean. A batch without a label gives 0
    with zero gradient (transformers: NaN).

    Args:
        logits: (batch, length, vocab).
        labels: (batch, length), shifted by this function. Or pass shift_labels.
        vocab_size: size of the vocabulary.
        num_items_in_batch: number of labels over all micro-batches and ranks. None: of this batch.
        ignore_index: label of rows to leave out.
        shift_labels: (batch, length), already shifted.
        kwargs: other arguments of the model call; ignored.
    """
    return _loss_of_logits(
        logits.reshape(*logits.shape[:-1], vocab_size), labels, num_items_in_batch, ignore_index, shift_labels
    )


def _loss_of_logits(
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    num_items_in_batch: torch.Tensor | int | None,
    ignore_index: int,
    shift_labels: torch.Tensor | None,
    temperature: float = 1.0,
) -> torch.Tensor:
    if shift_labels is None:
        if labels is None:
            raise refuse(OP, "labels", "given without shift_labels", None, "Pass one of them.")
        shift_labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    target = shift_labels.reshape(-1).to(logits.device)
    rows = target != ignore_index
    flat = logits.reshape(-1, logits.shape[-1])
    if not on_kernels("torch", "token_stats", flat):
        scaled = flat.float() / temperature if flat.dtype != torch.float64 else flat / temperature
        total = torch.nn.functional.cross_entropy(scaled, target, ignore_index=ignore_index, reduction="sum")
        return total / (rows.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
    stats = token_stats(flat, target.masked_fill(~rows, 0), temperature=temperature, mask=rows)
    count = rows.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    if isinstance(count, torch.Tensor):
        count = count.to(logits.device)
    return -stats.logp.sum() / count
