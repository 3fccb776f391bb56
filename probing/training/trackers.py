"""Curves of a training while it runs, for TensorBoard or another tracker that accelerate knows.

They are for looking on: what a run keeps for good is `learning_curves.csv`.
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from probing.models.base import Layer
from probing.probes.bank import ProbeKey
from probing.utils.errors import UserError
from probing.utils.files import disk_errors

EVERY = 10
"""Steps between two points; as in `probing distill`."""
GROUPS = 3
"""Curves per teacher: the first, the middle and the last layers."""


def require_tracker(name: str) -> None:
    """Raises UserError where there is no such tracker, or it is not installed."""
    if name == "none":
        return
    if name not in LOGGER_TYPE_TO_CLASS:
        raise UserError(f"fit.report_to is {name!r}; there are none, {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
    if name not in map(str, get_available_trackers()):
        raise UserError(f"fit.report_to names {name!r}, which is not installed; install it, or set fit.report_to=none")


def curve_names(columns: Sequence[tuple[str, ProbeKey]], teachers: Sequence[str]) -> list[str]:
    """Which curve each column of the losses belongs to.

    Args:
        columns: control and probe, as `FitState.columns`.
        teachers: those of the columns behind them, for the mean target.

    Returns:
        A name such as `depth/layers_0-10` for every column.
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


class Curves:
    """Passes on the mean losses of groups of probes, and the learning rate, every few steps."""

    def __init__(self, tracker: Any, names: Sequence[str], folder: Path) -> None:
        self.tracker, self.folder = tracker, folder
        self.columns: dict[str, list[int]] = defaultdict(list)
        for index, name in enumerate(names):
            self.columns[name].append(index)

    def after_step(self, losses: Sequence[Sequence[float]], last: int, lr: float) -> None:
        """Looks at the losses of all steps so far, of which this is the last if their number is `last`."""
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
def curves(name: str, folder: Path | None, names: Sequence[str], step: int) -> Iterator[Curves]:
    """Opens a tracker for as long as the training lasts.

    Args:
        name: of the tracker, or `none`.
        folder: of files such as TensorBoard's, for this training alone; None for no curves.
        names: from `curve_names`.
        step: steps taken already; what an interrupted training told of later ones is superseded.
    """
    if name == "none" or folder is None:
        yield Curves(None, names, Path())
        return
    kind = LOGGER_TYPE_TO_CLASS[name]
    own = (folder.parent,) if kind.requires_logging_directory else ()
    try:
        with disk_errors(folder):
            tracker = kind(folder.name, *own, **({"purge_step": step + 1} if name == "tensorboard" else {}))
            tracker.start()
    except UserError:
        raise
    except Exception as error:  # each tracker has errors of its own, such as a missing login
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name} does not start: {said}; mend that, or set fit.report_to=none") from error
    try:
        yield Curves(tracker, names, folder)
    finally:
        tracker.finish()
