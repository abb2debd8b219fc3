"""Test the counted bytes of vocabulary parallelism, and the arithmetic of the plan."""

import pytest

from tokfuse.bench import communication


def test_counted_bytes_follow_the_formulas():
    rows = {row.form: row for row in communication.measure(ranks=2, tokens=16)}
    ours = rows["one all-gather (tokfuse)"]
    assert (ours.collectives, ours.gathered, ours.reduced, ours.wire) == (1, 20.0, 0.0, 20.0)
    three = rows["three reductions, log-prob alone"]
    assert (three.collectives, three.reduced, three.wire) == (3, 12.0, 12.0)
    assert rows["two reductions"].wire == ours.wire  # at two ranks
    assert rows["six reductions, log-prob and entropy"].collectives == 6


def test_the_loss_side_of_the_plan_does_not_grow():
    small, large = (communication.plan(communication.Cluster(n)) for n in (64, 1024))
    for name in ("records, ms", "grad_hidden, ms", "communication of the loss side, % of its step"):
        assert small[name] == large[name]
    assert large["records, MB"] == pytest.approx(20 * 7 * 8192 / 1e6)
    assert large["tokens per step"] == 128 * 4 * 8192
