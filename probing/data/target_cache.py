"""Caches teacher targets of a list of images on disk: computed once, read through memory maps.

A cache is a folder named by the hash of everything that its targets depend on. `targets.bin` is a raw array (images, N,
D); `rows.bin` has a byte per image that is written after its targets. So a killed process loses one batch, and several
processes and runs can fill one cache at a time: each starts at another batch and skips rows that are written.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import BatchSampler

from probing.data.coco import ImageList
from probing.data.dataloader import MicroBatches, micro_batches
from probing.teachers.base import Teacher
from probing.utils.cache_dir import VARIABLE, cache_folder
from probing.utils.errors import UserError
from probing.utils.files import disk_errors, free_bytes, require_space, write_text
from probing.utils.paths import local_path
from probing.utils.processors import processor_settings
from probing.utils.progress import Progress

logger = logging.getLogger(__name__)

BATCHES_AT_ONCE = 16
"""Batches that one set of reading processes prepares, before it is checked again which rows are missing."""
SPARE = 0.9
"""Largest share of the free disk that `auto` fills."""
MISSING, WRITTEN, UNREADABLE = 0, 1, 2
"""State of a row; UNREADABLE: its image could not be read."""


@dataclass(frozen=True)
class CacheOptions:
    """Where and how targets are cached; see `DataRecipe.target_cache`, `target_cache_dtype` and `view`."""

    location: str
    dtype: str
    view: str
    batch_size: int
    workers: int


@dataclass(frozen=True)
class TargetCache:
    """The targets (images, N, D) of one teacher for a list of images."""

    folder: Path
    shape: tuple[int, int, int]
    dtype: str

    def __reduce__(self) -> Any:
        return type(self), (self.folder, self.shape, self.dtype)  # without the open maps, for reading processes

    @property
    def bytes(self) -> int:
        """Size on disk of all targets."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    @cached_property
    def _targets(self) -> NDArray[Any]:
        return np.memmap(self.folder / "targets.bin", dtype=self.dtype, mode="r", shape=self.shape)

    @cached_property
    def rows(self) -> NDArray[np.uint8]:
        """State of every row, (images), as it is on disk at this moment."""
        return np.memmap(self.folder / "rows.bin", dtype=np.uint8, mode="r", shape=self.shape[:1])

    def read(self, index: int) -> Tensor:
        """Reads the target (N, D) of one image, float32; raises OSError if its image was unreadable."""
        if self.rows[index] != WRITTEN:
            raise OSError("could not be read when its targets were cached")
        return torch.from_numpy(self._targets[index].astype(np.float32))

    def allocate(self, facts: str) -> None:
        """Creates the files that do not exist yet; raises OSError if it cannot."""
        if not (self.folder / "cache.json").exists():
            write_text(self.folder / "cache.json", facts + "\n")
        for name, size in (("targets.bin", self.bytes), ("rows.bin", self.shape[0])):
            with (self.folder / name).open("ab") as file:
                file.truncate(size)  # new bytes are zero; a file of this size stays as it is

    @property
    def missing(self) -> float:
        """Share of the rows that are not written."""
        return float((self.rows == MISSING).mean()) if (self.folder / "rows.bin").exists() else 1.0

    def write(self, indices: list[int], targets: Tensor) -> None:
        """Writes the targets (B, N, D) of some images; not through the map, where a full disk kills the process."""
        size = self.bytes // self.shape[0]
        values = targets.to("cpu", getattr(torch, self.dtype)).numpy()
        with (self.folder / "targets.bin").open("r+b") as file:
            for index, value in zip(indices, values, strict=True):
                file.seek(index * size)
                file.write(value.tobytes())
        self.mark(indices, WRITTEN)

    def mark(self, indices: list[int], state: int) -> None:
        """Writes the state of some rows."""
        with (self.folder / "rows.bin").open("r+b") as file:
            for index in indices:
                file.seek(index)
                file.write(bytes([state]))


