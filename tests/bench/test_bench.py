"""Test the benchmark harness: rows, statuses, interleaving, peers, and each case at tiny sizes.

No test checks a time. Memory is checked with wide margins, errors with the bounds of the ops.
"""

import json
import math
import time
from dataclasses import asdict, fields, replace

import pytest
import torch
from bench_rows import our_row

from tokfuse.bench import cli, errors, exact, machine, measure, peers, plan, probes, report, runner, targets
from tokfuse.bench.measure import ColdCache, Provider, interleave, percentile
from tokfuse.bench.problem import Config, Problem, Unsupported, make_batch
from tokfuse.bench.row import SCHEMA_VERSION, STATUSES, Row

CONFIG = Config("token_stats", "forward", "all", "float32", 4, 16)
ROW = our_row("token_stats", "forward", "all", "4x16")
SHAPES = {
    "token_stats": "4x33",
    "policy_step": "4x33",
    "policy_step_hidden": "16x8x33",
    "linear_token_stats": "4x8x33",
    "cross_entropy": "4x33",
    "linear_cross_entropy": "4x8x33",
    "paired_divergence": "4x33",
    "distill_step": "8x8x33",
    "linear_paired_divergence": "8x8x33",
    "influence": "16x8x33",
    "advantage": "16x32",
    "overhead": "1x8",
}


def run_rows(problem: Problem, rounds: int = 2, **settings: object) -> dict[str, Row]:
    """Return the rows of one problem by provider."""
    rows: list[Row] = []
    runner.run_problem(problem, runner.Settings(rounds, {}, **settings), rows.append)
    return {row.provider: row for row in rows}


def quiet(outputs: dict[str, torch.Tensor] | None = None, **fields_: object):
    """Return a factory of a provider that only returns `outputs`."""
    return lambda: Provider(lambda: dict(outputs or {}), **fields_)


def raising(error: Exception):
    def factory() -> Provider:
        raise error

    return factory


# --- rows -----------------------------------------------------------------------------------------


def test_row_is_flat_and_json_able() -> None:
    values = json.loads(ROW.to_json())
    assert set(values) == {field.name for field in fields(Row)}
    assert all(isinstance(v, (str, int, float, type(None))) for v in values.values())
    assert Row.from_json(ROW.to_json()) == ROW


def test_row_keeps_infinite_errors() -> None:
    bad = replace(ROW, error_logp=math.inf)
    assert "Infinity" not in bad.to_json()
    assert Row.from_json(bad.to_json()) == bad


def test_row_of_a_newer_writer_is_read() -> None:
    values = asdict(ROW) | {"something_new": 1}
    assert Row.from_json(json.dumps(values)) == ROW


@pytest.mark.parametrize("name", ["status", "role"])
def test_row_refuses_unknown(name: str) -> None:
    with pytest.raises(ValueError, match="must be one of .*; got 'fused'"):
        replace(ROW, **{name: "fused"})


# --- timing and memory ----------------------------------------------------------------------------


def test_interleave_goes_round_robin_and_rotates() -> None:
    order: list[str] = []

    def noting(name: str) -> Provider:
        def before() -> None:
            order.append(f"before {name}")

        def run() -> dict[str, torch.Tensor]:
            order.append(name)
            return {}

        return Provider(run, before)

    times, failed = interleave({n: noting(n) for n in "abc"}, 3, ColdCache(False))
    assert [n for n in order if len(n) == 1] == list("abc" + "bca" + "cab")
    assert order[:2] == ["before a", "a"]
    assert not failed and all(len(values) == 3 for values in times.values())


def test_interleave_drops_a_provider_that_raises() -> None:
    calls = 0

    def sometimes() -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("second call")
        return {}

    providers = {"bad": Provider(sometimes), "good": Provider(dict)}
    times, failed = interleave(providers, 4, ColdCache(False))
    assert calls == 2 and len(times["good"]) == 4 and str(failed["bad"]) == "second call"


def test_interleave_stops_at_the_budget_with_three_rounds() -> None:
    times, _ = interleave({"a": Provider(dict)}, 9, ColdCache(False), budget_s=0.0)
    assert len(times["a"]) == 3


def test_cpu_time_leaves_out_what_is_waited_for() -> None:
    def sleeps() -> dict[str, torch.Tensor]:
        time.sleep(0.05)
        return {}

    cpu: dict[str, list[float]] = {}
    times, _ = interleave({"a": Provider(sleeps)}, 2, ColdCache(False), cpu_times=cpu)
    assert len(cpu["a"]) == 2 and max(cpu["a"]) < min(times["a"])


