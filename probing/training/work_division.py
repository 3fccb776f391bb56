"""Decides whether processes divide the images or the layers among them."""

import logging

import torch
from accelerate import Accelerator

from probing.recipe import FitRecipe

logger = logging.getLogger(__name__)
PROBE_MEMORY = 0.7
"""Fraction of a GPU's free memory that probes may use; the rest is for activations."""


def spread_layers(fit: FitRecipe, probe_bytes: int, accelerator: Accelerator) -> bool:
    """Returns whether each process trains some of the layers on all images.

    Args:
        fit: section of the recipe.
        probe_bytes: of all probes, with gradients and moments.
        accelerator: its device already holds backbone and teachers.
    """
    if accelerator.num_processes == 1 or fit.spread != "auto" or accelerator.device.type != "cuda":
        return accelerator.num_processes > 1 and fit.spread == "layers"
    free, _ = torch.cuda.mem_get_info(accelerator.device)
    too_large = torch.tensor(float(probe_bytes > PROBE_MEMORY * free), device=accelerator.device)
    if float(accelerator.reduce(too_large, "sum")) == 0:
        return False
    logger.info(
        "probes with gradients and moments need %.1f GB of %.1f GB free: each process trains some of the layers on all "
        "images",
        probe_bytes / 1e9, free / 1e9,
    )  # fmt: skip
    return True
