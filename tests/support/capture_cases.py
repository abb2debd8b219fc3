"""Cases of `influence.capture` over ranks: every rank has the features of its own sequences."""

import copy

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tokfuse import influence


def model_and_data() -> tuple[torch.nn.Module, torch.Tensor]:
    first, last = torch.nn.Linear(10, 12), torch.nn.Linear(12, 14, bias=False)
    model = torch.nn.Sequential(first, torch.nn.LayerNorm(12), torch.nn.Tanh(), last, torch.nn.RMSNorm(14)).double()
    return model, torch.randn(2 * dist.get_world_size(), 3, 10, dtype=torch.float64)


def features(model: torch.nn.Module, x: torch.Tensor, **options: object) -> torch.Tensor:
    with influence.capture(model, rank=4, **options) as captured:
        model(x).square().sum().backward()
    assert captured.names == ["0", "1", "3", "4"]
    return captured.features


def own(x: torch.Tensor) -> torch.Tensor:
    return x[2 * dist.get_rank() :][:2]


def gathered(x: torch.Tensor) -> torch.Tensor:
    """The lines of the documentation."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


def case_capture_ddp() -> None:
    model, x = model_and_data()
    want = features(copy.deepcopy(model), x)
    torch.testing.assert_close(gathered(features(DistributedDataParallel(model), own(x))), want)


def case_capture_fsdp2() -> None:
    model, x = model_and_data()
    plain, optimizer_of = copy.deepcopy(model), {}
    want = features(plain, x)
    for layer in (model[0], model[1], model[3], model):  # the last norm belongs to the unit of the model
        fully_shard(layer)
    torch.testing.assert_close(gathered(features(model, own(x))), want)
    # The same moments: FSDP averages the gradients over the ranks.
    for name, each in (("plain", plain), ("sharded", model)):
        optimizer_of[name] = torch.optim.AdamW(each.parameters(), lr=0.0)
        each.zero_grad()
        loss = each(x if name == "plain" else own(x)).square().sum()
        (loss / dist.get_world_size() if name == "plain" else loss).backward()
        optimizer_of[name].step()
    want = features(plain, x, optimizer=optimizer_of["plain"])
    torch.testing.assert_close(gathered(features(model, own(x), optimizer=optimizer_of["sharded"])), want)
