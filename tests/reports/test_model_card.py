"""The model card: front matter of the Hub, and the numbers of `results.csv`."""

import ast
import inspect
import json
import re

import pandas as pd
import pytest
from huggingface_hub import ModelCard

from probing.probes.bank import ProbeBank
from reports.model_card import write_card
from tests.helpers.report_runs import make_run


def make_card(folder, checkpoint, licence=None):
    """Makes up a run of a checkpoint and writes its card."""
    make_run(folder, name="a|b [x](y)", layers=4)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["checkpoint"]["path"] = checkpoint
    (folder / "manifest.json").write_text(json.dumps(manifest))
    write_card(folder, "user/probes", licence)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_card(tmp_path_factory.mktemp("card") / "run", "elsewhere:llava", "apache-2.0")


def test_card_front_matter_and_usage_are_valid(folder):
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "apache-2.0" and card.data.library_name == "mllm-probing"
    assert {"probing", "depth"} <= set(card.data.tags) and card.data.base_model is None
    assert r"a\|b \[x\](y)" in card.text and "probing pull user/probes" in card.text
    code = re.search(r"```python\n(.+?)```", card.text, re.DOTALL)[1]
    (call,) = (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call))
    options = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    inspect.signature(ProbeBank.from_pretrained).bind("user/probes", **options)
    assert ast.literal_eval(call.args[0]) == "user/probes" and options["teacher"] == "depth"
    assert (folder / re.search(r"\]\((figures/[^)]+)\)", card.text)[1]).read_bytes().startswith(b"\x89PNG")


def test_card_rows_have_numbers_of_results(folder):
    rows = [line.split(" | ") for line in (folder / "README.md").read_text().splitlines()]
    rows = [row for row in rows if row[0] == "| Depth"]
    results = pd.read_csv(folder / "results.csv", dtype={"layer": str}, keep_default_na=False)
    curve = results[(results["teacher"] == "depth") & (results["metric"] == "cosine_centred")].astype({"value": float})
    for probe, row in zip(("resampler", "ridge"), rows[:2], strict=True):
        best = curve[(curve["probe"] == probe) & (curve["control"] == "none")].set_index("layer")["value"]
        random = curve[(curve["probe"] == probe) & (curve["control"] == "random")]["value"].max()
        assert row[3] == best.idxmax() and row[4].split()[0] == f"{best.max():.3f}"
        assert row[6].split()[0] == f"{random:.3f}" and row[7] == "0.000" and row[8].startswith("50")


def test_card_names_base_model_on_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)
    folder = make_card(tmp_path / "run", "llava-hf/llava-1.5-7b-hf")
    assert ModelCard.load(folder / "README.md").data.base_model == "llava-hf/llava-1.5-7b-hf"
