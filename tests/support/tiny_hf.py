"""Tiny models of transformers, and their loss and gradients with the head in float64."""

import contextlib
import functools
from unittest import mock

import torch
import transformers
from host_parity import assert_no_farther

V, H, B, L = 61, 16, 3, 9
SIZES = {
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
# Options that an adapter could easily ignore.
MODELS = {
    "llama": {"tie_word_embeddings": False},
    "mistral": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "phi3": {},
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1]},
    "gemma": {},
    "gemma2": {"final_logit_softcapping": 0.8, "query_pre_attn_scalar": 8, "sliding_window": 16},
    "gemma3_text": {"final_logit_softcapping": 0.8, "query_pre_attn_scalar": 8},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0},
}


def make(kind="llama", **options):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **MODELS[kind], **options})
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def batch():
    gen = torch.Generator().manual_seed(1)
    ids = torch.randint(3, V, (B, L), generator=gen)
    mask = torch.ones(B, L, dtype=torch.int64)
    mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def run(model, **more):
    model.zero_grad()
    out = model(**batch(), **more)
    out.loss.backward()
    return out, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def float64_linear(layer, x):
    bias = None if layer.bias is None else layer.bias.double()
    return torch.nn.functional.linear(x.double(), layer.weight.double(), bias)


def float64_loss(logits, labels, *_, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **__):
    if shift_labels is None:
        shift_labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    rows = shift_labels.flatten()
    total = torch.nn.functional.cross_entropy(
        logits.double().flatten(0, -2), rows, ignore_index=ignore_index, reduction="sum"
    )
    return total / ((rows != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch)


@contextlib.contextmanager
def float64_head(model):
    """Return the loss of the model's own head, in float64."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    with contextlib.ExitStack() as stack:
        for layer in model.get_output_embeddings().modules():
            if isinstance(layer, torch.nn.Linear):
                stack.enter_context(mock.patch.object(layer, "forward", functools.partial(float64_linear, layer)))
        stack.enter_context(mock.patch.object(type(model), "loss_function", staticmethod(float64_loss)))
        # Gemma 3 of transformers 5.0 rounds its logits by float() and has its own loss.
        rounded = torch.Tensor.float
        exact = mock.patch.object(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else rounded(x))
        stack.enter_context(exact)
        yield


def run_exactly(model, **more):
    with float64_head(model):
        return run(model, **more)


def assert_same(mine, theirs, exact):
    """Check that loss and gradients are no farther from the float64 model than the model's own float32 results."""
    assert exact[0].loss.dtype == torch.float64
    assert_no_farther(*(x[0].loss for x in (mine, theirs, exact)), what="loss")
    assert mine[1].keys() == theirs[1].keys() == exact[1].keys()
    for name, grad in theirs[1].items():
        # The gradient of a key projection's bias is a sum of terms that nearly cancel, because a shift of all keys
        # changes attention only by the rotation. Each term is as large as a term of the weight, and so is its error.
        weight = name.removesuffix("bias") + "weight"
        size = max(float(exact[1][n].abs().max()) for n in (name, weight) if n in exact[1] and exact[1][n].numel())
        assert_no_farther(mine[1][name], grad, exact[1][name], size=size, what=name)
