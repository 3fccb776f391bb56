"""`probing demo`: the whole story on the toy world, through the same code as the real one."""

import importlib.util
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from analysis.alignment.run import AlignRecipe, align
from analysis.benchmarks.compare import answer_statements, compare_answers
from analysis.benchmarks.run import BenchRecipe, bench
from analysis.evaluation.compare import compare, statements
from analysis.evaluation.options import Options
from analysis.evaluation.run import evaluate
from probing.recipe import ProbeRunRecipe, validate
from probing.toyworld.cvbench import write_cvbench
from probing.toyworld.layout import write_world
from probing.toyworld.models import ASSETS, Sizes, make_models
from probing.toyworld.scenes import generate
from probing.toyworld.unclip import GUIDANCE, STEPS
from probing.training.run import train
from reports.page import write_report

logger = logging.getLogger(__name__)

TRAIN_SCENES, VAL_SCENES, WORLD_SEED = 2000, 400, 11
DECODED_IMAGES, ALIGNED_IMAGES = 64, 200
ASKED_SCENES, ASKED_SEED = 120, 13
"""Scenes that questions in CV-Bench's form are about, and their seed: nothing else has these scenes."""
LAYERS = {"quick": "0,2,4,6", "full": "all"}
DECODED_LAYERS = {"quick": "0,6", "full": "all"}
CONTROLS = {"quick": ["random"], "full": ["shuffled", "random"]}
"""Trained controls of the first checkpoint; the one on shuffled pairs says little that the mean target does not."""
QUICK = {"llava": "llava", "ola": "ola"}
FULL = QUICK | {"multi": "multi", "text": "stages/seed_0/text"}
"""Checkpoints and their folders; `text` is the language model before it saw a picture, behind a random projector."""


def run_demo(preset: str, out: Path) -> Path:
    """Probes every layer of tiny checkpoints against the three teachers, and compares them with the first.

    Args:
        preset: `quick` takes the models that ship with the package; `full` makes them and more first.
        out: gets `world/`, `models/` (full), `runs/` and `report/`; what is finished there is kept.

    Returns:
        The report's page.
    """
    torch.set_num_threads(min(torch.get_num_threads(), os.cpu_count() or 1))
    models = ASSETS
    if preset == "full":
        models = out / "models"
        make_models(models, Sizes())
    _tell_quality(json.loads((models / "quality.json").read_text(encoding="utf-8")))
    world = write_world(out / "world", TRAIN_SCENES, VAL_SCENES, WORLD_SEED)
    names = QUICK if preset == "quick" else FULL
    questions = write_cvbench(out / "cvbench", generate(ASKED_SCENES, ASKED_SEED), ASKED_SEED)
    runs: list[Path] = []
    aligned: list[Path] = []
    asked: list[Path] = []
    for name in names:
        recipe = demo_recipe(models, world, names[name], LAYERS[preset], [] if runs else CONTROLS[preset])
        run = train(recipe, out / "runs" / name)
        for options in demo_options(models, world, recipe, DECODED_LAYERS[preset]):
            evaluate(run.path, options)
        runs.append(run.path)
        aligned.append(align(align_recipe(recipe), out / "runs" / f"{name}_words").parent)
        asked.append(bench(bench_recipe(recipe, questions), out / "runs" / f"{name}_answers").parent)
    differences, answers = compare(runs, list(names)), compare_answers(asked, list(names))
    sentences = statements(differences)
    for sentence in [*(one for one in sentences if "cosine_centred" in one), *answer_statements(answers)]:
        logger.info(sentence)
    return write_report([*runs, *aligned, *asked], out / "report", pd.concat([differences, answers]), sentences)


