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
from collections.abc import Iterator
from typing import Any

from tokfuse.integrations.hf_forward import (
    Installed,
    causal_lm_loss,
    compute_loss_func,
    forward_without_logits,
    patched_base,
)
from tokfuse.integrations.hf_head import (
    OP,
    SUPPORTED,
    ModelHead,
    check_own_forward,
    head_of,
    shape_of_head,
    stored_head,
    transformers_model,
)
from tokfuse.integrations.hf_packed import packed_hidden, packed_route, packed_token_stats
from tokfuse.integrations.hosts import Host, defined_in, where
from tokfuse.runtime.core import checks
from tokfuse.runtime.core.errors import refuse

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
STATE = "_tokfuse_installed"
"""Attribute of a model that `install` sets. The model's copies, replicas and pickles carry it."""


def install(model: Any, *, temperature: float = 1.0, eval_logits: bool = True) -> None:
    """Make `model(..., labels=labels)` compute its loss from hidden states. Another call replaces the options.

    loss = -sum log p(label) / num_items_in_batch, as the model's own; without num_items_in_batch, the mean over labels
    that are not -100. The output's `logits` are None. `shift_labels` are scored without a shift. `token_stats=True`
    adds `logp` and `entropy` of every scored position, with gradient: (batch, length - 1), with `shift_labels`
    (batch, length). Without labels, the model's own forward runs, so generation is unchanged.

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
    if patched_base(kind) is None:
        check_own_forward(f"{OP}.install", model)
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
    base = patched_base(patched)
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
    parameters = inspect.signature(base.forward).parameters.values()
    positions = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][1:]

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = getattr(self, STATE, None)
        if state is None:  # uninstalled, and called through a wrapper of other code
            return base.forward(self, *args, **kwargs)
        named = dict(zip(positions, args, strict=False))  # labels may be given by position
        original = functools.partial(base.forward, self)
        return forward_without_logits(self, original, state, *args[len(named) :], **named, **kwargs)

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
