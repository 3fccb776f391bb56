"""`probing align`: what a projector makes of a picture, and what each layer's image tokens are near.

Numbers are kept per image, and `results.csv` summarises them as it does those of probes.
"""

import itertools
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from analysis.alignment.forward_pass import POOLED, TOWER, SamplePass, Subject, WholePass
from analysis.alignment.metrics.layer_similarity import LEAST, likeness, neighbours
from analysis.alignment.metrics.similarity import overlap_at_chance
from analysis.alignment.pictures import draw_pictures
from analysis.evaluation.forward_pass import Resumable, Tally, gather
from analysis.evaluation.scores import (
    EMPTY,
    ScoreFile,
    ScoreKey,
    Summary,
    read_if_fits,
    read_summaries,
    score_file,
    summaries,
    write_rows,
    write_summaries,
)
from probing import __version__
from probing.data.coco import ImageList, Skipped, list_images
from probing.data.image_modes import image_size
from probing.data.instances import Instances, fitting, read_label_maps
from probing.data.panoptic import Panoptic
from probing.data.patch_labels import COVERAGE, patch_labels
from probing.models import Identity, identify, load_backbone, parse_layers
from probing.models.chat_templates import rendering_at
from probing.models.finite import finite_rows, not_finite_rows, report_not_finite
from probing.recipe import LayersRecipe, dump_recipe
from probing.runs.compatibility import (
    describe_inputs,
    inputs_file,
    recorded_inputs,
    recorded_moment,
    require_same,
    to_record,
)
from probing.runs.manifest import made_of, versions
from probing.teachers import load_teacher
from probing.teachers.base import Teacher
from probing.utils.distributed import alone
from probing.utils.errors import UserError
from probing.utils.files import disk_errors, left_overs, remove_left_overs, write_text
from probing.utils.paths import local_path

logger = logging.getLogger(__name__)

SAVE_MINUTES = 10.0
"""Between saved states of an unfinished pass."""


class AlignRecipe(LayersRecipe):
    """A whole run of `probing align`."""

    coverage: float = Field(default=COVERAGE, gt=0, le=1)
    """Share of a patch that a class must cover to be its label."""
    sample: int = Field(default=64, ge=1)
    """Images on which is measured what is dear: spectra, the whole vocabulary, sums of words, places of teachers."""
    micro_batch: int = Field(default=16, ge=1)
    """Images per forward pass."""
    workers: int = Field(default=2, ge=0)
    """Processes that read images and annotations."""
    pictures: int = Field(default=4, ge=0)
    """Images whose patches' words are kept for the page."""


def align(recipe: AlignRecipe, out: Path) -> Path:
    """Measures one checkpoint; what was measured with the same recipe is kept, and an interrupted pass goes on.

    Args:
        recipe: the whole run. Images are squashed to squares, so that patches and annotations line up.
        out: its folder.

    Returns:
        The path of `results.csv`.

    Raises:
        UserError: checkpoint, teachers, data or annotations cannot be used, or `out` holds another run.
        Interrupted: stopped by the user; the same call goes on.
    """
    device = alone("align").device
    _require_free(out, recipe)
    recorded = recorded_inputs(out, any((*(out / "state").glob("*.safetensors"), *(out / "scores").glob("*"))))
    with rendering_at(recorded_moment(recorded)):
        return _align(recipe, out, recorded, device)


def _align(recipe: AlignRecipe, out: Path, recorded: dict[str, Any] | None, device: torch.device) -> Path:
    maps, images = _labelled(recipe)
    checkpoint = identify(recipe.backbone)
    teachers = {name: load_teacher(name, teacher, device) for name, teacher in recipe.teachers.items()}
    inputs = describe_inputs(checkpoint, teachers, recipe.data.view, {"images": images.digest()})
    if recorded is not None:
        require_same(recorded, inputs, out, "put it back, or choose another --out")
    _claim(out, recipe, to_record(inputs))
    settings = f"{__version__} {images.digest()}"
    files = {name: score_file(out, f"scores/{name}", images.split) for name in ("alignment", "sample", "likeness")}
    if read_if_fits(files["alignment"], settings) is None:
        _measure(recipe, out, maps, images, files, settings, checkpoint, teachers, to_record(inputs), device)
    rows = [row for file in files.values() if file.exists() for row in summaries(ScoreFile.read(file), [0])]
    rows += [row for file in (out / "scores").glob("*.json") for row in read_summaries(file)]
    with disk_errors(out):
        for name in ("sample", "alignment"):  # of a process killed before it removed them
            (out / "state" / f"{name}.safetensors").unlink(missing_ok=True)
        return write_rows(out / "results.csv", checkpoint.name, rows)


