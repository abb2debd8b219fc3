"""The losses of TRL's DPOConfig, and methods of `tokfuse.algorithms`, for `FusedDPOTrainer`."""

import dataclasses
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, replace
from typing import Any

import torch

from tokfuse import algorithms
from tokfuse.algorithms import Likelihood, Mixed, PairLoss, PreferenceBatch, PreferenceLoss, PreferenceStep, State
from tokfuse.algorithms.preference.contrast import Contrast
from tokfuse.algorithms.preference.pointwise import AOT, BCO, KTO, Pointwise
from tokfuse.integrations.trl_algorithm import STATE_FILE, world_of
from tokfuse.runtime.core.errors import refuse

OP = "FusedDPOTrainer"
COLUMNS = ("level", "pair_weight")  # of the data set, one value per pair; TRL's collator drops them

# Options of DPOConfig that a method replaces. A value that is not the default raises an error.
REPLACED = (
    "loss_type",
    "loss_weights",
    "label_smoothing",
    "ld_alpha",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "use_weighting",
    "discopop_tau",
)
SMOOTHED = {"exo_pair": {"link": "exo"}, "robust": {"link": "robust"}}
CONTRASTS = {
    "sigmoid": {},
    "sigmoid_norm": {"length": "mean"},
    "hinge": {"link": "hinge"},
    "ipo": {"link": "square", "length": "mean"},
    "discopop": {"link": "discopop"},
    **SMOOTHED,
}
POINTWISE = {"nca_pair": "nca", "sppo_hard": "sppo_hard", "apo_zero": "apo_zero", "apo_down": "apo_down"}
DIVERGENCES = {
    "reverse_kl": "reverse_kl",
    "forward_kl": "forward_kl",
    "js_divergence": "js",
    "alpha_divergence": "alpha",
}


# -------------------------------------------------------------------------------------- TRL's own


def loss_of(args: Any) -> PreferenceLoss:
    """Return the loss that a DPOConfig describes: a loss of tokfuse, or a weighted sum of several."""
    terms = tuple(_term(name, args) for name in args.loss_type)
    if len(terms) == 1 and args.loss_weights is None:
        return terms[0]
    return Mixed(terms=terms, weights=None if args.loss_weights is None else tuple(args.loss_weights))


def _term(loss_type: str, args: Any) -> PairLoss:
    _check_crossed(loss_type, args)
    shared: dict[str, Any] = {"name": loss_type, "beta": args.beta, "tail_weight": args.ld_alpha}
    shared["weighting"] = "wpo" if args.use_weighting else "none"
    if loss_type in CONTRASTS:
        options: dict[str, Any] = {**CONTRASTS[loss_type], **_divergence(args)}
        if loss_type in SMOOTHED:
            options["smoothing"] = args.label_smoothing
        if loss_type == "discopop":
            options["tau"] = args.discopop_tau
        return Contrast(**shared, **options)
    if loss_type in POINTWISE:
        return Pointwise(**shared, form=POINTWISE[loss_type])
    if loss_type == "bco_pair":
        return BCO(**shared, shift="none")
    if loss_type in ("aot", "aot_unpaired"):
        return AOT(**shared, paired=loss_type == "aot", smoothing=args.label_smoothing)
    if loss_type == "sft":
        return Likelihood(**shared)
    known = ", ".join([*CONTRASTS, *POINTWISE, "bco_pair", "aot", "aot_unpaired", "sft"])
    raise refuse(OP, "loss_type", f"among {known}", repr(loss_type), "A method of tokfuse is set by algorithm=NAME.")


def _divergence(args: Any) -> dict[str, Any]:
    if args.f_divergence_type not in DIVERGENCES:
        known = ", ".join(DIVERGENCES)
        raise refuse(OP, "f_divergence_type", f"among {known}", repr(args.f_divergence_type), "Check the spelling.")
    name, alpha = DIVERGENCES[args.f_divergence_type], args.f_alpha_divergence_coef
    if name != "alpha":
        return {"divergence": name}
    return {"divergence": "reverse_kl"} if abs(alpha - 1.0) < 1e-6 else {"divergence": "alpha", "alpha": alpha}


