"""The two passes of `probing align`: expensive measures on a sample, the others on all images."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.alignment.context import AlignmentContext
from analysis.alignment.metrics.anisotropy import Anisotropy
from analysis.alignment.metrics.attention import ImageAttention, can_watch
from analysis.alignment.metrics.base import (
    LAYER,
    RANDOM,
    TEACHER,
    TOWER,
    LabelledBatch,
    Measure,
    Patches,
    ScoreRow,
    States,
)
from analysis.alignment.metrics.logit_lens import LensEntropy, LensMatch
from analysis.alignment.metrics.pooled_similarity import MAX_IMAGES, PooledSimilarity
from analysis.alignment.metrics.similarity import PositionSimilarity
from analysis.alignment.metrics.sparse_codes import SparseCodes
from analysis.alignment.metrics.spectrum import Compression
from analysis.alignment.metrics.word_match import WordMatch
from analysis.evaluation.forward_pass import ScoreAccumulator
from analysis.evaluation.scores import ScoreFile
from probing.data.dataloader import Prepared
from probing.data.patch_labels import patch_labels
from probing.models import Layer, layer_name
from probing.models.finite import finite_rows, zero_others

MEAN_STATE = "mean_state"


class MeanState(Measure):
    """Sum over the sample of the images' mean states, with the number of images as last entry."""

    sources = (LAYER, RANDOM)

    def update(self, states: States, batch: LabelledBatch) -> Iterator[ScoreRow]:
        """Yields the mean states of a batch, (B, H + 1)."""
        means = F.pad(states.values.mean(dim=1), (0, 1), value=1.0)
        yield ScoreRow(states.key("tokens", MEAN_STATE), means, states.finite, summed=True)


def sample_measures(context: AlignmentContext) -> list[Measure]:
    """What is too expensive for all images, and the mean states that `centred` measures subtract."""
    measures = [MeanState(), Compression(), SparseCodes(context), PositionSimilarity(context.teachers)]
    return [*measures, LensEntropy(context)] if context.model.head is not None else measures


def all_measures(context: AlignmentContext, centres: dict[tuple[str, str], Tensor]) -> list[Measure]:
    """What is measured on all images; `centres` are the mean states by source and layer."""
    measures: list[Measure] = [WordMatch(context, centres), Anisotropy(), PooledSimilarity()]
    if context.model.head is not None:
        measures.append(LensMatch(context))
    return [*measures, ImageAttention(context.model)] if can_watch(context.model) else measures


def mean_states(sample: ScoreFile, device: torch.device) -> dict[tuple[str, str], Tensor]:
    """Mean state (H) by source and layer, over the images of the sample; NaN where no image counts."""
    means = {}
    for key, total in sample.sums.items():
        state, count = torch.from_numpy(total).to(device).split([len(total) - 1, 1])
        means[RANDOM if key.control == "random" else LAYER, key.layer] = state / count
    return means


class MeasurePass:
    """Runs the model on one batch and applies every measure to every point where it applies."""

    def __init__(self, context: AlignmentContext, measures: Sequence[Measure]) -> None:
        self.context, self.measures = context, measures
        self.sources = {source for measure in measures for source in measure.sources}

    def __call__(self, prepared: Prepared, tally: ScoreAccumulator) -> None:
        """Scores one batch."""
        assert prepared.student is not None
        context = self.context
        student = prepared.student.to(context.model.device)
        batch = self._labelled(prepared, len(tally.names))

        def visit(layer: Layer, hidden: Tensor) -> None:
            own = student.tokens.image_states(hidden.to(context.model.device)).float()
            states = States.of(LAYER, layer_name(layer), own)
            tally.leave_out("layer", states.name, states.finite)
            self._score(states, batch, tally)

        with context.projector_inputs(len(prepared.indices)) as tower, ExitStack() as watches:
            for measure in self.measures:
                watches.enter_context(measure.watch(student.tokens))
            context.model.stream(student, context.layers, visit)
        for tokens in tower:
            self._score(States.of(TOWER, TOWER, tokens), batch, tally)
            if context.random_projector is not None and 0 in context.layers:
                finite = finite_rows(tokens)
                values = context.random_projector(zero_others(tokens, finite)).float()
                finite = finite & finite_rows(values)
                self._score(States(RANDOM, "0", zero_others(values, finite), finite), batch, tally)
        if batch.pooled:
            for states in batch.targets.values():
                self._score(states, batch, tally)

    @torch.no_grad()
    def _score(self, states: States, batch: LabelledBatch, tally: ScoreAccumulator) -> None:
        for measure in self.measures:
            if states.source in measure.sources:
                for row in measure.update(states, batch):
                    tally.add(row.key, row.values, row.finite, row.summed)

    def _labelled(self, prepared: Prepared, done: int) -> LabelledBatch:
        """Adds labels and targets; `done` is the number of images so far, with those of the batch."""
        assert prepared.student is not None and prepared.annotations is not None
        device, count = self.context.model.device, len(prepared.indices)
        labels = patch_labels(prepared.annotations.flatten(0, 1).numpy(), self.context.recipe.coverage)
        shares = prepared.annotations.to(device)
        patches = Patches(shares, torch.from_numpy(labels).view(shares.shape[:2]).to(device))
        pooled = max(0, min(count, MAX_IMAGES - (done - count)))
        needed = pooled or TEACHER not in self.sources
        targets = {
            name: States.of(TEACHER, name, prepared.target(teacher))
            for name, teacher in (self.context.teachers.items() if needed else ())
        }
        return LabelledBatch(prepared.student.to(device).tokens, patches, targets, pooled)