def _labelled(recipe: AlignRecipe) -> tuple[Panoptic | Instances, ImageList]:
    """The annotations, and the images that have them."""
    if recipe.data.view != "square":
        raise UserError("data.view is 'own', and patches line up with annotations on squares alone; leave it out")
    root = local_path(recipe.data.path.removeprefix("coco:"))
    maps = read_label_maps(root, recipe.data.eval_split)
    return maps, _annotated(list_images(root, recipe.data.eval_split), maps, recipe.data.eval_limit)


def _measure(
    recipe: AlignRecipe,
    out: Path,
    maps: Panoptic | Instances,
    images: ImageList,
    files: dict[str, Path],
    settings: str,
    checkpoint: Identity,
    teachers: dict[str, Teacher],
    recorded: dict[str, Any],
    device: torch.device,
) -> None:
    """Both passes, and everything that is made of them."""
    started = time.monotonic()
    backbone = load_backbone(recipe.backbone, device, with_head=True)
    layers = parse_layers(recipe.layers, backbone.layers)
    subject = Subject(backbone, layers, images, maps, teachers, recipe.coverage, recipe.workers)
    _require_labels(subject)
    asked = f"{settings} {dump_recipe(recipe)} {checkpoint.sha256} {[t.sha256 for t in teachers.values()]}"

    sample = read_if_fits(files["sample"], settings)
    if sample is None:
        few = replace(images, names=images.names[: recipe.sample])
        resumable = Resumable(out / "state" / "sample.safetensors", asked, SAVE_MINUTES)
        batch = min(recipe.micro_batch, len(few))
        tally = gather("sample", few, batch, subject.read, SamplePass(subject), resumable, device)
        sample = _kept(tally, few, settings, files["sample"], resumable)
        if not any(curve.layer == TOWER for curve in sample.table):
            logger.warning(
                "what goes into the projector is not one row of patches per image here; nothing is measured before it"
            )
    resumable = Resumable(out / "state" / "alignment.safetensors", asked, SAVE_MINUTES)
    whole = WholePass(subject, sample)
    tally = gather("patches and words", images, recipe.micro_batch, subject.read, whole, resumable, device)
    pooled = {curve: torch.cat(tally.scores.pop(curve)) for curve in list(tally.scores) if curve.metric == POOLED}
    found = tally.file(images.split, settings)
    report_not_finite(found.left_out(), found.names, len(found.names))
    with disk_errors(out):
        if recipe.pictures:
            centres = {layer: whole.centres[layer] for layer in map(str, layers)}
            draw_pictures(subject, centres, out / "pictures", recipe.pictures)
        _write_likeness(pooled, found, files["likeness"])
        manifest = _manifest(recipe, checkpoint, teachers, images, maps, found, sample, time.monotonic() - started)
        write_text(out / "manifest.json", json.dumps({**manifest, **recorded}, indent=2) + "\n")
        found.write(files["alignment"])  # last: where it is there, nothing else is missing
        resumable.file.unlink(missing_ok=True)
        inputs_file(out).unlink(missing_ok=True)


def _require_labels(subject: Subject) -> None:
    """Raises UserError where no patch of any image has a label; reads label maps up to the first that has one."""
    images, reason = subject.images, ""
    for name in images.names:
        try:
            shares = subject.annotate(name, image_size(images.folder / name, name in images.turned))
        except OSError as error:
            reason = reason or f" (first {name}: {error})"
            continue
        if (patch_labels(shares.numpy(), subject.coverage) >= 0).any():
            return
    raise UserError(f"no patch of {images.split} has a label{reason}; check annotations and coverage")


def _kept(tally: Tally, images: ImageList, settings: str, file: Path, resumable: Resumable) -> ScoreFile:
    """A finished pass, written to its file."""
    if not tally.names:
        reason = next((f"{skip.image}: {skip.reason}" for skip in tally.skipped.values()), "")
        raise UserError(f"none of the first {len(images)} images can be used ({reason}); check {images.folder}")
    found = tally.file(images.split, settings)
    with disk_errors(file.parent):
        found.write(file)
        resumable.file.unlink(missing_ok=True)
    return found


