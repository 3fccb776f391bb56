"""Reads image files of every Pillow mode as 8-bit RGB, turned upright on request."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

Size = tuple[int, int]
"""Width and height."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Accepted contents, whatever the file is called; Pillow hands others, such as PostScript, to other programs."""
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image upright, by EXIF orientation; `ImageOps.exif_transpose` fails if another EXIF field is broken."""
QUARTER_TURNS = (5, 6, 7, 8)
"""EXIF orientations that exchange width and height."""
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0
"""TIFF tags, and the value of the second in files whose largest number is black."""
FLOAT_SCALES = (1.0, 255.0, 65535.0)
INTEGER_SCALES = FLOAT_SCALES[1:]
"""Candidates for white in 32-bit grey, which does not define it: the smallest that no value exceeds counts."""

# Pillow refuses PNGs whose text chunks, such as the workflow of an image generator, exceed 1 MB each or 64 MB in all.
PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = 2**26, 2**29


def read_image(path: Path | BinaryIO, upright: bool = True) -> Image.Image:
    """Reads one image file as RGB.

    Args:
        path: of the file.
        upright: turn it as its EXIF orientation says; most annotations of COCO describe images as they are stored.

    Raises:
        OSError: the file is missing, not an image, corrupt, or far too large.
    """
    with open_image(path) as image:
        turn = UPRIGHT.get(_orientation(image)) if upright else None
        return to_rgb(image) if turn is None else to_rgb(image).transpose(turn)


def size_of_image(path: Path, upright: bool = True) -> Size:
    """Reads width and height of an image file without its pixels; raises OSError as `read_image` does."""
    (width, height), turn = size_and_orientation(path)
    return (height, width) if upright and turn in QUARTER_TURNS else (width, height)


def orientation(path: Path) -> int:
    """Reads the EXIF orientation of an image file, 1 if it has none; raises OSError as `read_image` does."""
    return size_and_orientation(path)[1]


def size_and_orientation(path: Path) -> tuple[Size, int]:
    """Reads the stored size and the EXIF orientation of an image file; raises OSError as `read_image` does."""
    with path.open("rb") as file:
        size = _size_of_plain_jpeg(file.read(4096))
    if size is not None:
        return size, 1
    with open_image(path) as image:
        return image.size, _orientation(image)


def _size_of_plain_jpeg(head: bytes) -> Size | None:
    """Returns width and height of a JPEG without EXIF or XMP data whose header is complete; else None.

    Five in six of COCO's images are such. Pillow takes three times as long, and reads the others.
    """
    at, size = 2, None
    while head[:2] == b"\xff\xd8" and len(head) >= at + 10 and head[at] == 0xFF:
        marker, content = head[at + 1], head[at + 4 : at + 10]
        if marker == 0xDA:  # pixels follow
            return size
        if marker == 0xE1 or not 0xC0 <= marker < 0xFF or content.startswith(b"MPF"):  # EXIF or XMP; several images
            return None
        if marker in (0xC0, 0xC1, 0xC2):
            bits, components = content[0], content[5]
            height, width = int.from_bytes(content[1:3]), int.from_bytes(content[3:5])
            # Pillow refuses other pixels, and checks large images.
            usable = bits == 8 and components in (1, 3, 4) and 0 < width * height < 2**26
            size = (width, height) if usable else None
        at += 2 + int.from_bytes(head[at + 2 : at + 4])
    return None


@contextlib.contextmanager
def open_image(path: Path | BinaryIO) -> Iterator[Image.Image]:
    """Opens an image file; whatever Pillow raises becomes an OSError of one line."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            yield image
    except UnidentifiedImageError:  # Pillow's message contains the absolute path
        raise UnidentifiedImageError("cannot identify image file") from None
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - Pillow's readers raise many types
        raise OSError(f"{type(error).__name__}: {error}") from None


def _orientation(image: Image.Image) -> int:
    if image.format == "TIFF":  # Pillow itself turns these
        return 1
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001 - broken EXIF data do not make pixels unreadable
        return 1
    return value if value in range(1, 9) else 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image to RGB.

    Transparent parts become white. 16-bit grey is divided by 257 (Pillow clips it at 255); 32-bit grey, integer or
    float, is scaled by `INTEGER_SCALES` or `FLOAT_SCALES`.

    Raises:
        ValueError: 32-bit values have no known scale.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_grey(image)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _grey(image: Image.Image) -> NDArray[np.uint8]:
    """Scales 16-bit or 32-bit grey to 8 bits, (rows, columns)."""
    values = np.asarray(image).astype(np.float64)
    tags: Any = getattr(image, "tag_v2", {})
    if image.mode.startswith("I;16"):
        white = 2.0 ** tags.get(BITS_PER_SAMPLE, (16,))[0] - 1
    else:
        white = _white(values, FLOAT_SCALES if image.mode == "F" else INTEGER_SCALES)
    share = values / white
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        share = 1 - share
    if image.info.get("transparency") is not None:  # PNG: the one value that is transparent
        share[values == image.info["transparency"]] = 1
    return np.rint(255 * share).astype(np.uint8)


def _white(values: NDArray[np.float64], scales: tuple[float, ...]) -> float:
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("its values are not finite")
    if low < 0 or high > scales[-1]:
        raise ValueError(f"values from {low:g} to {high:g} have no known scale; save it with 8 or 16 bits")
    return next(scale for scale in scales if high <= scale)
