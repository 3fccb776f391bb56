"""Squashes images to squares."""

from PIL import Image


def square(image: Image.Image, resample: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    """Squashes an image to a square of its longer side, so that no processor crops it and all grids line up."""
    side = max(image.size)
    return image if image.width == image.height else image.resize((side, side), resample)
