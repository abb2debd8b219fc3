"""Test tools/older_cpus.py: the restrictions have an effect, and one without effect is an error."""

import importlib
import platform
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

older_cpus = importlib.import_module("older_cpus")

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="levels of x86-64")


@pytest.mark.parametrize("name", older_cpus.SETTINGS)
def test_every_library_runs_at_the_level_of_the_setting(name):
    setting = older_cpus.SETTINGS[name]
    if older_cpus.levels({})["kernels"] < setting.kernels:
        pytest.skip("this CPU is older")
    older_cpus.check(name, setting, older_cpus.levels(setting.environment))


def test_a_restriction_that_did_not_act_is_an_error():
    name, setting = next(iter(older_cpus.SETTINGS.items()))
    seen = older_cpus.levels(setting.environment)
    for library in ("torch", "kernels", "oneDNN", "MKL_CBWR", "threads"):
        with pytest.raises(SystemExit, match=f"{library} must run at"):
            older_cpus.check(name, setting, {**seen, library: "another"})
    older_cpus.check(name, setting, {**seen, "oneDNN": "", "MKL_CBWR": ""})  # a torch build without these libraries


def test_the_tests_exist():
    assert all((ROOT / "tests" / name).exists() for name in (*older_cpus.TESTS, *older_cpus.TRAINERS))
    assert set(older_cpus.TRAINERS) <= set(older_cpus.SETTINGS["AVX2, 2 threads"].tests)
