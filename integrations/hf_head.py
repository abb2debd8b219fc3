"""The lm_head of a transformers model: which models are supported, and the map from hidden states to logits.

`head_of` reads weight, bias, soft cap and scale. It raises an error for every layer whose call does more than that.
"""

import difflib
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from tokfuse.integrations import fsdp, zero3
from tokfuse.integrations.hosts import defined_in
from tokfuse.runtime.core.errors import refuse

OP = "integrations.hf"


class LogitRule(NamedTuple):
    """What a model's forward does to its logits."""

    scale: str = ""
    """Attribute of the text config that multiplies the logits. "1/" before the name: that divides them. "": none."""
    softcap: bool = False
    """Whether the forward applies the text config's final_logit_softcapping."""


PLAIN = (
    "afmoe apertus arcee aria_text bitnet bloom cwm deepseek_v2 deepseek_v3 doge dots1 ernie4_5 ernie4_5_moe exaone4 "
    "exaone_moe flex_olmo gemma gemma3 glm glm4 glm4_moe glm4_moe_lite glm4v glm4v_moe gpt2 gpt_bigcode gpt_neox "
    "gpt_oss helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 idefics3 internvl jetmoe laguna lfm2 lfm2_moe lfm3 llama "
    "llama4_text llava mellum mimo_v2_flash minimax minimax_m2 ministral ministral3 mistral mistral3 mixtral mpt "
    "nemotron nemotron_h olmo olmo2 olmo3 olmoe persimmon phi phi3 phimoe qwen2 qwen2_5_vl qwen2_moe qwen2_vl qwen3 "
    "qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next qwen3_vl qwen3_vl_moe seed_oss smollm3 "
    "smolvlm solar_open stablelm starcoder2"
)
# config.model_type -> what the forward of its causal language model does. Checked in transformers 5.24. Other models
# transform logits in other ways, or run their transformer differently, and raise an error.
SUPPORTED = {
    **dict.fromkeys(PLAIN.split(), LogitRule()),
    **dict.fromkeys(
        "gemma2 gemma3_text gemma3n gemma3n_text gemma4 gemma4_text gemma4_unified_text nanochat vaultgemma".split(),
        LogitRule("", True),
    ),
    **dict.fromkeys("cohere cohere2 cohere2_moe".split(), LogitRule("logit_scale")),
    **dict.fromkeys(
        "granite granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared".split(),
        LogitRule("1/logits_scaling"),
    ),
    "falcon_h1": LogitRule("lm_head_multiplier"),
    "hyperclovax": LogitRule("logits_scaling"),
}


