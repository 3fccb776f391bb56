"""`probing evaluate`: scores the probes of a run on its held-out split.

One pass over the images per set of backbone weights; every layer's probes predict while the layer's state exists.
Scores are kept per image (`scores/`), so that any later comparison can be paired; `results.csv` summarises them.
"""

import csv
import io
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from analysis.similarity import centred_cosine, flat_cosine, token_cosine
from analysis.statistics import bootstrap_mean
from probing.backbones import Backbone, Layer, layer_name, parse_layers
from probing.bank import ProbeBank
from probing.data.coco import ImageList, Skipped
from probing.data.loader import micro_batches
from probing.errors import UserError
from probing.progress import Progress
from probing.ridge import RidgeReadout, place_states
from probing.run import Run, disk_errors, whole_file, write_text
from probing.teachers import Teacher
from probing.train import arm_backbone, held_out_images, load_teachers

logger = logging.getLogger(__name__)

METRICS = {"strict": ("cosine", "cosine_centred"), "paper": ("cosine",)}
COLUMNS = (
    *("checkpoint", "teacher", "layer", "probe", "control", "metric", "protocol", "split", "seed"),
    *("value", "ci_low", "ci_high", "n"),
)


@dataclass(frozen=True, order=True)
class Curve:
    """What one column of per-image scores belongs to."""

    teacher: str
    layer: str
    probe: str
    control: str
    metric: str
    protocol: str
    seed: int

    def key(self) -> str:
        """Name of its tensor in the score file."""
        return "/".join(map(str, vars(self).values()))

    @classmethod
    def from_key(cls, key: str) -> "Curve":
        """The inverse of `key`."""
        teacher, layer, probe, control, metric, protocol, seed = key.split("/")
        return cls(teacher, layer, probe, control, metric, protocol, int(seed))


Scores = dict[Curve, list[Tensor]]


def evaluate(path: Path, protocols: Iterable[str] = ("strict", "paper"), micro_batch: int | None = None) -> Path:
    """Scores a finished run by cosine similarity.

    Args:
        path: the run.
        protocols: `strict` (per token; raw and centred) and/or `paper` (flattened).
        micro_batch: images per forward pass; by default as in training.

    Returns:
        The path of `results.csv`.

    Raises:
        UserError: the run is missing or unfinished, or its checkpoint, teachers or data changed since.
    """
    run = Run.open(path)
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise UserError("probing evaluate runs as one process; start it without accelerate launch")
    device = accelerator.device
    images = held_out_images(run.recipe.data)
    teachers = load_teachers(run.recipe, device)
    means = load_file(run.means, device=str(device))
    scores: Scores = {}
    names: list[str] = []
    skipped: dict[str, Skipped] = {}
    for arm in ("no", "random") if "random" in run.recipe.controls else ("no",):
        backbone = arm_backbone(run.recipe, arm, device)
        _check_unchanged(run, backbone, teachers, images)
        size = micro_batch or run.recipe.fit.micro_batch
        names = _score_arm(run, arm, backbone, teachers, means, images, tuple(protocols), size, scores, skipped)
        del backbone
    if not names:
        raise UserError(f"no image of {images.split} could be read; check {images.folder}")
    with disk_errors(path):
        _write_scores(run, images.split, scores, names)
        _note_skipped(run, skipped.values())
        return write_results(run, images.split, scores)


def _check_unchanged(run: Run, backbone: Backbone, teachers: dict[str, Teacher], images: ImageList) -> None:
    manifest = run.manifest
    pairs = [("checkpoint", manifest["checkpoint"]["sha256"], backbone.sha256)]
    pairs += [(f"{name} teacher", manifest["teachers"][name]["sha256"], t.sha256) for name, t in teachers.items()]
    pairs += [(f"split {images.split}", manifest["data"]["eval_digest"], images.digest())]
    for name, then, now in pairs:
        if then != now:
            raise UserError(f"the {name} is not the one this run was made with; put it back, or train a new run")


