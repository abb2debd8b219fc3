"""transformers: the loss of a causal language model on tokfuse's kernels, without logits.

    from tokfuse.integrations import hf
    hf.install(model)                       # model(..., labels=labels) computes no logits any more
    hf.uninstall(model)                     # restores the model's own forward
    Trainer(..., compute_loss_func=hf.compute_loss_func)    # from logits, without a float32 copy of them
    model.loss_function = hf.causal_lm_loss                 # the same, inside the model

`head_of(model)` returns the arguments of `tokfuse.policy_step(hidden=...)` that belong to the model. `packed_hidden`
runs packed sequences, without padding if flash-attention is installed.

The supported model types are those in `SUPPORTED`, whose logits are softcap(scale * (W h + b)). Tied weights, bias,
soft cap and scale are supported. If the lm_head and the hidden states differ in dtype, e.g. a float32 head over a
bfloat16 model, the wider dtype computes; under autocast, both are converted to its dtype first, as in torch's linear
layer. An lm_head with hooks or a replaced forward raises an error, because calling it would compute something else.

LoRA on the lm_head is supported too. LoRA with dropout, DoRA and other adapters raise an error, because reading
`lm_head.weight` alone would ignore them.
"""

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any, NamedTuple, get_args

import torch

from tokfuse.integrations import fsdp
from tokfuse.integrations.hf_head import (
    OP,
    SUPPORTED,
    ModelHead,
    gathered_head,
    head_of,
    shape_of_head,
    stored_head,
    transformers_model,
)
from tokfuse.integrations.hosts import Host, defined_in, has_kernels, on_kernels, tell_unchanged, where
from tokfuse.runtime.core import checks
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.core.statistics import TokenStats
from tokfuse.runtime.ops.linear_cross_entropy import linear_cross_entropy
from tokfuse.runtime.ops.linear_token_stats import linear_token_stats
from tokfuse.runtime.ops.token_stats import token_stats

__all__ = [
    "SUPPORTED",
    "ModelHead",
    "causal_lm_loss",
    "compute_loss_func",
    "describe",
    "head_of",
    "install",
    "installed",
    "is_installed",
    "packed_hidden",
    "packed_route",
    "packed_token_stats",
    "uninstall",
]

HOST = Host("transformers", (5, 0), (5, 24))
IGNORE = -100

STATE = "_tokfuse_installed"
"""Attribute of a model that `install` sets. The model's copies, replicas and pickles carry it."""


# ------------------------------------------------------------------------------ forward of a model


class Installed(NamedTuple):
    """The options of `install`, stored on the model."""

    temperature: float
    eval_logits: bool


def install(model: Any, *, temperature: float = 1.0, eval_logits: bool = True) -> None:
    """Make `model(..., labels=labels)` compute its loss from hidden states. Another call replaces the options.

    loss = -sum log p(label) / num_items_in_batch, as the model's own; without num_items_in_batch, the mean over labels
    that are not -100. The output's `logits` are None. `shift_labels` are scored without a shift. `token_stats=True`
    adds `logp` and `entropy`, (batch, length), with gradient. Without labels, the model's own forward runs, so
    generation is unchanged.

    With gradients enabled, the forward also computes the gradients of the loss. It keeps that of the lm_head, a tensor
    of the size of its weight, until the backward. Evaluate under `torch.no_grad`.

    Evaluation (`model.eval()` under `torch.no_grad`) returns logits too, because `Trainer` takes the predictions for
    `compute_metrics` from them. `skip_logits=True` or `token_stats=True` in the call, or `eval_logits=False` here,
    omits them.

    The model's class becomes a subclass of the same name, whose forward uses the instance that it is called on. So a
    copy of the model (deepcopy, an EMA, a DataParallel replica, a pickle) has the patch too, with its own weights.

    Args:
        model: a model of a supported type; wrap it in DDP, FSDP or PEFT before or after this call.
        temperature: divisor of the logits.
        eval_logits: whether evaluation with labels returns logits. False: evaluation needs no memory for them.

    TRL's trainers score with a head of their own. A patched model then raises an error when the trainer is made,
    unless `tokfuse.integrations.trl.install()` has put that head on tokfuse.

    Raises:
        ValueError: transformers is older than 5.0, `head_of` does not support the model, or other code has replaced
            the forward of this instance, e.g. a TRL trainer.
    """
    HOST.require(f"{OP}.install")
    model = transformers_model(model)
    stored_head(model)
    kind: Any = type(model)
    if _patched_base(kind) is None:
        patched = _patched(kind)
        hooked = _of_accelerate_hook(model, kind.forward, patched.forward)
        if "forward" in vars(model) and not hooked and not _leads_to(model.forward, patched.forward):
            raise refuse(
                f"{OP}.install",
                "model.forward",
                "the forward of the model's class (the patch is part of the class, and an attribute would hide it)",
                f"an attribute of the instance, {_origin(model.forward)}",
                TRL_STEP
                if _is_trl_head(model.forward)
                else "Call hf.install before the code that replaces forward, or remove that patch first.",
            )
        model.__class__ = patched
        if hooked:
            model._old_forward = types.MethodType(patched.forward, model)
    checks.check_positive(f"{OP}.install", "temperature", temperature)
    checks.check_flag(f"{OP}.install", "eval_logits", eval_logits)
    setattr(model, STATE, Installed(temperature, eval_logits))


