"""Test that the paper index, the registry, the docstrings and the command agree."""

import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tokfuse import algorithms
from tokfuse.__main__ import main
from tokfuse.algorithms import registry
from tokfuse.algorithms.registry import ENTRIES, EXACT, KINDS, LABELS
from tokfuse.inspection import methods

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "paper_index.md"
# Every system that has code of a kind, and the strongest claim that it may make.
POLICY = {
    "D3S": "recon",
    "ADORA": "exact",
    "BRRL / BPO / GBPO": "exact",
    "PIPO": "exact",
    "T-PPO": "recon",
    "R2VPO": "recon",
    "BAPO": "exact",
    "GRPO-Guard": "exact",
    "DCPO (distribution-centric)": "exact",
    "EPO": "exact",
    "NFT": "exact",
    "DYPO": "exact",
    "CDPO (VideoThinker)": "exact",
    "Actor-critics, optimal sample efficiency": "analogue",
    "A2PR": "analogue",
    "CIP": "analogue",
    "The standard family": "exact",
}
SELECTION = {
    "UGDA": "recon",
    "LESS": "exact",
    "GREATS": "exact",
    "LeaF": "exact",
    "CurES": "exact",
    "SEELE": "exact",
    "Cog-Rethinker": "recon",
    "ISLA": "analogue",
    "HPL": "exact",
    "Thought Branches": "exact",
    "CDC-MAS": "utility",
    "OFS": "utility",
    "Adyen bandits": "utility",
}
CAUSAL = {
    "CDAS": "exact",
    "Ad-load balancing": "exact",
    "CausalInfoMin": "exact",
    "IDUM": "utility",
    "Causal minimax invariance": "analogue",
    "CMB": "utility",
    "Policy-guided diffusion": "analogue",
    "Test-time scaling survey": "utility",
}
# Systems without code here. The page states the reason for each.
OUT = {
    "UMLC",
    "MPVA",
    "TCS",
    "AGEC causal bandits",
    "HDPO",
    "Domain counterfactuals / ILD",
    "CausalDiffAE",
    "Steering the Herd",
    "Invalid-IV ATE",
    "S-CNFG",
}
PREFERENCE = {
    "The DPO family": "exact",
    "RPO": "exact",
    "HPL": "recon",
    "ARIES": "analogue",
    "SePPO": "recon",
    "Differential Information": "utility",
    "MetaTuner": "utility",
}
DISTILLATION = {
    "GKD": "exact",
    "On-policy distillation": "exact",
    "MiniLLM": "exact",
    "DistiLLM": "exact",
    "Total variation distillation": "exact",
    "Top-k distillation": "exact",
    "SDFT": "exact",
    "SDPO": "exact",
    "LeaF": "recon",
}
REWARD = {
    "CausalRM": "recon",
    "FiMi-RM": "recon",
    "UGDA": "recon",
    "PARL": "analogue",
    "Outcome-invariant DA / IVL": "exact",
    "Kernel causal balancing": "exact",
    "One Map, Many Trials": "utility",
    "PUC / PTONet": "utility",
    "OILCA": "utility",
    "CDSAE": "utility",
    "The standard family": "exact",
}
SYSTEMS = {
    "policy": POLICY,
    "preference": PREFERENCE,
    "distillation": DISTILLATION,
    "reward": REWARD,
    "selection": SELECTION,
    "causal": CAUSAL,
}
# The word for each label in a docstring.
WORDS = {
    "exact": r"\b[Ee]xact\b",
    "recon": r"\b[Rr]econstructed\b",
    "analogue": r"\bAnalogue\b",
    "utility": r"\bUtility\b",
}


def test_the_page_is_what_the_registry_writes():
    text = PAGE.read_text()
    written = text.split(methods.INDEX_BEGIN)[1].split(methods.INDEX_END)[0].strip()
    assert written == methods.markdown(), "run `python -m tokfuse algorithms --markdown docs/paper_index.md`"


@pytest.mark.parametrize("kind", KINDS)
def test_every_system_has_its_label(kind: str):
    claimed = {}
    for one in ENTRIES.values():
        if one.kind == kind:
            claimed.setdefault(one.system, set()).add(one.label.split()[0])
    assert claimed.keys() == SYSTEMS[kind].keys()
    for system, label in SYSTEMS[kind].items():
        # No entry claims more than its system may.
        strength = list(WORDS)
        assert min(strength.index(each) for each in claimed[system]) == strength.index(label), system


