"""verl's fused heads on `tokfuse.linear_token_stats`, including features that verl's own fused path rejects.

verl looks up `FusedLinearForPPO` and `linear_cross_entropy` at every forward. Replacing the two names is therefore
enough for its dense and vision models. Three options that verl's FSDP engine rejects with fused heads then work: a
temperature per sample; the sum of squared probabilities (`calculate_sum_pi_squared`, for the optimal token baseline),
which the fused head computes anyway; and the top-k distillation losses of `verl_distillation`.
"""

import functools
import importlib
import sys
from types import ModuleType
from typing import Any

import torch

from tokfuse.integrations import verl_distillation
from tokfuse.integrations.hosts import on_kernels
from tokfuse.integrations.verl_distillation import IDS, LOGP_AT
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.core.statistics import TokenStats, TokenStatsAt
from tokfuse.runtime.ops.linear_token_stats import linear_token_stats

OP = "verl_plugin"
OF_HEADS = "linear_token_stats"  # the op that the heads run
SUM_SQ = "_tokfuse_sum_sq"  # attribute of the log_probs that a fused forward returns
TORCH_HEAD = "verl.utils.experimental.torch_functional"
TRITON_HEAD = "verl.utils.kernel.linear_cross_entropy"
# Modules that imported the name when they were loaded.
MEGATRON = ("verl.models.mcore.model_forward_fused", "verl.models.mcore.model_forward_1f1b_overlap")
STOCK: dict[str, Any] = {}  # verl's own heads, for devices without kernels
ENGINE = "verl.workers.engine.fsdp.transformer_impl"


def _plain(weight: torch.Tensor) -> torch.Tensor:
    if hasattr(weight, "placements"):
        raise refuse(
            OP,
            "vocab_weights",
            "a plain tensor",
            "a DTensor",
            "Call the head inside the model's forward, where FSDP has gathered it, or use "
            "tokfuse.distributed for tensor parallelism.",
        )
    return weight


def _temperature(value: Any, tokens: int) -> float | torch.Tensor:
    """Return a number, or (tokens,) from any shape with one value per token."""
    if not isinstance(value, torch.Tensor):
        return float(value)
    flat = value.reshape(-1).float()
    if flat.numel() == 1:
        return flat.expand(tokens)
    if flat.numel() != tokens:
        raise refuse(
            OP,
            "temperature",
            f"a number or one per token ({tokens})",
            f"shape {tuple(value.shape)}",
            "Expand it to one value per token.",
        )
    return flat


