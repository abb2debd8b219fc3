"""Compare an integration with its trainer: tokfuse and the trainer's float32 run, both with the trainer in float64.

The trainer's float32 result is not a reference, because it rounds in an order that depends on the CPU. tokfuse must
not be farther from float64 than the trainer. FLOOR is the bound for a trainer run with accidentally small errors.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

FLOOR = 2.0**-20  # eight float32 roundings of the largest value
SANE = 1e-5  # with a larger error the trainer took another branch, e.g. sampled another token


def assert_no_farther(
    ours: Any, host: Any, exact: Any, *, floor: float = FLOOR, size: float | None = None, what: str = "value"
) -> None:
    """Check that the largest |ours - exact| is at most the larger of the largest |host - exact| and `floor` * size.

    size: size of the figures; None: the largest |exact|.
    """
    mine, theirs, truth = (torch.as_tensor(x).detach().double() for x in (ours, host, exact))
    assert mine.shape == theirs.shape == truth.shape, what
    if truth.numel() == 0:
        return
    size = float(truth.abs().max()) if size is None else size
    error, own = (float((x - truth).abs().max()) for x in (mine, theirs))
    assert own <= SANE * size, f"{what}: the host itself is {own:.3g} from float64: no measure"
    assert error <= own + floor * size, f"{what}: {error:.3g} from float64, the host {own:.3g}, size {size:.3g}"


class Float64Head:
    """TRL's `ChunkedLogProbFunction` in float64. TRL's loss continues with its log-probabilities.

    The entropy is rounded once, because TRL compares it with one of its quantiles in float32.
    """

    @staticmethod
    def apply(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[torch.Tensor | None, ...]:
        z = hidden.double() @ weight.double().t()
        z = (z if bias is None else z + bias.double()) * logit_scale
        z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
        log_p = z.log_softmax(-1)
        p = log_p.exp()
        every = {
            "entropy": -(p * log_p).sum(-1).float(),
            "log_sum_sq_probs": (p * p).sum(-1).log(),
            "mean_logits": z.mean(-1),
            "is_top1": z.argmax(-1) == targets,
        }
        logp = log_p.gather(1, targets[:, None]).squeeze(1)
        return logp, *(x if name in outputs else None for name, x in every.items())


@contextmanager
def trl_in_float64() -> Iterator[None]:
    """Run TRL's trainers with their head and all of the loss after it in float64."""
    import trl.trainer.utils

    with mock.patch.object(trl.trainer.utils, "_ChunkedLogProbFunction", Float64Head):
        yield


class Float64Divergence:
    """TRL's `ChunkedDivergenceFunction` in float64, for which autograd computes the gradient."""

    @staticmethod
    def apply(
        student_hidden: torch.Tensor,
        student_weight: torch.Tensor,
        student_bias: torch.Tensor | None,
        teacher_hidden: torch.Tensor,
        teacher_weight: torch.Tensor,
        teacher_bias: torch.Tensor | None,
        beta: float,
        temperature: float,
        *transforms: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        def log_p(
            hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scale: Any, softcap: Any
        ) -> torch.Tensor:
            z = hidden.double() @ weight.double().t()
            z = (z if bias is None else z + bias.double()) * scale
            return ((z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature).log_softmax(-1)

        p = log_p(student_hidden, student_weight, student_bias, *transforms[:2])
        q = log_p(teacher_hidden, teacher_weight, teacher_bias, *transforms[2:]).detach()
        return exact_divergence(p, q, beta), -(p.exp() * p).sum(-1).detach()


def exact_divergence(p: torch.Tensor, q: torch.Tensor, beta: float) -> torch.Tensor:
    """Return TRL's generalised JSD of each row of log-probabilities; p is the student's."""
    if beta == 0.0:
        return (q.exp() * (q - p)).sum(-1)
    if beta == 1.0:
        return (p.exp() * (p - q)).sum(-1)
    m = ((1 - beta) * p.exp() + beta * q.exp()).log()
    return (beta * q.exp() * (q - m) + (1 - beta) * p.exp() * (p - m)).sum(-1)


@contextmanager
def trl_distillation_in_float64() -> Iterator[None]:
    """Run the losses of TRL's DistillationTrainer and GKDTrainer in float64."""
    import trl.trainer.distillation_trainer as stable
    from trl.experimental.gkd import GKDTrainer

    stock = GKDTrainer.generalized_jsd_loss

    def wide(student_logits: torch.Tensor, teacher_logits: torch.Tensor, **given: Any) -> torch.Tensor:
        loss: torch.Tensor = stock(student_logits.double(), teacher_logits.double(), **given)
        return loss

    with (
        mock.patch.object(stable, "ChunkedDivergenceFunction", Float64Divergence),
        mock.patch.object(GKDTrainer, "generalized_jsd_loss", staticmethod(wide)),
    ):
        yield
