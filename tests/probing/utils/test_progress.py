"""Progress is a bar on a terminal and in a notebook, and lines elsewhere."""

import io
import logging
import sys
from types import SimpleNamespace

import pytest

from probing.utils.progress import Progress


def run(monkeypatch, terminal, **options):
    """Counts three steps; returns what stderr got."""
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress("probes", 3, unit="batches", **options) as progress:
        for _ in range(3):
            progress.advance("loss 0.5")
    return stream.getvalue()


def shell(**config):
    return SimpleNamespace(get_ipython=lambda: SimpleNamespace(config=config))


@pytest.mark.parametrize(
    ("terminal", "ipython", "bar"),
    [
        (True, None, True),
        (False, shell(IPKernelApp={}), True),
        (False, shell(TerminalIPythonApp={}), False),
        (False, None, False),
    ],
)
def test_bar_or_lines(monkeypatch, caplog, terminal, ipython, bar):
    caplog.set_level(logging.INFO, "probing")
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    shown = run(monkeypatch, terminal)
    assert ("probes: 100%" in shown and "3/3" in shown and "loss 0.5" in shown) == bar
    assert [line.split(",")[0] for line in caplog.messages] == ([] if bar else ["probes: 3/3 batches"])


def test_other_processes_show_nothing(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "probing")
    assert run(monkeypatch, True, show=False) == "" and not caplog.messages
