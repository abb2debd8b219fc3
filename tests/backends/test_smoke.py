"""Test tests/support/smoke.py: every op of the registry has a call, and a wrong result is detected."""

import json

import op_calls
import pytest
import smoke
import torch

import tokfuse
from tokfuse.runtime.backends import cuda_backend

hosted = [pytest.mark.cuda_host, pytest.mark.skipif(not cuda_backend.hosted(), reason="needs TOKFUSE_CUDA_HOST")]


def test_every_op_of_the_registry_has_a_call(monkeypatch: pytest.MonkeyPatch):
    assert smoke.missing() == []
    rows = [row for row in op_calls.ROWS if row.op != "kept_token_stats"]
    monkeypatch.setattr(op_calls, "ROWS", rows)
    assert smoke.missing() == ["kept_token_stats"]


def test_distances():
    infinity, nan = float("inf"), float("nan")
    wanted = torch.tensor([4.0, infinity, nan, -2.0])
    assert smoke.distance(wanted.bfloat16(), wanted) == 0.0
    assert smoke.distance(torch.tensor([4.0, infinity, nan, -2.4]), wanted) == pytest.approx(0.1)
    for wrong in ([4.0, -infinity, nan, -2.0], [4.0, infinity, 0.0, -2.0], [nan, infinity, nan, -2.0]):
        assert smoke.distance(torch.tensor(wrong), wanted) == infinity
    with pytest.raises(AssertionError, match="shape"):
        smoke.distance(wanted[:3], wanted)


def test_on_a_gpu_every_cluster_has_three_rows():
    for cluster, sizes in zip(smoke.CLUSTERS, smoke.long_rows(on_cpu=False), strict=True):
        assert sizes.tokens >= smoke.ROWS_PER_CLUSTER * (smoke.PROCESSORS // cluster)


class TestHosted:
    """On the CUDA kernels that run on the CPU."""

    pytestmark = hosted

    @pytest.mark.parametrize("option", ["--options", "--graph"])
    def test_every_call_passes(self, option: str, tmp_path, monkeypatch: pytest.MonkeyPatch):
        path, launches = tmp_path / "lines.jsonl", tmp_path / "launches"
        monkeypatch.setenv("TOKFUSE_HOST_LOG", str(launches))
        assert smoke.main(["--backend", "cuda", "--json", str(path), option]) == 0
        lines = [json.loads(text) for text in path.read_text().splitlines()]
        assert {line["status"] for line in lines} == {"pass"}
        ops = {row.op for row in op_calls.ROWS if row.registered}
        assert {line["op"] for line in lines} >= ops
        if option == "--options":
            clusters = [line.split() for line in launches.read_text().splitlines() if "ClusterLayout" in line]
            assert {int(line[2]) for line in clusters} == set(smoke.CLUSTERS)

    def test_a_wrong_result_fails(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        right = tokfuse.whiten

        def wrong(x: torch.Tensor) -> torch.Tensor:
            return right(x) + (0.01 if tokfuse.runtime.core.dispatch.forced_backend() == "cuda" else 0.0)

        monkeypatch.setattr(tokfuse, "whiten", wrong)
        assert smoke.main(["--backend", "cuda"]) == 1
        assert "smoke: whiten float32 x 1003: AssertionError: out: " in capsys.readouterr().out

    def test_a_graph_that_does_not_read_its_inputs_again_fails(self, monkeypatch: pytest.MonkeyPatch):
        def record(run):
            return (lambda: None), run()

        monkeypatch.setattr(smoke, "_record_nothing", record)
        assert smoke.main(["--backend", "cuda", "--graph"]) == 1

    def test_an_op_without_a_call_fails(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(smoke, "missing", lambda: ["new_op"])
        monkeypatch.setattr(smoke, "run_all", lambda *_: 0)
        assert smoke.main(["--backend", "cuda"]) == 1
