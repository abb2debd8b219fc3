"""Study: which score selects useful training samples from a mixed pool, measured by held-out accuracy?

    OMP_WAIT_POLICY=passive python -m tokfuse.bench.study_selection --json rows.jsonl --budget 200
    ... repeat until it prints "complete", then with --write docs/selection_study.md --plot FILE.png

SmolLM2-135M-Instruct on one-digit sums with one solved example. The pool contains equal numbers of useful
samples (sums with correct answers), irrelevant samples (other tasks, correct answers) and mislabelled
samples (sums with wrong answers). Every score ranks the pool. The upper half of the model's blocks is
trained on the top third, and greedy accuracy is measured on held-out sums. All trainings have the same
number of steps and batch size. The gradient scores use `influence.capture` over all trained layers; the sketch of the
last hidden state is kept for comparison. Each row is written when it is done, and a second run continues after it.
The study needs the demo's packages and about three minutes of one core per seed.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tokfuse.algorithms.capture import capture
from tokfuse.algorithms.curation.influential import GREATS, LESS, UGDA
from tokfuse.algorithms.influence import top_fraction
from tokfuse.bench import machine, selection_report
from tokfuse.bench.study_influence import Packed
from tokfuse.bench.study_pool import Pool, Sample, build_pool
from tokfuse.runtime.ops.linear_token_stats import linear_token_stats

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
KINDS = ("useful", "irrelevant", "mislabelled")
ORACLE = "only useful samples"
LAYERS = ("*_proj",)  # the linear layers of the blocks, without norms


@dataclass(frozen=True)
class Settings:
    """Sizes of the study.

    Args:
        per_kind: samples of each kind in the pool. validation, held_out: number of sums with correct answers.
        blocks: number of trained blocks, from the top, with the final norm; the lm_head is frozen.
        steps, batch, lr: AdamW with weight decay 0; loss: mean over samples of the mean token NLL.
        warm_steps: steps on `warm_samples` random samples before each of LESS's two checkpoints.
        members: ensemble size of UGDA; each member is a warm-up of both parts on other samples.
        rank: rank of the captured features. sketch_rank: rank of the sketch of the last hidden state.
    """

    per_kind: int = 48
    validation: int = 24
    held_out: int = 120
    blocks: int = 15
    steps: int = 12
    batch: int = 16
    lr: float = 1e-4
    warm_steps: int = 2
    warm_samples: int = 32
    members: int = 3
    rank: int = 8
    sketch_rank: int = 64


# -------------------------------------------------------------------------------------------- model


def pad(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return (rows, longest, ...). The last element of each row is repeated.

    The padding has no effect, because causal attention only reads earlier positions.
    """
    longest = max(row.shape[0] for row in rows)
    return torch.stack([torch.cat([row, row[-1:].expand(longest - len(row), *row.shape[1:])]) for row in rows])


