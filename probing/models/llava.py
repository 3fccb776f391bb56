"""LLaVA-1.5 and VipLLaVA in the format of transformers, any LLM inside."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

import probing.utils.torchvision_shim  # noqa: F401
from probing.models.base import Backbone, Batch
from probing.models.chat_templates import find_template, render
from probing.models.decoder import decoder_parts
from probing.models.image_tokens import (
    ImageFeatures,
    feature_layer,
    image_features,
    match_processor,
    require_image_token,
    sides,
)
from probing.models.token_map import TokenMap, special_ids, token_kinds
from probing.recipe import TOKEN_KINDS, BackboneRecipe, model_name
from probing.utils.errors import UserError, first_line
from probing.utils.pretrained import checkpoint_path, identity, loading, pretrained, read_json, require_whole

MODEL_TYPES = ("llava", "vipllava")
SIDE = 448
"""Pixels of square images where a configuration names no size."""


@dataclass(frozen=True)
class LlavaInputs:
    """Images → `Batch`, through the checkpoint's processor; all sequences carry the same text.

    Attributes:
        processor: the checkpoint's own.
        text: the rendered chat template, with one image tag.
        image_token_id: id of the placeholder that stands for one image token.
        grid: rows and columns of the image tokens.
        border: colour that images are padded with to a square; None leaves them to the processor.
        extra: class and register tokens before the grid; negative where the first patches are dropped.
    """

    processor: Any
    text: str
    image_token_id: int
    grid: tuple[int, int]
    border: tuple[int, ...] | None = None
    extra: int = 0

    def __call__(self, images: Sequence[Image.Image]) -> Batch:
        """Prepares a batch of RGB images."""
        inputs = self.encode(images, [self.text] * len(images))
        return Batch(inputs, self.token_map(inputs))

    def encode(self, images: Sequence[Image.Image], texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """What the model takes, of images and as many rendered prompts."""
        if self.border is not None:
            images = [_padded(image, self.border) for image in images]
        inputs = dict(self.processor(images=list(images), text=list(texts), return_tensors="pt", padding=True))
        inputs.pop("token_type_ids", None)
        return inputs

    def features(self, inputs: dict[str, Any], row: int) -> int:
        """Number of features that the model has for one image of a batch."""
        return self.grid[0] * self.grid[1] + self.extra

    def token_map(self, inputs: dict[str, torch.Tensor]) -> TokenMap:
        """Says what every position of the processor's output is.

        Raises:
            UserError: an image has not as many tokens as others.
        """
        ids, attention = inputs["input_ids"], inputs["attention_mask"]
        image = ids == self.image_token_id
        counts = image.sum(dim=1)
        if bool((counts != self.features(inputs, 0)).any()):
            raise UserError(
                f"the processor places {counts.tolist()} image tokens where square images have "
                f"{self.features(inputs, 0)}; set data.view=square"
            )
        kinds = token_kinds(ids, attention, self.image_token_id, special_ids(self.processor.tokenizer))
        if self.extra > 0:
            kinds[image & (image.cumsum(dim=1) <= self.extra)] = TOKEN_KINDS.index("cls")
        return TokenMap(kinds, self.grid, dropped=max(0, -self.extra))


def _padded(image: Image.Image, border: tuple[int, ...]) -> Image.Image:
    """The image in the middle of a square."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), border)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def make_inputs(source: str, config: Any, recipe: BackboneRecipe) -> LlavaInputs:
    """Builds the input side of a checkpoint; needs its processor, not its weights.

    Raises:
        UserError: the processor is missing, has no chat template that can be used, or counts image tokens otherwise
            than the model.
    """
    processor = open_processor(source, recipe)
    features = fit_processor(processor, source, config, recipe.revision)
    text = prompt(processor, recipe)
    return LlavaInputs(processor, text, config.image_token_id, features.grid, extra=features.extra)


def inputs_of(processor: Any, config: Any, recipe: BackboneRecipe, pad_to_square: bool = False) -> LlavaInputs:
    """The input side of a processor that was made for the tower."""
    border = tuple(int(255 * mean) for mean in processor.image_processor.image_mean) if pad_to_square else None
    return LlavaInputs(processor, prompt(processor, recipe), config.image_token_id, tower_grid(config), border)


def tower_features(processor: Any, config: Any) -> tuple[ImageFeatures, tuple[int, int]]:
    """What the tower gives for a square image or tile, and height and width of its pixels.

    Raises:
        UserError: the tower cannot take the pixels of the image processor.
    """
    side = sides(getattr(config.vision_config, "image_size", None) or SIDE)
    pixels = processor.image_processor(Image.new("RGB", side[::-1]), return_tensors="pt")["pixel_values"]
    size = int(pixels.shape[-2]), int(pixels.shape[-1])
    try:
        return image_features(config, size), size
    except UserError:
        if size == side:
            raise
        field = "crop_size" if getattr(processor.image_processor, "do_center_crop", False) else "size"
        raise UserError(
            f"the image processor makes {size[0]} x {size[1]} pixels where the vision tower takes {side[0]} x "
            f"{side[1]}; set its {field} to that"
        ) from None