def demo_options(models: Path, world: Path, recipe: ProbeRunRecipe, layers: str) -> list[Options]:
    """Cosine on all held-out images, decoded metrics on some of them; generated images where diffusers is installed."""
    metrics: tuple[str, ...] = ("da2k", "frechet")
    if importlib.util.find_spec("diffusers") is None:
        logger.warning("diffusers is not installed: no images are generated; pip install 'mllm-probing[decode]'")
        metrics = metrics[:-1]
    common = Options(metrics=metrics, layers=layers, images=DECODED_IMAGES, micro_batch=32)
    controls = tuple(control for control in ("none", "random") if control in ("none", *recipe.controls))
    return [
        Options(micro_batch=32),
        common.model_copy(
            update={"da2k": world / "da2k", "extractor": str(models / "toy"), "steps": STEPS, "guidance": GUIDANCE}
        ),
        # The probe alone: the dearest decoder, so neither the protocols that leak nor the shuffled control.
        common.model_copy(update={"metrics": ("miou",), "protocols": ("blind",), "controls": controls}),
    ]


def demo_recipe(
    models: Path,
    world: Path,
    checkpoint: str = "llava",
    layers: str = "all",
    controls: Sequence[str] = ("shuffled", "random"),
) -> ProbeRunRecipe:
    """A run's recipe: small batches and many steps, because that is what a tiny probe's attention needs to form."""
    values = {
        "backbone": {"checkpoint": str(models / checkpoint), "dtype": "float32"},
        "data": {"path": f"coco:{world}"},
        "teachers": {name: {"id": str(models / name)} for name in ("depth", "seg", "gen")},
        "layers": layers,
        "controls": list(controls),
        "fit": {"epochs": 1, "batch_size": 4, "micro_batch": 4, "lr": 3e-3, "workers": 1, "save_minutes": 1},
    }
    return validate(ProbeRunRecipe, values, "demo").with_absolute_paths()


def align_recipe(recipe: ProbeRunRecipe) -> AlignRecipe:
    """Patches and words of the checkpoint that a recipe probes."""
    values = {
        "backbone": recipe.backbone.model_dump(),
        "data": recipe.data.model_dump() | {"eval_limit": ALIGNED_IMAGES},
        "teachers": {name: teacher.model_dump() for name, teacher in recipe.teachers.items()},
        "pictures": 2,
        "workers": 1,
    }
    return validate(AlignRecipe, values, "demo")


def bench_recipe(recipe: ProbeRunRecipe, questions: Path) -> BenchRecipe:
    """Questions in CV-Bench's form, in the toy world's words, which have no letters: a word answers."""
    values = {
        "backbone": recipe.backbone.model_dump(),
        "benchmark": "cvbench",
        "data": str(questions),
        "suffix": None,
        "max_new_tokens": 2,
        "micro_batch": 64,
    }
    return validate(BenchRecipe, values, "demo").with_absolute_paths()


def _tell_quality(quality: dict[str, Any]) -> None:
    """Says how good the tiny models are, on scenes that they have not seen."""
    depth, seg, gen = (quality[name] for name in ("depth", "seg", "gen"))
    logger.info(
        "depth teacher: %.0f %% of hard pairs right (image row alone %.0f %%)",
        100 * depth["pairs"],
        100 * depth["pairs_from_image_row"],
    )
    logger.info("seg teacher: mIoU %.2f (mean feature %.2f)", seg["miou"], seg["miou_of_mean_feature"])
    logger.info(
        "gen teacher: finds the caption of %.0f %% of 200 images (chance %.1f %%)",
        100 * gen["caption_r_at_1_of_200"],
        100 * gen["caption_r_at_1_chance"],
    )
    logger.info(
        "gen decoder: %.0f %% of 200 images painted from an embedding are closest to their own (chance %.1f %%)",
        100 * gen["painted_r_at_1_of_200"],
        100 * gen["painted_r_at_1_chance"],
    )
    for name in (name for name in FULL if name in quality):
        found = quality[name]
        kinds = ", ".join(f"{kind} {100 * row['accuracy']:.0f}" for kind, row in found.items() if kind != "all")
        logger.info(
            "%s: %.0f %% of %d questions about held-out scenes right (guessing %.0f %%): %s",
            name,
            100 * found["all"]["accuracy"],
            found["all"]["n"],
            100 * found["all"]["chance"],
            kinds,
        )
