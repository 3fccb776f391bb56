"""A trainer of probes, without a run around it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from probing.models.base import Layer
from probing.recipe import ProbeRunRecipe
from probing.teachers import load_teachers
from probing.training.run import load_run_backbone, training_images
from probing.training.trainer import ProbeTrainer


class OneProcess:
    """An accelerator's device and processes, for devices that accelerate does not choose."""

    num_processes, process_index, is_main_process = 1, 0, True

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait_for_everyone(self) -> None:
        """Does nothing, as in a single process."""

    def reduce(self, value: Any, *_: Any) -> Any:
        """Returns the value."""
        return value


def make_trainer(
    values: dict[str, Any],
    folder: Path,
    layers: Sequence[Layer] | None = None,
    controls: Sequence[str] = ("none",),
    device: torch.device | None = None,
    **fit: Any,
) -> ProbeTrainer:
    """Loads everything for plain values of a recipe.

    Args:
        values: of the recipe.
        folder: of the training state.
        layers: by default all from 1.
        controls: of the probes.
        device: by default the CPU, by accelerate.
        fit: fields to change in the recipe's section `fit`.
    """
    recipe = ProbeRunRecipe.model_validate(values | {"fit": values["fit"] | fit})
    accelerator: Any = OneProcess(device) if device else Accelerator(cpu=True)
    backbone = load_run_backbone(recipe, "none", accelerator.device)
    teachers = load_teachers(recipe.teachers, accelerator.device)
    chosen = list(range(1, backbone.layers + 1)) if layers is None else list(layers)
    images = training_images(recipe.data)
    return ProbeTrainer(recipe, backbone, teachers, images, chosen, list(controls), folder, accelerator)
