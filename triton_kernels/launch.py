"""Launch configurations: one frozen record, one validity rule, one choice per kernel and device.

A kernel file declares its defaults once, next to its launcher:

    declare("token_stats_fwd", {80: LaunchConfig(block_v=4096, num_warps=8)})

and its launcher asks `choose("token_stats_fwd", logits)`. An architecture that is not declared
takes the next older one: sm_86 the record of 80, sm_120 that of 100. A tuned record replaces a
default only after `TUNED` was filled, which nothing does by itself: see inspection/tune.py.
"""

import contextlib
import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

# Triton refuses a tensor of more elements, and a block of more threads cannot be launched.
MAX_TILE = 1 << 20
MAX_WARPS = 32
# Where there is no GPU to ask, in the interpreter: its results must be those of a shipped record.
DEFAULT_CAPABILITY = 90


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes and the shape of one program; a kernel uses those of its axes.

    Args:
        block_t, block_v, block_h: elements of the token, vocabulary and hidden axis that one step
            of a program takes; powers of two, because tl.arange takes nothing else.
        num_warps: warps of a program, a power of two.
        num_stages: depth of the software pipeline of a loop.
    """

    block_t: int = 1
    block_v: int = 1
    block_h: int = 1
    num_warps: int = 4
    num_stages: int = 1

    def __post_init__(self) -> None:
        reason = invalid(self)
        if reason is not None:
            raise ValueError(f"LaunchConfig: {reason}; got {self}.")

    @property
    def options(self) -> dict[str, int]:
        """What Triton itself takes, as keywords of a launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def invalid(config: LaunchConfig) -> str | None:
    """None where every kernel can be compiled with `config`, else the rule that it breaks."""
    blocks = (config.block_t, config.block_v, config.block_h)
    if any(n < 1 or n & (n - 1) for n in (*blocks, config.num_warps)):
        return "blocks and num_warps must be powers of two"
    pairs = (blocks[0] * blocks[1], blocks[0] * blocks[2], blocks[1] * blocks[2])
    if max(pairs) > MAX_TILE:
        return f"a tile must have at most {MAX_TILE} elements"
    if config.num_warps > MAX_WARPS:
        return f"num_warps must be at most {MAX_WARPS}"
    if max(pairs) < 32 * config.num_warps:
        return "every thread must have an element, so a tile must have 32 * num_warps or more"
    if not 1 <= config.num_stages <= 8:
        return "num_stages must be from 1 to 8"
    return None


DEFAULTS: dict[str, Mapping[int, LaunchConfig]] = {}
# (kernel, capability) -> record; takes precedence over DEFAULTS.
TUNED: dict[tuple[str, int], LaunchConfig] = {}
_ASSUMED: list[int] = []
_WATCHERS: list[list[str]] = []


def declare(kernel: str, by_capability: Mapping[int, LaunchConfig]) -> None:
    """Register the defaults of one kernel by compute capability (80, 90, 100); 80 is required."""
    assert kernel not in DEFAULTS and 80 in by_capability
    DEFAULTS[kernel] = by_capability


def choose(kernel: str, x: torch.Tensor) -> LaunchConfig:
    """The record that `kernel` is launched with on the device of `x`."""
    for chosen in _WATCHERS:
        chosen.append(kernel)
    return default(kernel, _ASSUMED[-1] if _ASSUMED else _capability(x.device))


def default(kernel: str, capability: int) -> LaunchConfig:
    """The tuned record if there is one, else that of the newest architecture not above."""
    tuned = TUNED.get((kernel, capability))
    if tuned is not None:
        return tuned
    table = DEFAULTS[kernel]
    return table[max(c for c in table if c <= max(capability, 80))]


@functools.cache
def _capability(device: torch.device) -> int:
    if device.type != "cuda":
        return DEFAULT_CAPABILITY
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@contextlib.contextmanager
def assume(capability: int) -> Iterator[None]:
    """Inside, `choose` answers for this architecture, whatever the tensors are on."""
    _ASSUMED.append(capability)
    try:
        yield
    finally:
        _ASSUMED.pop()


@contextlib.contextmanager
def choices() -> Iterator[list[str]]:
    """Collects the names that `choose` is asked for inside."""
    chosen: list[str] = []
    _WATCHERS.append(chosen)
    try:
        yield chosen
    finally:
        _WATCHERS.remove(chosen)


@contextlib.contextmanager
def trial(kernel: str, capability: int, config: LaunchConfig) -> Iterator[None]:
    """Inside, `kernel` is launched with `config` on that architecture."""
    before = TUNED.get((kernel, capability))
    TUNED[kernel, capability] = config
    try:
        yield
    finally:
        del TUNED[kernel, capability]
        if before is not None:
            TUNED[kernel, capability] = before


def candidates(kernel: str, capability: int) -> list[LaunchConfig]:
    """The record in use, then every valid one near it: what tuning tries.

    Blocks and warps are halved and doubled, and once more; an axis that the kernel does not have
    stays 1, and a loop that is not pipelined stays so.
    """
    base = default(kernel, capability)
    axes: dict[str, list[int]] = {}
    for name, value in asdict(base).items():
        axes[name] = [value]
        if name == "num_stages" and value > 1:
            axes[name] = [2, 3, 4, 5]
        elif name == "num_warps" or (name != "num_stages" and value > 1):
            axes[name] = [n for n in (value // 4, value // 2, value, 2 * value, 4 * value) if n]
    near = (_valid(dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values()))
    return [base, *(config for config in near if config is not None and config != base)]


def _valid(fields: dict[str, Any]) -> LaunchConfig | None:
    try:
        return LaunchConfig(**fields)
    except ValueError:
        return None
