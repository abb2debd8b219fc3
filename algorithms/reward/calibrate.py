"""Calibration of predicted rewards: removes the shrinkage of regression from differences of group means."""

from dataclasses import dataclass

import torch

from tokfuse.algorithms.registry import register
from tokfuse.algorithms.stateful import State, Stateful
from tokfuse.runtime.core.checks import Rows, check_choice, check_values, check_vector
from tokfuse.runtime.core.errors import refuse


@register(
    "reward_calibrator",
    kind="reward",
    system="One Map, Many Trials",
    label="utility",
    source="arXiv 2508.01341; github.com/AIandGlobalDevelopmentLab/unshrink",
    summary="removes shrinkage of predicted rewards: linear calibration (LCC) or Tweedie's correction",
    differs="The slope of the density is analytic; the code uses a central difference. LCC has no "
    "effect under z-scores per group. Both raise the error of single samples: use them for means only.",
)
@dataclass(frozen=True, kw_only=True)
class RewardCalibrator(Stateful):
    """LCC: (yhat - a) / b, with prediction = a + b truth. Tweedie: yhat - s^2 d/dyhat log p(yhat). Utility.

    p is a Gaussian kernel density of the calibration predictions (Scott's bandwidth), and s the deviation of
    prediction minus truth. Fit on samples that the reward model was not trained on.

    Args:
        method: "lcc" or "tweedie".

    State: the result of `fit`, plain data.
    """

    method: str = "tweedie"

    def __post_init__(self) -> None:
        check_choice(self._op, "method", self.method, ("lcc", "tweedie"))

    def initial_state(self) -> State:
        """Return the state before `fit`. `transform` raises an error for it."""
        keys = ("intercept", "slope") if self.method == "lcc" else ("points", "bandwidth", "noise")
        return dict.fromkeys(keys)

    def fit(self, predicted: torch.Tensor, truth: torch.Tensor) -> State:
        """Return the calibration, from (samples,) predictions and true rewards: at least 3, not all equal.

        All are finite. "lcc" needs a slope > 0: with a negative slope, the calibration would reverse the order of the
        rewards.
        """
        samples = check_vector(self._op, "predicted", predicted).shape[0]
        rows = Rows(samples, "predicted", predicted.device)
        check_vector(self._op, "truth", truth, rows)
        check_values(self._op, "predicted", predicted, always=True)
        check_values(self._op, "truth", truth, always=True)
        x, y = predicted.detach().double().cpu(), truth.detach().double().cpu()
        if samples < 3 or float(x.std()) == 0.0 or float(y.std()) == 0.0:
            raise refuse(
                self._op,
                "predicted and truth",
                "of at least 3 samples that are not all equal",
                f"{samples} samples",
                "Pass more samples.",
            )
        if self.method == "lcc":
            slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((y - y.mean()) ** 2).sum())
            if not slope > 0.0:
                raise refuse(
                    self._op,
                    "predicted",
                    "positively correlated with the truth",
                    f"slope {slope:g}",
                    "Use another reward model.",
                )
            return {"intercept": float(x.mean()) - slope * float(y.mean()), "slope": slope}
        bandwidth = float(x.std()) * samples**-0.2
        return {"points": x, "bandwidth": bandwidth, "noise": float((x - y).std(unbiased=False))}

    def transform(self, predicted: torch.Tensor, state: State) -> torch.Tensor:
        """Return the calibrated rewards, (samples,), detached, with the dtype of `predicted`. NaN stays NaN."""
        check_vector(self._op, "predicted", predicted)
        if state.keys() != self.initial_state().keys() or None in [*map(_given, state.values())]:
            raise refuse(self._op, "state", "what fit returned", sorted(state), "Call fit first.")
        x = predicted.detach().double()
        if self.method == "lcc":
            out: torch.Tensor = (x - state["intercept"]) / state["slope"]
            return out.to(predicted.dtype)
        points: torch.Tensor = state["points"].to(x.device)
        h: float = state["bandwidth"]
        gap = points.unsqueeze(0) - x.unsqueeze(1)
        share = torch.softmax(-0.5 * (gap / h) ** 2, 1)
        slope = (share * gap).sum(1) / h**2
        noise: float = state["noise"]
        return (x - noise**2 * slope).to(predicted.dtype)


def _given(value: object) -> object:
    return None if value is None else True
