"""`probing demo`: the full pipeline on the toy world, with the same code as for real data."""

import importlib.util
import json
import logging
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from analysis.alignment.run import AlignRecipe, align
from analysis.benchmarks.compare import answer_statements, compare_answers
from analysis.benchmarks.run import BenchRecipe, bench
from analysis.erasure.options import Options as ErasureOptions
from analysis.erasure.run import erase
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
from probing.utils.environment import log_to_stderr
from probing.utils.interrupt import ignore_signals, raise_on_signals
from reports.page import write_report

logger = logging.getLogger(__name__)

TRAIN_SCENES, VAL_SCENES, WORLD_SEED = 600, 200, 11
EPOCHS = 16
DECODED_IMAGES, ALIGNED_IMAGES = 64, 200
QUESTION_SCENES, QUESTION_SEED = 120, 13
"""Number and seed of the scenes of the CV-Bench questions; used for nothing else."""
LAYERS = {"quick": "0,2,4,8", "full": "all"}
DECODED_LAYERS = {"quick": "0,8", "full": "all"}
CONTROLS = {"quick": ["random"], "full": ["shuffled", "random"]}
"""Trained controls; `shuffled` adds little to the mean target."""
QUICK = {"llava": "llava", "ola": "ola"}
FULL = QUICK | {"multi": "multi", "text": "stages/seed_0/text"}
"""Checkpoints and their folders; `text` is the text-only language model with a random projector."""


def run_demo(preset: str, out: Path) -> Path:
    """Probes every layer of tiny checkpoints against the three teachers, and compares them with the first.

    Args:
        preset: `quick` uses the shipped models; `full` trains them, and more, first.
        out: output folder for `world/`, `models/` (full), `runs/` and `report/`; finished parts are reused.

    Returns:
        Path of the report's page.
    """
    models = ASSETS
    if preset == "full":
        models = out / "models"
        make_models(models, Sizes())
    _log_quality(json.loads((models / "quality.json").read_text(encoding="utf-8")))
    world = write_world(out / "world", TRAIN_SCENES, VAL_SCENES, WORLD_SEED)
    names = QUICK if preset == "quick" else FULL
    questions = write_cvbench(out / "cvbench", generate(QUESTION_SCENES, QUESTION_SEED), QUESTION_SEED)
    jobs = []
    for name, folder in names.items():
        recipe = demo_recipe(models, world, folder, LAYERS[preset], CONTROLS[preset])
        scores = demo_options(models, world, recipe, DECODED_LAYERS[preset])
        erasure = ErasureOptions(conversations=world / "conversations_val2017.json", micro_batch=16)
        jobs.append(_Job(name, out / "runs", recipe, scores, erasure, bench_recipe(recipe, questions)))
    runs, alignments, benchmarks = map(list, zip(*_run_jobs(jobs), strict=True))
    differences, answers = compare(runs, list(names)), compare_answers(benchmarks, list(names))
    main = differences[differences["metric"] == "cosine_centred"]
    for sentence in [*statements(main), *answer_statements(answers)]:
        logger.info(sentence)
    both = pd.concat([differences, answers])
    return write_report([*runs, *alignments, *benchmarks], out / "report", both, statements(differences))


@dataclass(frozen=True)
class _Job:
    """The work on one checkpoint: its run and other results are folders of `out`."""

    name: str
    out: Path
    recipe: ProbeRunRecipe
    scores: list[Options]
    erasure: ErasureOptions
    questions: BenchRecipe


def _run_jobs(jobs: Sequence[_Job]) -> list[tuple[Path, Path, Path]]:
    """Works on checkpoints in parallel, a process for each core.

    An error or a signal stops all of them; they save their state.

    Returns:
        Folders of the run, the alignment and the answers of each checkpoint.
    """
    workers = min(len(jobs), os.cpu_count() or 1)
    level = logging.getLogger("probing").level
    results: list[tuple[Path, Path, Path]] = []
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for start in range(0, len(jobs), workers):  # the pool would still start a job that waits when a signal comes
            futures = [pool.submit(_run_job, job, level) for job in jobs[start : start + workers]]
            try:
                for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                    future.result()  # raises its error
            except BaseException:
                for process in multiprocessing.active_children():
                    process.terminate()
                raise  # after the others have saved their state
            results += [future.result() for future in futures]
    return results


def _run_job(job: _Job, level: int) -> tuple[Path, Path, Path]:
    """Probes one checkpoint, in one thread: training such small probes took longer in two."""
    torch.set_num_threads(1)
    handler = log_to_stderr(level, f"{job.name}: ")
    raise_on_signals()
    try:
        run = train(job.recipe, job.out / job.name)
        for options in job.scores:
            evaluate(run.path, options)
        erase(run.path, job.erasure)
        alignment = align(align_recipe(job.recipe), job.out / f"{job.name}_words").parent
        return run.path, alignment, bench(job.questions, job.out / f"{job.name}_answers").parent
    finally:
        ignore_signals()  # while it waits for the others
        logging.getLogger().removeHandler(handler)


