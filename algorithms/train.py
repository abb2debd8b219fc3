"""One training step of any method: every call of the protocol in `algorithms/base.py`, in order."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from tokfuse.algorithms.base import Algorithm, Plan, State
from tokfuse.algorithms.batch import Batch
from tokfuse.runtime.core.checks import check_choice, check_integer, check_number
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.ops.linear_token_stats import linear_token_stats
from tokfuse.runtime.ops.policy_step import policy_step
from tokfuse.runtime.ops.token_stats import token_stats
from tokfuse.runtime.policy.metrics import Metrics
from tokfuse.runtime.policy.results import PolicyStep

OP = "train_step"

Forward = Callable[[torch.Tensor, str], Mapping[str, Any]]
"""Function (sequences, source) -> keyword arguments of `policy_step` that describe the model's output."""

_STATISTICS_OPTIONS = ("bias", "temperature", "softcap", "logit_scale", "memory_budget")
_FROM_FORWARD = ("logits", "hidden", "weight", "target", *_STATISTICS_OPTIONS, "compact_clipped", "influence")


class TrainStep(NamedTuple):
    """The result of `train_step`."""

    state: State
    """The state of the method after the rollout. Pass it to the next call."""
    batch: Batch
    """The prepared batch, with its advantages."""
    losses: list[float]
    """Loss of every optimizer step of this rank, with the terms that have no gradient."""
    metrics: Metrics | None
    """Sum of the metrics over the tokens that the model read. None without an optimizer step."""
    seconds: float
    """Time on the host in the method and in tokfuse's ops, without the model and the optimizer."""


def train_step(
    algorithm: Algorithm,
    state: State,
    batch: Batch,
    forward: Forward,
    optimizer: torch.optim.Optimizer,
    *,
    minibatches: int | Sequence[torch.Tensor] = 1,
    epochs: int = 1,
    micro_batches: int = 1,
    generator: torch.Generator | None = None,
    max_gradient: float | None = None,
    gradients: str = "mean",
    leave_out: bool = False,
    on_step: Callable[[Plan, Mapping[str, Any], PolicyStep], None] | None = None,
) -> TrainStep:
    """Train on one rollout, and return the next state of the method.

    The call prepares the batch and takes the steps on the previous rollout, if the method has any (PIPO). Then it takes
    one optimizer step per plan of every minibatch, and updates the state. If the method needs statistics of the current
    policy (`needs_policy`), they are computed first. Gradients are added over micro-batches. Counts and measured sums
    are added over the ranks of `batch.world`.

    Args:
        algorithm: a method from `make`, or your own subclass.
        state: `algorithm.initial_state()`, or the state that the previous call returned.
        batch: the rollout. If it has advantages already, it is not prepared again.
        forward: function (seqs, source). It returns `{"logits": ..., "target": ...}`, or
            `{"hidden": ..., "weight": ..., "target": ...}`, of the tokens of the sequences `seqs` (count,) int64, in
            this order. Other keys (bias, temperature, softcap, logit_scale, memory_budget, compact_clipped, influence)
            are passed to `policy_step`. With source "previous", `seqs` are sequences of the batch of the previous call;
            only PIPO asks for them. Else source is "current".
        optimizer: holds the parameters. Gradients that it has at the start are discarded.
        minibatches: number of parts of the batch, each one optimizer step. All responses to a prompt stay together. Or
            the parts themselves: a list of sequences, (count,) int64 each.
        epochs: number of times that every minibatch is trained on.
        micro_batches: number of parts of each minibatch that the model reads at once. It does not change the gradient.
        generator: shuffles the prompts before each epoch. None: the order of the batch. Not with a list.
        max_gradient: the norm of the gradient is clipped to this value. None: no clip.
        gradients: how your wrapper reduces gradients over the ranks of `batch.world`: "mean" (DDP, FSDP) or "sum". It
            has no effect on one rank. Every rank needs the same number of minibatches, and a response in each.
        leave_out: True skips the forward pass of prompts (without group_ids: of responses) whose gradient is exactly 0.
            Metrics and measured sums then describe the others only.
        on_step: called after each micro-batch with its plan, the inputs of `policy_step` and the result, before the
            backward. To add another loss term to the same optimizer step, call its `backward()` there.

    Returns:
        TrainStep(state, batch, losses, metrics, seconds).

    Raises:
        TypeError: an algorithm, a batch, a function, an optimizer or a result of `forward` of another type.
        ValueError: an unknown option, a sequence out of range, a result of `forward` with a missing or unknown key or
            with another number of tokens, or what the method raises.
    """
    if not isinstance(algorithm, Algorithm):
        kind = type(algorithm).__name__
        raise TypeError(
            f'{OP}: algorithm must be an Algorithm; got {kind}. Pass, for example, algorithms.make("grpo").'
        )
    if not isinstance(batch, Batch):
        raise TypeError(f"{OP}: batch must be a Batch; got {type(batch).__name__}. Make one from the rollout.")
    if not callable(forward):
        kind = type(forward).__name__
        raise TypeError(f"{OP}: forward must be a function; got {kind}. Pass a function (seqs, source).")
    if not all(hasattr(optimizer, name) for name in ("step", "zero_grad", "param_groups")):
        kind = type(optimizer).__name__
        raise TypeError(f"{OP}: optimizer must be a torch.optim.Optimizer; got {kind}. Pass the optimizer itself.")
    check_choice(OP, "gradients", gradients, ("mean", "sum"))
    check_integer(OP, "epochs", epochs, 1)
    check_integer(OP, "micro_batches", micro_batches, 1)
    if max_gradient is not None:
        check_number(OP, "max_gradient", max_gradient, 0.0, open_low=True)
    run = _Run(algorithm, state, forward, optimizer, micro_batches, max_gradient, gradients, leave_out, on_step)
    start = time.perf_counter()
    if batch.advantage is None:
        batch = algorithm.prepare(batch, state)
    before, previous = algorithm.before(batch, state), algorithm.replay(batch, state)
    run.seconds += time.perf_counter() - start
    for plan in before:
        run.update(plan, torch.arange(plan.batch.num_seqs, device="cpu"))
    if previous is not None:
        count = minibatches if isinstance(minibatches, int) else max(1, len(minibatches))
        for seqs in (part for _ in range(epochs) for part in _parts(previous, count, None)):
            run.update(algorithm.replay_plan(previous.take(seqs.to(previous.old_logp.device)), run.state), seqs)
    for each in algorithm.passes():
        for _ in range(epochs):
            for seqs in _parts(batch, minibatches, generator):
                run.minibatch(each, batch, seqs)
    final = algorithm.advance(run.state, batch)
    return TrainStep(final, batch, run.losses, run.metrics, run.seconds)


