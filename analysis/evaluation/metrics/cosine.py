"""Cosine similarity between predicted and true teacher features."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from analysis.evaluation.scorer import Reference, Row
from probing.data.coco import ImageList
from probing.data.dataloader import Prepared
from probing.teachers import Teacher


def token_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of the cosine of each token (protocol `strict`).

    Args:
        prediction: (B, N, D).
        target: (B, N, D).

    Returns:
        (B); a zero vector has cosine 0 with everything.
    """
    return F.cosine_similarity(prediction.float(), target.float(), dim=-1).mean(dim=-1)


def centred_cosine(prediction: Tensor, target: Tensor, mean: Tensor) -> Tensor:
    """`token_cosine` after the training split's mean target (N, D) is taken from both."""
    return token_cosine(prediction.float() - mean, target.float() - mean)


def flat_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """One cosine over the flattened feature of each image (protocol `paper`, OLA-VLM's released evaluation)."""
    return F.cosine_similarity(prediction.float().flatten(1), target.float().flatten(1), dim=-1)


@dataclass
class Cosine:
    """Cosine similarity with the target; see `analysis.evaluation.metrics.cosine`."""

    images: ImageList
    teachers: dict[str, Teacher]
    means: dict[str, Tensor]
    protocols: Sequence[str]
    stem: str = "scores/cosine"
    summed: frozenset[str] = frozenset()

    def measures(self, teacher: str) -> list[tuple[str, str]]:
        """Up to three ways to compute it."""
        every = [("cosine", "strict"), ("cosine_centred", "strict"), ("cosine", "paper")]
        return [(metric, protocol) for metric, protocol in every if protocol in self.protocols]

    def settings(self) -> str:
        """The images."""
        return self.images.digest()

    def begin(self, prepared: Prepared, targets: dict[str, Tensor]) -> dict[str, Tensor]:
        """The targets."""
        return targets

    def score(self, teacher: str, prediction: Tensor, context: dict[str, Tensor]) -> Iterator[Row]:
        """One number per image and way to compute it."""
        target, mean = context[teacher], self.means[teacher]
        ways: dict[tuple[str, str], Callable[[], Tensor]] = {
            ("cosine", "strict"): lambda: token_cosine(prediction, target),
            ("cosine_centred", "strict"): lambda: centred_cosine(prediction, target, mean),
            ("cosine", "paper"): lambda: flat_cosine(prediction, target),
        }
        for metric, protocol in self.measures(teacher):
            yield metric, protocol, ways[metric, protocol]()

    def references(self, targets: dict[str, Tensor], context: Any) -> Iterator[Reference]:
        """None: a target's cosine with itself is 1."""
        yield from ()
