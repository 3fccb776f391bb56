"""`probing train`: from a recipe to a finished run."""

import gc
import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import save_file

from probing.data.coco import ImageList, first_image, list_images
from probing.data.target_cache import CacheOptions, TargetCache, build_target_caches
from probing.models import Backbone, Identity, Layer, check_models, load_backbone
from probing.models.chat_templates import rendering_at
from probing.models.finite import not_finite_rows, report_not_finite
from probing.recipe import DataRecipe, ProbeRunRecipe
from probing.runs.directory import Run
from probing.runs.manifest import manifest_header, versions
from probing.runs.recorded_inputs import (
    describe_inputs,
    recorded_inputs,
    recorded_moment,
    to_record,
    vocabulary,
)
from probing.runs.resume import claim, holds_run
from probing.teachers import Teacher, load_teachers
from probing.training.convergence import NOT_TRAINED, judge
from probing.training.sizes import disk_bytes, probe_parameters
from probing.training.state import summary
from probing.training.trackers import require_tracker
from probing.training.trainer import ProbeTrainer
from probing.training.work_division import spread_layers
from probing.utils.distributed import init_accelerator, report_dead_ranks
from probing.utils.errors import UserError
from probing.utils.files import atomic_file, atomic_folder, disk_errors, read_json, require_space, write_text
from probing.utils.paths import local_path

logger = logging.getLogger(__name__)

RANDOM_WEIGHTS_SEED = 2412_09585
"""Seed of the random-weights control; unlikely to be that of a checkpoint's initialisation."""
WEIGHTS = ("none", "random")
"""Weights of the backbone: `none` is the checkpoint's, `random` a re-initialised LLM and projector."""


@dataclass(frozen=True)
class _TrainingInputs:
    """Everything that the trainings on both weights share."""

    run: Run
    teachers: dict[str, Teacher]
    target_caches: dict[str, TargetCache]
    images: ImageList
    layers: Sequence[Layer]
    provenance: dict[str, Any]
    accelerator: Accelerator


def _images(data: DataRecipe, split: str, limit: int | None) -> ImageList:
    images = list_images(local_path(data.path.removeprefix("coco:")), split, limit)
    if len(images) < 2:
        raise UserError(f"{split} has {len(images)} image; probes need at least 2")
    return images


def training_images(data: DataRecipe) -> ImageList:
    """Lists the images that probes are trained on; raises UserError as `probing.data.coco.list_images` does."""
    return _images(data, data.train_split, data.train_limit)


def held_out_images(data: DataRecipe) -> ImageList:
    """Lists the images that probes are scored on; raises UserError as `probing.data.coco.list_images` does."""
    return _images(data, data.eval_split, data.eval_limit)


def open_target_caches(
    recipe: ProbeRunRecipe,
    teachers: dict[str, Teacher],
    images: ImageList,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, TargetCache]:
    """Builds the target caches that a recipe requests."""
    data, fit = recipe.data, recipe.fit
    options = CacheOptions(data.target_cache, data.target_cache_dtype, data.view, fit.micro_batch, fit.workers)
    return build_target_caches(teachers, images, options, rank, world_size)


def require_tokens(recipe: ProbeRunRecipe, backbone: Backbone, images: ImageList) -> None:
    """Raises UserError if the prompt lacks tokens that probes or ridge readouts read."""
    tokens, keys = backbone.prepare([first_image(images, recipe.data.view)]).tokens, recipe.probe.keys
    if not tokens.mask(*keys).any():
        raise UserError(
            f"the prompt has no {', '.join(keys)} tokens; choose probe.keys from {', '.join(tokens.counts())}"
        )
    if recipe.fit.positions:
        tokens.mean_weights(recipe.fit.positions)


def load_run_backbone(recipe: ProbeRunRecipe, weights: str, device: torch.device) -> Backbone:
    """Loads the checkpoint (`none`), or its architecture with random weights (`random`)."""
    return load_backbone(recipe.backbone, device, RANDOM_WEIGHTS_SEED if weights == "random" else None)


@report_dead_ranks()
def train(recipe: ProbeRunRecipe, out: Path) -> Run:
    """Trains the probe banks of a run, or resumes an unfinished one.

    Args:
        recipe: the whole run.
        out: its directory.

    Returns:
        The finished run.

    Raises:
        UserError: recipe, checkpoint, teachers or data cannot be used; nothing is written then.
        Interrupted: stopped by the user; the same call resumes.
    """
    require_tracker(recipe.fit.report_to)
    accelerator = init_accelerator()
    with disk_errors(out):
        recorded = recorded_inputs(out, any((out / "state").glob("*/*")))
    moment = [recorded_moment(recorded)]
    broadcast_object_list(moment)  # processes that start around midnight would render different prompts
    with rendering_at(moment[0]):
        return _train(recipe, out, recorded, accelerator)


