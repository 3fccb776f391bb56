"""Replaces the checkpoint's image by another input, to measure how much of a score depends on the image.

Teachers still see the image itself. `blank` is a grey image of the same size, `other` the next image of the split, and
`caption` the image's first caption, as text.
"""

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from probing.data.coco import ImageList
from probing.data.coco_annotations import Fault, Faults, read_annotation_file
from probing.models.base import Batch
from probing.models.chat_templates import render, rendering_at, rendering_moment
from probing.models.token_map import TokenMap, token_kinds
from probing.recipe import BackboneRecipe
from probing.utils.errors import UserError

SUBSTITUTES = ("blank", "other", "caption")
GREY = (128, 128, 128)
NO_IMAGE_TOKEN = -1
"""Image token id of a text without images."""


def _blank(index: int, image: Image.Image) -> Image.Image:
    return Image.new("RGB", image.size, GREY)


@dataclass(frozen=True)
class NextImage:
    """Replaces an image by the next of the split, the last by the first."""

    images: ImageList

    def __call__(self, index: int, image: Image.Image) -> Image.Image:
        """Reads the replacement; raises OSError if it is corrupt."""
        return self.images.read((index + 1) % len(self.images))


@dataclass(frozen=True)
class Caption:
    """Replaces an image by its caption."""

    names: list[str]
    captions: dict[str, str]

    def __call__(self, index: int, image: Image.Image) -> str:
        """Returns the replacement; raises OSError if there is none."""
        if (caption := self.captions.get(self.names[index])) is None:
            raise OSError("no caption")
        return caption


@dataclass(frozen=True)
class CaptionInputs:
    """Prepares the checkpoint's inputs from captions: caption and prompt in one turn without image.

    `grid` is that of the absent image tokens, `moment` the time that chat templates see, in any process.
    """

    processor: Any
    prompt: str
    grid: tuple[int, int]
    moment: datetime.datetime | None

    def __call__(self, captions: Sequence[str]) -> Batch:
        """Prepares a batch of captions."""
        turns = [[{"type": "text", "text": f"{caption}\n{self.prompt}"}] for caption in captions]
        with rendering_at(self.moment):
            texts = [render(self.processor, [{"role": "user", "content": turn}], True) for turn in turns]
        inputs = dict(self.processor.tokenizer(texts, return_tensors="pt", padding=True))
        inputs.pop("token_type_ids", None)
        kinds = token_kinds(inputs["input_ids"], inputs["attention_mask"], NO_IMAGE_TOKEN)
        return Batch(inputs, TokenMap(kinds, self.grid))


def read_captions(root: Path, split: str) -> dict[str, str]:
    """Reads the first caption of every image of a split, from `annotations/captions_<split>.json`.

    Raises:
        UserError: the file is missing, broken, or has no caption.
    """
    source = root / "annotations" / f"captions_{split}.json"
    if not source.exists():
        raise UserError(f"no {source}; put COCO's captions of {split} there")
    file, faults = read_annotation_file(source, root / split), Faults(source)
    captions: dict[str, str] = {}

    def read(entry: Any) -> None:
        name, caption = file.image_of(entry), entry["caption"]
        if not isinstance(caption, str) or not caption.strip():
            raise Fault("captions without text", name)
        captions.setdefault(name, caption.strip())

    faults.each(read, file.annotations)
    faults.require(captions)
    return captions


def substitute(kind: str, images: ImageList) -> Callable[[int, Image.Image], Any]:
    """Returns the replacement of a kind for images of a split: index and image → input.

    Raises:
        UserError: there are no captions, or there is no other image.
    """
    if kind == "blank":
        return _blank
    if kind == "other":
        if len(images) < 2:
            raise UserError(f"{images.split} has a single image; the control `other` needs two")
        return NextImage(images)
    return Caption(images.names, read_captions(images.folder.parent, images.split))


def caption_inputs(inputs: Any, recipe: BackboneRecipe) -> CaptionInputs:
    """Returns the preparation of captions that corresponds to a checkpoint's preparation of images."""
    return CaptionInputs(inputs.processor, recipe.prompt, inputs.grid, rendering_moment())