@dataclass(frozen=True)
class ModelHead:
    """The map from final hidden states to logits: softcap(logit_scale * (weight h + bias)).

    Args:
        weight: (vocab, hidden). With an adapter: the sum with the adapter's product, with gradient.
        bias: (vocab,) or None.
        softcap: cap of the tanh soft-cap (Gemma), > 0. None: no cap.
        logit_scale: factor of the logits before the cap (Cohere), > 0.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    softcap: float | None
    logit_scale: float

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `tokfuse.policy_step` and `tokfuse.linear_token_stats`."""
        return {"weight": self.weight, "bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}


def head_of(model: Any) -> ModelHead:
    """Return the current head of a causal language model. Call it again after every update.

    Under DeepSpeed ZeRO-3 this gathers the head, a collective of all ranks.

    Raises:
        ValueError: a model type, head or adapter for which the logits would differ from the model's; a head that FSDP
            shards and has not gathered.
    """
    layer = transformers_model(model).get_output_embeddings()
    if fsdp.is_unit(layer) or hasattr(getattr(layer, "weight", None), "full_tensor"):  # a unit, or a DTensor
        raise refuse(
            f"{OP}.head_of",
            "lm_head.weight",
            "a plain tensor (the gradient of a shard that is gathered here would not be averaged over the ranks)",
            f"sharded by FSDP, in a {type(layer).__name__}",
            "Call the model after hf.install, or shard the lm_head with the root unit and call head_of in its forward.",
        )
    return gathered_head(model)


def gathered_head(model: Any) -> ModelHead:
    """Return the head inside the forward that FSDP has gathered it for. Under ZeRO-3 this gathers it."""
    head = stored_head(model)
    weight, bias = zero3.gathered(head.weight, head.bias)
    assert weight is not None
    return replace(head, weight=weight, bias=bias)


def _nearest(kind: str) -> str:
    """Return the supported types with the most similar names, for an error message."""
    found = difflib.get_close_matches(kind, SUPPORTED, n=3)
    return f" (nearest: {', '.join(found)})" if found else ""


def stored_head(model: Any) -> ModelHead:
    """Return the head with the parameters as they are, without a collective."""
    model = transformers_model(model)
    config = model.config.get_text_config()
    kind = model.config.model_type
    if kind not in SUPPORTED:
        raise refuse(
            f"{OP}.head_of",
            "the model type",
            f"one of the {len(SUPPORTED)} in {OP}.SUPPORTED{_nearest(kind)}",
            repr(kind),
            "Use causal_lm_loss, which takes logits.",
        )
    weight, bias = _weight_and_bias(model.get_output_embeddings())
    rule = SUPPORTED[kind]
    scale = float(getattr(config, rule.scale.removeprefix("1/"))) if rule.scale else 1.0
    cap = getattr(config, "final_logit_softcapping", None) if rule.softcap else None
    return ModelHead(weight, bias, cap, 1.0 / scale if rule.scale.startswith("1/") else scale)


def transformers_model(model: Any) -> Any:
    """Return the transformers model inside the wrappers of PEFT, DDP, DataParallel, FSDP1 and torch.compile."""
    while (inner := _inside(model)) is not model:
        model = inner
    if not hasattr(getattr(model, "config", None), "get_text_config"):
        raise refuse(
            OP,
            "model",
            "a causal language model of transformers, or one in a wrapper of PEFT, DDP, FSDP or torch.compile",
            f"a {type(model).__name__}",
            "Pass the model itself.",
        )
    return model


def _inside(model: Any) -> Any:
    """Return what a wrapper contains. The model itself if it is no wrapper."""
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        return model.get_base_model()
    if isinstance(model, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel):
        return model.module
    if "_orig_mod" in getattr(model, "_modules", {}):  # torch.compile
        return model._orig_mod
    return fsdp.unwrapped(model)


def check_own_forward(op: str, model: Any) -> None:
    """Raise ValueError if the class of the model has a forward that transformers does not define."""
    home = type(model).forward.__module__
    if not home.startswith("transformers."):
        raise refuse(
            op,
            f"{type(model).__name__}.forward",
            "a forward of transformers (the patch computes the loss in its place, so other code would not run)",
            f"a function of {home}",
            f"Remove that forward, or use {OP}.causal_lm_loss, which takes logits.",
        )


def check_own_loss(model: Any, ours: Any) -> None:
    """Raise ValueError if the model's loss function is neither transformers' cross entropy nor `ours`."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    found = model.loss_function
    if found is not ForCausalLMLoss and found is not ours:
        raise refuse(
            OP,
            "model.loss_function",
            "transformers' ForCausalLMLoss (the patch computes this loss from hidden states, and calls no function)",
            getattr(found, "__qualname__", repr(found)),
            f"Call {OP}.uninstall(model) to use your loss.",
        )


def _weight_and_bias(head: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return weight and bias of a linear layer. With PEFT, the weight includes the adapters."""
    if fsdp.unwrapped(head) is not head:
        if _has_hooks(head):
            raise _refuse_call("hooks on its FSDP wrapper")
        return _weight_and_bias(fsdp.unwrapped(head))
    if hasattr(head, "modules_to_save"):  # PEFT trains a copy of the whole layer
        active = head.active_adapters
        if head.disable_adapters or not active:
            return _weight_and_bias(head.original_module)
        return _weight_and_bias(head.modules_to_save[active[0]])
    if hasattr(head, "get_base_layer"):
        weight, bias = _weight_and_bias(head.get_base_layer())
        return _with_lora(head, weight), bias
    if not isinstance(head, torch.nn.Linear) or not head.weight.is_floating_point():
        raise refuse(
            f"{OP}.head_of",
            "lm_head",
            "a floating torch.nn.Linear, plain or with LoRA",
            type(head).__name__,
            "Use causal_lm_loss, which takes logits.",
        )
    _check_call(head)
    return head.weight, head.bias


def _check_call(head: torch.nn.Linear) -> None:
    """Raise an error if calling the layer does more than its matrix product."""
    hook = getattr(head, "_hf_hook", None)  # accelerate's device_map; it moves tensors, and offloads if asked
    moved = hook is not None and not getattr(hook, "offload", False)
    if type(head).forward is not torch.nn.Linear.forward or ("forward" in vars(head) and not moved):
        raise _refuse_call("a forward of its own")
    if _has_hooks(head):
        raise _refuse_call("hooks")


def _has_hooks(layer: torch.nn.Module) -> bool:
    """Return whether a layer has hooks, except those of FSDP2 and DeepSpeed, which gather and change no value."""
    hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return any(
        not defined_in(hook).startswith(("torch.distributed.fsdp.", "deepspeed."))
        for kind in hooks
        for hook in kind.values()
    )


def _refuse_call(changed: str) -> ValueError:
    return refuse(
        f"{OP}.head_of",
        "lm_head",
        "a linear layer without hooks and with torch's forward (tokfuse reads its weight and does not call it)",
        changed,
        "For a float32 head make its parameters float32; otherwise use causal_lm_loss, which takes logits.",
    )


def _with_lora(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    """Return weight + the scaled products of the active adapters, differentiable in the adapters."""
    if layer.disable_adapters or layer.merged:
        return weight
    if any(zero3.is_partitioned(x) for x in layer.parameters()):
        raise _refuse_adapter("absent under DeepSpeed ZeRO-3 (its product needs all of its parts)", "LoRA")
    for name in layer.active_adapters:
        if name not in getattr(layer, "lora_A", {}):
            if any(name in getattr(layer, part, {}) for part in layer.adapter_layer_names):
                raise _refuse_adapter("a LoRA adapter of a linear layer", type(layer).__name__)
            continue
        dropout = layer.lora_dropout[name]
        if layer.training and isinstance(dropout, torch.nn.Dropout) and dropout.p > 0:
            raise _refuse_adapter("without dropout (its mask is drawn inside the layer)", f"lora_dropout={dropout.p}")
        if name in getattr(layer, "lora_variant", {}) or layer.lora_bias.get(name, False):
            raise _refuse_adapter("plain LoRA", "a variant (DoRA, a bias, ...)")
        weight = weight + layer.get_delta_weight(name).to(weight.dtype)
    return weight


def _refuse_adapter(want: str, actual: str) -> ValueError:
    return refuse(f"{OP}.head_of", "the adapter of lm_head", want, actual, "Remove lm_head from target_modules.")


def shape_of_head(model: Any) -> torch.Size:
    """Return (vocab, hidden), also while the weight is sharded."""
    weight = stored_head(model).weight
    if weight.ndim == 2:
        return zero3.shape_of(weight)
    layer = fsdp.unwrapped(transformers_model(model).get_output_embeddings())  # FSDP1 flattens the weight
    return torch.Size((layer.out_features, layer.in_features))


def transformer_of(model: Any) -> Any:
    """Return the model without its head."""
    base = model.base_model
    return model.model if base is model else base  # Llama 4 names another attribute as its base