def _check_crossed(loss_type: str, args: Any) -> None:
    """Raise an error for two options of TRL whose combination has no meaning."""
    mean = loss_type in ("ipo", "sigmoid_norm")
    if mean and args.f_divergence_type != "reverse_kl":
        raise refuse(
            OP,
            "f_divergence_type",
            f"'reverse_kl' with loss_type {loss_type!r}, whose lengths would scale the arbitrary constant of f'",
            repr(args.f_divergence_type),
            "Use loss_type 'sigmoid'.",
        )
    if mean and args.truncation_mode == "keep_end" and args.max_length is not None:
        raise refuse(
            OP,
            "truncation_mode",
            f"'keep_start' with loss_type {loss_type!r}, because TRL counts a first token that has no prediction",
            "'keep_end'",
            "Or set max_length=None.",
        )
    if loss_type == "sft" and args.use_weighting:
        raise refuse(
            OP,
            "use_weighting",
            "False with loss_type 'sft', whose loss is one number for the batch and not one per pair",
            True,
            "Leave one of them out.",
        )


# --------------------------------------------------------------------------------- tokfuse's methods


@dataclass(frozen=True)
class Columns:
    """TRL's collator, with columns of the data set that it would drop."""

    collate: Any
    names: tuple[str, ...]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        out: dict[str, Any] = self.collate(examples)
        for name in self.names:
            if name in examples[0]:
                out[name] = torch.tensor([example[name] for example in examples], device="cpu")
        return out


class Method:
    """A preference loss of `tokfuse.algorithms` and its state inside a trainer.

    The loss of an optimizer step is the mean over all pairs of all micro-batches and ranks. So are the counts of the
    losses that have means over a part of the pairs. TRL's own losses are means of micro-batch means.

    Args:
        algorithm: name or instance.
    """

    def __init__(self, algorithm: str | PreferenceLoss) -> None:
        made = algorithms.make(algorithm) if isinstance(algorithm, str) else algorithm
        if not isinstance(made, PreferenceLoss):
            raise refuse(
                OP,
                "algorithm",
                "a preference loss",
                algorithm if isinstance(algorithm, str) else type(made).__name__,
                "`python -m tokfuse algorithms` lists them under `preference`.",
            )
        self.loss: PreferenceLoss = made
        self.name = made.name or type(made).__name__
        self.state: State = made.initial_state()
        self.columns = COLUMNS if getattr(made, "level_weight", None) is not None else COLUMNS[1:]
        self.unpaired = isinstance(made, KTO)
        self._window: tuple[float, dict[str, torch.Tensor] | None] | None = None
        self._seen: list[PreferenceStep] = []

    def check(self, args: Any, ref_model: Any, train_dataset: Any) -> None:
        """Raise an error for an option of TRL that the method replaces or does not support."""
        for field in dataclasses.fields(args):
            if field.name not in REPLACED:
                continue
            default = field.default if field.default_factory is MISSING else field.default_factory()
            given = getattr(args, field.name)
            if given != default:
                want = f"its default {default!r} with algorithm={self.name!r}, which replaces this option"
                raise refuse(OP, field.name, want, repr(given), "Set the option of the method instead.")
        default = next(f.default for f in dataclasses.fields(args) if f.name == "beta")
        if args.beta not in (default, self.loss.beta):
            want = f"{self.loss.beta}, the beta of algorithm={self.name!r}, or left out"
            raise refuse(OP, "beta", want, args.beta, "Set the beta of the method.")
        vision = train_dataset is not None and {"image", "images"} & next(iter(train_dataset)).keys()
        if vision and (self.unpaired or not self.loss.needs_reference):
            raise refuse(
                OP, "train_dataset", f"text with algorithm={self.name!r}", "images", "Use a loss with a reference."
            )
        if self.loss.needs_reference:
            return
        for name, given, unset in (("ref_model", ref_model, None), ("sync_ref_model", args.sync_ref_model, False)):
            if given is not unset:
                want = f"left out with algorithm={self.name!r}, which has no reference policy"
                raise refuse(OP, name, want, type(given).__name__, "Remove it.")

    def open_window(self, samples: list[dict[str, Any]], accelerator: Any) -> None:
        """Count the pairs of the micro-batches of an optimizer step over all ranks."""
        if not samples:
            return
        needed = ("completion_mask", *COLUMNS)
        inputs = [{k: x[k].to(accelerator.device) for k in needed if k in x} for x in samples]
        batches = [batch_of(x, self.loss, accelerator) for x in inputs]
        units = torch.tensor(
            sum(b.num_units for b in batches), dtype=torch.float32, device=batches[0].cu_seqlens.device
        )
        own = [self.loss.counts(b) for b in batches]
        total = {name: sum((counts[name] for counts in own), torch.zeros_like(own[0][name])) for name in own[0]}
        total = {name: accelerator.reduce(x, reduction="sum") for name, x in total.items()}
        every = float(accelerator.reduce(units, reduction="sum"))
        # The trainer divides by the number of micro-batches, and DDP by the number of ranks.
        self._window = every / (len(batches) * accelerator.num_processes), total or None

    def divisor(self, training: bool) -> tuple[float | None, dict[str, torch.Tensor] | None]:
        """Return (normalizer, counts) of a micro-batch. None, None: the means of the batch alone."""
        return self._window if training and self._window is not None else (None, None)

    def follow(self, step: PreferenceStep, last: bool) -> None:
        """Add a micro-batch of training. After the last one of the optimizer step, update the state."""
        self._seen.append(step)
        if not last:
            return
        sides = zip(*(seen.rewards for seen in self._seen), strict=True)
        self.state = self.loss.update(self.state, replace(step, rewards=tuple(torch.cat(side) for side in sides)))
        self._seen = []

    def rewards(self, step: PreferenceStep) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the implicit rewards of the chosen and the rejected responses, (pairs,) each."""
        chosen, rejected = step.rewards[0].chunk(2) if self.unpaired else step.rewards
        return chosen, rejected

    def save(self, folder: str) -> None:
        """Save the state in the folder of TRL's checkpoint."""
        torch.save(self.loss.state_dict(self.state), f"{folder}/{STATE_FILE}")

    def load(self, folder: str) -> None:
        """Load the state from a checkpoint of the same method."""
        self.state = self.loss.load_state_dict(torch.load(f"{folder}/{STATE_FILE}", weights_only=True))


