"""Run `tl.associative_scan` of the Triton interpreter in log2(n) combines over whole arrays.

The interpreter calls the combine function once per lane with scalars: 2 ms per lane, 1 s for a block of
512. Doubling calls it with arrays. Like a GPU, it combines partial results in a tree, so a combine function
that is not associative gives wrong values. The lane-by-lane scan would not show this error.
"""

import numpy as np
from triton.runtime import interpreter


def _doubling(self, inputs):
    """Inclusive scan of 1-D tensors. After k rounds a lane contains the 2^k lanes that end with it."""
    assert self.axis == 0 and inputs[0].handle.data.ndim == 1
    types = [x.dtype for x in inputs]
    data = [x.handle.data for x in inputs]
    step = 1
    while step < data[0].shape[0]:
        # Shapes must remain powers of two, so the first lanes also combine with a neighbour and are then restored.
        early = [self.to_tensor(np.roll(d, step), t) for d, t in zip(data, types, strict=True)]
        late = [self.to_tensor(d, t) for d, t in zip(data, types, strict=True)]
        folded = self.combine_fn.fn(*early, *late)
        folded = folded if isinstance(folded, tuple) else (folded,)
        for d, f in zip(data, folded, strict=True):
            f.handle.data[:step] = d[:step]
        data = [f.handle.data for f in folded]
        step *= 2
    return [self.to_tensor(d, t) for d, t in zip(data, types, strict=True)]


def install() -> None:
    """Replace the scan of the interpreter in this process."""
    interpreter.ScanOps.generic_scan = _doubling