def _train(recipe: ProbeRunRecipe, out: Path, recorded: dict[str, Any] | None, accelerator: Accelerator) -> Run:
    layers = check_models(recipe.backbone, recipe.teachers, recipe.layers)
    train_images, eval_images = training_images(recipe.data), held_out_images(recipe.data)
    backbone = load_run_backbone(recipe, "none", accelerator.device)
    teachers = load_teachers(recipe.teachers, accelerator.device)
    run, main = Run(out, recipe), accelerator.is_main_process
    with disk_errors(out):
        holds_run(out, recipe)
        if not run.finished:
            require_tokens(recipe, backbone, train_images)
            written = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
            require_space(out, disk_bytes(recipe, backbone.hidden_size, teachers, layers) - written)
    controls = {"none": ["none", *(["shuffled"] if "shuffled" in recipe.controls else [])]}
    if "random" in recipe.controls:
        controls["random"] = ["random"]
    finished, due = run.finished, [weights for weights in controls if not summary_file(run, weights).exists()]
    accelerator.wait_for_everyone()  # before the main process writes or removes any of these files
    if finished:
        logger.info("%s is finished already", out)
        if main:  # an earlier process may have been killed before it removed them
            run.remove_temporary_files()
            for weights in WEIGHTS:
                shutil.rmtree(run.path / "state" / weights, ignore_errors=True)
        return run
    provenance = provenance_of(recipe, backbone.identity, teachers, train_images, eval_images)
    scoring_only = ("held-out images", "tokenizer's vocabulary")  # may change until the probes are scored
    inputs = {name: value for name, value in provenance["inputs"].items() if name not in scoring_only}
    with accelerator.main_process_first():
        claim(out, recipe, {"rendered_at": provenance["rendered_at"], "inputs": inputs}, recorded, write=main)
    if main and len(train_images) <= recipe.fit.batch_size:
        logger.warning("all training images are one batch, so code_length is not measured; lower fit.batch_size")
    caches = open_target_caches(recipe, teachers, train_images, accelerator.process_index, accelerator.num_processes)
    shared = _TrainingInputs(run, teachers, caches, train_images, layers, provenance, accelerator)
    for weights in due:
        if weights == "random":
            del backbone
            gc.collect()
            backbone = load_run_backbone(recipe, weights, accelerator.device)
        accelerator.wait_for_everyone()
        _train_on(weights, controls[weights], backbone, shared)
    if main:
        with disk_errors(out):
            _finish(run, list(controls), provenance, train_images, eval_images)
    accelerator.wait_for_everyone()
    return run


def summary_file(run: Run, weights: str) -> Path:
    """Returns the file that exists once all probes on some weights are trained and saved."""
    return run.path / "state" / weights / "summary.json"


def _train_on(weights: str, controls: list[str], backbone: Backbone, shared: _TrainingInputs) -> None:
    """Trains and saves the probes on some weights; the summary is written last."""
    run, layers, accelerator = shared.run, shared.layers, shared.accelerator
    parameters = len(layers) * len(controls) * probe_parameters(run.recipe, backbone.hidden_size, shared.teachers)
    spread = spread_layers(run.recipe.fit, 16 * parameters, accelerator)
    if spread and len(layers) < accelerator.num_processes:
        raise UserError(f"{accelerator.num_processes} processes for {len(layers)} layers; start fewer")
    trainer = ProbeTrainer(
        run.recipe,
        backbone,
        shared.teachers,
        shared.images,
        layers[accelerator.process_index :: accelerator.num_processes] if spread else layers,
        controls,
        run.path / "state" / weights,
        accelerator,
        shared.target_caches,
        spread,
        run.path / "tensorboard" / weights,
    )
    state = trainer.run()
    if not accelerator.is_main_process:
        return
    if spread:
        state = trainer.merge_processes(layers, state.step)
    with disk_errors(run.path):
        header = {name: value for name, value in shared.provenance.items() if name not in ("inputs", "rendered_at")}
        for control, bank in state.banks.items():
            with atomic_folder(run.probes(control)) as folder:
                bank.save(folder, {"control": control, **header})
        if run.recipe.fit.ridge:
            with atomic_folder(run.ridge(weights)) as folder:
                trainer.readout(state).save(folder, {"control": weights, **header})
        state.prequential.save(run.errors(weights), run.recipe.fit)
        if weights == "none":
            with atomic_file(run.means) as file:
                save_file(trainer.means(state), file)
        images = shared.images
        report_not_finite(state.not_finite, images.names, len(images) - len(state.skipped), weights)
        excluded = not_finite_rows(state.not_finite, images.names, images.split, weights)
        write_text(summary_file(run, weights), json.dumps(summary(state, list(shared.teachers), excluded)))
    trainer.files.remove()


