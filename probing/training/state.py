"""The training state of probes, and its saved form."""

import functools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from probing.data.coco import Skipped
from probing.models.base import Layer, layer_name
from probing.models.finite import NotFinite
from probing.probes.bank import ProbeBank, ProbeKey
from probing.probes.ridge import RidgeSource, RidgeSums
from probing.training.prequential import PrequentialErrors


@dataclass
class TrainerState:
    """All values that change during training.

    Attributes:
        banks: probes by control (`none` and `shuffled`, or `random`).
        optimizer: one AdamW over all of them.
        prequential: errors on images before their first visit changes a probe.
        step: optimiser steps taken.
        window: images that the activation buffer holds; None until it is chosen.
        losses: one row per step; one column per probe, see `columns`, then one per teacher for its running mean. NaN
            if the probe skipped the step: no usable image, or a non-finite loss or gradient.
        ridge: sums of the ridge readouts, by what they read and layer.
        target_sums: per teacher, sum (N, D) of targets in float64 and their number: over all processes up to the last
            saved state, and over this process since.
        shared_sums: `target_sums` of the last saved state.
        sums_changed: whether any process may have added to its sums since then.
        skipped: unreadable images.
        not_finite: images excluded from a layer or a teacher.
        seconds: training time, including earlier sessions.
    """

    banks: dict[str, ProbeBank]
    optimizer: torch.optim.Optimizer
    prequential: PrequentialErrors
    step: int = 0
    window: int | None = None
    losses: list[list[float]] = field(default_factory=list)
    ridge: dict[tuple[RidgeSource, Layer], RidgeSums] = field(default_factory=lambda: defaultdict(RidgeSums))
    target_sums: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    shared_sums: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    sums_changed: bool = False
    skipped: dict[str, Skipped] = field(default_factory=dict)
    not_finite: NotFinite = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def columns(self) -> list[tuple[str, ProbeKey]]:
        """Control and key of each probe, in the order of the loss columns."""
        return [(control, key) for control, bank in self.banks.items() for key in bank.probes]

    @functools.cached_property
    def parameters(self) -> list[list[nn.Parameter]]:
        """Parameters of each probe; cached, because traversing modules is slow."""
        return [list(probe.parameters()) for bank in self.banks.values() for probe in bank.probes.values()]

    def dump(self) -> dict[str, Any]:
        """Returns plain values and tensors, for `torch.save`."""
        return {
            "banks": {
                c: {k.teacher + "/" + k.prefix: p.state_dict() for k, p in b.probes.items()}
                for c, b in self.banks.items()
            },
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "window": self.window,
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "ridge": [(source, layer, sums.sums) for (source, layer), sums in self.ridge.items()],
            "target_sums": {name: [total, count] for name, (total, count) in self.target_sums.items()},
            "prequential": self.prequential.dump(),
            "skipped": [[s.image, s.split, s.reason] for s in self.skipped.values()],
            "not_finite": [[*source, torch.from_numpy(images)] for source, images in self.not_finite.items()],
            "seconds": self.seconds,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Loads a saved state of the same probes."""
        for control, bank in self.banks.items():
            for key, probe in bank.probes.items():
                probe.load_state_dict(saved["banks"][control][key.teacher + "/" + key.prefix])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.losses = saved["losses"].tolist()
        self._add(saved)
        self.shared_sums = dict(self.target_sums)

    def merge(self, part: dict[str, Any], teachers: int) -> None:
        """Adds the final state of a process that trained some of the layers.

        Args:
            part: the saved state.
            teachers: number of teachers.
        """
        names = [(control, name) for control, probes in part["banks"].items() for name in probes]
        columns = {(control, key.teacher + "/" + key.prefix): n for n, (control, key) in enumerate(self.columns)}
        table = part["losses"].numpy()
        losses = np.asarray(self.losses) if self.losses else np.full((len(table), len(columns) + teachers), np.nan)
        losses[:, [columns[name] for name in names]] = table[:, : len(names)]
        losses[:, len(columns) :] = table[:, len(names) :]
        self.losses = losses.tolist()
        for control, bank in self.banks.items():
            for key, probe in bank.probes.items():
                if saved := part["banks"][control].get(key.teacher + "/" + key.prefix):
                    probe.load_state_dict(saved)
        self._add(part)

    def _add(self, saved: dict[str, Any]) -> None:
        """Adds the sums and excluded images of a saved state; takes its step."""
        device = self.parameters[0][0].device
        for source, layer, sums in saved["ridge"]:
            self.ridge[source, layer] = RidgeSums({name: value.to(device) for name, value in sums.items()})
        for name, (total, count) in saved["target_sums"].items():
            self.target_sums[name] = total.to(device), torch.as_tensor(count, device=device)
        self.prequential.restore(saved["prequential"], device)
        self.skipped |= {row[0]: Skipped(*row) for row in saved["skipped"]}
        self.not_finite |= {(kind, name): images.numpy() for kind, name, images in saved["not_finite"]}
        self.step, self.window, self.seconds = saved["step"], saved["window"], max(self.seconds, saved["seconds"])


def summary(state: TrainerState, teachers: Sequence[str], not_finite: list[dict[str, str]]) -> dict[str, Any]:
    """Summarises a finished training as plain values; `not_finite` is from `not_finite_rows`."""
    table = np.asarray(state.losses, dtype=np.float64)
    means = {name: table[:, len(state.columns) + index].tolist() for index, name in enumerate(teachers)}
    curves = [
        {
            "control": control,
            "teacher": key.teacher,
            "layer": layer_name(key.layer),
            "seed": key.seed,
            "losses": table[:, index].tolist(),
        }
        for index, (control, key) in enumerate(state.columns)
    ]
    return {
        "curves": curves,
        "mean_losses": means,
        "skipped": [{"image": s.image, "split": s.split, "reason": s.reason} for s in state.skipped.values()],
        "not_finite": not_finite,
        "seconds": state.seconds,
        "steps": state.step,
    }
