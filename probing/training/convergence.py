"""Was a probe still learning when its training ended?

A curve that is flat at its end proves little: the learning rate has fallen to zero by then. Only a longer training can
tell; toy probes that were flat after 1,000 steps scored up to .05 higher after 2,000.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FALLING = 0.01
"""A probe whose loss fell by more than this share between the last two tenths of its training was still learning."""
STUCK = 0.98
"""A probe whose final loss is above this share of the mean target's has learned no more than the mean."""

NOT_TRAINED = "not trained"
"""State of a probe that took no step: no loss was finite."""


@dataclass(frozen=True)
class Convergence:
    """How a probe's training ended.

    Attributes:
        state: `flat`, `still falling`, `stuck at the mean`, or `not trained` where no step had a finite loss and the
            numbers are NaN.
        last_loss: mean training loss of the last tenth of the steps.
        mean_loss: loss of the running mean target over the same steps.
        slope_percent: change from the last tenth but one to the last, in percent (negative: falling).
    """

    state: str
    last_loss: float
    mean_loss: float
    slope_percent: float


def judge(losses: NDArray[np.float64], mean_losses: NDArray[np.float64]) -> Convergence:
    """Judges a learning curve.

    A fall counts when it exceeds both `FALLING` and two standard errors of the difference: the loss of a step is that
    of its batch, and batches differ. Steps whose loss is zero or not finite do not count: none of their images could be
    used, or too few to be shuffled.

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
    # Batch difficulty moves both curves alike: the spread of the ratio to the mean target's loss is the probe's own.
    difficulty = np.where(mean_losses > 0, mean_losses, np.inf)  # the mean of a single image is the image: no loss
    ratio_last, ratio_before = last / difficulty[-tenth:], before / difficulty[-2 * tenth : -tenth]
    spread = float(np.sqrt((ratio_last.var() + ratio_before.var()) / tenth))
    relative = float(ratio_last.mean() - ratio_before.mean())
    state = "flat"
    if relative < -2 * spread and relative < -FALLING * float(ratio_before.mean()):
        state = "still falling"
    elif final > STUCK * reference:
        state = "stuck at the mean"
    return Convergence(state, final, reference, 100 * change)
