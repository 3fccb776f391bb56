"""`probing evaluate`: scores the probes of a run.

One pass over the images per metric and set of backbone weights; every layer's probes predict while the layer's state
exists. Scores are kept per image (`scores/`), so that comparisons can be paired and nothing is computed twice;
`results.csv` summarises them.
"""

import gc
import importlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from analysis.evaluation.forward_pass import ARMS, PROBES, Selection, pass_state, score_arm
from analysis.evaluation.metrics.cosine import Cosine
from analysis.evaluation.metrics.depth_pairs import DepthPairs
from analysis.evaluation.metrics.generated_images import Embeddings, Painter, score_generation
from analysis.evaluation.metrics.image_features import Extractor, classifier, inception
from analysis.evaluation.metrics.segmentation import Segmentation, early_means
from analysis.evaluation.pictures import SIDE, Pictures, draw_depth, draw_gen, draw_seg
from analysis.evaluation.registry import PROTOCOLS
from analysis.evaluation.scorer import Scorer
from analysis.evaluation.scores import ScoreFile, read_if_fits, score_file, summaries, write_results
from analysis.evaluation.seed_group import open_runs, write_pooled
from probing import __version__
from probing.data.coco import ImageList, Skipped
from probing.data.input_controls import SUBSTITUTES
from probing.data.target_cache import TargetCache
from probing.models import Backbone, layer_name, parse_layers
from probing.models.chat_templates import rendering_at
from probing.models.finite import not_finite_rows, report_not_finite
from probing.probes.bank import bank_layers
from probing.recipe import ProbeRunRecipe
from probing.runs.compatibility import describe_inputs, recorded_moment, require_same, vocabulary
from probing.runs.directory import Run, members
from probing.teachers import Teacher, depth
from probing.teachers.gen import GUIDANCE, STEPS, GenDecoder
from probing.teachers.seg import SegDecoder
from probing.training.run import (
    arm_backbone,
    caches_of,
    held_out_images,
    load_teachers,
    training_images,
)
from probing.utils.distributed import alone
from probing.utils.errors import UserError
from probing.utils.files import disk_errors, write_text

logger = logging.getLogger(__name__)

GENERATED = ("fid", "frechet")
PICTURED = {"da2k": "depth", "miou": "seg", "fid": "gen", "frechet": "gen"}
"""Decoded metrics, and the teacher whose pictures go with each."""


@dataclass(frozen=True)
class Options:
    """What `probing evaluate` is asked for.

    Attributes:
        metrics: some of `PROTOCOLS`.
        protocols: those of them to compute; by default all of each metric.
        layers: which, as text; by default all that were probed.
        probes: `resampler`, `ridge`; by default both, and for generated images the resampler alone.
        controls: `none`, `shuffled`, `random`, and what replaces the image: `blank`, `other`, `caption`; by default
            those that the run has, and for generated images `none` alone.
        images: per decoded metric; by default all.
        da2k: folder in DA-2K's layout, for the metric of that name.
        inception_weights: file, for fid; by default they are downloaded.
        extractor: classifier of transformers whose features `frechet` compares.
        steps: of the diffusion solver.
        guidance: of the diffusion.
        pictures: images to draw at every layer, where a metric is decoded.
        micro_batch: images per forward pass; by default as in training.
        target_cache: see `DataRecipe.target_cache`; by default as in training. For the cosine, which needs no pixels.
    """

    metrics: tuple[str, ...] = ("cosine",)
    protocols: tuple[str, ...] = ()
    layers: str | None = None
    probes: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()
    images: int | None = None
    da2k: Path | None = None
    inception_weights: Path | None = None
    extractor: str | None = None
    steps: int = STEPS
    guidance: float = GUIDANCE
    pictures: int = 4
    micro_batch: int | None = None
    target_cache: str | None = None


@dataclass(frozen=True)
class Job:
    """A scorer and what to score with it."""

    scorer: Scorer
    selection: Selection


