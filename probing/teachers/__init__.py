"""Frozen vision teachers, one file per kind."""

import torch

from probing.recipe import TeacherRecipe
from probing.teachers import depth, gen, seg
from probing.teachers.base import Teacher

__all__ = ["KINDS", "Teacher", "load_teacher"]

KINDS = {"depth": depth, "seg": seg, "gen": gen}


def load_teacher(name: str, recipe: TeacherRecipe, device: torch.device) -> Teacher:
    """Loads one teacher.

    Args:
        name: `depth`, `seg` or `gen`.
        recipe: where it comes from.
        device: where to put it.

    Raises:
        UserError: there is no such teacher, it is of another class, or it is incomplete.
    """
    return KINDS[name].load(recipe, device)