def mismatched_inputs(inputs: dict[str, Any], pad_id: int) -> dict[str, Any]:
    """Return TRL's batch with every response after the prompt of another pair, for KTO's divergence estimate.

    The response to prompt i is the one of the next pair on the same side.
    """
    rows = list(_mismatched_rows(inputs))
    longest = max(len(ids) for ids, _ in rows)
    device = inputs["input_ids"].device
    ids = torch.full((len(rows), longest), pad_id, device=device)
    attention, completion = torch.zeros_like(ids), torch.zeros_like(ids)
    for i, (row, prompt) in enumerate(rows):
        ids[i, : len(row)] = row
        attention[i, : len(row)] = 1
        completion[i, prompt : len(row)] = 1
    return {"input_ids": ids, "attention_mask": attention, "completion_mask": completion}


def _mismatched_rows(inputs: dict[str, Any]) -> Iterator[tuple[torch.Tensor, int]]:
    ids, seen = inputs["input_ids"], inputs["attention_mask"].bool()
    response = inputs["completion_mask"].bool()
    pairs = len(ids) // 2
    after = algorithms.mismatched(pairs)
    for start in (0, pairs):
        for i in range(pairs):
            prompt = ids[start + i][seen[start + i] & ~response[start + i]]
            other = start + int(after[i])
            yield torch.cat([prompt, ids[other][response[other]]]), len(prompt)


def batch_of(inputs: dict[str, Any], loss: PreferenceLoss, accelerator: Any, **given: Any) -> PreferenceBatch:
    """Return TRL's batch as packed pairs: the chosen responses, then the rejected ones.

    Args:
        inputs: TRL's batch. Tokens that follow no other token have no prediction and are left out.
        loss: the loss, which decides whether the batch has pairs or labels.
        accelerator: of the trainer, for the ranks.
        given: other fields of the batch.
    """
    rows = inputs["completion_mask"][:, 1:].bool()
    lengths = rows.sum(1)
    cu = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    pairs = torch.arange(len(rows), device=rows.device).view(2, -1)
    if isinstance(loss, KTO):
        given["desirable"] = torch.arange(len(rows), device=rows.device) < pairs.shape[1]
    else:
        given["pairs"] = pairs.t().contiguous()
        given |= {name: inputs[name].to(rows.device) for name in COLUMNS if name in inputs}
        if "pair_weight" in given:
            given["pair_weight"] = given["pair_weight"].float()
    return PreferenceBatch(num_tokens=int(cu[-1]), cu_seqlens=cu, world=world_of(accelerator), **given)
