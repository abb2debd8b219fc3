"""Test tools/fingerprint.py: a digest depends on every bit, and a comparison names every difference."""

import json
import sys
from pathlib import Path

import op_calls
import pytest
import torch
from repo_copy import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import fingerprint  # noqa: E402


def test_a_digest_sees_bits_dtype_and_shape():
    x = torch.tensor([0.0, 1.0])
    assert fingerprint.digest(x) == fingerprint.digest(x.clone())
    others = [torch.tensor([-0.0, 1.0]), x.double(), x.view(2, 1), torch.tensor([0.0, 1.0000001])]
    assert len({fingerprint.digest(other) for other in [x, *others]}) == 5
    assert fingerprint.digest(torch.tensor(1.0)) != fingerprint.digest(torch.tensor([1.0]))
    assert fingerprint.digest(torch.eye(3)[:, 1]) == fingerprint.digest(torch.tensor([0.0, 1.0, 0.0]))


def test_a_refusal_is_a_result():
    def refused():
        raise ValueError("no")

    assert fingerprint.digests(refused) == {"error": "ValueError"}


def test_every_call_is_planned_once_on_every_backend():
    for backend in fingerprint.BACKENDS:
        names = [name for name, *_ in fingerprint.plan(backend)]
        assert len(set(names)) == len(names)
        assert {name.split()[0] for name in names} == {call.name for call in op_calls.calls()}


def written(path: Path, calls: dict) -> Path:
    path.write_text(json.dumps({"about": {"commit": path.stem}, "calls": calls}))
    return path


def test_a_comparison_names_each_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    first = written(tmp_path / "first.json", {"a": {"x": "1", "y": "2"}, "b": {"x": "3"}})
    second = written(tmp_path / "second.json", {"a": {"x": "1", "y": "5"}, "c": {"z": "4"}})
    assert fingerprint.compare(first, first) == 0
    assert "0 of 3 outputs differ" in capsys.readouterr().out
    assert fingerprint.compare(first, second) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "a: y differs",
        f"b: x is only in {first}",
        f"c: z is only in {second}",
        "first and second: 3 of 3 outputs differ",
    ]
