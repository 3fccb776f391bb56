"""Lists the images of a folder in COCO's official layout."""

import contextlib
import hashlib
import itertools
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from probing.data.coco_annotations import Id, id_order, read_annotation_file
from probing.data.image_modes import QUARTER_TURNS, Size, size_and_orientation
from probing.data.image_modes import read_image as read_image
from probing.utils.errors import UserError
from probing.utils.images import square as square
from probing.utils.paths import is_file

logger = logging.getLogger(__name__)

ANNOTATION_KINDS = ("captions", "instances", "panoptic")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Skipped:
    """An image that is not used, and why."""

    image: str
    split: str
    reason: str


@dataclass
class ImageList:
    """The images of one split.

    Attributes:
        folder: of the images.
        split: its name.
        names: file names in order of the official ids.
        skipped: images that the annotations name and the folder lacks.
        unlisted: number of image files that no annotation file names; they are not used.
        turned: names of images that are turned upright, see `find_turned`.
        sizes: width and height as `read` returns them, of readable images that have an annotated size.
    """

    folder: Path
    split: str
    names: list[str]
    skipped: list[Skipped] = field(default_factory=list)
    unlisted: int = 0
    turned: frozenset[str] = frozenset()
    sizes: Mapping[str, Size] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def digest(self) -> str:
        """SHA-256 over file names, sizes and turns in order: identifies the data without reading every pixel."""
        digest = hashlib.sha256()
        for name in self.names:
            turn = " turned" if name in self.turned else ""
            digest.update(f"{name} {(self.folder / name).stat().st_size}{turn}\n".encode())
        return digest.hexdigest()

    def read(self, index: int) -> Image.Image:
        """Reads one image as RGB, as stored unless it is among `turned`; raises OSError if it is unreadable."""
        name = self.names[index]
        return read_image(self.folder / name, name in self.turned)


def first_image(images: ImageList, view: str) -> Image.Image:
    """Reads the first readable image, as models see it; raises UserError if there is none."""
    for index in range(len(images)):
        with contextlib.suppress(OSError):
            return square(images.read(index)) if view == "square" else images.read(index)
    raise UserError(f"no image of {images.split} can be read; check {images.folder}")


def list_images(root: Path, split: str, limit: int | None = None) -> ImageList:
    """Lists the images of a split that its annotation files name and its folder contains.

    Raises:
        UserError: folder, images or annotations are missing, or an annotation file is unusable.
    """
    folder = root / split
    if not root.is_dir():
        raise UserError(f"no such COCO folder: {root}; give coco:DIR with DIR/{split}/ and DIR/annotations/")
    if not folder.is_dir():
        splits = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir() and p.name != "annotations")) or "none"
        raise UserError(f"{root} has no split {split!r} (it has {splits}); set data.train_split and data.eval_split")
    present = {p.name for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES}
    if not present:
        raise UserError(f"{folder} has no images; unpack {split}.zip there")
    paths = [root / "annotations" / f"{kind}_{split}.json" for kind in ANNOTATION_KINDS]
    if not any(path.exists() for path in paths):
        wanted = ", ".join(path.name for path in paths)
        raise UserError(f"{root / 'annotations'} has no annotations of {split}; put one of {wanted} there")
    ids, sizes = dict[str, Id](), dict[str, Size]()
    for path in filter(Path.exists, paths):
        file = read_annotation_file(path, folder)
        ids |= file.ids
        sizes |= file.sizes
    listed = sorted(ids, key=lambda name: (id_order(ids[name]), name))
    names = [name for name in listed if name in present or is_file(folder / name)]
    if not names:
        raise UserError(f"{folder} has none of the {len(listed)} annotated images; unpack {split}.zip there")
    missing = sorted(set(listed) - set(names))
    unlisted = len(present - set(names))
    if missing:
        logger.warning("%s: %d of %d listed images are missing, first %s", split, len(missing), len(listed), missing[0])
    if unlisted:
        logger.warning("%s: %d image files are in no annotation file and are not used", split, unlisted)
    names = names[:limit]
    headers = read_headers(folder, [name for name in names if name in sizes])
    turned = find_turned(folder.name, headers, sizes)
    seen = {n: size[::-1] if n in turned and turn in QUARTER_TURNS else size for n, (size, turn) in headers.items()}
    skipped = [Skipped(name, split, "missing") for name in missing]
    return ImageList(folder, split, names, skipped, unlisted, turned, seen)


def same_shape(one: Size, other: Size) -> bool:
    """Whether one size is the other, scaled and rounded to whole pixels."""

    def scaled(small: Size, large: Size) -> bool:
        low = max((side - 1) / whole for side, whole in zip(small, large, strict=True))
        high = min((side + 1) / whole for side, whole in zip(small, large, strict=True))
        return low < high

    return one == other or scaled(one, other) or scaled(other, one)


def read_headers(folder: Path, names: Sequence[str]) -> dict[str, tuple[Size, int]]:
    """Reads stored size and EXIF orientation of images, without those that are unreadable; 15 s for train2017."""

    def read(part: Sequence[str]) -> list[tuple[str, tuple[Size, int]]]:
        found = []
        for name in part:
            with contextlib.suppress(OSError):  # reported when the image is read
                found.append((name, size_and_orientation(folder / name)))
        return found

    with ThreadPoolExecutor() as pool:  # disks answer several requests at once
        parts = pool.map(read, (names[first : first + 256] for first in range(0, len(names), 256)))
        return dict(itertools.chain.from_iterable(parts))


def find_turned(split: str, headers: Mapping[str, tuple[Size, int]], annotated: Mapping[str, Size]) -> frozenset[str]:
    """Finds images whose annotations describe them upright, turned by their EXIF orientation; logs their number.

    Such an image has an annotated size that fits the upright image and not the stored one. Turns that keep the size (by
    180°, mirrored, of a square) follow the other images.

    Args:
        split: its name.
        headers: from `read_headers`.
        annotated: width and height of these images, and perhaps of others.
    """

    def judge(name: str) -> str | None:
        stored, turn = headers[name]
        if turn == 1:
            return None
        upright, size = stored[::-1] if turn in QUARTER_TURNS else stored, annotated[name]
        if stored == upright:
            return "unclear"
        if size == stored or (size != upright and same_shape(size, stored)):
            return "stored"
        return "turned" if same_shape(size, upright) else None

    verdicts = {name: judge(name) for name in headers}
    turned, unclear = ([name for name in verdicts if verdicts[name] == kind] for kind in ("turned", "unclear"))
    if turned and "stored" not in verdicts.values():
        turned, unclear = turned + unclear, []
    if turned:
        logger.warning(
            "%s: %d images are turned upright by their EXIF orientation, as annotated, first %s",
            split, len(turned), turned[0],
        )  # fmt: skip
    if unclear:
        logger.warning(
            "%s: %d images are read as stored: annotations do not confirm their EXIF orientation, first %s",
            split, len(unclear), unclear[0],
        )  # fmt: skip
    return frozenset(turned)