def buckets(lengths: Sequence[int], most: int = 32) -> list[list[int]]:
    """Return indices in groups of similar lengths, so that padding costs little."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not groups or len(groups[-1]) == most or lengths[i] > 1.5 * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(i)
    return groups


class Encoded(NamedTuple):
    """Samples and their hidden states after the frozen lower blocks."""

    samples: list[Sample]
    states: list[torch.Tensor]

    def take(self, ids: Sequence[int]) -> "Encoded":
        return Encoded([self.samples[i] for i in ids], [self.states[i] for i in ids])


def packed(rows: list[torch.Tensor], samples: list[Sample]) -> Packed:
    """Return the rows of all samples, concatenated."""
    cu_seqlens = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0).int()
    return Packed(torch.cat(rows), cu_seqlens, samples)


class Split:
    """A causal language model, split into frozen lower blocks and trainable upper blocks."""

    def __init__(self, model: Any, blocks: int) -> None:
        self.model, self.blocks = model, blocks
        self.head = model.lm_head.weight.detach()

    @torch.no_grad()
    def encode(self, samples: list[Sample]) -> Encoded:
        """Return the input of the upper blocks, computed for up to 32 samples at a time."""
        states: dict[int, torch.Tensor] = {}
        for ids in buckets([len(x.ids) for x in samples]):
            out = self.model.model(
                pad([samples[i].ids for i in ids]), output_hidden_states=True, use_cache=False
            ).hidden_states[-1 - self.blocks]
            states |= {i: row[: len(samples[i].ids)].clone() for i, row in zip(ids, out, strict=True)}
        return Encoded(samples, [states[i] for i in range(len(samples))])

    def upper(self) -> Any:
        """Return a copy of the upper blocks and the final norm, as a model over `inputs_embeds`."""
        config = copy.deepcopy(self.model.config)
        config.num_hidden_layers, config.vocab_size, config.pad_token_id = self.blocks, 1, None
        part = type(self.model.model)(config)
        source = self.model.model
        part.layers.load_state_dict(source.layers[-self.blocks :].state_dict())
        part.norm.load_state_dict(source.norm.state_dict())
        part.embed_tokens = torch.nn.Identity()  # the copy starts from hidden states, not from tokens
        return part

    def hidden(self, upper: Any, data: Encoded) -> Packed:
        """Return the hidden states from which the lm_head predicts the tokens after each prompt."""
        out = upper(inputs_embeds=pad(data.states), use_cache=False).last_hidden_state
        rows = [h[x.prompt - 1 : len(x.ids) - 1] for h, x in zip(out, data.samples, strict=True)]
        return packed(rows, data.samples)

    @torch.no_grad()
    def read(self, upper: Any, data: Encoded) -> Packed:
        """Return `hidden` of any number of samples, computed for up to 64 at a time."""
        rows: dict[int, torch.Tensor] = {}
        for ids in buckets([len(row) for row in data.states], 64):
            part = self.hidden(upper, data.take(ids))
            rows |= zip(ids, part.hidden.split(part.cu_seqlens.diff().tolist()), strict=True)
        return packed([rows[i] for i in range(len(rows))], data.samples)

    def outcome(self, answers: Packed) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (samples,) mean log-prob of the answer, differentiable, and whether greedy decoding gives the answer.

        Greedy decoding gives the answer if every token of it is the arg-max after the tokens before it.
        """
        target = torch.cat([x.ids[x.prompt :] for x in answers.samples])
        stats = linear_token_stats(answers.hidden, self.head, target)
        sizes = answers.cu_seqlens.diff().tolist()
        logp = torch.stack([part.mean() for part in stats.logp.split(sizes)])
        return logp, torch.stack([part.bool().all() for part in stats.top1.split(sizes)])

    def gradients(self, upper: Any, data: Encoded, scale: float = 1.0) -> None:
        """Add the gradient of `scale` times the sum over the samples of their mean token NLL."""
        for ids in buckets([len(row) for row in data.states]):
            loss = -self.outcome(self.hidden(upper, data.take(ids)))[0].sum()
            (scale * loss).backward()

    def sketches(self, answers: Packed, rank: int) -> torch.Tensor:
        """Return (samples, rank, rank), sketches of the last hidden state, for the mean token NLL of each sample."""
        return answers.by_products(self.head, rank, 0).sketches

    def features(self, upper: Any, data: Encoded, s: Settings, optimizer: Any = None) -> torch.Tensor:
        """Return (samples, numbers), the captured gradient of each sample's mean token NLL in all trained layers."""
        order = torch.tensor([i for ids in buckets([len(row) for row in data.states]) for i in ids])
        # The inputs carry the gradient, so the weights need none: a third of the arithmetic of a backward.
        leaves = Encoded(data.samples, [row.detach().requires_grad_() for row in data.states])
        upper.requires_grad_(False)
        with capture(upper, s.rank, LAYERS, optimizer=optimizer) as captured:
            self.gradients(upper, leaves)
        upper.requires_grad_()
        return captured.features[order.argsort()]

    def optimizer(self, upper: Any, s: Settings) -> torch.optim.Optimizer:
        """Return the AdamW of a training."""
        return torch.optim.AdamW(upper.parameters(), lr=s.lr, weight_decay=0.0)

    def train(
        self,
        upper: Any,
        data: Encoded,
        s: Settings,
        steps: int,
        seed: int,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> Any:
        """Return `upper` after optimizer steps over shuffled epochs of the data. None: a new optimizer."""
        optimizer = optimizer or self.optimizer(upper, s)
        generator, queue = torch.Generator().manual_seed(seed), []
        for _ in range(steps):
            while len(queue) < s.batch:
                queue += torch.randperm(len(data.samples), generator=generator).tolist()
            batch, queue = queue[: s.batch], queue[s.batch :]
            optimizer.zero_grad()
            self.gradients(upper, data.take(batch), 1.0 / s.batch)
            optimizer.step()
        return upper


# ------------------------------------------------------------------------------------------ ranking


def rankings(split: Split, pool: Encoded, validation: Encoded, s: Settings, seed: int) -> dict[str, list[int]]:
    """Return the third of the pool that each score selects, best first."""
    n, base = len(pool.samples), split.upper().eval()
    generator = torch.Generator().manual_seed(1000 + seed)
    order = torch.randperm(n, generator=generator)
    answers, wanted = split.read(base, pool), split.read(base, validation)
    loss = -split.outcome(answers)[0]
    own, anchors = (split.features(base, part, s) for part in (pool, validation))
    sketches, sketch_anchors = (split.sketches(part, s.sketch_rank) for part in (answers, wanted))

    warm = [torch.randperm(n, generator=generator)[: s.warm_samples].tolist() for _ in range(s.members)]
    train: list[torch.Tensor] = []
    targets: list[torch.Tensor] = []
    rewards = []
    for member, part in enumerate(warm):
        upper = split.upper()
        optimizer = split.optimizer(upper, s)
        for epoch in range(2):
            split.train(upper, pool.take(part), s, s.warm_steps, 10 * seed + epoch, optimizer)
            if member == 0:  # the two checkpoints of LESS and UGDA, with the moments of this optimizer
                train.append(split.features(upper, pool, s, optimizer))
                targets.append(split.features(upper, validation, s))
        rewards.append(split.outcome(split.read(upper.eval(), pool))[0])
    third = LESS(fraction=1 / 3)
    chosen = {
        "random": order[: n // 3],
        "lowest loss": top_fraction(-loss, 1 / 3),
        "cosine, last hidden state": third.select([sketches], [sketch_anchors]),
        "cosine, all layers": third.select([own], [anchors]),
        "LESS": third.select(train, targets),
        "GREATS": GREATS(k=n // 3, lr=s.lr).select(own, anchors),
        "UGDA": UGDA(uncertain=2 / 3, influential=1 / 2).select(torch.stack(rewards), train, targets),
        ORACLE: torch.tensor([i for i, x in enumerate(pool.samples) if x.group == 0]),
    }
    return {name: ids.tolist() for name, ids in chosen.items()}


# --------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class SelectionRow:
    """One training run.

    Args:
        ranking, seed: the score that selected the samples; the seed of the pool and of the training order.
        samples: number of selected samples. useful, irrelevant, mislabelled: their shares.
        before, after: greedy accuracy on the held-out sums.
        logp: mean log-prob of a token of the held-out answers after training, nats.
        seconds: time of the training.
    """

    ranking: str
    seed: int
    samples: int
    useful: float
    irrelevant: float
    mislabelled: float
    before: float
    after: float
    logp: float
    seconds: float
    settings: dict[str, Any]
    cpu_model: str
    threads: int
    torch: str
    commit: str


def run_seed(
    split: Split, pool: Pool, s: Settings, seed: int, done: set[str], choices: Path, deadline: float
) -> Iterator[SelectionRow]:
    """Yield the missing rows of one seed, until the deadline (`time.monotonic`).

    choices: JSON file that stores the selections of the scores, so that a later run need not compute them.
    """
    facts = machine.facts("study_selection")
    kept = {key: facts[key] for key in ("cpu_model", "threads", "torch", "commit")}
    train, held_out = split.encode(pool.train), split.encode(pool.held_out)
    if not choices.exists():
        before = split.outcome(split.read(split.upper().eval(), held_out))[1].double().mean()
        ranked = rankings(split, train, split.encode(pool.validation), s, seed)
        choices.write_text(json.dumps({"before": float(before), "chosen": ranked}))
    known = json.loads(choices.read_text())
    for name, ids in known["chosen"].items():
        if name in done:
            continue
        if time.monotonic() > deadline:
            return
        start = time.perf_counter()
        upper = split.train(split.upper(), train.take(ids), s, s.steps, seed)
        seconds = time.perf_counter() - start
        logp, hit = split.outcome(split.read(upper.eval(), held_out))
        shares = [sum(train.samples[i].group == kind for i in ids) / len(ids) for kind in range(3)]
        yield SelectionRow(
            name,
            seed,
            len(ids),
            *shares,
            known["before"],
            float(hit.double().mean()),
            float(logp.mean()),
            round(seconds, 1),
            asdict(s),
            **kept,
        )


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Return the existing rows; none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_missing(path: Path, seeds: Sequence[int], budget: float, cache: Path | None) -> None:
    """Append the rows that `path` does not contain, for about `budget` seconds."""
    deadline, s = time.monotonic() + budget, Settings()
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {seed: {r["ranking"] for r in rows_of(path) if r["seed"] == seed} for seed in seeds}
    missing = [seed for seed in seeds if len(done[seed]) < selection_report.RANKINGS]
    if not missing:
        return
    sys.path.insert(0, str(EXAMPLES))
    from grpo_demo.model import default_cache, load_model

    model, tokenizer = load_model(cache or default_cache())
    split = Split(model.eval(), s.blocks)
    for seed in missing:
        if time.monotonic() > deadline:
            return
        choices = path.with_name(f"{path.stem}-choices-{seed}.json")
        pool = build_pool(tokenizer, seed, per_kind=s.per_kind, validation=s.validation, held_out=s.held_out)
        for row in run_seed(split, pool, s, seed, done[seed], choices, deadline):
            with path.open("a", encoding="utf-8") as sink:
                print(json.dumps(asdict(row)), file=sink)
            print(f"seed {seed}  {row.ranking:<20} {row.useful:.2f} useful  {row.after:.3f}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the missing trainings, append rows to --json and write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--json", type=Path, required=True, help="file of the rows; each row is appended when it is ready"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--budget", type=float, default=float("inf"), help="seconds of this run; 0: only write the report"
    )
    parser.add_argument("--cache", type=Path, default=None, help="folder of the converted model")
    parser.add_argument("--write", type=Path, help="page; the tables replace the text between its marks")
    parser.add_argument("--plot", type=Path, help="file of the plot (PNG)")
    args = parser.parse_args(argv)
    if args.budget > 0:
        run_missing(args.json, args.seeds, args.budget, args.cache)
    rows = rows_of(args.json)
    complete = len(rows) == selection_report.RANKINGS * len(args.seeds)
    print("complete" if complete else f"{len(rows)} rows so far: run the command again")
    if args.write:
        selection_report.write(args.write, rows)
    if args.plot:
        selection_report.plot(args.plot, rows)


if __name__ == "__main__":
    main()
