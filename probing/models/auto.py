"""Any vision-language model that transformers' `AutoModelForImageTextToText` loads and that has no separate file here.

The model itself names decoder and vision tower (`get_decoder`, `get_encoder`), its configuration the image tokens; the
grid follows from the processor's output. What is ambiguous is requested from the user, never guessed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import probing.utils.torchvision_shim  # noqa: F401
from probing.models import llava
from probing.models.base import Batch
from probing.models.image_tokens import DEFAULT_SIDE
from probing.models.token_map import TokenMap, special_ids, token_kinds
from probing.recipe import TOKEN_KINDS, BackboneRecipe
from probing.utils.errors import UserError

COUNTS = ("image_seq_length", "mm_tokens_per_image", "num_image_tokens", "image_seq_len")
"""Fields of configurations and processors with the number of tokens of one image, or of one part of it."""


@dataclass(frozen=True)
class AutoInputs:
    """Images → `Batch`, with the checkpoint's processor; all sequences carry the same text.

    Attributes:
        processor: the checkpoint's own.
        text: the rendered chat template.
        image_token_id: id of the placeholder of one image token.
        part_tokens: number of tokens of one image, or of one of its parts; None if no field states it.
        whole: which of several parts shows the whole image, `first` or `last`; None if the recipe does not say.
        side: square images are first resized to this side in pixels; None leaves them.
    """

    processor: Any
    text: str
    image_token_id: int
    part_tokens: int | None
    whole: str | None
    side: int | None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the image tokens of a square image."""
        return self([self.blank_image()]).tokens.grid

    def blank_image(self) -> Image.Image:
        """Returns a square image."""
        return Image.new("RGB", (self.side or DEFAULT_SIDE, self.side or DEFAULT_SIDE))

    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str] | None = None) -> Batch:
        """Prepares a batch of RGB images."""
        if self.side is not None:
            size = (self.side, self.side)
            images = [i.resize(size, Image.Resampling.BICUBIC) if i.width == i.height else i for i in images]
        inputs = self.encode(images, texts or [self.text] * len(images))
        return Batch(inputs, self.token_map(inputs))

    def encode(self, images: Sequence[Image.Image], texts: Sequence[str]) -> dict[str, Tensor]:
        """Returns the model's arguments for images at their own size and one rendered prompt each."""
        nested = [[image] for image in images]
        inputs = dict(self.processor(images=nested, text=list(texts), return_tensors="pt", padding=True))
        return {name: value for name, value in inputs.items() if isinstance(value, Tensor) and name != "labels"}

    def token_map(self, inputs: dict[str, Any]) -> TokenMap:
        """Maps every position of the processor's output to its kind.

        Raises:
            UserError: the grid is ambiguous, or differs between the images.
        """
        ids, attention = inputs["input_ids"], inputs["attention_mask"]
        kinds = token_kinds(ids, attention, self.image_token_id, special_ids(self.processor.tokenizer))
        ends = [getattr(self.processor, f"image_{name}_token_id", None) for name in ("break", "end")]  # Pixtral's
        ends = [number for number in ends if number is not None]
        kinds[torch.isin(ids, torch.tensor(ends, dtype=ids.dtype)) & (attention == 1)] = TOKEN_KINDS.index("newline")
        grids = [self._mark_tiles(row, kinds[row], inputs) for row in range(len(ids))]
        if len(set(grids)) > 1:
            raise UserError(
                f"images of different shapes have different grids here ({grids[0]} and others); set data.view=square"
            )
        return TokenMap(kinds, grids[0])

    def _mark_tiles(self, row: int, kinds: Tensor, inputs: dict[str, Any]) -> tuple[int, int]:
        """Returns one image's grid; tokens of parts that are not the whole image become tiles in `kinds`."""
        positions = (kinds == TOKEN_KINDS.index("image")).nonzero().flatten()
        count, part = len(positions), self.part_tokens or len(positions)
        if not count:
            raise UserError("the processor's output has no image tokens; this checkpoint needs a family file")
        if (grid := self._stated_grid(row, inputs)) and grid[0] * grid[1] == count:
            return grid
        side = round(part**0.5)
        if side * side != part or count % part:
            raise UserError(
                f"{count} image tokens, {self.part_tokens or 'an unknown number'} per image, are no grid; this "
                "checkpoint needs a family file"
            )
        if count > part:
            if self.whole is None:
                raise UserError(
                    f"the processor cuts an image into {count // part} parts of {part} tokens; which shows the whole "
                    "image? set backbone.whole_image=first or last"
                )
            kinds[positions[part:] if self.whole == "first" else positions[:-part]] = TOKEN_KINDS.index("tile")
        return side, side

    def _stated_grid(self, row: int, inputs: dict[str, Any]) -> tuple[int, int] | None:
        """Returns the grid that the processor states for one image."""
        if "image_grid_thw" in inputs:
            merge = int(getattr(self.processor.image_processor, "merge_size", 1))
            _, rows, columns = inputs["image_grid_thw"][row].tolist()
            return rows // merge, columns // merge
        if _is_pixtral(self.processor):
            patch = self.processor.patch_size * self.processor.spatial_merge_size
            height, width = inputs["image_sizes"][row].tolist()
            return int(height) // patch, int(width) // patch
        return None


