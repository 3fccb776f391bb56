"""Makes everything of the toy world from nothing, and the half-precision copies that ship with the package."""

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
"""Ready-made models: depth/, seg/, gen/, llava/, ola/, the classifier toy/, and quality.json."""
SHIPPED = ("depth", "seg", "gen", "toy", "llava", "ola")
TEACHER_SCENES_SEED, HELD_OUT_SEED = 90_001, 90_002
"""Seeds of the scenes that teachers and tower learn from and are tested on; no world of the demo has them."""


@dataclass(frozen=True)
class Sizes:
    """How much of everything; the defaults take about three quarters of an hour on two CPU cores."""

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
    """Makes teachers and checkpoints; existing files are reused.

    Args:
        folder: gets what `make_teachers` and `make_checkpoints` write, and a folder per finished checkpoint.
        sizes: how much of everything.
        seed: of everything.

    Returns:
        Quality of each model on scenes it has not seen, each number beside what a trivial answer scores.
    """
    quality = make_teachers(folder, sizes, seed)
    found = make_checkpoints(folder, sizes.llava, seed)
    for name in (name for name in found if name not in quality):
        with atomic_folder(folder / name) as part:
            shutil.copytree(folder / "stages" / f"seed_{seed}" / name / "ift", part, dirs_exist_ok=True)
        quality[name] = found[name]
        write_text(folder / "quality.json", json.dumps(quality, indent=2) + "\n")
    return quality


def make_teachers(folder: Path, sizes: Sizes, seed: int = 0) -> dict[str, Any]:
    """Makes what does not depend on a checkpoint; existing files are reused.

    Args:
        folder: gets `world/`, for the conversations, a folder per teacher, `stages/tower/` and `quality.json`.
        sizes: how much of everything.
        seed: of everything.

    Returns:
        Quality of each teacher on scenes it has not seen, each number beside what a trivial answer scores.
    """
    file = folder / "quality.json"
    quality: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    scenes = generate(sizes.teacher_scenes, TEACHER_SCENES_SEED + seed)
    held_out = generate(sizes.held_out, HELD_OUT_SEED + seed)

    def make_gen(part: Path) -> Quality:
        encoder, found = train_gen(scenes, held_out, sizes.gen_steps, seed)
        return found | train_unclip(encoder, scenes, held_out, part, sizes.unclip_steps)

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
    """Makes what the studies in examples/ share, so that they can share a folder; what is there already is kept.

    Args:
        folder: gets `models/`, filled by `make_teachers`, and `world/`.

    Returns:
        Both: the models, and a world for the probes, whose scenes no teacher, tower or checkpoint has seen.
    """
    world = write_world(folder / "world", 4000, 400, seed=12, test=600)
    make_teachers(folder / "models", Sizes())
    return folder / "models", world


def make_checkpoints(
    folder: Path, schedule: Schedule, seed: int, variants: dict[str, dict[str, Any]] | None = None
) -> dict[str, dict[str, Quality]]:
    """Makes the language model of one seed and checkpoints that start from it; what is there is kept.

    Args:
        folder: filled by `make_teachers`; gets `stages/seed_<seed>/`: `untrained/`, `text/`, and per checkpoint `pt/`
            and `ift/`.
        schedule: steps.
        seed: of all that is random but teachers, tower and world.
        variants: the checkpoints, as `checkpoint_variants` says them; without, its own.

    Returns:
        Per checkpoint of these what `answer_accuracy` finds, and the seconds it took; kept in `answers.json`.
    """
    world, stages = folder / "world", folder / "stages" / f"seed_{seed}"
    file = stages / "answers.json"
    found: dict[str, dict[str, Quality]] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    variants = variants or checkpoint_variants(folder)
    lacking = [name for name in variants if name not in found]
    if lacking:
        reader = make_base_checkpoint(world, folder / "stages" / "tower", stages, schedule, seed=seed)
    for name in lacking:
        started = time.monotonic()
        last = make_llava(world, reader, stages / name, schedule, seed, variants[name])
        found[name] = answer_accuracy(last, world)
        found[name]["all"]["seconds"] = round(time.monotonic() - started)
        write_text(file, json.dumps(found, indent=2) + "\n")
    return {name: found[name] for name in variants}


def checkpoint_variants(folder: Path) -> dict[str, dict[str, Any]]:
    """The toy world's checkpoints: what each one's stage pt has beside next-token prediction.

    All start from the same tower and language model and see the same conversations for the same number of steps. OLA's
    layers 8–20 of 32 become 2–4 of 6, and a grid of 36 is pooled to 4 tokens.
    """
    teachers = {name: {"id": str(folder / name)} for name in ("gen", "depth", "seg")}
    layers = {"depth": "2,4", "seg": "2,3", "gen": "2,4"}
    return {
        "llava": {},
        "ola": {"embedding": {"teachers": teachers, "layers": layers, "seek": 4, "dim_head": 16}},
        "multi": {"encoders": {"teachers": teachers, "mode": "feature"}},
    }


def write_assets(folder: Path, assets: Path = ASSETS) -> float:
    """Copies made models in half precision; returns their size in MB.

    Args:
        folder: made by `make_models`.
        assets: where the package keeps them.
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
