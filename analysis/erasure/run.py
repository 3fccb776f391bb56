"""`probing erase`: how much worse answers are predicted without what a probe could read.

Scores per image are stored and summarised as those of `probing evaluate` are.
"""

import hashlib
import itertools
import json
import logging
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analysis.erasure.answers import AddAnswer, Answer, AnsweredInputs, score_answers
from analysis.erasure.erasers import (
    CONTROLS,
    DRAWS,
    LAGS,
    SAMPLE,
    SUBSPACE,
    Components,
    EraserFit,
    EraserKey,
    Erasers,
    erase_from,
    features_at,
    load_erasers,
    save_erasers,
)
from analysis.erasure.options import PARTS, Options
from analysis.erasure.replay import Replay, require_replay
from analysis.evaluation.forward_pass import Resumable, ScoreAccumulator, gather
from analysis.evaluation.scores import ERASED, ScoreFile, ScoreKey, read_if_fits, score_file, write_results
from analysis.evaluation.seed_group import open_runs, write_pooled
from probing import __version__
from probing.data.coco import ImageList, first_image
from probing.data.conversations import read_conversations
from probing.data.dataloader import MicroBatches, Prepared, micro_batches
from probing.data.input_substitutes import read_captions
from probing.models import FINAL, Backbone, Layer, layer_name, load_backbone, parse_layers
from probing.models.chat_templates import rendering_at, rendering_moment
from probing.models.finite import finite_rows
from probing.runs.directory import Run, runs_in
from probing.runs.recorded_inputs import describe_inputs, recorded_moment, require_same, vocabulary
from probing.teachers import Teacher, load_teachers
from probing.training.run import held_out_images, open_target_caches, training_images
from probing.utils.distributed import require_single_process
from probing.utils.errors import UserError
from probing.utils.files import disk_errors
from probing.utils.interrupt import Interrupted, Interruption
from probing.utils.progress import Progress

logger = logging.getLogger(__name__)

STEM = "scores/erase"


@dataclass(frozen=True)
class Images:
    """Images to fit on, and to measure on with prompts and answers by name."""

    fit: ImageList
    held_out: ImageList
    answers: dict[str, Answer]

    @classmethod
    def list(cls, run: Run, options: Options) -> "Images":
        """Lists them; raises UserError if no held-out image has an answer."""
        data, prompt = run.recipe.data, run.recipe.backbone.prompt
        train, held_out = training_images(data), held_out_images(data)
        if options.conversations is None:
            captions = read_captions(held_out.folder.parent, held_out.split)
            answers = {name: (prompt, caption) for name, caption in captions.items()}
        else:
            answers, conversations = {}, read_conversations(options.conversations)
            for one in conversations:
                if len(one.images) == 1:
                    answers.setdefault(Path(one.images[0]).name, (one.turns[0][1], one.turns[1][1]))
            if unused := len(conversations) - len(answers):
                logger.warning("%d conversations are not the first about an image, or not about one; not used", unused)
        names = [name for name in held_out.names if name in answers]
        if not names:
            raise UserError(f"no image of {held_out.split} has a caption or conversation; check the file")
        return cls(
            replace(train, names=train.names[: options.fit_images]),
            replace(held_out, names=names[: options.images]),
            answers,
        )

    def settings(self, options: Options) -> str:
        """Returns what scores depend on besides the run."""
        answers = [self.answers[name] for name in self.held_out.names]
        digest = hashlib.sha256(json.dumps(answers).encode()).hexdigest()
        return f"{__version__} {self.fit.digest()} {self.held_out.digest()} {digest} {options.rank}"

    def conditions(self, options: Options) -> dict[str, Any]:
        """Returns what two checkpoints must share for their scores to be compared; images are paired by name."""
        answers = hashlib.sha256(json.dumps(self.answers).encode()).hexdigest()
        return {"--rank": options.rank, "images to fit on": self.fit.digest(), "answers": answers}


def erase(path: Path, options: Options | None = None) -> Path:
    """Erases each teacher's feature at each layer of a finished run, or of every run of a folder.

    Args:
        path: the run, or a folder of runs whose checkpoints differ by their seed alone.
        options: layers, positions and images.

    Returns:
        The path of `results.csv`.

    Raises:
        UserError: the run is missing or unfinished, its inputs changed, captions or conversations are missing, the rank
            is too large, or the checkpoint has no head or cannot be resumed.
        Interrupted: Ctrl-C or SIGTERM; the same call resumes.
    """
    options = options or Options()
    device = require_single_process("erase").device
    if runs_in(path):
        runs = open_runs(path)
        for run in (run for run in runs if isinstance(run, Run)):
            logger.info("%s", run.path)
            erase(run.path, options)
        with disk_errors(path):
            return write_pooled(path, runs)
    run = Run.open(path)
    with rendering_at(recorded_moment(run.manifest)):
        _erase(run, options, device)
    with disk_errors(run.path):
        return write_results(run)


