"""Some layers and some teachers of a published run, as a run of their own."""

import csv
import json
import re
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.numpy import save_file

from probing.hub.sanitize import BANKS, published_files
from probing.probes.bank import bank_layers
from probing.utils.errors import UserError
from probing.utils.files import read_json, reading

AGAIN = "pull it again"
_LAYER = re.compile(r"(?:seed_-?\d+\.)?layer_(\d+|final)\.")


@dataclass(frozen=True)
class Part:
    """What is taken of a run.

    Attributes:
        teachers: whose probes.
        layers: names of the layers.
        left_out: what is not taken: `teachers` and `layers`, empty where that is nothing.
    """

    teachers: tuple[str, ...]
    layers: tuple[str, ...]
    left_out: dict[str, list[str]]

    @property
    def whole(self) -> bool:
        """Whether it is all of the run."""
        return not any(self.left_out.values())


def choose(run: Path, name: str, layers: Sequence[str] = (), teachers: Sequence[str] = ()) -> Part:
    """What of a run is asked for.

    Args:
        run: folder of the run; of the tensors nothing need be there.
        name: of the run, for messages.
        layers: names of layers; by default all.
        teachers: by default all.

    Raises:
        UserError: a layer or teacher is not in the run.
    """
    there = bank_layers(run / "probes")
    for teacher in teachers:
        if teacher not in there:
            raise UserError(f"{name} has no probes of the teacher {teacher!r}; it has {', '.join(there)}")
    chosen = {teacher: own for teacher, own in there.items() if not teachers or teacher in teachers}
    every = sorted({layer for own in there.values() for layer in own}, key=lambda x: int(x) if x.isdecimal() else 1e9)
    mine = {layer for own in chosen.values() for layer in own}
    for layer in layers:
        if layer not in mine:
            shown = ", ".join(layer for layer in every if layer in mine)
            raise UserError(f"{name} has no layer {layer!r}; its probes are of the layers {shown}")
    kept = [layer for layer in every if layer in mine and (not layers or layer in layers)]
    names = tuple(teacher for teacher, own in chosen.items() if set(own) & set(kept))
    left_out = {
        "teachers": [teacher for teacher in there if teacher not in names],
        "layers": [layer for layer in every if layer not in kept],
    }
    return Part(names, tuple(kept), left_out)


def copy_part(run: Path, folder: Path, part: Part) -> None:
    """Copies a part of a run, but for its results, its scores and what was drawn; `left_out` says what is missing.

    Raises:
        UserError: a file cannot be read, or lacks what it should hold.
    """
    for relative in published_files(run):
        if relative.parts[0] in ("recipe.yaml", "manifest.json", "results.csv", "scores"):
            continue
        source, target = run / relative, folder / relative
        in_bank = any(relative.parent.parent.match(bank) for bank in BANKS)
        if in_bank and relative.parts[-2] not in part.teachers:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if part.whole:
            shutil.copyfile(source, target)
        elif relative.name == "config.json":
            config = read_json(source, AGAIN)
            if "layers" in config:
                config["layers"] = [layer for layer in config["layers"] if layer in part.layers]
            target.write_text(json.dumps(_without(config, part), indent=2) + "\n", encoding="utf-8")
        elif relative.name == "learning_curves.csv":
            copy_rows(source, target, part.teachers, part.layers)
        else:
            _copy_tensors(source, target, part)
    for teacher in part.teachers:
        if not (folder / "probes" / teacher / "model.safetensors").is_file():
            raise UserError(f"the probes of {teacher} are not there; whoever pushed them must push them again")


def part_of_manifest(manifest: dict[str, Any], part: Part) -> dict[str, Any]:
    """What is said of a run, without what is left out of it."""
    if part.whole:
        return manifest
    rows = [r for r in manifest["convergence"] if r["teacher"] in part.teachers and str(r["layer"]) in part.layers]
    teachers = {name: teacher for name, teacher in manifest["teachers"].items() if name in part.teachers}
    return _without({**manifest, "teachers": teachers, "convergence": rows}, part)


def _without(values: dict[str, Any], part: Part) -> dict[str, Any]:
    """Says what is left out, now and before."""
    before = values.get("left_out", {})
    return {**values, "left_out": {what: [*before.get(what, []), *names] for what, names in part.left_out.items()}}


def copy_rows(source: Path, target: Path, teachers: Collection[str], layers: Collection[str]) -> None:
    """Copies those rows of a table whose columns `teacher` and `layer` are among the chosen.

    Raises:
        UserError: it is no such table.
    """
    with reading(source, AGAIN), source.open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file)
        head = next(rows)
        teacher, layer = head.index("teacher"), head.index("layer")
        kept = [head, *(row for row in rows if row[teacher] in teachers and row[layer] in layers)]
    with target.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(kept)


def _copy_tensors(source: Path, target: Path, part: Part) -> None:
    """Copies the tensors of the chosen layers; of mean targets those of the chosen teachers."""
    with reading(source, AGAIN), safe_open(source, framework="np") as stored:
        metadata = stored.metadata()
        kept = {}
        for name in stored.keys():  # noqa: SIM118
            layer = _LAYER.match(name)
            if (layer[1] in part.layers) if layer else (name in part.teachers):
                kept[name] = stored.get_tensor(name)
        save_file(kept, target, metadata)
