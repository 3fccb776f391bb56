"""Squared errors of images that a probe has not yet been trained on, from the same pass that trains it.

They are what a prequential code needs (Voita & Titov, 2020, arXiv:2003.12298, sec. 2.2): how well each part of the data
is predicted from all earlier parts. The parts end after 1, 2, 4, … batches.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import Tensor

from probing.recipe import FitRecipe
from probing.training.schedule import plan_steps
from probing.utils.files import atomic_file

POOLED = "pooled"
"""Position of the mean target of mean features."""


class ErrorKey(NamedTuple):
    """Identifies the errors of one probe.

    Without layer, `mean` is the mean target (N, D) so far, and `constant` its mean over positions. With a `position` of
    the prompt the target is the mean feature (D), for `mean` too, whose position is `POOLED`.
    """

    probe: str
    control: str
    teacher: str
    layer: str
    seed: int
    position: str = ""

    def text(self) -> str:
        """Returns the name of its tensor in a file."""
        return "/".join(map(str, self))

    @classmethod
    def from_text(cls, text: str) -> "ErrorKey":
        """Inverts `text`."""
        probe, control, teacher, layer, seed, *position = text.split("/")
        return cls(probe, control, teacher, layer, int(seed), *position)


@dataclass
class PrequentialErrors:
    """Errors so far, and the linear maps that make the next ones.

    Attributes:
        images: number of training images.
        batches: batches of images that were visited for the first time.
        maps: weight (D, H) and bias (D) of each ridge readout, by teacher, layer and position, solved after the last
            2^j batches.
        means: mean target (N, D) at the same time, by teacher.
        errors: per probe and image the sum of squared errors (images), float32; NaN where there is none.
    """

    images: int
    batches: int = 0
    maps: dict[tuple[str, str, str], tuple[Tensor, Tensor]] = field(default_factory=dict)
    means: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[ErrorKey, Tensor] = field(default_factory=dict)

    @property
    def part_begins(self) -> bool:
        """Whether the next batch is the first of a part."""
        return self.batches > 0 and self.batches & (self.batches - 1) == 0

    def add(self, key: ErrorKey, indices: Tensor, prediction: Tensor, target: Tensor, valid: Tensor) -> None:
        """Adds the errors of a batch, without waiting for the device.

        Args:
            key: of the probe.
            indices: (B), of the images.
            prediction: (B, N, D).
            target: likewise.
            valid: (B), False for images without finite features.
        """
        if key not in self.errors:
            self.errors[key] = torch.full((self.images,), torch.nan, device=target.device)
        error = (prediction.detach() - target).square().flatten(1).sum(dim=1).float()
        self.errors[key].index_copy_(0, indices, error.where(valid, torch.nan))

    def dump(self) -> dict[str, Any]:
        """Returns plain values and tensors, for `torch.save`."""
        return {
            "batches": self.batches,
            "maps": [[*key, *value] for key, value in self.maps.items()],
            "means": self.means,
            "errors": {key.text(): values for key, values in self.errors.items()},
        }

    def restore(self, saved: Mapping[str, Any], device: torch.device) -> None:
        """Adds what `dump` returned, of this process or of one that trained other layers."""
        self.batches = saved["batches"]
        self.maps |= {tuple(key): (w.to(device), b.to(device)) for *key, w, b in saved["maps"]}
        self.means |= {teacher: mean.to(device) for teacher, mean in saved["means"].items()}
        self.errors |= {ErrorKey.from_text(text): values.to(device) for text, values in saved["errors"].items()}

    def collect(self, accelerator: Accelerator) -> None:
        """Moves the errors of all processes to the main one; only one has those of an image."""
        for key in sorted(set(gather_object(list(self.errors)))):
            values = self.errors.pop(key, torch.full((self.images,), torch.nan, device=accelerator.device))
            sums = accelerator.reduce(torch.stack((values.nan_to_num(0.0), values.isfinite().float())), "sum")
            if accelerator.is_main_process:
                self.errors[key] = sums[0].where(sums[1] > 0, torch.nan)

    def save(self, file: Path, fit: FitRecipe) -> None:
        """Writes the errors and `parts`: the part (images) of each image, counted from 0; -1 in the first batch."""
        parts = torch.full((self.images,), -1, dtype=torch.int32)
        for number, step in enumerate(step for step in plan_steps(self.images, fit) if step.first):
            parts[list(itertools.chain(*step.micros))] = number.bit_length() - 1
        tensors = {key.text(): values.cpu() for key, values in self.errors.items()}
        with atomic_file(file) as temporary:
            save_file(tensors | {"parts": parts}, temporary)