def uninstall(model: Any) -> None:
    """Restore the model's own forward. Without `install`, this has no effect.

    Wrappers that other code has put around the forward since then, as accelerate does, stay and call the model's own.
    """
    model = transformers_model(model)
    if not is_installed(model):
        return
    delattr(model, STATE)
    patched = type(model)
    base = _patched_base(patched)
    if base is not None and patched is _patched(base):  # FSDP2 derives its class from the patched one
        if getattr(vars(model).get("forward"), "__func__", None) is patched.forward:
            del model.forward  # accelerate's unwrap leaves a bound method behind
        if _of_accelerate_hook(model, patched.forward):
            model._old_forward = types.MethodType(base.forward, model)
        model.__class__ = base


def _of_accelerate_hook(model: Any, *forwards: Any) -> bool:
    """Return whether accelerate's device hook has replaced the instance's forward, and calls one of `forwards`."""
    called = vars(model).get("_old_forward")
    return hasattr(model, "_hf_hook") and getattr(called, "__func__", None) in forwards


def _leads_to(function: Any, target: Any) -> bool:
    """Return whether a function is `target`, or a wrapper around it."""
    while function is not None:
        function = getattr(function, "__func__", function)
        if function is target:
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def is_installed(model: Any) -> bool:
    """Return whether `install` is in effect for this model."""
    return getattr(transformers_model(model), STATE, None) is not None


@contextlib.contextmanager
def installed(model: Any, *, temperature: float = 1.0, eval_logits: bool = True) -> Iterator[None]:
    """Context manager: `install` on entry, `uninstall` on exit."""
    install(model, temperature=temperature, eval_logits=eval_logits)
    try:
        yield
    finally:
        uninstall(model)


def describe(model: Any) -> str:
    """Return which parts of this model run on which backend."""
    model = transformers_model(model)
    active = is_installed(model)
    head = stored_head(model)
    shape = " x ".join(map(str, shape_of_head(model)))
    return "\n".join(
        [
            f"transformers {HOST.installed} (tested: {HOST.tested}), {type(model).__name__} "
            f"{'with tokfuse' if active else 'without tokfuse'}",
            f"  head {shape}, bias {head.bias is not None}, softcap {head.softcap}, "
            f"scale {head.logit_scale:g}: {where('linear_token_stats')}",
            f"  packed sequences: {packed_route(model)}",
        ]
    )


@functools.cache
def _patched(base: Any) -> Any:
    """Return the subclass of `base` whose instances with the attribute `STATE` compute their loss on tokfuse."""

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = getattr(self, STATE, None)
        if state is None:  # uninstalled, and called through a wrapper of other code
            return base.forward(self, *args, **kwargs)
        return _forward(self, functools.partial(base.forward, self), state, *args, **kwargs)

    def __setattr__(self: Any, name: str, value: Any) -> None:
        if name == "forward" and _is_trl_head(value) and getattr(self, STATE, None) and not _trl_on_tokfuse():
            raise refuse(
                OP,
                "the model of a TRL trainer",
                "without hf.install (the trainer scores with a head of its own, which would bypass this patch)",
                f"a patched {base.__name__}",
                TRL_STEP,
            )
        base.__setattr__(self, name, value)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        """Pickle the model by the name of its own class, because this class has no importable name."""
        make, arguments, *rest = base.__reduce_ex__(self, max(int(protocol), 2))
        if make.__name__ == "__newobj__" and arguments[0] is kind:
            make, arguments = restored, (base, *arguments[1:])
        return make, arguments, *rest

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    body = {"forward": forward, "__setattr__": __setattr__, "__reduce_ex__": __reduce_ex__, "_tokfuse_base": base}
    kind: Any = type(base.__name__, (base,), {**names, **body})
    return kind


def _patched_base(kind: Any) -> Any:
    """Return the class that the patched class of `kind` derives from. None if there is no patched class."""
    return getattr(kind, "_tokfuse_base", None)


def restored(base: Any, *arguments: Any) -> Any:
    """Return a new instance of the patched subclass of `base`, for pickle and copy."""
    kind = _patched(base)
    return kind.__new__(kind, *arguments)


TRL_STEP = "Use tokfuse.integrations.trl.install(), which puts TRL's head on tokfuse, and hf.uninstall(model)."


def _origin(function: Any) -> str:
    return f"a function of {defined_in(function)}"


def _is_trl_head(function: Any) -> bool:
    """Return whether TRL's `add_fused_lm_head` made this forward."""
    return defined_in(function) == "trl.trainer.utils"


def _trl_on_tokfuse() -> bool:
    from tokfuse.integrations import trl_seams

    return trl_seams.is_installed()


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
    base: Any = _patched_base(type(model)) or type(model)
    kind = _output_class(base)
    names = {f.name for f in fields(kind)} - {"loss", "logits"}
    return kind(loss=loss, **{name: getattr(outputs, name) for name in names if hasattr(outputs, name)})


