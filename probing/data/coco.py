"""Images of a folder in COCO's official layout."""

import hashlib
import io
import logging
import struct
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeVar

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from probing.data.annotation_file import Key, Size, key_order, read_annotation_file
from probing.data.image_modes import to_rgb
from probing.utils.errors import UserError
from probing.utils.images import square as square  # the view that most images are read in

logger = logging.getLogger(__name__)

ANNOTATION_KINDS = ("captions", "instances", "panoptic")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""What a file may hold, whatever it is called; Pillow would hand others, such as PostScript, to other programs."""
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_NOTES = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
"""Chunks of a PNG that pixels do not depend on, and that Pillow refuses where they are large."""
EXIF_WITHIN = 4096
"""Bytes at the beginning of a JPEG among which its EXIF data begin."""
QUARTER_TURNS = (5, 6, 7, 8)
"""EXIF orientations that exchange width and height."""
Result = TypeVar("Result")


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
        turned: names of images that are turned upright, see `find_turned`.
    """

    folder: Path
    split: str
    names: list[str]
    skipped: list[Skipped] = field(default_factory=list)
    unlisted: int = 0
    turned: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(self.names)

    def digest(self) -> str:
        """SHA-256 over file names, sizes and turns, in order: identifies the data without reading every pixel."""
        digest = hashlib.sha256()
        for name in self.names:
            turn = " turned" if name in self.turned else ""
            digest.update(f"{name} {(self.folder / name).stat().st_size}{turn}\n".encode())
        return digest.hexdigest()

    def read(self, index: int) -> Image.Image:
        """One image as RGB, as it is stored unless it is among `turned`.

        Raises:
            OSError: the file is corrupt or unreadable.
        """
        name = self.names[index]
        return read_image(self.folder / name, name in self.turned)


def read_image(path: Path | BinaryIO, upright: bool = True) -> Image.Image:
    """Reads one image file as RGB, see `probing.data.image_modes.to_rgb`.

    Args:
        path: of the file.
        upright: turn it as its EXIF orientation says; as a rule COCO's annotations are of images as they are stored.

    Raises:
        OSError: the file is missing, no image, corrupt, or of an absurd size.
    """

    def read(image: Image.Image) -> Image.Image:
        return to_rgb(ImageOps.exif_transpose(image) if upright and _orientation(image) != 1 else image)

    return open_image(path, read)


def image_size(path: Path, upright: bool = True) -> Size:
    """Reads width and height of an image file, and no pixels; raises OSError as `read_image` does."""
    width, height = open_image(path, lambda image: image.size)
    return (height, width) if upright and orientation(path) in QUARTER_TURNS else (width, height)


def orientation(path: Path) -> int:
    """Reads the EXIF orientation of an image file; 1, upright, where there is none.

    Raises:
        OSError: as `read_image`.
    """
    return open_image(path, _orientation)


def _orientation(image: Image.Image) -> int:
    if image.format == "TIFF":  # Pillow turns these by itself
        return 1
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001 - broken EXIF data do not make pixels unreadable
        return 1
    return found if found in range(1, 9) else 1


def open_image(path: Path | BinaryIO, use: Callable[[Image.Image], Result]) -> Result:
    """Opens an image file and returns what `use` makes of it; raises OSError as `read_image` does."""
    try:
        try:
            return _open_image(path, use)
        except ValueError:  # among others where texts or colour profile of a PNG are large
            if not isinstance(path, Path):
                path.seek(0)
            content = path.read_bytes() if isinstance(path, Path) else path.read()
            if not content.startswith(PNG_SIGNATURE):
                raise
            return _open_image(io.BytesIO(_without_notes(content)), use)
    except UnidentifiedImageError:  # Pillow's message holds the absolute path
        raise UnidentifiedImageError("cannot identify image file") from None
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - Pillow's readers raise whatever they stumble over
        raise OSError(f"{type(error).__name__}: {error}") from None


def _open_image(path: Path | BinaryIO, use: Callable[[Image.Image], Result]) -> Result:
    with Image.open(path, formats=FORMATS) as image:
        return use(image)


def _without_notes(content: bytes) -> bytes:
    """Leaves texts and colour profile out of a PNG."""
    parts, start = [content[:8]], 8
    while start + 8 <= len(content):
        length, kind = struct.unpack(">I4s", content[start : start + 8])
        if kind not in PNG_NOTES:
            parts.append(content[start : start + 12 + length])
        start += 12 + length
    return b"".join(parts)


def same_shape(one: Size, other: Size) -> bool:
    """Whether one size is the other, scaled and rounded to whole pixels."""

    def scaled(small: Size, large: Size) -> bool:
        low = max((side - 1) / whole for side, whole in zip(small, large, strict=True))
        high = min((side + 1) / whole for side, whole in zip(small, large, strict=True))
        return low < high

    return one == other or scaled(one, other) or scaled(other, one)


def find_turned(folder: Path, annotated: Mapping[str, Size]) -> frozenset[str]:
    """Finds the images that annotations describe upright, turned as their EXIF orientation says; logs their number.

    An image is, where its annotated size fits the upright image and not the stored one. Turns that keep the size (by
    180°, mirrored, of a square) follow the others of the same annotations.

    Args:
        folder: of the images.
        annotated: width and height by file name.
    """

    def judge(name: str) -> str | None:
        path, size = folder / name, annotated[name]
        try:
            if not _may_be_turned(path) or (turn := orientation(path)) == 1:
                return None
            stored = image_size(path, upright=False)
        except OSError:
            return None  # named when it is read
        turned = stored[::-1] if turn in QUARTER_TURNS else stored
        if stored == turned:
            return "unclear"
        if size == stored or (size != turned and same_shape(size, stored)):
            return "stored"
        return "turned" if same_shape(size, turned) else None

    with ThreadPoolExecutor() as pool:
        judged = dict(zip(annotated, pool.map(judge, annotated), strict=True))
    turned, unclear = ([name for name in judged if judged[name] == kind] for kind in ("turned", "unclear"))
    if turned and "stored" not in judged.values():
        turned, unclear = turned + unclear, []
    if turned:
        logger.warning(
            "%s: %d images are turned upright as their EXIF orientation and annotations say, first %s",
            folder.name, len(turned), turned[0],
        )  # fmt: skip
    if unclear:
        logger.warning(
            "%s: %d images have an EXIF orientation that annotations do not confirm, and are read as stored, first %s",
            folder.name, len(unclear), unclear[0],
        )  # fmt: skip
    return frozenset(turned)


def _may_be_turned(path: Path) -> bool:
    """Whether a file may have an EXIF orientation; opening every JPEG with Pillow takes about twice as long."""
    with path.open("rb") as file:
        head = file.read(EXIF_WITHIN)
    return not head.startswith(b"\xff\xd8") or b"Exif\0\0" in head


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
    listed, sizes = dict[str, Key](), dict[str, Size]()
    for source in found:
        file = read_annotation_file(source, folder)
        file.faults.log()
        for identity, own in list(file.shared.items())[:1]:
            logger.warning(
                "%s: %d ids belong to several images, whose annotations are left out, first id %s: %s",
                source.name, len(file.shared), identity, ", ".join(own),
            )  # fmt: skip
        listed |= file.ids
        sizes |= file.sizes
    ordered = sorted(listed, key=lambda name: (key_order(listed[name]), name))
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
    names = names[:limit]
    turned = find_turned(folder, {name: sizes[name] for name in names if name in sizes})
    return ImageList(folder, split, names, skipped, unlisted, turned)


def is_file(path: Path) -> bool:
    """Whether there is such a file; no where its name is one that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