def fit_processor(processor: Any, source: str, config: Any, revision: str | None) -> ImageFeatures:
    """Makes a processor place as many image tokens as the model has features; see `require_match`."""
    features, size = tower_features(processor, config)
    inputs = LlavaInputs(processor, "", config.image_token_id, features.grid, extra=features.extra)
    require_match(inputs, source, config, revision, features, size)
    return features


def require_match(
    inputs: LlavaInputs,
    source: str,
    config: Any,
    revision: str | None,
    features: ImageFeatures,
    size: tuple[int, int],
) -> None:
    """The check at the door: image tokens of the processor are features of the model.

    Fields that an old folder's processor lacks are filled in.

    Raises:
        UserError: they are not; names the field that is wrong.
    """
    processor = inputs.processor
    require_image_token(processor, config, read_json(source, "config.json", revision))
    height, width = size
    tiled = hasattr(config, "image_grid_pinpoints")
    shapes = [(width, height)]
    if tiled:
        shapes += [(2 * width, height), (width, 3 * height), (2 * width, 2 * height)]

    def counts() -> list[tuple[int, int]]:
        found = []
        for shape in shapes:
            values = processor(images=[Image.new("RGB", shape)], text=[processor.image_token], return_tensors="pt")
            placed = int((values["input_ids"] == config.image_token_id).sum())
            found.append((placed, inputs.features(values, 0)))
        return found

    match_processor(processor, config, features, size, counts, read_json(source, "processor_config.json", revision))


def tower_grid(config: Any) -> tuple[int, int]:
    """Rows and columns of the vision tower's features of one square image."""
    vision = config.vision_config
    (height, width), (rows, columns) = sides(vision.image_size), sides(vision.patch_size)
    return height // rows, width // columns


def open_processor(source: str, recipe: BackboneRecipe) -> Any:
    """The checkpoint's own processor; raises as `make_inputs` does."""
    from transformers import AutoProcessor

    try:
        processor: Any = AutoProcessor.from_pretrained(
            source, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"checkpoint {source} has no usable processor ({first_line(error)}); save one beside the weights with "
            "AutoProcessor.save_pretrained"
        ) from None
    use_tokenizer_template(processor)
    if recipe.template:
        processor.chat_template = find_template(recipe.template)
    return processor


def use_tokenizer_template(processor: Any) -> None:
    """Gives a processor without chat template that of its tokenizer, as `tokenizer_config.json` may hold it."""
    template = getattr(getattr(processor, "tokenizer", None), "chat_template", None)
    if getattr(processor, "chat_template", None) is None and template:
        processor.chat_template = template["default"] if isinstance(template, dict) else template


def prompt(processor: Any, recipe: BackboneRecipe) -> str:
    """The prompt as the checkpoint's chat template writes it, with or without its special tokens.

    Shorter sequences of a batch are padded at their end from then on: no token of theirs sees the padding.

    Raises:
        UserError: there is no chat template that can be used, or no special tokens where the recipe insists.
    """
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    content = [{"type": "image"}, {"type": "text", "text": recipe.prompt}]
    text = render(processor, [{"role": "user", "content": content}], generation_prompt=True)
    there = [token for ids in special_ids(tokenizer).values() for token in tokenizer.convert_ids_to_tokens(ids)]
    if recipe.special_tokens == "on" and not there:
        raise UserError(f"checkpoint {recipe.checkpoint} has no special tokens; leave out backbone.special_tokens")
    for token in there if recipe.special_tokens == "off" else ():
        text = text.replace(token, "")
    return text


def load(
    source: str,
    config: Any,
    recipe: BackboneRecipe,
    device: torch.device,
    random_seed: int | None,
    inputs: LlavaInputs | None = None,
) -> Backbone:
    """Loads the checkpoint.

    Args:
        source: folder or Hub id.
        config: its configuration.
        recipe: how to load and ask it.
        device: where to put it, unless `recipe.device_map` says.
        random_seed: None for the checkpoint's own weights; else the seed of the random-weights control, in which LLM
            and projector are drawn anew and the vision tower is kept.
        inputs: the input side, where it is not LLaVA-1.5's.
    """
    inputs = inputs or make_inputs(source, config, recipe)
    model = load_model(source, config, recipe, device)
    if random_seed is not None:
        model = randomised(model, random_seed)
    return backbone_of(source, model, recipe, device, inputs)


