"""`probing align`: what the projector discards, and which words each layer's image tokens are near.

Scores are stored per image, and summarised in `results.csv` as those of probes are.
"""

import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from analysis.alignment.context import AlignmentContext
from analysis.alignment.forward_pass import MeasurePass, all_measures, mean_states, sample_measures
from analysis.alignment.metrics.base import LAYER, TOWER
from analysis.alignment.metrics.pooled_similarity import compare_pooled, neighbour_count, take_pooled
from analysis.alignment.pictures import write_pictures
from analysis.alignment.recipe import AlignRecipe
from analysis.evaluation.forward_pass import Resumable, gather
from analysis.evaluation.scores import (
    ScoreFile,
    read_if_fits,
    read_summaries,
    score_file,
    summaries,
    write_rows,
    write_summaries,
)
from probing import __version__
from probing.data.coco import ImageList, Skipped, list_images
from probing.data.image_modes import size_of_image
from probing.data.instances import Instances, keep_annotated_size, read_label_maps
from probing.data.panoptic import Panoptic
from probing.data.patch_labels import patch_labels
from probing.models import Identity, check_models, identify, load_backbone
from probing.models.chat_templates import rendering_at
from probing.models.finite import not_finite_rows, report_not_finite
from probing.recipe import dump_recipe
from probing.runs.manifest import manifest_header, versions
from probing.runs.recorded_inputs import (
    describe_inputs,
    inputs_file,
    recorded_inputs,
    recorded_moment,
    to_record,
)
from probing.runs.resume import claim, holds_run
from probing.teachers import load_teachers
from probing.utils.distributed import require_single_process
from probing.utils.errors import UserError
from probing.utils.files import disk_errors, write_text
from probing.utils.paths import local_path

logger = logging.getLogger(__name__)

SAVE_MINUTES = 10.0
"""Time between saved states of an unfinished pass."""


def align(recipe: AlignRecipe, out: Path) -> Path:
    """Measures one checkpoint; results of the same recipe are reused, and an interrupted pass resumes.

    Args:
        recipe: the whole run. Images are squashed to squares, so that patches and annotations line up.
        out: its folder.

    Returns:
        The path of `results.csv`.

    Raises:
        UserError: checkpoint, teachers, data or annotations cannot be used, or `out` holds another run.
        Interrupted: stopped by the user; the same call resumes.
    """
    device = require_single_process("align").device
    holds_run(out, recipe)
    recorded = recorded_inputs(out, any((*(out / "state").glob("*.safetensors"), *(out / "scores").glob("*"))))
    with rendering_at(recorded_moment(recorded)):
        check_models(recipe.backbone, recipe.teachers, recipe.layers)
        maps, images = labelled_images(recipe)
        run = Alignment(recipe, out, maps, images, device)
        claim(out, recipe, to_record(run.inputs), recorded)
        run.measure()
    files = [file for file in run.scores.values() if file.exists()]
    rows = [row for file in files for row in summaries(ScoreFile.read(file), [0])]
    rows += [row for file in (out / "scores").glob("*.json") for row in read_summaries(file)]
    with disk_errors(out):
        for file in run.states.values():  # of a process that was killed before it removed them
            file.unlink(missing_ok=True)
        return write_rows(out / "results.csv", run.checkpoint.name, rows)


def labelled_images(recipe: AlignRecipe) -> tuple[Panoptic | Instances, ImageList]:
    """The annotations, and the images that have annotations of their size; the others count as skipped."""
    if recipe.data.view != "square":
        raise UserError("data.view is 'own', but annotations line up with patches on squares only; leave it out")
    root, split = local_path(recipe.data.path.removeprefix("coco:")), recipe.data.eval_split
    maps = read_label_maps(root, split)
    images = list_images(root, split)
    annotated = maps.segments if isinstance(maps, Panoptic) else maps.objects
    names = [name for name in images.names if name in annotated]
    skipped = [Skipped(name, split, "not annotated") for name in images.names if name not in annotated]
    if not names:
        raise UserError(f"none of the {len(images)} images of {split} is annotated; check the annotation files")
    if skipped:
        logger.warning("%s: %d of %d images have no masks and are not used", split, len(skipped), len(images))
    images = replace(images, names=names[: recipe.data.eval_limit], skipped=images.skipped + skipped)
    return maps, keep_annotated_size(images, maps)


