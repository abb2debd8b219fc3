"""Study: how well do projected gradients rank samples like their true gradients?

    OMP_WAIT_POLICY=passive python -m tokfuse.bench.study_influence --json rows.jsonl

Model: SmolLM2-135M-Instruct after a few AdamW steps on the ranked samples, which give real Adam moments. The true
gradients are per-sample gradients of all parameters, from one backward per sample. They are compared with the features
of all layers that `influence.capture` takes from an ordinary backward, and with the sketches, the norms and the
exact adapter gradient of the last hidden state that one `policy_step` computes for all samples. There are three data
sets: answers of four task families (every sample increases the probability of its answer), rollouts of one task with
group advantages (some samples increase it, others decrease it), and the mixed pool of `study_selection`. The score of
a sample is the cosine between its gradient and the mean gradient of a validation group. Rows contain Spearman rank
correlations with the scores of the true gradients: of all layers, of the lm_head, of the last block. Rows of kind
"adam" compare with the gradients of linear layers and norms divided by sqrt(v) + eps, as Adam does. Projections are
drawn with several seeds, and the rows contain the spread. The study needs the demo's packages and about fifteen CPU
minutes; `--pool` runs one data set.
"""

import argparse
import contextlib
import fnmatch
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tokfuse.algorithms import influence as selection
from tokfuse.algorithms.adam_factors import layer_scales
from tokfuse.algorithms.capture import Captured, capture
from tokfuse.algorithms.captured_layers import ALL, chosen_layers
from tokfuse.bench import machine
from tokfuse.bench.study_pool import Sample, build_pool
from tokfuse.runtime.ops.influence import InfluenceSpec
from tokfuse.runtime.ops.linear_token_stats import linear_token_stats
from tokfuse.runtime.ops.policy_step import policy_step
from tokfuse.runtime.policy.objective import Objective
from tokfuse.runtime.policy.results import Influence
from tokfuse.runtime.policy.shapes import PPOClip

FAMILIES = ("chain_sum", "spell_backward", "word_sorting", "caesar_cipher")
SLICES = ("all", "lm_head", "last_block")
GROUP_SIZE = 4  # rollouts of one prompt
SEEDS = 3
RANKS = (4, 8, 16)  # of influence.capture
MOMENTS = ("exact", "rank 1")  # forms of Adam's second moment
POOLS = ("answers", "rollouts", "mixture")
PARTS = {"attention": "*.self_attn.*", "mlp": "*.mlp.*", "norms": "*norm", "lm_head": "lm_head"}
LINEAR = "*.layers.*_proj"  # the linear layers without the lm_head
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


class DataSet(NamedTuple):
    """Samples to rank, and validation samples in groups 0, 1, ..."""

    name: str
    train: list[Sample]
    validation: list[Sample]

    @property
    def groups(self) -> int:
        """Number of validation groups."""
        return 1 + max(s.group for s in self.validation)


# ----------------------------------------------------------------------------------------- samples


def answers(tokenizer: Any, train: int, validation: int) -> DataSet:
    """Return questions of four families with their correct answers. Each family is a validation group."""
    import reasoning_gym

    parts: tuple[list[Sample], list[Sample]] = ([], [])
    for group, family in enumerate(FAMILIES):
        entries = reasoning_gym.create_dataset(family, seed=7, size=train + validation)
        for i in range(train + validation):
            chat = [{"role": "user", "content": entries[i]["question"]}]
            prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            before = tokenizer(prompt)["input_ids"]
            after = tokenizer(entries[i]["answer"] + "<|im_end|>")["input_ids"]
            sample = Sample(torch.tensor(before + after), len(before), 1.0, group)
            parts[int(i >= train)].append(sample)
    return DataSet("answers", *parts)


