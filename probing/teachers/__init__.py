"""Frozen vision teachers: those of the catalogue, a file each, and any other vision encoder.

Torch is imported with the first teacher: the catalogue alone is read by reports, which do without.
"""

import importlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from probing.recipe import TeacherName, TeacherRecipe, apply_overrides, validate
from probing.teachers.registry import CATALOGUE
from probing.utils.errors import UserError

if TYPE_CHECKING:
    import torch

    from probing.teachers.base import Teacher

__all__ = ["Teacher", "describe_teacher", "load_teacher", "load_teachers"]


def __getattr__(name: str) -> Any:
    if name == "Teacher":
        return importlib.import_module("probing.teachers.base").Teacher
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load_teacher(name: str, recipe: TeacherRecipe, device: "torch.device") -> "Teacher":
    """Loads one teacher.

    Args:
        name: one of the catalogue, whose file `probing/teachers/<name>.py` loads it; any other is a plain encoder.
        recipe: where it comes from.
        device: where to put it.

    Raises:
        UserError: there is no such teacher, it is of another class, or it is incomplete.
    """
    if recipe.grid == 1:
        instead = "" if name in CATALOGUE else ", or features=pooled"
        raise UserError(f"teachers.{name}.grid=1 has a single patch; give 2 or more{instead}")
    if name not in CATALOGUE:
        from probing.teachers import vision_encoder

        return vision_encoder.load(name, recipe, device)
    if recipe.features != "patches" or recipe.trust_remote_code:
        raise UserError(
            f"teachers.{name} has its own target, without features or trust_remote_code; leave them out, or give the "
            "teacher another name"
        )
    teacher: Teacher = importlib.import_module(f"probing.teachers.{name}").load(recipe, device)
    return teacher


def load_teachers(recipes: Mapping[str, TeacherRecipe], device: "torch.device") -> "dict[str, Teacher]":
    """Loads several teachers by name; raises UserError as `load_teacher` does."""
    return {name: load_teacher(name, recipe, device) for name, recipe in recipes.items()}


def describe_teacher(values: Mapping[str, dict[str, Any]], overrides: Iterable[str] = ()) -> dict[str, Any]:
    """What a teacher is, from its configuration alone.

    Args:
        values: section `teachers` of a recipe with a single one.
        overrides: `KEY=VALUE`, fields of that.

    Raises:
        UserError: as `load_teacher` does, but for faults in the weights.
    """
    import torch
    from PIL import Image
    from pydantic import TypeAdapter, ValidationError

    ((name, fields),) = values.items()
    try:
        TypeAdapter(TeacherName).validate_python(name)
    except ValidationError as error:
        raise UserError(f"teacher {name!r}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    recipe = validate(TeacherRecipe, apply_overrides(dict(fields), overrides), f"teachers.{name}")
    teacher = load_teacher(name, recipe, torch.device("meta"))
    tokens, width = teacher.shape
    layout = f"{teacher.grid[0]} x {teacher.grid[1]} patches" if teacher.grid else "one token"
    found = {
        "teacher": name,
        "id": teacher.id,
        "class": teacher.class_name,
        "pixels": list(teacher.prepare([Image.new("RGB", (64, 64))]).shape[-2:]),
        "target": f"{tokens} x {width} ({layout})",
        "parameters": f"{sum(p.numel() for p in teacher.model.parameters()):,}",
        "licence": teacher.licence,
    }
    if name == "depth":
        from probing.teachers import depth

        found["depth"] = "larger is nearer" if depth.larger_is_nearer(teacher) else "metric, larger is farther"
    return found
