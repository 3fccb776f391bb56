"""`probing train`: from a recipe to a finished run."""

import gc
import json
import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import save_file

from probing.data.coco import ImageList, list_images
from probing.data.target_cache import CacheOptions, TargetCache, build_target_caches
from probing.models import Backbone, Identity, Layer, load_backbone, parse_layers
from probing.models.chat_templates import rendering_at
from probing.models.finite import not_finite_rows, report_not_finite
from probing.recipe import DataRecipe, ProbeRunRecipe
from probing.runs.compatibility import (
    describe_inputs,
    inputs_file,
    recorded_inputs,
    recorded_moment,
    require_same,
    to_record,
    vocabulary,
)
from probing.runs.directory import Run
from probing.runs.manifest import made_of, versions
from probing.teachers import Teacher, load_teacher
from probing.training.convergence import NOT_TRAINED, judge
from probing.training.sizes import disk_bytes, probe_parameters
from probing.training.spread import spread_layers
from probing.training.state import summary
from probing.training.trackers import require_tracker
from probing.training.trainer import Fit
from probing.utils.distributed import others_alive, together
from probing.utils.errors import UserError
from probing.utils.files import disk_errors, read_json, require_space, whole_file, whole_folder, write_text
from probing.utils.paths import local_path

logger = logging.getLogger(__name__)

RANDOM_WEIGHTS_SEED = 2412_09585
"""Seed of the random-weights control: no checkpoint's own initialisation."""

ARMS = ("none", "random")
"""Sets of backbone weights that probes are trained on: the checkpoint's own, and random ones."""


def _images(data: DataRecipe, split: str, limit: int | None) -> ImageList:
    images = list_images(local_path(data.path.removeprefix("coco:")), split, limit)
    if len(images) < 2:
        raise UserError(f"{split} has {len(images)} image; probes need at least 2")
    return images


def training_images(data: DataRecipe) -> ImageList:
    """Images the probes are trained on; raises UserError as `probing.data.coco.list_images` does."""
    return _images(data, data.train_split, data.train_limit)


def held_out_images(data: DataRecipe) -> ImageList:
    """Images the probes are scored on; raises UserError as `probing.data.coco.list_images` does."""
    return _images(data, data.eval_split, data.eval_limit)


def load_teachers(recipe: ProbeRunRecipe, device: torch.device) -> dict[str, Teacher]:
    """The teachers of a recipe."""
    return {name: load_teacher(name, teacher, device) for name, teacher in recipe.teachers.items()}


def caches_of(
    recipe: ProbeRunRecipe,
    teachers: dict[str, Teacher],
    images: ImageList,
    process: int = 0,
    processes: int = 1,
) -> dict[str, TargetCache]:
    """Builds the target caches that the recipe requests."""
    data, fit = recipe.data, recipe.fit
    options = CacheOptions(data.target_cache, data.target_cache_dtype, data.view, fit.micro_batch, fit.workers)
    return build_target_caches(teachers, images, options, process, processes)


def arm_backbone(recipe: ProbeRunRecipe, arm: str, device: torch.device) -> Backbone:
    """The checkpoint (`none`), or the same architecture with random weights (`random`)."""
    return load_backbone(recipe.backbone, device, RANDOM_WEIGHTS_SEED if arm == "random" else None)


@others_alive()
def train(recipe: ProbeRunRecipe, out: Path) -> Run:
    """Trains the probe banks of a run, or goes on with an unfinished one.

    Args:
        recipe: the whole run.
        out: its directory.

    Returns:
        The finished run.

    Raises:
        UserError: something in recipe, checkpoint, teachers or data does not fit; nothing is written then.
        Interrupted: stopped by the user; the same call goes on.
    """
    require_tracker(recipe.fit.report_to)
    accelerator = together()
    with disk_errors(out):
        moment = [recorded_moment(_recorded(out))]
    broadcast_object_list(moment)  # else processes that start around midnight would render other prompts
    with rendering_at(moment[0]):
        return _train(recipe, out, accelerator)