def rollouts(model: Any, tokenizer: Any, train: int, validation: int) -> DataSet:
    """Return sampled completions of sums with advantage reward - group mean. Groups without advantage are left out."""
    from grpo_demo.task import ChainSum, kept_length

    task, samples, start = ChainSum(seed=1), [], 0
    torch.manual_seed(0)
    while len(samples) < train + validation:
        for question in task.questions(start, 16):
            ids = tokenizer(question.prompt, return_tensors="pt")["input_ids"]
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                max_new_tokens=6,
                num_return_sequences=GROUP_SIZE,
                pad_token_id=tokenizer.eos_token_id,
            )[:, ids.shape[1] :]
            reward = torch.tensor([task.score(tokenizer.decode(row), question) for row in out])
            for row, advantage in zip(out, reward - reward.mean(), strict=True):
                kept = kept_length([tokenizer.decode(token) for token in row])
                if advantage != 0:
                    whole = torch.cat([ids[0], row[:kept]])
                    samples.append(Sample(whole, ids.shape[1], float(advantage), 0))
        start += 16
    return DataSet("rollouts", samples[:train], samples[train : train + validation])


def mixture(tokenizer: Any, per_kind: int, validation: int) -> DataSet:
    """Return the pool of the selection study: right sums (group 0), other tasks, wrong sums. Right sums validate."""
    pool = build_pool(tokenizer, 1, per_kind=per_kind, validation=validation, held_out=1)
    return DataSet("mixture", pool.train, pool.validation)


# ---------------------------------------------------------------------------------- true gradients


class Direction(NamedTuple):
    """Scores of the true gradients.

    Args:
        cosines: (slices, samples, groups), with the means of the groups. norms: (slices, samples).
        adam: (samples, groups) by name, the same of all linear layers and norms. The gradients of the samples are
            divided by Adam's root, with the moment itself and with its rank-1 form, or not at all.
    """

    cosines: torch.Tensor
    norms: torch.Tensor
    adam: dict[str, torch.Tensor]


class TrueGradients:
    """Per-sample gradients from one backward each, stored as products with the validation means."""

    def __init__(self, model: Any) -> None:
        self.model = model
        # Make the tied head a separate leaf, so that its part of the gradient is separate.
        self.head = model.lm_head.weight.detach().clone().requires_grad_()
        self.names = [name for name, _ in model.named_parameters()] + ["lm_head"]
        last = len(model.model.layers) - 1
        self.in_last_block = [f".layers.{last}." in name for name in self.names]
        self.embedding = self.names.index("model.embed_tokens.weight")

    def hidden(self, sample: Sample) -> torch.Tensor:
        """Return (response tokens, hidden): the hidden states from which the head predicts these tokens."""
        states = self.model.model(sample.ids.unsqueeze(0)).last_hidden_state[0]
        return states[sample.prompt - 1 : -1]

    def loss(self, sample: Sample) -> torch.Tensor:
        """Return -advantage * mean log-prob of the response."""
        stats = linear_token_stats(self.hidden(sample), self.head, sample.ids[sample.prompt :])
        return -sample.advantage * stats.logp.mean()

    def gradient(self, sample: Sample) -> list[torch.Tensor]:
        """Return d loss / d parameter for every parameter. The embedding's gradient is the sum over its two uses."""
        leaves = [*self.model.parameters(), self.head]
        grads = list(torch.autograd.grad(self.loss(sample), leaves))
        grads[self.embedding] = grads[self.embedding] + grads[-1]
        return grads

    def slices(self, each: torch.Tensor) -> torch.Tensor:
        """Return (slices, ...), the sums of (parameters, ...) products over the parameters of each of SLICES."""
        block = torch.tensor(self.in_last_block)
        return torch.stack([each[:-1].sum(0), each[-1], each[block].sum(0)])

    def scores(self, data: DataSet, optimizer: Any, captures: "Captures | None" = None) -> Direction:
        """Return the scores of the true gradients. `captures` records the same backward passes."""
        roots = adam_roots(self, optimizer)
        linear = torch.tensor([i in roots for i in range(len(self.names))])
        with contextlib.ExitStack() as stack:
            for each in captures.validation if captures else []:
                stack.enter_context(each)
            # (groups, numbers) for each parameter, sums over the validation samples
            stacked = [torch.zeros(data.groups, p.numel()) for p in [*self.model.parameters(), self.head]]
            for sample in data.validation:  # in this order, which is the order of the captured features
                for total, g in zip(stacked, self.gradient(sample), strict=True):
                    total[sample.group] += g.flatten()
        squares = torch.stack([m.square().sum(1) for m in stacked]).double()
        sizes = self.slices(squares).sqrt()
        rows, norms, adam = [], [], []
        with contextlib.ExitStack() as stack:
            for each in captures.train if captures else []:
                stack.enter_context(each)
            for sample in data.train:
                grad = [g.flatten() for g in self.gradient(sample)]
                products = torch.stack([m @ g for m, g in zip(stacked, grad, strict=True)]).double()
                own = torch.stack([g @ g for g in grad]).double()
                norms.append(self.slices(own).sqrt())
                rows.append(self.slices(products) / norms[-1][:, None] / sizes)
                found = [products[linear].sum(0) / own[linear].sum().sqrt()]
                for kind in range(len(MOMENTS)):
                    of_kind = {i: grad[i] * roots[i][kind] for i in roots}
                    product = sum((stacked[i] @ g).double() for i, g in of_kind.items())
                    found.append(product / sum((g @ g).double() for g in of_kind.values()).sqrt())
                adam.append(torch.stack(found) / squares[linear].sum(0).sqrt())
        names = ("none", *MOMENTS)
        by_name = dict(zip(names, torch.stack(adam, 1), strict=True))
        return Direction(torch.stack(rows, 1), torch.stack(norms, 1), by_name)


