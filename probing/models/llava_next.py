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
from probing.models.base import Backbone
from probing.models.image_tokens import select_strategy
from probing.models.llava import describe as describe
from probing.models.token_map import TokenMap, special_ids, token_kinds
from probing.recipe import TOKEN_KINDS, BackboneRecipe
from probing.utils.errors import UserError
from probing.utils.pretrained import read_json

MODEL_TYPE = "llava_next"


@dataclass(frozen=True)
class TiledInputs(llava.LlavaInputs):
    """Images → `Batch`, where the tokens of an image are the whole image, then rows of tiles with a newline each.

    Attributes:
        config: of the checkpoint.
    """

    config: Any = None

    def features(self, inputs: dict[str, Any], row: int) -> int:
        """Number of features that the model has for one image of a batch."""
        return len(self.packed(inputs["image_sizes"][row]))

    def token_map(self, inputs: dict[str, Tensor]) -> TokenMap:
        """Says what every position of the processor's output is."""
        ids = inputs["input_ids"]
        special = special_ids(self.processor.tokenizer)
        kinds = token_kinds(ids, inputs["attention_mask"], self.image_token_id, special)
        tiles = []
        for row, size in enumerate(inputs["image_sizes"]):
            places = (ids[row] == self.image_token_id).nonzero().flatten()
            packed = self.packed(size)
            if len(places) != len(packed):
                raise UserError(
                    f"the processor places {len(places)} image tokens for an image of {size.tolist()} where the model "
                    f"has {len(packed)} features; set image_grid_pinpoints and vision_aspect_ratio as in config.json"
                )
            kinds[row, places] = packed
            rows = int((packed == TOKEN_KINDS.index("newline")).sum())
            tiles.append((rows, int((packed == TOKEN_KINDS.index("tile")).sum()) // max(rows, 1)))
        return TokenMap(kinds, self.grid, tuple(tiles))

    def packed(self, size: Tensor) -> Tensor:
        """Kinds of one image's tokens, in their order: the model's own packing, of the kinds in place of features.

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
        """The model's arrangement of features (patches, tokens, C) of each image."""
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
        pairs = [[int(height), int(width)] for height, width in json.loads(value.translate(_BRACKETS))]
    except (ValueError, TypeError):
        raise UserError(
            f"image_grid_pinpoints is {value[:60]!r}; write a list of [height, width] in config.json"
        ) from None
    return pairs


_BRACKETS = str.maketrans("()", "[]")


def read_config(source: str, revision: str | None) -> Any:
    """Reads a configuration whose `image_grid_pinpoints` is text, which transformers refuses."""
    from transformers import CONFIG_MAPPING, PretrainedConfig

    values, _ = PretrainedConfig.get_config_dict(source, revision=revision)
    text = values.pop("image_grid_pinpoints")
    config: Any = CONFIG_MAPPING[values["model_type"]].from_dict(values)
    config.image_grid_pinpoints = parse_pinpoints(text, config.vision_config.image_size)
    return config


def open_processor(source: str, config: Any, recipe: BackboneRecipe) -> Any:
    """The checkpoint's own processor; see `probing.models.llava.open_processor`."""
    raw = read_json(source, "config.json", recipe.revision)
    if isinstance(raw.get("image_grid_pinpoints"), str):
        with tempfile.TemporaryDirectory() as folder:
            _copy_processor(source, raw, config, recipe.revision, Path(folder))
            processor = llava.open_processor(folder, recipe)
        processor.tokenizer.name_or_path = source
    else:
        processor = llava.open_processor(source, recipe)
    images = processor.image_processor
    images.image_grid_pinpoints = parse_pinpoints(images.image_grid_pinpoints, config.vision_config.image_size)
    return processor


def _copy_processor(source: str, raw: dict[str, Any], config: Any, revision: str | None, folder: Path) -> None:
    """Copies the files of a processor next to a `config.json` that transformers reads, as loading it does too."""
    from huggingface_hub import snapshot_download

    names = ("*.json", "*.jinja", "*.model", "*.txt")
    here = Path(source)
    if not here.is_dir():
        here = Path(snapshot_download(source, revision=revision, allow_patterns=list(names)))
    for file in (file for pattern in names for file in here.glob(pattern)):
        if not file.name.endswith(".index.json"):
            shutil.copyfile(file, folder / file.name)
    text = json.dumps(raw | {"image_grid_pinpoints": config.image_grid_pinpoints})
    (folder / "config.json").write_text(text, encoding="utf-8")


def make_inputs(source: str, config: Any, recipe: BackboneRecipe, kind: type[TiledInputs] = TiledInputs) -> TiledInputs:
    """Builds the input side of a checkpoint; see `probing.models.llava.make_inputs`.

    Raises:
        UserError: as there, and where tiles hold more or less than their patches, which transformers cannot pack.
    """
    processor = open_processor(source, config, recipe)
    features, size = llava.tower_features(processor, config)
    if features.extra:
        rows, columns = features.grid
        other = "full" if features.extra < 0 else "default"
        raise UserError(
            f"config.json: vision_feature_select_strategy is {select_strategy(config)}; set it to {other}: tiles have "
            f"{features.count} features where {rows} x {columns} patches are packed"
            if select_strategy(config) != other
            else f"{source}: its vision tower has {features.extra} more tokens than patches, which {config.model_type} "
            "cannot tile"
        )
    inputs = kind(processor, llava.prompt(processor, recipe), config.image_token_id, features.grid, config=config)
    llava.require_match(inputs, source, config, recipe.revision, features, size)
    return inputs


def inputs_of(processor: Any, config: Any, recipe: BackboneRecipe) -> TiledInputs:
    """The input side of a processor that was made for the tower."""
    text, grid = llava.prompt(processor, recipe), llava.tower_grid(config)
    return TiledInputs(processor, text, config.image_token_id, grid, config=config)


def load(source: str, config: Any, recipe: BackboneRecipe, device: torch.device, random_seed: int | None) -> Backbone:
    """Loads the checkpoint; see `probing.models.llava.load`."""
    return llava.load(source, config, recipe, device, random_seed, make_inputs(source, config, recipe))
