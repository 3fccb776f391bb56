"""Features of a list of images, teachers' or a vision tower's: computed once, kept on disk, read through memory maps.

A cache is a folder of shards, each the features of `ROWS` images in the order of the list, and is named by the hash of
all that they depend on. A shard is written beside its place and renamed into it, so one that is there is whole, and
any number of processes and runs can fill a folder at once: each begins at another shard and leaves out what is there.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probing.data.coco import ImageList
from probing.data.dataloader import micro_batches, no_student, viewed
from probing.models.base import Backbone, Batch
from probing.models.finite import finite_rows
from probing.teachers import Teacher
from probing.utils.cache_dir import VARIABLE, cache_folder
from probing.utils.errors import UserError
from probing.utils.files import disk_errors, require_space, whole_file, write_text
from probing.utils.paths import local_path
from probing.utils.processors import processor_settings
from probing.utils.progress import Progress

logger = logging.getLogger(__name__)

ROWS = 256
"""Images of a shard: 0.6 GB of the paper's depth features."""
SPARE = 0.9
"""Share of the free disk that `auto` fills at most."""


@dataclass(frozen=True)
class FeatureCache:
    """The features of one model for one list of images; picklable, so that reading processes can carry it.

    Attributes:
        folder: of the shards.
        images: number of images.
        shape: (N, D) of one image's features.
        dtype: `float32`, `float16`, or `bfloat16`, which NumPy has not: its bits lie in the files.
    """

    folder: Path
    images: int
    shape: tuple[int, int]
    dtype: str
    _open: dict[int, NDArray[Any]] = field(default_factory=dict, repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return FeatureCache, (self.folder, self.images, self.shape, self.dtype)

    @property
    def shards(self) -> int:
        """Number of shards of the whole."""
        return -(-self.images // ROWS)

    @property
    def bytes(self) -> int:
        """Size of the whole."""
        return self.images * self.shape[0] * self.shape[1] * self._stored.itemsize

    @property
    def _stored(self) -> np.dtype[Any]:
        return np.dtype("uint16" if self.dtype == "bfloat16" else self.dtype)

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
        row = torch.from_numpy(np.array(self._open[number][index % ROWS]))
        if self.dtype == "bfloat16":
            row = row.view(torch.bfloat16)
        return None if bool(row[0, 0].isnan()) else row.float()

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
        if found.shape != wanted or found.dtype != self._stored:
            raise UserError(
                f"{file} holds {found.dtype} {found.shape}, not {self._stored} {wanted}; remove it, and it is made "
                "again"
            )
        return found


def default_root() -> Path:
    """Where `auto` keeps caches."""
    return cache_folder() / "features"


@dataclass(frozen=True)
class Maker:
    """What computes features of images.

    Attributes:
        name: the first part of its folder's name.
        shape: (N, D) of one image's features.
        dtype: what they are kept in.
        prepare: RGB images → what `compute` takes, on the CPU.
        compute: gives (B, N, D) of it.
        device: where it computes.
        facts: all that its features depend on, besides the images and how they are viewed.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    prepare: Callable[[Sequence[Any]], Any]
    compute: Callable[[Any], Tensor]
    device: torch.device
    facts: Mapping[str, Any]


def teacher_maker(teacher: Teacher, dtype: str) -> Maker:
    """Computes a teacher's features."""
    facts = {
        "teacher": teacher.sha256,
        "class": teacher.class_name,
        "preprocessing": processor_settings(teacher.prepare),
    }
    return Maker(teacher.name, teacher.shape, dtype, teacher.prepare, teacher.target, teacher.device, facts)


def tower_maker(backbone: Backbone, weights: str, images: ImageList, view: str) -> Maker:
    """Computes what a checkpoint's vision tower and projector make of an image: the LLM's inputs at its tokens.

    Args:
        backbone: the checkpoint.
        weights: which of its weights, where that is not told by its hash: `none`, or `random`.
        images: of the split; the first that can be read tells the number of tokens.
        view: `square` or `own`, see `DataRecipe.view`.

    Raises:
        UserError: no image can be read, or the checkpoint does not compute the same from what is kept.
    """
    batch = backbone.prepare([_first(images, view)]).to(backbone.device)
    features = backbone.embed_images(batch)
    _require_same(backbone, batch, features)
    facts = {
        "checkpoint": backbone.sha256,
        "class": type(backbone.core).__name__,
        "weights": weights,
        "preprocessing": processor_settings(backbone.prepare),
    }
    _, tokens, width = features.shape
    dtype = str(features.dtype).removeprefix("torch.")

    def compute(batch: Batch) -> Tensor:
        return backbone.embed_images(batch.to(backbone.device))

    return Maker("tower", (tokens, width), dtype, backbone.prepare, compute, backbone.device, facts)


def _first(images: ImageList, view: str) -> Any:
    for index in range(len(images)):
        with contextlib.suppress(OSError):
            return viewed(images.read(index), view)
    raise UserError(f"no image of {images.split} could be read; check {images.folder}")


def _require_same(backbone: Backbone, batch: Batch, features: Tensor) -> None:
    """Raises UserError where a checkpoint's last layer is another with kept features than with pixels."""
    states: list[Tensor] = []
    try:
        for given in (batch, batch.with_embedded(features)):
            backbone.stream(given, [backbone.layers], lambda _, state: states.append(state))
        same = torch.equal(states[0].nan_to_num(), states[1].nan_to_num())
    except (TypeError, ValueError, KeyError, AttributeError):  # it insists on pixels
        same = False
    if not same:
        raise UserError(
            f"{backbone.name} ({backbone.family}) shows its LLM the image by more than input embeddings, which is all "
            "that could be kept; set data.tower_cache=off"
        )


def open_caches(
    where: str,
    makers: dict[str, Maker],
    images: ImageList,
    view: str,
    batch: int,
    workers: int,
    process: int = 0,
    processes: int = 1,
) -> dict[str, FeatureCache]:
    """Features for a list of images, made where they are not there yet.

    Args:
        where: `off`, `auto` or a folder.
        makers: what computes them, by any name.
        images: of the split.
        view: `square` or `own`, see `DataRecipe.view`.
        batch: images per forward pass.
        workers: processes that read images.
        process: number of this process.
        processes: that were started together.

    Returns:
        By the same names; empty where `off`, and where `auto` finds too little room.

    Raises:
        UserError: there is too little room in the folder, it cannot be written, or a shard is damaged.
    """
    if where == "off" or not makers:
        return {}
    root = default_root() if where == "auto" else local_path(where)
    instead = f"set {VARIABLE}, or the cache to a folder or off" if where == "auto" else "give another folder, or off"
    caches = {name: _describe(root, maker, images, view, instead) for name, maker in makers.items()}
    lacking = {name: len(cache.missing()) / cache.shards for name, cache in caches.items()}
    needed = int(sum(share * caches[name].bytes for name, share in lacking.items()))
    for name, cache in caches.items():
        logger.info(
            "kept features: %s, %s images x %d x %d %s, %.2f GB, %.0f %% there: %s",
            name, f"{cache.images:,}", *cache.shape, cache.dtype, cache.bytes / 1e9, 100 * (1 - lacking[name]),
            cache.folder,
        )  # fmt: skip
    if where == "auto" and needed > SPARE * _free(root):
        free = _free(root) / 1e9
        logger.warning("features are not kept: that would add %.1f GB to %s, with %.1f free", needed / 1e9, root, free)
        return {}
    if needed:
        require_space(root, needed)
        with disk_errors(root, instead):
            _fill(caches, makers, images, view, batch, workers, process, processes)
    for cache in caches.values():
        cache.check()
    return caches


def _free(where: Path) -> int:
    while not where.exists():
        where = where.parent
    return shutil.disk_usage(where).free


def _describe(root: Path, maker: Maker, images: ImageList, view: str, instead: str) -> FeatureCache:
    """The cache of one maker, in the folder that is named by what its features depend on."""
    facts = {
        **maker.facts,
        "shape": list(maker.shape),
        "view": view,
        "images": images.digest(),
        "count": len(images),
        "dtype": maker.dtype,
        "rows": ROWS,
    }
    text = json.dumps(facts, indent=2, sort_keys=True, default=str)
    folder = root / f"{maker.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    with disk_errors(root, instead):
        if not (folder / "cache.json").exists():
            write_text(folder / "cache.json", text + "\n")
    return FeatureCache(folder, len(images), maker.shape, maker.dtype)


def _fill(
    caches: dict[str, FeatureCache],
    makers: dict[str, Maker],
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
    with Progress("kept features", count, unit="shards", show=process == 0) as bar:
        for number in ((first + step) % count for step in range(count)):
            due = {name: cache for name, cache in caches.items() if not cache.shard(number).exists()}
            if due:
                chosen = {name: makers[name] for name in due}
                rows = next(iter(due.values())).rows(number)
                for name, features in _features(chosen, images, rows, view, batch, workers).items():
                    with whole_file(due[name].shard(number)) as temporary, temporary.open("wb") as file:
                        np.save(file, features, allow_pickle=False)
            bar.advance()


def _features(
    makers: dict[str, Maker], images: ImageList, rows: range, view: str, batch: int, workers: int
) -> dict[str, NDArray[Any]]:
    """The features of one shard: NaN where the image cannot be read, infinite where they are not finite."""
    found = {
        name: torch.full((len(rows), *maker.shape), torch.nan, dtype=getattr(torch, maker.dtype))
        for name, maker in makers.items()
    }
    plan = [list(rows[start : start + batch]) for start in range(0, len(rows), batch)]
    prepare = {name: maker.prepare for name, maker in makers.items()}
    device = next(iter(makers.values())).device
    for prepared in micro_batches(images, plan, no_student, prepare, view, workers, device):
        places = [index - rows.start for index in prepared.indices]
        for name, maker in makers.items() if places else ():
            computed = maker.compute(prepared.pixels[name])
            if computed.shape[1:] != maker.shape:
                raise UserError(
                    f"{maker.name}: one image gives {maker.shape[0]} tokens and another {computed.shape[1]}, and what "
                    "is kept has one shape; set data.view=square, or leave out the cache"
                )
            computed = computed.to("cpu", found[name].dtype)
            finite = finite_rows(computed)[:, None, None]  # not a number says that the image could not be read
            found[name][places] = computed.masked_fill(~finite, torch.inf)
    return {
        name: (values.view(torch.uint16) if values.dtype == torch.bfloat16 else values).numpy()
        for name, values in found.items()
    }