def test_percentile_interpolates() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([1.0, 2.0], 0.2) == pytest.approx(1.2)
    assert percentile([5.0], 0.8) == 5.0


def test_peak_counts_results_and_temporaries_but_not_inputs() -> None:
    size = 16 << 20  # 64 MiB of float32
    given = torch.zeros(size)

    def allocating() -> dict[str, torch.Tensor]:
        temporary = given + 1
        return {"out": temporary + 1}

    peak, method = measure.peak_extra_bytes(Provider(allocating))
    if peak is None:
        pytest.skip(method)
    in_place, _ = measure.peak_extra_bytes(Provider(lambda: {"out": given.add_(1)}))
    assert 120 << 20 < peak < 160 << 20
    assert in_place is not None and in_place < 16 << 20


def test_memory_guard_turns_too_large_into_an_exception_and_leaves(monkeypatch) -> None:
    # A fixed figure, because the available memory changes when other processes end.
    monkeypatch.setattr(machine, "available_bytes", lambda: 2 << 30)
    too_large = 3 << 30
    with machine.memory_guard(), pytest.raises(RuntimeError) as caught:
        torch.empty(too_large, dtype=torch.uint8)
    assert runner.classify(caught.value)[0] == "oom"
    assert torch.empty(too_large, dtype=torch.uint8).numel() == too_large  # never touched


# --- statuses -------------------------------------------------------------------------------------


def test_every_status_becomes_a_row() -> None:
    want = {"logp": torch.zeros(4, dtype=torch.float64)}
    problem = Problem(
        CONFIG,
        ours={"tokfuse": quiet({"logp": torch.zeros(4)}, fallback=True, backend="reference")},
        peers={
            "good": quiet({"logp": torch.full((4,), 1e-3)}),
            "wrong": quiet({"logp": torch.full((4,), 9.0)}),
            "nan": quiet({"logp": torch.full((4,), math.nan)}),
            "broken": raising(RuntimeError("boom")),
            "large": raising(RuntimeError("DefaultCPUAllocator: can't allocate memory")),
            "missing": raising(Unsupported("not installed")),
        },
        exact=lambda: want,
        cold=False,
    )
    rows = run_rows(problem)
    status = {name: row.status for name, row in rows.items()}
    assert status == {
        "tokfuse": "fallback",
        "good": "pass",
        "wrong": "error",
        "nan": "error",
        "broken": "error",
        "large": "oom",
        "missing": "unsupported",
    }
    assert set(status.values()) == set(STATUSES) - {"predicted"}  # nothing runs for that provider
    assert rows["missing"].note == "not installed" and rows["missing"].median_ms is None
    assert rows["good"].error_logp == pytest.approx(1e-3)
    assert rows["wrong"].note == "wrong logp" and rows["nan"].error_logp == math.inf
    # a fallback is not a baseline, so no row is compared with it
    assert rows["tokfuse"].backend == "reference"
    assert rows["good"].ratio is None and rows["good"].baseline == ""


def test_a_peer_that_computes_less_says_so() -> None:
    want = {"logp": torch.zeros(4), "entropy": torch.zeros(4), "lse": torch.zeros(4)}
    problem = Problem(
        CONFIG,
        ours={"tokfuse": quiet(want)},
        peers={"less": quiet({"logp": want["logp"]}), "all": quiet(want)},
        cold=False,
    )
    rows = run_rows(problem)
    assert rows["less"].note == "computes no entropy, lse" and rows["all"].note == ""


def test_ratio_and_limit_come_from_the_same_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {
        "tokfuse": [2.0, 4.0, 3.0],
        "slow": [8.0, 8.0, 15.0],
        "limit_read": [0.5, 0.5, 0.5],
        "limit_copy": [1.0, 1.0, 9.0],
        "limit_exp": [1.0, 1.0, 1.0],
    }
    monkeypatch.setattr(runner, "interleave", lambda *args: (times, {}))
    problem = Problem(
        CONFIG,
        ours={"tokfuse": quiet()},
        peers={"slow": quiet()},
        limits={name: quiet() for name in times if name.startswith("limit_")},
        bounds=("read+copy", "exp"),
        cold=False,
    )
    rows = run_rows(problem, rounds=3, peak=False)
    ours, slow = rows["tokfuse"], rows["slow"]
    assert (ours.median_ms, ours.best_ms, ours.rounds, ours.ratio) == (3.0, 2.0, 3, 1.0)
    assert slow.baseline == "tokfuse" and slow.ratio == pytest.approx(8 / 3, rel=1e-5)
    assert slow.ratio_p80 == pytest.approx(percentile([4.0, 2.0, 5.0], 0.8))
    assert (ours.limit, ours.limit_ms, ours.limit_share) == ("read+copy", 1.5, 0.5)
    assert (ours.read_ms, ours.copy_ms, ours.exp_ms, ours.gemm_ms) == (0.5, 1.0, 1.0, None)
    assert rows["limit_read"].role == "limit" and rows["limit_read"].limit == ""


