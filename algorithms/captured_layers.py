"""The layers of a model that `tokfuse.influence.capture` captures: linear layers and norms."""

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from tokfuse.algorithms.captured_norms import Norm, norm_offset
from tokfuse.algorithms.captured_projection import OP, Projection, distributed_types, is_dtensor, seed_of
from tokfuse.runtime.core.errors import refuse

ALL = "all"
TRAINABLE = "trainable"
EXPERTS = ("experts", "expert")  # parts of module names


class Layer:
    """One captured weight: a linear layer, or several that share their weight.

    Args:
        name: name of the module in the model.
        module: a linear module.
        place: index among the captured linear layers.
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

    def same_use(self, module: torch.nn.Module) -> bool:
        """Return whether a module with the same weight multiplies by it in the same direction."""
        return (self.inputs, self.outputs) == sizes(module) and self.transposed == is_conv1d(module)

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


def unwrapped(op: str, model: torch.nn.Module) -> torch.nn.Module:
    """Return the model inside DistributedDataParallel. Raise TypeError if it is no module."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{op}: model must be a torch.nn.Module; got {type(model).__name__}. Pass the model itself.")
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        inner: torch.nn.Module = model.module
        return inner
    return model


def is_fsdp(model: torch.nn.Module) -> bool:
    """Return whether a part of the model is sharded by FSDP2."""
    return any(isinstance(module, distributed_types()[1]) for module in model.modules())


def reasons(model: torch.nn.Module) -> tuple[dict[str, torch.nn.Module], dict[str, str]]:
    """Return the linear layers and norms by name, and the reason for each layer that cannot be captured."""
    found: dict[str, torch.nn.Module] = {}
    refused: dict[str, str] = {}
    parents = {id(child): parent for parent in model.modules() for child in parent.children()}
    sharded = {id(m) for root in model.modules() if isinstance(root, distributed_types()[1]) for m in root.modules()}
    for name, module in model.named_modules():
        parts = name.split(".")
        if any(part in EXPERTS for part in parts) and (is_linear(module) or own_matrices(module)):
            refused[name] = "expert (its tokens carry no sequence)"
        elif is_linear(module):
            if isinstance(parents.get(id(module)), torch.nn.MultiheadAttention):
                refused[name] = "weight that its parent multiplies itself"
            elif isinstance(module.weight, torch.nn.parameter.UninitializedParameter):
                refused[name] = "lazy layer without a size"
            elif is_split(module.weight, module, sharded):
                refused[name] = "tensor-parallel layer"
            else:
                found[name] = module
        elif isinstance(module, torch.nn.MultiheadAttention) and module.in_proj_weight is not None:
            refused[f"{name}.in_proj_weight"] = "weight outside a linear layer"
        elif hasattr(module, "in_features") and not any(is_linear(m) for m in module.modules()):
            refused[name] = f"quantised or unknown linear layer {type(module).__name__}"
        elif norm_offset(module) is not None:
            if is_split(module.weight, module, sharded):
                refused[name] = "tensor-parallel norm"
            else:
                found[name] = module
    return found, refused


def is_split(weight: Any, module: torch.nn.Module, sharded: set[int]) -> bool:
    """Return whether ranks keep parts of a weight in the forward as well. sharded: ids of the modules inside FSDP2."""
    return is_dtensor(weight) and id(module) not in sharded


def own_matrices(module: torch.nn.Module) -> bool:
    """Return whether a module has weights outside linear layers."""
    return any(p.dim() >= 2 for p in module.parameters(recurse=False))


def layers(model: torch.nn.Module) -> list[str]:
    """Return the names of the layers that `capture` supports, without the lm_head, for its argument `modules`.

    These are linear layers and norms. Excluded are experts of a mixture, quantised layers that are
    no `torch.nn.Linear`, the projections inside `torch.nn.MultiheadAttention` and tensor-parallel layers.

    Args:
        model: a module.

    Examples:
        >>> tokfuse.influence.layers(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3), torch.nn.ReLU()))
        ['0', '1']
    """
    model = unwrapped("influence.layers", model)
    in_head = head_modules(model)
    return [name for name in reasons(model)[0] if not in_head(name)]


def head_modules(model: torch.nn.Module) -> Callable[[str], bool]:
    """Return a function that says whether a name is the output embedding of the model, or an adapter of it."""
    asked = getattr(model, "get_output_embeddings", None)
    module = asked() if callable(asked) else None
    if module is None:
        return lambda name: "lm_head" in name.split(".")
    names = {id(m): name for name, m in model.named_modules()}
    within = [names[id(m)] for m in module.modules() if id(m) in names]
    return lambda name: any(name == x or name.startswith(f"{x}.") for x in within)


def chosen_layers(model: torch.nn.Module, modules: str | Iterable[str] | None) -> list[Layer | Norm]:
    """Return the layers to capture. Layers that share their weight count as one.

    Raises:
        ValueError: a layer that cannot be captured, a pattern without a layer, or no layer at all.
    """
    _refuse_wrappers(model)
    found, refused = reasons(model)
    if modules is None:
        in_head = head_modules(model)
        names = [name for name in found if not in_head(name)]
        refused = {name: reason for name, reason in refused.items() if not in_head(name)}
    elif modules == ALL:
        names = list(found)
    elif modules == TRAINABLE:
        names = [name for name, module in found.items() if module.weight.requires_grad]
        refused = {n: r for n, r in refused.items() if any(p.requires_grad for p in _parameters(model, n))}
    elif not isinstance(modules, Iterable) or isinstance(modules, str) or not all(isinstance(x, str) for x in modules):
        raise refuse(
            OP,
            "modules",
            f'None, "{ALL}", "{TRAINABLE}" or a list of names and patterns',
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
            "Pass modules=tokfuse.influence.layers(model) for all others.",
        )
    chosen: dict[int, Layer | Norm] = {}
    linear = 0
    for name in names:
        module = found[name]
        assert isinstance(module.weight, torch.Tensor)
        known = chosen.get(id(module.weight))
        if known is not None and known.same_use(module):
            known.modules.append(module)
        elif known is not None:
            raise refuse(
                OP,
                "modules",
                "without weights that two layers use in different directions",
                f"{known.name} and {name}",
                "Leave one of them out.",
            )
        elif is_linear(module):
            chosen[id(module.weight)] = Layer(name, module, linear)
            linear += 1
        else:
            chosen[id(module.weight)] = Norm(name, module)
    if not chosen:
        raise refuse(OP, "model", "one with a layer to capture", "none", f'Check `modules`; "{ALL}" has the lm_head.')
    return list(chosen.values())


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
        raise refuse(OP, "modules", "names or patterns of layers", f"{idle[0]!r}", f"Known: {known[:3]} ...")
    matches = {name for pattern in patterns for name in fnmatch.filter(known, pattern)}
    return [n for n in found if n in matches], {n: r for n, r in refused.items() if n in matches}
