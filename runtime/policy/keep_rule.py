"""Rules that decide which rows `offpolicy_weights` keeps."""

from dataclasses import dataclass

from tokfuse.runtime.core.checks import check_choice, check_number
from tokfuse.runtime.core.codes import RULE_OVER, RULE_STATISTICS
from tokfuse.runtime.core.errors import refuse


@dataclass(frozen=True)
class KeepRule:
    """A test that a row must pass to be kept: low <= statistic <= high.

    Args:
        statistic: function of the clamped log-ratio d = logp - behavior_logp. "ratio" is exp(d), "k1"
            is -d, "k2" is d^2 / 2, "k3" is exp(d) - 1 - d. "k1" has the sign of verl, so its bounds
            act on the inverse ratio.
        over: "token" tests each row. "sum", "mean" and "max" test that reduction over the sequence of
            the row, and keep or drop the whole sequence. With statistic "ratio" the reduction is taken
            of d: exp(sum d), exp(mean d), exp(max d).
        low, high: bounds; give at least one. None: no bound on that side.
        negative_only: True applies the test only to rows with advantage < 0; all others pass.
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
            raise refuse("KeepRule", "low or high", "given", None, "Pass at least one bound.")
        for name, bound in (("low", self.low), ("high", self.high)):
            if bound is not None:
                object.__setattr__(self, name, check_number("KeepRule", name, bound, -1e30, 1e30))
        check_order("KeepRule", self.low, self.high)


def check_order(op: str, low: float | None, high: float | None) -> None:
    """Raise ValueError unless low <= high, if both are given."""
    if low is not None and high is not None and low > high:
        raise refuse(op, "low", f"<= high = {high:g}", low, "Swap them.")
