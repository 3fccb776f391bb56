"""Every benchmark starts, and `make bench` names it; none is run."""

import importlib
import re
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NAMES = sorted(p.stem for p in HERE.glob("*.py") if "def main" in p.read_text(encoding="utf-8") and p != Path(__file__))


@pytest.mark.parametrize("name", NAMES)
def test_each_starts(name, monkeypatch, capsys):
    module = importlib.import_module(f"tests.benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    assert "usage" in capsys.readouterr().out


def test_make_bench_names_every_benchmark():
    makefile = (HERE.parents[1] / "Makefile").read_text(encoding="utf-8")
    named = re.search(r"for name in ([^;]*);", makefile)[1].split()
    assert sorted(named) == [name for name in NAMES if name != "profile_step"]  # a table to read, not a figure