def load_model(source: str, config: Any, recipe: BackboneRecipe, device: torch.device) -> Any:
    """Loads a model in transformers' format; raises UserError where it cannot be read, or is incomplete."""
    from transformers import AutoModelForImageTextToText

    with loading(f"checkpoint {source}"):
        model, missing, unexpected = pretrained(
            AutoModelForImageTextToText,
            source,
            config,
            device,
            revision=recipe.revision,
            trust_remote_code=recipe.trust_remote_code,
            **loading_arguments(recipe),
        )
    require_whole(source, missing, unexpected)
    return model


def loading_arguments(recipe: BackboneRecipe) -> dict[str, Any]:
    """How weights are loaded, as `from_pretrained` takes it."""
    arguments: dict[str, Any] = {"dtype": recipe.dtype}
    if recipe.attn_implementation:
        arguments["attn_implementation"] = recipe.attn_implementation
    if recipe.device_map:
        arguments["device_map"] = recipe.device_map
    if recipe.quantization_config:
        arguments["quantization_config"] = _quantization(recipe.quantization_config)
    return arguments


def backbone_of(
    source: str, model: Any, recipe: BackboneRecipe, device: torch.device, inputs: Any, family: str = ""
) -> Backbone:
    """A loaded model behind the interface, on its device; its decoder is the one that it names itself."""
    if not recipe.device_map and not recipe.quantization_config:
        model = model.to(device)
    blocks, norm = decoder_parts(model)
    return Backbone(
        name=model_name(checkpoint_path(source, model.config)),
        source=checkpoint_path(source, model.config),
        family=family or model.config.model_type,
        core=model.base_model.eval().requires_grad_(False),
        blocks=blocks,
        norm=norm,
        hidden_size=model.config.get_text_config().hidden_size,
        prepare=inputs,
        sha256=identity(source, model.config, device),
        words=model.get_input_embeddings(),
        projector=getattr(model.base_model, "multi_modal_projector", None),
        head=model.get_output_embeddings(),
        writer=model,
    )


def randomised(model: Any, seed: int) -> Any:
    """The same architecture with fresh weights around the trained vision tower, which is the one that it names itself.

    Raises:
        UserError: it names none.
    """
    tower = model.get_encoder("image")
    if tower is model:
        raise UserError(f"{type(model).__name__} names no vision tower to keep; leave out the control `random`")
    model.set_encoder(torch.nn.Identity(), "image")
    if not hasattr(model, "hf_device_map") and not getattr(model, "is_quantized", False):  # those cannot be moved
        model.to("meta")  # lest there be two of them at once
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(model)._from_config(model.config, dtype=model.dtype)
    fresh.set_encoder(tower, "image")
    return fresh


def _quantization(values: dict[str, Any]) -> Any:
    from transformers.quantizers.auto import AutoQuantizationConfig

    try:
        return AutoQuantizationConfig.from_dict(dict(values))
    except (ValueError, ImportError) as error:
        raise UserError(f"quantization_config cannot be used: {first_line(error)}") from None


def describe_llm(text: Any) -> dict[str, Any]:
    """What `probing inspect` says of the LLM, from its configuration."""
    return {
        "type": text.model_type,
        "layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "vocabulary": text.vocab_size,
    }


def describe(config: Any, inputs: LlavaInputs) -> dict[str, Any]:
    """What `probing inspect` shows, from configuration and processor alone."""
    text, vision = config.text_config, config.vision_config
    height, width = sides(getattr(vision, "image_size", None) or SIDE)
    batch = inputs([Image.new("RGB", (width, height))])
    dtype = getattr(config, "dtype", None)
    layer = feature_layer(config)
    width = vision.hidden_size * (1 if isinstance(layer, int) else len(layer))
    return {
        "family": config.model_type,
        "class": (config.architectures or ["?"])[0],
        "llm": describe_llm(text),
        "vision_tower": {
            "type": vision.model_type,
            "layers": getattr(vision, "num_hidden_layers", "?"),
            "hidden_size": vision.hidden_size,
            "image_size": getattr(vision, "image_size", "?"),
            "patch_size": getattr(vision, "patch_size", "?"),
            "feature_layer": layer,
        },
        "projector": {"type": f"MLP, {config.projector_hidden_act}", "in": width, "out": text.hidden_size},
        "dtype": str(dtype).removeprefix("torch.") if dtype is not None else "not stated",
        "prompt": inputs.text,
        "layers": f"0 to {text.num_hidden_layers}, and final",
        "tokens": {"total": int(batch.tokens.kinds.shape[1]), **batch.tokens.counts()},
        "image_grid": list(inputs.grid),
        **({"patches_dropped": batch.tokens.dropped} if batch.tokens.dropped else {}),
        **({"tile_grid": list(batch.tokens.tiles[0])} if batch.tokens.tiles else {}),
    }
