"""One pass of a split's images through the model; every layer's probes are scored while its states exist."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.evaluation.registry import EvaluationBatch, Recorder
from analysis.evaluation.scores import ScoreFile, ScoreKey, read_if_fits
from probing.data.coco import ImageList, Skipped
from probing.data.dataloader import Prepared
from probing.data.input_substitutes import SUBSTITUTES
from probing.models import Backbone, Layer, layer_name
from probing.models.finite import finite_rows, zero_others
from probing.models.token_map import TokenMap
from probing.probes.bank import ProbeBank
from probing.probes.ridge import RidgeReadout, resize_states
from probing.runs.directory import Run
from probing.training.convergence import NOT_TRAINED
from probing.utils.files import disk_errors
from probing.utils.interrupt import Interrupted, Interruption
from probing.utils.progress import Progress

logger = logging.getLogger(__name__)

PROBES = ("resampler", "ridge")
PASSES = ("none", "random", *SUBSTITUTES)
"""Controls that need a forward pass: the checkpoint, the same with random weights, and other inputs."""
WITHOUT_RIDGE = ("shuffled", "caption")
"""Controls without ridge readout: it is not trained on shuffled pairs, and a caption has no image positions."""

Kinds = tuple[str, ...]
"""Kinds of tokens that a probe reads."""
ProbeInputs = dict[Kinds, tuple[Tensor, Tensor | None]]
IMAGE: Kinds = ()
"""Names the image tokens in their grid, which the ridge readout reads."""


@dataclass(frozen=True)
class Selection:
    """What to score.

    Attributes:
        layers: some of the probed layers.
        probes: some of `PROBES`.
        controls: some of `shuffled` and `PASSES`.
    """

    layers: tuple[Layer, ...]
    probes: tuple[str, ...]
    controls: tuple[str, ...]

    def in_pass(self, control: str) -> "Selection":
        """Returns the part that is scored in one of `PASSES`; shuffled pairs are in that of the checkpoint."""
        return replace(self, controls=tuple(c for c in self.controls if (c if c in PASSES else "none") == control))

    def keys(self, layer: Layer, teacher: str, seeds: Sequence[int]) -> Iterator[ScoreKey]:
        """Yields the keys of one layer's probes, without metric."""
        for control in self.controls:
            for probe in self.probes:
                if probe == "resampler" or control not in WITHOUT_RIDGE:
                    for seed in seeds if probe == "resampler" else seeds[:1]:
                        yield ScoreKey(teacher, layer_name(layer), probe, control, "", seed=seed)

    def includes(self, key: ScoreKey) -> bool:
        """Whether a series is selected, or belongs to no layer."""
        names = map(layer_name, self.layers)
        return not key.layer or (key.layer in names and key.probe in self.probes and key.control in self.controls)


def trained_control(control: str) -> str:
    """Returns the control whose probes are scored: other inputs are given to those of the checkpoint."""
    return "none" if control in SUBSTITUTES else control


