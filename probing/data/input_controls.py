"""What a checkpoint is shown in place of an image, to tell how much of a score comes from the picture.

Teachers still see the image itself. `blank` is a grey one of the same size, `other` the next image of the split, and
`caption` its first caption, as text.
"""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from probing.data.annotation_file import Fault, Faults, read_annotation_file
from probing.data.coco import ImageList
from probing.models.base import Batch
from probing.models.chat_templates import render, rendering_at, rendering_moment
from probing.models.token_map import TokenMap, token_kinds
from probing.recipe import BackboneRecipe
from probing.utils.errors import BROKEN, UserError

SUBSTITUTES = ("blank", "other", "caption")
GREY = (128, 128, 128)
NO_IMAGE = -1
"""In place of the id of the image token, where a text has none."""


@dataclass(frozen=True)
class Blank:
    """A grey image of the same size."""

    def __call__(self, index: int, picture: Image.Image) -> Image.Image:
        """In place of one image."""
        return Image.new("RGB", picture.size, GREY)


@dataclass(frozen=True)
class Other:
    """The next image of the split; for the last the first."""

    images: ImageList

    def __call__(self, index: int, picture: Image.Image) -> Image.Image:
        """In place of one image; raises OSError where the other is corrupt."""
        return self.images.read((index + 1) % len(self.images))


@dataclass(frozen=True)
class Caption:
    """The first caption of an image.

    Attributes:
        names: of the images, by index.
        captions: by image name.
    """

    names: list[str]
    captions: dict[str, str]

    def __call__(self, index: int, picture: Image.Image) -> str:
        """In place of one image; raises OSError where it has no caption."""
        try:
            return self.captions[self.names[index]]
        except KeyError:
            raise OSError("no caption") from None


@dataclass(frozen=True)
class CaptionInputs:
    """Captions → `Batch`: the caption, and then the prompt, in one turn without image.

    Attributes:
        processor: the checkpoint's own.
        prompt: what follows the caption.
        grid: of the image tokens that are not there.
        moment: that the chat template is rendered at, in whatever process.
    """

    processor: Any
    prompt: str
    grid: tuple[int, int]
    moment: datetime.datetime | None

    def __call__(self, captions: Sequence[str]) -> Batch:
        """Prepares a batch of captions."""
        with rendering_at(self.moment):
            texts = [self._text(f"{caption}\n{self.prompt}") for caption in captions]
        inputs = dict(self.processor.tokenizer(texts, return_tensors="pt", padding=True))
        inputs.pop("token_type_ids", None)
        kinds = token_kinds(inputs["input_ids"], inputs["attention_mask"], NO_IMAGE)
        return Batch(inputs, TokenMap(kinds, self.grid))

    def _text(self, turn: str) -> str:
        return render(self.processor, [{"role": "user", "content": [{"type": "text", "text": turn}]}], True)


def read_captions(root: Path, split: str) -> dict[str, str]:
    """Reads the first caption of every image of a split, from `annotations/captions_<split>.json`.

    Raises:
        UserError: the file is missing or broken, or holds no caption.
    """
    source = root / "annotations" / f"captions_{split}.json"
    if not source.exists():
        raise UserError(f"no {source}; the control `caption` needs COCO's captions of {split}")
    file, faults = read_annotation_file(source, root / split), Faults(source)
    found: dict[str, str] = {}
    for entry in file.whole.get("annotations", []):
        try:
            name, caption = file.image_of(entry), entry["caption"]
            if not isinstance(caption, str) or not caption.strip():
                raise Fault("captions without text", name)
            found.setdefault(name, caption.strip())
        except BROKEN as error:
            faults.add(error)
    faults.require(found)
    return found


def substitute(kind: str, images: ImageList) -> Blank | Other | Caption:
    """What is shown in place of the images of a split.

    Args:
        kind: one of `SUBSTITUTES`.
        images: the split.

    Raises:
        UserError: there are no captions, or there is no other image.
    """
    if kind == "blank":
        return Blank()
    if kind == "other":
        if len(images) < 2:
            raise UserError(f"{images.split} has one image, and no other to show in its place")
        return Other(images)
    return Caption(images.names, read_captions(images.folder.parent, images.split))


def caption_inputs(inputs: Any, recipe: BackboneRecipe) -> CaptionInputs:
    """The input side for captions, from a checkpoint's own."""
    return CaptionInputs(inputs.processor, recipe.prompt, inputs.grid, rendering_moment())
