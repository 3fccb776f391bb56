"""Labels each patch that the vision tower sees with the word for what it shows."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from probing.data.coco import find_turned, read_headers
from probing.data.image_modes import Size, size_of_image
from probing.data.instances import Instances, labels_on, read_label_maps
from probing.data.panoptic import UNLABELED, Panoptic
from probing.data.patch_labels import patch_labels, patch_shares, plain_name, word_numbers
from probing.utils.errors import UserError
from probing.utils.images import square


@dataclass(frozen=True)
class Annotations:
    """Label maps by split of the images of some conversations; an image's split is the name of its folder.

    `missing` are images without annotations, `turned` those of `probing.data.coco.find_turned`.
    """

    root: Path
    image_root: Path
    maps: dict[str, Panoptic | Instances]
    missing: list[str]
    turned: frozenset[str] = frozenset()

    def find(self, name: str) -> tuple[str, str] | None:
        """Returns split and file name of an image, or None if it has no annotations."""
        path = self.image_root / name
        maps = self.maps.get(path.parent.name)
        return (path.parent.name, path.name) if maps is not None and path.name in maps.images else None

    def size(self, name: str) -> Size | None:
        """Returns the annotated size of an image, if it is known."""
        found = self.find(name)
        return self.maps[found[0]].sizes.get(found[1]) if found else None

    @property
    def words(self) -> list[str]:
        """The words for the classes of all splits, without repetition: two classes may share one."""
        return list(dict.fromkeys(plain_name(name) for maps in self.maps.values() for name in maps.names))


def read_annotations(root: Path, image_root: Path, names: Iterable[str]) -> Annotations:
    """Reads the annotations of all splits that some images (`train2017/000000000009.jpg`) belong to.

    Of `root`, in COCO's official layout, only `annotations/` is used. Raises UserError if the folder is missing, none
    of the images is annotated, or annotations are broken.
    """
    folder = root / "annotations"
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}; set patches.annotations to coco:DIR with DIR/annotations/")
    images = sorted(set(names))
    splits = sorted({(image_root / name).parent.name for name in images})
    annotated = [s for s in splits if any((folder / f"{kind}_{s}.json").exists() for kind in ("panoptic", "instances"))]
    found = Annotations(folder, image_root, {split: read_label_maps(root, split) for split in annotated}, [])
    missing = [name for name in images if found.find(name) is None]
    if len(missing) == len(images):
        first = f"; the first, {missing[0]}, is of split {(image_root / missing[0]).parent.name!r}" if missing else ""
        raise UserError(
            f"none of the {len(images)} images of the conversations has annotations in {folder}{first}; "
            "set patches.annotations, or omit patches"
        )
    sizes = {name: size for name in images if (size := found.size(name)) is not None}
    turned = find_turned(image_root.name, read_headers(image_root, list(sizes)), sizes)
    return Annotations(folder, image_root, found.maps, missing, turned)


def as_seen(labels: NDArray[np.uint8], image_processor: Any, squared: bool) -> NDArray[np.uint8]:
    """Applies to a label map what is done to an image before a vision tower: squashing, resizing, cropping, padding.

    The processor gets an image in which red is the label, resized to the nearest pixel. Green and blue follow from red,
    so that padding of any colour is recognised.

    Returns:
        Class of every pixel that the tower sees, (rows, columns); `UNLABELED` where there is none.
    """
    image, nearest = Image.fromarray(np.stack([labels, 255 - labels, labels], axis=-1)), Image.Resampling.NEAREST
    seen = image_processor(
        images=square(image, nearest) if squared else image,
        resample=nearest, do_rescale=False, do_normalize=False, return_tensors="pt",
    )["pixel_values"][0].numpy()  # fmt: skip
    red, green, blue = seen.astype(int)
    return np.where((red + green == 255) & (red == blue), red, UNLABELED).astype(np.uint8)


@dataclass(frozen=True)
class PatchWords:
    """Labels the patches of an image, on a grid (rows, columns), with words that cover at least a share of them.

    `squared`: images are squashed to a square before the checkpoint's image processor.
    """

    annotations: Annotations
    image_processor: Any
    grid: tuple[int, int]
    coverage: float
    squared: bool

    @cached_property
    def words(self) -> list[str]:
        """The words that labels are indices of."""
        return self.annotations.words

    @cached_property
    def _tables(self) -> dict[str, NDArray[np.int64]]:
        return {split: word_numbers(maps.names, self.words) for split, maps in self.annotations.maps.items()}

    def __call__(self, name: str, size: Size) -> Tensor:
        """Labels the patches of an image of a size, (patches), row by row; -1 where there is no label.

        Raises:
            OSError: its label map is unreadable, or its size is not the image's, scaled.
        """
        found = self.annotations.find(name)
        if found is None:
            return torch.full((self.grid[0] * self.grid[1],), -1)
        split, file = found
        try:
            labels = labels_on(self.annotations.maps[split], file, size)
        except OSError as error:  # without the folder, so that the reason is the same on other machines
            raise OSError(error.strerror or str(error).replace(f"{self.annotations.root}/", "")) from None
        words = self._tables[split][as_seen(labels, self.image_processor, self.squared)]
        return torch.from_numpy(patch_labels(patch_shares(words, len(self.words), self.grid), self.coverage))

    def require_usable(self, names: list[str]) -> None:
        """Checks before training that patches have labels, since the loss would always be 0 without them.

        Reads evenly spaced annotated images, up to the first that has a labelled patch; raises UserError if none has.
        """
        annotated = [name for name in names if self.annotations.find(name) is not None]
        reasons, unlabelled = [], 0
        for name in annotated[:: max(1, len(annotated) // 64)][:64]:
            path = self.annotations.image_root / name
            try:
                if (self(name, size_of_image(path, name in self.annotations.turned)) >= 0).any():
                    return
                unlabelled += 1
            except OSError as error:
                reasons.append(f"{name}: {error}")
        if unlabelled:
            raise UserError(
                f"no patch of {unlabelled} annotated images has a label; check patches.annotations and patches.coverage"
            )
        if reasons:
            raise UserError(f"none of {len(reasons)} annotated images is usable, first {reasons[0]}; fix them")
