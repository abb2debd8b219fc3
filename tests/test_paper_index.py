"""The paper index, the registry, the docstrings and the command say the same things."""

import inspect
import re
from pathlib import Path

import pytest

from tokfuse import algorithms
from tokfuse.__main__ import main
from tokfuse.algorithms import listing
from tokfuse.algorithms.registry import ENTRIES, LABELS

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "paper_index.md"
# Every system of policy optimisation on the reading list, and the strongest claim it may make.
SYSTEMS = {
    "D3S": "recon", "ADORA": "exact", "BRRL / BPO / GBPO": "exact", "PIPO": "exact",
    "T-PPO": "recon", "R2VPO": "recon", "BAPO": "exact", "GRPO-Guard": "exact",
    "DCPO (distribution-centric)": "exact", "EPO": "exact", "NFT": "exact", "DYPO": "exact",
    "CDPO (VideoThinker)": "exact", "Actor-critics, optimal sample efficiency": "analogue",
    "A2PR": "analogue", "CIP": "analogue", "The standard family": "exact",
}  # fmt: skip
# How a docstring says what the label says.
WORDS = {"exact": r"\bexact\b", "recon": r"\breconstructed\b", "analogue": r"\bAnalogue\b"}


def test_the_page_is_what_the_registry_writes():
    text = PAGE.read_text()
    written = text.split(listing.INDEX_BEGIN)[1].split(listing.INDEX_END)[0].strip()
    assert written == listing.markdown(), (
        "run `python -m tokfuse algorithms --markdown docs/paper_index.md`"
    )


def test_every_system_has_its_label():
    claimed = {one.system: set() for one in ENTRIES.values()}
    for one in ENTRIES.values():
        claimed[one.system].add(one.label)
    assert claimed.keys() == SYSTEMS.keys()
    for system, label in SYSTEMS.items():
        # No entry claims more than its system may.
        assert min(LABELS.index(each) for each in claimed[system]) == LABELS.index(label), system


@pytest.mark.parametrize("name", algorithms.list())
def test_entries_name_a_file_a_source_and_their_reservations(name: str):
    one = ENTRIES[name]
    source = (ROOT / one.file).read_text()
    assert f'"{name}"' in source
    assert one.source and not one.summary.endswith(".")
    assert one.label == "exact" or one.differs, "a weaker claim states why"
    if one.file != "algorithms/table.py":
        assert re.search(WORDS[one.label], inspect.getdoc(one.cls)), f"{name}: label {one.label}"
        missing = [
            option
            for option, f in one.cls.__dataclass_fields__.items()
            if option not in algorithms.Standard.__dataclass_fields__
            and not re.search(rf"\b{option}\b", inspect.getdoc(one.cls))
        ]
        assert not missing, f"{name}: undocumented {missing}"


def test_every_axis_of_the_standard_family_is_documented():
    text = inspect.getdoc(algorithms.Standard)
    fields = set(algorithms.Standard.__dataclass_fields__) - {"name"}
    assert not {f for f in fields if not re.search(rf"\b{f}\b", text)}


def test_the_command(capsys):
    assert main(["algorithms"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split()[0] for line in lines] == algorithms.list()
    assert all(line.split()[1] in LABELS for line in lines)
    assert main(["algorithms", "r2vpo"]) == 0
    out = capsys.readouterr().out
    assert "r2vpo (recon)" in out and "penalty = must be given" in out
    with pytest.raises(SystemExit):
        main(["algorithms", "r2d2"])
    assert "one of a2pr_nll" in capsys.readouterr().err


def test_the_index_is_written_between_its_marks_only(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{listing.INDEX_BEGIN}\nold\n{listing.INDEX_END}\nafter\n")
    assert main(["algorithms", "--markdown", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old\n" not in text
    assert listing.markdown() in text
    page.write_text("no marks")
    with pytest.raises(ValueError, match="must hold"):
        main(["algorithms", "--markdown", str(page)])
