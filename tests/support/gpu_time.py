"""How long the device works on a call, for tests that compare two calls of one process."""

from collections.abc import Callable

import torch


def median_ms(run: Callable[[], object]) -> float:
    """Milliseconds between events around `run`, the median of 10 after 5 that warm up."""
    times = []
    for _ in range(15):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times[5:])[5]
