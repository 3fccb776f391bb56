"""The word for what each patch of an image shows, patch by patch as the vision tower cuts what it is given."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from probing.data.annotation_file import Size
from probing.data.coco import find_turned, image_size
from probing.data.instances import Instances, labels_on, read_label_maps
from probing.data.panoptic import UNLABELED, Panoptic
from probing.data.patch_labels import patch_labels, patch_shares, plain_name, word_numbers
from probing.utils.errors import UserError
from probing.utils.images import square

KINDS = ("panoptic", "instances")


@dataclass(frozen=True)
class Annotations:
    """What is where in the images of some conversations.

    Attributes:
        root: folder that holds the annotations.
        image_root: folder that image names are relative to.
        maps: per split, its label maps; an image's split is the folder that it lies in.
        missing: images without annotations, sorted.
        turned: images that are turned upright, see `probing.data.coco.find_turned`.
    """

    root: Path
    image_root: Path
    maps: dict[str, Panoptic | Instances]
    missing: list[str]
    turned: frozenset[str] = frozenset()

    def find(self, name: str) -> tuple[str, str] | None:
        """Split and file name of an image, or None where it has no annotations."""
        path = self.image_root / name
        found = self.maps.get(path.parent.name)
        return (path.parent.name, path.name) if found is not None and path.name in _images(found) else None

    def size(self, name: str) -> Size | None:
        """Annotated width and height of an image, where they are known."""
        place = self.find(name)
        rows_columns = self.maps[place[0]].sizes.get(place[1]) if place else None
        return rows_columns[::-1] if rows_columns else None

    @property
    def words(self) -> list[str]:
        """The words for the classes of all splits, each once: two classes may have the same."""
        return list(dict.fromkeys(plain_name(name) for found in self.maps.values() for name in found.names))


def _images(maps: Panoptic | Instances) -> dict[str, Any]:
    return maps.segments if isinstance(maps, Panoptic) else maps.sizes


def read_annotations(root: Path, image_root: Path, names: Iterable[str]) -> Annotations:
    """Reads the annotations of the splits that some images are of, a split's panoptic ones where it has them.

    Args:
        root: a folder in COCO's official layout; of it, only `annotations/` is used.
        image_root: folder that image names are relative to.
        names: the images, as conversations name them: `train2017/000000000009.jpg`.

    Raises:
        UserError: the folder is missing, none of the images is annotated, or annotations are broken.
    """
    folder = root / "annotations"
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}; set patches.annotations to coco:DIR with DIR/annotations/")
    images = sorted(set(names))
    splits = sorted({(image_root / name).parent.name for name in images})
    there = [split for split in splits if any((folder / f"{kind}_{split}.json").exists() for kind in KINDS)]
    read = Annotations(folder, image_root, {split: read_label_maps(root, split) for split in there}, [])
    missing = [name for name in images if read.find(name) is None]
    if len(missing) == len(images):
        looked = f"the first, {missing[0]}, is of split {(image_root / missing[0]).parent.name!r}" if missing else "no"
        raise UserError(
            f"none of the {len(images)} images of the conversations has annotations in {folder} ({looked}); "
            "set patches.annotations, or leave out patches"
        )
    sizes = {name: size for name in images if (size := read.size(name)) is not None}
    return Annotations(folder, image_root, read.maps, missing, find_turned(image_root, sizes))


def as_seen(labels: NDArray[np.uint8], image_processor: Any, squared: bool) -> NDArray[np.uint8]:
    """A label map after what is done to an image before a vision tower: squashing, resizing, cropping, padding.

    It goes through the processor as a picture whose pixels are taken over as they are, never mixed. The label is red,
    and green and blue follow from it: so what the processor pads with, in whatever colour, is told apart.

    Args:
        labels: class of every pixel, (rows, columns).
        image_processor: the checkpoint's own.
        squared: whether images are squashed to a square first.

    Returns:
        Class of every pixel that the tower sees, (rows, columns); `UNLABELED` where there is none.
    """
    picture = Image.fromarray(np.stack([labels, 255 - labels, labels], axis=-1))
    nearest = Image.Resampling.NEAREST
    seen = image_processor(
        images=square(picture, nearest) if squared else picture,
        resample=nearest, do_rescale=False, do_normalize=False, return_tensors="pt",
    )["pixel_values"][0].numpy()  # fmt: skip
    red, green, blue = seen.astype(int)
    return np.where((red + green == 255) & (red == blue), red, UNLABELED).astype(np.uint8)


@dataclass(frozen=True)
class PatchWords:
    """Says which word each patch of an image is labelled with.

    Attributes:
        annotations: what is where.
        image_processor: the checkpoint's own.
        grid: rows and columns of the patches.
        coverage: share of a patch that what a word stands for must cover.
        squared: whether images are squashed to a square first.
        words: the words, which labels are numbers of.
    """

    annotations: Annotations
    image_processor: Any
    grid: tuple[int, int]
    coverage: float
    squared: bool
    words: list[str] = field(init=False)
    _numbers: dict[str, NDArray[np.int64]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        words = self.annotations.words
        tables = {split: word_numbers(maps.names, words) for split, maps in self.annotations.maps.items()}
        object.__setattr__(self, "words", words)
        object.__setattr__(self, "_numbers", tables)

    def __call__(self, name: str, size: tuple[int, int]) -> Tensor:
        """Labels of an image's patches, (patches), row by row; -1 where there is none.

        Args:
            name: the image, as the conversation names it.
            size: its width and height in pixels, as models see it.

        Raises:
            OSError: its label map cannot be read, or its size is not the image's, scaled.
        """
        place = self.annotations.find(name)
        if place is None:
            return torch.full((self.grid[0] * self.grid[1],), -1)
        split, file = place
        try:
            labels = labels_on(self.annotations.maps[split], file, size)
        except OSError as error:  # without the folder, so that the reason means the same elsewhere
            raise OSError(error.strerror or str(error).replace(f"{self.annotations.root}/", "")) from None
        seen = self._numbers[split][as_seen(labels, self.image_processor, self.squared)]
        return torch.from_numpy(patch_labels(patch_shares(seen, len(self.words), self.grid), self.coverage))

    def require_usable(self, names: list[str], looked_for: int = 64) -> None:
        """Notices before training that patches have no labels, rather than by a loss that is always 0.

        Args:
            names: images, each once; evenly spaced ones of those with annotations are read, up to the first that has a
                labelled patch.
            looked_for: number of images to read, at most.

        Raises:
            UserError: none of them has one.
        """
        there = [name for name in names if self.annotations.find(name) is not None]
        reasons, unlabelled = [], 0
        for name in there[:: max(1, len(there) // looked_for)][:looked_for]:
            try:
                size = image_size(self.annotations.image_root / name, name in self.annotations.turned)
            except OSError:
                continue  # named when its turn comes
            try:
                if (self(name, size) >= 0).any():
                    return
                unlabelled += 1
            except OSError as error:
                reasons.append(f"{name}: {error}")
        if reasons and not unlabelled:
            raise UserError(
                f"none of {len(reasons)} annotated images looked at has a label map that can be used, first "
                f"{reasons[0]}; give annotations and images as published"
            )
        if unlabelled:
            raise UserError(
                f"no patch of {unlabelled} annotated images has a label; check patches.annotations and patches.coverage"
            )