def to_cpu(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies tensors to the CPU, those of one device and dtype in a single transfer."""
    found = list(tensors)
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        if tensor.device.type != "cpu":
            groups.setdefault((tensor.device, tensor.dtype), []).append(index)
    for places in groups.values():
        some = [tensors[index] for index in places]
        copied = torch.cat([tensor.flatten() for tensor in some]).cpu().split([tensor.numel() for tensor in some])
        for index, tensor, part in zip(places, some, copied, strict=True):
            found[index] = part.view(tensor.shape)
    return found


@dataclass
class ScoreAccumulator:
    """Values that a pass has computed so far.

    Attributes:
        scores: batches of values per image.
        sums: series that are stored as one sum.
        names: images scored.
        skipped: images that could not be read, by name.
        not_finite: as in `ScoreFile`.
        done: images processed, readable or not.
        pending: values of the current batch, on their device, and which of its images are finite.
        left_out: places where images of the current batch may not be finite, its first row, and which images are.
    """

    scores: dict[ScoreKey, list[Tensor]] = field(default_factory=dict)
    sums: dict[ScoreKey, Tensor] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    skipped: dict[str, Skipped] = field(default_factory=dict)
    not_finite: dict[str, list[int]] = field(default_factory=dict)
    done: int = 0
    pending: list[tuple[ScoreKey, Tensor, Tensor]] = field(default_factory=list)
    left_out: list[tuple[str, int, Tensor]] = field(default_factory=list)

    def add(self, key: ScoreKey, values: Tensor, finite: Tensor, summed: bool = False) -> None:
        """Adds the values of one batch, without waiting for the device.

        Args:
            key: of the series.
            values: (B, …), per image.
            finite: (B), False for images to leave out: their scores become NaN (pictures: 0), and no part of a sum.
            summed: store only their sum.
        """
        if summed:
            total = zero_others(values, finite.to(values.device)).sum(dim=0)
            self.sums[key] = total + self.sums[key].to(total.device) if key in self.sums else total
        else:
            narrow = {torch.float64: torch.float32, torch.int64: torch.int32}
            self.pending.append((key, values.to(narrow.get(values.dtype, values.dtype)), finite))

    def leave_out(self, kind: str, name: str, finite: Tensor) -> None:
        """Records the images of the current batch (B) whose features of a `layer` or `teacher` are not finite."""
        self.left_out.append((f"{kind} {name}", len(self.names) - len(finite), finite))

    def settle(self) -> None:
        """Moves what a batch has added to the CPU; the host waits for the device here, once per dtype."""
        values = to_cpu([values for _, values, _ in self.pending])
        masks = to_cpu([*(finite for *_, finite in self.pending), *(finite for *_, finite in self.left_out)])
        for (key, *_), own, finite in zip(self.pending, values, masks, strict=False):
            if not finite.all():
                if own.dtype in (torch.uint8, torch.float16):
                    own = zero_others(own, finite)
                else:
                    own = torch.where(finite.view(-1, *[1] * (own.dim() - 1)), own.float(), torch.nan)
            self.scores.setdefault(key, []).append(own)
        for (place, first, _), finite in zip(self.left_out, masks[len(self.pending) :], strict=True):
            if not finite.all():
                self.not_finite.setdefault(place, []).extend((first + (~finite).nonzero().flatten()).tolist())
        self.pending, self.left_out = [], []

    def file(self, split: str, settings: str) -> ScoreFile:
        """Returns everything in the form of a file."""
        table = {key: torch.cat(parts).numpy() for key, parts in self.scores.items()}
        sums = {key: total.cpu().numpy() for key, total in self.sums.items()}
        skipped = [[s.image, s.split, s.reason] for s in self.skipped.values()]
        return ScoreFile(table, self.names, split, settings, sums, self.done, skipped, self.not_finite)

    @classmethod
    def from_file(cls, saved: ScoreFile) -> "ScoreAccumulator":
        """Inverts `file`."""
        scores = {key: [torch.from_numpy(values)] for key, values in saved.table.items()}
        sums = {key: torch.from_numpy(total) for key, total in saved.sums.items()}
        skipped = {row[0]: Skipped(*row) for row in saved.skipped}
        return cls(scores, sums, saved.names, skipped, saved.not_finite, saved.done)


@dataclass(frozen=True)
class Resumable:
    """State of an unfinished pass.

    Attributes:
        title: of the pass, for the progress bar.
        file: where it is saved.
        settings: what it depends on; a state with other settings is ignored.
        minutes: between saves.
    """

    title: str
    file: Path
    settings: str
    minutes: float


def gather(
    images: ImageList,
    batch: int,
    read: Callable[[list[list[int]]], Iterator[Prepared]],
    score: Callable[[Prepared, ScoreAccumulator], None],
    resumable: Resumable,
) -> ScoreAccumulator:
    """Scores every image of a split, from the last saved state if there is one.

    Args:
        images: of the split.
        batch: images per forward pass.
        read: image indices of each batch → the batches.
        score: scores one batch.
        resumable: saved state; the caller removes it once the scores are written.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the state is saved.
    """
    saved = read_if_fits(resumable.file, resumable.settings)
    scores = ScoreAccumulator.from_file(saved) if saved else ScoreAccumulator()
    if saved:
        logger.info("%s: resuming after %d images", resumable.title, scores.done)
    plan = [list(range(i, min(i + batch, len(images)))) for i in range(scores.done, len(images), batch)]
    if not plan:
        return scores  # interrupted after its last batch
    last = time.monotonic()
    bar = Progress(resumable.title, len(plan), unit="batches")
    with torch.no_grad(), Interruption().watch() as interruption, bar:
        for indices, prepared in zip(plan, read(plan), strict=True):
            scores.skipped |= {skip.image: skip for skip in prepared.skipped}
            if prepared.student is not None:
                scores.names += [images.names[index] for index in prepared.indices]
                score(prepared, scores)
                scores.settle()
            scores.done += len(indices)
            bar.advance()
            due = time.monotonic() - last >= 60 * resumable.minutes
            if interruption.requested or (due and scores.done < len(images)):
                with disk_errors(resumable.file.parent):
                    scores.file(images.split, resumable.settings).write(resumable.file)
                last = time.monotonic()
                if interruption.requested:
                    raise Interrupted
    return scores


class ProbePass:
    """Scores the probes of every selected layer on one batch after the other.

    Args:
        run: its probes, ridge readouts and mean targets are scored.
        control: one of `PASSES`.
        backbone: the model, with the weights of that control.
        recorder: computes the scores.
        selection: layers, probes and controls of this pass.
    """

    def __init__(self, run: Run, control: str, backbone: Backbone, recorder: Recorder, selection: Selection) -> None:
        device, layers = backbone.device, ",".join(map(layer_name, selection.layers))
        self.control, self.backbone, self.recorder, self.selection = control, backbone, recorder, selection
        self.seed = run.recipe.fit.seeds[0]
        self.banks = {
            name: ProbeBank.load(run.probes(trained_control(name)), device, recorder.teachers, layers)
            for name in (selection.controls if "resampler" in selection.probes else ())
        }
        has_ridge = "ridge" in selection.probes and control in selection.controls and control not in WITHOUT_RIDGE
        self.ridge = RidgeReadout.load(run.ridge(trained_control(control)), device) if has_ridge else RidgeReadout({})
        self.means = run.mean_targets(device)
        rows = [row for row in run.manifest.get("convergence", []) if row["state"] == NOT_TRAINED]
        self.untrained = {(row["control"], row["teacher"], row["layer"], row["seed"]) for row in rows}

    def __call__(self, prepared: Prepared, scores: ScoreAccumulator) -> None:
        """Scores one batch."""
        assert prepared.student is not None
        recorder = self.recorder
        targets = {name: prepared.target(teacher) for name, teacher in recorder.teachers.items()}
        finite = {name: finite_rows(target) for name, target in targets.items()}
        for name, rows in finite.items():
            scores.leave_out("teacher", name, rows)
            targets[name] = zero_others(targets[name], rows)
        names = [recorder.images.names[index] for index in prepared.indices]
        batch = EvaluationBatch(prepared.indices, names, prepared.pixels, targets)
        batch = replace(batch, extra=recorder.prepare(batch))

        def add(key: ScoreKey, values: dict[tuple[str, str], Tensor], counted: Tensor) -> None:
            for (metric, protocol), value in values.items():
                key = replace(key, metric=metric, protocol=protocol)
                scores.add(key, value, counted, metric in recorder.summed)

        def score(key: ScoreKey, prediction: Tensor) -> None:
            counted = finite_rows(prediction) & finite[key.teacher].to(prediction.device)
            add(key, recorder.update(key.teacher, zero_others(prediction, counted), batch), counted)

        inputs = prepared.student.to(self.backbone.device)

        @torch.no_grad()
        def visit(layer: Layer, hidden: Tensor) -> None:
            hidden = hidden.to(self.backbone.device)
            states = self._probe_inputs(layer, hidden, inputs.tokens)
            everything = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
            rows = [everything, *(finite_rows(own) for own, _ in states.values())]
            scores.leave_out("layer", layer_name(layer), torch.stack(rows).all(dim=0))
            for key, prediction in self._predictions(layer, states, inputs.tokens.grid):
                score(key, prediction)

        self.backbone.stream(inputs, self.selection.layers, visit)
        if self.control == "none":
            for teacher, target in targets.items():
                key = ScoreKey(teacher, "", "constant", "mean", "", seed=self.seed)
                score(key, self.means[teacher].expand_as(target))
                for probe, control, values in recorder.references(teacher, batch):
                    add(replace(key, probe=probe, control=control), values, finite[teacher])

    def _probe_inputs(self, layer: Layer, hidden: Tensor, tokens: TokenMap) -> ProbeInputs:
        """Selects states (B, n, H) and their mask by the kinds of tokens that a probe reads; `IMAGE` for the ridge."""
        kinds = {tuple(bank.keys[key.teacher]) for bank in self.banks.values() for key, _ in bank.at(layer)}
        states = {some: tokens.select(hidden.float(), some) for some in kinds}
        return states | ({IMAGE: (tokens.image_states(hidden), None)} if self.ridge.maps else {})

    def _predictions(
        self, layer: Layer, states: ProbeInputs, grid: tuple[int, int]
    ) -> Iterator[tuple[ScoreKey, Tensor]]:
        """Yields the prediction (B, N, D) of every probe of a layer."""
        name = layer_name(layer)
        for control, bank in self.banks.items():
            for key, probe in bank.at(layer):
                prediction = probe(*states[tuple(bank.keys[key.teacher])])
                if (trained_control(control), key.teacher, name, key.seed) in self.untrained:
                    prediction = torch.full_like(prediction, torch.nan)
                yield ScoreKey(key.teacher, name, "resampler", control, "", seed=key.seed), prediction
        for teacher, weight, bias in self.ridge.at(layer):
            if teacher in self.recorder.teachers:
                placed = resize_states(states[IMAGE][0], grid, self.recorder.teachers[teacher].grid)
                yield ScoreKey(teacher, name, "ridge", self.control, "", seed=self.seed), F.linear(placed, weight, bias)
