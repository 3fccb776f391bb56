"""The ways to score predictions: each has its own images, its teacher, and what it does with a predicted feature."""

import logging
from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor

from probing.data.coco import ImageList
from probing.data.dataloader import Prepared
from probing.teachers import Teacher

logger = logging.getLogger(__name__)

Row = tuple[str, str, Tensor]
"""Metric, protocol, and what every image of the batch scores: (B), or (B, numbers)."""
Reference = tuple[str, str, str, Iterable[Row]]
"""Teacher, and the probe and control that `results.csv` names it by."""


class Scorer(Protocol):
    """One metric, or several that need the same predictions of the same images.

    Attributes:
        stem: folder and first part of the name of the file that its scores go to.
        images: what is scored.
        teachers: those whose features are predicted.
        summed: metrics of which only the sum over all images is kept.
    """

    images: ImageList
    teachers: dict[str, Teacher]
    summed: frozenset[str]

    @property
    def stem(self) -> str:
        """See above."""

    def measures(self, teacher: str) -> list[tuple[str, str]]:
        """Metric and protocol of every row that `score` gives."""

    def settings(self) -> str:
        """What the scores depend on besides the run, as text."""

    def begin(self, prepared: Prepared, targets: dict[str, Tensor]) -> Any:
        """Whatever all predictions for one batch are scored with."""

    def score(self, teacher: str, prediction: Tensor, context: Any) -> Iterable[Row]:
        """Scores a prediction (B, N, D), by a probe or a constant."""

    def references(self, targets: dict[str, Tensor], context: Any) -> Iterable[Reference]:
        """What stands beside the probes: above all the teacher itself.

        Its feature decoded as a prediction is (`target`), and its own answer (`teacher`).
        """
