"""Embedding losses of OLA-VLM (arXiv:2412.09585, sec. 4, eqs. 1–3)."""

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_SCALE = 100.0


def embedding_losses(
    prediction: Tensor, target: Tensor, others: Tensor, own: Tensor, scale: Tensor, images: int
) -> tuple[Tensor, Tensor]:
    """Smooth L1 and InfoNCE of one layer's predictions, as their part of the mean over the whole global batch.

    The contrast goes one way, from a prediction to all targets of the global batch, as in eq. 2. The paper writes
    sim / tau, where tau is a learnable scaling factor that starts at 2.0. Divided by 2, cosines would hardly differ;
    the released code multiplies them by exp(s), s = 2.0 at the start, at most 100, and that reading is taken here.

    Args:
        prediction: (B, N, D), of the samples of this micro-batch that have a target.
        target: (B, N, D).
        others: targets of the global batch, (M, N * D), each of length 1.
        own: (B) where in `others` each sample's own target is.
        scale: learnable scalar s.
        images: number M of samples in the global batch that the means are over.

    Returns:
        Two numbers: sums over the micro-batch divided by `images`, so that those of all micro-batches and processes add
        up to the means of the global batch. 0 where there is no sample.
    """
    prediction, target = prediction.float(), target.float()
    share = len(prediction) / max(images, 1)
    if not len(prediction):
        return prediction.sum() * 0, prediction.sum() * 0
    smooth = F.smooth_l1_loss(prediction, target) * share
    similarity = F.normalize(prediction.flatten(1), dim=1) @ others.float().T
    contrast = F.cross_entropy(similarity * scale.exp().clamp(max=LARGEST_SCALE), own) * share
    return smooth, contrast


def unit_rows(targets: Tensor) -> Tensor:
    """Targets (M, N, D) as rows (M, N * D) of length 1."""
    return F.normalize(targets.float().flatten(1), dim=1)


def global_targets(mine: Tensor, world: int) -> tuple[Tensor, int]:
    """Rows of all processes, in their order, and where this process's begin.

    Args:
        mine: (m, F); m may differ between processes.
        world: number of processes.
    """
    if world == 1:
        return mine, 0
    counts = [torch.zeros(1, dtype=torch.long, device=mine.device) for _ in range(world)]
    torch.distributed.all_gather(counts, torch.tensor([len(mine)], device=mine.device))
    numbers = [int(count) for count in counts]
    padded = mine.new_zeros(max(numbers), mine.shape[1])
    padded[: len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in range(world)]
    torch.distributed.all_gather(parts, padded)
    rank = torch.distributed.get_rank()
    return torch.cat([part[:n] for part, n in zip(parts, numbers, strict=True)]), sum(numbers[:rank])