def _parts(
    batch: Batch, minibatches: int | Sequence[torch.Tensor], generator: torch.Generator | None
) -> Iterator[torch.Tensor]:
    """Yield the sequences of each minibatch, on the CPU."""
    if isinstance(minibatches, Sequence) and not isinstance(minibatches, str):
        if generator is not None:
            raise refuse(OP, "generator", "None with a list of minibatches", "a generator", "Shuffle the list.")
        parts = [torch.as_tensor(seqs).cpu() for seqs in minibatches]
        for seqs in parts:
            if len(seqs) > 0 and not 0 <= int(seqs.min()) <= int(seqs.max()) < batch.num_seqs:
                known = f"sequences in [0, {batch.num_seqs})"
                raise refuse(OP, "minibatches", known, seqs.tolist(), "Number the sequences of the batch.")
        yield from parts
        return
    check_integer(OP, "minibatches", minibatches, 1)
    prompt = torch.arange(batch.num_seqs, device="cpu") if batch.group_ids is None else batch.group_ids.cpu()
    ids, place = prompt.unique(return_inverse=True)
    # Prompts in the order of their first response.
    first = torch.full((len(ids),), len(prompt), device="cpu").scatter_reduce(
        0, place, torch.arange(len(prompt), device="cpu"), "amin"
    )
    order = first.argsort()
    if generator is not None:
        order = order[torch.randperm(len(order), generator=generator, device="cpu")]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device="cpu")
    by_prompt = rank[place].argsort(stable=True)
    sizes = place.bincount(minlength=len(ids))[order]
    for prompts in torch.arange(len(order), device="cpu").chunk(minibatches) if len(order) else ():
        begin = int(sizes[: int(prompts[0])].sum())
        yield by_prompt[begin : begin + int(sizes[prompts].sum())]