def chosen_layers(run: Run, options: Options) -> list[Layer]:
    """Returns the layers to erase from; raises UserError if the run has not probed one."""
    blocks = run.manifest["checkpoint"]["layers"]
    probed = parse_layers(run.recipe.layers, blocks)
    layers = parse_layers(options.layers, blocks) if options.layers else probed
    if missing := [layer for layer in layers if layer not in probed]:
        raise UserError(f"this run has not probed layer {missing[0]}; choose from {run.recipe.layers}")
    return layers


def require_rank(rank: int, width: int, teachers: dict[str, Teacher]) -> None:
    """Raises UserError if a state or a teacher's feature is narrower than the rank."""
    widths = {"hidden state": width} | {f"feature of {name}": one.shape[1] for name, one in teachers.items()}
    for what, size in widths.items():
        if rank > size:
            raise UserError(f"rank {rank} is above the width of the {what}, {size}; choose a smaller --rank")


def head_of(backbone: Backbone) -> torch.nn.Module:
    """Returns the output embeddings; raises UserError if there are none."""
    if backbone.head is None:
        raise UserError(f"{backbone.name} has no language-model head, so its captions have no loss; use another")
    return backbone.head


def _erase(run: Run, options: Options, device: torch.device) -> None:
    images, layers = Images.list(run, options), chosen_layers(run, options)
    settings = images.settings(options)
    file = score_file(run.path, STEM, images.held_out.split)
    existing = read_if_fits(file, settings)
    wanted = {(layer_name(layer), position) for layer in layers for position in options.places}
    if existing and wanted <= {(key.layer, key.variant) for key in existing.table}:
        logger.info("%s exists; remove it to erase again", file)
        return
    teachers = load_teachers(run.recipe.teachers, device)
    backbone = load_backbone(run.recipe.backbone, device, with_head=True)
    head_of(backbone)
    require_rank(options.rank, backbone.hidden_size, teachers)
    now = describe_inputs(backbone.identity, teachers, run.recipe.data.view, {}) | vocabulary(backbone.identity)
    require_same(run.manifest, now, run.path, "put it back, or train a new run")
    erasers_file = run.path / "state" / "erase" / "erasers.safetensors"
    fitted = f"{settings} {layers} {options.places}"
    data, fit = run.recipe.data, run.recipe.fit
    prepare = AnsweredInputs(backbone.prepare, run.recipe.backbone, rendering_moment())
    image = first_image(images.held_out, data.view)
    pairs = [(image, (run.recipe.backbone.prompt, answer)) for answer in ("yes", "a photo of nothing")]
    answered = prepare(pairs).to(backbone.device)
    require_replay(backbone, answered, layers[0])
    if not (erasers := load_erasers(erasers_file, fitted, device)):
        erasers = fit_erasers(run, images.fit, backbone, teachers, layers, options)
        with disk_errors(run.path):
            save_erasers(erasers, erasers_file, fitted)
    resumable = Resumable("erasing", erasers_file.with_name("scores.safetensors"), fitted, fit.save_minutes)
    shown = AddAnswer(images.held_out.names, images.answers, data.view)
    accumulator = gather(
        images.held_out,
        options.micro_batch or fit.micro_batch,
        lambda plan: micro_batches(
            MicroBatches(images.held_out, plan, prepare, {}, data.view, replace=shown), fit.workers, backbone.device
        ),
        ErasurePass(backbone, erasers, layers, options.places, fit.seeds[0]),
        resumable,
    )
    scores = replace(accumulator.file(images.held_out.split, settings), conditions=images.conditions(options))
    if not scores.names:
        raise UserError(f"no image of {images.held_out.split} could be read; check {images.held_out.folder}")
    warn_of_chance(backbone, scores)
    if existing:
        scores.merge(existing, images.held_out.names)
    with disk_errors(run.path):
        scores.write(file)
        resumable.file.unlink(missing_ok=True)
        erasers_file.unlink(missing_ok=True)


def warn_of_chance(backbone: Backbone, scores: ScoreFile) -> None:
    """Logs if the checkpoint predicts answers worse than a uniform guess: what raises such a loss means nothing."""
    loss = next(float(np.nanmean(values)) for key, values in scores.table.items() if key.metric == "answer_loss")
    uniform = math.log(next(head_of(backbone).parameters()).shape[0])
    if loss > uniform:
        logger.warning(
            "%s does not write such answers: their loss is %.1f, of a uniform guess %.1f; train a run with another "
            "backbone.prompt, or give --conversations",
            backbone.name, loss, uniform,
        )  # fmt: skip