def _forward(
    model: Any,
    original: Callable[..., Any],
    state: Installed,
    *args: Any,
    labels: torch.Tensor | None = None,
    shift_labels: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    token_stats: bool = False,
    skip_logits: bool | None = None,
    **kwargs: Any,
) -> Any:
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
        return original(*args, **{k: v for k, v in given.items() if v is not None}, **kwargs)
    _check_forward(model, kwargs)
    if skip_logits is None:
        skip_logits = not state.eval_logits or model.training or torch.is_grad_enabled() or token_stats
    if not skip_logits:
        output = original(*args, **kwargs)
        loss = _loss_of_logits(output.logits, labels, num_items_in_batch, IGNORE, shift_labels, state.temperature)
        return type(output)(loss=loss, **output)
    outputs = _transformer(model)(*args, **kwargs)
    hidden = outputs.last_hidden_state
    if shift_labels is None:
        hidden, target = hidden[:, :-1], labels[:, 1:]  # type: ignore[index]
    else:
        target = shift_labels
    target = target.to(hidden.device)
    rows = target != IGNORE
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


def _transformer(model: Any) -> Any:
    """Return the model without its head."""
    base = model.base_model
    return model.model if base is model else base  # Llama 4 names another attribute as its base


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
    refused = {
        "logits_to_keep": (kwargs.pop("logits_to_keep", 0), 0),
        "return_dict": (kwargs.pop("return_dict", None) is False, False),
        "output_router_logits": (
            kwargs.get("output_router_logits", getattr(config, "output_router_logits", False)),
            False,
        ),
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


# ------------------------------------------------------------------------------------------ packed


def packed_route(model: Any) -> str:
    """Return how `packed_hidden` runs: "flash_attention_2, no padding" or "padded"."""
    from transformers.utils import is_flash_attn_2_available

    wanted = transformers_model(model).config.get_text_config()._attn_implementation
    flash = wanted == "flash_attention_2" and is_flash_attn_2_available()
    return "flash_attention_2, no padding" if flash else "padded"


def packed_hidden(model: Any, input_ids: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Return the final hidden states of packed sequences, (tokens, hidden). A sequence attends only to itself.

    With attn_implementation="flash_attention_2" and flash-attn installed, the forward gets one row with all tokens and
    their offsets. Otherwise the sequences are padded to the longest for the forward, and packed again: the numbers are
    the same, but the transformer computes batch * longest rows.

    Args:
        model: a causal language model.
        input_ids: (tokens,), int64.
        cu_seqlens: (seqs + 1,), int32, offsets of the sequences.
    """
    base = _transformer(transformers_model(model))
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    longest = int(lengths.max()) if len(lengths) else 0
    place = torch.arange(len(input_ids), device=input_ids.device)
    position = place - cu_seqlens[:-1].long().repeat_interleave(lengths, output_size=len(input_ids))
    if packed_route(model) != "padded":
        cu = cu_seqlens.to(torch.int32)
        borders = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": longest, "max_length_k": longest}
        out = base(input_ids=input_ids[None], position_ids=position[None], use_cache=False, **borders)
        packed: torch.Tensor = out.last_hidden_state[0]
        return packed
    rows = torch.arange(longest, device=input_ids.device) < lengths.unsqueeze(1)
    rows = rows[lengths > 0]  # attention over a fully masked row is undefined
    ids = input_ids.new_zeros(rows.shape).masked_scatter(rows, input_ids)
    out = base(input_ids=ids, attention_mask=rows.long(), use_cache=False)
    padded: torch.Tensor = out.last_hidden_state[rows]
    return padded


def packed_token_stats(
    model: Any, input_ids: torch.Tensor, cu_seqlens: torch.Tensor, *, temperature: float = 1.0
) -> tuple[TokenStats, torch.Tensor]:
    """Return the statistics of every next token of packed sequences, without padding and without logits.

    Args:
        model: a causal language model of a supported type.
        input_ids: (tokens,), int64.
        cu_seqlens: (seqs + 1,), int32, offsets of the sequences.
        temperature: divisor of the logits.

    Returns:
        TokenStats with (tokens - number of non-empty sequences) rows, and their offsets, (seqs + 1,) int32. A sequence
        of n tokens gives n - 1 rows, the predictions of its tokens 1 to n - 1.
    """
    hidden = packed_hidden(model, input_ids, cu_seqlens)
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    first = cu_seqlens[:-1][lengths > 0].long()
    follows = torch.ones_like(input_ids, dtype=torch.bool).index_fill_(0, first, False)
    head = head_of(model)
    stats = linear_token_stats(
        hidden[follows.roll(-1)] if len(first) else hidden,
        target=input_ids[follows],
        temperature=temperature,
        **head.arguments(),
    )
    borders = torch.nn.functional.pad((lengths - 1).clamp(min=0).cumsum(0), (1, 0))
    return stats, borders.to(torch.int32)
