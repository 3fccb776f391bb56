"""The notebook runs from top to bottom, without a kernel: its cells are plain Python."""

import ast
import json
import time
from pathlib import Path

import matplotlib as mpl
import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "notebook.ipynb"


def code_cells() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_it_is_stripped():
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None


@pytest.mark.slow
def test_every_cell_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mpl.use("Agg")
    space: dict[str, object] = {}
    started = time.process_time()
    for number, cell in enumerate(code_cells()):
        exec(compile(ast.parse(cell), f"cell {number}", "exec"), space)
    assert time.process_time() - started < 120  # of all threads; two cores, a minute
    assert (tmp_path / "runs/notebook/layers.pdf").read_bytes().startswith(b"%PDF")
    assert "layer 8: cosine" in capsys.readouterr().out
    for name, shown in (("model", "vision_tower"), ("tokens", "<image "), ("bank", "<td>depth</td>")):
        assert shown in space[name]._repr_html_()
    assert "evaluated" in space["runs"]["llava"]._repr_html_()
