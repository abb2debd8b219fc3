"""What policy_step returns, and how its backward hands out gradients that are there already."""

from dataclasses import dataclass

import torch

from tokfuse.runtime.ops.influence import Influence
from tokfuse.runtime.ops.token_stats import TokenStats
from tokfuse.runtime.policy.metrics import Metrics

Gradients = dict[str, torch.Tensor | None]


@dataclass(frozen=True)
class PolicyStep:
    """What `policy_step` and `policy_step_` return."""

    loss: torch.Tensor
    """() float32, loss_sum / normalizer; `loss.backward()` hands out the gradients below."""
    token_loss: torch.Tensor
    """(tokens,) float32, the summands of `loss`; detached."""
    loss_sum: torch.Tensor
    """() float32, aggregated sum before the normaliser; detached."""
    count: torch.Tensor
    """() float64, this batch's own denominator: valid tokens, or sequences with a valid token."""
    metrics: Metrics
    stats: TokenStats
    """Statistics of the current policy; detached."""
    _gradients: dict[str, torch.Tensor | None]
    influence: Influence | None = None
    """Gradient norms and sketches, where `influence=InfluenceSpec(...)` asked for them."""

    # The last `loss.backward()` gives the gradients away: held here too, autograd would have to
    # copy a (vocab, hidden) tensor into `weight.grad`. Read them before, or instead.

    @property
    def grad_logits(self) -> torch.Tensor | None:
        """(tokens, vocab), d loss / d logits; None from hidden, after the last backward, and on
        the reference inside torch.compile, which makes the backward itself."""
        return self._gradients.get("logits")

    @property
    def grad_hidden(self) -> torch.Tensor | None:
        """(tokens, hidden); None where hidden needs no gradient, or after the last backward."""
        return self._gradients.get("hidden")

    @property
    def grad_weight(self) -> torch.Tensor | None:
        """(vocab, hidden); None where weight needs no gradient, or after the last backward."""
        return self._gradients.get("weight")

    @property
    def grad_bias(self) -> torch.Tensor | None:
        """(vocab,); None where bias needs no gradient, or after the last backward."""
        return self._gradients.get("bias")


def _keeps_graph() -> bool:
    """True inside a backward that may run again (retain_graph=True)."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def hand_over(gradients: Gradients, grad_loss: torch.Tensor, op: str = "policy_step") -> Gradients:
    """The held gradients times grad_loss. In the last backward they are given away, not copied."""
    if not any(x is not None for x in gradients.values()):
        raise RuntimeError(
            f"{op}: backward ran twice, and the first one handed the gradients over. "
            "Pass retain_graph=True to the first backward."
        )
    last = not _keeps_graph()
    # Reading the scalar costs no synchronisation on a CPU, and saves a pass over every gradient.
    is_one = grad_loss.device.type == "cpu" and float(grad_loss) == 1.0
    out: Gradients = {}
    for name, grad in gradients.items():
        if grad is not None and not is_one:
            grad = grad.mul_(grad_loss) if last else grad * grad_loss.to(grad.dtype)
        elif grad is not None and not last:
            grad = grad.clone()  # autograd may hand it to an optimizer that writes into it
        out[name] = grad
    if last:
        gradients.update(dict.fromkeys(gradients))
    return out
