"""Pictures of every mode of Pillow as 8-bit RGB."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0
"""Tags of TIFF, and the value of the second in files whose largest number is black."""
FLOAT_SCALES = (1.0, 255.0, 65535.0)
INTEGER_SCALES = FLOAT_SCALES[1:]
"""White in pictures of 32 bits, which do not say it: the smallest of these that no value exceeds."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts a picture to RGB.

    Transparent parts are white: what lies hidden under alpha 0 never shows. 16-bit grey is divided by 257 (Pillow clips
    it at 255); grey of 32 bits, integer or float, is scaled by `INTEGER_SCALES` or `FLOAT_SCALES`.

    Raises:
        ValueError: values of 32 bits have no known scale.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_grey(image)).convert("RGB")
    if image.has_transparency_data:
        whole = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole).convert("RGB")
    return image.convert("RGB")


def _grey(image: Image.Image) -> NDArray[np.uint8]:
    """8-bit grey (rows, columns) of a picture with wider numbers."""
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
        raise ValueError("it has values that are not finite numbers")
    if low < 0 or high > scales[-1]:
        raise ValueError(f"values from {low:g} to {high:g} have no known scale; save it with 8 or 16 bits")
    return next(scale for scale in scales if high <= scale)
