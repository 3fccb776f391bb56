"""Teachers' features of a list of images, computed once, kept on disk, and read through memory maps.

A cache is a folder of shards, each the features of `ROWS` images in the order of the list, and is named by the hash of
all that they depend on. A shard is written beside its place and renamed into it, so one that is there is whole, and
any number of processes and runs can fill a folder at once: each begins at another shard and leaves out what is there.
"""

import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probing.data.coco import ImageList
from probing.data.loader import micro_batches, no_student
from probing.errors import UserError
from probing.progress import Progress
from probing.run import disk_errors, require_space, whole_file, write_text
from probing.teachers import Teacher

logger = logging.getLogger(__name__)

ROWS = 256
"""Images of a shard: 0.6 GB of the paper's depth features."""
SPARE = 0.9
"""Share of the free disk that `auto` fills at most."""


@dataclass(frozen=True)
class TargetCache:
    """The features of one teacher for one list of images; picklable, so that reading processes can carry it.

    Attributes:
        folder: of the shards.
        images: number of images.
        shape: (N, D) of one image's features.
        dtype: `float32` or `float16`.
    """

    folder: Path
    images: int
    shape: tuple[int, int]
    dtype: str
    _open: dict[int, NDArray[Any]] = field(default_factory=dict, repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return TargetCache, (self.folder, self.images, self.shape, self.dtype)

    @property
    def shards(self) -> int:
        """Number of shards of the whole."""
        return -(-self.images // ROWS)

    @property
    def bytes(self) -> int:
        """Size of the whole."""
        return self.images * self.shape[0] * self.shape[1] * np.dtype(self.dtype).itemsize

    def shard(self, number: int) -> Path:
        """File of a shard."""
        return self.folder / f"shard_{number:05d}.npy"

    def rows(self, number: int) -> range:
        """Images of a shard."""
        return range(number * ROWS, min((number + 1) * ROWS, self.images))

    def missing(self) -> list[int]:
        """Shards that are not there."""
        return [number for number in range(self.shards) if not self.shard(number).exists()]

    def read(self, index: int) -> Tensor | None:
        """Features (N, D) of one image, float32; None where the image could not be read when the cache was made.

        Raises:
            UserError: the shard is truncated, or of another shape.
        """
        number = index // ROWS
        if number not in self._open:
            self._open[number] = self._map(number)
        row = torch.from_numpy(np.array(self._open[number][index % ROWS], dtype=np.float32))
        return None if bool(row[0, 0].isnan()) else row

    def check(self) -> None:
        """Raises UserError where a shard is truncated or of another shape; reads headers and sizes alone."""
        for number in range(self.shards):
            self._map(number)

    def _map(self, number: int) -> NDArray[Any]:
        file, wanted = self.shard(number), (len(self.rows(number)), *self.shape)
        try:
            found = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{file} is truncated or no shard ({reason}); remove it, and it is made again") from None
        if found.shape != wanted or found.dtype != self.dtype:
            raise UserError(
                f"{file} holds {found.dtype} {found.shape}, not {self.dtype} {wanted}; remove it, and it is made again"
            )
        return found


def default_root() -> Path:
    """Where `auto` keeps caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mllm-probing" / "targets"


def open_caches(
    where: str,
    dtype: str,
    teachers: dict[str, Teacher],
    images: ImageList,
    view: str,
    batch: int,
    workers: int,
    process: int = 0,
    processes: int = 1,
) -> dict[str, TargetCache]:
    """The features of some teachers for a list of images, made where they are not there yet.

    Args:
        where: `off`, `auto` or a folder.
        dtype: `float32`, or `float16`, which is half as large and rounds to 11 bits.
        teachers: by name.
        images: of the split.
        view: `square` or `own`, see `DataRecipe.view`.
        batch: images per forward pass of a teacher.
        workers: processes that read images.
        process: number of this process.
        processes: that were started together.

    Returns:
        By name of the teacher; empty where `off`, and where `auto` finds too little room.

    Raises:
        UserError: there is too little room in the folder, it cannot be written, or a shard is damaged.
    """
    if where == "off" or not teachers:
        return {}
    root = default_root() if where == "auto" else Path(where).expanduser()
    caches = {name: _describe(root, dtype, teacher, images, view) for name, teacher in teachers.items()}
    lacking = {name: len(cache.missing()) / cache.shards for name, cache in caches.items()}
    needed = int(sum(share * caches[name].bytes for name, share in lacking.items()))
    for name, cache in caches.items():
        logger.info(
            "target cache: %s, %s images x %d x %d %s, %.2f GB, %.0f %% there: %s",
            name, f"{cache.images:,}", *cache.shape, dtype, cache.bytes / 1e9, 100 * (1 - lacking[name]), cache.folder,
        )  # fmt: skip
    if where == "auto" and needed > SPARE * _free(root):
        logger.warning(
            "no target cache: it would add %.1f GB to %s, where %.1f GB are free", needed / 1e9, root, _free(root) / 1e9
        )
        return {}
    if needed:
        require_space(root, needed)
        with disk_errors(root):
            _fill(caches, teachers, images, view, batch, workers, process, processes)
    for cache in caches.values():
        cache.check()
    return caches


def _free(where: Path) -> int:
    while not where.exists():
        where = where.parent
    return shutil.disk_usage(where).free


def _describe(root: Path, dtype: str, teacher: Teacher, images: ImageList, view: str) -> TargetCache:
    """The cache of one teacher, in the folder that is named by what its features depend on."""
    processor = getattr(teacher.prepare, "processor", None)
    facts = {
        "teacher": teacher.sha256,
        "class": teacher.class_name,
        "shape": list(teacher.shape),
        "preprocessing": processor.to_dict() if processor is not None else repr(teacher.prepare),
        "view": view,
        "images": images.digest(),
        "count": len(images),
        "dtype": dtype,
        "rows": ROWS,
    }
    text = json.dumps(facts, indent=2, sort_keys=True, default=str)
    folder = root / f"{teacher.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if not (folder / "cache.json").exists():
        with disk_errors(root):
            write_text(folder / "cache.json", text + "\n")
    return TargetCache(folder, len(images), teacher.shape, dtype)


def _fill(
    caches: dict[str, TargetCache],
    teachers: dict[str, Teacher],
    images: ImageList,
    view: str,
    batch: int,
    workers: int,
    process: int,
    processes: int,
) -> None:
    """Makes the shards that are missing, beginning at another one in every process."""
    count = next(iter(caches.values())).shards
    first = (process * count // processes + (os.getpid() if processes == 1 else 0)) % count
    with Progress("target cache", count, unit="shards", show=process == 0) as bar:
        for number in ((first + step) % count for step in range(count)):
            due = {name: cache for name, cache in caches.items() if not cache.shard(number).exists()}
            if due:
                chosen = {name: teachers[name] for name in due}
                for name, features in _features(chosen, images, due, number, view, batch, workers).items():
                    with whole_file(due[name].shard(number)) as temporary, temporary.open("wb") as file:
                        np.save(file, features, allow_pickle=False)
            bar.advance()


def _features(
    teachers: dict[str, Teacher],
    images: ImageList,
    caches: dict[str, TargetCache],
    number: int,
    view: str,
    batch: int,
    workers: int,
) -> dict[str, NDArray[Any]]:
    """The features of one shard; those of an image that cannot be read are not a number."""
    rows = next(iter(caches.values())).rows(number)
    found = {name: np.full((len(rows), *cache.shape), np.nan, dtype=cache.dtype) for name, cache in caches.items()}
    plan = [list(rows[start : start + batch]) for start in range(0, len(rows), batch)]
    prepare = {name: teacher.prepare for name, teacher in teachers.items()}
    device = next(iter(teachers.values())).device
    for prepared in micro_batches(images, plan, no_student, prepare, view, workers, device):
        places = [index - rows.start for index in prepared.indices]
        for name, teacher in teachers.items() if places else ():
            found[name][places] = teacher.target(prepared.pixels[name]).cpu().numpy()
    return found
