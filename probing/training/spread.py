"""Decides whether processes share the images or the layers."""

import logging

import torch
from accelerate import Accelerator

from probing.recipe import FitRecipe

logger = logging.getLogger(__name__)
ROOM = 0.7
"""Share of a GPU's free memory that probes may take; the rest is for what a step computes."""


def spread_layers(fit: FitRecipe, probe_bytes: int, accelerator: Accelerator) -> bool:
    """Whether processes share the layers among them, and not the images.

    Args:
        fit: of the recipe.
        probe_bytes: all probes, with gradients and moments.
        accelerator: the backbone and the teachers are on its device already.
    """
    if accelerator.num_processes == 1 or fit.spread != "auto" or accelerator.device.type != "cuda":
        return accelerator.num_processes > 1 and fit.spread == "layers"
    free, _ = torch.cuda.mem_get_info(accelerator.device)
    lacking = torch.tensor(float(probe_bytes > ROOM * free), device=accelerator.device)
    if float(accelerator.reduce(lacking, "sum")) == 0:
        return False
    logger.info(
        "probes with gradients and moments take %.1f GB, of %.1f GB free: every process trains some of the layers, on "
        "all images",
        probe_bytes / 1e9, free / 1e9,
    )  # fmt: skip
    return True
