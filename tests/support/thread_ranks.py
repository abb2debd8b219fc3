"""Ranks of a tensor-parallel group as threads of one process, so that every backend can run them.

Only one thread runs at a time: a rank gives up its turn in a collective only. So the Triton interpreter and the
CUDA kernels on the CPU, which are not thread-safe, can be tested. `tests/support/ranks.py` uses processes and gloo.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from unittest import mock

import torch
from harness import Backend

from tokfuse.runtime.distributed import collectives
from tokfuse.runtime.distributed.vocab_shard import VocabShard

T = TypeVar("T")
TIMEOUT = 120  # seconds: a rank that fails leaves the others alone in a collective


class Group:
    """The threads, and the tensors of the collective that they are in."""

    def __init__(self, world: int) -> None:
        self.world, self.turn = world, threading.Lock()
        self.barrier = threading.Barrier(world, timeout=TIMEOUT)
        self.given: list[torch.Tensor | None] = [None] * world
        self.rank = threading.local()

    def exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return `x` of every rank."""
        self.given[self.rank.value] = x.clone()
        self.turn.release()
        try:
            self.barrier.wait()
            out = [y for y in self.given if y is not None]
            self.barrier.wait()
        finally:
            self.turn.acquire()
        return out

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        """Replace the collectives."""

        def sum_(x: torch.Tensor, group: Any) -> torch.Tensor:
            return x.copy_(torch.stack(self.exchange(x)).sum(0))

        replaced = {
            "require_group": lambda op, group: None,
            "num_ranks": lambda group: self.world,
            "own_rank": lambda group: self.rank.value,
            "all_gather": lambda x, group: torch.stack(self.exchange(x)),
            "sum_": sum_,
        }
        with mock.patch.multiple(collectives, **replaced):
            yield


def run(backend: Backend, cuts: tuple[int, ...], of_rank: Callable[[VocabShard], T]) -> list[T]:
    """Return `of_rank(shard)` of every rank, run with this backend. `cuts` are the borders of the shards."""
    group = Group(len(cuts) - 1)
    results: list[Any] = [None] * group.world
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        group.rank.value = rank
        with group.turn:
            try:
                with backend.forced():
                    results[rank] = of_rank(VocabShard(cuts[-1], cuts[rank], cuts[rank + 1]))
            except BaseException as error:
                errors.append(error)
                group.barrier.abort()

    with group.patched():
        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(group.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    assert not errors, errors
    return results