def test_inputs_that_do_not_fit_give_a_row() -> None:
    rows: list[Row] = []

    def build() -> Problem:
        raise MemoryError("too large")

    runner.run_case(CONFIG, build, runner.Settings(1, {}), rows.append)
    assert [(row.status, row.shape) for row in rows] == [("oom", "4x16")]


# --- peers ----------------------------------------------------------------------------------------


def test_unknown_peer_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="got 'torchh'") as caught:
        peers.choose("torch_eager,torchh", "float32")
    assert all(name in str(caught.value) for name in peers.KNOWN)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["token_stats", "--quick", "--peers", "torchh"])
    assert exit_.value.code == 2 and "torch_compile" in capsys.readouterr().err


def test_default_peers_repeat_nothing_in_float32() -> None:
    assert peers.choose(None, "float32") == ["torch_eager", "torch_compile", "cross_entropy"]
    assert "torch_eager_f32" in peers.choose(None, "bfloat16")
    assert peers.choose("none", "float32") == [] and peers.choose("all", "") == list(peers.KNOWN)


def test_absent_peer_is_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    rows = bench("linear_token_stats", tmp_path, "--peers", "trl,verl,cut_cross_entropy")
    found = {row.provider: row for row in rows if row.role == "peer"}
    assert set(found) == {"trl", "verl", "cut_cross_entropy"}
    assert {row.status for row in found.values()} == {"unsupported"}
    assert all(row.note.startswith("not installed") for row in found.values())


def test_peer_that_does_not_import_is_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise OSError("libcuda.so.1 is missing")

    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(peers.importlib, "import_module", broken)
    with pytest.raises(Unsupported, match="does not import: OSError: libcuda"):
        peers.linear_stats_fn("trl", everything=True)


# --- cases ----------------------------------------------------------------------------------------


def bench(op: str, tmp_path, *extra: str) -> list[Row]:
    """Return the rows of `python -m tokfuse bench OP` at a tiny size, read from its JSON file."""
    path = tmp_path / "rows.jsonl"
    code = cli.main([op, "--rounds", "2", "--shapes", SHAPES[op], "--json", str(path), *extra])
    rows = [Row.from_json(line) for line in path.read_text().splitlines()]
    assert code == int(any(row.role == "ours" and row.status == "error" for row in rows))
    return rows


@pytest.mark.parametrize("op", list(cli.CASES))
def test_case_at_a_tiny_size(op: str, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = bench(op, tmp_path, "--peers", "torch_eager")
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 + len(rows) and printed[0] == report.HEADER
    variants = {(row.mode, row.variant) for row in rows}
    assert variants == set(cli.CASES[op].CASES)
    assert {row.dtype for row in rows} == set(cli.CASES[op].DTYPES)
    for row in rows:
        assert row.schema == SCHEMA_VERSION and row.op == op and row.shape == SHAPES[op]
        assert row.cpu_model and row.torch and "bench" in row.command and row.timestamp
        if row.status in ("pass", "fallback"):
            assert row.rounds == 2 and row.median_ms is not None
            assert row.p20_ms <= row.median_ms <= row.p80_ms
        assert row.status != "error", row.note
    wanted = "unsupported" if op == "influence" else "pass"
    assert all(r.status == wanted for r in rows if r.role == "peer")


@pytest.mark.parametrize("op", list(cli.VARIANT_OPS))
def test_an_advantage_op_is_a_variant(op: str, tmp_path, capsys) -> None:
    path = tmp_path / "rows.jsonl"
    line = [op, "--quick", "--shapes", "16x32", "--peers", "torch_eager", "--json", str(path)]
    assert cli.main(line) == 0
    rows = [Row.from_json(text) for text in path.read_text().splitlines()]
    assert {(row.op, row.variant) for row in rows} == {("advantage", op)}
    assert {row.provider for row in rows} == {"tokfuse", "limit_copy", "torch_eager"}
    ours = next(row for row in rows if row.role == "ours")
    assert max(v for k, v in asdict(ours).items() if k.startswith("error_") and v) < 1e-4
    with pytest.raises(SystemExit):
        cli.main([op, "--variant", "all"])
    assert f"{op} is a variant itself; got --variant all" in capsys.readouterr().err


def test_unknown_variant_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["policy_step", "--variant", "entropy=1"])
    assert "one of entropy=0, entropy=0.01; got 'entropy=1'" in capsys.readouterr().err


