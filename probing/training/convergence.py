"""Judges whether a probe was still learning when its training ended.

A curve that is flat at the end proves little, because the learning rate has decayed to zero: toy probes that were flat
after 1,000 steps scored up to .05 higher after 2,000.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FALLING = 0.01
"""Relative decrease of the loss between the last two tenths of training, above which a probe is `still falling`."""
STUCK = 0.98
"""Ratio of the final loss to the mean target's loss, above which a probe is `stuck at the mean`."""

NOT_TRAINED = "not trained"
"""State of a probe without any finite loss."""
AT_THE_MEAN = "stuck at the mean"
"""State of a probe that predicts little more than the mean target."""


@dataclass(frozen=True)
class Convergence:
    """The end of a probe's learning curve.

    Attributes:
        state: `flat`, `still falling`, `stuck at the mean`, or `not trained`, with NaN for all numbers.
        last_loss: mean training loss of the last tenth of the steps.
        mean_loss: loss of the running mean target over the same steps.
        slope_percent: change from the second-last tenth to the last, in percent.
    """

    state: str
    last_loss: float
    mean_loss: float
    slope_percent: float


def judge(losses: NDArray[np.float64], mean_losses: NDArray[np.float64]) -> Convergence:
    """Judges a learning curve.

    The loss is `still falling` if its decrease exceeds both `FALLING` and two standard errors of the difference:
    batches differ in difficulty. Steps with a zero or non-finite loss are excluded: they had no usable image, or a
    single one, which cannot be shuffled.

    Args:
        losses: training loss per step; NaN where the probe took no step.
        mean_losses: the mean target's loss on the same batches.
    """
    counted = np.isfinite(losses) & (losses > 0) & np.isfinite(mean_losses)
    losses, mean_losses = losses[counted], mean_losses[counted]
    if not len(losses):
        return Convergence(NOT_TRAINED, math.nan, math.nan, math.nan)
    tenth = max(len(losses) // 10, 1)
    last, before = losses[-tenth:], losses[-2 * tenth : -tenth]
    reference = float(mean_losses[-tenth:].mean())
    final = float(last.mean())
    if not len(before):
        return Convergence("still falling", final, reference, math.nan)
    change = final / float(before.mean()) - 1
    # Batch difficulty affects both curves equally; the spread of their ratio is due to the probe.
    difficulty = np.where(mean_losses > 0, mean_losses, np.inf)  # the mean of a single image is the image: loss 0
    ratio_last, ratio_before = last / difficulty[-tenth:], before / difficulty[-2 * tenth : -tenth]
    spread = float(np.sqrt((ratio_last.var() + ratio_before.var()) / tenth))
    relative = float(ratio_last.mean() - ratio_before.mean())
    state = "flat"
    if relative < -2 * spread and relative < -FALLING * float(ratio_before.mean()):
        state = "still falling"
    elif final > STUCK * reference:
        state = AT_THE_MEAN
    return Convergence(state, final, reference, 100 * change)
