"""The commands of examples/distill/README.md, from an LLM and an open_clip ConvNeXt to a comparison."""

import re
import shlex
from pathlib import Path

import pandas as pd
import pytest

from probing.models import describe_checkpoint
from probing.recipe import BackboneRecipe
from tests.helpers import parts, tiny
from tests.helpers.cli import probing

ROOT = Path(__file__).parents[2]
README = ROOT / "examples" / "distill" / "README.md"


def commands() -> list[str]:
    """The lines of the first block, loops written out."""
    block = README.read_text().split("```")[1].strip().splitlines()
    assert len(block) == 5
    lines = []
    for line in block:
        loop = re.fullmatch(r"for (\w+) in (.*); do (.*); done", line)
        lines += [loop[3].replace(f"${loop[1]}", value) for value in loop[2].split()] if loop else [line]
    return lines


@pytest.mark.slow
def test_commands_of_the_readme_lead_to_a_comparison(models, coco, tmp_path, monkeypatch):
    tower = parts.open_clip_model(tmp_path / "tower", parts.CONVNEXT)
    tiny.conversations(tmp_path / "talk", 12)
    names = {
        "meta-llama/Meta-Llama-3-8B-Instruct": str(parts.llm(tmp_path / "llm")),
        "hf-hub:laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup": str(tower),
        "768": "64",
        "coco:data/coco": f"coco:{coco}",
        **{f"examples/distill/{name}.yaml": str(ROOT / f"examples/distill/{name}.yaml") for name in ("pt", "ola_pt")},
    }
    teachers = ("depth", "seg", "gen")
    smaller = {
        "distill": [
            f"data.conversations={tmp_path}/talk/data.json", f"data.image_root={tmp_path}/talk", "batch_size=6",
            "micro_batch=3", "workers=0", "bf16=false", "trainer={report_to: none, use_cpu: true}",
        ],
        "train": [
            "fit.batch_size=6", "fit.micro_batch=3", "fit.workers=0", "fit.report_to=none", "layers=0,2,final",
            *(f"--teacher={name}={models[name]}" for name in teachers),
        ],
    }  # fmt: skip
    embedding = [
        "embedding.layers={depth: 1, seg: 2, gen: 3}", "embedding.seek=4", "embedding.teachers.seg.grid=2",
        *(f"embedding.teachers.{name}.id={models[name]}" for name in teachers),
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for line in commands():
        _, verb, *words = shlex.split(line)
        extra = smaller.get(verb, []) + (embedding if "examples/distill/ola_pt.yaml" in words else [])
        probing(verb, *(names.get(word, word) for word in words), *extra)
    found = describe_checkpoint(BackboneRecipe(checkpoint="checkpoints/ola_pt"))
    assert found["vision_tower"]["type"] == "tower (open_clip)" and found["tokens"]["depth"] == 4
    differences = pd.read_csv("runs/comparison/differences.csv")
    assert set(differences.teacher) == set(teachers)
