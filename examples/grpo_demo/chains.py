"""Sums that are solved line by line, and a model that writes and scores such chains. Shared by the system examples.

    4 + 3 + 2           the question
    4 + 3 = 7           a step; each line is one
    7 + 2 = 9           the last step ends with the answer

Shapes: S sequences, T packed response tokens, H hidden size.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

# Spinning idle OpenMP threads slow down the working thread. OpenMP reads this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_DISABLE", "1")

import numpy as np
import torch
from torch import Tensor

import tokfuse
from grpo_demo.model import default_cache, load_model
from grpo_demo.rollout import encode, positions
from tokfuse.algorithms import PreferenceBatch, PreferenceLoss, PreferenceStep, preference_step


@dataclass(frozen=True)
class Sum:
    """A question.

    Args:
        terms: the numbers to add.
    """

    terms: tuple[int, ...]

    @property
    def text(self) -> str:
        return " + ".join(map(str, self.terms))

    @property
    def answer(self) -> int:
        return sum(self.terms)

    @property
    def steps(self) -> list[str]:
        """The lines of the correct chain."""
        totals = np.cumsum(self.terms).tolist()
        return [f"{a} + {b} = {c}" for a, b, c in zip(totals, self.terms[1:], totals[1:], strict=False)]

    def right(self, response: str) -> bool:
        """Return whether the last number of the response is the answer."""
        numbers = re.findall(r"\d+", response)
        return bool(numbers) and int(numbers[-1]) == self.answer


def sums(seed: int, start: int, count: int, terms: int = 3) -> list[Sum]:
    """Return the questions start, start + 1, ... of an endless stream."""
    return [
        Sum(tuple(np.random.default_rng([seed, i]).integers(1, 10, terms).tolist()))
        for i in range(start, start + count)
    ]


SHOTS = tuple(Sum(terms) for terms in ((4, 3, 2), (6, 9, 1)))


def direct(question: Sum) -> str:
    """Return a prompt that asks for the answer alone."""
    return "".join(f"{shot.text} = {shot.answer}\n\n" for shot in SHOTS) + f"{question.text} ="


def decompose(question: Sum, steps: Sequence[str] = (), shots: Sequence[tuple[str, str]] = ()) -> str:
    """Return a prompt that asks for one line per step, after the given first steps.

    Args:
        question: the question.
        steps: lines that are already written.
        shots: (question, solution) pairs to show; none: `SHOTS`.
    """
    shown = shots or [(shot.text, "\n".join(shot.steps)) for shot in SHOTS]
    return "".join(f"{text}\n{solution}\n\n" for text, solution in shown) + "\n".join([question.text, *steps, ""])


def refine(question: Sum, rejected: str) -> str:
    """Return a prompt that shows a rejected answer and asks for another one."""
    wrong = [f"{shot.text} = {shot.answer + 3}\nwrong, it is = {shot.answer}\n\n" for shot in SHOTS]
    return "".join(wrong) + f"{question.text} = {rejected.strip()}\nwrong, it is ="


@dataclass(frozen=True)
class Responses:
    """Responses and their prompts, as token ids.

    Args:
        prompts: S lists.
        tokens: S lists.
    """

    prompts: list[list[int]]
    tokens: list[list[int]]

    @property
    def target(self) -> Tensor:
        """(T,) int64, the packed response tokens."""
        return torch.tensor([token for row in self.tokens for token in row], dtype=torch.int64)

    @property
    def cu_seqlens(self) -> Tensor:
        """(S + 1,) int32, the offsets of the responses."""
        lengths = torch.tensor([len(row) for row in self.tokens], dtype=torch.int64)
        return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)

    def take(self, seqs: Tensor) -> "Responses":
        """Return only these responses, in this order."""
        return Responses(*([rows[i] for i in seqs.tolist()] for rows in (self.prompts, self.tokens)))


class Writer:
    """A model with its tokenizer: samples lines, and scores them."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    def encode(self, prompts: Sequence[str], responses: Sequence[str]) -> Responses:
        """Return the tokens of texts. A response is encoded alone, as if it had been sampled."""
        return Responses(*([list(self.tokenizer.encode(text)) for text in texts] for texts in (prompts, responses)))

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[str], new: int, stop: str = "\n", started: list[list[int]] | None = None
    ) -> Responses:
        """Return one response to each prompt, up to the first token that completes `stop`, of at most `new` tokens.

        Args:
            prompts: the texts.
            new: number of tokens to sample.
            stop: text that ends a response.
            started: tokens that a response already has; they follow the prompt and are not returned.
        """
        started = started or [[] for _ in prompts]
        heads = [[*self.tokenizer.encode(p), *begun] for p, begun in zip(prompts, started, strict=True)]
        ids, mask = encode(_Encoded(), heads)
        out = self.model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=new,
            eos_token_id=None,
        )
        return Responses(heads, [self._until(row, stop) for row in out[:, ids.shape[1] :].tolist()])

    def _until(self, tokens: list[int], stop: str) -> list[int]:
        text = ""
        for count, token in enumerate(tokens, 1):
            text += self.tokenizer.decode([token])
            if stop in text:
                return tokens[:count]
        return tokens

    def branches(self, question: Sum, steps: Sequence[str], count: int, new: int = 24) -> list[list[str]]:
        """Return `count` sampled continuations of a chain that starts with `steps`, as lines."""
        out = self.sample([decompose(question, steps)] * count, new, "\n\n")
        return [[line for line in text.split("\n\n")[0].split("\n") if line] for text in self.texts(out)]

    def rate(self, question: Sum, steps: Sequence[str], count: int) -> float:
        """Return the share of right answers of `count` continuations."""
        chains = self.branches(question, steps, count)
        return sum(question.right("\n".join([*steps, *chain])) for chain in chains) / count

    def texts(self, responses: Responses) -> list[str]:
        """Return the responses as text."""
        return [self.tokenizer.decode(row) for row in responses.tokens]

    def hidden(self, responses: Responses) -> Tensor:
        """Return the packed states that predict the response tokens, (T, H)."""
        rows = [[*p, *r] for p, r in zip(responses.prompts, responses.tokens, strict=True)]
        ids, mask = encode(_Encoded(), rows)
        states = self.model.model(ids, attention_mask=mask, position_ids=positions(mask)).last_hidden_state
        return torch.cat(
            [state[ids.shape[1] - len(r) - 1 : -1] for state, r in zip(states, responses.tokens, strict=True)]
        )

    def stats(self, responses: Responses, hidden: Tensor | None = None) -> tokfuse.TokenStats:
        """Return statistics of the response tokens; differentiable if autograd is on. hidden: known states."""
        hidden = self.hidden(responses) if hidden is None else hidden
        return tokfuse.linear_token_stats(hidden, self.model.lm_head.weight, responses.target)

    def sums(self, responses: Responses) -> Tensor:
        """Return the log-probability of each response, (S,), without gradient."""
        with torch.no_grad():
            return tokfuse.segment_moments(self.stats(responses).logp, cu_seqlens=responses.cu_seqlens).sum

    def reader(self, responses: Responses) -> Callable[[Tensor, str], dict[str, Tensor]]:
        """Return the function with which `train_step` reads the model on some of these responses."""

        def forward(seqs: Tensor, source: str) -> dict[str, Tensor]:
            part = responses.take(seqs)
            return {"hidden": self.hidden(part), "weight": self.model.lm_head.weight, "target": part.target}

        return forward