def _write_likeness(pooled: dict[ScoreKey, Tensor], whole: ScoreFile, file: Path) -> None:
    """Compares layers with tower and teachers, image by image."""
    layers = {curve.layer: features for curve, features in pooled.items() if curve.layer}
    references = {curve.teacher: features for curve, features in pooled.items() if not curve.layer}
    count = len(next(iter(layers.values())))
    if not references:
        return
    if count < LEAST:
        logger.warning("layers are compared with tower and teachers over at least %d images, not %d", LEAST, count)
        return
    shares: dict[ScoreKey, NDArray[np.float64]] = {}
    rows: list[Summary] = []
    lacking: list[tuple[str, str, int]] = []
    for (some, own), (others, known) in itertools.product(_by_images(layers), _by_images(references)):
        there = own & known
        number = int(there.sum())
        if number < LEAST:
            lacking += [(layer, reference, number) for layer, reference in itertools.product(some, others)]
            continue
        left = {name: layers[name][there] for name in some}
        right = {name: references[name][there] for name in others}
        for one in likeness(left, right, count):
            if one.shares is not None:
                shares[one.curve] = np.full(count, np.nan)
                shares[one.curve][there.numpy()] = one.shares.numpy()
            if one.jackknife is not None:
                interval = one.jackknife.interval()
                rows.append(Summary(one.curve, whole.split, "0", interval, number, distances=one.jackknife))
    if lacking:
        line = "layers %s: too few images with finite states to compare with %s"
        names = (", ".join(dict.fromkeys(own)) for own in list(zip(*lacking, strict=True))[:2])
        logger.warning(line, *names)
    for layer, reference, number in lacking:  # empty rows as those of a layer that was compared
        alike = [row for row in rows if row.curve.teacher == reference]
        rows += [replace(row, curve=replace(row.curve, layer=layer), interval=EMPTY, n=number, distances=None)
                 for row in alike if row.curve.layer == alike[0].curve.layer]  # fmt: skip
        for curve in {replace(curve, layer=layer) for curve in shares if curve.teacher == reference}:
            shares.setdefault(curve, np.full(count, np.nan))
    chance = {"mutual_knn": overlap_at_chance(count, neighbours(count))}
    ScoreFile(shares, whole.names[:count], whole.split, whole.settings, chance=chance).write(file)
    write_summaries(file.with_suffix(".json"), rows)


def _by_images(features: dict[str, Tensor]) -> list[tuple[list[str], Tensor]]:
    """Names of those whose features (n, H) are finite for the same images, and for which, (n) bool."""
    sets: dict[tuple[bool, ...], list[str]] = {}
    for name, own in features.items():
        sets.setdefault(tuple(finite_rows(own).tolist()), []).append(name)
    return [(names, torch.tensor(mask)) for mask, names in sets.items()]


def _annotated(images: ImageList, maps: Panoptic | Instances, limit: int | None) -> ImageList:
    """The images that have annotations of their size; the others count as skipped."""
    there = maps.segments if isinstance(maps, Panoptic) else maps.objects
    names = [name for name in images.names if name in there]
    skipped = [Skipped(name, images.split, "not annotated") for name in images.names if name not in there]
    if not names:
        raise UserError(f"none of the {len(images)} images of {images.split} is annotated; check the annotation files")
    if skipped:
        logger.warning("%s: %d of %d images have no masks and are not used", images.split, len(skipped), len(images))
    return fitting(replace(images, names=names[:limit], skipped=images.skipped + skipped), maps)


def _claim(out: Path, recipe: AlignRecipe, recorded: dict[str, Any]) -> None:
    """Writes recipe and inputs into a folder."""
    with disk_errors(out):
        remove_left_overs(left_overs(out))
        write_text(out / "recipe.yaml", dump_recipe(recipe))
        if not (out / "manifest.json").exists():
            write_text(inputs_file(out), json.dumps(recorded))


def _require_free(out: Path, recipe: AlignRecipe) -> None:
    there = out / "recipe.yaml"
    if there.exists() and there.read_text(encoding="utf-8") != dump_recipe(recipe):
        raise UserError(f"{out} holds another run, or one of another recipe; choose another --out, or remove it")


def _manifest(
    recipe: AlignRecipe,
    checkpoint: Identity,
    teachers: dict[str, Teacher],
    images: ImageList,
    maps: Panoptic | Instances,
    found: ScoreFile,
    sample: ScoreFile,
    seconds: float,
) -> dict[str, Any]:
    skipped: Sequence[Skipped] = (*images.skipped, *(Skipped(*row) for row in found.skipped))
    counts = [values[:, 1] for curve, values in found.table.items() if curve.metric == "word_retrieval"]
    patches = int(max(np.nansum(values) for values in counts))  # a layer may lack images
    return {
        "kind": "alignment",
        **made_of(checkpoint, recipe.backbone.prompt, teachers),
        "data": {
            "path": recipe.data.path,
            "eval_split": images.split,
            "eval_images": len(found.names),
            "eval_digest": images.digest(),
            "sample_images": len(sample.names),
            "annotations": "panoptic" if isinstance(maps, Panoptic) else "instances",
            "classes": len(maps.names),
            "coverage": recipe.coverage,
            "labelled_patches": patches,
        },
        "skipped": [vars(skip) for skip in skipped],
        "not_finite": not_finite_rows(found.left_out(), found.names, found.split, "none"),
        "seconds": seconds,
        "versions": versions(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