def test_an_output_without_a_column_is_in_the_row() -> None:
    want = {"advantage": torch.zeros(2, dtype=torch.float64)}
    ours = {"tokfuse": quiet({"advantage": torch.tensor([0.25, 0.5])})}
    rows = run_rows(Problem(CONFIG, ours=ours, peers={}, exact=lambda: want, cold=False))
    assert rows["tokfuse"].error_output == 0.5


@pytest.mark.parametrize("op", ["token_stats", "policy_step", "policy_step_hidden"])
def test_eager_peer_agrees_with_float64(op: str, tmp_path) -> None:
    rows = bench(op, tmp_path, "--peers", "torch_eager", "--dtype", "float32")
    peer = [row for row in rows if row.provider == "torch_eager"]
    for row in peer:
        found = [v for k, v in asdict(row).items() if k.startswith("error_") and v is not None]
        assert found and max(found) < 2e-5
    wanted = {"token_stats": "grad_logits", "policy_step": "grad_logits"}.get(op, "grad_weight")
    assert any(getattr(row, f"error_{wanted}") is not None for row in peer)


def test_frozen_weight_has_no_weight_gradient(tmp_path) -> None:
    rows = bench("policy_step_hidden", tmp_path, "--peers", "torch_eager")
    by_variant = {row.variant: row for row in rows if row.provider == "torch_eager"}
    assert by_variant["rows=1"].error_grad_weight is not None
    assert by_variant["rows=1,frozen"].error_grad_weight is None
    full, quarter = by_variant["rows=1"].flops, by_variant["rows=0.25"].flops
    assert quarter < full and "gradient rows" in by_variant["rows=0.25"].flops_formula


def test_in_place_step_sees_fresh_logits_each_time() -> None:
    config = Config("policy_step", "step", "entropy=0.01", "float32", 4, 33)
    problem = cli.CASES["policy_step"].build(config, [])
    try:
        provider = problem.ours["tokfuse_"]()
    except Unsupported as error:
        pytest.skip(str(error))
    first, second = ((provider.before(), provider.run())[1]["loss"].item() for _ in range(2))
    assert first == second == pytest.approx(problem.answer()["loss"].item(), abs=1e-5)


@pytest.mark.parametrize("text", ["4", "4x", "4x8x16", "0x8", "axb"])
def test_shape_must_fit_the_op(text: str) -> None:
    with pytest.raises(ValueError, match=f"must be tokensxvocab; got '{text}'"):
        plan.parse_shape("token_stats", text, 2)


def test_markdown_has_a_ratio_column_per_variant_of_ours() -> None:
    rows = [
        replace(ROW, op="policy_step", provider="tokfuse_", median_ms=1.0),
        replace(ROW, op="policy_step", provider="tokfuse", median_ms=2.0),
        replace(ROW, op="policy_step", provider="torch_eager", role="peer", median_ms=8.0),
    ]
    text = report.markdown(rows)
    assert "| / tokfuse_ | / tokfuse |" in text and "| 8.00 | 4.00 |" in text


def test_targets_are_judged_against_the_faster_form(tmp_path, capsys) -> None:
    case = replace(ROW, op="policy_step", mode="step", variant="entropy=0.01")
    times = {"tokfuse_": 1.0, "tokfuse": 2.0, "torch_compile": 9.0, "torch_compile_f32": 6.5}
    rows = [replace(case, provider=name, median_ms=value) for name, value in times.items()]
    verdicts = targets.judge(rows)
    assert [verdict.is_good for verdict in verdicts] == [True, True]
    assert verdicts[0].text == "torch_compile_f32 / tokfuse_ = 6.50 (at least 6)"
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(row.to_json() for row in rows))
    assert cli.main(["targets", str(path)]) == 0
    slow = replace(rows[0], median_ms=4.0)  # a later row of the same case replaces the earlier one
    path.write_text("\n".join(row.to_json() for row in [*rows, slow]))
    assert cli.main(["targets", str(path)]) == 1 and "MISS" in capsys.readouterr().out
    assert targets.judge([replace(rows[0], status="fallback"), *rows[2:]]) == []