def _score_arm(
    run: Run,
    arm: str,
    backbone: Backbone,
    teachers: dict[str, Teacher],
    means: dict[str, Tensor],
    images: ImageList,
    protocols: tuple[str, ...],
    size: int,
    scores: Scores,
    skipped: dict[str, Skipped],
) -> list[str]:
    """Scores everything that was trained on one set of backbone weights; returns the names of the images scored."""
    recipe, device = run.recipe, backbone.device
    layers = parse_layers(recipe.layers, backbone.layers)
    controls = [arm, *(["shuffled"] if arm == "no" and "shuffled" in recipe.controls else [])]
    banks = {control: ProbeBank.load(run.probes(control), device, teachers) for control in controls}
    ridge = RidgeReadout.load(run.ridge(arm), device)
    names: list[str] = []
    plan = [list(range(i, min(i + size, len(images)))) for i in range(0, len(images), size)]
    batches = micro_batches(
        images,
        plan,
        backbone.prepare,
        {name: teacher.prepare for name, teacher in teachers.items()},
        recipe.data.view,
        recipe.fit.workers,
        device,
    )
    with (
        torch.no_grad(),
        Progress(f"scoring ({'checkpoint' if arm == 'no' else arm})", len(plan), unit="batches") as bar,
    ):
        for prepared in batches:
            bar.advance()
            skipped |= {skip.image: skip for skip in prepared.skipped}
            if prepared.student is None:
                continue
            names += [images.names[index] for index in prepared.indices]
            targets = {name: teacher.target(prepared.pixels[name]) for name, teacher in teachers.items()}
            batch = prepared.student.to(device)

            def note(
                prediction: Tensor,
                teacher: str,
                layer: str,
                probe: str,
                control: str,
                seed: int,
                targets: dict[str, Tensor] = targets,
            ) -> None:
                target, mean = targets[teacher], means[teacher]
                found = {
                    ("cosine", "strict"): lambda: token_cosine(prediction, target),
                    ("cosine_centred", "strict"): lambda: centred_cosine(prediction, target, mean),
                    ("cosine", "paper"): lambda: flat_cosine(prediction, target),
                }
                for (metric, protocol), score in found.items():
                    if protocol in protocols:
                        curve = Curve(teacher, layer, probe, control, metric, protocol, seed)
                        scores.setdefault(curve, []).append(score().cpu())

            def visit(layer: Layer, hidden: Tensor, note=note, batch=batch) -> None:  # type: ignore[no-untyped-def] # noqa: ANN001
                where = layer_name(layer)
                with torch.no_grad():
                    keys, mask = batch.tokens.select(hidden.to(device).float(), recipe.probe.keys)
                    for control, bank in banks.items():
                        for key, probe in bank.at(layer):
                            note(probe(keys, mask), key.teacher, where, "resampler", control, key.seed)
                    image_states = batch.tokens.image_states(hidden.to(device))
                    for teacher, weight, bias in ridge.at(layer):
                        placed = place_states(image_states, batch.tokens.grid, teachers[teacher].grid)
                        note(F.linear(placed, weight, bias), teacher, where, "ridge", arm, recipe.fit.seeds[0])

            backbone.stream(batch, layers, visit)
            if arm == "no":
                for name, target in targets.items():
                    note(means[name].expand_as(target), name, "", "constant", "mean", recipe.fit.seeds[0])
    return names


def _score_file(run: Run, split: str) -> Path:
    return run.path / "scores" / f"cosine-{split}.safetensors"


def _write_scores(run: Run, split: str, scores: Scores, names: list[str]) -> None:
    tensors = {curve.key(): torch.cat(parts) for curve, parts in scores.items()}
    with whole_file(_score_file(run, split)) as file:
        save_file(tensors, file, metadata={"images": json.dumps(names)})


def read_scores(path: Path, split: str) -> tuple[dict[Curve, NDArray[np.float32]], list[str]]:
    """Per-image scores of an evaluated run, and the images' names in the same order."""
    with safe_open(path / "scores" / f"cosine-{split}.safetensors", framework="np") as file:
        names = json.loads(file.metadata()["images"])
        return {Curve.from_key(key): file.get_tensor(key) for key in file.keys()}, names  # noqa: SIM118


def write_results(run: Run, split: str, scores: Scores) -> Path:
    """Writes `results.csv`: one row per number, with its bootstrap interval."""
    name = run.manifest["checkpoint"]["name"]
    seeds = run.recipe.fit.seeds
    grouped: dict[Curve, dict[int, NDArray[np.float64]]] = {}
    for curve, parts in scores.items():
        family = Curve(**{**vars(curve), "seed": 0})
        grouped.setdefault(family, {})[curve.seed] = torch.cat(parts).double().numpy()
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for curve, by_seed in grouped.items():
        trained = curve.probe == "resampler"
        tables: dict[str, NDArray[np.float64]] = {str(seed): s[None] for seed, s in by_seed.items()} if trained else {}
        if len(seeds) > 1 or not trained:
            pooled = "all" if len(seeds) > 1 else str(seeds[0])
            tables[pooled] = np.stack(list(by_seed.values()))
        for seed, table in tables.items():
            interval = bootstrap_mean(table)
            place = [name, curve.teacher, curve.layer, curve.probe, curve.control, curve.metric, curve.protocol]
            numbers = [f"{x:.8g}" for x in (interval.value, interval.low, interval.high)]
            writer.writerow([*place, split, seed, *numbers, table.shape[1]])
    target = run.path / "results.csv"
    write_text(target, buffer.getvalue())
    return target


def _note_skipped(run: Run, skipped: Iterable[Skipped]) -> None:
    """Adds held-out images that could not be read to the manifest."""
    manifest = run.manifest
    known = {(s["image"], s["split"]) for s in manifest["skipped"]}
    new = [vars(s) for s in skipped if (s.image, s.split) not in known]
    if new:
        manifest["skipped"] += new
        write_text(run.path / "manifest.json", json.dumps(manifest, indent=2) + "\n")
