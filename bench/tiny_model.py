"""A tiny saved language model with a word-level tokenizer, for runs that need a complete trainer."""

import functools
import tempfile
from typing import Any

import torch

WORDS = 48
SPECIAL = ("<pad>", "<eos>", "<unk>")


@functools.cache
def saved_model(tied: bool = True) -> str:
    """Return the folder of a two-layer Qwen2 with random weights. It is created once per process."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(SPECIAL) + WORDS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        initializer_range=0.2,
    )
    folder = tempfile.mkdtemp(prefix="tokfuse-tiny-")
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def tokenizer() -> Any:
    """Return a tokenizer with the words w0, w1, ... and three special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate([*SPECIAL, *(f"w{i}" for i in range(WORDS))])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def prompts(count: int = 8) -> list[str]:
    """Return prompts of different lengths."""
    return [" ".join(f"w{(7 * i + j) % WORDS}" for j in range(2 + i % 3)) for i in range(count)]
