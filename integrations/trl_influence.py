"""Influence of every completion on a validation loss, for `FusedGRPOTrainer(influence=...)`."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tokfuse.algorithms.capture import DEFAULT_RANK, Captured, capture
from tokfuse.algorithms.captured_layers import is_fsdp
from tokfuse.algorithms.influence import matrix
from tokfuse.runtime.core.checks import check_integer
from tokfuse.runtime.core.errors import refuse

OP = "integrations.trl.CompletionInfluence"


@dataclass(frozen=True, kw_only=True)
class CompletionInfluence:
    """Options of the influence of completions. The score is the cosine with the mean validation gradient.

    A completion with a score above 0 lowers the validation loss, to first order. The gradients include all layers
    except the lm_head, see `tokfuse.influence.capture`. The training itself does not change.

    The metrics are influence/mean, influence/std and influence/helpful, the share of scores above 0. Each rank needs
    the same number of completions and the same validation data.

    Args:
        validation: function of the model that returns a loss, (). The first axis of the model's inputs has the
            sequences. Its gradient is not added to the gradients of the parameters.
        refresh: number of optimizer steps after which the validation gradient is computed again, >= 1.
        rank: of the features, >= 1.
        modules: layers, see `capture`. None: all except the lm_head.
        seed: seed of the projections.
        on_scores: called after the backward of every micro-batch with the scores, (completions,), and TRL's inputs of
            the micro-batch. Use it to select prompts or completions of later steps. None: only metrics.
    """

    validation: Callable[[torch.nn.Module], torch.Tensor]
    refresh: int = 1
    rank: int = DEFAULT_RANK
    modules: str | Sequence[str] | None = None
    seed: int = 0
    on_scores: Callable[[torch.Tensor, dict[str, Any]], None] | None = None

    def __post_init__(self) -> None:
        check_integer(OP, "refresh", self.refresh, 1)


class Watch:
    """The scores of the completions of one trainer."""

    def __init__(self, options: CompletionInfluence) -> None:
        if not isinstance(options, CompletionInfluence):
            raise TypeError(
                f"integrations.trl.FusedGRPOTrainer: influence must be a CompletionInfluence; got {options!r}."
            )
        self.options = options
        self.inputs: dict[str, Any] = {}  # of the micro-batch
        self._captured: Captured | None = None
        self._anchor: torch.Tensor | None = None
        self._computed_at = 0

    def begin(self, inputs: dict[str, Any], head_cu_seqlens: torch.Tensor) -> None:
        """Describe a micro-batch before its forward."""
        self.inputs = inputs
        if self._captured is not None:
            self._captured.batch(head_cu_seqlens=head_cu_seqlens)

    @contextlib.contextmanager
    def step(self, trainer: Any, model: Any) -> Iterator[None]:
        """Context manager around the forward and backward of a micro-batch."""
        plain = trainer.accelerator.unwrap_model(model)
        if is_fsdp(plain):
            raise refuse(OP, "model", "not sharded by FSDP", "an FSDP model", "Use DDP.")
        now = trainer.state.global_step
        if self._anchor is None or now >= self._computed_at + self.options.refresh:
            self._anchor, self._computed_at = self._validation(plain), now
        with self._capture(plain) as self._captured:
            yield
        features, self._captured = self._captured.features, None
        scores = matrix(features, self._anchor).squeeze(1)
        metrics, everywhere = trainer._metrics["train"], trainer.accelerator.gather(scores)
        metrics["influence/mean"].append(float(everywhere.mean()))
        metrics["influence/std"].append(float(everywhere.std(unbiased=False)))
        metrics["influence/helpful"].append(float((everywhere > 0).double().mean()))
        if self.options.on_scores is not None:
            self.options.on_scores(scores, self.inputs)

    def _capture(self, model: torch.nn.Module) -> capture:
        return capture(model, self.options.rank, self.options.modules, self.options.seed)

    def _validation(self, model: torch.nn.Module) -> torch.Tensor:
        """Return the mean feature of the validation sequences, (1, numbers)."""
        leaves = [p for p in model.parameters() if p.requires_grad]
        with self._capture(model) as captured:
            loss = self.options.validation(model)
            torch.autograd.grad(loss, leaves, allow_unused=True)
        if captured.seqs == 0:
            raise refuse(OP, "validation", "a loss of at least one sequence", "none", "Return a loss with a gradient.")
        return captured.features.mean(0, keepdim=True)
