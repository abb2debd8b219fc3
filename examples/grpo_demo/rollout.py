"""Samples completions, scores them, and packs the tokens that count.

Shapes: P prompts, G samples per prompt, S = P * G sequences, N new tokens, L prompt length, T packed tokens, H hidden
size. Sequence s belongs to prompt s // G.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpo_demo.task import Question, kept_length


@dataclass(frozen=True)
class Rollout:
    """One batch of scored completions.

    Args:
        prompt: (P, L) int64, padded on the left.
        prompt_mask: (P, L) int64, 0 on padding.
        completion: (S, N) int64.
        length: (S,) int64. Number of leading tokens of each completion that count.
        reward: (S,) float32.
        texts: the S completions as text, for inspection.
    """

    prompt: Tensor
    prompt_mask: Tensor
    completion: Tensor
    length: Tensor
    reward: Tensor
    texts: list[str]

    @property
    def group_size(self) -> int:
        return len(self.completion) // len(self.prompt)

    @property
    def group_ids(self) -> Tensor:
        """(S,) int64. Prompt of each sequence."""
        return torch.arange(len(self.prompt)).repeat_interleave(self.group_size)

    @property
    def kept(self) -> Tensor:
        """(S, N) bool. True on the counting tokens; indexing with it packs a padded tensor."""
        return torch.arange(self.completion.shape[1]) < self.length[:, None]

    @property
    def target(self) -> Tensor:
        """(T,) int64. The packed completion tokens."""
        return self.completion[self.kept]

    @property
    def cu_seqlens(self) -> Tensor:
        """(S + 1,) int32. Offset of each sequence in the packed tokens; the last entry is T."""
        return torch.nn.functional.pad(self.length.cumsum(0), (1, 0)).to(torch.int32)

    def sequences(self, groups: Tensor) -> Tensor:
        """Return the sequences of the prompts `groups`, (count,) int64, as (count * group size,) int64."""
        return torch.arange(len(self.completion)).view(-1, self.group_size)[groups].flatten()

    def select(self, groups: Tensor) -> "Rollout":
        """Return the batch with only the prompts `groups`, (count,) int64, and their completions."""
        rows = self.sequences(groups)
        return Rollout(
            self.prompt[groups],
            self.prompt_mask[groups],
            self.completion[rows],
            self.length[rows],
            self.reward[rows],
            [self.texts[row] for row in rows.tolist()],
        )


def collect(model: Any, tokenizer: Any, task: Any, questions: list[Question], group_size: int, new: int) -> Rollout:
    """Sample `group_size` completions of `new` tokens for each question, and score them."""
    prompt, prompt_mask = encode(tokenizer, [question.prompt for question in questions])
    completion = sample(model, prompt, prompt_mask, group_size, new)
    pieces = [[tokenizer.decode([token]) for token in row] for row in completion.tolist()]
    length = torch.tensor([kept_length(row) for row in pieces])
    texts = [tokenizer.decode(row) for row in completion.tolist()]
    reward = [task.score(text, questions[i // group_size]) for i, text in enumerate(texts)]
    return Rollout(prompt, prompt_mask, completion, length, torch.tensor(reward), texts)


def encode(tokenizer: Any, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Return token ids and mask, (P, L) each, padded on the left so that all prompts end at the same position."""
    rows = [tokenizer.encode(prompt) for prompt in prompts]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, -len(row) :] = torch.tensor(row)
        mask[i, -len(row) :] = 1
    return ids, mask


@torch.no_grad()
def sample(model: Any, prompt: Tensor, mask: Tensor, group_size: int, new: int) -> Tensor:
    """Return (S, N) tokens, sampled from exactly the policy's distribution (temperature 1, no filter)."""
    # The samples of a group share their prompt: read it once, and copy its keys and values. `generate` needs at least
    # one unread token, so it reads the last one itself.
    prefix = model.model(
        prompt[:, :-1], attention_mask=mask[:, :-1], position_ids=positions(mask)[:, :-1], use_cache=True
    )
    tokens = model.generate(
        prompt.repeat_interleave(group_size, 0),
        attention_mask=mask.repeat_interleave(group_size, 0),
        **repeated_cache(prefix, group_size),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=new,
        eos_token_id=None,  # always generate `new` tokens; a completion ends with the newline
    )
    return tokens[:, prompt.shape[1] :]


def completion_hidden(model: Any, rollout: Rollout) -> Tensor:
    """Return the packed final hidden states, (T, H). Row t is the state that predicts `rollout.target[t]`.

    Each prompt is read once per group, not once per sample. Gradients flow through the shared part.
    """
    group_size = rollout.group_size
    mask = rollout.prompt_mask
    prompt = model.model(rollout.prompt, attention_mask=mask, position_ids=positions(mask), use_cache=True)
    first = prompt.last_hidden_state[:, -1:].repeat_interleave(group_size, 0)

    inputs = rollout.completion[:, :-1]
    mask = torch.cat([mask.repeat_interleave(group_size, 0), torch.ones_like(inputs)], 1)
    rest = model.model(
        inputs,
        attention_mask=mask,
        position_ids=positions(mask)[:, -inputs.shape[1] :],
        **repeated_cache(prompt, group_size),
    )
    return torch.cat([first, rest.last_hidden_state], 1)[rollout.kept]


def repeated_cache(outputs: Any, times: int) -> dict[str, Any]:
    """Return the keys and values of a forward, with each row repeated, as an argument of the next forward."""
    name = "cache" if "cache" in outputs else "past_key_values"  # renamed in transformers 5.24
    outputs[name].batch_repeat_interleave(times)
    return {name: outputs[name]}


def positions(mask: Tensor) -> Tensor:
    """Return the position of each token, counted from the first one that is not padding."""
    return (mask.cumsum(1) - 1).clamp(min=0)