class Alignment:
    """A run of `probing align` in its folder."""

    def __init__(
        self, recipe: AlignRecipe, out: Path, maps: Panoptic | Instances, images: ImageList, device: torch.device
    ) -> None:
        self.recipe, self.out, self.maps, self.images, self.device = recipe, out, maps, images, device
        self.checkpoint: Identity = identify(recipe.backbone)
        self.teachers = load_teachers(recipe.teachers, device)
        self.digest = images.digest()
        inputs = describe_inputs(self.checkpoint, self.teachers, recipe.data.view, {"images": self.digest})
        self.inputs = inputs
        self.settings = f"{__version__} {self.digest}"
        self.scores = {
            name: score_file(out, f"scores/{name}", images.split) for name in ("alignment", "sample", "similarity")
        }
        self.states = {name: out / "state" / f"{name}.safetensors" for name in ("sample", "alignment")}

    def measure(self) -> None:
        """Runs both passes, and writes everything that follows from them."""
        if read_if_fits(self.scores["alignment"], self.settings) is not None:
            return
        started = time.monotonic()
        model = load_backbone(self.recipe.backbone, self.device, with_head=True)
        context = AlignmentContext(model, self.images, self.maps, self.teachers, self.recipe)
        _require_labels(context)
        sample = self._sample(context)
        centres = mean_states(sample, model.device)
        tally = gather(
            self.images,
            self.recipe.micro_batch,
            context.read,
            MeasurePass(context, all_measures(context, centres)),
            self._resumable("alignment", "patches and words"),
        )
        layers, references = take_pooled(tally)
        scores = tally.file(self.images.split, self.settings)
        report_not_finite(scores.left_out(), scores.names, len(scores.names))
        with disk_errors(self.out):
            if self.recipe.pictures:
                by_layer = {layer: centre for (source, layer), centre in centres.items() if source == LAYER}
                write_pictures(context, by_layer, self.out / "pictures")
            table, rows = compare_pooled(layers, references, self.images.split)
            if table:
                count = len(next(iter(layers.values())))
                chance = {"mutual_knn": neighbour_count(count) / (count - 1)}
                file = self.scores["similarity"]
                ScoreFile(table, scores.names[:count], scores.split, self.settings, chance=chance).write(file)
                write_summaries(file.with_suffix(".json"), rows)
            manifest = self._manifest(scores, sample, time.monotonic() - started) | to_record(self.inputs)
            write_text(self.out / "manifest.json", json.dumps(manifest, indent=2) + "\n")
            scores.write(self.scores["alignment"])  # last: when this file exists, all others do
            self.states["alignment"].unlink(missing_ok=True)
            inputs_file(self.out).unlink(missing_ok=True)

    def _sample(self, context: AlignmentContext) -> ScoreFile:
        """The scores of the sample, from their file or from a pass."""
        if (sample := read_if_fits(self.scores["sample"], self.settings)) is not None:
            return sample
        images = replace(self.images, names=self.images.names[: self.recipe.sample])
        batch = min(self.recipe.micro_batch, len(images))
        measures = MeasurePass(context, sample_measures(context))
        tally = gather(images, batch, context.read, measures, self._resumable("sample", "sample"))
        if not tally.names:
            reason = next((f"{skip.image}: {skip.reason}" for skip in tally.skipped.values()), "")
            raise UserError(f"none of the first {len(images)} images can be used ({reason}); check {images.folder}")
        sample = tally.file(images.split, self.settings)
        with disk_errors(self.out):
            sample.write(self.scores["sample"])
            self.states["sample"].unlink(missing_ok=True)
        if not any(key.layer == TOWER for key in sample.table):
            logger.warning("the projector's input is not one row of patches per image; nothing is measured before it")
        return sample

    def _resumable(self, name: str, title: str) -> Resumable:
        hashes = [self.checkpoint.sha256, *(teacher.sha256 for teacher in self.teachers.values())]
        settings = f"{self.settings} {dump_recipe(self.recipe)} {hashes}"
        return Resumable(title, self.states[name], settings, SAVE_MINUTES)

    def _manifest(self, scores: ScoreFile, sample: ScoreFile, seconds: float) -> dict[str, Any]:
        skipped = [*self.images.skipped, *(Skipped(*row) for row in scores.skipped)]
        patches = [values[:, 1] for key, values in scores.table.items() if key.metric == "word_retrieval"]
        return {
            "kind": "alignment",
            **manifest_header(self.checkpoint, self.recipe.backbone.prompt, self.teachers),
            "data": {
                "path": self.recipe.data.path,
                "eval_split": self.images.split,
                "eval_images": len(scores.names),
                "eval_digest": self.digest,
                "sample_images": len(sample.names),
                "annotations": "panoptic" if isinstance(self.maps, Panoptic) else "instances",
                "classes": len(self.maps.names),
                "coverage": self.recipe.coverage,
                "labelled_patches": int(max(np.nansum(values) for values in patches)),  # a layer may lack images
            },
            "skipped": [vars(skip) for skip in skipped],
            "not_finite": not_finite_rows(scores.left_out(), scores.names, scores.split, "none"),
            "seconds": seconds,
            "versions": versions(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }


def _require_labels(context: AlignmentContext) -> None:
    """Raises UserError where no patch of any image has a label; reads label maps up to the first that has one."""
    images, reason = context.images, ""
    for name in images.names:
        try:
            shares = context.annotate(name, size_of_image(images.folder / name, name in images.turned))
        except OSError as error:
            reason = reason or f" (first {name}: {error})"
            continue
        if (patch_labels(shares.numpy(), context.recipe.coverage) >= 0).any():
            return
    raise UserError(f"no patch of {images.split} has a label{reason}; check annotations and coverage")
