"""`probing import`: probes that were trained elsewhere become a run, which is evaluated and reported like any other."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor

from probing.backbones import Backbone, layer_name, load_backbone, parse_layers
from probing.bank import ProbeBank, bank_config, bank_layers
from probing.data.coco import ImageList, Skipped
from probing.data.loader import micro_batches
from probing.distill.predictors import FOLDER
from probing.errors import UserError
from probing.hub import locate
from probing.progress import Progress
from probing.recipe import ProbeRunRecipe, apply_overrides, validate
from probing.run import Run, disk_errors, whole_file, whole_folder, write_text
from probing.teachers import Teacher
from probing.train import held_out_images, load_teachers, provenance_of, training_images, write_manifest


def predictor_recipe(checkpoint: str, data: str, overrides: Sequence[str] = ()) -> ProbeRunRecipe:
    """The recipe of a run whose probes are a checkpoint's own embedding predictors.

    Args:
        checkpoint: folder or Hub id, of a stage of `probing distill` that had embedding losses.
        data: `coco:DIR`.
        overrides: `KEY=VALUE`, such as `teachers.depth.id=DIR` where a teacher has moved.

    Raises:
        UserError: the checkpoint has no predictors, or a field is wrong.
    """
    folder = _predictors(checkpoint)
    layers = bank_layers(folder)
    configs = {teacher: bank_config(folder, teacher) for teacher in layers}
    values: dict[str, Any] = {
        "backbone": {"checkpoint": checkpoint},
        "data": {"path": data},
        "teachers": {name: _teacher(config) for name, config in configs.items()},
        "layers": ",".join(sorted({layer for some in layers.values() for layer in some}, key=int)),
        "controls": [],
        "fit": {"ridge": False, "workers": 0},
    }
    apply_overrides(values, overrides)
    return validate(ProbeRunRecipe, values, "import").with_absolute_paths()


def _predictors(checkpoint: str) -> Path:
    folder = Path(locate(checkpoint, "checkpoint")) / FOLDER
    if not bank_layers(folder):
        raise UserError(
            f"{checkpoint} has no embedding predictors (no probes in its folder {FOLDER}); give what probing distill "
            "wrote for a stage with embedding losses"
        )
    return folder


def _teacher(config: dict[str, Any]) -> dict[str, Any]:
    side = round(config["resampler"]["queries"] ** 0.5)
    return {"id": config["teacher"]["id"]} | ({"grid": side} if side > 1 else {})


def import_predictors(recipe: ProbeRunRecipe, out: Path) -> Run:
    """Makes a run of a checkpoint's embedding predictors; nothing is trained.

    Args:
        recipe: from `predictor_recipe`.
        out: the run's folder; a finished one is kept.

    Raises:
        UserError: checkpoint or teachers are not those of the predictors, or data cannot be read.
    """
    folder = _predictors(recipe.backbone.checkpoint)
    accelerator = Accelerator()
    train_images, eval_images = training_images(recipe.data), held_out_images(recipe.data)
    backbone = load_backbone(recipe.backbone, accelerator.device)
    teachers = load_teachers(recipe, accelerator.device)
    _require_theirs(folder, backbone, teachers)
    layers = ",".join(map(layer_name, parse_layers(recipe.layers, backbone.layers)))
    bank = ProbeBank.load(folder, torch.device("cpu"), list(recipe.teachers), layers)
    run = Run.create(out, recipe)
    if run.finished:
        return run
    provenance = provenance_of(recipe, backbone, teachers, train_images, eval_images)
    provenance["checkpoint"]["name"] += " predictors"
    means, skipped = mean_targets(recipe, backbone, teachers, train_images)
    record = json.loads((folder.parent / "training.json").read_text(encoding="utf-8"))
    stage = yaml.safe_load(record["recipe"])
    trained = {name: stage[name] for name in ("epochs", "batch_size", "lr")}
    with disk_errors(out):
        with whole_folder(run.probes("no")) as part:
            bank.save(part, {"control": "no", **provenance})
        with whole_file(run.means) as file:
            save_file(means, file)
        write_text(out / "learning_curves.csv", "control,teacher,layer,seed,step,loss\n")
        trained |= {"steps": record["steps"], "seeds": recipe.fit.seeds}
        write_manifest(run, provenance, trained, [], [vars(s) for s in skipped], 0.0)
    return run


def _require_theirs(folder: Path, backbone: Backbone, teachers: dict[str, Teacher]) -> None:
    """Raises UserError where predictors were trained with another LLM's width or another teacher."""
    for name, teacher in teachers.items():
        config = bank_config(folder, name)
        if config["resampler"]["key_width"] != backbone.hidden_size:
            raise UserError(
                f"{folder} reads states of width {config['resampler']['key_width']}, not of this checkpoint"
            )
        if config["teacher"]["sha256"] != teacher.sha256 or config["teacher"]["shape"] != list(teacher.shape):
            raise UserError(
                f"the predictors of {folder} were trained towards another {name} teacher ({config['teacher']['id']}); "
                f"name it: teachers.{name}.id=DIR"
            )


def mean_targets(
    recipe: ProbeRunRecipe, backbone: Backbone, teachers: dict[str, Teacher], images: ImageList
) -> tuple[dict[str, Tensor], list[Skipped]]:
    """The mean target (N, D) of every teacher over a split, in float32, and the images that could not be read."""
    totals: dict[str, Tensor] = {}
    skipped: list[Skipped] = []
    count, batch = 0, recipe.fit.micro_batch
    plan = [list(range(first, min(first + batch, len(images)))) for first in range(0, len(images), batch)]
    prepare = {name: teacher.prepare for name, teacher in teachers.items()}
    batches = micro_batches(
        images, plan, backbone.prepare, prepare, recipe.data.view, recipe.fit.workers, backbone.device
    )
    with Progress("mean targets", len(plan), unit="batches") as bar:
        for prepared in batches:
            skipped += prepared.skipped
            count += len(prepared.indices)
            for name, pixels in prepared.pixels.items():
                total = teachers[name].target(pixels).sum(dim=0, dtype=torch.float64)
                totals[name] = totals[name] + total if name in totals else total
            bar.advance()
    if not count:
        raise UserError(f"no image of {images.split} could be read; check {images.folder}")
    return {name: (total / count).float().cpu().contiguous() for name, total in totals.items()}, skipped
