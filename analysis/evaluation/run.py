"""`probing evaluate`: scores the probes of a run.

Scores are stored per image (`scores/`), so that comparisons can be paired and nothing is computed twice;
`results.csv` summarises them.
"""

import gc
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from analysis.evaluation.context import EvaluationContext
from analysis.evaluation.forward_pass import PASSES, PROBES, ProbePass, Resumable, Selection, gather
from analysis.evaluation.options import Options
from analysis.evaluation.pictures import PICTURES
from analysis.evaluation.registry import Recorder, metrics
from analysis.evaluation.scores import ScoreFile, ScoreKey, read_if_fits, score_file, write_results
from analysis.evaluation.seed_group import open_runs, write_pooled
from probing import __version__
from probing.data.coco import Skipped
from probing.data.dataloader import MicroBatches, micro_batches
from probing.data.input_substitutes import SUBSTITUTES, caption_inputs, substitute
from probing.models import Backbone, layer_name, parse_layers
from probing.models.chat_templates import rendering_at
from probing.models.finite import not_finite_rows, report_not_finite
from probing.probes.bank import bank_layers
from probing.recipe import ProbeRunRecipe
from probing.runs.directory import Run, runs_in
from probing.runs.recorded_inputs import describe_inputs, recorded_moment, require_same, vocabulary
from probing.training.run import load_run_backbone
from probing.utils.distributed import require_single_process
from probing.utils.errors import UserError
from probing.utils.files import disk_errors, write_text

logger = logging.getLogger(__name__)

Job = tuple[Recorder, Selection]
"""What to record, and of which layers, probes and controls."""


def evaluate(path: Path, options: Options | None = None) -> Path:
    """Scores a finished run, or every run of a folder; scores with identical settings are reused.

    Args:
        path: the run, or a folder of runs whose checkpoints differ by their seed alone.
        options: what to score; by default the cosine.

    Returns:
        The path of `results.csv`; that of a folder has every seed, and all of them together.

    Raises:
        UserError: the run is missing or unfinished, its inputs changed, or a metric lacks a teacher or an option.
        Interrupted: Ctrl-C or SIGTERM; the same call resumes.
    """
    options = options or Options()
    device = require_single_process("evaluate").device
    if runs_in(path):
        runs = open_runs(path)
        for run in (run for run in runs if isinstance(run, Run)):  # `probing align` has scored its own
            logger.info("%s", run.path)
            evaluate(run.path, options)
        with disk_errors(path):
            return write_pooled(path, runs)
    run = Run.open(path)
    run.remove_temporary_files(idle=3600)  # another process may be scoring another metric
    require_protocols(options)
    with rendering_at(recorded_moment(run.manifest)):
        context = EvaluationContext.load(run, options, device)
        _record_all(context)
    with disk_errors(run.path):
        return write_results(run)


def require_protocols(options: Options) -> None:
    """Raises UserError if none of the metrics has a requested protocol."""
    known = {name: list(dict.fromkeys(info.protocol for info in metrics()[name].infos)) for name in options.metrics}
    for protocol in options.protocols:
        if not any(protocol in protocols for protocols in known.values()):
            have = "; ".join(f"{name} has {', '.join(protocols)}" for name, protocols in known.items())
            raise UserError(f"no requested metric has the protocol {protocol!r}: {have}")


def selection(recipe: ProbeRunRecipe, blocks: int, options: Options, metric: str | None = None) -> Selection:
    """Selects layers, probes and controls to score.

    Args:
        recipe: of the run.
        blocks: decoder blocks of the checkpoint.
        options: the request.
        metric: whose defaults to use.

    Raises:
        UserError: the run was made without one of them.
    """
    probed = parse_layers(recipe.layers, blocks)
    layers = parse_layers(options.layers, blocks) if options.layers else probed
    available = {
        "layer": [layer_name(layer) for layer in probed],
        "probe": [p for p in PROBES if p == "resampler" or recipe.fit.ridge],
        "control": ["none", *recipe.controls, *SUBSTITUTES],
    }
    expensive = metric is not None and metrics()[metric].expensive
    chosen = {
        "layer": [layer_name(layer) for layer in layers],
        "probe": options.probes or (["resampler"] if expensive else available["probe"]),
        "control": options.controls or (["none"] if expensive else ["none", *recipe.controls]),
    }
    for what, names in chosen.items():
        for name in names:
            if name not in available[what]:
                raise UserError(f"this run has no {what} {name!r}; it has {', '.join(available[what])}")
    return Selection(tuple(layers), tuple(chosen["probe"]), tuple(chosen["control"]))


def _record_all(context: EvaluationContext) -> None:
    """Runs the passes that lack a score or picture, then finishes each metric."""
    run, options = context.run, context.options
    blocks = run.manifest["checkpoint"]["layers"]
    chosen = [(metrics()[name], selection(run.recipe, blocks, options, name)) for name in options.metrics]
    for recorded in (metric(context) for metric, _ in chosen if metric.recorded):
        file = score_file(run.path, recorded.stem, run.recipe.data.train_split)
        if not file.exists():  # training does not change after its end
            scores = recorded.read()
            with disk_errors(run.path):
                scores.write(file)
    scored = [(metric(context), selected) for metric, selected in chosen if not metric.recorded]
    jobs: list[Job] = [*scored]
    if options.pictures:
        teachers = dict.fromkeys(metric.teacher for metric, _ in chosen if metric.teacher in PICTURES)
        shown = replace(selection(run.recipe, blocks, options), controls=("none",))
        jobs += [(PICTURES[teacher](context, teacher), shown) for teacher in teachers]
    for control in PASSES:
        _run_passes(context, control, [(recorder, selected.in_pass(control)) for recorder, selected in jobs])
    for metric, selected in scored:
        file = score_file(run.path, metric.stem, metric.images.split)
        if not file.exists():  # nothing was selected, such as the ridge readout of captions
            continue
        scores = ScoreFile.read(file)
        table = {key: values for key, values in scores.table.items() if selected.includes(key)}
        metric.finish(replace(scores, table=table))