def test_probes_run() -> None:
    data = torch.randn(1 << 12)
    try:
        providers = [probes.read_probe(data), probes.copy_probe(data), probes.exp_probe(5000)]
    except Unsupported as error:
        pytest.skip(str(error))
    assert all(provider.run() == {} for provider in providers)


def test_waiting_policy_is_warned_about(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    machine.warn_about_waiting()
    assert capsys.readouterr().err == ""
    monkeypatch.delenv("OMP_WAIT_POLICY")
    machine.warn_about_waiting()
    assert "OMP_WAIT_POLICY=passive" in capsys.readouterr().err


# --- float64 answers and the table of errors ------------------------------------------------------


def test_exact_gradient_equals_autograd() -> None:
    gen = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 17, generator=gen, dtype=torch.float64, requires_grad=True)
    target = torch.randint(17, (40,), generator=gen)
    stats = peers.eager_stats(logits, target)
    batch = make_batch(target, stats["logp"].detach() + 0.3, gen)  # some rows are clipped
    ratio = (stats["logp"] - batch.old_logp).exp()
    gain = torch.minimum(ratio * batch.advantage, ratio.clamp(0.8, 1.2) * batch.advantage)
    loss = -(gain + 0.01 * stats["entropy"]).sum() / 40
    (grad,) = torch.autograd.grad(loss, logits)
    found = exact.policy_step(logits.detach(), batch, 0.01)
    assert exact.distance("loss", found["loss"], loss.detach()) < 1e-12
    assert exact.distance("grad_logits", found["grad_logits"], grad) < 1e-12
    assert (grad.abs().sum(-1) > 0).all()


def test_exact_masked_vocabulary_has_weight_zero() -> None:
    logits = torch.tensor([[0.0, -math.inf, 0.0], [-math.inf, 2.0, -math.inf]])
    target = torch.tensor([0, 1])
    stats = exact.token_stats(logits, target)
    assert stats["entropy"].tolist() == pytest.approx([math.log(2), 0.0])
    grad = exact.grad_logits(logits, target, torch.ones(2), torch.ones(2))
    assert grad.isfinite().all() and grad[:, 1].tolist() == [0.0, 0.0]


def test_distance_rules() -> None:
    want = torch.tensor([1.0, -math.inf, 4.0], dtype=torch.float64)
    assert exact.distance("logp", torch.tensor([1.0, -math.inf, 4.5]), want) == 0.5
    assert exact.distance("grad_logits", torch.tensor([1.0, -math.inf, 4.5]), want) == 0.125
    assert exact.distance("logp", torch.tensor([1.0, 0.0, 4.0]), want) == math.inf
    assert exact.distance("logp", torch.tensor([math.nan, -math.inf, 4.0]), want) == math.inf
    assert exact.distance("logp", torch.zeros(2), want) == math.inf


def test_error_table_within_the_bounds(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "errors.jsonl"
    code = cli.main(["errors", "--dtype", "float32", "--json", str(path)])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert code == 0 and "grad_weight" in capsys.readouterr().out
    names = {"ordinary", "wide", "peaked", "uniform", "masked", "offset", "softcap", "tail_1"}
    assert names <= {row["family"] for row in rows}
    for row in rows:
        assert row["status"] in ("pass", "fallback", "unsupported"), row
        if row["max_abs"] is None or row["family"] == "offset":
            continue
        bound = 2e-6 if row["output"].startswith("grad_") else 2e-5
        if row["op"].startswith("policy_step"):
            bound = 2.2e-5  # the ratio exp(logp - old_logp) has the error of a float32 logp
        value = row["max_rel"] if row["output"].startswith("grad_") else row["max_abs"]
        assert float(value) <= bound, row


def test_error_families_are_what_they_say() -> None:
    found = {data.family: data for data in errors.families(torch.float32)}
    for name, data in found.items():
        finite = data.leaves[0][data.leaves[0].isfinite()]
        assert name == "offset" or finite.abs().max() <= 100
        assert data.leaves[0].gather(-1, data.target[:, None]).isfinite().all()
    assert (found["masked"].leaves[0] == -math.inf).any()
    assert found["masked"].stats["logp"][0] == 0.0
