"""Test the method gallery and the formulas of the site: complete, current, and rendered without a script."""

import importlib.util
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

import tokfuse.algorithms  # noqa: F401  (fills the registry)
from tokfuse.algorithms import gallery
from tokfuse.algorithms.preference.base import PreferenceLoss
from tokfuse.algorithms.registry import ENTRIES
from tokfuse.inspection import methods

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "gallery.md"


@pytest.fixture(scope="module")
def math() -> ModuleType:
    pytest.importorskip("latex2mathml")
    spec = importlib.util.spec_from_file_location("mkdocs_math", ROOT / "tools" / "mkdocs_math.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["mkdocs_math"] = module
    spec.loader.exec_module(module)
    return module


def test_every_policy_method_and_preference_loss_has_a_card() -> None:
    wanted = {n for n, one in ENTRIES.items() if one.kind == "policy"}
    wanted |= {n for n, one in ENTRIES.items() if inspect.isclass(one.cls) and issubclass(one.cls, PreferenceLoss)}
    assert wanted - set(gallery.CARDS) == set()
    assert set(gallery.CARDS) <= set(ENTRIES)


def test_the_page_is_current() -> None:
    text = PAGE.read_text()
    written = text.split(gallery.BEGIN)[1].split(gallery.END)[0].strip()
    assert written == gallery.page(), "run `python -m tokfuse algorithms --gallery docs/gallery.md`"


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    page = tmp_path / "gallery.md"
    page.write_text(f"before\n{gallery.BEGIN}\nold\n{gallery.END}\nafter\n")
    assert methods.main(["--gallery", str(page)]) == 0
    assert page.read_text() == f"before\n{gallery.BEGIN}\n{gallery.page()}\n{gallery.END}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(ValueError, match="once each"):
        methods.main(["--gallery", str(page)])


def test_every_number_of_a_study_is_in_the_study() -> None:
    study = (ROOT / "docs" / "algorithm_study.md").read_text()
    for name, card in gallery.CARDS.items():
        for number in re.findall(r"\d+\.\d+|\d+%", card.study):
            assert number in study, f"{name}: {number} is not in docs/algorithm_study.md"


@pytest.mark.parametrize("name", gallery.CARDS)
def test_a_formula_is_valid(name: str, math: ModuleType) -> None:
    """MathML is XML, and a command that the converter does not know would stay in the text with its backslash."""
    html = math.on_page_markdown(f"$$\n{gallery.CARDS[name].formula}\n$$")
    formula = ElementTree.fromstring(html)
    assert formula.get("class") == "formula" and len("".join(formula.itertext())) > 3
    assert "\\" not in "".join(formula.itertext())


def test_code_and_escaped_dollars_are_no_formulas(math: ModuleType) -> None:
    text = "`$HOME` and \\$5\n\n```console\necho $A $B\n```\n\ncosts 3 $ or 4 $ more"
    assert math.on_page_markdown(text) == text
    assert math.on_page_markdown("a $x_1$ b").count("<math") == 1


def test_code_on_the_page_has_no_escapes() -> None:
    codes = [code for line in PAGE.read_text().splitlines() for code in line.split("`")[1::2]]
    assert [code for code in codes if "\\" in code] == []