def adam_roots(true: TrueGradients, optimizer: Any) -> dict[int, list[torch.Tensor]]:
    """Return 1 / (sqrt(v) + eps) of each weight, flat, by its index: with v itself, and with its rank-1 form.

    Only linear layers and norms: the weights that `capture` has.
    """
    found = {}
    for layer in chosen_layers(true.model, ALL):
        state, group = optimizer.state[layer.weight], optimizer.param_groups[0]
        moment = state["exp_avg_sq"] / (1.0 - group["betas"][1] ** float(state["step"]))
        out, inner = layer_scales(layer, optimizer)
        exact = 1.0 / (moment.sqrt() + group["eps"])
        at = true.names.index("lm_head" if layer.name == "lm_head" else f"{layer.name}.weight")
        found[at] = [exact.flatten(), (out[:, None] * inner).float().flatten()]
    return found


def warm_up(model: Any, samples: Sequence[Sample], steps: int, batch: int = 4, lr: float = 1e-5) -> Any:
    """Train the model for a few AdamW steps on random samples. Return the optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist()
    for step in range(steps):
        optimizer.zero_grad()
        for i in range(batch):
            sample = samples[order[(step * batch + i) % len(samples)]]
            hidden = model.model(sample.ids.unsqueeze(0)).last_hidden_state[0, sample.prompt - 1 : -1]
            stats = linear_token_stats(hidden, model.lm_head.weight, sample.ids[sample.prompt :])
            (-sample.advantage * stats.logp.mean() / batch).backward()
        optimizer.step()
    optimizer.zero_grad()
    return optimizer


# ------------------------------------------------------------------------------------- by-products


class Packed(NamedTuple):
    """The final hidden states of all samples, response tokens only, concatenated."""

    hidden: torch.Tensor
    cu_seqlens: torch.Tensor
    samples: list[Sample]

    def by_products(self, weight: torch.Tensor, rank: int | None, seed: int) -> Influence:
        """Return the influence outputs of one policy_step over all samples."""
        target = torch.cat([s.ids[s.prompt :] for s in self.samples])
        step = policy_step(
            hidden=self.hidden,
            weight=weight,
            target=target,
            old_logp=linear_token_stats(self.hidden, weight, target).logp,
            advantage=torch.tensor([s.advantage for s in self.samples]),
            advantage_level="sequence",
            objective=Objective(shape=PPOClip(), aggregation="seq_mean_token_mean"),
            cu_seqlens=self.cu_seqlens,
            influence=InfluenceSpec(rank=rank, seed=seed),
        )
        assert step.influence is not None
        return step.influence

    def means(self) -> torch.Tensor:
        """Return (samples, hidden), the mean hidden state of each sample."""
        return torch.stack([h.mean(0) for h in self.hidden.split(self.cu_seqlens.diff().tolist())])


def pack(true: TrueGradients, samples: list[Sample]) -> Packed:
    """Run one forward pass of the model per sample."""
    with torch.no_grad():
        hidden = [true.hidden(s) for s in samples]
    cu_seqlens = torch.tensor([0, *(h.shape[0] for h in hidden)]).cumsum(0).int()
    return Packed(torch.cat(hidden), cu_seqlens, samples)


def group_means(features: torch.Tensor, samples: Sequence[Sample], groups: int) -> torch.Tensor:
    """Return (groups, ...), the sums of the features of each group's samples."""
    ids = torch.tensor([s.group for s in samples])
    return torch.stack([features[ids == group].sum(0) for group in range(groups)])