def fit_erasers(
    run: Run,
    images: ImageList,
    backbone: Backbone,
    teachers: dict[str, Teacher],
    layers: list[Layer],
    options: Options,
) -> Erasers:
    """Fits the erasers of all layers, positions and teachers in one pass over training images.

    Raises:
        UserError: fewer than two training images can be read, or the prompt has no such tokens.
        Interrupted: Ctrl-C or SIGTERM; the fit starts again.
    """
    fit, size = run.recipe.fit, options.micro_batch or run.recipe.fit.micro_batch
    caches = open_target_caches(run.recipe, teachers, images)
    prepare = {name: teacher.prepare for name, teacher in teachers.items()}

    def read(count: int) -> Iterator[Prepared]:
        plan = [list(range(start, min(start + size, count))) for start in range(0, count, size)]
        dataset = MicroBatches(images, plan, backbone.prepare, prepare, run.recipe.data.view, target_caches=caches)
        batches = micro_batches(dataset, fit.workers, backbone.device)
        with Progress("fitting", len(plan), unit="batches") as bar, Interruption().watch() as interruption:
            for prepared in batches:
                if prepared.student is not None:
                    yield prepared
                bar.advance()
                if interruption.requested:
                    raise Interrupted

    means = run.mean_targets(backbone.device)
    kinds = list(dict.fromkeys(kind for position in options.places for kind in PARTS[position]))
    components = {key: Components() for key in itertools.product(kinds, teachers)}
    for prepared in read(min(SAMPLE, len(images))):
        assert prepared.student is not None
        for name, teacher in teachers.items():
            target = prepared.target(teacher)
            target = target[finite_rows(target)] - means[name].to(target.device)
            for kind in kinds:
                features = features_at(kind, target, teacher.grid, prepared.student.tokens)
                components[kind, name].add(features.flatten(0, 1))
    if not all(one.count for one in components.values()):
        raise UserError(f"no image of {images.split} can be read; check {images.folder}")
    directions = {key: one.directions(options.rank).to(backbone.device) for key, one in components.items()}
    covariances = EraserFit(backbone, teachers, layers, means, directions, min(LAGS, len(images) // 2))
    for prepared in read(len(images)):
        covariances.add(prepared)
    for (kind, _), sums in covariances.sums.items():
        if sums.images < 2 or not len(sums.start):
            raise UserError(f"too few {kind} tokens of {images.split}; choose another --position or more images")
    return covariances.solve()


@dataclass(frozen=True)
class ErasurePass:
    """Scores the answers of one batch after the other, without and with each erasure."""

    backbone: Backbone
    erasers: Erasers
    layers: Sequence[Layer]
    positions: Sequence[str]
    seed: int

    @torch.no_grad()
    def __call__(self, prepared: Prepared, scores: ScoreAccumulator) -> None:
        """Adds the scores of a batch."""
        assert prepared.student is not None
        batch, head = prepared.student.to(self.backbone.device), head_of(self.backbone)
        replay = Replay.record(self.backbone, batch, self.layers)
        ids, answer = batch.inputs["input_ids"], batch.tokens.mask("answer")

        def add(key: ScoreKey, metric: str, values: Tensor) -> None:
            scores.add(replace(key, metric=metric), values, values.isfinite())

        draw = zlib.crc32(str(prepared.indices[0]).encode()) % DRAWS
        loss, accuracy = score_answers(replay.states[FINAL], head, ids, answer)
        teachers = dict.fromkeys(key.teacher for key in self.erasers)
        for teacher in teachers:  # the same for each, so that every row of the results has a teacher
            add(ScoreKey(teacher, "", "", "none", "", "strict", seed=self.seed), "answer_loss", loss)
        for layer, position, teacher in itertools.product(self.layers, self.positions, teachers):
            row = ScoreKey(teacher, layer_name(layer), ERASED, "", "", "strict", position, self.seed)
            losses: dict[str, Tensor] = {}
            for control in CONTROLS:
                drawn = f"{SUBSPACE}{draw}" if control == SUBSPACE else control
                erasers = {kind: self.erasers[EraserKey(kind, teacher, row.layer, drawn)] for kind in PARTS[position]}
                rank = sum(len(one.proj_right) for one in erasers.values())
                after, right = loss, accuracy
                if rank:
                    state = erase_from(replay.states[layer], batch.tokens, erasers)
                    after, right = score_answers(replay.final_from(layer, state), head, ids, answer)
                losses[control] = after
                own = replace(row, control=control)
                add(own, "erased_loss", after - loss)
                add(own, "erased_accuracy", right - accuracy)
                if control == "none":
                    add(own, "erased_rank", torch.full_like(loss, rank))
            add(replace(row, control="none"), "erased_excess", losses["none"] - losses[SUBSPACE])