def test_every_system_without_code_has_its_reason():
    stated = {name.split(" (")[0]: reason for name, reason in methods.OUT.items()}
    assert stated.keys() == OUT and all(len(reason) > 20 for reason in stated.values())


@pytest.mark.parametrize("name", algorithms.list())
def test_entries_name_a_file_a_source_and_their_reservations(name: str):
    one = ENTRIES[name]
    source = (ROOT / one.file).read_text()
    assert f'"{name}"' in source
    assert one.source and not one.summary.endswith(".")
    assert one.label in EXACT or one.differs, "a weaker claim states why"
    if not one.table:
        text = inspect.getdoc(one.cls)
        assert re.search(WORDS[one.label.split()[0]], text), f"{name}: label {one.label}"
        inherited = algorithms.Standard.__dataclass_fields__ if one.kind == "policy" else ()
        missing = [
            option for option in one.options() if option not in inherited and not re.search(rf"\b{option}\b", text)
        ]
        assert not missing, f"{name}: undocumented {missing}"


def test_a_function_is_made_with_its_options_filled_in(monkeypatch):
    monkeypatch.setattr(registry, "ENTRIES", {})

    @registry.register("half", kind="reward", system="-", label="utility", source="-", summary="-")
    def half(x: float, *, shift: float, scale: float = 0.5) -> float:
        return scale * x + shift

    assert registry.entry("half").options() == {"shift": dataclasses.MISSING, "scale": 0.5}
    assert algorithms.make("half", shift=1.0)(4.0) == 3.0
    with pytest.raises(ValueError, match=r"half: shift must be given"):
        algorithms.make("half")
    assert algorithms.list("reward") == ["half"] and algorithms.list("policy") == []
    with pytest.raises(ValueError, match="kind must be one of policy, preference"):
        algorithms.list("rewards")


def test_every_axis_of_the_standard_family_is_documented():
    text = inspect.getdoc(algorithms.Standard)
    fields = set(algorithms.Standard.__dataclass_fields__) - {"name"}
    assert not {f for f in fields if not re.search(rf"\b{f}\b", text)}


def test_the_command(capsys):
    assert main(["algorithms"]) == 0
    parts = capsys.readouterr().out.strip().split("\n\n")
    kinds = [kind for kind in KINDS if algorithms.list(kind)]
    assert [part.split(":")[0] for part in parts] == kinds
    for kind, part in zip(kinds, parts, strict=True):
        rows = [line.split() for line in part.splitlines()[1:]]
        assert [row[0] for row in rows] == algorithms.list(kind)
        assert all(row[1] in WORDS for row in rows)
    assert main(["algorithms", "--kind", "policy"]) == 0
    assert capsys.readouterr().out.strip() == parts[0]
    assert main(["algorithms", "r2vpo"]) == 0
    out = capsys.readouterr().out
    assert "r2vpo (policy, recon)" in out and "penalty = must be given" in out
    with pytest.raises(SystemExit):
        main(["algorithms", "r2vp0"])
    assert "Did you mean 'r2vpo'" in capsys.readouterr().err
    assert main(["algorithms", "bapo"]) == 0
    out = capsys.readouterr().out
    assert "authors_script: form='code', target=0.5" in " ".join(out.split()) and "run_bapo_example.sh" in out


def test_a_label_says_what_is_exact():
    """A method with a `form` follows both; every other exact method names the paper or the code."""
    forms = {name for name, one in ENTRIES.items() if one.options().get("form") in ("paper", "code")}
    both = {name for name, one in ENTRIES.items() if one.label == EXACT[0]}
    assert {"bapo", "pipo", "epo", "grpo_guard", "thought_branches"} <= both & forms
    assert both - forms == {"cures_sigma"}  # sketches are the paper's form, norms the released code's
    code = [one for one in ENTRIES.values() if one.label == "exact (released code)"]
    assert len(code) > 20 and all(one.source != "" for one in code)
    assert set(one.label for one in ENTRIES.values()) == set(LABELS)


def test_the_command_ends_quietly_if_its_reader_does():
    """`python -m tokfuse algorithms | head -1` ends without a traceback."""
    command = [sys.executable, "-m", "tokfuse", "algorithms"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.wait(timeout=120) == 141 and process.stderr.read() == b""


def test_the_index_is_written_between_its_marks_only(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{methods.INDEX_BEGIN}\nold\n{methods.INDEX_END}\nafter\n")
    assert main(["algorithms", "--markdown", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old\n" not in text
    assert methods.markdown() in text
    page.write_text("no marks")
    with pytest.raises(ValueError, match="must contain"):
        main(["algorithms", "--markdown", str(page)])