def _run_passes(context: EvaluationContext, control: str, jobs: Iterable[Job]) -> None:
    """Runs the model with one set of weights, shown one kind of input, for every job that lacks a layer."""
    run = context.run
    due: dict[str, Job] = {}
    for recorder, selected in jobs:
        if not selected.controls:
            continue
        file = score_file(run.path, recorder.stem, recorder.images.split)
        existing = read_if_fits(file, _settings(recorder))
        missing = _missing(run, recorder, selected, {*existing.table, *existing.sums} if existing else set())
        if missing.layers:
            due[recorder.stem] = recorder, missing
        else:
            logger.info("%s exists; remove it to score again", file)
            _pass_state(run, recorder, control).unlink(missing_ok=True)  # of a process killed before it removed it
    if not due:
        return
    backbone = load_run_backbone(run.recipe, control, context.device)
    now = describe_inputs(
        backbone.identity, context.teachers, run.recipe.data.view, {"held-out images": context.images.digest()}
    )
    if any("caption" in selected.controls for _, selected in due.values()):
        now |= vocabulary(backbone.identity)  # captions are tokenized like no other text of the run
    require_same(run.manifest, now, run.path, "put it back, or train a new run")
    for recorder, selected in due.values():
        _run_pass(context, control, backbone, recorder, selected)
    del backbone
    gc.collect()


def _settings(recorder: Recorder) -> str:
    return f"{__version__} {recorder.settings}"


def _missing(run: Run, recorder: Recorder, selected: Selection, existing: set[ScoreKey]) -> Selection:
    """Drops the layers of which all series exist."""
    probed, seeds = bank_layers(run.probes("none")), run.recipe.fit.seeds
    layers = tuple(
        layer
        for layer in selected.layers
        if not existing.issuperset(
            replace(key, metric=metric, protocol=protocol)
            for teacher in recorder.teachers
            if layer_name(layer) in probed[teacher]
            for key in selected.keys(layer, teacher, seeds)
            for metric, protocol in recorder.series
        )
    )
    return replace(selected, layers=layers)


def _pass_state(run: Run, recorder: Recorder, control: str) -> Path:
    return run.path / "state" / "evaluate" / f"{recorder.stem.replace('/', '-')}-{control}.safetensors"


def _run_pass(
    context: EvaluationContext, control: str, backbone: Backbone, recorder: Recorder, selected: Selection
) -> None:
    """Runs one pass from its last saved state, and adds what it records to the file of the recorder.

    Raises:
        UserError: no image can be read, or the disk is full.
        Interrupted: Ctrl-C or SIGTERM; the state is saved.
    """
    run, images, settings = context.run, recorder.images, _settings(recorder)
    caches = {} if recorder.uses_pixels else context.target_caches
    prepare: Any = backbone.prepare if control != "caption" else caption_inputs(backbone.prepare, run.recipe.backbone)
    shown = substitute(control, images) if control in SUBSTITUTES else None
    teachers = {name: teacher.prepare for name, teacher in recorder.teachers.items()}
    view, workers = run.recipe.data.view, run.recipe.fit.workers

    resumable = Resumable(
        f"{recorder.stem.removeprefix('scores/')} ({'checkpoint' if control == 'none' else control})",
        _pass_state(run, recorder, control),
        f"{settings} {','.join(map(layer_name, selected.layers))} {selected.probes} {selected.controls}",
        run.recipe.fit.save_minutes,
    )
    accumulator = gather(
        images,
        context.micro_batch,
        lambda plan: micro_batches(
            MicroBatches(images, plan, prepare, teachers, view, target_caches=caches, replace=shown),
            workers,
            backbone.device,
        ),
        ProbePass(run, control, backbone, recorder, selected),
        resumable,
    )
    scores = accumulator.file(images.split, settings)
    if not scores.names:
        raise UserError(f"no image of {images.split} could be read; check {images.folder}")
    report_not_finite(scores.left_out(), scores.names, len(scores.names), control)
    left_out = not_finite_rows(scores.left_out(), scores.names, scores.split, control)
    file = score_file(run.path, recorder.stem, images.split)
    if existing := read_if_fits(file, settings):
        scores.merge(existing, images.names)
    skipped = list(accumulator.skipped.values())
    if control in SUBSTITUTES:  # the image itself may be readable
        skipped = [replace(skip, reason=f"{skip.reason} ({control})") for skip in skipped]
    with disk_errors(run.path):
        scores.write(file)
        _update_manifest(run, [*images.skipped, *skipped], left_out)
        resumable.file.unlink(missing_ok=True)


def _update_manifest(run: Run, skipped: Sequence[Skipped], not_finite: Sequence[dict[str, str]]) -> None:
    """Adds held-out images that could not be read, or were left out of some layers, to the manifest."""
    manifest = run.manifest
    known = {(s["image"], s["split"]) for s in manifest["skipped"]}
    recorded = manifest.get("not_finite", [])
    manifest["skipped"] += (new := [vars(s) for s in skipped if (s.image, s.split) not in known])
    manifest["not_finite"] = recorded + (left_out := [row for row in not_finite if row not in recorded])
    if new or left_out:
        write_text(run.path / "manifest.json", json.dumps(manifest, indent=2) + "\n")
