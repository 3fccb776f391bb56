"""Trains all models of the toy world, and writes the half-precision copies that ship with the package."""

import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from probing.toyworld.layout import write_world
from probing.toyworld.llava import Schedule, answer_accuracy, make_base_checkpoint, make_llava, make_tower
from probing.toyworld.scenes import generate
from probing.toyworld.teachers import Quality, train_depth, train_gen, train_seg
from probing.toyworld.unclip import train_classifier, train_unclip
from probing.utils.files import atomic_folder, write_text

logger = logging.getLogger(__name__)

ASSETS = Path(__file__).parent / "assets"
"""Shipped models: depth/, seg/, gen/, llava/, ola/, the classifier toy/, and quality.json."""
SHIPPED = ("depth", "seg", "gen", "toy", "llava", "ola")
TEACHER_SCENES_SEED, HELD_OUT_SEED = 90_001, 90_002
"""Seeds of the training and test scenes of teachers and tower; no demo world has these scenes."""


@dataclass(frozen=True)
class Sizes:
    """Numbers of scenes and steps; the defaults take about an hour on two CPU cores."""

    teacher_scenes: int = 8000
    held_out: int = 400
    train: int = 6000
    val: int = 400
    depth_steps: int = 1400
    seg_steps: int = 600
    gen_steps: int = 600
    unclip_steps: tuple[int, int] = (900, 2200)
    classifier_steps: int = 1500
    llava: Schedule = field(default_factory=Schedule)


def make_models(folder: Path, sizes: Sizes, seed: int = 0) -> dict[str, Any]:
    """Trains teachers and checkpoints; reuses existing ones.

    Args:
        folder: output folder of `make_teachers` and `make_checkpoints`, with a folder per finished checkpoint.
        sizes: numbers of scenes and steps.
        seed: seed of models and data.

    Returns:
        Quality of each model on held-out scenes, with the score of a trivial baseline.
    """
    quality = make_teachers(folder, sizes, seed)
    answers = make_checkpoints(folder, sizes.llava, seed)
    for name in (name for name in answers if name not in quality):
        with atomic_folder(folder / name) as part:
            shutil.copytree(folder / "stages" / f"seed_{seed}" / name / "ift", part, dirs_exist_ok=True)
        quality[name] = answers[name]
        write_text(folder / "quality.json", json.dumps(quality, indent=2) + "\n")
    return quality


def make_teachers(folder: Path, sizes: Sizes, seed: int = 0) -> dict[str, Any]:
    """Trains teachers and vision tower and writes a world; reuses existing parts.

    Args:
        folder: output folder for `world/`, a folder per teacher, `stages/tower/` and `quality.json`.
        sizes: numbers of scenes and steps.
        seed: seed of models and data.

    Returns:
        Quality of each teacher on held-out scenes, with the score of a trivial baseline.
    """
    file = folder / "quality.json"
    quality: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    scenes = generate(sizes.teacher_scenes, TEACHER_SCENES_SEED + seed)
    held_out = generate(sizes.held_out, HELD_OUT_SEED + seed)

    def make_gen(part: Path) -> Quality:
        encoder, gen_quality = train_gen(scenes, held_out, sizes.gen_steps, seed)
        return gen_quality | train_unclip(encoder, scenes, held_out, part, sizes.unclip_steps)

    makers: dict[str, Callable[[Path], Quality]] = {
        "depth": lambda part: train_depth(scenes, held_out, part, sizes.depth_steps, seed),
        "seg": lambda part: train_seg(scenes, held_out, part, sizes.seg_steps, seed),
        "gen": make_gen,
        "toy": lambda part: train_classifier(scenes, held_out, part, sizes.classifier_steps, seed),
    }
    for name, make in makers.items():
        if name not in quality:
            started = time.monotonic()
            with atomic_folder(folder / name) as part:
                quality[name] = make(part)
            quality[name]["seconds"] = round(time.monotonic() - started)
            write_text(file, json.dumps(quality, indent=2) + "\n")
    write_world(folder / "world", sizes.train, sizes.val, seed)
    make_tower(scenes, folder / "stages" / "tower", sizes.llava.tower, seed)
    return quality


def make_study_inputs(folder: Path) -> tuple[Path, Path]:
    """Makes the models and the world that the studies in examples/ share; reuses existing parts.

    Args:
        folder: output folder for `models/`, see `make_teachers`, and `world/`.

    Returns:
        Folders of the models, and of a world of scenes that no model has seen.
    """
    world = write_world(folder / "world", 4000, 400, seed=12, test=600)
    make_teachers(folder / "models", Sizes())
    return folder / "models", world


def make_checkpoints(
    folder: Path, schedule: Schedule, seed: int, variants: dict[str, dict[str, Any]] | None = None
) -> dict[str, dict[str, Quality]]:
    """Trains the LLM of one seed and the checkpoints that start from it; reuses existing ones.

    Args:
        folder: folder of `make_teachers`; output in `stages/seed_<seed>/`: `untrained/`, `text/`, and `pt/` and
            `ift/` of each checkpoint.
        schedule: optimiser steps.
        seed: seed of everything but teachers, tower and world.
        variants: recipe fields by checkpoint; default: `checkpoint_variants`.

    Returns:
        By checkpoint the result of `answer_accuracy` and the seconds; also saved in `answers.json`.
    """
    world, stages = folder / "world", folder / "stages" / f"seed_{seed}"
    file = stages / "answers.json"
    answers: dict[str, dict[str, Quality]] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    variants = variants or checkpoint_variants(folder)
    missing = [name for name in variants if name not in answers]
    if missing:
        base = make_base_checkpoint(world, folder / "stages" / "tower", stages, schedule, seed=seed)
    for name in missing:
        started = time.monotonic()
        checkpoint = make_llava(world, base, stages / name, schedule, seed, variants[name])
        answers[name] = answer_accuracy(checkpoint, world)
        answers[name]["all"]["seconds"] = round(time.monotonic() - started)
        write_text(file, json.dumps(answers, indent=2) + "\n")
    return {name: answers[name] for name in variants}


def checkpoint_variants(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns the recipe fields that each checkpoint adds to next-token prediction in stage pt.

    All start from the same tower and LLM and see the same conversations for the same number of steps. OLA's layers
    8–20 of 32 become 2–5 of 8, and a grid of 36 is pooled to 4 tokens.
    """
    teachers = {name: {"id": str(folder / name)} for name in ("gen", "depth", "seg")}
    layers = {"depth": "2,5", "seg": "3,4", "gen": "3,5"}
    return {
        "llava": {},
        "ola": {"embedding": {"teachers": teachers, "layers": layers, "seek": 4, "dim_head": 16}},
        "multi": {"encoders": {"teachers": teachers, "mode": "feature"}},
    }


def write_assets(folder: Path, assets: Path = ASSETS) -> float:
    """Copies models in half precision and returns their size in MB.

    Args:
        folder: folder of `make_models`.
        assets: output folder.
    """
    with atomic_folder(assets) as target:
        for path in sorted(path for name in SHIPPED for path in (folder / name).rglob("*") if path.is_file()):
            copy = target / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".safetensors":
                tensors = load_file(path)
                half = {k: t.half() if t.dtype == torch.float32 else t for k, t in tensors.items()}
                save_file(half, copy, metadata={"format": "pt"})
            elif path.name not in ("training.json", "training_args.bin"):
                shutil.copy(path, copy)
        shutil.copy(folder / "quality.json", target)
    return sum(path.stat().st_size for path in assets.rglob("*") if path.is_file()) / 1e6
