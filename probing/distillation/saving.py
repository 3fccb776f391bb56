"""Writes the checkpoint of a finished stage."""

import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from probing.distillation.data_log import DataLog
from probing.distillation.predictors import FOLDER
from probing.distillation.setup import Stage
from probing.recipe import dump_recipe
from probing.runs.manifest import versions
from probing.utils.files import atomic_folder
from probing.utils.pretrained import identity

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

WARNINGS = {
    "skipped": "%d images could not be used, first: %s",
    "cut": "%d conversations are longer than max_length and were truncated, first: %s",
    "not_annotated": "%d images have no annotations for patches, first: %s",
    "unlabelled": "%d annotations of images could not be used, first: %s",
    "scaled": "%d label maps were scaled to the size of their images, first: %s",
}


def save_stage(stage: Stage, trainer: "Trainer", out: Path, rendered_at: str | None) -> None:
    """Writes the checkpoint and removes the states; every process must call it, because weights may be sharded.

    Args:
        stage: after training.
        trainer: that trained it.
        out: folder of the new checkpoint.
        rendered_at: moment at which the chat template was rendered.
    """
    work = Path(str(trainer.args.output_dir))
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        with atomic_folder(out) as folder:
            save_checkpoint(stage, state, folder)
            if (work / "runs").exists():  # TensorBoard's curves
                shutil.copytree(work / "runs", folder / "runs")
            record = _record(stage, trainer, DataLog.read(work)) | {"rendered_at": rendered_at}
            (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(work, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()


def save_checkpoint(stage: Stage, state: dict[str, Tensor], folder: Path) -> None:
    """Writes a LLaVA folder, and what the auxiliary losses trained.

    Args:
        stage: after training.
        state: of its `DistillationModel`, unsharded.
        folder: of the checkpoint.
    """
    model = stage.model
    weights = _without_prefix(state, "model.")
    if model.special is not None:
        table = next(name for name in weights if name.endswith("embed_tokens.weight"))
        weights[table] = model.special.write(weights[table], state)
    model.model.save_pretrained(folder, state_dict=weights)
    stage.processor.save_pretrained(folder)
    for index, auxiliary in enumerate(model.auxiliary):
        auxiliary.save(folder / FOLDER, _without_prefix(state, f"auxiliary.{index}."), {"versions": versions()})


def _without_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _record(stage: Stage, trainer: "Trainer", samples: dict[str, list[str]]) -> dict[str, Any]:
    """Returns what `training.json` says, and warns of samples that were skipped or truncated."""
    recipe, inputs, log = stage.recipe, stage.inputs, trainer.state.log_history
    not_annotated = inputs.annotations.missing if inputs.annotations else []
    for kind, names in {**samples, "not_annotated": not_annotated}.items():
        if names:
            logger.warning(WARNINGS[kind], len(names), names[0])
    return {
        "recipe": dump_recipe(recipe),
        "started_from": identity(inputs.source, inputs.config, revision=recipe.revision),
        "stage": recipe.stage,
        "steps": trainer.state.global_step,
        "final_loss": [row["loss"] for row in log if "loss" in row][-1],
        "log": log,
        "conversations": len(inputs.conversations),
        **samples,
        "not_annotated": len(not_annotated),
        "versions": versions(),
    }
