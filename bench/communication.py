"""Count the bytes that vocabulary parallelism sends, and predict the communication on many GPUs.

    python -m tokfuse.bench.communication [--ranks 4] [--tokens 512]     measured over gloo
    python -m tokfuse.bench.communication --plan                         predicted, see `plan`
    torchrun --nproc-per-node 8 -m tokfuse.bench.communication           over NCCL, one GPU per rank

Measured: the collectives of each form and the bytes that each rank puts in, on the same shards and with
equal results. The bytes that a ring algorithm sends per rank and token follow from them: (P - 1) n for an
all-gather of n bytes, 2 (P - 1) / P n for an all-reduce.

    one all-gather      tokfuse.distributed.token_stats: logp, entropy, lse, sum_sq, top1
    three reductions    log-prob only: maximum, target logit and sum of exps, one after the other
    six reductions      log-prob and entropy by two such ops
    two reductions      maximum, then all sums stacked: the fewest bytes for the same five results
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tokfuse.runtime.distributed import vocab_parallel
from tokfuse.runtime.distributed.collectives import GATHER
from tokfuse.runtime.distributed.vocab_shard import VocabShard

VOCAB = 4096
Form = Callable[[torch.Tensor, torch.Tensor, VocabShard], torch.Tensor]


@dataclass(frozen=True)
class Row:
    """One form over P ranks."""

    form: str
    ranks: int
    collectives: int
    gathered: float
    """Bytes per token that a rank puts into all-gathers."""
    reduced: float
    """Bytes per token that a rank puts into all-reduces."""
    milliseconds: float

    @property
    def wire(self) -> float:
        """Bytes per token that a rank sends with ring algorithms."""
        p = self.ranks
        return (p - 1) * self.gathered + 2 * (p - 1) / p * self.reduced


def _sums(z: torch.Tensor, y: torch.Tensor, shard: VocabShard, high: torch.Tensor) -> torch.Tensor:
    """Return (4, tokens): sum e, sum (z - m) e, sum e^2, and z - m of the target."""
    d = z - high[:, None]
    e = d.exp()
    column = torch.where(shard.owns(y), y - shard.start, 0)
    own = d.gather(1, column[:, None]).squeeze(1)
    return torch.stack([e.sum(1), (d * e).sum(1), (e * e).sum(1), torch.where(shard.owns(y), own, 0)])


def _one_gather(z: torch.Tensor, y: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    return vocab_parallel.token_stats(z, y, shard=shard).logp


def _maximum(z: torch.Tensor) -> torch.Tensor:
    high = z.amax(1)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    return high


def _two_reductions(z: torch.Tensor, y: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    sums = _sums(z, y, shard, _maximum(z))
    dist.all_reduce(sums)
    return sums[3] - sums[0].log()


def _three_reductions(z: torch.Tensor, y: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    s, _, _, own = (x.clone() for x in _sums(z, y, shard, _maximum(z)))
    dist.all_reduce(own)
    dist.all_reduce(s)
    return own - s.log()


def _six_reductions(z: torch.Tensor, y: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    s, sd, *_ = (x.clone() for x in _sums(z, y, shard, _maximum(z)))
    dist.all_reduce(s)
    dist.all_reduce(sd)  # entropy = log s - sd / s
    return _three_reductions(z, y, shard)


FORMS: dict[str, Form] = {
    "one all-gather (tokfuse)": _one_gather,
    "two reductions": _two_reductions,
    "three reductions, log-prob alone": _three_reductions,
    "six reductions, log-prob and entropy": _six_reductions,
}


def _count(run: Callable[[], torch.Tensor]) -> tuple[list[tuple[str, int]], torch.Tensor]:
    """Return the collectives of a call, with the bytes that this rank puts into each."""
    seen: list[tuple[str, int]] = []
    kept = {name: getattr(dist, name) for name in (GATHER, "all_reduce")}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            x = args[name == GATHER]
            seen.append((name, x.numel() * x.element_size()))
            return kept[name](*args, **kwargs)

        return call

    try:
        for name in kept:
            setattr(dist, name, counting(name))
        out = run()
    finally:
        for name, function in kept.items():
            setattr(dist, name, function)
    return seen, out


def _rank(rank: int, ranks: int, tokens: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    rows = _every_form(tokens, "cpu")
    if rank == 0:
        torch.save([vars(row) for row in rows], f"{folder}/rows.pt")
    dist.destroy_process_group()


def _every_form(tokens: int, device: str) -> list[Row]:
    """Return the forms over the default group, checked against float64."""
    ranks = dist.get_world_size()
    gen = torch.Generator().manual_seed(0)
    z = (torch.randn(tokens, VOCAB, generator=gen) * 3).to(device)
    y = torch.randint(VOCAB, (tokens,), generator=gen).to(device)
    want = torch.log_softmax(z.double(), 1).gather(1, y[:, None]).squeeze(1)
    shard = VocabShard.even(VOCAB)
    own = z[:, shard.start : shard.stop].contiguous()
    rows = []
    for name, form in FORMS.items():
        seen, logp = _count(lambda form=form: form(own, y, shard))
        assert float((logp - want).abs().max()) < 2e-5, name
        best = 1e9
        for _ in range(5):
            dist.barrier()
            start = time.perf_counter()
            form(own, y, shard)[0].item()
            best = min(best, time.perf_counter() - start)
        put = {kind: sum(n for k, n in seen if k == kind) / tokens for kind, _ in seen}
        rows.append(Row(name, ranks, len(seen), put.get(GATHER, 0.0), put.get("all_reduce", 0.0), best * 1e3))
    return rows


def measure(ranks: int, tokens: int) -> list[Row]:
    """Return every form over `ranks` processes of this machine."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(ranks, tokens, folder), nprocs=ranks)  # type: ignore[no-untyped-call]
        return [Row(**row) for row in torch.load(f"{folder}/rows.pt")]


