"""Measure the device time of a call, for tests that compare two calls of one process."""

from collections.abc import Callable

import torch


def median_ms(run: Callable[[], object]) -> float:
    """Return the milliseconds between CUDA events around `run`: the median of 10 runs after 5 warm-up runs."""
    times = []
    for _ in range(15):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times[5:])[5]
