"""Batches for student and teachers alike, read and preprocessed in worker processes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from probing.data.coco import ImageList, Skipped
from probing.models.base import Batch
from probing.models.token_map import TokenMap
from probing.teachers.base import Teacher
from probing.utils.images import square
from probing.utils.interrupt import ignore_signals

Prepare = Callable[[Sequence[Any]], Any]


class Kept(Protocol):
    """Features that are kept for every image of a list, see `probing.data.target_cache`."""

    def read(self, index: int) -> Tensor | None:
        """Those of one image; None where there are none."""


TOWER = "vision tower"
"""Under which the checkpoint's own features of an image are kept, beside those of teachers."""
Show = Callable[[int, Image.Image], Any]
"""Index of an image, and the image → what the student is given."""


Annotate = Callable[[str, tuple[int, int]], Tensor]
"""Name of an image, its width and height → what is known of it."""


@dataclass(frozen=True)
class Prepared:
    """One micro-batch, on the CPU.

    Attributes:
        indices: positions of its images in the image list.
        student: the checkpoint's inputs; None where every image of the micro-batch is corrupt.
        pixels: pixel values per teacher.
        skipped: images that could not be read.
        annotations: what is known of each image, where that was asked for.
        kept: features per teacher, for those whose features are kept; these have no pixels.
    """

    indices: list[int]
    student: Batch | None
    pixels: dict[str, Tensor]
    skipped: list[Skipped]
    annotations: Tensor | None = None
    kept: dict[str, Tensor] = field(default_factory=dict)

    def pin_memory(self) -> "Prepared":
        """A copy in page-locked memory, for the data loader."""
        student = self.student.pin_memory() if self.student else None
        pixels, kept = ({n: tensor.pin_memory() for n, tensor in d.items()} for d in (self.pixels, self.kept))
        return Prepared(self.indices, student, pixels, self.skipped, self.annotations, kept)

    def target(self, teacher: Teacher) -> Tensor:
        """Features (B, N, D) of a teacher, on its device: kept ones, or computed now."""
        if teacher.name in self.kept:
            return self.kept[teacher.name].to(teacher.device, non_blocking=True)
        return teacher.target(self.pixels[teacher.name])


def viewed(shown: Any, view: str) -> Any:
    """An image as models get it, see `DataRecipe.view`; what is no image stays as it is."""
    return square(shown) if view == "square" and isinstance(shown, Image.Image) else shown


def no_student(pictures: Sequence[Any]) -> Batch:
    """In place of a student's inputs, where only teachers look at the images."""
    return Batch({}, TokenMap(torch.zeros(len(pictures), 1, dtype=torch.long), (0, 0)))


class _MicroBatches(Dataset[Prepared]):
    """A map-style data set whose items are whole micro-batches."""

    def __init__(
        self,
        images: ImageList,
        plan: Sequence[Sequence[int]],
        student: Callable[[Sequence[Any]], Batch],
        teachers: dict[str, Prepare],
        view: str,
        annotate: Annotate | None,
        show: Show | None,
        kept: Mapping[str, Kept],
    ) -> None:
        self.images, self.plan, self.student, self.view = images, plan, student, view
        self.teachers = {name: prepare for name, prepare in teachers.items() if name not in kept}
        self.annotate, self.show, self.kept = annotate, show, kept

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, position: int) -> Prepared:
        indices, pictures, shown, annotations, skipped = [], [], [], [], []
        kept: dict[str, list[Tensor]] = {name: [] for name in self.kept}
        for index in self.plan[position]:
            try:
                picture = self.images.read(index)
                features = {name: cache.read(index) for name, cache in self.kept.items()}
                if any(one is None for one in features.values()):
                    raise OSError("could not be read when its features were kept")
                if self.annotate is not None:
                    annotations.append(self.annotate(self.images.names[index], picture.size))
                if self.show is not None:
                    shown.append(viewed(self.show(index, picture), self.view))
            except OSError as error:
                text = error.strerror or str(error)  # without the path, because reasons are published
                reason = f"corrupt: {text.splitlines()[0][:120]}" if text else "corrupt"
                skipped.append(Skipped(self.images.names[index], self.images.split, reason))
                continue
            indices.append(index)
            pictures.append(viewed(picture, self.view))
            for name, one in features.items():
                kept[name].append(cast(Tensor, one))
        if not pictures:
            return Prepared([], None, {}, skipped)
        pixels = {name: prepare(pictures) for name, prepare in self.teachers.items()}
        student = self.student(pictures if self.show is None else shown)
        known = torch.stack(annotations) if annotations else None
        stacked = {name: torch.stack(own) for name, own in kept.items()}
        if TOWER in stacked:
            student = student.with_embedded(stacked.pop(TOWER))
        return Prepared(indices, student, pixels, skipped, known, stacked)


def micro_batches(
    images: ImageList,
    plan: Sequence[Sequence[int]],
    student: Callable[[Sequence[Any]], Batch],
    teachers: dict[str, Prepare],
    view: str,
    workers: int,
    device: torch.device,
    annotate: Annotate | None = None,
    show: Show | None = None,
    kept: Mapping[str, Kept] | None = None,
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
        annotate: image name and size → what is known of it; an OSError counts as that of a corrupt image.
        show: what the student is given in place of an image, see `probing.data.input_controls`; the same holds of it.
        kept: features that are read instead of being computed from pixels, by teacher; under `TOWER` the student's own.
    """
    loader = DataLoader(
        _MicroBatches(images, plan, student, teachers, view, annotate, show, kept or {}),
        batch_size=None,
        num_workers=min(workers, len(plan)),
        pin_memory=device.type == "cuda",
        worker_init_fn=_start_worker,
    )
    yield from loader


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    ignore_signals()
