"""Cases of data, context and FSDP parallelism for ranks.py. A split must not change the result."""

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from algorithm_cases import example, rollout
from harness import compare
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from vocab_parallel_cases import ranks, refused

import tokfuse
from tokfuse import distributed as D
from tokfuse.algorithms import World

HIDDEN, VOCAB, LENGTHS = 8, 30, (5, 3, 7, 1, 6, 2, 4, 4)
MICRO = 4  # micro-batches per step, over all ranks
TOKEN = tokfuse.Objective(shape=tokfuse.PPOClip(), entropy_coef=0.02)
SEQUENCE = tokfuse.Objective(shape=tokfuse.PPOClip(), level="sequence", aggregation="seq_mean_token_mean")


class Model(torch.nn.Module):
    """A transformer body and a head. The forward returns the statistics of a packed batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.trunk = torch.nn.Linear(HIDDEN, HIDDEN)
        self.lm_head = torch.nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, x: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> Any:
        hidden = torch.tanh(self.trunk(x))
        return tokfuse.linear_token_stats(hidden, self.lm_head.weight, target, mask=mask)


def data() -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(2)
    tokens = sum(LENGTHS)
    cu = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    mask = torch.rand(tokens, generator=gen) < 0.8
    mask[int(cu[6]) :] = False  # the last two sequences, a whole micro-batch, are masked
    return {
        "x": torch.randn(tokens, HIDDEN, generator=gen),
        "target": torch.randint(VOCAB, (tokens,), generator=gen),
        "old_logp": torch.randn(tokens, generator=gen) * 0.2 - 3.4,
        "advantage": torch.randn(tokens, generator=gen),
        "mask": mask,
        "cu_seqlens": cu,
    }


def micro_batch(d: dict[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
    """Return two of the eight sequences."""
    borders = d["cu_seqlens"][2 * number : 2 * number + 3]
    begin, end = int(borders[0]), int(borders[-1])
    cut = {name: x[begin:end] for name, x in d.items() if name != "cu_seqlens"}
    return cut | {"cu_seqlens": borders - begin}


def count_of(objective: tokfuse.Objective, d: dict[str, torch.Tensor]) -> int:
    if not objective.counts_sequences:
        return int(d["mask"].sum())
    borders = d["cu_seqlens"].tolist()
    return sum(bool(d["mask"][a:b].any()) for a, b in zip(borders[:-1], borders[1:], strict=True))


def loss_of(model: Any, d: dict[str, torch.Tensor], objective: Any, normalizer: Any) -> Any:
    stats = model(d["x"], d["target"], d["mask"])
    entropy = stats.entropy if objective.entropy_coef else None
    return tokfuse.policy_loss(
        stats.logp,
        old_logp=d["old_logp"],
        advantage=d["advantage"],
        objective=objective,
        mask=d["mask"],
        entropy=entropy,
        cu_seqlens=d["cu_seqlens"],
        normalizer=normalizer,
    )


def whole_gradients(objective: tokfuse.Objective) -> dict[str, torch.Tensor]:
    """Return the gradients of one process with the whole batch."""
    model, d = Model(), data()
    loss_of(model, d, objective, count_of(objective, d)).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def same_gradients(model: torch.nn.Module, objective: tokfuse.Objective, what: str) -> None:
    want = whole_gradients(objective)
    for name, p in model.named_parameters():
        grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        scale = float(want[name].abs().max())
        compare(grad, want[name], atol=3e-6 * scale, what=f"{what} {name}")


def own_micro_batches() -> list[dict[str, torch.Tensor]]:
    """Return this rank's micro-batches: 1 rank has four, 2 ranks two each, 4 ranks one each.

    With 4 ranks, rank 3 has no valid token.
    """
    each = MICRO // ranks()
    return [micro_batch(data(), dist.get_rank() * each + i) for i in range(each)]


def case_normalizers_are_invariant_over_ranks_and_micro_batches() -> None:
    for objective in (TOKEN, SEQUENCE):
        mine = own_micro_batches()
        counts = float(sum(count_of(objective, d) for d in mine))
        normalizer = D.global_normalizer(counts, gradient_ranks=ranks())
        whole = count_of(objective, data())
        assert float(normalizer) * ranks() == whole
        model = DistributedDataParallel(Model())
        metrics, total = None, torch.zeros(())
        for i, d in enumerate(mine):
            model.require_backward_grad_sync = i == len(mine) - 1
            out = loss_of(model, d, objective, normalizer)
            out.loss.backward()
            total += out.loss.detach()
            metrics = out.metrics if metrics is None else metrics + out.metrics
        same_gradients(model.module, objective, f"{ranks()} ranks {objective.level}")
        # The mean of the losses over ranks is the loss of the whole batch.
        dist.all_reduce(total)
        single = loss_of(Model(), data(), objective, whole)
        compare(total / ranks(), single.loss, atol=1e-6, what="loss")
        merged = D.merge_metrics(metrics)
        single_mean, mean = single.metrics.mean(), merged.mean()
        for name in single_mean:
            if name != "loss":  # a sum of parts that are divided by N / ranks
                assert abs(mean[name] - single_mean[name]) < 1e-6, name
        # A common mistake of trainers: a mean of means gives ranks the same weight, not tokens.
        if ranks() == 4:
            own = loss_of(Model(), mine[0], objective, "batch").loss.detach()
            dist.all_reduce(own)
            assert abs(float(own / ranks() - single.loss)) > 1e-3


def case_normalizer_where_nothing_counts() -> None:
    normalizer = D.global_normalizer(torch.zeros(()), gradient_ranks=ranks())
    assert normalizer.shape == () and float(normalizer) == 1.0
    refused(lambda: D.global_normalizer(torch.ones(2), gradient_ranks=1), "one number")
    refused(lambda: D.global_normalizer(1.0, gradient_ranks=0), "gradient_ranks")


def case_summed_gradients_take_the_global_count() -> None:
    mine = own_micro_batches()
    counts = float(sum(count_of(TOKEN, d) for d in mine))
    normalizer = D.global_normalizer(counts, gradient_ranks=1)
    model = Model()
    for d in mine:
        loss_of(model, d, TOKEN, normalizer).loss.backward()
    for p in model.parameters():
        dist.all_reduce(p.grad)
    same_gradients(model, TOKEN, "sum")


# ----------------------------------------------------------------------------- context parallelism


def case_context_slices() -> None:
    for cut in (D.TokenSlice.contiguous, D.TokenSlice.zigzag):
        d = data()
        tokens = d["target"].shape[0]
        part = cut(tokens)
        assert part.index.shape[0] * ranks() >= tokens
        x = torch.arange(tokens * 2.0).view(tokens, 2)
        assert torch.equal(part.gather(part.take(x)), x)
        assert bool((part.take(d["mask"], fill=False)[part.index < 0] == 0).all())
        for objective in (TOKEN, SEQUENCE):
            model = DistributedDataParallel(Model())
            local = {k: part.take(d[k]) for k in ("x", "target", "mask")}
            stats = model(**local)
            logp = part.gather(stats.logp)
            entropy = part.gather(stats.entropy) if objective.entropy_coef else None
            # Every rank has the whole loss, and DDP averages the gradients of each rank's own tokens.
            out = tokfuse.policy_loss(
                logp,
                old_logp=d["old_logp"],
                advantage=d["advantage"],
                objective=objective,
                mask=d["mask"],
                entropy=entropy,
                cu_seqlens=d["cu_seqlens"],
                normalizer=count_of(objective, d) / ranks(),
            )
            out.loss.backward()
            same_gradients(model.module, objective, f"{cut.__name__} {objective.level}")
    refused(lambda: part.take(torch.zeros(3)), "the whole batch")
    refused(lambda: part.gather(torch.zeros(part.index.shape[0] + 1)), "this rank's part")


def case_targets_are_shifted_before_they_are_cut() -> None:
    tokens = torch.arange(100, 100 + sum(LENGTHS))
    cu = data()["cu_seqlens"]
    learned = torch.ones(len(tokens), dtype=torch.bool)
    learned[0] = learned[6] = False
    target, mask = D.shifted_targets(tokens, cu, learned)
    ends = set((cu[1:] - 1).tolist())
    for t in range(len(tokens)):
        counts = t not in ends and bool(learned[t + 1])
        assert bool(mask[t]) == counts
        assert int(target[t]) == (100 + t + 1 if counts else 0)
    part = D.TokenSlice.contiguous(len(tokens))
    assert torch.equal(part.gather(part.take(target)), target)
    everything = D.shifted_targets(tokens, cu)[1]
    assert int(everything.sum()) == len(tokens) - len(LENGTHS)


# ----------------------------------------------------------------------------------- FSDP2, DTensor


def sharded(module: Any) -> Any:
    return fully_shard(module, mesh=init_device_mesh("cpu", (ranks(),)))


def fsdp_step(model: Model, weight_of: Any) -> None:
    """Run a data-parallel step. The loss reads the head's weight through `weight_of(model)`."""
    mine = own_micro_batches()
    counts = float(sum(count_of(TOKEN, d) for d in mine))
    normalizer = D.global_normalizer(counts, gradient_ranks=ranks())
    for d in mine:
        hidden = torch.tanh(model.trunk(d["x"]))
        stats = tokfuse.linear_token_stats(hidden, weight_of(model), d["target"], mask=d["mask"], memory_budget=1)
        out = tokfuse.policy_loss(
            stats.logp,
            old_logp=d["old_logp"],
            advantage=d["advantage"],
            objective=TOKEN,
            mask=d["mask"],
            entropy=stats.entropy,
            normalizer=normalizer,
        )
        out.loss.backward()


