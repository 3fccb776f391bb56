"""`probing evaluate`: scores the probes of a run.

One pass over the images per metric and set of backbone weights; every layer's probes predict while the layer's state
exists. Scores are kept per image (`scores/`), so that comparisons can be paired; `results.csv` summarises them.
"""

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from analysis.scorers import Cosine, DepthPairs, Row, Scorer, Segmentation
from analysis.scores import Curve, score_file, write_results, write_scores
from probing.backbones import Backbone, Layer, layer_name, parse_layers
from probing.backbones.base import Batch
from probing.bank import ProbeBank
from probing.data.coco import ImageList, Skipped
from probing.data.loader import micro_batches
from probing.errors import UserError
from probing.progress import Progress
from probing.ridge import RidgeReadout, place_states
from probing.run import Run, disk_errors, write_text
from probing.teachers import Teacher
from probing.teachers.seg import SegDecoder
from probing.train import arm_backbone, held_out_images, load_teachers, training_images

logger = logging.getLogger(__name__)

PROTOCOLS = {"cosine": ("strict", "paper"), "da2k": ("strict",), "miou": ("blind", "strict", "paper")}
"""Metrics, and the protocols of each."""

Scores = dict[Curve, list[Tensor]]


def evaluate(
    path: Path,
    metrics: Sequence[str] = ("cosine",),
    protocols: Iterable[str] = (),
    micro_batch: int | None = None,
    da2k: Path | None = None,
    limit: int | None = None,
) -> Path:
    """Scores a finished run.

    Args:
        path: the run.
        metrics: some of `PROTOCOLS`.
        protocols: those of them to compute; by default all of each metric.
        micro_batch: images per forward pass; by default as in training.
        da2k: folder in DA-2K's layout, for the metric of that name.
        limit: images per decoded metric; by default all.

    Returns:
        The path of `results.csv`.

    Raises:
        UserError: the run is missing or unfinished, or its checkpoint, teachers or data changed since, or what a metric
            needs is not there.
    """
    run = Run.open(path)
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise UserError("probing evaluate runs as one process; start it without accelerate launch")
    device = accelerator.device
    images = held_out_images(run.recipe.data)
    teachers = load_teachers(run.recipe, device)
    means = load_file(run.means, device=str(device))
    wanted = set(protocols)
    scorers: list[Scorer] = []
    for metric in metrics:
        chosen = [p for p in PROTOCOLS[metric] if not wanted or p in wanted]
        if not chosen:
            raise UserError(f"{metric} has the protocols {', '.join(PROTOCOLS[metric])}; choose one of them")
        scorers.append(_scorer(metric, run, images, teachers, means, chosen, da2k, limit))
    for scorer in scorers:
        scores: Scores = {}
        names: list[str] = []
        skipped = {skip.image: skip for skip in scorer.images.skipped}
        for arm in ("no", "random") if "random" in run.recipe.controls else ("no",):
            backbone = arm_backbone(run.recipe, arm, device)
            _check_unchanged(run, backbone, teachers, images)
            size = micro_batch or run.recipe.fit.micro_batch
            names = _score_arm(run, arm, backbone, scorer, means, size, scores, skipped)
            del backbone
        if not names:
            raise UserError(f"no image of {scorer.images.split} could be read; check {scorer.images.folder}")
        split = scorer.images.split
        with disk_errors(path):
            table = {curve: torch.cat(parts).float().numpy() for curve, parts in scores.items()}
            write_scores(score_file(path, scorer.stem, split), split, table, names)
            _note_skipped(run, skipped.values())
    with disk_errors(path):
        return write_results(run)


