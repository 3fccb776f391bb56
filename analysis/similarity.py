"""Cosine similarity between predicted and true teacher features."""

import torch.nn.functional as F
from torch import Tensor


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
