"""Packed sequences: hidden states and statistics of a transformers model."""

from typing import Any

import torch

from tokfuse.integrations.hf_head import head_of, transformer_of, transformers_model
from tokfuse.runtime.core.statistics import TokenStats
from tokfuse.runtime.ops.linear_token_stats import linear_token_stats


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
    base = transformer_of(transformers_model(model))
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
