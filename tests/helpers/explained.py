"""Share of a target's variance about the training split's mean that a prediction explains, image by image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analysis.evaluation.registry import EvaluationBatch, Metric, MetricInfo, Series, register

if TYPE_CHECKING:
    from torch import Tensor


@register
class Explained(Metric):
    """1 - |prediction - target|² / |mean target - target|²."""

    name = "explained"
    help = "share of the target's variance that is explained"
    infos = (
        MetricInfo(
            "explained",
            "strict",
            "explained variance",
            "Share of the target's variance that is explained; the mean target scores 0, the target itself 1.",
            chance=0.0,
            digits=2,
            column=4,
        ),
    )

    def update(self, teacher: str, prediction: Tensor, batch: EvaluationBatch) -> dict[Series, Tensor]:
        """Scores every image."""
        target = batch.targets[teacher]
        missed, whole = ((x - target).square().sum((1, 2)) for x in (prediction, self.context.mean_targets[teacher]))
        return {("explained", "strict"): 1 - missed / whole}