def build_target_caches(
    teachers: Mapping[str, Teacher], images: ImageList, options: CacheOptions, rank: int = 0, world_size: int = 1
) -> dict[str, TargetCache]:
    """Computes the missing targets of a list of images, in one pass for all teachers.

    Returns:
        Caches by teacher; none for `off`, and for `auto` if there is too little room.

    Raises:
        UserError: there is too little room in the folder, or it cannot be written.
    """
    if options.location == "off" or not teachers or not images.names:
        return {}
    auto = options.location == "auto"
    root = cache_folder() / "features" if auto else local_path(options.location)
    instead = f"set {VARIABLE}, or the cache to a folder or off" if auto else "give another folder, or off"
    digest = images.digest()
    facts = {name: _facts(teacher, digest, options) for name, teacher in teachers.items()}
    caches = {
        name: TargetCache(
            root / f"{name}-{hashlib.sha256(facts[name].encode()).hexdigest()[:16]}",
            (len(images), *teacher.shape),
            options.dtype,
        )
        for name, teacher in teachers.items()
    }
    for name, cache in caches.items():
        logger.info(
            "targets of %s: %s images x %d x %d %s, %.2f GB, %.0f %% cached: %s",
            name, f"{len(images):,}", *cache.shape[1:], cache.dtype, cache.bytes / 1e9, 100 * (1 - cache.missing),
            cache.folder,
        )  # fmt: skip
    needed = int(sum(cache.missing * cache.bytes for cache in caches.values()))
    free = free_bytes(root)
    if auto and needed > SPARE * free:
        logger.warning("targets are not cached: they need %.1f GB at %s, of %.1f free", needed / 1e9, root, free / 1e9)
        return {}
    if not needed:
        return caches
    require_space(root, needed)
    plan = list(BatchSampler(range(len(images)), options.batch_size, drop_last=False))
    start = rank * len(plan) // world_size if world_size > 1 else os.getpid() % len(plan)  # runs may meet here, too
    plan = plan[start:] + plan[:start]
    with disk_errors(root, instead), Progress("targets", len(plan), unit="batches", show=rank == 0) as progress:
        due = {name: cache for name, cache in caches.items() if cache.missing}
        for name, cache in due.items():
            cache.allocate(facts[name])
        for position in range(0, len(plan), BATCHES_AT_ONCE):
            batches = plan[position : position + BATCHES_AT_ONCE]
            _fill(due, teachers, images, options, batches)
            for _ in batches:
                progress.advance()
    return caches


def _facts(teacher: Teacher, images: str, options: CacheOptions) -> str:
    """Describes everything that targets depend on."""
    facts = {
        "teacher": teacher.sha256,
        "class": teacher.class_name,
        "preprocessing": processor_settings(teacher.prepare),
        "view": options.view,
        "images": images,
        "shape": teacher.shape,
        "dtype": options.dtype,
    }
    return json.dumps(facts, indent=2, sort_keys=True)


def _fill(
    caches: Mapping[str, TargetCache],
    teachers: Mapping[str, Teacher],
    images: ImageList,
    options: CacheOptions,
    plan: Sequence[list[int]],
) -> None:
    """Computes the batches of a plan that are not cached."""
    due = [batch for batch in plan if any((cache.rows[batch] == MISSING).any() for cache in caches.values())]
    prepare = {name: teachers[name].prepare for name in caches}
    device = next(iter(teachers.values())).device
    dataset = MicroBatches(images, due, None, prepare, options.view)
    for batch, prepared in zip(due, micro_batches(dataset, options.workers, device), strict=True):
        for name, cache in caches.items():
            cache.mark(sorted(set(batch) - set(prepared.indices)), UNREADABLE)
            if prepared.indices:
                cache.write(prepared.indices, _targets(teachers[name], prepared.pixels[name]))


def _targets(teacher: Teacher, pixels: Tensor) -> Tensor:
    targets = teacher.target(pixels)
    if targets.shape[1:] != teacher.shape:
        raise UserError(
            f"{teacher.name}: images have different numbers of tokens, and a cache has one; set data.view=square"
        )
    return targets
