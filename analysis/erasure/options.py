"""What to erase: the options of `probing erase`."""

from typing import Literal

from pydantic import ConfigDict, Field

from probing.recipe import Strict

Position = Literal["image", "text", "all"]
PARTS = {"image": ("image",), "text": ("text",), "all": ("image", "text")}
"""Kinds of tokens at each position, each with its eraser."""


class Options(Strict):
    """Selects layers, positions and images."""

    model_config = ConfigDict(frozen=True)

    layers: str | None = None
    """Layers to erase from, such as 0,4,8-12,final. Default: all probed layers."""
    positions: tuple[Position, ...] = ("image", "text")
    """Tokens to erase from: those of the whole image (tiles keep theirs), the text between image and answer, or all of
    these at once; repeatable. Default: image, and then text."""
    rank: int = Field(default=8, ge=1)
    """Number of principal components of each teacher's feature to erase."""
    fit_images: int | None = Field(default=None, ge=2)
    """Training images to fit on. Default: all of the run."""
    images: int | None = Field(default=1000, ge=1)
    """Held-out images with captions to measure on."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Images per forward pass. Default: as in training."""
