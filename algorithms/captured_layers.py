"""The linear layers of a model, and the random projections of their inputs and output gradients.

`tokfuse.influence.capture` uses them. A projection has r rows of signs. Row k is the Kronecker product of two short
rows of signs, P_k,(i d2 + j) = a_k,i b_k,j / sqrt(r), so r 2 sqrt(d) signs are stored in place of r d.
"""

import fnmatch
import functools
import math
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.ops.influence import projection_dtype
from tokfuse.runtime.reference.token_stats import result_dtype

OP = "influence.capture"
TRAINABLE = "trainable"
EXPERTS = ("experts", "expert")  # parts of module names


class Projection:
    """A (rank, size) matrix P with E <P x, P y> = <x, y>. If size <= rank, P is the identity.

    Args:
        size: length of the vectors.
        rank: largest number of rows.
        seed: seed of the signs.
        device: device of the matrix.
        scale: (size,) float, >= 0, multiplies the columns. None: 1.
    """

    def __init__(
        self, size: int, rank: int, seed: int, device: torch.device, scale: torch.Tensor | None = None
    ) -> None:
        self.size, self.rows = size, min(rank, size)
        self.factor = torch.ones((), dtype=torch.float64)
        self._signs: list[torch.Tensor] = []
        if size > rank:
            generator = torch.Generator().manual_seed(seed)
            inner = math.isqrt(size - 1) + 1
            for length in (-(-size // inner), inner):
                bits = torch.randint(0, 2, (rank, length), generator=generator, dtype=torch.float32)
                self._signs.append((2 * bits - 1).to(device))
            self.factor *= rank**-0.5
        self.device = device
        self._scale: torch.Tensor | None = None
        if scale is not None:
            # The largest entry is 1, so that a 16-bit copy cannot overflow.
            largest = scale.double().max().clamp_min(torch.finfo(torch.float64).tiny)
            self._scale = (scale.double() / largest).to(device, result_dtype(scale.dtype))
            self.factor = self.factor * largest.cpu()

    def matrix(self, dtype: torch.dtype) -> torch.Tensor:
        """Return P / factor, (rows, size), computed from the stored signs."""
        if self._signs:
            outer, inner = self._signs if dtype == torch.float32 else (x.to(dtype) for x in self._signs)
            full = (outer.unsqueeze(2) * inner.unsqueeze(1)).view(self.rows, -1)[:, : self.size]
        else:
            full = torch.eye(self.size, dtype=dtype, device=self.device)
        return full if self._scale is None else (full * self._scale).to(dtype)

    def matrix_for(self, x: torch.Tensor) -> torch.Tensor:
        """Return `matrix` in the dtype in which `project` multiplies x by it."""
        scaled = self._scale is not None
        found = self.matrix(result_dtype(x.dtype) if scaled else projection_dtype(x))
        return found if found.device == x.device else found.to(x.device)


def seed_of(seed: int, name: str, side: str) -> int:
    """Return the seed of one projection: the same on every machine and for every order of the layers."""
    return zlib.crc32(f"{seed}/{name}/{side}".encode())


class Layer:
    """One captured weight: a linear layer, or several that share their weight.

    Args:
        name: name of the module in the model.
        module: a linear module.
        place: index among the captured layers.
    """

    def __init__(self, name: str, module: torch.nn.Module, place: int) -> None:
        self.name, self.place, self.modules = name, place, [module]
        assert isinstance(module.weight, torch.Tensor)
        self.weight = module.weight
        self.transposed = is_conv1d(module)
        self.inputs, self.outputs = sizes(module)
        self.reached = False  # whether a gradient arrived
        self.left: Projection
        self.right: Projection

    def make_projections(self, rank: int, seed: int, scales: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        """Draw the projections. scales: factors of the output gradients and of the inputs."""
        out, inner = (None, None) if scales is None else scales
        device = self.weight.device
        self.left = Projection(self.outputs, rank, seed_of(seed, self.name, "out"), device, out)
        self.right = Projection(self.inputs, rank, seed_of(seed, self.name, "in"), device, inner)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the feature of one sequence."""
        return self.left.rows, self.right.rows

    @property
    def factor(self) -> float:
        """Factor of the sums of projected products."""
        return float(self.left.factor * self.right.factor)


def is_conv1d(module: torch.nn.Module) -> bool:
    """Return whether a module is transformers' Conv1D, whose weight is (inputs, outputs)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: torch.nn.Module) -> bool:
    """Return whether a module computes x @ weight.T + bias."""
    return isinstance(module, torch.nn.Linear) or is_conv1d(module)


def sizes(module: Any) -> tuple[int, int]:
    """Return (inputs, outputs)."""
    return tuple(module.weight.shape) if is_conv1d(module) else (module.in_features, module.out_features)


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model inside DistributedDataParallel."""
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        inner: torch.nn.Module = model.module
        return inner
    return model


@functools.lru_cache(maxsize=1)
def _distributed() -> tuple[Any, Any]:
    """Return (DTensor, FSDPModule), or dummies in a torch without torch.distributed."""
    try:
        from torch.distributed.fsdp import FSDPModule
        from torch.distributed.tensor import DTensor
    except ImportError:
        return (), ()
    return DTensor, FSDPModule


def is_dtensor(x: Any) -> bool:
    """Return whether a tensor is split over ranks."""
    return isinstance(x, _distributed()[0])


def is_fsdp(model: torch.nn.Module) -> bool:
    """Return whether a part of the model is sharded by FSDP2."""
    return any(isinstance(module, _distributed()[1]) for module in model.modules())


def reasons(model: torch.nn.Module) -> tuple[dict[str, torch.nn.Module], dict[str, str]]:
    """Return the linear layers by name, and the reason for each layer that cannot be captured."""
    found: dict[str, torch.nn.Module] = {}
    refused: dict[str, str] = {}
    parents = {id(child): parent for parent in model.modules() for child in parent.children()}
    sharded = {id(m) for root in model.modules() if isinstance(root, _distributed()[1]) for m in root.modules()}
    for name, module in model.named_modules():
        parts = name.split(".")
        if any(part in EXPERTS for part in parts) and (is_linear(module) or own_matrices(module)):
            refused[name] = "expert (its tokens carry no sequence)"
        elif is_linear(module):
            if isinstance(parents.get(id(module)), torch.nn.MultiheadAttention):
                refused[name] = "weight that its parent multiplies itself"
            elif isinstance(module.weight, torch.nn.parameter.UninitializedParameter):
                refused[name] = "lazy layer without a size"
            elif is_dtensor(module.weight) and id(module) not in sharded:
                refused[name] = "tensor-parallel layer"
            else:
                found[name] = module
        elif isinstance(module, torch.nn.MultiheadAttention) and module.in_proj_weight is not None:
            refused[f"{name}.in_proj_weight"] = "weight outside a linear layer"
        elif hasattr(module, "in_features") and not any(is_linear(m) for m in module.modules()):
            refused[name] = f"quantised or unknown linear layer {type(module).__name__}"
    return found, refused


def own_matrices(module: torch.nn.Module) -> bool:
    """Return whether a module has weights outside linear layers."""
    return any(p.dim() >= 2 for p in module.parameters(recurse=False))


def linear_layers(model: torch.nn.Module) -> list[str]:
    """Return the names of the linear layers that `capture` supports, for its argument `modules`.

    Excluded are experts of a mixture, quantised layers that are no `torch.nn.Linear`, the projections inside
    `torch.nn.MultiheadAttention` and tensor-parallel layers.

    Args:
        model: a module.

    Examples:
        >>> tokfuse.influence.linear_layers(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU()))
        ['0']
    """
    return list(reasons(unwrapped(model))[0])


def chosen_layers(model: torch.nn.Module, modules: str | Iterable[str] | None) -> list[Layer]:
    """Return the layers to capture. Layers that share their weight count as one.

    Raises:
        ValueError: a layer that cannot be captured, a pattern without a layer, or no layer at all.
    """
    _refuse_wrappers(model)
    found, refused = reasons(model)
    if modules is None:
        names = list(found)
    elif modules == TRAINABLE:
        names = [name for name, module in found.items() if module.weight.requires_grad]
        refused = {n: r for n, r in refused.items() if any(p.requires_grad for p in _parameters(model, n))}
    elif not isinstance(modules, Iterable) or isinstance(modules, str) or not all(isinstance(x, str) for x in modules):
        raise refuse(
            OP,
            "modules",
            f'None, "{TRAINABLE}" or a list of names and patterns',
            repr(modules),
            "Put the name in a list.",
        )
    else:
        names, refused = _matching(list(modules), found, refused)
    if refused:
        some = ", ".join(f"{name}: {reason}" for name, reason in list(refused.items())[:3])
        more = f" and {len(refused) - 3} more" if len(refused) > 3 else ""
        raise refuse(
            OP,
            "modules",
            "without layers that cannot be captured",
            f"{some}{more}",
            "Pass modules=tokfuse.influence.linear_layers(model) for all others.",
        )
    layers: dict[int, Layer] = {}
    for name in names:
        module = found[name]
        known = layers.get(id(module.weight))
        if known is None:
            layers[id(module.weight)] = Layer(name, module, len(layers))
        elif (known.inputs, known.outputs) == sizes(module) and known.transposed == is_conv1d(module):
            known.modules.append(module)
        else:
            raise refuse(
                OP,
                "modules",
                "without weights that two layers use in different directions",
                f"{known.name} and {name}",
                "Leave one of them out.",
            )
    if not layers:
        raise refuse(OP, "model", "one with a linear layer to capture", "none", "Check `modules`.")
    return list(layers.values())


def _refuse_wrappers(model: torch.nn.Module) -> None:
    if isinstance(model, torch.nn.DataParallel):
        raise refuse(
            OP, "model", "not a DataParallel (its replicas run in threads)", "one", "Use DistributedDataParallel."
        )
    for name, module in model.named_modules():
        if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            raise refuse(
                OP,
                "model",
                "not compiled (a compiled graph skips hooks)",
                name or "a compiled model",
                "Capture the eager model.",
            )


def _parameters(model: torch.nn.Module, name: str) -> list[torch.nn.Parameter]:
    """Return the parameters of a refused layer."""
    try:
        return list(model.get_submodule(name).parameters(recurse=False))
    except AttributeError:
        return [model.get_parameter(name)]


def _matching(
    patterns: Sequence[str], found: dict[str, torch.nn.Module], refused: dict[str, str]
) -> tuple[list[str], dict[str, str]]:
    """Return the layers, and the refused layers, whose names match a pattern."""
    known = [*found, *refused]
    idle = [x for x in patterns if not fnmatch.filter(known, x)]
    if idle:
        raise refuse(OP, "modules", "names or patterns of linear layers", f"{idle[0]!r}", f"Known: {known[:3]} ...")
    matches = {name for pattern in patterns for name in fnmatch.filter(known, pattern)}
    return [n for n in found if n in matches], {n: r for n, r in refused.items() if n in matches}
