"""Cosine similarity between predicted and true teacher features."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analysis.evaluation.registry import EvaluationBatch, Metric, MetricInfo, Series, register

if TYPE_CHECKING:
    from torch import Tensor


def token_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """Computes the mean over tokens of the cosine per token (protocol `strict`).

    Args:
        prediction: (B, N, D).
        target: (B, N, D).

    Returns:
        (B); a zero vector has cosine 0 with everything.
    """
    from torch.nn.functional import cosine_similarity

    return cosine_similarity(prediction.float(), target.float(), dim=-1).mean(dim=-1)


def centred_cosine(prediction: Tensor, target: Tensor, mean: Tensor) -> Tensor:
    """Computes `token_cosine` after subtracting the training split's mean target (N, D) from both."""
    return token_cosine(prediction.float() - mean, target.float() - mean)


def flat_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """Computes one cosine per flattened feature (protocol `paper`, OLA-VLM's released evaluation)."""
    return token_cosine(prediction.flatten(1)[:, None], target.flatten(1)[:, None])


@register
class Cosine(Metric):
    """Cosine similarity with the target."""

    name = "cosine"
    help = "similarity with the teacher's features"
    infos = (
        MetricInfo(
            "cosine_centred",
            "strict",
            "centred cosine similarity",
            "Mean over tokens of the cosine per token, after the training split's mean target is subtracted from "
            "prediction and target; a constant scores 0.",
        ),
        MetricInfo(
            "cosine",
            "strict",
            "cosine similarity per token",
            "Mean over tokens of the cosine per token; most of it is the mean target.",
        ),
        MetricInfo(
            "cosine",
            "paper",
            "cosine similarity, flattened",
            "One cosine over the whole feature of an image, as in the paper's released evaluation.",
        ),
    )

    def update(self, teacher: str, prediction: Tensor, batch: EvaluationBatch) -> dict[Series, Tensor]:
        """Scores every image."""
        target, scores = batch.targets[teacher], {}
        if "strict" in self.protocols:
            scores["cosine_centred", "strict"] = centred_cosine(prediction, target, self.context.mean_targets[teacher])
            scores["cosine", "strict"] = token_cosine(prediction, target)
        if "paper" in self.protocols:
            scores["cosine", "paper"] = flat_cosine(prediction, target)
        return scores
