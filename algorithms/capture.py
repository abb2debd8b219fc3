"""Gradient features of every linear layer and norm, taken from an ordinary forward and backward of a batch.

    with tokfuse.influence.capture(model) as captured:
        loss_of(model(ids)).backward()
    captured.features  # (seqs, numbers)

A forward hook projects the input of a linear layer. A hook on the output projects its gradient. The kernel of
`influence.sketch` adds up the products of both over the tokens of each sequence, for several layers per launch. The
weight of a norm is a vector, so its gradient is summed first and projected then.
"""

import contextlib
import functools
import warnings
from collections.abc import Iterable
from typing import Any

import torch

from tokfuse.algorithms.adam_factors import layer_scales
from tokfuse.algorithms.captured_batches import Batch, Description, Recorder, in_backward
from tokfuse.algorithms.captured_layers import Layer, chosen_layers, unwrapped
from tokfuse.algorithms.captured_norms import Norm
from tokfuse.algorithms.captured_projection import OP, is_dtensor
from tokfuse.algorithms.influence import matrix
from tokfuse.runtime.core import checks
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.lm_head.probe import HeadProbe, open_source
from tokfuse.runtime.ops.influence import check_spec, project
from tokfuse.runtime.reference.token_stats import result_dtype

DEFAULT_RANK = 16  # of 4, 8 and 16 the smallest above 0.85 in every pool and seed of bench/study_influence.py


class Captured:
    """Features of the sequences of a `capture`, in the order of the forwards.

    A feature is a matrix per sequence and linear layer, F = sum over tokens of (P_out dY_t) (P_in x_t)^T, the two-sided
    random projection of the gradient of the layer's weight. For a norm it is a vector, the projection of the gradient
    of its weight. `features` has all layers side by side.
    """

    def __init__(self, layers: list[Layer | Norm], rank: int, seed: int, recorder: Recorder) -> None:
        self.rank, self.seed = rank, seed
        self._layers = {layer.name: layer for layer in layers}
        self._shapes = {layer.name: layer.shape for layer in layers}
        self._recorder = recorder

    @property
    def names(self) -> list[str]:
        """Names of the captured layers, in the order of their numbers in `features`."""
        return list(self._shapes)

    @property
    def seqs(self) -> int:
        """Number of sequences."""
        return sum(batch.seqs for batch in self._recorder.batches)

    @property
    def features(self) -> torch.Tensor:
        """(seqs, numbers) float32 (float64 for a float64 model). Detached."""
        return torch.cat([self.layer(name).flatten(1) for name in self._shapes], 1)

    def layer(self, name: str) -> torch.Tensor:
        """Return the features of one layer, (seqs, r_out, r_in), where r is the rank, or the size if that is smaller.

        The features of a norm are (seqs, numbers), with r^2 numbers, or the size if that is smaller.

        Args:
            name: one of `names`.
        """
        checks.check_choice("Captured.layer", "name", name, tuple(self._shapes))
        layer = self._layers[name]
        self._recorder.add_up()
        if not self._recorder.batches:
            return torch.zeros(0, *layer.shape, dtype=torch.float32, device="cpu")
        return torch.cat([_of_batch(layer, batch) for batch in self._recorder.batches]) * layer.factor

    def scores(self, other: "Captured | None" = None, *, cosine: bool = True) -> torch.Tensor:
        """Return the inner products of all pairs of sequences, (seqs, seqs of other), see `influence.matrix`.

        Args:
            other: another capture of the same layers with the same rank and seed, e.g. of validation data. None:
                this one.
            cosine: divide by the norms.
        """
        if other is not None:
            mine = (self._shapes, self.rank, self.seed)
            if mine != (other._shapes, other.rank, other.seed):
                raise refuse(
                    "Captured.scores",
                    "other",
                    "of the same layers, rank and seed",
                    f"{len(other.names)} layers, rank {other.rank}, seed {other.seed}",
                    "Capture both with the same arguments.",
                )
        return matrix(self.features, None if other is None else other.features, cosine=cosine)

    def batch(
        self,
        *,
        cu_seqlens: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        head_cu_seqlens: torch.Tensor | None = None,
    ) -> None:
        """Describe the sequences of the next forward. Not needed if the first axis of the inputs has the sequences.

        Args:
            cu_seqlens: (seqs + 1,) int32 offsets of packed sequences.
            mask: (seqs, length) or (tokens,) bool, True for tokens that count. Only needed if padding tokens have
                a gradient, or values that are not finite.
            head_cu_seqlens: (seqs + 1,) int32, offsets of the sequences in the rows of `hidden`, if a fused lm_head
                gets only a part of the tokens and no cu_seqlens.
        """
        for name, value in {"cu_seqlens": cu_seqlens, "mask": mask, "head_cu_seqlens": head_cu_seqlens}.items():
            if value is not None:
                checks.require_tensor(OP, name, value)
        self._recorder.next = Description()
        self._recorder.begin(Description(cu_seqlens, mask, head_cu_seqlens))