def case_fsdp2_head_in_the_root_unit() -> None:
    model = sharded(Model())
    mine = own_micro_batches()
    counts = float(sum(count_of(TOKEN, d) for d in mine))
    normalizer = D.global_normalizer(counts, gradient_ranks=ranks())
    for d in mine:
        loss_of(model, d, TOKEN, normalizer).loss.backward()
    same_gradients(model, TOKEN, "root unit, weight read inside forward")


class TrunkUnit(torch.nn.Module):
    """A head in a separate FSDP unit whose weight is read from outside. FSDP2 then does not average its gradient."""

    def __init__(self) -> None:
        super().__init__()
        whole = Model()
        self.trunk, self.lm_head = sharded(whole.trunk), sharded(whole.lm_head)


def head_gradient(weight_of: Any) -> torch.Tensor:
    model = TrunkUnit()
    fsdp_step(model, weight_of)
    return model.lm_head.weight.grad.full_tensor()


def case_fsdp2_head_weight_read_from_outside() -> None:
    want = whole_gradients(TOKEN)["lm_head.weight"]
    scale = float(want.abs().max())
    right = head_gradient(lambda m: D.head_weight(m.lm_head.weight, gradients="mean"))
    compare(right, want, atol=3e-6 * scale, what="head_weight(gradients='mean')")
    summed = head_gradient(lambda m: D.head_weight(m.lm_head.weight, gradients="sum"))
    compare(summed, want * ranks(), atol=3e-6 * scale * ranks(), what="gradients='sum'")
    trap = head_gradient(lambda m: m.lm_head.weight.full_tensor())
    wrong = float((trap - want).abs().max()) / scale
    # If full_tensor() starts to average, change the docstring of head_weight.
    assert (wrong < 1e-5) == (ranks() == 1), f"full_tensor() is off by {wrong}"


