"""LLaVA-NeXT in the format of transformers: the whole image, and its enlarged parts in tiles of any resolution."""

import json
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import probing.utils.torchvision_shim  # noqa: F401
from probing.models import llava
from probing.models.image_tokens import match_processor, select_strategy, tower_features
from probing.models.llava import describe as describe
from probing.models.token_map import TokenMap, special_ids, token_kinds
from probing.recipe import TOKEN_KINDS, BackboneRecipe
from probing.utils.checkpoint_files import read_json_or_empty
from probing.utils.errors import UserError

MODEL_TYPE = "llava_next"
PROCESSOR_FILES = ("*.json", "*.jinja", "*.model", "*.txt")


@dataclass(frozen=True)
class TiledInputs(llava.LlavaInputs):
    """Images → `Batch`, where an image's tokens are the whole image, then rows of tiles with a newline each.

    Attributes:
        config: of the checkpoint.
    """

    config: Any = None

    def count_features(self, inputs: dict[str, Any], row: int) -> int:
        """Returns the number of features that the model has for one image of a batch."""
        return len(self.image_kinds(inputs["image_sizes"][row]))

    def token_map(self, inputs: dict[str, Tensor]) -> TokenMap:
        """Maps every position of the processor's output to its kind."""
        ids, special = inputs["input_ids"], special_ids(self.processor.tokenizer)
        kinds, tiles = token_kinds(ids, inputs["attention_mask"], self.image_token_id, special), []
        for row, size in enumerate(inputs["image_sizes"]):
            image, packed = ids[row] == self.image_token_id, self.image_kinds(size)
            if int(image.sum()) != len(packed):
                raise UserError(
                    f"the processor places {int(image.sum())} image tokens for an image of {size.tolist()} where the "
                    f"model has {len(packed)} features; set image_grid_pinpoints and vision_aspect_ratio as in "
                    "config.json"
                )
            kinds[row, image] = packed
            rows = int((packed == TOKEN_KINDS.index("newline")).sum())
            tiles.append((rows, int((packed == TOKEN_KINDS.index("tile")).sum()) // max(rows, 1)))
        return TokenMap(kinds, self.grid, tuple(tiles))

    def image_kinds(self, size: Tensor) -> Tensor:
        """Returns the kinds of one image's tokens in order: the model's own packing, of kinds instead of features.

        Args:
            size: (2), height and width of the image.
        """
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        vision = self.config.vision_config
        patches = image_size_to_num_patches(size, self.config.image_grid_pinpoints, vision.image_size)
        image, tile, newline = (float(TOKEN_KINDS.index(kind)) for kind in ("image", "tile", "newline"))
        features = torch.full((patches, self.grid[0] * self.grid[1], 1), tile)
        features[0] = image
        (packed,), _ = self.pack([features], size[None], torch.tensor([newline]))
        return packed.flatten().round().long()

    def pack(self, features: list[Tensor], sizes: Tensor, newline: Tensor) -> Any:
        """Arranges features (patches, tokens, C) of each image as the model does."""
        from transformers import LlavaNextModel

        model: Any = SimpleNamespace(config=self.config)
        return LlavaNextModel.pack_image_features(
            model, features, sizes, self.config.vision_feature_select_strategy, image_newline=newline
        )


def parse_pinpoints(value: Any, side: int) -> Any:
    """Reads the resolutions that images are tiled at, which LLaVA's code may write as text.

    Args:
        value: a list of (height, width), or text: `[[336, 672], …]`, or `(1x1),...,(6x6)` in tiles.
        side: of a tile, in pixels.

    Raises:
        UserError: the text is neither.
    """
    if not isinstance(value, str):
        return value
    counts = [(int(rows), int(columns)) for rows, columns in re.findall(r"\(\s*(\d+)\s*x\s*(\d+)\s*\)", value)]
    if counts:
        (top, left), (bottom, right) = counts[0], counts[-1]
        return [[r * side, c * side] for r in range(top, bottom + 1) for c in range(left, right + 1)]
    try:
        pairs = json.loads(value.replace("(", "[").replace(")", "]"))
        return [[int(height), int(width)] for height, width in pairs]
    except (ValueError, TypeError):
        raise UserError(
            f"image_grid_pinpoints is {value[:60]!r}; write a list of [height, width] in config.json"
        ) from None


def read_config(source: str, recipe: BackboneRecipe) -> Any:
    """Reads the configuration; transformers refuses `image_grid_pinpoints` that are text."""
    from transformers import CONFIG_MAPPING, PretrainedConfig

    if not _pinpoints_are_text(source, recipe):
        return llava.read_config(source, recipe)
    values, _ = PretrainedConfig.get_config_dict(source, revision=recipe.revision)
    text = values.pop("image_grid_pinpoints")
    config: Any = CONFIG_MAPPING[values["model_type"]].from_dict(values)
    config.image_grid_pinpoints = parse_pinpoints(text, config.vision_config.image_size)
    return config


def _pinpoints_are_text(source: str, recipe: BackboneRecipe) -> bool:
    return isinstance(read_json_or_empty(source, "config.json", recipe.revision).get("image_grid_pinpoints"), str)


def open_processor(source: str, config: Any, recipe: BackboneRecipe) -> Any:
    """Opens the checkpoint's processor; see `probing.models.llava.open_processor`."""
    if _pinpoints_are_text(source, recipe):
        with tempfile.TemporaryDirectory() as folder:  # transformers reads config.json for the tokenizer
            _copy_processor(source, config, recipe, Path(folder))
            processor = llava.open_processor(folder, recipe)
        processor.tokenizer.name_or_path = source
    else:
        processor = llava.open_processor(source, recipe)
    images = processor.image_processor
    images.image_grid_pinpoints = parse_pinpoints(images.image_grid_pinpoints, config.vision_config.image_size)
    return processor


def _copy_processor(source: str, config: Any, recipe: BackboneRecipe, folder: Path) -> None:
    """Copies the files of a processor, and the configuration with pinpoints as a list."""
    from huggingface_hub import snapshot_download

    if not Path(source).is_dir():
        source = snapshot_download(source, revision=recipe.revision, allow_patterns=list(PROCESSOR_FILES))
    for file in (file for pattern in PROCESSOR_FILES for file in Path(source).glob(pattern)):
        shutil.copyfile(file, folder / file.name)
    config.save_pretrained(folder)


def make_inputs(source: str, config: Any, recipe: BackboneRecipe, kind: type[TiledInputs] = TiledInputs) -> TiledInputs:
    """Builds the input side of a checkpoint; see `probing.models.llava.make_inputs`.

    Raises:
        UserError: as there, and if tiles hold more or less than their patches, which transformers cannot pack.
    """
    processor = open_processor(source, config, recipe)
    features, strategy = tower_features(processor, config), select_strategy(config)
    right = "full" if features.extra < 0 else "default"
    if features.extra and strategy != right:
        raise UserError(
            f"config.json: vision_feature_select_strategy is {strategy}; set it to {right}: tiles have "
            f"{features.count} features and {features.grid[0]} x {features.grid[1]} patches"
        )
    if features.extra:
        raise UserError(f"{source}: its tower has {features.extra} tokens besides patches; give another to be tiled")
    inputs = kind(processor, llava.prompt(processor, recipe), config.image_token_id, features.grid, config=config)
    match_processor(inputs, features, source, config, recipe.revision)
    return inputs


load = llava.loader(make_inputs)