class Sketches:
    """Sketches of one data set. The forward passes run once."""

    def __init__(self, true: TrueGradients, data: DataSet) -> None:
        self.data, self.weight = data, true.head.detach()
        self.train, self.validation = (pack(true, part) for part in (data.train, data.validation))

    def scores(self, rank: int | None, seed: int) -> torch.Tensor:
        """Return (samples, groups) cosines of sketches."""
        train, validation = (
            part.by_products(self.weight, rank, seed).sketches for part in (self.train, self.validation)
        )
        return self.against_groups(train, validation)

    def against_groups(self, train: torch.Tensor, validation: torch.Tensor) -> torch.Tensor:
        """Return (samples, groups) cosines of features with the means of the groups."""
        means = group_means(validation, self.data.validation, self.data.groups)
        return selection.matrix(train, means)


class Captures:
    """Features of all layers for several ranks and seeds, from the backward passes of the true gradients.

    Args:
        model: the model.
        data: its samples.
        optimizer: whose second moments precondition the features of the train samples in `adam`, for seed 0.
    """

    def __init__(self, model: Any, data: DataSet, optimizer: Any) -> None:
        self.data, self.ordinary = data, [layer.name for layer in chosen_layers(model, None)]
        keys = [(rank, seed) for rank in RANKS for seed in range(SEEDS)]
        self._validation = {(rank, seed): Opened(capture(model, rank, ALL, seed)) for rank, seed in keys}
        self._plain = {(rank, seed): Opened(capture(model, rank, ALL, seed)) for rank, seed in keys}
        self._adam = {(rank, 0): Opened(capture(model, rank, ALL, optimizer=optimizer)) for rank in RANKS}
        self.validation = list(self._validation.values())
        self.train = [*self._plain.values(), *self._adam.values()]

    def scores(self, rank: int, part: str | None = None, *, seed: int = 0, adam: bool = False) -> torch.Tensor:
        """Return (samples, groups) cosines with the means of the groups.

        Args:
            rank, seed: of the features.
            part: pattern of the names of the layers. None: those that `capture` takes by default.
            adam: divide the gradients of the samples by Adam's root.
        """
        key = (rank, seed)
        train, validation = (self._adam if adam else self._plain)[key].captured, self._validation[key].captured
        names = self.ordinary if part is None else fnmatch.filter(train.names, part)
        left, right = (torch.cat([x.layer(n).flatten(1) for n in names], 1) for x in (train, validation))
        return selection.matrix(left, group_means(right, self.data.validation, self.data.groups))


class Opened(contextlib.AbstractContextManager[None]):
    """A capture that keeps its features after it closes."""

    captured: Captured

    def __init__(self, capturing: capture) -> None:
        self._capturing = capturing

    def __enter__(self) -> None:
        self.captured = self._capturing.__enter__()

    def __exit__(self, *args: Any) -> None:
        self._capturing.__exit__(*args)


def sample_norms(norms: torch.Tensor, cu: torch.Tensor) -> torch.Tensor:
    """Return the root of the sum of squares over the tokens of each sequence."""
    parts = norms.double().square().split(cu.diff().tolist())
    return torch.stack([p.sum().sqrt() for p in parts])


