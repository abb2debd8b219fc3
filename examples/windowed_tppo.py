"""T-PPO: every step generates a fixed window of tokens, whether or not a response ends in it.

A scheduler keeps the partial responses with the log-probability that each token had when it was sampled. In each step
every slot writes one more window; a slot whose response ended gets a new question. The policy trains on the tokens of
the window. Their advantages come from the extended GAE, because most responses have no outcome yet. The critic trains
on finished responses alone.

    python examples/windowed_tppo.py           # a few minutes on two cores

The example shows the bookkeeping: the tokens per step hardly vary although the lengths differ, and the parts of a
response keep the log-probabilities of the policies that wrote them. gamma and lam have no published value.
"""

import sys
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from grpo_demo.chains import Responses, Sum, Writer, decompose, main, optimizer_of, sums

from tokfuse import algorithms
from tokfuse.algorithms import Batch, critic, train_step

STOP = "\n\n"


@dataclass(frozen=True)
class Settings:
    """Settings of a run."""

    slots: int = 16
    window: int = 8  # tokens per slot and step
    longest: int = 32  # tokens of a response; a longer one counts as wrong
    terms: int = 3
    lr: float = 5e-6
    critic_lr: float = 1e-3
    gamma: float = 1.0
    lam: float = 0.95


@dataclass
class Slot:
    """A response in progress."""

    question: Sum
    tokens: list[int] = field(default_factory=list)
    old_logp: list[float] = field(default_factory=list)
    fresh: int = 0  # tokens of this step's window, at the end of `tokens`
    finished: bool = False


class Scheduler:
    """Slots that always generate. A finished response leaves its slot before the next step."""

    def __init__(self, writer: Writer, settings: Settings, seed: int) -> None:
        self.writer, self.settings = writer, settings
        self.questions = (sums(seed, i, 1, settings.terms)[0] for i in count())
        self.slots = [Slot(next(self.questions)) for _ in range(settings.slots)]

    def advance(self) -> Responses:
        """Write one window in every slot. Return all responses, whole."""
        s = self.settings
        self.slots = [Slot(next(self.questions)) if slot.finished else slot for slot in self.slots]
        prompts = [decompose(slot.question) for slot in self.slots]
        new = self.writer.sample(prompts, s.window, STOP, [slot.tokens for slot in self.slots])
        for slot, tokens in zip(self.slots, new.tokens, strict=True):
            tokens = tokens[: s.longest - len(slot.tokens)]
            slot.tokens, slot.fresh = [*slot.tokens, *tokens], len(tokens)
            ended = STOP in self.writer.tokenizer.decode(slot.tokens)
            slot.finished = ended or len(slot.tokens) >= s.longest
        return Responses(self.writer.encode(prompts, []).prompts, [slot.tokens for slot in self.slots])

    def record(self, logp: torch.Tensor) -> torch.Tensor:
        """Keep the log-probabilities of the new tokens. Return those of all tokens, each from its own time."""
        rows = logp.split([len(slot.tokens) for slot in self.slots])
        for slot, row in zip(self.slots, rows, strict=True):
            slot.old_logp += row[len(slot.old_logp) :].tolist()
        return torch.tensor([x for slot in self.slots for x in slot.old_logp])


class Trainer:
    """Policy, critic and scheduler. The critic is a linear map of the policy's hidden states."""

    def __init__(self, writer: Writer, settings: Settings, seed: int) -> None:
        self.writer, self.settings = writer, settings
        self.scheduler = Scheduler(writer, settings, seed)
        self.method = algorithms.make("tppo", gamma=settings.gamma, lam=settings.lam)
        self.critic = torch.nn.Linear(writer.model.config.hidden_size, 1)
        torch.nn.init.zeros_(self.critic.weight)
        self.optimizer = optimizer_of(writer.model, settings.lr)
        self.critic_optimizer = optimizer_of(self.critic, settings.critic_lr)

    def batch(self, responses: Responses) -> tuple[Batch, torch.Tensor]:
        """Return all responses with the bookkeeping of the scheduler, and the policy's hidden states."""
        slots = self.scheduler.slots
        with torch.no_grad():
            hidden = self.writer.hidden(responses)
            stats, value = self.writer.stats(responses, hidden), self.critic(hidden)[:, 0]
        right = [s.question.right(t) for s, t in zip(slots, self.writer.texts(responses), strict=True)]
        window = [i >= len(s.tokens) - s.fresh for s in slots for i in range(len(s.tokens))]
        return Batch(
            reward=torch.tensor(right).float(),
            finished=torch.tensor([s.finished for s in slots]),
            window=torch.tensor(window),
            cu_seqlens=responses.cu_seqlens,
            old_logp=self.scheduler.record(stats.logp),
            value=value,
        ), hidden

    def train_critic(self, batch: Batch, hidden: torch.Tensor) -> None:
        """Take one step of the critic on the responses that finished in this window, whole."""
        keep = self.method.critic_mask(batch)
        if keep.any():
            target, value = critic.returns(batch, gamma=self.settings.gamma), self.critic(hidden)[:, 0]
            loss = critic.value_loss(value, batch.value, target, mask=keep, normalizer=float(keep.sum()))
            self.critic_optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.critic_optimizer.step()

    def step(self) -> dict[str, float]:
        """Generate a window, then train policy and critic on it. Return the figures of the step."""
        responses = self.scheduler.advance()
        batch, hidden = self.batch(responses)
        train_step(self.method, {}, batch, self.writer.reader(responses), self.optimizer)
        self.train_critic(batch, hidden)
        done, slots = batch.finished, self.scheduler.slots
        return {
            "tokens": float(batch.window.sum()),
            "finished": float(done.sum()),
            "right": float(batch.reward[done].mean()),  # NaN if none finished
            "windows": sum(-(-len(s.tokens) // self.settings.window) for s in slots) / len(slots),
            "value": float(batch.value.mean()),
        }


def run(writer: Writer, steps: int, seed: int, settings: Settings | None = None) -> None:
    """Print one row per step."""
    trainer = Trainer(writer, settings or Settings(), seed)
    print("step  tokens trained  finished  right of them  windows per response  mean value")
    form = "{:4}  {tokens:14.0f}  {finished:8.0f}  {right:13.3f}  {windows:20.2f}  {value:10.3f}"
    for i in range(steps):
        print(form.format(i, **trainer.step()), flush=True)


if __name__ == "__main__":
    sys.exit(main(run, steps=20))
