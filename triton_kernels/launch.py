"""Launch configurations: tile sizes and warps of each kernel, by compute capability.

A kernel file declares its defaults once, next to its launcher:

    declare("token_stats_fwd", {80: LaunchConfig(block_v=4096, num_warps=8)})

The launcher calls `choose("token_stats_fwd", logits)`. An architecture without an entry takes the
entry of the next older one: sm_86 that of 80, sm_120 that of 100. A record in `TUNED` replaces the
default. Only inspection/tune.py fills `TUNED`; nothing is tuned automatically.
"""

import contextlib
import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

# Limits of Triton (elements of a tensor) and of CUDA (threads of a block).
MAX_TILE = 1 << 20
MAX_WARPS = 32
# Used without a GPU, in the interpreter, so that it runs a configuration that is shipped.
DEFAULT_CAPABILITY = 90


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes and warps of one program. A kernel uses the tile sizes of its axes only.

    Args:
        block_t, block_v, block_h: elements of the token, vocabulary and hidden axis that a program
            processes in one step; powers of two, as tl.arange requires.
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
        """Return the keywords of a launch that Triton itself reads."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def invalid(config: LaunchConfig) -> str | None:
    """Return the rule that `config` violates, or None if every kernel can be compiled with it."""
    blocks = (config.block_t, config.block_v, config.block_h)
    if any(n < 1 or n & (n - 1) for n in (*blocks, config.num_warps)):
        return "blocks and num_warps must be powers of two"
    pairs = (blocks[0] * blocks[1], blocks[0] * blocks[2], blocks[1] * blocks[2])
    if max(pairs) > MAX_TILE:
        return f"a tile must have at most {MAX_TILE} elements"
    if config.num_warps > MAX_WARPS:
        return f"num_warps must be at most {MAX_WARPS}"
    if max(pairs) < 32 * config.num_warps:
        return "a tile must have at least 32 * num_warps elements, one for each thread"
    if not 1 <= config.num_stages <= 8:
        return "num_stages must be from 1 to 8"
    return None


DEFAULTS: dict[str, Mapping[int, LaunchConfig]] = {}
# (kernel, capability) -> record. It takes precedence over DEFAULTS.
TUNED: dict[tuple[str, int], LaunchConfig] = {}
_ASSUMED: list[int] = []
_WATCHERS: list[list[str]] = []


def declare(kernel: str, by_capability: Mapping[int, LaunchConfig]) -> None:
    """Register the defaults of one kernel by compute capability (80, 90, 100); 80 is required."""
    assert kernel not in DEFAULTS and 80 in by_capability
    DEFAULTS[kernel] = by_capability


def choose(kernel: str, x: torch.Tensor) -> LaunchConfig:
    """Return the record that `kernel` is launched with on the device of `x`."""
    for chosen in _WATCHERS:
        chosen.append(kernel)
    return default(kernel, _ASSUMED[-1] if _ASSUMED else _capability(x.device))


def default(kernel: str, capability: int) -> LaunchConfig:
    """Return the tuned record if there is one, else the newest default up to `capability`."""
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
    """Make `choose` return the record of this architecture inside the context, for any device."""
    _ASSUMED.append(capability)
    try:
        yield
    finally:
        _ASSUMED.pop()


@contextlib.contextmanager
def choices() -> Iterator[list[str]]:
    """Collect the kernel names that `choose` is called with inside the context."""
    chosen: list[str] = []
    _WATCHERS.append(chosen)
    try:
        yield chosen
    finally:
        _WATCHERS.remove(chosen)


@contextlib.contextmanager
def trial(kernel: str, capability: int, config: LaunchConfig) -> Iterator[None]:
    """Launch `kernel` with `config` on that architecture inside the context."""
    before = TUNED.get((kernel, capability))
    TUNED[kernel, capability] = config
    try:
        yield
    finally:
        del TUNED[kernel, capability]
        if before is not None:
            TUNED[kernel, capability] = before


def candidates(kernel: str, capability: int) -> list[LaunchConfig]:
    """Return the records that tuning tries: the one in use, then every valid one near it.

    Block sizes and warps vary from a quarter to four times the value in use. An axis that the
    kernel does not have stays 1, and a loop that is not pipelined stays so.
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
