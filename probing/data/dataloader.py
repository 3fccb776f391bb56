"""Reads images and prepares them for checkpoint and teachers, in worker processes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from probing.data.coco import ImageList, Skipped
from probing.models.base import Batch
from probing.teachers.base import Teacher
from probing.utils.images import square
from probing.utils.interrupt import ignore_signals

if TYPE_CHECKING:
    from probing.data.target_cache import TargetCache


@dataclass(frozen=True)
class Prepared:
    """One micro-batch on the CPU.

    Attributes:
        indices: positions of its images in the image list.
        student: the checkpoint's inputs; None if they were not requested or every image is corrupt.
        pixels: pixel values by teacher.
        skipped: images that could not be read.
        annotations: (B, …), if they were requested.
        cached_targets: targets by teacher; these teachers have no pixels.
    """

    indices: list[int]
    student: Batch | None
    pixels: dict[str, Tensor]
    skipped: list[Skipped]
    annotations: Tensor | None = None
    cached_targets: dict[str, Tensor] = field(default_factory=dict)

    def pin_memory(self) -> "Prepared":
        """Copies it to page-locked memory; called by torch's DataLoader."""
        student = self.student.pin_memory() if self.student else None
        pixels, targets = ({n: t.pin_memory() for n, t in d.items()} for d in (self.pixels, self.cached_targets))
        return Prepared(self.indices, student, pixels, self.skipped, self.annotations, targets)

    def target(self, teacher: Teacher) -> Tensor:
        """Returns a teacher's targets (B, N, D) on its device, cached or computed."""
        if teacher.name in self.cached_targets:
            return self.cached_targets[teacher.name].to(teacher.device, non_blocking=True)
        return teacher.target(self.pixels[teacher.name])


@dataclass(frozen=True)
class MicroBatches(Dataset[Prepared]):
    """A data set whose items are whole micro-batches.

    Attributes:
        images: of a split.
        plan: positions of the images of each micro-batch.
        student: prepares the checkpoint's inputs; None if only teachers see the images.
        teachers: each teacher's `prepare`.
        view: `square` or `own`, see `DataRecipe.view`.
        target_caches: by teacher; read in place of preparing pixels.
        annotate: image name and size → its annotations; an OSError makes the image a corrupt one.
        replace: index and image → what the checkpoint gets, see `probing.data.input_substitutes`; OSError likewise.
    """

    images: ImageList
    plan: Sequence[Sequence[int]]
    student: Callable[[Sequence[Any]], Batch] | None
    teachers: Mapping[str, Callable[[Sequence[Any]], Tensor]]
    view: str = "square"
    target_caches: Mapping[str, "TargetCache"] = field(default_factory=dict)
    annotate: Callable[[str, tuple[int, int]], Tensor] | None = None
    replace: Callable[[int, Image.Image], Any] | None = None

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, position: int) -> Prepared:
        indices, skipped = list[int](), list[Skipped]()
        images, inputs, annotations = list[Any](), list[Any](), list[Tensor]()
        targets: dict[str, list[Tensor]] = {name: [] for name in self.target_caches}
        for index in self.plan[position]:
            name = self.images.names[index]
            try:
                image = self.images.read(index)
                cached = {teacher: cache.read(index) for teacher, cache in self.target_caches.items()}
                annotation = self.annotate(name, image.size) if self.annotate else None
                view = self._view(image)
                shown = self._view(self.replace(index, image)) if self.replace else view
            except OSError as error:
                text = error.strerror or str(error)  # without the path, because reasons are published
                reason = f"corrupt: {text.splitlines()[0][:120]}" if text else "corrupt"
                skipped.append(Skipped(name, self.images.split, reason))
                continue
            indices.append(index)
            images.append(view)
            inputs.append(shown)
            annotations += [] if annotation is None else [annotation]
            for teacher, target in cached.items():
                targets[teacher].append(target)
        if not images:
            return Prepared([], None, {}, skipped)
        return Prepared(
            indices,
            self.student(inputs) if self.student else None,
            {name: prepare(images) for name, prepare in self.teachers.items() if name not in targets},
            skipped,
            torch.stack(annotations) if annotations else None,
            {name: torch.stack(own) for name, own in targets.items()},
        )

    def _view(self, shown: Any) -> Any:
        return square(shown) if self.view == "square" and isinstance(shown, Image.Image) else shown


def micro_batches(dataset: MicroBatches, workers: int, device: torch.device) -> Iterator[Prepared]:
    """Yields the micro-batches of a data set in order.

    Args:
        dataset: of micro-batches.
        workers: processes that read; 0 reads in this one.
        device: that batches will be copied to.
    """
    yield from DataLoader(
        dataset,
        batch_size=None,
        num_workers=min(workers, len(dataset)),
        pin_memory=device.type == "cuda",
        worker_init_fn=_start_worker,
    )


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    ignore_signals()