def evaluate(path: Path, options: Options | None = None) -> Path:
    """Scores a finished run, or every run of a folder; what was scored before with the same settings is kept.

    Args:
        path: the run, or a folder of runs whose checkpoints differ by their seed alone.
        options: what to score; by default the cosine.

    Returns:
        The path of `results.csv`; that of a folder has every seed, and all of them together.

    Raises:
        UserError: the run is missing or unfinished, or its checkpoint, teachers or data changed since, or what a metric
            needs is not there.
        Interrupted: stopped by the user; the same call goes on.
    """
    options = options or Options()
    device = alone("evaluate").device
    if members(path):
        runs = open_runs(path)
        for run in (run for run in runs if isinstance(run, Run)):  # those of probing align are scored already
            logger.info("%s", run.path)
            evaluate(run.path, options)
        with disk_errors(path):
            return write_pooled(path, runs)
    run = Run.open(path)
    run.remove_left_overs(idle=3600)  # another process may be scoring another metric
    require_protocols(options)
    with rendering_at(recorded_moment(run.manifest)):
        return _score(run, options, device)


def _score(run: Run, options: Options, device: torch.device) -> Path:
    """Scores one run."""
    workshop = _Workshop(run, options, device)
    blocks = run.manifest["checkpoint"]["layers"]
    chosen = {metric: selection(run.recipe, blocks, options, metric) for metric in (*options.metrics, "pictures")}
    jobs = [Job(workshop.scorer(metric), chosen[metric]) for metric in options.metrics]
    if options.pictures:
        drawn = dict.fromkeys(PICTURED[metric] for metric in options.metrics if metric in PICTURED)
        jobs += [Job(workshop.pictures(name), chosen["pictures"]) for name in drawn]
    for arm in ARMS:
        _score_arm(run, arm, jobs, workshop, options)
    for metric, job in zip(options.metrics, jobs, strict=False):
        if metric in GENERATED:
            images = job.scorer.images
            found = ScoreFile.read(score_file(run.path, job.scorer.stem, images.split))
            score_generation(run, _chosen(found, job.selection), images, workshop.painter(metric))
    warn_if_upside_down(run.path)
    with disk_errors(run.path):
        return write_results(run)


def warn_if_upside_down(run: Path) -> None:
    """Warns where the depth teacher's own maps order DA-2K's pairs worse than chance: near and far look swapped."""
    file = score_file(run, "scores/da2k", "da2k")
    if not file.exists():
        return
    found = ScoreFile.read(file)
    own = {curve: scores for curve, scores in found.table.items() if curve.probe == "teacher"}
    for row in summaries(replace(found, table=own), [0]):
        if row.interval.high < 0.5:
            logger.warning(
                "da2k: the depth teacher itself scores %.2f, below chance; near and far look swapped: check "
                "depth_estimation_type in its config.json",
                row.interval.value,
            )


def protocols_of(metric: str, wanted: Sequence[str]) -> list[str]:
    """The protocols of a metric that were asked for; all, where none of those asked for is one of its own."""
    return [p for p in PROTOCOLS[metric] if p in wanted] or list(PROTOCOLS[metric])


def require_protocols(options: Options) -> None:
    """Raises UserError where a protocol was asked for that none of the metrics has."""
    there = {protocol for metric in options.metrics for protocol in PROTOCOLS[metric]}
    for protocol in options.protocols:
        if protocol not in there:
            have = "; ".join(f"{metric} has {', '.join(PROTOCOLS[metric])}" for metric in options.metrics)
            raise UserError(f"no metric asked for has the protocol {protocol!r}: {have}")


def selection(recipe: ProbeRunRecipe, blocks: int, options: Options, metric: str) -> Selection:
    """Layers, probes and controls to score.

    Args:
        recipe: of the run.
        blocks: decoder blocks of the checkpoint.
        options: what was asked for.
        metric: one of `PROTOCOLS`, or `pictures`.

    Raises:
        UserError: the run was made without one of them.
    """
    generated = metric in GENERATED
    probed = parse_layers(recipe.layers, blocks)
    layers = parse_layers(options.layers, blocks) if options.layers else probed
    there = {
        "layer": [layer_name(layer) for layer in probed],
        "probe": [p for p in PROBES if p == "resampler" or recipe.fit.ridge],
        "control": ["none", *recipe.controls, *SUBSTITUTES],
    }
    defaults = {"probe": there["probe"], "control": ["none", *recipe.controls]}
    if generated:
        defaults = {"probe": ["resampler"], "control": ["none"]}
    if metric == "pictures":
        defaults["control"] = ["none"]
    chosen = {"probe": options.probes or defaults["probe"], "control": options.controls or defaults["control"]}
    for what, names in {"layer": [layer_name(layer) for layer in layers], **chosen}.items():
        for name in names:
            if name not in there[what]:
                raise UserError(f"this run has no {what} {name!r}; it has {', '.join(there[what])}")
    if metric == "pictures":
        chosen["control"] = ["none"]
    return Selection(tuple(layers), tuple(chosen["probe"]), tuple(chosen["control"]))