def _scorer(
    metric: str,
    run: Run,
    images: ImageList,
    teachers: dict[str, Teacher],
    means: dict[str, Tensor],
    protocols: Sequence[str],
    da2k: Path | None,
    limit: int | None,
) -> Scorer:
    if metric == "cosine":
        return Cosine(images, teachers, means, protocols)
    if metric == "da2k":
        if da2k is None:
            raise UserError("the metric da2k needs its images and pairs; give --da2k DIR")
        return DepthPairs.of(da2k, teachers, limit)
    if "seg" not in teachers:
        raise UserError("miou needs the seg teacher, which this run was made without")
    decoder = SegDecoder.load(teachers["seg"], run.recipe.teachers["seg"])
    root = Path(run.recipe.data.path.removeprefix("coco:"))
    return Segmentation.of(root, images, teachers, decoder, training_images(run.recipe.data), protocols, limit)


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
    scorer: Scorer,
    means: dict[str, Tensor],
    size: int,
    scores: Scores,
    skipped: dict[str, Skipped],
) -> list[str]:
    """Scores everything that was trained on one set of backbone weights; returns the names of the images scored."""
    recipe, device, images, teachers = run.recipe, backbone.device, scorer.images, scorer.teachers
    layers = parse_layers(recipe.layers, backbone.layers)
    controls = [arm, *(["shuffled"] if arm == "no" and "shuffled" in recipe.controls else [])]
    banks = {control: ProbeBank.load(run.probes(control), device, teachers) for control in controls}
    ridge = RidgeReadout.load(run.ridge(arm), device)
    names: list[str] = []
    plan = [list(range(i, min(i + size, len(images)))) for i in range(0, len(images), size)]
    prepare = {name: teacher.prepare for name, teacher in teachers.items()}
    batches = micro_batches(images, plan, backbone.prepare, prepare, recipe.data.view, recipe.fit.workers, device)
    what = f"{scorer.stem} ({'checkpoint' if arm == 'no' else arm})"
    with torch.no_grad(), Progress(what, len(plan), unit="batches") as bar:
        for prepared in batches:
            bar.advance()
            skipped |= {skip.image: skip for skip in prepared.skipped}
            if prepared.student is None:
                continue
            names += [images.names[index] for index in prepared.indices]
            targets = {name: teacher.target(prepared.pixels[name]) for name, teacher in teachers.items()}
            context = scorer.begin(prepared, targets)
            batch = prepared.student.to(device)

            def note(teacher: str, layer: str, probe: str, control: str, seed: int, rows: Iterable[Row]) -> None:
                for metric, protocol, values in rows:
                    curve = Curve(teacher, layer, probe, control, metric, protocol, seed)
                    scores.setdefault(curve, []).append(values.cpu())

            def visit(layer: Layer, hidden: Tensor, batch: Batch = batch, context: Any = context) -> None:
                where = layer_name(layer)
                with torch.no_grad():
                    keys, mask = batch.tokens.select(hidden.to(device).float(), recipe.probe.keys)
                    for control, bank in banks.items():
                        for key, probe in bank.at(layer):
                            rows = scorer.score(key.teacher, probe(keys, mask), context)
                            note(key.teacher, where, "resampler", control, key.seed, rows)
                    image_states = batch.tokens.image_states(hidden.to(device))
                    for teacher, weight, bias in ridge.at(layer):
                        if teacher in teachers:
                            placed = place_states(image_states, batch.tokens.grid, teachers[teacher].grid)
                            rows = scorer.score(teacher, F.linear(placed, weight, bias), context)
                            note(teacher, where, "ridge", arm, recipe.fit.seeds[0], rows)

            backbone.stream(batch, layers, visit)
            if arm == "no":
                seed = recipe.fit.seeds[0]
                for name, target in targets.items():
                    rows = scorer.score(name, means[name].expand_as(target), context)
                    note(name, "", "constant", "mean", seed, rows)
                for name, probe, rows in scorer.ceiling(targets, context):
                    note(name, "", probe, "teacher", seed, rows)
    return names


def _note_skipped(run: Run, skipped: Iterable[Skipped]) -> None:
    """Adds held-out images that could not be read to the manifest."""
    manifest = run.manifest
    known = {(s["image"], s["split"]) for s in manifest["skipped"]}
    new = [vars(s) for s in skipped if (s.image, s.split) not in known]
    if new:
        manifest["skipped"] += new
        write_text(run.path / "manifest.json", json.dumps(manifest, indent=2) + "\n")
