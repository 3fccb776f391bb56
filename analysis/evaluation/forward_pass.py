"""One pass of a split's images through one set of backbone weights; every layer's probes are scored on the way."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.evaluation.scorer import Row, Scorer
from analysis.evaluation.scores import ScoreFile, ScoreKey, read_if_fits
from probing.data.coco import ImageList, Skipped
from probing.data.dataloader import MicroBatches, Prepared, micro_batches
from probing.data.input_controls import SUBSTITUTES, caption_inputs, substitute
from probing.data.target_cache import TargetCache
from probing.models import Backbone, Layer, layer_name
from probing.models.base import Batch
from probing.models.finite import finite_rows, zero_others
from probing.probes.bank import ProbeBank
from probing.probes.ridge import RidgeReadout, place_states
from probing.runs.directory import Run
from probing.training.convergence import NOT_TRAINED
from probing.utils.files import disk_errors
from probing.utils.interrupt import Interrupted, Interruption
from probing.utils.progress import Progress

logger = logging.getLogger(__name__)

PROBES = ("resampler", "ridge")
ARMS = ("none", "random", *SUBSTITUTES)
"""Passes of their own: the checkpoint, the same with random weights, and the checkpoint shown something else."""
WITHOUT_RIDGE = ("shuffled", "caption")
"""Controls without a ridge readout: it is not trained on shuffled pairs, and a caption has no places."""


@dataclass(frozen=True)
class Selection:
    """What to score.

    Attributes:
        layers: some of those that were probed.
        probes: some of `PROBES`.
        controls: some of `none`, `shuffled`, `random`, and of `probing.data.input_controls.SUBSTITUTES`.
    """

    layers: tuple[Layer, ...]
    probes: tuple[str, ...]
    controls: tuple[str, ...]

    def arm(self, arm: str) -> "Selection":
        """The part that is scored on one set of backbone weights, shown one kind of input."""
        mine = [c for c in self.controls if (c if c in ARMS else "none") == arm]
        return Selection(self.layers, self.probes, tuple(mine))

    def lacking(
        self, scorer: Scorer, seeds: Sequence[int], probed: dict[str, list[str]], there: set[ScoreKey]
    ) -> "Selection":
        """The same with only those layers of which a curve is missing; `probed` names the layers of each teacher."""

        def curves(layer: Layer) -> Iterable[ScoreKey]:
            for teacher in (name for name in scorer.teachers if layer_name(layer) in probed[name]):
                for metric, protocol in scorer.measures(teacher):
                    place = {"teacher": teacher, "layer": layer_name(layer), "metric": metric, "protocol": protocol}
                    for control in self.controls:
                        if "resampler" in self.probes:
                            yield from (ScoreKey(probe="resampler", control=control, seed=s, **place) for s in seeds)
                        if "ridge" in self.probes and control not in WITHOUT_RIDGE:
                            yield ScoreKey(probe="ridge", control=control, seed=seeds[0], **place)

        layers = tuple(layer for layer in self.layers if not there.issuperset(curves(layer)))
        return Selection(layers, self.probes, self.controls)


def _trained(control: str) -> str:
    """The control whose probes are scored: what is shown in place of the image is new to those of the checkpoint."""
    return "none" if control in SUBSTITUTES else control


@dataclass
class Tally:
    """What a pass has gathered so far."""

    scores: dict[ScoreKey, list[Tensor]] = field(default_factory=dict)
    sums: dict[ScoreKey, Tensor] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    skipped: dict[str, Skipped] = field(default_factory=dict)
    not_finite: dict[str, list[int]] = field(default_factory=dict)
    done: int = 0

    def note(self, curve: ScoreKey, values: Tensor, summed: bool, finite: Tensor | None = None) -> None:
        """Adds what one batch scored.

        Args:
            curve: what the scores belong to.
            values: (B, …), per image.
            summed: whether only their sum is kept.
            finite: (B), False for images that do not count: their scores are NaN (pictures: 0), and no part of a sum.
        """
        if finite is not None and not bool(finite.all()):
            finite = finite.to(values.device)
            if summed or values.dtype in (torch.uint8, torch.float16):
                values = zero_others(values, finite)
            else:
                values = values.clone() if values.is_floating_point() else values.double()
                values[~finite] = torch.nan
        if summed:
            total = values.sum(dim=0)
            self.sums[curve] = self.sums[curve] + total if curve in self.sums else total
        else:
            narrow = {torch.float64: torch.float32, torch.int64: torch.int32}
            self.scores.setdefault(curve, []).append(values.to("cpu", narrow.get(values.dtype, values.dtype)))

    def leave_out(self, kind: str, name: str, finite: Tensor) -> None:
        """Notes the images of the batch at hand (B) whose features of a `layer` or `teacher` are not finite."""
        if not bool(finite.all()):
            first = len(self.names) - len(finite)
            rows = (first + (~finite).nonzero().flatten().cpu()).tolist()
            self.not_finite.setdefault(f"{kind} {name}", []).extend(rows)

    def file(self, split: str, settings: str) -> ScoreFile:
        """Everything so far, ready to be written."""
        table = {curve: torch.cat(parts).numpy() for curve, parts in self.scores.items()}
        sums = {curve: total.cpu().numpy() for curve, total in self.sums.items()}
        skipped = [[s.image, s.split, s.reason] for s in self.skipped.values()]
        return ScoreFile(table, self.names, split, settings, sums, self.done, skipped, self.not_finite)

    @classmethod
    def resumed(cls, found: ScoreFile, device: torch.device) -> "Tally":
        """The inverse of `file`."""
        scores = {curve: [torch.from_numpy(values)] for curve, values in found.table.items()}
        sums = {curve: torch.from_numpy(total).to(device) for curve, total in found.sums.items()}
        skipped = {row[0]: Skipped(*row) for row in found.skipped}
        return cls(scores, sums, found.names, skipped, found.not_finite, found.done)


def score_arm(
    run: Run,
    arm: str,
    backbone: Backbone,
    scorer: Scorer,
    selection: Selection,
    batch: int,
    settings: str,
    kept: Mapping[str, TargetCache],
) -> ScoreFile:
    """Scores what was trained on one set of backbone weights, from the last saved state where there is one.

    Args:
        run: the run.
        arm: one of `ARMS`.
        backbone: with the weights of that arm.
        scorer: the metric.
        selection: layers, probes and controls.
        batch: images per forward pass.
        settings: what the scores depend on besides the run.
        kept: features of teachers that are read instead of being computed, where the metric needs nothing else of them.

    Returns:
        The scores, with the images that could not be read.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the state is saved.
    """
    selection = selection.arm(arm)
    asked = f"{settings} {','.join(map(layer_name, selection.layers))} {selection.probes} {selection.controls}"
    predict = _Predictor(run, arm, backbone, scorer, selection)
    prepare = {name: teacher.prepare for name, teacher in scorer.teachers.items()}

    student: Any = backbone.prepare
    if arm == "caption":
        student = caption_inputs(student, run.recipe.backbone)
    show = substitute(arm, scorer.images) if arm in SUBSTITUTES else None

    def read(plan: list[list[int]]) -> Iterator[Prepared]:
        view, workers = run.recipe.data.view, run.recipe.fit.workers
        dataset = MicroBatches(scorer.images, plan, student, prepare, view, target_caches=kept or {}, replace=show)
        return micro_batches(dataset, workers, backbone.device)

    what = f"{scorer.stem.removeprefix('scores/')} ({'checkpoint' if arm == 'none' else arm})"
    resumable = Resumable(pass_state(run, scorer, arm), asked, run.recipe.fit.save_minutes)
    tally = gather(what, scorer.images, batch, read, predict, resumable, backbone.device)
    return tally.file(scorer.images.split, settings)


@dataclass(frozen=True)
class Resumable:
    """Where an unfinished pass is kept.

    Attributes:
        file: the state.
        asked: what it depends on; the state of another pass is not used.
        minutes: between saved states.
    """

    file: Path
    asked: str
    minutes: float


def gather(
    what: str,
    images: ImageList,
    batch: int,
    read: Callable[[list[list[int]]], Iterator[Prepared]],
    each: Callable[[Prepared, Tally], None],
    resumable: Resumable,
    device: torch.device,
) -> Tally:
    """Goes through a split once, from the last saved state where there is one.

    Args:
        what: is done, for the progress bar.
        images: of the split.
        batch: images per forward pass.
        read: image indices of each batch → the batches.
        each: scores one batch.
        resumable: where the state is kept; the caller removes it once the scores are safe.
        device: of sums.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the state is saved.
    """
    saved = read_if_fits(resumable.file, resumable.asked)
    tally = Tally.resumed(saved, device) if saved else Tally()
    if saved:
        logger.info("%s: going on after %d images", what, tally.done)
    plan = [list(range(i, min(i + batch, len(images)))) for i in range(tally.done, len(images), batch)]
    if not plan:
        return tally  # interrupted after its last batch
    last = time.monotonic()
    with torch.no_grad(), Interruption().watch() as interruption, Progress(what, len(plan), unit="batches") as bar:
        for indices, prepared in zip(plan, read(plan), strict=True):
            tally.skipped |= {skip.image: skip for skip in prepared.skipped}
            if prepared.student is not None:
                tally.names += [images.names[index] for index in prepared.indices]
                each(prepared, tally)
            tally.done += len(indices)
            bar.advance()
            due = time.monotonic() - last >= 60 * resumable.minutes
            if interruption.asked or (due and tally.done < len(images)):
                with disk_errors(resumable.file.parent):
                    tally.file(images.split, resumable.asked).write(resumable.file)
                last = time.monotonic()
                if interruption.asked:
                    raise Interrupted
    return tally


def pass_state(run: Run, scorer: Scorer, arm: str) -> Path:
    """Where an unfinished pass is kept."""
    return run.path / "state" / "evaluate" / f"{scorer.stem.replace('/', '-')}-{arm}.safetensors"


class _Predictor:
    """Everything that predicts from the states of one arm, and hands its predictions to the scorer."""

    def __init__(self, run: Run, arm: str, backbone: Backbone, scorer: Scorer, selection: Selection) -> None:
        device = backbone.device
        self.run, self.arm, self.backbone, self.scorer, self.selection = run, arm, backbone, scorer, selection
        resampled, layers = "resampler" in selection.probes, ",".join(map(layer_name, selection.layers))
        self.banks = {
            control: ProbeBank.load(run.probes(_trained(control)), device, scorer.teachers, layers)
            for control in (selection.controls if resampled else ())
        }
        ridged = "ridge" in selection.probes and arm in selection.controls and arm not in WITHOUT_RIDGE
        self.ridge = RidgeReadout.load(run.ridge(_trained(arm)), device) if ridged else RidgeReadout({})
        self.means = run.mean_targets(device)
        rows = [row for row in run.manifest.get("convergence", []) if row["state"] == NOT_TRAINED]
        self.untrained = {(row["control"], row["teacher"], row["layer"], row["seed"]) for row in rows}

    def __call__(self, prepared: Prepared, tally: Tally) -> None:
        """Scores one batch."""
        assert prepared.student is not None
        scorer, seed = self.scorer, self.run.recipe.fit.seeds[0]
        targets = {name: prepared.target(teacher) for name, teacher in scorer.teachers.items()}
        finite = {name: finite_rows(target) for name, target in targets.items()}
        targets = {name: zero_others(target, finite[name]) for name, target in targets.items()}
        for name, rows_of in finite.items():
            tally.leave_out("teacher", name, rows_of)
        context = scorer.begin(prepared, targets)
        batch = prepared.student.to(self.backbone.device)

        def note(place: tuple[str, str, str, str], seed: int, rows: Iterable[Row], counted: Tensor) -> None:
            for metric, protocol, values in rows:
                tally.note(ScoreKey(*place, metric, protocol, seed=seed), values, metric in scorer.summed, counted)

        def predicted(teacher: str, layer: str, probe: str, control: str, seed: int, prediction: Tensor) -> None:
            counted = finite_rows(prediction) & finite[teacher].to(prediction.device)
            rows = scorer.score(teacher, zero_others(prediction, counted), context)
            note((teacher, layer, probe, control), seed, rows, counted)

        def visit(layer: Layer, hidden: Tensor) -> None:
            with torch.no_grad():
                tally.leave_out("layer", layer_name(layer), self._layer(layer, hidden, batch, predicted))

        self.backbone.stream(batch, self.selection.layers, visit)
        if self.arm == "none":
            for name, target in targets.items():
                predicted(name, "", "constant", "mean", seed, self.means[name].expand_as(target))
            for name, probe, control, rows in scorer.references(targets, context):
                note((name, "", probe, control), seed, rows, finite[name])

    def _layer(self, layer: Layer, hidden: Tensor, batch: Batch, predicted: Callable[..., None]) -> Tensor:
        """Scores one layer; returns which images have finite states there, (B)."""
        scorer, device, where = self.scorer, self.backbone.device, layer_name(layer)
        selected: dict[tuple[str, ...], tuple[Tensor, Tensor | None]] = {}
        finite = torch.ones(len(hidden), dtype=torch.bool, device=device)
        for control, bank in self.banks.items():
            for key, probe in bank.at(layer):
                kinds = tuple(bank.keys[key.teacher])
                if kinds not in selected:
                    selected[kinds] = batch.tokens.select(hidden.to(device).float(), kinds)
                    finite &= finite_rows(selected[kinds][0])
                prediction = probe(*selected[kinds])
                if (_trained(control), key.teacher, where, key.seed) in self.untrained:
                    prediction = torch.full_like(prediction, torch.nan)
                predicted(key.teacher, where, "resampler", control, key.seed, prediction)
        if not self.ridge.maps:
            return finite
        image_states = batch.tokens.image_states(hidden.to(device))
        finite &= finite_rows(image_states)
        for teacher, weight, bias in self.ridge.at(layer):
            if teacher in scorer.teachers:
                placed = place_states(image_states, batch.tokens.grid, scorer.teachers[teacher].grid)
                seed = self.run.recipe.fit.seeds[0]
                predicted(teacher, where, "ridge", self.arm, seed, F.linear(placed, weight, bias))
        return finite