def fused_head(
    hidden_states: torch.Tensor, vocab_weights: torch.Tensor, input_ids: torch.Tensor, temperature: Any = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (log_probs, entropy), float32, with the shape of input_ids; differentiable.

    If `verl_distillation` attached the teacher's ids to input_ids, their log-probabilities are attached to log_probs.
    """
    hidden, weight = hidden_states.reshape(-1, hidden_states.shape[-1]), _plain(vocab_weights)
    target = input_ids.reshape(-1).to(torch.int64)
    options: dict[str, Any] = {"temperature": _temperature(temperature, len(target))}
    ids = getattr(input_ids, IDS, None)
    stats: TokenStats | TokenStatsAt
    if ids is None:
        stats = linear_token_stats(hidden, weight, target, **options)
    else:
        stats = at = linear_token_stats(hidden, weight, target, ids=ids, **options)
    log_probs = stats.logp.view(input_ids.shape)
    setattr(log_probs, SUM_SQ, stats.sum_sq)
    if ids is not None:
        setattr(log_probs, LOGP_AT, at.logp_at)
    return log_probs, stats.entropy.view(input_ids.shape)


class FusedLinearForPPO(torch.nn.Module):
    """verl's head of the same name. `chunk_size` is ignored: tokfuse chooses it from a memory budget."""

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()
        if impl_backend not in ("torch", "liger"):
            raise refuse(OP, "impl_backend", "'torch' or 'liger'", repr(impl_backend), "Both use tokfuse.")
        self.chunk_size = chunk_size

    def forward(
        self, hidden_states: torch.Tensor, vocab_weights: torch.Tensor, input_ids: torch.Tensor, temperature: Any = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (log_probs, entropy) with the shape of input_ids."""
        if not on_kernels("verl", OF_HEADS, hidden_states):
            own: tuple[torch.Tensor, torch.Tensor] = STOCK["FusedLinearForPPO"](self.chunk_size)(
                hidden_states, vocab_weights, input_ids, temperature
            )
            return own
        return fused_head(hidden_states, vocab_weights, input_ids, temperature)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    temperature: Any = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (log_probs, entropy), (tokens,) each, in place of verl's Triton head.

    With a tensor-parallel group of more than one rank, `weight` is this rank's equal part of the vocabulary. The
    gradient of hidden is then this rank's part only; Megatron adds the parts.
    """
    if reduction != "none":
        raise refuse(OP, "reduction", "'none' (verl uses no other)", repr(reduction), "Reduce the result yourself.")
    ids = getattr(labels, IDS, None)
    if ids is None and not on_kernels("verl", OF_HEADS, hidden):  # verl's own head has no log-probs at ids
        own: tuple[torch.Tensor, torch.Tensor] = STOCK["linear_cross_entropy"](
            hidden, weight, labels, temperature, reduction, dist_process_group
        )
        return own
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    group = dist_process_group
    if group is None or torch.distributed.get_world_size(group) == 1:
        setattr(labels, IDS, ids)
        return fused_head(hidden, weight, labels, temperature)
    from tokfuse.runtime.distributed.vocab_parallel import linear_token_stats as sharded
    from tokfuse.runtime.distributed.vocab_shard import VocabShard

    rows, ranks = weight.shape[0], torch.distributed.get_world_size(group)
    start = rows * torch.distributed.get_rank(group)
    stats = sharded(
        hidden,
        _plain(weight),
        labels.to(torch.int64),
        shard=VocabShard(rows * ranks, start, start + rows, group),
        temperature=_temperature(temperature, len(labels)),
        reduce_hidden=False,
    )
    return stats.logp, stats.entropy


# ------------------------------------------------------- options that the FSDP engine rejects with fused heads


def prepare_model_inputs(original: Any) -> Any:
    """Wrap the engine's method, so that it accepts a temperature per sample with fused kernels."""

    @functools.wraps(original)
    def call(self: Any, micro_batch: Any, *args: Any, **kwargs: Any) -> Any:
        tu = importlib.import_module("verl.utils.tensordict_utils")
        fused = tu.get_non_tensor_data(data=micro_batch, key="use_fused_kernels", default=False)
        if not fused or not isinstance(micro_batch["temperature"], torch.Tensor):
            return original(self, micro_batch, *args, **kwargs)
        padded = not tu.get_non_tensor_data(data=micro_batch, key="use_remove_padding", default=True)
        if padded:
            raise refuse(
                OP,
                "use_remove_padding",
                "True for a temperature per sample with fused kernels",
                False,
                "Set model.use_remove_padding=True.",
            )
        # Prepare as for the logits path, which spreads the temperature over the packed, sliced tokens.
        plain = micro_batch.copy()
        tu.assign_non_tensor(plain, use_fused_kernels=False)
        inputs, arguments = original(self, plain, *args, **kwargs)
        inputs["temperature"] = arguments["temperature_rmpad"].unsqueeze(0)
        inputs["shift_labels"] = arguments["input_ids_rmpad_rolled"].unsqueeze(0)
        inputs["return_dict"] = True
        return inputs, arguments

    return call


def prepare_model_outputs(original: Any) -> Any:
    """Wrap the engine's method, so that it returns sum_pi_squared with fused kernels."""

    @functools.wraps(original)
    def call(self: Any, output: Any, output_args: Any, micro_batch: Any, *args: Any, **kwargs: Any) -> Any:
        tu = importlib.import_module("verl.utils.tensordict_utils")
        wanted = ("use_fused_kernels", "calculate_sum_pi_squared")
        if not all(tu.get_non_tensor_data(data=micro_batch, key=k, default=False) for k in wanted):
            return original(self, output, output_args, micro_batch, *args, **kwargs)
        square = getattr(output.log_probs, SUM_SQ, None)
        if square is None:
            raise refuse(
                OP,
                "output.log_probs",
                "what the installed fused head returned",
                "a different tensor",
                "Use a model whose forward verl patches, without casting its outputs.",
            )
        without = micro_batch.copy()
        tu.assign_non_tensor(without, calculate_sum_pi_squared=False)
        made = original(self, output, output_args, without, *args, **kwargs)
        offsets = micro_batch["input_ids"].offsets()
        if tu.get_non_tensor_data(data=micro_batch, key="use_remove_padding", default=True):
            square = self._gather_and_unpad_packed(square, output_args["pad_size"])
        else:
            square = square.view(output.log_probs.shape)
            place = torch.arange(square.shape[1], device=square.device)
            square = square[place < offsets.diff().unsqueeze(1)]
        made["sum_pi_squared"] = torch.nested.nested_tensor_from_jagged(square, offsets)
        return made

    return call


def targets() -> list[tuple[Any, str, Any]]:
    """Return (owner, attribute, replacement) of every attribute that exists in this process."""
    out: list[tuple[Any, str, Any]] = [
        (importlib.import_module(TORCH_HEAD), "FusedLinearForPPO", FusedLinearForPPO),
        (importlib.import_module(TRITON_HEAD), "linear_cross_entropy", linear_cross_entropy),
    ]
    for owner, attribute, ours in out:
        if getattr(owner, attribute) is not ours:
            STOCK[attribute] = getattr(owner, attribute)
    loaded: list[ModuleType] = [sys.modules[name] for name in MEGATRON if name in sys.modules]
    out += [(module, "linear_cross_entropy", linear_cross_entropy) for module in loaded]
    engine = importlib.import_module(ENGINE).FSDPEngineWithLMHead
    for name, wraps in (
        ("prepare_model_inputs", (prepare_model_inputs, verl_distillation.prepare_model_inputs)),
        ("prepare_model_outputs", (prepare_model_outputs, verl_distillation.prepare_model_outputs)),
    ):
        method = getattr(engine, name)
        for wrap in wraps:
            method = wrap(method)
        out.append((engine, name, method))
    return out