def _train(recipe: ProbeRunRecipe, out: Path, accelerator: Accelerator) -> Run:
    train_images, eval_images = training_images(recipe.data), held_out_images(recipe.data)
    backbone = arm_backbone(recipe, "none", accelerator.device)
    layers = parse_layers(recipe.layers, backbone.layers)
    teachers = load_teachers(recipe, accelerator.device)
    with disk_errors(out), accelerator.main_process_first():
        if not (out / "manifest.json").exists():
            require_space(out, disk_bytes(recipe, backbone.hidden_size, teachers, layers))
        run = Run.create(out, recipe)
        if accelerator.is_main_process:
            run.remove_left_overs()
    arms: list[tuple[str, list[str]]] = [(ARMS[0], ["none", *(["shuffled"] if "shuffled" in recipe.controls else [])])]
    if "random" in recipe.controls:
        arms.append((ARMS[1], ["random"]))
    finished, due = run.finished, [one for one in arms if not summary_file(run, one[0]).exists()]
    accelerator.wait_for_everyone()  # all have looked before the main one goes on, and writes or clears away
    if finished:
        logger.info("%s is finished already", out)
        if accelerator.is_main_process:  # it may have been killed before it cleared up
            for arm in ARMS:
                shutil.rmtree(run.path / "state" / arm, ignore_errors=True)
        return run
    provenance = provenance_of(recipe, backbone.identity, teachers, train_images, eval_images)
    _check_same_inputs(run, provenance, accelerator)
    place = accelerator.process_index, accelerator.num_processes
    kept = caches_of(recipe, teachers, train_images, *place)
    for arm, controls in due:
        if arm == "random":
            del backbone
            gc.collect()
            backbone = arm_backbone(recipe, arm, accelerator.device)
        accelerator.wait_for_everyone()
        _train_arm(run, arm, controls, backbone, teachers, kept, train_images, layers, provenance, accelerator)
    if accelerator.is_main_process:
        with disk_errors(out):
            _finish(run, [arm for arm, _ in arms], provenance, train_images, eval_images)
    accelerator.wait_for_everyone()
    return run


def summary_file(run: Run, arm: str) -> Path:
    """Says, once it is there, that the probes of one set of backbone weights are in place."""
    return run.path / "state" / arm / "summary.json"


def _train_arm(
    run: Run,
    arm: str,
    controls: list[str],
    backbone: Backbone,
    teachers: dict[str, Teacher],
    kept: dict[str, TargetCache],
    images: ImageList,
    layers: Sequence[Layer],
    provenance: dict[str, Any],
    accelerator: Accelerator,
) -> None:
    """Trains on one set of backbone weights; its summary, written last, says that its probes are in place."""
    folder, tracked = run.path / "state" / arm, run.path / "tensorboard" / arm
    fit = Fit(run.recipe, backbone, teachers, images, layers, controls, folder, accelerator, kept, tracked=tracked)
    parameters = len(layers) * len(controls) * probe_parameters(run.recipe, backbone.hidden_size, teachers)
    fit.spread = spread_layers(run.recipe.fit, 16 * parameters, accelerator)
    if fit.spread:
        if len(layers) < accelerator.num_processes:
            raise UserError(f"{accelerator.num_processes} processes for {len(layers)} layers; start fewer")
        fit.layers = layers[accelerator.process_index :: accelerator.num_processes]
    state = fit.run()
    if not accelerator.is_main_process:
        return
    if fit.spread:
        state = fit.whole(layers, state.step)
    with disk_errors(run.path):
        made = {name: value for name, value in provenance.items() if name not in ("inputs", "rendered_at")}
        for control, bank in state.banks.items():
            with whole_folder(run.probes(control)) as folder:
                bank.save(folder, {"control": control, **made})
        if run.recipe.fit.ridge:
            with whole_folder(run.ridge(arm)) as folder:
                fit.readout(state).save(folder, {"control": arm, **made})
        if arm == "none":
            with whole_file(run.means) as file:
                save_file(fit.means(state), file)
        report_not_finite(state.not_finite, images.names, len(images) - len(state.skipped), arm)
        left_out = not_finite_rows(state.not_finite, images.names, images.split, arm)
        write_text(summary_file(run, arm), json.dumps(summary(state, list(teachers), left_out)))


def _recorded(out: Path) -> dict[str, Any] | None:
    return recorded_inputs(out, any((out / "state").glob("*/*")))


def _check_same_inputs(run: Run, provenance: dict[str, Any], accelerator: Accelerator) -> None:
    """Refuses to resume with a checkpoint, teacher or data that changed since the run began.

    Raises:
        UserError: naming what changed.
    """
    scoring = ("held-out images", "tokenizer's vocabulary")  # of no effect before the probes are scored
    now = {name: value for name, value in provenance["inputs"].items() if name not in scoring}
    if (recorded := _recorded(run.path)) is not None:
        require_same(recorded, now, run.path, "put it back or choose another --out")
    elif accelerator.is_main_process:
        with disk_errors(run.path):
            written = {"rendered_at": provenance["rendered_at"], "inputs": now}
            write_text(inputs_file(run.path), json.dumps(written))


