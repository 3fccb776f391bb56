"""`probing demo`: the whole story on the toy world, through the same code as the real one."""

import importlib.util
import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from analysis.evaluate import Options, evaluate
from probing.data.toyworld.layout import write_world
from probing.data.toyworld.make import ASSETS, Sizes, make_models
from probing.data.toyworld.unclip import GUIDANCE, STEPS
from probing.recipe import ProbeRunRecipe, validate
from probing.train import train
from reports.page import write_report

logger = logging.getLogger(__name__)

TRAIN_SCENES, VAL_SCENES, WORLD_SEED = 2000, 400, 11
DECODED_IMAGES = 100


def run_demo(preset: str, out: Path) -> Path:
    """Probes every layer of a tiny LLaVA against the three teachers.

    Args:
        preset: `quick` takes the models that ship with the package; `full` makes them first.
        out: gets `world/`, `models/` (full), `run/` and `report/`; what is finished there is kept.

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
    recipe = demo_recipe(models, world)
    run = train(recipe, out / "run")
    for options in demo_options(models, world):
        evaluate(run.path, options)
    return write_report([run.path], out / "report")


def demo_options(models: Path, world: Path) -> list[Options]:
    """Cosine on all held-out images, decoded metrics on some of them; generated images where diffusers is installed."""
    metrics: tuple[str, ...] = ("cosine", "da2k", "frechet")
    if importlib.util.find_spec("diffusers") is None:
        logger.warning("diffusers is not installed: no images are generated; pip install 'mllm-probing[decode]'")
        metrics = metrics[:-1]
    common = Options(metrics, images=DECODED_IMAGES, micro_batch=32)
    return [
        replace(common, da2k=world / "da2k", extractor=str(models / "toy"), steps=STEPS, guidance=GUIDANCE),
        # The probe alone: the dearest decoder, so neither the protocols that leak nor the shuffled control.
        replace(common, metrics=("miou",), protocols=("blind",), controls=("no", "random")),
    ]


def demo_recipe(models: Path, world: Path) -> ProbeRunRecipe:
    """The run's recipe: small batches and many steps, because that is what a tiny probe's attention needs to form."""
    values = {
        "backbone": {"checkpoint": str(models / "llava"), "dtype": "float32"},
        "data": {"path": f"coco:{world}"},
        "teachers": {name: {"id": str(models / name)} for name in ("depth", "seg", "gen")},
        "controls": ["shuffled", "random"],
        "fit": {"epochs": 1, "batch_size": 4, "micro_batch": 4, "lr": 3e-3, "workers": 1, "save_minutes": 1},
    }
    return validate(ProbeRunRecipe, values, "demo").with_absolute_paths()


def _tell_quality(quality: dict[str, Any]) -> None:
    """Says how good the tiny models are, on scenes that they have not seen."""
    depth, seg, gen, llava = (quality[name] for name in ("depth", "seg", "gen", "llava"))
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
    kinds = ", ".join(f"{kind} {100 * row['accuracy']:.0f}" for kind, row in llava.items() if kind != "all")
    logger.info(
        "LLaVA: %.0f %% of %d questions about held-out scenes right (guessing %.0f %%): %s",
        100 * llava["all"]["accuracy"],
        llava["all"]["n"],
        100 * llava["all"]["chance"],
        kinds,
    )