# ------------------------------------------------------------------------------------------ report


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the rank correlation. Ties are not averaged, because continuous scores have almost none."""
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def alike(data: DataSet, group: int) -> list[torch.Tensor]:
    """Return sets of samples that are hard to distinguish: those of the group; with rollouts, those of one sign."""
    if all(s.advantage > 0 for s in data.train):
        return [torch.tensor([s.group == group for s in data.train])]
    up = torch.tensor([s.advantage > 0 for s in data.train])
    return [up, ~up]


def agreement(scores: torch.Tensor, truth: torch.Tensor, data: DataSet) -> tuple[float, float]:
    """Return the mean Spearman correlation over groups, for all samples and for the samples of `alike`."""
    over_all, within = [], []
    for group in range(data.groups):
        x, y = scores[:, group], truth[:, group]
        over_all.append(spearman(x, y))
        within += [spearman(x[chosen], y[chosen]) for chosen in alike(data, group)]
    return sum(over_all) / len(over_all), sum(within) / len(within)


@dataclass(frozen=True)
class StudyRow:
    """Agreement of one score with one slice of the true gradients.

    Args:
        data, samples, groups: the data set, the number of ranked samples and of validation groups.
        kind: "direction" compares cosines with the mean of a group, "adam" the same for gradients divided by
            Adam's root, "magnitude" compares norms.
        score, slice: the score that ranks the samples, and the true gradients that it is compared with.
        spearman: rank correlation over all samples, mean over groups and seeds.
        spearman_alike: the same among samples of one family, or with one sign of the advantage.
        spearman_low, spearman_high: range of `spearman` over the seeds of the projections.
        seeds: number of seeds; 1 if nothing is drawn.
    """

    data: str
    samples: int
    groups: int
    kind: str
    score: str
    slice: str
    spearman: float
    spearman_alike: float | None
    spearman_low: float
    spearman_high: float
    seeds: int
    model: str
    cpu_model: str
    threads: int
    torch: str
    commit: str


def rows(true: TrueGradients, data: DataSet, optimizer: Any, facts: dict[str, Any]) -> Iterator[StudyRow]:
    """Return a row for every score and every slice of the true gradients. optimizer: with the Adam moments."""
    captures = Captures(true.model, data, optimizer)
    cosines, norms, adam = true.scores(data, optimizer, captures)
    sketches = Sketches(true, data)
    kept = {key: facts[key] for key in ("cpu_model", "threads", "torch", "commit")}

    def row(kind: str, score: str, slice_: str, found: list[tuple[float, float | None]]) -> StudyRow:
        over_all = [pair[0] for pair in found]
        alike_ = [pair[1] for pair in found if pair[1] is not None]
        return StudyRow(
            data.name,
            len(data.train),
            data.groups,
            kind,
            score,
            slice_,
            mean(over_all),
            mean(alike_) if alike_ else None,
            min(over_all),
            max(over_all),
            len(found),
            "SmolLM2-135M-Instruct",
            **kept,
        )

    found_directions = directions(sketches, cosines) | captured_directions(captures)
    for name, scores in found_directions.items():
        for i, slice_ in enumerate(SLICES):
            yield row("direction", name, slice_, [agreement(s, cosines[i], data) for s in scores])
    for name, score in adam_directions(captures, adam).items():
        yield row("adam", name, "linear layers and norms", [agreement(score, adam["exact"], data)])
    for name, values in magnitudes(sketches).items():
        for i, slice_ in enumerate(SLICES):
            yield row("magnitude", name, slice_, [(spearman(values, norms[i]), None)])


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def directions(sketches: Sketches, cosines: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """Return (samples, groups) scores by name, one tensor per seed. Controls use no sketch."""
    mean_hidden = sketches.against_groups(sketches.train.means(), sketches.validation.means())
    return {
        "adapter gradient, no projection": [sketches.scores(None, 0)],
        **{f"sketch, rank {rank}": [sketches.scores(rank, seed) for seed in range(SEEDS)] for rank in (16, 64, 256)},
        "control: mean hidden state, no gradient": [mean_hidden],
        **{f"control: true gradient of {n}": [cosines[i]] for i, n in enumerate(SLICES) if i},
    }


def captured_directions(captures: Captures) -> dict[str, list[torch.Tensor]]:
    """Return (samples, groups) scores of `influence.capture` by name, one tensor per seed.

    "capture" has the default layers. The others have the lm_head as well, no norms, or one group of layers.
    """

    def of_seeds(rank: int, part: str | None) -> list[torch.Tensor]:
        return [captures.scores(rank, part, seed=seed) for seed in range(SEEDS)]

    return {
        **{f"capture, rank {rank}": of_seeds(rank, None) for rank in RANKS},
        **{f"capture with the lm_head, rank {rank}": of_seeds(rank, "*") for rank in RANKS},
        **{f"capture without norms, rank {rank}": of_seeds(rank, LINEAR) for rank in RANKS},
        **{f"capture of the {name} only, rank 8": of_seeds(8, part) for name, part in PARTS.items()},
    }


def adam_directions(captures: Captures, adam: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return (samples, groups) scores by name, to compare with the scores of the exact Adam direction."""
    return {
        **{f"capture with the optimizer, rank {rank}": captures.scores(rank, adam=True) for rank in RANKS},
        **{
            f"capture with the optimizer and the lm_head, rank {rank}": captures.scores(rank, "*", adam=True)
            for rank in RANKS
        },
        "true gradient, rank-1 moment": adam["rank 1"],
        "capture without the optimizer, rank 8": captures.scores(8),
        "true gradient without a moment": adam["none"],
    }