def demo_options(models: Path, world: Path, recipe: ProbeRunRecipe, layers: str) -> list[Options]:
    """Scores features on all held-out images, decoded ones on some; generates no images without diffusers."""
    metrics: tuple[str, ...] = ("da2k", "frechet")
    if importlib.util.find_spec("diffusers") is None:
        logger.warning("diffusers is not installed, skipping generated images; run: pip install 'mllm-probing[decode]'")
        metrics = metrics[:-1]
    common = Options(metrics=metrics, layers=layers, images=DECODED_IMAGES, micro_batch=32)
    controls = tuple(control for control in ("none", "random") if control in ("none", *recipe.controls))
    return [
        Options(metrics=("cosine", "code_length"), micro_batch=32),
        common.model_copy(
            update={"da2k": world / "da2k", "extractor": str(models / "toy"), "steps": STEPS, "guidance": GUIDANCE}
        ),
        # The decoder is expensive: only the protocol without leakage, and no shuffled control.
        common.model_copy(update={"metrics": ("miou",), "protocols": ("blind",), "controls": controls}),
    ]


def demo_recipe(
    models: Path,
    world: Path,
    checkpoint: str = "llava",
    layers: str = "all",
    controls: Sequence[str] = ("shuffled", "random"),
) -> ProbeRunRecipe:
    """Returns a probing recipe with small batches and many steps, which the depth probe's attention needs.

    All heads together are as wide as the depth probe; with the default they would be twice as wide, and no better.
    """
    values = {
        "backbone": {"checkpoint": str(models / checkpoint), "dtype": "float32"},
        "data": {"path": f"coco:{world}", "target_cache": str(world.parent / "targets")},
        "teachers": {name: {"id": str(models / name)} for name in ("depth", "seg", "gen")},
        "layers": layers,
        "controls": list(controls),
        "probe": {"dim_head": 16},
        "fit": {"epochs": EPOCHS, "batch_size": 8, "micro_batch": 8, "lr": 3e-3, "buffer": "auto", "workers": 0,
                "positions": ["image", "text", "last"]},
    }  # fmt: skip
    return validate(ProbeRunRecipe, values, "demo").with_absolute_paths()


def align_recipe(recipe: ProbeRunRecipe) -> AlignRecipe:
    """Returns the alignment recipe for the checkpoint of a probing recipe."""
    values = {
        "backbone": recipe.backbone.model_dump(),
        "data": recipe.data.model_dump() | {"eval_limit": ALIGNED_IMAGES},
        "teachers": {name: teacher.model_dump() for name, teacher in recipe.teachers.items()},
        "pictures": 2,
        "workers": 0,
    }
    return validate(AlignRecipe, values, "demo")


def bench_recipe(recipe: ProbeRunRecipe, questions: Path) -> BenchRecipe:
    """Returns the benchmark recipe for the checkpoint of a probing recipe; answers are words, not letters."""
    values = {
        "backbone": recipe.backbone.model_dump(),
        "benchmark": "cvbench",
        "data": str(questions),
        "suffix": None,
        "max_new_tokens": 2,
        "micro_batch": 64,
    }
    return validate(BenchRecipe, values, "demo").with_absolute_paths()


def _log_quality(quality: dict[str, Any]) -> None:
    """Logs the quality of the tiny models on held-out scenes."""
    depth, seg, gen = (quality[name] for name in ("depth", "seg", "gen"))
    logs = [
        ("depth teacher: %.0f %% of hard pairs correct (image row alone %.0f %%)", "pairs", "pairs_from_image_row"),
        ("gen teacher: retrieves the caption of %.0f %% of 200 images (chance %.1f %%)",
         "caption_r_at_1_of_200", "caption_r_at_1_chance"),
        ("gen decoder: %.0f %% of 200 generated images are closest to their source (chance %.1f %%)",
         "generated_r_at_1_of_200", "generated_r_at_1_chance"),
    ]  # fmt: skip
    for text, *keys in logs:
        logger.info(text, *(100 * (depth | gen)[key] for key in keys))
    logger.info("seg teacher: mIoU %.2f (mean feature %.2f)", seg["miou"], seg["miou_of_mean_feature"])
    for name in (name for name in FULL if name in quality):
        total = quality[name]["all"]
        kinds = ", ".join(f"{kind} {100 * row['accuracy']:.0f}" for kind, row in quality[name].items() if kind != "all")
        logger.info(
            "%s: %.0f %% of %d questions about held-out scenes correct (chance %.0f %%): %s",
            name, 100 * total["accuracy"], total["n"], 100 * total["chance"], kinds,
        )  # fmt: skip
