"""TRL's GRPOTrainer with its policy loss in one pass over the lm_head.

TRL runs the model with a fused head that returns per-token log-probabilities. It computes the loss from them in torch,
and uses the head a second time in the backward.

Here the head is `tokfuse.policy_step`. TRL's forward calls it with the hidden states and the weight, inside DDP, FSDP
or PEFT wrappers of the model, and it computes the gradients in the forward. TRL's own code then gets the
log-probabilities without gradient and computes TRL's metrics.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer

from tokfuse.algorithms import Algorithm
from tokfuse.integrations import trl_algorithm, trl_kept, trl_objective
from tokfuse.integrations import trl_seams as host
from tokfuse.integrations.hosts import has_kernels
from tokfuse.integrations.padded import Padding
from tokfuse.integrations.trl_influence import CompletionInfluence, Watch
from tokfuse.integrations.trl_one_row import OneRow, check_one_row
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.ops.policy_loss import policy_loss
from tokfuse.runtime.ops.policy_step import policy_step
from tokfuse.runtime.policy.results import PolicyStep

OP = "integrations.trl.FusedGRPOTrainer"
FORWARD_KEYS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)

Scores = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


class PolicyHead(host.Head):
    """TRL's head as one policy step. `step` is its result."""

    def __init__(self, inputs: dict[str, Any]) -> None:
        super().__init__(self._run)
        self.inputs = inputs
        self.step: PolicyStep | None = None

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
        hidden, weight, bias = host.operands(hidden, weight, bias)
        self.step = policy_step(
            hidden=hidden,
            weight=weight,
            bias=bias,
            target=targets,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            **self.inputs,
        )
        stats = self.step.stats
        return host.Carry.apply(stats.logp, self.step.loss), stats.entropy, None, None, None


class FusedGRPOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer with its policy loss in `tokfuse.policy_step`. Options and metrics are TRL's.

    It supports every `loss_type`, importance sampling level and correction of TRL 1.16. Loss and gradients equal TRL's
    up to float32 rounding.

    Some options take two calls, statistics and then `policy_loss`: `top_entropy_quantile`,
    `off_policy_mask_threshold`, a bias-corrected KL with a sequence ratio, and float16 scaling. They read the policy
    before the loss, add a term that the objective does not have, or scale the loss before any gradient is computed.

    If the sampler truncates its distribution (top_p, top_k), its `rollout_func` may also return `kept_ids`: for each
    completion and token, the list of the ids that the sampler kept. The policy, the old policy and the reference are
    then distributions over these ids. TRL's vLLM log-probabilities are over them, too ("processed_logprobs").

    Args:
        algorithm: a method of `tokfuse.algorithms`, as a name or an instance. It replaces TRL's advantages,
            loss_type and their options. Rewards, generation, the optimizer and the reference model remain TRL's (set
            beta to the method's KL coefficient). None: TRL's own loss.
        solved_above: with an algorithm: a response is correct if its reward is above this value.
        influence: a `CompletionInfluence`. It adds metrics of the influence of every completion on a validation loss,
            and calls a function with the scores. None: off.
        padding_free: True: the transformer runs on one row without the padding of prompts and completions, for the
            loss, the old policy and the reference. It needs sdpa, eager or FlashAttention 2 or 3, and text. TRL 1.16
            has no such option.
        args, kwargs: all other arguments of `trl.GRPOTrainer`.

    Raises:
        ValueError: a TRL older than the tested versions, an unsupported option, or a method whose inputs TRL does not
            have.
    """

    def __init__(
        self,
        *args: Any,
        algorithm: str | Algorithm | None = None,
        solved_above: float = 0.0,
        influence: CompletionInfluence | None = None,
        padding_free: bool = False,
        **kwargs: Any,
    ) -> None:
        host.HOST.require(OP)
        super().__init__(*args, **kwargs)
        device = self.accelerator.device.type
        if not has_kernels("policy_step_hidden", device, torch.bfloat16):
            raise refuse(
                OP,
                "the trainer's device",
                "one that tokfuse has kernels for (a CPU with the native module, or cuda)",
                device,
                "Use trl.GRPOTrainer.",
            )
        self._one_row = padding_free
        if padding_free:
            check_one_row(OP, self.accelerator.unwrap_model(self.model), False)
            if influence is not None:
                raise refuse(
                    OP,
                    "padding_free",
                    "False with influence (its features belong to the rows of a batch)",
                    True,
                    "Choose one of them.",
                )
        self._scores: Scores | None = None
        self._kept: trl_kept.KeptIds | None = None
        self._recorded: trl_kept.Recorded | None = None
        self._head: host.Head | None = None
        self._method = None
        self._watch = None if influence is None else Watch(influence)
        if algorithm is None:
            trl_objective.check(self)
        else:
            self._method = trl_algorithm.Method(algorithm, self, solved_above)

    def describe(self) -> str:
        """Return how this trainer computes its loss, and on which backends."""
        if self._method is not None:
            route = self._method.describe()
        else:
            calls = "statistics, then policy_loss" if self._looks_first else "one policy_step"
            route = f"loss_type {self.loss_type}: {calls}"
        if self._one_row:
            route += ", without padding"
        return f"FusedGRPOTrainer: {route}\n{host.describe()}"

    @property
    def _looks_first(self) -> bool:
        """Whether the loss needs statistics of the policy before it can be computed."""
        masks = self.top_entropy_quantile < 1.0 or self.off_policy_mask_threshold is not None
        return bool(masks or trl_objective.adds_kl(self) or self.args.fp16)

    # -------------------------------------------------------------------------- TRL's entry points

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Scores:
        """Run TRL's method with its head on tokfuse. Inside `_replayed`, return the existing scores."""
        if self._scores is not None:
            return self._scores
        if self._one_row:
            model = OneRow(OP, model)
        head = self._head or (host.Head(host.token_head) if self._kept is None else trl_kept.KeptHead(self._kept))
        with host.rebound(head):
            scores: Scores = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        return scores

    def _generate(self, prompts: Any) -> Any:
        """Run TRL's generation. Record `kept_ids` of `rollout_func`, which TRL would only give to the rewards."""
        out = super()._generate(prompts)
        completions, sampled, extra = out[1], out[2], out[5]
        if trl_kept.FIELD in extra:
            self._recorded = trl_kept.Recorded.of_lists(extra.pop(trl_kept.FIELD), completions, sampled)
            self._kept = self._recorded.packed(self.accelerator.device)
        return out

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """Run TRL's rollout. With a method of tokfuse, add its advantages in TRL's padded layout."""
        watching = contextlib.nullcontext() if self._method is None else self._method.watching_rewards(self)
        try:
            with watching:
                out: dict[str, Any] = super()._generate_and_score_completions(inputs)
        finally:
            recorded, self._recorded, self._kept = self._recorded, None, None
        if recorded is not None:
            out |= recorded.fields(out["completion_mask"])
        return out if self._method is None else self._method.prepare(self, out)

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run TRL's forward and backward of a micro-batch. With `influence`, score its completions."""
        with contextlib.nullcontext() if self._watch is None else self._watch.step(self, model):
            loss: torch.Tensor = super().training_step(model, *args, **kwargs)
        return loss

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Return the loss of a micro-batch, with its gradient already computed. TRL's metrics are updated."""
        padding, mask = trl_algorithm.padding_of(inputs)
        if self._watch is not None:
            self._watch.begin(inputs, padding.cu_seqlens)
        if self._method is not None:
            loss, scores = self._method.loss(self, model, inputs, padding)
        elif self._looks_first:
            loss, scores = self._loss_after_statistics(model, inputs, padding, mask)
        else:
            given = trl_objective.policy_inputs(self, inputs, padding, mask)
            step, scores = self.step(model, inputs, given)
            loss = step.loss
        if self._method is None:
            with self._replayed(scores):
                super()._compute_loss(model, inputs)
        aux_loss = scores[2]
        if aux_loss is not None:
            steps = trl_objective.accumulation(self)
            loss = loss + self.router_aux_loss_coef * aux_loss / steps
        return loss

    # ----------------------------------------------------------------------------------- the loss

    def step(self, model: Any, inputs: dict[str, Any], given: dict[str, Any]) -> tuple[PolicyStep, Scores]:
        """Run one policy step inside the model's forward. Return it, and TRL's padded scores."""
        kept = trl_kept.of_batch(inputs)
        head = PolicyHead(given if kept is None else given | kept.arguments())
        scores = self.scores(model, inputs, head)
        assert head.step is not None
        return head.step, scores

    def scores(
        self, model: Any, inputs: dict[str, Any], head: host.Head | None = None, batch_size: int | None = None
    ) -> Scores:
        """Return TRL's padded log-probabilities and entropies of the completions, computed by this head."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        self._head, self._kept = head, trl_kept.of_batch(inputs)
        try:
            return self._get_per_token_logps_and_entropies(
                model,
                ids,
                attention,
                inputs["completion_ids"].size(1),
                compute_entropy=True,
                compute_aux_loss=self.aux_loss_enabled,
                batch_size=batch_size,
                **{name: inputs.get(name) for name in FORWARD_KEYS},
            )
        finally:
            self._head = self._kept = None

    def _loss_after_statistics(
        self, model: Any, inputs: dict[str, Any], padding: Padding, mask: torch.Tensor
    ) -> tuple[torch.Tensor, Scores]:
        """Compute statistics with gradient, TRL's masks from them, then the loss on packed vectors."""
        scores = self.scores(model, inputs)
        logps, entropies, _ = scores
        assert entropies is not None
        weights: list[torch.Tensor] = []
        entropy_mask = None
        if self.top_entropy_quantile < 1.0:
            entropy_mask = self.get_high_entropy_mask(entropies.detach(), mask.long(), 1 - self.top_entropy_quantile)
            weights.append(entropy_mask)
        if self.off_policy_mask_threshold is not None:
            weights.append(self._off_policy_mask(inputs, logps.detach(), mask))
        given = trl_objective.policy_inputs(self, inputs, padding, mask, tuple(weights), entropy_mask)
        logp, entropy = padding.pack(logps), padding.pack(entropies)
        loss = policy_loss(logp, entropy=entropy, **given).loss
        if trl_objective.adds_kl(self):
            loss = loss + trl_objective.ratio_times_kl(self, inputs, logps, mask)
        return loss, scores

    def _off_policy_mask(self, inputs: dict[str, Any], logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        advantages = inputs["advantages"]
        old = inputs.get("old_per_token_logps")
        keep: torch.Tensor = self.get_off_policy_mask(
            advantages=advantages.unsqueeze(1) if advantages.dim() == 1 else advantages,
            per_token_logps=logps,
            sampling_per_token_logps=inputs.get("sampling_per_token_logps", logps if old is None else old),
            mask=mask.long(),
            off_policy_threshold=self.off_policy_mask_threshold,
        )
        return keep

    @contextlib.contextmanager
    def _replayed(self, scores: Scores) -> Iterator[None]:
        """Context manager: TRL's loss reuses these scores, without gradient, to compute its metrics."""
        logps, entropies, aux_loss = (None if x is None else x.detach() for x in scores)
        assert logps is not None
        self._scores = (logps, entropies, aux_loss)
        try:
            with torch.no_grad():
                yield
        finally:
            self._scores = None

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