def magnitudes(sketches: Sketches) -> dict[str, torch.Tensor]:
    """Return (samples,) norms by name. They measure the size of a sample's gradient, not its direction."""
    out, cu = sketches.train.by_products(sketches.weight, 64, 0), sketches.train.cu_seqlens
    return {
        "token_norms": sample_norms(out.token_norms, cu),
        "head_norms": sample_norms(out.head_norms, cu),
        "hidden_norms": sample_norms(out.hidden_norms, cu),
        "norm of the sketch": torch.linalg.vector_norm(out.sketches.flatten(1), dim=1),
    }


def table(found: Sequence[StudyRow], kind: str) -> str:
    """Return one Markdown table. The values in brackets are the range over seeds, or the correlation of `alike`."""
    cells: dict[tuple[str, str], list[str]] = {}
    slices = list(dict.fromkeys(row.slice for row in found if row.kind == kind))
    for row in found:
        if row.kind == kind:
            text = f"{row.spearman:.2f}"
            if row.seeds > 1:
                text += f" ({row.spearman_low:.2f} to {row.spearman_high:.2f})"
            if row.spearman_alike is not None:
                text += f", alike {row.spearman_alike:.2f}"
            cells.setdefault((row.data, row.score), []).append(text)
    lines = ["| data | score | " + " | ".join(slices) + " |", "| --- " * (2 + len(slices)) + "|"]
    lines += [f"| {data} | {score} | {' | '.join(texts)} |" for (data, score), texts in cells.items()]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study, append its rows to --json and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--train", type=int, default=12, help="answers to rank, per family")
    parser.add_argument("--validation", type=int, default=4, help="validation answers, per family")
    parser.add_argument("--rollouts", type=int, default=40, help="rollouts to rank")
    parser.add_argument("--per-kind", type=int, default=16, help="samples of each kind of the mixture to rank")
    parser.add_argument("--pool", choices=POOLS, nargs="+", default=POOLS, help="data sets")
    parser.add_argument("--warm-steps", type=int, default=8, help="AdamW steps before the study")
    parser.add_argument("--cache", type=Path, default=None, help="folder of the converted model")
    parser.add_argument("--json", type=Path, help="append each row as a JSON line when it is ready")
    args = parser.parse_args(argv)
    sys.path.insert(0, str(EXAMPLES))
    from grpo_demo.model import default_cache, load_model

    model, tokenizer = load_model(args.cache or default_cache())
    model.eval()
    facts, found = machine.facts("study_influence"), []
    start = {name: value.clone() for name, value in model.state_dict().items()}
    build = {
        "answers": lambda: answers(tokenizer, args.train, args.validation),
        "rollouts": lambda: rollouts(model, tokenizer, args.rollouts, args.rollouts // 2),
        "mixture": lambda: mixture(tokenizer, args.per_kind, args.per_kind // 2),
    }
    for name in args.pool:
        model.load_state_dict(start)
        data = build[name]()
        optimizer = warm_up(model, data.train, args.warm_steps)
        for row in rows(TrueGradients(model), data, optimizer, facts):
            found.append(row)
            if args.json:
                with args.json.open("a", encoding="utf-8") as sink:
                    print(json.dumps(asdict(row)), file=sink)
    print(*(table(found, kind) for kind in ("direction", "adam", "magnitude")), sep="\n\n")


if __name__ == "__main__":
    main()
