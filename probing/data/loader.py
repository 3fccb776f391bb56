"""Batches for student and teachers alike, read and preprocessed in worker processes."""

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from probing.backbones.base import Batch
from probing.data.coco import ImageList, Skipped, square

Prepare = Callable[[Sequence[Any]], Any]
Show = Callable[[int, Image.Image], Any]
"""Index of an image, and the image → what the student is given."""


@dataclass(frozen=True)
class Prepared:
    """One micro-batch, on the CPU.

    Attributes:
        indices: positions of its images in the image list.
        student: the checkpoint's inputs; None where every image of the micro-batch is corrupt.
        pixels: pixel values per teacher.
        skipped: images that could not be read.
        annotations: what is known of each image, where that was asked for.
    """

    indices: list[int]
    student: Batch | None
    pixels: dict[str, Tensor]
    skipped: list[Skipped]
    annotations: Tensor | None = None

    def pin_memory(self) -> "Prepared":
        """A copy in page-locked memory, for the data loader."""
        student = self.student.pin_memory() if self.student else None
        pixels = {name: tensor.pin_memory() for name, tensor in self.pixels.items()}
        return Prepared(self.indices, student, pixels, self.skipped, self.annotations)


class _MicroBatches(Dataset[Prepared]):
    """A map-style data set whose items are whole micro-batches."""

    def __init__(
        self,
        images: ImageList,
        plan: Sequence[Sequence[int]],
        student: Callable[[Sequence[Any]], Batch],
        teachers: dict[str, Prepare],
        squared: bool,
        annotate: Callable[[str], Tensor] | None,
        show: Show | None,
    ) -> None:
        self.images, self.plan, self.student, self.teachers, self.squared = images, plan, student, teachers, squared
        self.annotate, self.show = annotate, show

    def __len__(self) -> int:
        return len(self.plan)

    def _view(self, shown: Any) -> Any:
        return square(shown) if self.squared and isinstance(shown, Image.Image) else shown

    def __getitem__(self, position: int) -> Prepared:
        indices, pictures, shown, annotations, skipped = [], [], [], [], []
        for index in self.plan[position]:
            try:
                picture = self.images.read(index)
                if self.annotate is not None:
                    annotations.append(self.annotate(self.images.names[index]))
                if self.show is not None:
                    shown.append(self._view(self.show(index, picture)))
            except OSError as error:
                reason = f"corrupt: {str(error).splitlines()[0][:120]}" if str(error) else "corrupt"
                skipped.append(Skipped(self.images.names[index], self.images.split, reason))
                continue
            indices.append(index)
            pictures.append(self._view(picture))
        if not pictures:
            return Prepared([], None, {}, skipped)
        pixels = {name: prepare(pictures) for name, prepare in self.teachers.items()}
        student = self.student(pictures if self.show is None else shown)
        return Prepared(indices, student, pixels, skipped, torch.stack(annotations) if annotations else None)


def micro_batches(
    images: ImageList,
    plan: Sequence[Sequence[int]],
    student: Callable[[Sequence[Any]], Batch],
    teachers: dict[str, Prepare],
    view: str,
    workers: int,
    device: torch.device,
    annotate: Callable[[str], Tensor] | None = None,
    show: Show | None = None,
) -> Iterator[Prepared]:
    """Yields one `Prepared` per entry of the plan, in its order.

    Args:
        images: where indices point.
        plan: indices of each micro-batch.
        student: the backbone's `prepare`.
        teachers: each teacher's `prepare`.
        view: `square` or `own`, see `DataRecipe.view`.
        workers: reading processes; 0 reads in this one.
        device: where batches will go.
        annotate: image name → what is known of it; an OSError counts as that of a corrupt image.
        show: what the student is given in place of an image, see `probing.data.substitutes`; the same holds of it.
    """
    loader = DataLoader(
        _MicroBatches(images, plan, student, teachers, view == "square", annotate, show),
        batch_size=None,
        num_workers=min(workers, len(plan)),
        pin_memory=device.type == "cuda",
        worker_init_fn=_start_worker,
    )
    yield from loader


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    # A terminal sends Ctrl-C to every process of the group; the main one decides when the workers stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
