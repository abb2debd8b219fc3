"""A language model with two layers that a test can train and differentiate in milliseconds."""

import torch
import transformers


def tiny_llama(vocab: int = 61) -> transformers.LlamaForCausalLM:
    """Return a model with the same weights in each call."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).eval()