class HeadForward(torch.nn.Linear):
    """The loss inside the forward of the head. FSDP gathers and averages as for any module."""

    def forward(self, hidden: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> Any:
        return tuple(tokfuse.linear_token_stats(hidden, self.weight, target, mask=mask))


def case_fsdp2_loss_inside_the_heads_forward() -> None:
    whole = Model()
    head = HeadForward(HIDDEN, VOCAB, bias=False)
    head.load_state_dict(whole.lm_head.state_dict())
    sharded(head)
    trunk = sharded(whole.trunk)
    mine = own_micro_batches()
    counts = float(sum(count_of(TOKEN, d) for d in mine))
    normalizer = D.global_normalizer(counts, gradient_ranks=ranks())
    for d in mine:
        logp, entropy, *_ = head(torch.tanh(trunk(d["x"])), d["target"], d["mask"])
        tokfuse.policy_loss(
            logp,
            old_logp=d["old_logp"],
            advantage=d["advantage"],
            objective=TOKEN,
            mask=d["mask"],
            entropy=entropy,
            normalizer=normalizer,
        ).loss.backward()
    want = whole_gradients(TOKEN)["lm_head.weight"]
    scale = float(want.abs().max())
    compare(head.weight.grad.full_tensor(), want, atol=3e-6 * scale, what="inside forward")


def case_dtensor_head_cut_over_the_vocabulary() -> None:
    """(data, tensor) mesh: 1 x 1, 1 x 2, 2 x 2. The tensor-parallel ranks have the same tokens."""
    tensor = min(2, ranks())
    mesh = init_device_mesh("cpu", (ranks() // tensor, tensor), mesh_dim_names=("data", "tensor"))
    full = Model()
    weight = torch.nn.Parameter(distribute_tensor(full.lm_head.weight.detach(), mesh, [Replicate(), Shard(0)]))
    shard = D.vocab_shard(weight, "tensor")
    assert (shard.start, shard.size) == (15 * mesh.get_local_rank("tensor") * (tensor > 1), shard.size)
    data_rank, parts = mesh.get_local_rank("data"), ranks() // tensor
    each = MICRO // parts
    mine = [micro_batch(data(), data_rank * each + i) for i in range(each)]
    counts = float(sum(count_of(TOKEN, d) for d in mine))
    normalizer = D.global_normalizer(counts, gradient_ranks=parts, group=mesh.get_group("data"))
    for d in mine:
        hidden = torch.tanh(full.trunk(d["x"])).detach()
        local = D.head_weight(weight, gradients="mean", tensor_parallel="tensor")
        assert not hasattr(local, "placements") and local.shape[0] == shard.size
        step = D.policy_step(
            hidden=hidden,
            weight=local,
            shard=shard,
            target=d["target"],
            mask=d["mask"],
            old_logp=d["old_logp"],
            advantage=d["advantage"],
            objective=TOKEN,
            normalizer=normalizer,
        )
        step.loss.backward()
    want = whole_gradients(TOKEN)["lm_head.weight"]
    scale = float(want.abs().max())
    compare(weight.grad.full_tensor(), want, atol=1e-5 * scale, what="DTensor head")
    assert torch.equal(D.head_weight(full.trunk.weight, gradients="mean"), full.trunk.weight)
    refused(lambda: D.head_weight(weight, gradients="avg"), "gradients", "mean, sum")
    call = {"gradients": "mean", "tensor_parallel": "pipe"}
    refused(lambda: D.head_weight(weight, **call), "a mesh dimension", "data, tensor")
    odd = distribute_tensor(full.lm_head.weight.detach(), mesh, [Replicate(), Shard(1)])
    refused(lambda: D.head_weight(odd, gradients="mean"), "sharded by rows")
    padded = D.vocab_shard(weight, "tensor", vocab_size=29)
    assert padded.vocab_size == 29 and padded.stop == min(shard.stop, 29)


# ------------------------------------------------------------------ global selections of algorithms


# Selections over all ranks; the standard deviation of the reward over the batch; EPO needs a late turn.
METHODS = (
    "bapo",
    "cip_entropy",
    "d3s",
    "dcpo_dist",
    "gpg",
    "high_entropy",
    "kl_cov",
    "ppo",
    "reinforce_pp",
    "vapo",
    "pipo",
    "epo",
    "grpo",
    "opo",
)
OPTIONS: dict[str, dict[str, Any]] = {
    "d3s": {"batch_rollouts": 4},
    "grpo": {"scale": "batch_std"},
    "opo": {"scale": "batch_std"},
}


def case_selections_and_advantages_are_global() -> None:
    """Every rank selects like one process with the whole batch. One of four ranks has no prompt."""
    for binary in (True, False):
        whole = rollout(6, binary=binary)
        assert whole.group_ids is not None
        order = whole.group_ids.unique_consecutive().tolist()
        mine = torch.isin(whole.group_ids, torch.tensor(order[dist.get_rank() :: ranks()] or [-1]))
        seqs, tokens = mine.nonzero().flatten(), mine[whole.sequence]
        for name in METHODS:
            method = example(name, **OPTIONS.get(name, {}))
            state = method.initial_state()
            own = dataclasses.replace(whole.take(seqs), world=World.of_group())
            there, here = method.prepare(whole, state), method.prepare(own, state)
            (want,), (got,) = method.plans(there, state), method.plans(here, state)
            assert got.objective == want.objective, f"{name}: {got.objective} {want.objective}"
            per_token = want.advantage_level == "token"
            part = want.advantage[tokens if per_token else seqs]
            compare(got.advantage, part, atol=1e-12, what=f"{name} advantage")
            for field in ("token_weight", "mask", "kl_weight", "entropy_weight", "signal"):
                a, b = getattr(got, field), getattr(want, field)
                assert (a is None) == (b is None), f"{name}: {field}"
                if a is not None:
                    compare(a, b[tokens], atol=1e-12, what=f"{name} {field}")
            total = float(World.of_group().sum(got.count()))
            assert abs(total - float(want.count())) <= 1e-12 * total, f"{name}: count"