def provenance_of(
    recipe: ProbeRunRecipe, checkpoint: Identity, teachers: dict[str, Teacher], train: ImageList, held_out: ImageList
) -> dict[str, Any]:
    """What a run is made of: checkpoint, prompt, teachers, data and versions."""
    train_digest, eval_digest = train.digest(), held_out.digest()
    data = {"training images": train_digest, "held-out images": eval_digest}
    inputs = describe_inputs(checkpoint, teachers, recipe.data.view, data) | vocabulary(checkpoint)
    return {
        **made_of(checkpoint, recipe.backbone.prompt, teachers),
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


def _finish(run: Run, arms: list[str], provenance: dict[str, Any], train: ImageList, held_out: ImageList) -> None:
    """Writes learning curves and, last, the manifest; then the training state is no longer needed."""
    summaries = [read_json(summary_file(run, arm), "remove it and type the same command again") for arm in arms]
    lines = ["control,teacher,layer,seed,step,loss"]
    convergence = []
    for one in summaries:
        for curve in one["curves"]:
            place = [curve["control"], curve["teacher"], curve["layer"], curve["seed"]]
            lines += [f"{','.join(map(str, place))},{step},{loss:.6g}" for step, loss in enumerate(curve["losses"])]
            verdict = judge(np.asarray(curve["losses"]), np.asarray(one["mean_losses"][curve["teacher"]]))
            names = ("control", "teacher", "layer", "seed")
            numbers = {name: None if value != value else value for name, value in vars(verdict).items()}
            not_taken = int(np.isnan(curve["losses"]).sum())
            convergence.append({**dict(zip(names, place, strict=True)), **numbers, "steps_not_taken": not_taken})
    write_text(run.path / "learning_curves.csv", "\n".join(lines) + "\n")
    skipped = {(s["image"], s["split"]): s for one in summaries for s in one["skipped"]}
    skipped |= {(s.image, s.split): vars(s) for images in (train, held_out) for s in images.skipped}
    fit = run.recipe.fit
    trained = {"epochs": fit.epochs, "batch_size": fit.batch_size, "seeds": fit.seeds, "lr": fit.lr}
    trained["steps"] = summaries[0]["steps"]
    seconds = sum(one["seconds"] for one in summaries)
    not_finite = [row for one in summaries for row in one.get("not_finite", [])]
    _report_steps_not_taken(convergence)
    write_manifest(run, provenance, trained, convergence, list(skipped.values()), seconds, not_finite)
    shutil.rmtree(run.path / "state", ignore_errors=True)


def _report_steps_not_taken(convergence: list[dict[str, Any]]) -> None:
    """Logs how many probes skipped steps because nothing finite was there to learn from."""
    some = [row for row in convergence if row["steps_not_taken"] and row["state"] != NOT_TRAINED]
    if some:
        worst = max(some, key=lambda row: row["steps_not_taken"])
        logger.warning(
            "%d of %d probes skipped steps without a finite loss and gradient; most at %s, layer %s: %d",
            len(some), len(convergence), worst["teacher"], worst["layer"], worst["steps_not_taken"],
        )  # fmt: skip


def write_manifest(
    run: Run,
    provenance: dict[str, Any],
    trained: dict[str, Any],
    convergence: list[dict[str, Any]],
    skipped: list[dict[str, str]],
    seconds: float,
    not_finite: Sequence[dict[str, str]] = (),
) -> None:
    """Writes the manifest, by which a run is finished.

    Args:
        run: the run.
        provenance: from `provenance_of`.
        trained: how its probes were: epochs, batch_size, steps, seeds, lr.
        convergence: a row per probe, see `probing.training.convergence`.
        skipped: image, split and reason of images left out.
        seconds: that the training took.
        not_finite: images left out of some layers or teachers, see `probing.models.finite.not_finite_rows`.
    """
    manifest = {
        **provenance,
        "fit": trained,
        "convergence": convergence,
        "skipped": skipped,
        "not_finite": list(not_finite),
        "seconds": seconds,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_text(run.path / "manifest.json", json.dumps(manifest, indent=2) + "\n")
