"""Images of a folder in COCO's official layout."""

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from PIL import Image

from probing.errors import BROKEN, UserError

logger = logging.getLogger(__name__)

ANNOTATION_KINDS = ("captions", "instances", "panoptic")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""What a file may hold, whatever it is called; Pillow would hand others, such as PostScript, to other programs."""


@dataclass(frozen=True)
class Skipped:
    """An image that was left out, and why."""

    image: str
    split: str
    reason: str


@dataclass
class ImageList:
    """The images of one split.

    Attributes:
        folder: folder that holds them.
        split: name of the split.
        names: file names, in order of their official ids.
        skipped: images that the annotations name and the folder lacks.
        unlisted: number of image files that no annotation file names; they are not used.
    """

    folder: Path
    split: str
    names: list[str]
    skipped: list[Skipped] = field(default_factory=list)
    unlisted: int = 0

    def __len__(self) -> int:
        return len(self.names)

    def digest(self) -> str:
        """SHA-256 over file names and sizes, in order: identifies the data without reading every pixel."""
        digest = hashlib.sha256()
        for name in self.names:
            digest.update(f"{name} {(self.folder / name).stat().st_size}\n".encode())
        return digest.hexdigest()

    def read(self, index: int) -> Image.Image:
        """One image as RGB.

        Raises:
            OSError: the file is corrupt or unreadable.
        """
        return read_image(self.folder / self.names[index])


def read_image(path: Path | BinaryIO) -> Image.Image:
    """One image file as RGB.

    Raises:
        OSError: the file is missing, no image, corrupt, or of an absurd size.
    """
    with _opened(path) as image:
        return image.convert("RGB")


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of an image file, whose pixels are not read; raises OSError as `read_image` does."""
    with _opened(path) as image:
        return image.size


@contextlib.contextmanager
def _opened(path: Path | BinaryIO) -> Iterator[Image.Image]:
    try:
        with Image.open(path, formats=FORMATS) as image:
            yield image
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - Pillow's readers raise whatever they stumble over
        raise OSError(f"{type(error).__name__}: {error}") from None


def _safe_name(name: object, source: Path) -> str:
    path = PurePosixPath(str(name))
    if not isinstance(name, str) or not name or path.is_absolute() or ".." in path.parts or "\\" in name:
        raise UserError(f"{source} names the image {name!r}, which is not a plain path below its split; mend the file")
    return name


def _listed_images(source: Path) -> dict[str, int]:
    """File name → official id, from one annotation file."""
    try:
        entries = json.loads(source.read_text(encoding="utf-8"))["images"]
        return {_safe_name(entry["file_name"], source): int(entry["id"]) for entry in entries}
    except BROKEN as error:
        raise UserError(
            f"{source} is not an annotation file of COCO ({type(error).__name__}: {error}); download it again"
        ) from None


def list_images(root: Path, split: str, limit: int | None = None) -> ImageList:
    """Lists the images of a split: those that its annotation files name and that are there.

    Args:
        root: folder with one sub-folder per split and `annotations/`.
        split: e.g. `train2017`.
        limit: take only the first so many.

    Raises:
        UserError: folder, images or annotations are missing, or an annotation file is broken or names a path outside.
    """
    folder = root / split
    if not root.is_dir():
        raise UserError(f"no such COCO folder: {root}; give coco:DIR with DIR/{split}/ and DIR/annotations/")
    if not folder.is_dir():
        splits = sorted(p.name for p in root.iterdir() if p.is_dir() and p.name != "annotations")
        there = ", ".join(splits) or "none"
        raise UserError(f"{root} has no split {split!r} (there: {there}); set data.train_split and data.eval_split")
    present = {p.name for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES}
    if not present:
        raise UserError(f"{folder} holds no images; unpack {split}.zip there")
    sources = [root / "annotations" / f"{kind}_{split}.json" for kind in ANNOTATION_KINDS]
    found = [source for source in sources if source.exists()]
    if not found:
        wanted = ", ".join(source.name for source in sources)
        raise UserError(f"{root / 'annotations'} has no annotations of {split}; put one of {wanted} there")
    listed: dict[str, int] = {}
    for source in found:
        listed |= _listed_images(source)
    ordered = sorted(listed, key=lambda name: (listed[name], name))
    names = [name for name in ordered if name in present or is_file(folder / name)]
    kept = set(names)
    missing = [name for name in ordered if name not in kept]
    unlisted = len(present - kept)
    if not names:
        raise UserError(
            f"none of the {len(listed)} images that {found[0].name} names is in {folder}; unpack {split}.zip"
        )
    if missing:
        logger.warning("%s: %d of %d listed images are missing, first %s", split, len(missing), len(listed), missing[0])
    if unlisted:
        logger.warning("%s: %d image files are in no annotation file and are not used", split, unlisted)
    skipped = [Skipped(name, split, "missing") for name in missing]
    return ImageList(folder, split, names[:limit], skipped, unlisted)


def is_file(path: Path) -> bool:
    """Whether there is such a file; no where its name is one that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def square(image: Image.Image, resample: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    """Squashes an image to a square of its longer side, so that no processor crops it and all grids line up."""
    side = max(image.size)
    return image if image.width == image.height else image.resize((side, side), resample)