class _Run:
    """The optimizer steps of one call, and what they add up to."""

    def __init__(
        self,
        algorithm: Algorithm,
        state: State,
        forward: Forward,
        optimizer: torch.optim.Optimizer,
        micro_batches: int,
        max_gradient: float | None,
        gradients: str,
        leave_out: bool,
        on_step: Callable[[Plan, Mapping[str, Any], PolicyStep], None] | None,
    ) -> None:
        self.algorithm, self.state, self.forward, self.optimizer = algorithm, state, forward, optimizer
        self.micro_batches, self.max_gradient, self.gradients = micro_batches, max_gradient, gradients
        self.leave_out, self.on_step = leave_out, on_step
        self.losses: list[float] = []
        self.metrics: Metrics | None = None
        self.seconds = 0.0

    def minibatch(self, algorithm: Algorithm, batch: Batch, seqs: torch.Tensor) -> None:
        """Take the optimizer steps of a minibatch: the sequences `seqs` of a prepared batch."""
        part = batch.take(seqs.to(batch.old_logp.device))
        if algorithm.needs_policy:
            part = self._with_policy(part, seqs)
        start = time.perf_counter()
        plans = algorithm.plans(part, self.state)
        self.seconds += time.perf_counter() - start
        for plan in plans:
            self.update(plan, seqs)

    def _with_policy(self, part: Batch, seqs: torch.Tensor) -> Batch:
        logp, entropy = [], []
        for rows in self._micro(torch.arange(len(seqs), device="cpu")):
            with torch.no_grad():
                given = self._read(seqs[rows], "current", len(part.rows(rows.to(part.old_logp.device))))
                start = time.perf_counter()
                options = {name: given[name] for name in _STATISTICS_OPTIONS if name in given}
                if "hidden" in given:
                    stats = linear_token_stats(given["hidden"], given["weight"], given["target"], **options)
                else:
                    stats = token_stats(given["logits"], given["target"], **options)
                self.seconds += time.perf_counter() - start
            logp.append(stats.logp)
            entropy.append(stats.entropy)
        return part.with_policy(torch.cat(logp), torch.cat(entropy)) if logp else part.with_policy(part.old_logp)

    def _read(self, seqs: torch.Tensor, source: str, tokens: int) -> Mapping[str, Any]:
        """Return the model's output for `seqs`, which have this number of tokens."""
        name, either = "the result of forward", "logits and target, or hidden, weight and target"
        given = self.forward(seqs, source)
        if not isinstance(given, Mapping):
            raise TypeError(f"{OP}: {name} must be a dict with {either}; got {type(given).__name__}. Name its tensors.")
        given = {key: value for key, value in given.items() if value is not None}
        for key in given:
            if key not in _FROM_FORWARD:
                known = f"one of {', '.join(_FROM_FORWARD)}"
                raise refuse(OP, f"every key of {name}", known, repr(key), "The method gives the other inputs.")
        if "target" not in given or ("logits" in given) == ("hidden" in given and "weight" in given):
            got = ", ".join(given) or "nothing"
            raise refuse(OP, name, f"a dict with {either}", got, "Return the model's output and the tokens.")
        for key in ("logits", "hidden", "target"):
            rows = given.get(key)
            if rows is not None and not (isinstance(rows, torch.Tensor) and rows.shape[:1] == (tokens,)):
                got = f"shape {tuple(rows.shape)}" if isinstance(rows, torch.Tensor) else type(rows).__name__
                size = f"a tensor with one row for each of the {tokens} tokens of seqs"
                raise refuse(OP, f"{key!r} in {name}", size, got, "Pack the tokens in the order of seqs, unpadded.")
        return given

    def _micro(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return rows.chunk(self.micro_batches) if len(rows) else ()

    def update(self, plan: Plan, seqs: torch.Tensor) -> None:
        """Take one optimizer step. `seqs` are the sequences of the plan, as `forward` numbers them."""
        world = plan.batch.world
        start = time.perf_counter()
        ranks = len(world.all(plan.batch.old_logp.new_zeros(())))
        # A wrapper that averages divides the gradient by the ranks once more.
        divisor = float(world.sum(plan.count())) / (ranks if self.gradients == "mean" else 1)
        rows = _with_gradient(plan) if self.leave_out else torch.arange(len(seqs), device="cpu")
        if len(rows) == 0 and ranks > 1 and len(seqs) > 0:
            rows = torch.arange(1, device="cpu")  # a wrapper that reduces gradients needs a backward on every rank
        alone = len(rows) == len(seqs) and self.micro_batches == 1
        self.seconds += time.perf_counter() - start
        self.optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        measured: dict[str, torch.Tensor] = {}
        for part in self._micro(rows):
            start = time.perf_counter()
            piece = plan if alone else plan.take(part.to(plan.batch.old_logp.device))
            self.seconds += time.perf_counter() - start
            given = self._read(seqs[part], plan.source, piece.batch.num_tokens)
            start = time.perf_counter()
            inputs = {**given, **piece.inputs(divisor)}
            step = policy_step(**inputs)
            figures = self.algorithm.measure(piece, step.stats.logp, step.stats.entropy)
            measured = {name: measured[name] + value if measured else value for name, value in figures.items()}
            self.seconds += time.perf_counter() - start
            if self.on_step is not None:
                self.on_step(piece, inputs, step)
            step.loss.backward()
            loss += float(step.loss.detach() + piece.offset(divisor))
            self.metrics = step.metrics if self.metrics is None else self.metrics + step.metrics
        if len(rows) == 0 and ranks == 1:
            return
        if self.max_gradient is not None:
            params = [p for group in self.optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(params, self.max_gradient)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss)
        self.state = self.algorithm.update(self.state, {n: world.sum(x) for n, x in measured.items()})


def _with_gradient(plan: Plan) -> torch.Tensor:
    """Return the sequences of the plan whose prompt may have a gradient that is not 0, on the CPU."""
    batch = plan.batch
    keep = batch.valid if plan.mask is None else plan.mask
    if not plan.needs_every_row:
        size = plan.advantage if plan.advantage_level == "token" else batch.spread(plan.advantage)
        keep = keep & (size != 0)
    live = torch.zeros(batch.num_seqs, dtype=torch.bool, device=keep.device)
    live[batch.sequence[keep]] = True
    if batch.group_ids is not None:
        live = torch.isin(batch.group_ids, batch.group_ids[live])
    return live.nonzero().flatten().cpu()
