"""What to erase: the options of `probing erase`."""

from pathlib import Path
from typing import Literal, Self

from pydantic import ConfigDict, Field, model_validator

from probing.recipe import Strict

Position = Literal["image", "text", "all"]
PARTS = {"image": ("image",), "text": ("text",), "all": ("image", "text")}
"""Kinds of tokens at each position, each with its eraser."""


class Options(Strict):
    """Selects layers, positions and images."""

    model_config = ConfigDict(frozen=True)

    layers: str | None = None
    """Layers to erase from, such as 0,4,8-12,final. Default: all probed layers."""
    positions: tuple[Position, ...] = ()
    """Tokens to erase from: those of the whole image (not of its tiles), the text between image and answer, or both at
    once (`all`); repeatable. Default: image, then text; with conversations, image alone."""
    rank: int = Field(default=8, ge=1)
    """Number of principal components of each teacher's feature to erase."""
    fit_images: int | None = Field(default=None, ge=2)
    """Training images to fit on. Default: all of the run."""
    images: int | None = Field(default=1000, ge=1)
    """Held-out images to measure on."""
    conversations: Path | None = None
    """LLaVA-format conversations about held-out images; predicts the first answer of each image's first conversation.
    Default: COCO's captions, as answers to the run's prompt."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Images per forward pass. Default: as in training."""

    @model_validator(mode="after")
    def _text_is_that_of_the_prompt(self) -> Self:
        if self.conversations and not {"image"}.issuperset(self.positions):
            raise ValueError("text differs from question to question; with conversations leave out other positions")
        return self

    @property
    def places(self) -> tuple[Position, ...]:
        """The requested positions, or the default ones."""
        return self.positions or (("image",) if self.conversations else ("image", "text"))
