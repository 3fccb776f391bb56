"""The interface of a measure: it turns the states of a batch into rows of per-image scores."""

import abc
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from analysis.evaluation.scores import ScoreKey
from probing.models import TokenMap
from probing.models.finite import finite_rows, zero_others

LAYER, TOWER, RANDOM, TEACHER = "layer", "tower", "random projector", "teacher"
"""Where states come from. `tower`: the projector's input. `random projector`: the output of a re-initialised one."""


@dataclass(frozen=True)
class States:
    """Features of one batch at one point.

    Attributes:
        source: one of `LAYER`, `TOWER`, `RANDOM`, `TEACHER`.
        name: of the layer or teacher.
        values: one vector per patch, (B, P, H), float32; zero where not finite.
        finite: images whose features are all finite, (B).
    """

    source: str
    name: str
    values: Tensor
    finite: Tensor

    @classmethod
    def of(cls, source: str, name: str, values: Tensor) -> "States":
        """Masks images that are not finite."""
        finite = finite_rows(values)
        return cls(source, name, zero_others(values, finite).float(), finite)

    def key(self, group: str, metric: str, variant: str = "", control: str = "", seed: int = 0) -> ScoreKey:
        """Names a series of scores; `group` goes into the column `teacher`."""
        control = control or ("random" if self.source == RANDOM else "none")
        return ScoreKey(group, self.name, "", control, metric, variant=variant, seed=seed)


@dataclass(frozen=True)
class Patches:
    """What the patches of a batch show.

    Attributes:
        shares: fraction of each patch that each class covers, (B, P, K).
        labels: class of each patch, (B, P); -1 where no class covers enough of it.
    """

    shares: Tensor
    labels: Tensor


@dataclass(frozen=True)
class LabelledBatch:
    """What measures know about a batch besides its states.

    Attributes:
        tokens: token map of the batch.
        patches: what its patches show.
        targets: features by teacher; empty where no measure needs them.
        pooled: number of images, the first of the batch, whose mean states are compared.
    """

    tokens: TokenMap
    patches: Patches
    targets: dict[str, States]
    pooled: int


class ScoreRow(NamedTuple):
    """Scores of one batch.

    Attributes:
        key: names the series.
        values: (B, …), per image.
        finite: images that count, (B).
        summed: store the sum over images only.
    """

    key: ScoreKey
    values: Tensor
    finite: Tensor
    summed: bool = False


class Measure(abc.ABC):
    """Scores the states of one batch at one point."""

    sources: ClassVar[tuple[str, ...]] = (LAYER,)
    """Where the measure applies."""

    @abc.abstractmethod
    def update(self, states: States, batch: LabelledBatch) -> Iterator[ScoreRow]:
        """Yields the scores of a batch."""

    def watch(self, tokens: TokenMap) -> contextlib.AbstractContextManager[object]:
        """Surrounds the forward pass of a batch; override to observe more than the states."""
        return contextlib.nullcontext()