# ------------------------------------------------------------------------------- the predicted plan


@dataclass(frozen=True)
class Cluster:
    """Assumptions of the plan: nodes of 8 GPUs, similar to H100. The rates hold for large messages."""

    gpus: int
    tensor: int = 8
    vocab: int = 151_936
    hidden: int = 8192
    tokens: int = 8192  # per micro-batch
    micro_batches: int = 4
    share: float = 0.5  # share of rows with gradient
    flops: float = 500e12
    link: float = 350e9  # bytes / s inside a node
    network: float = 40e9  # bytes / s per GPU between nodes
    latency: float = 12e-6  # per collective inside a node


def plan(c: Cluster) -> dict[str, float]:
    """Return the predicted milliseconds and bytes per GPU. Nothing is measured."""
    p, data = c.tensor, c.gpus // c.tensor
    head = c.vocab * c.hidden / p
    gemm = (2 + 4 * c.share) * c.tokens * head / c.flops
    record = 20 * (p - 1) * c.tokens
    gradient = 2 * (p - 1) / p * 2 * c.tokens * c.hidden
    shards = 2 * 2 * head * (data - 1) / data  # bf16: all-gather of the weight, reduce-scatter of its gradient
    return {
        "data-parallel ranks": data,
        "tokens per step": data * c.micro_batches * c.tokens,
        "head GEMMs, ms per micro-batch": gemm * 1e3,
        "records, MB": record / 1e6,
        "records, ms": (c.latency + record / c.link) * 1e3,
        "grad_hidden, MB": gradient / 1e6,
        "grad_hidden, ms": (c.latency + gradient / c.link) * 1e3,
        "head weight over data ranks, MB per step": shards / 1e6,
        "head weight, ms per step without overlap": shards / c.network * 1e3,
        "communication of the loss side, % of its step": 100
        * (c.micro_batches * (record + gradient) / c.link + 2 * c.micro_batches * c.latency)
        / (c.micro_batches * gemm),
        "normaliser, bytes per step": 8 * (data - 1),
    }


def _number(x: float) -> str:
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"


def _print(rows: list[list[str]]) -> None:
    for i, row in enumerate(rows):
        print(f"| {' | '.join(row)} |")
        if i == 0:
            print("|" + " --- |" * len(row))


def main() -> None:
    """Print the tables of docs/distributed.md."""
    parser = argparse.ArgumentParser(prog="python -m tokfuse.bench.communication")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--plan", action="store_true")
    options = parser.parse_args()
    if options.plan:
        sizes = (8, 64, 256, 1024)
        plans = [plan(Cluster(gpus)) for gpus in sizes]
        rows = [["predicted, per GPU", *(f"{g} GPUs" for g in sizes)]]
        rows += [[name, *(_number(x[name]) for x in plans)] for name in plans[0]]
        _print(rows)
        return
    if "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl")
        found = _every_form(options.tokens, "cuda")
        dist.barrier()
        first = dist.get_rank() == 0
        dist.destroy_process_group()
        if not first:
            return
    else:
        found = measure(options.ranks, options.tokens)
    rows = [["form", "ranks", "collectives", "bytes in", "bytes sent by a ring", "ms"]]
    for row in found:
        rows.append(
            [
                row.form,
                str(row.ranks),
                str(row.collectives),
                f"{row.gathered + row.reduced:.0f}",
                f"{row.wire:.0f}",
                f"{row.milliseconds:.2f}",
            ]
        )
    _print(rows)


if __name__ == "__main__":
    main()
