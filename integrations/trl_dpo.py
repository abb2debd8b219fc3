"""TRL's DPOTrainer with its loss in one pass over the lm_head, for both responses of a pair.

TRL runs the model with a fused head that returns per-token log-probabilities, computes the loss from them in torch,
and uses the head a second time in the backward.

Here the reference is scored first. The head of the policy's forward then is `preference_step`, which computes the
gradients in the forward, inside DDP, FSDP or PEFT wrappers of the model. TRL's own code gets the results without
gradient and computes TRL's metrics.
"""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import DPOConfig, DPOTrainer

from tokfuse.algorithms import PreferenceBatch, PreferenceLoss, PreferenceStep, State, kto_kl, preference_step
from tokfuse.integrations import trl_dpo_losses as losses
from tokfuse.integrations import trl_seams as host
from tokfuse.integrations.trl_algorithm import world_of
from tokfuse.integrations.trl_one_row import OneRow, check_one_row
from tokfuse.runtime.core.errors import refuse

OP = losses.OP

Sums = tuple[torch.Tensor, torch.Tensor]


class PreferenceHead(host.Head):
    """TRL's head as one preference step. `step` is its result."""

    def __init__(self, **inputs: Any) -> None:
        super().__init__(self._run)
        self.inputs = inputs
        self.step: PreferenceStep | None = None

    def _run(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> host.PerToken:
        operands = host.operands(hidden, weight, bias)
        options: dict[str, Any] = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
        hidden, weight, bias = operands
        self.step = preference_step(hidden=hidden, weight=weight, bias=bias, target=targets, **options, **self.inputs)
        logp, *others = host.per_token(self.step.stats, operands, outputs, **options)
        return host.Carry.apply(logp, self.step.loss), *others


class FusedDPOTrainer(DPOTrainer):
    """TRL's DPOTrainer with its loss in `tokfuse.algorithms.preference_step`. Options and metrics are TRL's.

    It supports every `loss_type` of TRL 1.16 and their weighted lists, `ld_alpha`, `use_weighting`, f-divergences, a
    reference model, precomputed reference log-probabilities and PEFT. Loss and gradients equal TRL's up to float32
    rounding. `padding_free=True`, which TRL 1.16 ignores, runs the transformer on one row without padding.

    Args:
        algorithm: a preference loss of `tokfuse.algorithms`, as a name or an instance. It replaces TRL's loss_type and
            its options. The data set may have the columns `pair_weight`, and `level` for a loss with `level_weight`.
            A loss without a reference loads no reference model. None: TRL's own loss.
        model, ref_model, args, data_collator, train_dataset, rest, kwargs: the arguments of `trl.DPOTrainer`.

    Raises:
        ValueError: a TRL older than the tested versions, or an unsupported option.
    """

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: DPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        *rest: Any,
        algorithm: str | PreferenceLoss | None = None,
        **kwargs: Any,
    ) -> None:
        host.HOST.require(f"integrations.trl.{OP}")
        if args is None:
            name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
            args = DPOConfig(f"{name.split('/')[-1]}-DPO")
        self._method = None if algorithm is None else losses.Method(algorithm)
        self._head: host.Head | None = None
        if self._method is not None:
            self._method.check(args, ref_model, train_dataset)
            self._loss = self._method.loss
        else:
            self._loss = losses.loss_of(args)
        # TRL's own losses log the reference's rewards, so they always score it.
        self._scores_reference = self._method is None or self._loss.needs_reference
        self._one_row = args.padding_free
        with contextlib.ExitStack() as stack:
            # TRL would warn that it ignores this option.
            stack.enter_context(mock.patch.object(args, "padding_free", False))
            # TRL's sums of the reference have the same weights.
            stack.enter_context(mock.patch.object(args, "ld_alpha", self._loss.token_tail_weight))
            if not self._scores_reference:  # otherwise TRL would load a reference model that nobody asks
                stack.enter_context(mock.patch.object(args, "precompute_ref_log_probs", True))
            super().__init__(model, ref_model, args, data_collator, train_dataset, *rest, **kwargs)
        self.precompute_ref_logps = args.precompute_ref_log_probs and self._scores_reference
        self.padding_free = self._one_row
        if self._method is not None:
            self.data_collator: Any = losses.Columns(self.data_collator, self._method.columns)
        self._check_model()

    def _check_model(self) -> None:
        if self.args.fp16 and self.accelerator.scaler is None:
            raise refuse(OP, "fp16", "used with a GradScaler", "DeepSpeed's own loss scale", "Use bf16.")
        if self._one_row:
            check_one_row(OP, self.accelerator.unwrap_model(self.model), self._is_vision_dataset)

    def describe(self) -> str:
        """Return how this trainer computes its loss, and on which backends."""
        if self._method is not None:
            what = f"algorithm {self._method.name}"
        else:
            what = f"loss_type {', '.join(self.loss_types)}"
        return f"{OP}: {what}: one preference_step\n{host.describe()}"

    # ---------------------------------------------------------------------------------------- data

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self._method is not None and not set(losses.COLUMNS) & set(self._signature_columns):
            self._signature_columns += list(self._method.columns)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if not self._scores_reference:
            return dataset
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Return the micro-batches of an optimizer step. With a method, count their pairs."""
        samples, items = super().get_batch_samples(*args, **kwargs)
        if self._method is not None:
            self._method.open_window(samples, self.accelerator)
        return samples, items

    # ---------------------------------------------------------------------------------------- loss

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Sums:
        """Return TRL's sums of the reference's log-probabilities, with its head on tokfuse."""
        inputs = {k: v for k, v in inputs.items() if k not in losses.COLUMNS}
        forward = self._forward_of(model)

        def exact(**given: Any) -> Any:
            out = forward(**given)
            if self._method is not None:  # the rewards of an untrained policy are exactly 0, as its sums are float64
                out.log_probs = out.log_probs.double()
            return out

        with host.rebound(host.Head(host.token_head)):
            sums: Sums = super().compute_ref_log_probs(exact, inputs)
        return sums

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """Return the loss of a micro-batch, with its gradient already computed. TRL's metrics are updated."""
        own = {k: v for k, v in inputs.items() if k not in losses.COLUMNS}
        reference = self._reference(own)
        batch = losses.batch_of(inputs, self._loss, self.accelerator, **self._reference_of(reference))
        if self._method is not None and self._method.unpaired:
            batch = replace(batch, kl=self._divergence(model, own))
        step, outputs = self._step(model, own, batch)
        loss = step.loss / self._loss_scale
        replayed = self._replay(model, own, reference, outputs, return_outputs)
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
        if self._method is not None:
            self._log_rewards(*self._method.rewards(step))
            if self.model.training:
                self._method.follow(step, self.accelerator.sync_gradients)
        return (loss, replayed[1]) if return_outputs else loss

    def _reference(self, inputs: dict[str, Any]) -> Sums:
        """Return the reference's sums of the chosen and the rejected responses. Zeros if the loss has none."""
        if not self._scores_reference:
            pairs = inputs["input_ids"].shape[0] // 2
            zero = torch.zeros(pairs, dtype=torch.float32, device=inputs["input_ids"].device)
            return zero, zero
        if self.precompute_ref_logps:
            return inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        return self.compute_ref_log_probs(self.model if self.ref_model is None else self.ref_model, inputs)

    def _reference_of(self, reference: Sums) -> dict[str, Any]:
        if not self._loss.needs_reference:
            return {}
        weight = self._loss.token_tail_weight
        return {"ref_sum": torch.cat(reference), "ref_tail_weight": weight}

    def _step(self, model: Any, inputs: dict[str, Any], batch: PreferenceBatch) -> tuple[PreferenceStep, Any]:
        """Run one preference step inside the model's forward. Return it, and TRL's padded outputs."""
        normalizer, counts = (None, None)
        state: State = {}
        if self._method is not None:
            normalizer, counts = self._method.divisor(self.model.training)
            state = self._method.state
        else:
            state = self._loss.initial_state()
        if normalizer is None:
            normalizer, counts = float(max(1, batch.num_units)), self._loss.counts(batch) or None
        head = PreferenceHead(
            loss=self._loss, state=state, batch=replace(batch, counts=counts), normalizer=normalizer / self._loss_scale
        )
        with host.rebound(head):
            outputs = self._forward_of(model)(**self._model_inputs(inputs))
        assert head.step is not None
        return head.step, outputs

    @property
    def _loss_scale(self) -> float:
        """Factor of the gradients that the forward computes. GradScaler would apply it after float16 has rounded."""
        scaler = self.accelerator.scaler
        return 1.0 if scaler is None or not self.model.training else float(scaler.get_scale())

    def _model_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        skip = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps"}
        out = {name: x for name, x in inputs.items() if name not in skip}
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        labels[:, 0] = -100  # prompt-learning PEFT would predict it from a virtual token
        out |= {"labels": labels, "fused_lm_head": True, "use_cache": False}
        return out | {"output_router_logits": True} if self.aux_loss_enabled else out

    def _forward_of(self, model: Any) -> Callable[..., Any]:
        return OneRow(OP, model) if self._one_row else model

    def _divergence(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Return KTO's estimate of the divergence from the reference, on responses to other prompts."""
        other = losses.mismatched_inputs(inputs, self._tokenizer.pad_token_id)
        with torch.no_grad(), host.rebound(host.Head(host.token_head)):
            policy = self._forward_of(model)(**self._model_inputs(other)).log_probs.sum(1)
        reference = self.compute_ref_log_probs(self.model if self.ref_model is None else self.ref_model, other)
        return kto_kl(policy, torch.cat(reference), world_of(self.accelerator))

    # ------------------------------------------------------------------------------------- metrics

    def _replay(self, model: Any, inputs: dict[str, Any], reference: Sums, outputs: Any, return_outputs: bool) -> Any:
        """Run TRL's loss on these outputs without gradient, which computes TRL's metrics."""
        known = type(outputs)(**{name: x.detach() for name, x in outputs.items()})
        inputs = inputs | {"ref_chosen_logps": reference[0], "ref_rejected_logps": reference[1]}

        def forward(fused_lm_head: bool = False, **kwargs: Any) -> Any:
            return known if fused_lm_head else model(**kwargs)

        with torch.no_grad(), mock.patch.object(self, "precompute_ref_logps", True):
            return super()._compute_loss(forward, inputs, return_outputs)

    def _log_rewards(self, chosen: torch.Tensor, rejected: torch.Tensor) -> None:
        """Replace TRL's rewards, which are defined by DPO, by the method's rewards."""
        logged = {"chosen": chosen, "rejected": rejected, "margins": chosen - rejected}
        logged["accuracies"] = (chosen > rejected).float()
        mode = "train" if self.model.training else "eval"
        for name, value in logged.items():
            self._metrics[mode][f"rewards/{name}"][-1] = self.accelerator.gather(value).mean().item()

    # -------------------------------------------------------------------------------- checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self._method is not None and self.args.should_save:
            folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            self._method.save(f"{self._get_output_dir(trial=trial)}/{folder}")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._method is not None and checkpoint is not None:
            self._method.load(checkpoint)
