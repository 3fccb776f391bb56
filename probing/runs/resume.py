"""Claims the folder of a run: one recipe per folder, with the inputs that it began with."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from probing.recipe import dump_recipe, read_yaml
from probing.runs.directory import SPEED_ONLY
from probing.runs.recorded_inputs import inputs_file, require_same
from probing.utils.errors import UserError
from probing.utils.files import disk_errors, remove_temporary_files, temporary_files, write_text


def holds_run(out: Path, recipe: BaseModel) -> bool:
    """Returns whether a folder holds the run of a recipe; writes nothing.

    Raises:
        UserError: the folder holds another run, or other files.
    """
    saved = out / "recipe.yaml"
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose another --out")
    if not saved.exists():
        if out.exists() and any(path for path in out.iterdir() if not path.name.startswith(".")):
            raise UserError(f"{out} is not empty and holds no run; choose another --out")
        return False
    difference = first_difference(read_yaml(saved), yaml.safe_load(dump_recipe(recipe)), SPEED_ONLY)
    if difference:
        raise UserError(f"{out} holds another run ({difference}); choose another --out, or remove it")
    return True


def claim(
    out: Path,
    recipe: BaseModel,
    record: Mapping[str, Any] | None = None,
    recorded: Mapping[str, Any] | None = None,
    write: bool = True,
) -> None:
    """Claims a folder for a run: compares its inputs with the recorded ones, then writes recipe and inputs.

    Args:
        out: folder of the run.
        recipe: of the run.
        record: inputs from `to_record`; None for a run that does not resume.
        recorded: inputs from `recorded_inputs`; None for a new run.
        write: False for processes other than the main one, which only compare.

    Raises:
        UserError: the folder holds another run or other files, inputs changed, or the folder cannot be written.
    """
    begun = holds_run(out, recipe)
    if record is not None and recorded is not None:
        require_same(recorded, record["inputs"], out, "put it back, or choose another --out")
    if not write:
        return
    with disk_errors(out):
        remove_temporary_files(temporary_files(out))
        if not begun:
            write_text(out / "recipe.yaml", dump_recipe(recipe))
        if record is not None and recorded is None:
            write_text(inputs_file(out), json.dumps(record))


def first_difference(old: Any, new: Any, speed_only: Sequence[str], field: str = "") -> str:
    """Returns the first field, not one of `speed_only`, in which two recipes differ, with both values; else empty."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            name = f"{field}.{key}".lstrip(".")
            if name in speed_only:
                continue
            if difference := first_difference(old.get(key), new.get(key), speed_only, name):
                return difference
        return ""
    return "" if old == new else f"{field} is {old!r} there and {new!r} here"