def _chosen(found: ScoreFile, chosen: Selection) -> ScoreFile:
    """The part of a file that was asked for, with mean target and true feature."""
    layers = {layer_name(layer) for layer in chosen.layers}
    table = {
        curve: values
        for curve, values in found.table.items()
        if not curve.layer
        or (curve.layer in layers and curve.probe in chosen.probes and curve.control in chosen.controls)
    }
    return ScoreFile(table, found.names, found.split, found.settings)


def _score_arm(run: Run, arm: str, jobs: Iterable[Job], workshop: "_Workshop", options: Options) -> None:
    """Scores on one set of backbone weights whatever is not scored yet."""
    due = []
    for job in jobs:
        scorer, chosen = job.scorer, job.selection.arm(arm)
        settings = f"{__version__} {scorer.settings()}"
        file = score_file(run.path, scorer.stem, scorer.images.split)
        there = read_if_fits(file, settings)
        done = set(there.table) | set(there.sums) if there else set()
        lacking = chosen.lacking(scorer, run.recipe.fit.seeds, bank_layers(run.probes("none")), done)
        if lacking.layers and lacking.controls:
            due.append((scorer, lacking, settings, file))
        elif chosen.controls:
            logger.info("%s is there already; remove it to score again", file)
            pass_state(run, scorer, arm).unlink(missing_ok=True)  # of a process killed before it removed it
    if not due:
        return
    backbone = arm_backbone(run.recipe, arm, workshop.device)
    controls = {control for _, lacking, _, _ in due for control in lacking.controls}
    _check_unchanged(run, backbone, workshop.teachers, workshop.images, "caption" in controls)
    for scorer, lacking, settings, file in due:
        batch = options.micro_batch or run.recipe.fit.micro_batch
        kept = workshop.kept() if isinstance(scorer, Cosine) else {}
        found = score_arm(run, arm, backbone, scorer, lacking, batch, settings, kept)
        if not found.names:
            raise UserError(f"no image of {scorer.images.split} could be read; check {scorer.images.folder}")
        report_not_finite(found.left_out(), found.names, len(found.names), arm)
        rows = not_finite_rows(found.left_out(), found.names, found.split, arm)
        there = read_if_fits(file, settings)
        if there and not found.merge(there):
            logger.warning("%s: other images could be read this time; the scores that were there are replaced", file)
        with disk_errors(run.path):
            found.write(file)
            _note_skipped(run, [*scorer.images.skipped, *(Skipped(*row) for row in found.skipped)], rows)
            pass_state(run, scorer, arm).unlink(missing_ok=True)
    del backbone
    gc.collect()