class _Encoded:
    """A tokenizer of token ids, for `encode`."""

    def encode(self, tokens: list[int]) -> list[int]:
        return tokens


def train_pairs(
    writer: Writer,
    loss: PreferenceLoss,
    optimizer: torch.optim.Optimizer,
    pairs: Sequence[tuple[str, str, str]],
    level: Sequence[int] | None = None,
) -> PreferenceStep:
    """Take one optimizer step on (prompt, chosen, rejected) pairs. The reference is the policy before the step.

    Args:
        writer: the policy.
        loss: a loss of pairs.
        optimizer: of the policy.
        pairs: texts.
        level: level of each pair, for a loss with `level_weight`.
    """
    prompts, chosen, rejected = zip(*pairs, strict=True)
    sides = writer.encode([*prompts, *prompts], [*chosen, *rejected])
    order = torch.arange(2 * len(pairs)).view(2, -1).t().contiguous()
    given = {"ref_sum": writer.sums(sides)} if loss.needs_reference else {}
    if level is not None:
        given["level"] = torch.tensor(level)
    batch = PreferenceBatch(num_tokens=len(sides.target), cu_seqlens=sides.cu_seqlens, pairs=order, **given)
    step = preference_step(
        loss=loss,
        batch=batch,
        hidden=writer.hidden(sides),
        weight=writer.model.lm_head.weight,
        target=sides.target,
        normalizer="batch",
    )
    optimizer.zero_grad(set_to_none=True)
    step.loss.backward()
    optimizer.step()
    return step


def optimizer_of(model: Any, lr: float) -> torch.optim.Optimizer:
    """Return AdamW over the parameters of a model."""
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)


def main(run: Callable[..., None], steps: int, argv: Sequence[str] | None = None) -> int:
    """Run an example on SmolLM2 from the command line: run(writer, steps=..., seed=...)."""
    doc = (sys.modules[run.__module__].__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--steps", type=int, default=steps, help=f"number of steps (default {steps})")
    parser.add_argument("--seed", type=int, default=0, help="seed of the questions and of the sampling (default 0)")
    options = parser.parse_args(argv)
    torch.manual_seed(options.seed)
    run(Writer(*load_model(default_cache())), steps=options.steps, seed=options.seed)
    return 0
