"""The parts of examples/smollm2 that need no pretrained weights."""

import importlib.util
import json
from pathlib import Path

import pandas as pd
import pytest
from transformers import AutoImageProcessor, AutoModel

from probing.distillation.recipe import DistillRecipe
from probing.toyworld.layout import write_world

FILE = Path(__file__).parents[2] / "examples" / "smollm2" / "run.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("smollm2_run", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_conversations_name_images_that_exist(example, tmp_path):
    world = write_world(tmp_path / "world", 4, 2, seed=3)
    for coco, expected in ((None, 4), (world, 8)):
        folder = tmp_path / f"talk_{expected}"
        folder.mkdir()
        example.write_conversations(folder, world, coco)
        for stage in example.STAGES:
            entries = json.loads((folder / f"{stage}.json").read_text())
            assert len(entries) == expected and all((folder / entry["image"]).is_file() for entry in entries)
            assert all("<image>" in entry["conversations"][0]["value"] for entry in entries)


def test_stages_are_valid_recipes(example, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(example, "run_stage", lambda recipe, out: made.append((recipe, out)) or out)
    example.make_checkpoint(tmp_path / "untrained", tmp_path, tmp_path / "ola", embedding=example.EMBEDDING)
    (pt, _), (ift, out) = made
    assert isinstance(pt, DistillRecipe) and pt.embedding.tasks == ["gen", "depth", "seg"] and ift.embedding is None
    assert ift.checkpoint == str(tmp_path / "ola" / "pt") and out == tmp_path / "ola" / "ift"


def test_tower_is_that_of_the_toy_world(example, tmp_path):
    example.save_tower(tmp_path)
    tower = AutoModel.from_pretrained(tmp_path)
    assert tower.config.image_size == AutoImageProcessor.from_pretrained(tmp_path).size["shortest_edge"]


def test_table_has_a_row_per_probe_and_weights(example, tmp_path):
    rows = [
        {"teacher": "depth", "layer": layer, "probe": "ridge", "control": control, "metric": "cosine_centred",
         "variant": "", "value": value, "ci_low": value - 0.1, "ci_high": value + 0.1}
        for layer in example.LAYERS for control, value in (("none", 0.5), ("random", 0.25))
    ]  # fmt: skip
    (tmp_path / "llava").mkdir()
    pd.DataFrame(rows).to_csv(tmp_path / "llava" / "results.csv", index=False)
    lines = example.table([tmp_path / "llava"], "cosine_centred").splitlines()
    assert lines[2].startswith("| depth | ridge | random | 0.250 [0.150, 0.350]") and len(lines) == 4
    assert lines[3].startswith("| depth | ridge | llava | 0.500 [0.400, 0.600]")
