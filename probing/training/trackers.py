"""Logs losses during training to TensorBoard or another tracker that accelerate supports."""

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from probing.models.base import Layer
from probing.probes.bank import ProbeKey
from probing.utils.errors import UserError, first_line
from probing.utils.files import disk_errors

EVERY = 10
"""Steps between two logged points, as in `probing distill`."""
GROUPS = 3
"""Groups of layers per teacher, each with its curve."""


def require_tracker(name: str) -> None:
    """Raises UserError if a tracker does not exist or is not installed."""
    if name == "none":
        return
    if name not in LOGGER_TYPE_TO_CLASS:
        raise UserError(f"fit.report_to is {name!r}; choose none, {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
    if name not in map(str, get_available_trackers()):
        raise UserError(f"{name!r} of fit.report_to is not installed; install it, or set fit.report_to=none")


def curve_names(columns: Sequence[tuple[str, ProbeKey]], teachers: Sequence[str]) -> list[str]:
    """Names the curve of each loss column, such as `depth/layers_0-10`.

    Args:
        columns: control and probe, see `TrainerState.columns`.
        teachers: those of the following columns, for the mean target.
    """
    layers = list(dict.fromkeys(key.layer for _, key in columns))
    group: dict[Layer, str] = {}
    for part in np.array_split(np.arange(len(layers)), min(GROUPS, len(layers))):
        first, last = layers[part[0]], layers[part[-1]]
        group |= {layers[index]: f"layers_{first}-{last}" if first != last else f"layer_{first}" for index in part}
    names = [
        f"{key.teacher}/{'' if control == 'none' else control + '_'}{group[key.layer]}" for control, key in columns
    ]
    return names + [f"{teacher}/mean_target" for teacher in teachers]


class LossLogger:
    """Logs the mean losses of groups of probes and the learning rate every `EVERY` steps."""

    def __init__(self, tracker: Any, names: Sequence[str], folder: Path) -> None:
        self.tracker, self.folder = tracker, folder
        self.columns: dict[str, list[int]] = defaultdict(list)
        for index, name in enumerate(names):
            self.columns[name].append(index)

    def after_step(self, losses: Sequence[Sequence[float]], last: int, lr: float) -> None:
        """Logs the recent steps if a point is due; `losses` are of all steps so far, `last` is their final number."""
        step = len(losses)
        if self.tracker is None or (step % EVERY and step != last):
            return
        recent = np.asarray(losses[-((step - 1) % EVERY + 1) :])
        means = {name: recent[:, columns].ravel() for name, columns in self.columns.items()}
        values = {
            name: float(value[np.isfinite(value)].mean()) for name, value in means.items() if np.isfinite(value).any()
        }
        with disk_errors(self.folder):
            self.tracker.log(values | {"lr": lr}, step=step)


@contextlib.contextmanager
def loss_logger(name: str, folder: Path | None, names: Sequence[str], step: int) -> Iterator[LossLogger]:
    """Opens a tracker during training.

    Args:
        name: of the tracker, or `none`.
        folder: of this training's files, such as TensorBoard's; None for no logging.
        names: from `curve_names`.
        step: steps already taken; points that an interrupted training logged after it are replaced.
    """
    if name == "none" or folder is None:
        yield LossLogger(None, names, Path())
        return
    kind = LOGGER_TYPE_TO_CLASS[name]
    parent = (folder.parent,) if kind.requires_logging_directory else ()
    try:
        with disk_errors(folder):
            tracker = kind(folder.name, *parent, **({"purge_step": step + 1} if name == "tensorboard" else {}))
            tracker.start()
    except UserError:
        raise
    except Exception as error:  # trackers raise errors of many types, such as for a missing login
        raise UserError(f"{name} does not start: {first_line(error)}; fix that, or set fit.report_to=none") from error
    try:
        yield LossLogger(tracker, names, folder)
    finally:
        tracker.finish()