def _is_pixtral(processor: Any) -> bool:
    """Returns whether a processor takes images of any size, with a token at the end of every row of patches."""
    return hasattr(processor, "image_break_token_id") and hasattr(processor, "spatial_merge_size")


def read_config(source: str, recipe: BackboneRecipe) -> Any:
    """Reads the configuration.

    Raises:
        UserError: transformers has no image-and-text model for it.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    config = llava.read_config(source, recipe)
    auto_map = getattr(config, "auto_map", None) or {}
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and "AutoModelForImageTextToText" not in auto_map:
        class_name = ", ".join(config.architectures or [config.model_type])
        raise UserError(
            f"{source} is no vision-language model but {class_name} (model type {config.model_type!r}); give a LLaVA, "
            "or another that AutoModelForImageTextToText loads"
        )
    return config


def make_inputs(source: str, config: Any, recipe: BackboneRecipe) -> AutoInputs:
    """Builds the input side of a checkpoint from its processor.

    Raises:
        UserError: its processor or chat template is missing, or its configuration names no image token.
    """
    processor = llava.open_processor(source, recipe)
    if not hasattr(processor, "image_processor"):
        raise UserError(f"{source} has no image processor; give a vision-language model")

    def first_field(names: Sequence[str], *holders: Any) -> int | None:
        values = (getattr(holder, name, None) for holder in holders for name in names)
        return next((int(value) for value in values if value), None)

    token = first_field(("image_token_id", "image_token_index"), config, processor)
    if token is None:
        raise UserError(f"{source} names no image token id, neither in config nor processor; it needs a family file")
    # these take every size of image, and each has another grid
    any_size = hasattr(processor.image_processor, "merge_size") or _is_pixtral(processor)
    default = getattr(getattr(config, "vision_config", None), "image_size", None) or DEFAULT_SIDE
    return AutoInputs(
        processor=processor,
        text=llava.prompt(processor, recipe),
        image_token_id=token,
        part_tokens=first_field(COUNTS, config, config.get_text_config(), processor),
        whole=recipe.whole_image,
        side=recipe.image_size or (default if any_size else None),
    )


load = llava.loader(make_inputs)


def describe(config: Any, inputs: AutoInputs) -> dict[str, Any]:
    """Returns what `probing inspect` shows, from configuration and processor alone."""
    vision, batch = getattr(config, "vision_config", None), inputs([inputs.blank_image()])
    tower = {"type": getattr(vision, "model_type", "?"), "square_images_resized_to": inputs.side or "no"}
    guessed = not inputs.part_tokens and "image_grid_thw" not in batch.inputs
    return {
        **llava.describe_common(config, inputs, batch, {"vision_tower": tower}),
        "found": f"generic adapter; image token id {inputs.image_token_id}",
        **({"not_sure": "the grid is the square root of the token count"} if guessed else {}),
    }
