"""Any vision-language model that transformers' `AutoModelForImageTextToText` loads, without a file of its own here.

Decoder and vision tower are those that the model itself names (`get_decoder`, `get_encoder`), image tokens those of its
configuration; the grid follows from the processor's output. What cannot be told is asked for, never guessed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import probing.utils.torchvision_shim  # noqa: F401
from probing.models import llava
from probing.models.base import Backbone, Batch
from probing.models.llava import SIDE
from probing.models.token_map import TokenMap, special_ids, token_kinds
from probing.recipe import TOKEN_KINDS, BackboneRecipe
from probing.utils.errors import UserError

DECLARED = ("image_seq_length", "mm_tokens_per_image", "num_image_tokens", "image_seq_len")
"""Where configurations and processors say how many tokens one image, or one part of it, becomes."""


@dataclass(frozen=True)
class GenericInputs:
    """Images → `Batch`, through the checkpoint's processor; all sequences carry the same text.

    Attributes:
        processor: the checkpoint's own.
        text: the rendered chat template.
        image_token_id: id of the placeholder of one image token.
        declared: tokens of one image, or of one of the parts that it is cut into; None where nothing says.
        whole: which of several parts shows the whole image, `first` or `last`; None where nobody said.
        side: what square images are resized to first; None leaves them.
    """

    processor: Any
    text: str
    image_token_id: int
    declared: int | None
    whole: str | None
    side: int | None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the image tokens of a square image."""
        return self([Image.new("RGB", (self.side or SIDE, self.side or SIDE))]).tokens.grid

    def __call__(self, images: Sequence[Image.Image]) -> Batch:
        """Prepares a batch of RGB images."""
        if self.side is not None:
            size = (self.side, self.side)
            images = [i.resize(size, Image.Resampling.BICUBIC) if i.width == i.height else i for i in images]
        inputs = self.encode(images, [self.text] * len(images))
        return Batch(inputs, self.token_map(inputs))

    def encode(self, images: Sequence[Image.Image], texts: Sequence[str]) -> dict[str, Tensor]:
        """What the model takes, of images at their own size and as many rendered prompts."""
        pictures = [[image] for image in images]
        inputs = dict(self.processor(images=pictures, text=list(texts), return_tensors="pt", padding=True))
        inputs.pop("labels", None)
        return {name: value for name, value in inputs.items() if isinstance(value, Tensor)}

    def token_map(self, inputs: dict[str, Any]) -> TokenMap:
        """Says what every position of the processor's output is.

        Raises:
            UserError: the grid cannot be told, or differs between the images.
        """
        ids, attention = inputs["input_ids"], inputs["attention_mask"]
        kinds = token_kinds(ids, attention, self.image_token_id, special_ids(self.processor.tokenizer))
        ends = [getattr(self.processor, f"image_{name}_token_id", None) for name in ("break", "end")]  # Pixtral's
        ends = [number for number in ends if number is not None]
        kinds[torch.isin(ids, torch.tensor(ends, dtype=ids.dtype)) & (attention == 1)] = TOKEN_KINDS.index("newline")
        grids = [self._place(row, kinds[row], inputs) for row in range(len(ids))]
        if len(set(grids)) > 1:
            raise UserError(
                f"this checkpoint gives images of different shapes different grids ({grids[0]} and others); set "
                "data.view=square, so that all are squares of one size"
            )
        return TokenMap(kinds, grids[0])

    def _place(self, row: int, kinds: Tensor, inputs: dict[str, Any]) -> tuple[int, int]:
        """Finds one image's grid; tokens of parts that are not the whole image become tiles."""
        places = (kinds == TOKEN_KINDS.index("image")).nonzero().flatten()
        if not len(places):
            raise UserError("the processor's output has no image tokens; this checkpoint needs a file of its own")
        if "image_grid_thw" in inputs:
            merge = int(getattr(self.processor.image_processor, "merge_size", 1))
            _, rows, columns = inputs["image_grid_thw"][row].tolist()
            grid = rows // merge, columns // merge
            if grid[0] * grid[1] == len(places):
                return grid
        if _is_pixtral(self.processor):
            patch = self.processor.patch_size * self.processor.spatial_merge_size
            rows, columns = (int(pixels) // patch for pixels in inputs["image_sizes"][row])
            if rows * columns == len(places):
                return rows, columns
        whole = self.declared or len(places)
        side = round(whole**0.5)
        if side * side != whole or len(places) % whole:
            raise UserError(
                f"{len(places)} image tokens, of which {self.declared or 'an unknown number'} belong to one image: no "
                "grid can be told; this checkpoint needs a file of its own"
            )
        if len(places) > whole:
            if self.whole is None:
                raise UserError(
                    f"the processor cuts an image into {len(places) // whole} parts of {whole} tokens; say which of "
                    "them shows the whole image: backbone.whole_image=first or last"
                )
            parts = places[whole:] if self.whole == "first" else places[:-whole]
            kinds[parts] = TOKEN_KINDS.index("tile")
        return side, side


def _is_pixtral(processor: Any) -> bool:
    """Whether a processor takes images of any size, with a token at the end of every row of patches."""
    return hasattr(processor, "image_break_token_id") and hasattr(processor, "spatial_merge_size")


def loads(config: Any) -> bool:
    """Whether transformers has an image-and-text model for a configuration."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or "AutoModelForImageTextToText" in (
        getattr(config, "auto_map", None) or {}
    )


def make_inputs(source: str, config: Any, recipe: BackboneRecipe) -> GenericInputs:
    """Builds the input side of a checkpoint.

    Raises:
        UserError: its processor or chat template is missing, or its configuration names no image token.
    """
    processor = llava.open_processor(source, recipe)
    if not hasattr(processor, "image_processor"):
        raise UserError(f"{source} has no image processor: it is no vision-language model")
    places = (config, processor)
    token = next(
        (t for p in places for n in ("image_token_id", "image_token_index") if (t := getattr(p, n, None))), None
    )
    if token is None:
        raise UserError(
            f"neither configuration nor processor of {source} names an image token id; it needs a file of its own"
        )
    text_config = config.get_text_config()
    declared = next(
        (int(n) for c in (config, text_config, processor) for name in DECLARED if (n := getattr(c, name, None))), None
    )
    vision = getattr(config, "vision_config", None)
    # every size is taken, and each has a grid of its own
    free = hasattr(processor.image_processor, "merge_size") or _is_pixtral(processor)
    side = recipe.image_size or ((getattr(vision, "image_size", None) or SIDE) if free else None)
    return GenericInputs(processor, llava.prompt(processor, recipe), int(token), declared, recipe.whole_image, side)


def load(source: str, config: Any, recipe: BackboneRecipe, device: torch.device, random_seed: int | None) -> Backbone:
    """Loads the checkpoint; see `probing.models.llava.load`."""
    inputs = make_inputs(source, config, recipe)
    model = llava.load_model(source, config, recipe, device)
    if random_seed is not None:
        model = llava.randomised(model, random_seed)
    return llava.backbone_of(source, model, recipe, device, inputs)


def describe(config: Any, inputs: GenericInputs) -> dict[str, Any]:
    """What `probing inspect` shows, from configuration and processor alone."""
    text, vision = config.get_text_config(), getattr(config, "vision_config", None)
    batch = inputs([Image.new("RGB", (inputs.side or SIDE, inputs.side or SIDE))])
    unsure = [] if inputs.declared or "image_grid_thw" in batch.inputs else ["the grid is the root of the token count"]
    return {
        "family": config.model_type,
        "class": (config.architectures or ["?"])[0],
        "llm": llava.describe_llm(text),
        "vision_tower": {"type": getattr(vision, "model_type", "?"), "square_images_resized_to": inputs.side or "no"},
        "dtype": str(getattr(config, "dtype", None) or "not stated").removeprefix("torch."),
        "prompt": inputs.text,
        "layers": f"0 to {text.num_hidden_layers}, and final",
        "tokens": {"total": int(batch.tokens.kinds.shape[1]), **batch.tokens.counts()},
        "image_grid": list(batch.tokens.grid),
        "found": f"generic adapter; image token id {inputs.image_token_id}",
        **({"not_sure": "; ".join(unsure)} if unsure else {}),
    }
