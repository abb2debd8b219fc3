"""The tests that decide which rows `offpolicy_weights` keeps."""

from dataclasses import dataclass

from tokfuse.runtime.core.checks import check_choice, check_number
from tokfuse.runtime.core.codes import RULE_OVER, RULE_STATISTICS
from tokfuse.runtime.core.errors import refuse


@dataclass(frozen=True)
class KeepRule:
    """A test that a row must pass to be kept: low <= statistic <= high.

    Args:
        statistic: of the clamped log-ratio d = logp - behavior_logp: "ratio" exp(d), "k1" -d (the
            sign of verl: bounds act on the inverse ratio), "k2" d^2 / 2, "k3" exp(d) - 1 - d.
        over: "token" tests each row; "sum", "mean", "max" test that reduction over the row's
            sequence and keep or drop it whole. The ratio of a sum or mean is exp(sum d), exp(mean
            d).
        low, high: bounds, at least one. None: no bound on that side.
        negative_only: rows with advantage >= 0 pass whatever the statistic.
    """

    statistic: str
    over: str = "token"
    low: float | None = None
    high: float | None = None
    negative_only: bool = False

    def __post_init__(self) -> None:
        check_choice("KeepRule", "statistic", self.statistic, RULE_STATISTICS)
        check_choice("KeepRule", "over", self.over, RULE_OVER)
        if self.low is None and self.high is None:
            raise refuse("KeepRule", "low or high", "given", None, "A rule without bounds is none.")
        for name, bound in (("low", self.low), ("high", self.high)):
            if bound is not None:
                check_number("KeepRule", name, bound, -1e30, 1e30)
        check_order("KeepRule", self.low, self.high)


def check_order(op: str, low: float | None, high: float | None) -> None:
    """low <= high, where both are given."""
    if low is not None and high is not None and low > high:
        raise refuse(op, "low", f"<= high = {high:g}", low, "Swap them.")