class _Workshop:
    """What scorers are made of; each part is loaded once, and only if something needs it."""

    def __init__(self, run: Run, options: Options, device: torch.device) -> None:
        self.run, self.options, self.device = run, options, device
        self.images = held_out_images(run.recipe.data)
        self.teachers = load_teachers(run.recipe, device)
        self._seg: SegDecoder | None = None
        self._gen: GenDecoder | None = None
        self._means: list[torch.Tensor] = []
        self._kept: dict[str, TargetCache] | None = None

    def scorer(self, metric: str) -> Scorer:
        """The scorer of one metric; that of a file of its own takes what the cosine's takes."""
        options, protocols = self.options, protocols_of(metric, self.options.protocols)
        if metric == "cosine":
            return Cosine(self.images, self.teachers, self.run.mean_targets(self.device), protocols)
        if metric == "da2k":
            if options.da2k is None:
                raise UserError("the metric da2k needs its images and pairs; give --da2k DIR")
            return DepthPairs.of(options.da2k, self.teachers, options.images)
        if metric == "miou":
            if "seg" not in self.teachers:
                raise UserError("miou needs the seg teacher, which this run was made without")
            root = Path(self.run.recipe.data.path.removeprefix("coco:"))
            constants = self.early_means() if "blind" in protocols else []
            return Segmentation.of(root, self.images, self.teachers, self.seg(), constants, protocols, options.images)
        if metric not in GENERATED:
            own: Scorer = importlib.import_module(f"analysis.evaluation.metrics.{metric}").scorer(
                self.images, self.teachers, self.run.mean_targets(self.device), protocols
            )
            return own
        scorer = Embeddings.of(self.images, self.teachers, options.images)
        self.painter(metric)  # before anything long begins, so that what is missing is said at once
        return scorer

    def kept(self) -> dict[str, TargetCache]:
        """Target caches of the held-out images."""
        recipe = self.run.recipe.model_copy(deep=True)
        recipe.data.target_cache = self.options.target_cache or recipe.data.target_cache
        if self._kept is None:
            self._kept = caches_of(recipe, self.teachers, self.images)
        return self._kept

    def seg(self) -> SegDecoder:
        """The decoder of the seg teacher."""
        self._seg = self._seg or SegDecoder.load(self.teachers["seg"], self.run.recipe.teachers["seg"])
        return self._seg

    def early_means(self) -> list[torch.Tensor]:
        """The constants that stand for the true image's early stages in blind decoding."""
        self._means = self._means or early_means(self.seg(), training_images(self.run.recipe.data))
        return self._means

    def gen(self) -> GenDecoder:
        """The decoder of the gen teacher."""
        if self._gen is None:
            recipe = self.run.recipe.teachers["gen"]
            self._gen = GenDecoder.load(self.teachers["gen"], recipe, self.options.steps, self.options.guidance)
        return self._gen

    def extractor(self, metric: str) -> Extractor:
        """The network whose features are compared."""
        if metric == "fid":
            return inception(self.options.inception_weights, self.device)
        if self.options.extractor is None:
            raise UserError("the metric frechet needs a network for its features; give --extractor DIR, or use fid")
        return classifier(self.options.extractor, self.device)

    def painter(self, metric: str) -> Painter:
        """Paints images and looks at them."""
        batch = self.options.micro_batch or self.run.recipe.fit.micro_batch
        return Painter(self.gen(), self.extractor(metric), self.teachers["gen"].sha256, batch)

    def pictures(self, name: str) -> Pictures:
        """Draws a few images through one teacher's decoder."""
        teacher, options, made_with = self.teachers[name], self.options, ""
        side = min(SIDE, teacher.prepare([Image.new("RGB", (SIDE, SIDE))]).shape[-1])
        if name == "depth":
            draw = draw_depth(teacher, side)
            made_with = "" if depth.larger_is_nearer(teacher) else "metric"
        elif name == "seg":
            draw = draw_seg(self.seg(), self.early_means(), side)
            with disk_errors(self.run.path):
                write_text(self.run.path / "pictures" / "classes.json", json.dumps(self.seg().names))
        else:
            draw = draw_gen(self.gen(), side)
            made_with = f"{options.steps} {options.guidance}"
        images = replace(self.images, names=self.images.names[: options.pictures], skipped=[])
        return Pictures(images, {name: teacher}, draw, side, made_with)


def _check_unchanged(
    run: Run, backbone: Backbone, teachers: dict[str, Teacher], images: ImageList, captions: bool
) -> None:
    """Raises UserError where a run's inputs changed; captions are tokenized like no other text of it."""
    now = describe_inputs(backbone.identity, teachers, run.recipe.data.view, {"held-out images": images.digest()})
    if captions:
        now |= vocabulary(backbone.identity)
    require_same(run.manifest, now, run.path, "put it back, or train a new run")


def _note_skipped(run: Run, skipped: Iterable[Skipped], not_finite: Iterable[dict[str, str]]) -> None:
    """Adds held-out images that could not be read, or were left out of some layers, to the manifest."""
    manifest = run.manifest
    known = {(s["image"], s["split"]) for s in manifest["skipped"]}
    new = [vars(s) for s in skipped if (s.image, s.split) not in known]
    there = {tuple(row.values()) for row in manifest.get("not_finite", [])}
    left_out = [row for row in not_finite if tuple(row.values()) not in there]
    if new or left_out:
        manifest["skipped"] += new
        manifest["not_finite"] = manifest.get("not_finite", []) + left_out
        write_text(run.path / "manifest.json", json.dumps(manifest, indent=2) + "\n")