def provenance_of(
    recipe: ProbeRunRecipe, checkpoint: Identity, teachers: dict[str, Teacher], train: ImageList, held_out: ImageList
) -> dict[str, Any]:
    """Describes checkpoint, prompt, teachers, data and versions for the manifest."""
    train_digest, eval_digest = train.digest(), held_out.digest()
    data = {"training images": train_digest, "held-out images": eval_digest}
    inputs = describe_inputs(checkpoint, teachers, recipe.data.view, data) | vocabulary(checkpoint)
    return {
        **manifest_header(checkpoint, recipe.backbone.prompt, teachers),
        **to_record(inputs),
        "data": {
            "path": recipe.data.path,
            "train_split": train.split,
            "eval_split": held_out.split,
            "train_images": len(train),
            "eval_images": len(held_out),
            "train_digest": train_digest,
            "eval_digest": eval_digest,
            "unlisted": {train.split: train.unlisted, held_out.split: held_out.unlisted},
            "view": recipe.data.view,
        },
        "preprocessing": "RGB; each model's own image processor"
        + (" after squashing to a square" if recipe.data.view == "square" else ""),
        "versions": versions(),
    }


def _finish(run: Run, trained: list[str], provenance: dict[str, Any], train: ImageList, held_out: ImageList) -> None:
    """Writes learning curves and, last, the manifest; then removes the training state."""
    summaries = [
        read_json(summary_file(run, weights), "remove it and run the same command again") for weights in trained
    ]
    lines = ["control,teacher,layer,seed,step,loss"]
    convergence = []
    for part in summaries:
        for curve in part["curves"]:
            key = {name: curve[name] for name in ("control", "teacher", "layer", "seed")}
            prefix = ",".join(map(str, key.values()))
            lines += [f"{prefix},{step},{loss:.6g}" for step, loss in enumerate(curve["losses"])]
            verdict = judge(np.asarray(curve["losses"]), np.asarray(part["mean_losses"][curve["teacher"]]))
            values = {name: None if value != value else value for name, value in vars(verdict).items()}
            convergence.append({**key, **values, "steps_not_taken": int(np.isnan(curve["losses"]).sum())})
    write_text(run.path / "learning_curves.csv", "\n".join(lines) + "\n")
    skipped = {(s["image"], s["split"]): s for part in summaries for s in part["skipped"]}
    skipped |= {(s.image, s.split): vars(s) for images in (train, held_out) for s in images.skipped}
    fit = run.recipe.fit
    settings = {"epochs": fit.epochs, "batch_size": fit.batch_size, "seeds": fit.seeds, "lr": fit.lr}
    settings["steps"] = summaries[0]["steps"]
    seconds = sum(part["seconds"] for part in summaries)
    not_finite = [row for part in summaries for row in part["not_finite"]]
    _report_skipped_steps(convergence)
    write_manifest(run, provenance, settings, convergence, list(skipped.values()), seconds, not_finite)
    shutil.rmtree(run.path / "state", ignore_errors=True)


def _report_skipped_steps(convergence: list[dict[str, Any]]) -> None:
    affected = [row for row in convergence if row["steps_not_taken"] and row["state"] != NOT_TRAINED]
    if affected:
        worst = max(affected, key=lambda row: row["steps_not_taken"])
        logger.warning(
            "%d of %d probes skipped steps: too few usable images, or no finite loss; most at %s, layer %s: %d",
            len(affected), len(convergence), worst["teacher"], worst["layer"], worst["steps_not_taken"],
        )  # fmt: skip


def write_manifest(
    run: Run,
    provenance: dict[str, Any],
    fit: dict[str, Any],
    convergence: list[dict[str, Any]],
    skipped: list[dict[str, str]],
    seconds: float,
    not_finite: Sequence[dict[str, str]] = (),
) -> None:
    """Writes the manifest, which marks the run as finished.

    Args:
        run: the run.
        provenance: from `provenance_of`.
        fit: epochs, batch_size, steps, seeds, lr of the training.
        convergence: one row per probe, see `probing.training.convergence`.
        skipped: image, split and reason of skipped images.
        seconds: training time.
        not_finite: images excluded from layers or teachers, see `probing.models.finite.not_finite_rows`.
    """
    manifest = {
        **provenance,
        "fit": fit,
        "convergence": convergence,
        "skipped": skipped,
        "not_finite": list(not_finite),
        "seconds": seconds,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_text(run.path / "manifest.json", json.dumps(manifest, indent=2) + "\n")