def _of_batch(layer: Layer | Norm, batch: Batch) -> torch.Tensor:
    """Return the features of one layer and one batch, without the factor."""
    if isinstance(layer, Layer):
        rows, columns = layer.shape
        return batch.sums[layer.place, :, :rows, :columns]
    found = batch.norms.get(layer.name)
    return batch.sums.new_zeros(batch.seqs, *layer.shape) if found is None else found


class capture(contextlib.AbstractContextManager[Captured]):  # noqa: N801  used like a function
    """Context manager: the gradient features of every linear layer and norm, for each sequence of a batch.

    Run the forward and the backward of a batch inside it. For each layer y = W x and each sequence it computes
    F = sum over tokens of (P_out dY_t) (P_in x_t)^T, the projection of the gradient of W on this sequence. For a norm
    y = w * f(x) it computes P (sum over tokens of dY_t * f(x_t)). There is no backward per sample and no second pass,
    and no gradient of a weight is kept.

    Args:
        model: a module. Forwards of `model` itself start a new batch of rows.
        rank: r of the features, r^2 numbers per layer and sequence, >= 1.
        modules: names or patterns (`*.mlp.*`) of the layers. "all": every linear layer and norm. "trainable": the
            layers whose weight requires a gradient, e.g. the A and B of LoRA. None: all except the lm_head. The lm_head
            is one layer with a large part of the gradient, so the error of its projection does not average out.
        seed: seed of the projections. Only features with the same layers, rank and seed are comparable.
        optimizer: an Adam or Adafactor optimizer after its first step. The features are then projections of g /
            sqrt(v), with v replaced by its rank-1 approximation R_i C_j / mean(v). Use it for the training samples,
            not for validation samples. None: plain gradients.

    Returns:
        `Captured`, one row per sequence, in the order of the forwards.

    Layers: torch.nn.Linear and its subclasses (also 4-bit and 8-bit ones), transformers' Conv1D, LoRA's A and B; norms
        of every library that compute w * f(x) + b or (1 + w) * f(x) on the last axis with a vector w, such as LayerNorm
        and RMSNorm; with "all" the lm_head, also if it only runs inside a tokfuse op from hidden states. Frozen
        weights are included if their output needs a gradient. Layers that share a weight, and a layer that runs
        twice, are summed. Embeddings, convolutions, biases and other norms are not captured. A layer that no gradient
        reaches has features of 0, and a warning at the end names it. The output of a captured norm must not be changed
        in place.

    Sequences: the first axis of the inputs, or packed sequences with `Captured.batch(cu_seqlens=...)` or the argument
        `cu_seq_lens_q` of the model's forward. Padding has no gradient and adds nothing. A forward of `model`, or the
        first forward after a backward, starts new rows: so gradient accumulation gives one row per sequence.

    Trainers: gradient checkpointing, autocast, FSDP2 and DDP are supported. A rank computes the features of its own
        sequences only. The features have the scale of the loss: its normaliser, and the factor of a GradScaler.

    Numerics: float32 sums (float64 for a float64 model). E <F_s, F_u> = <G_s, G_u> per layer, with a relative spread
        of about 1 / r, which averages out over the layers. A norm with up to r^2 weights is exact.

    Gradients and memory: no effect on the gradients of the model. seqs x layers x r^2 floats, plus tokens x layers x
        r floats between forward and backward. A projection stores r 2 sqrt(d) signs.

    Examples:
        >>> model = torch.nn.Linear(3, 2, bias=False)
        >>> x = torch.ones(4, 5, 3)  # four sequences of five tokens
        >>> with tokfuse.influence.capture(model) as captured:
        ...     model(x).sum().backward()
        >>> captured.layer("")[0]  # sizes up to the rank are not projected
        tensor([[5., 5., 5.],
                [5., 5., 5.]])

    Raises:
        ValueError: a layer that cannot be captured: an expert of a mixture, whose tokens carry no sequence; a quantised
            layer that is no torch.nn.Linear; a tensor-parallel layer; a compiled model. Pass
            `modules=tokfuse.influence.layers(model)` to capture all others. Also: an input whose rows are
            neither the tokens nor the sequences of the batch; an optimizer without a second moment of a layer; a
            norm with an entry of its weight that multiplies by 0.

    Source: LoGra (arXiv 2405.13954), for all layers of a batch at once; the second moment as in Adafactor (arXiv
        1804.04235) and LESS (arXiv 2402.04333).
    """

    def __init__(
        self,
        model: torch.nn.Module,
        rank: int = DEFAULT_RANK,
        modules: str | Iterable[str] | None = None,
        seed: int = 0,
        *,
        optimizer: Any | None = None,
    ) -> None:
        checks.check_integer(OP, "rank", rank, 1)
        check_spec(OP, rank, seed)
        self.model = unwrapped(OP, model)
        self.rank, self.seed = rank, seed
        self._layers = chosen_layers(self.model, modules)
        for layer in self._layers:
            layer.make_projections(rank, seed, None if optimizer is None else layer_scales(layer, optimizer))
        self._head = head_layer(self.model, [x for x in self._layers if isinstance(x, Layer)])
        self._stack: contextlib.ExitStack | None = None
        self._recorder = Recorder(sum(isinstance(x, Layer) for x in self._layers), rank)

    def __enter__(self) -> Captured:
        if self._stack is not None:
            raise RuntimeError(f"{OP}: the context is already open. Make a new one for each use.")
        self._stack = contextlib.ExitStack()
        handles = [self.model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for layer in self._layers:
            after: Any = self._after_norm if isinstance(layer, Norm) else self._after_forward
            hook = functools.partial(after, layer)
            handles += [module.register_forward_hook(hook, with_kwargs=True) for module in layer.modules]
        for handle in handles:
            self._stack.callback(handle.remove)
        self._stack.enter_context(open_source(self))
        return Captured(self._layers, self.rank, self.seed, self._recorder)

    def __exit__(self, kind: Any, *rest: Any) -> None:
        assert self._stack is not None
        self._stack.close()
        if kind is not None:
            return
        idle = [layer.name for layer in self._layers if not layer.reached]
        if idle:
            more = f" and {len(idle) - 3} more" if len(idle) > 3 else ""
            warnings.warn(
                f"{OP}: no gradient arrived at {', '.join(idle[:3])}{more}, so these features are 0. Run the backward "
                "inside the context, or leave the layers out with modules=.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _begin(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled() or in_backward():
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        sizes = None
        if isinstance(ids, torch.Tensor) and ids.dim() == 2 and not ids.is_floating_point():
            sizes = (ids.shape[0], ids.numel())
        self._recorder.begin(Description(kwargs.get("cu_seq_lens_q"), sizes=sizes))

    def _after_forward(
        self, layer: Layer, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if not isinstance(output, torch.Tensor) or not output.requires_grad:
            return
        x = args[0] if args else next(iter(kwargs.values()))
        _check_whole(layer.name, (x, output), (layer.inputs, layer.outputs))
        with _plainly(x):
            batch = self._recorder.batch_of(x)
            offsets = None if batch is None else batch.offsets(layer.name, x)
            rows = _rows(x)
            right = project(rows, layer.right.matrix_for(rows))
        # A view changes its history if the model later writes into it, and then its own hooks never run.
        base = output._base if output._is_view() else None
        at = output if base is None or base.numel() != output.numel() else base
        at.register_hook(functools.partial(self._at_gradient, layer, batch, offsets, right))

    def _at_gradient(
        self, layer: Layer, batch: Batch | None, offsets: torch.Tensor | None, right: torch.Tensor, grad: torch.Tensor
    ) -> None:
        if batch is None or offsets is None:
            raise _unknown_sequences(layer.name)
        with _plainly(grad):
            rows = grad.detach().reshape(-1, layer.outputs)
            left = project(rows, layer.left.matrix_for(rows))
            self._record(layer, batch, offsets, left, right)

    def _after_norm(
        self, norm: Norm, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> torch.Tensor | None:
        if not isinstance(output, torch.Tensor) or not output.requires_grad:
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        _check_whole(norm.name, (x, output), (norm.size, norm.size))
        batch = self._recorder.batch_of(x)
        offsets, mask = (None, None) if batch is None else (batch.offsets(norm.name, x), batch.mask_of(norm.name, x))

        def record(rows: torch.Tensor) -> None:
            if batch is None or offsets is None:
                raise _unknown_sequences(norm.name)
            norm.reached = True
            with _plainly(rows):
                self._recorder.add_norm(batch, norm, offsets, rows if mask is None else rows.where(mask[:, None], 0.0))

        return norm.tap(module, output, record)

    def _record(
        self, layer: Layer, batch: Batch, offsets: torch.Tensor, left: torch.Tensor, right: torch.Tensor
    ) -> None:
        layer.reached = True
        self._recorder.add(batch, layer.place, offsets, left, right)

    # ------------------------------------------------------------------------- lm_head inside an op

    def captures_head(self, hidden_size: int) -> bool:
        """Return whether the lm_head is captured and has this hidden size."""
        return self._head is not None and self._head.inputs == hidden_size

    def probe(
        self, op: str, hidden: torch.Tensor, weight: torch.Tensor, cu_seqlens: torch.Tensor | None
    ) -> HeadProbe | None:
        """Return the probe of a tokfuse op that computes the lm_head itself."""
        head = self._head
        if head is None or tuple(weight.shape) != (head.outputs, head.inputs):
            return None
        with _plainly(hidden):
            batch = self._batch_of_head(op, hidden, cu_seqlens)
            offsets = batch.offsets_of_head(op, hidden.shape[0], cu_seqlens)
            rows = _rows(hidden)
            right = project(rows, head.right.matrix_for(rows))
            projection = head.left.matrix(result_dtype(hidden.dtype)).to(hidden.device)

        def record(left: torch.Tensor) -> None:
            with _plainly(left):
                self._record(head, batch, offsets, left.detach(), right)

        return HeadProbe.of(projection, hidden.shape[0], record)

    def _batch_of_head(self, op: str, hidden: torch.Tensor, cu_seqlens: torch.Tensor | None) -> Batch:
        """Return the open batch. If no layer before the head has a gradient, the head starts it."""
        if self._recorder.starts and cu_seqlens is not None:
            self._recorder.begin(Description(cu_seqlens))
        elif self._recorder.starts and self._recorder.next.cu_seqlens is None:
            raise refuse(
                op,
                "hidden",
                "the result of a captured forward with a gradient",
                "hidden states of unknown sequences",
                "Call captured.batch(cu_seqlens=...) first.",
            )
        batch = self._recorder.batch_of(hidden)
        if batch is None:
            raise RuntimeError(f"{op}: it runs inside a backward, so its captured sequences are unknown.")
        return batch


def _plainly(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return a context manager: no gradient and no autocast. It costs a microsecond without autocast."""
    if not torch.is_autocast_enabled(x.device.type):
        return torch.no_grad()
    stack = contextlib.ExitStack()
    stack.enter_context(torch.no_grad())
    stack.enter_context(torch.autocast(x.device.type, enabled=False))
    return stack


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.detach().reshape(-1, x.shape[-1])


def _check_whole(name: str, found: tuple[torch.Tensor, torch.Tensor], sizes: tuple[int, int]) -> None:
    """Raise ValueError unless the input and the output of a layer are not split over ranks."""
    if any(is_dtensor(x) or x.shape[-1] != size for x, size in zip(found, sizes, strict=True)):
        raise refuse(
            OP,
            name,
            f"a layer of whole inputs ({sizes[0]}) and outputs ({sizes[1]})",
            " and ".join(str(tuple(x.shape)) for x in found),
            "Leave the layer out with modules=.",
        )


def _unknown_sequences(name: str) -> RuntimeError:
    return RuntimeError(
        f"{OP}: reentrant gradient checkpointing recomputes {name} after several forwards, so its "
        "sequences are unknown. Pass use_reentrant=False, or run the backward after each forward."
    )


def head_layer(model: torch.nn.Module, layers: list[Layer]) -> Layer | None:
    """Return the captured layer that a tokfuse op from hidden states replaces: the output embedding of the model."""
    asked = getattr(model, "get_output_embeddings", None)
    module = asked() if callable(asked) else None
    if module is None:
        inside = [layer for layer in layers if layer.name.split(".")[-1] == "lm_head"]
    else:
        within = {id(m) for m in module.modules()}
        inside = [x for x in layers if any(id(m) in within for m in x.modules)]
        inside = [x for x in inside if (x.outputs, x.inputs) == tuple(module.weight.shape)]  # and no adapter
    # PEFT's modules_to_save keeps a frozen copy of the layer.
    return max(inside, key=lambda layer: layer.weight.requires_grad, default=None)
