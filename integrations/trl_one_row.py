"""The forward of a TRL trainer without padding: all sequences in one row, told apart by their position ids."""

from typing import Any

import torch

from tokfuse.integrations.padded import Padding
from tokfuse.runtime.core.errors import refuse

ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")


def check_one_row(op: str, model: Any, images: bool) -> None:
    """Raise an error if the model cannot tell the sequences of one row apart.

    Args:
        op: name of the trainer, for messages.
        model: the model, without the wrappers of accelerate.
        images: whether the data has images.
    """
    attention = model.config.get_text_config()._attn_implementation
    prompts = getattr(model, "active_peft_config", None)
    for what, wrong in (
        ("an attention among " + ", ".join(ATTENTION), attention not in ATTENTION and attention),
        ("a model of attention layers", getattr(model, "_is_stateful", False) and "a recurrent model"),
        ("text", images and "images"),
        ("no virtual tokens", getattr(prompts, "is_prompt_learning", False) and "prompt-learning PEFT"),
    ):
        if wrong:
            raise refuse(op, "padding_free", f"False, or used with {what}", wrong, "Set padding_free=False.")


class OneRow:
    """A model whose padded inputs run as one row without padding. Its outputs are padded again.

    Args:
        op: name of the trainer, for messages.
        model: accepts `fused_lm_head`, and takes the borders of the sequences from `position_ids`.
    """

    def __init__(self, op: str, model: Any) -> None:
        self._op, self._model = op, model

    def __call__(self, **inputs: Any) -> Any:
        ids, labels = inputs.pop("input_ids"), inputs.pop("labels")
        kept = Padding(inputs.pop("attention_mask").bool())
        unknown = inputs.keys() - {"fused_lm_head", "use_cache", "output_router_logits"}
        if unknown:
            raise refuse(
                self._op, "padding_free", "False with other inputs of the model", sorted(unknown), "Turn it off."
            )
        position = kept.rows.cumsum(1) - 1
        labels = labels.masked_fill(position == 0, -100)  # the first token of a sequence has no prediction
        out = self._model(
            input_ids=kept.pack(ids)[None],
            position_ids=kept.pack(position)[None],
            labels=kept.pack(labels)[None],
            **inputs,
        )
        for name, x in out.items():
            if x is not None and x.dim() == 2:  # (1, tokens - 1): the prediction of each token but the first
                out[name] = kept.pad(torch.cat([x.new_zeros(1), x[0]]))[:, 1:]
        return out
