"""LLaVA-1.5 in the format of transformers, with any LLM inside; and what all families share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

import probing.utils.torchvision_shim  # noqa: F401
from probing.models.base import Backbone, Batch, InputProcessor
from probing.models.chat_templates import find_template, render
from probing.models.decoder import decoder_parts
from probing.models.image_tokens import ImageFeatures, feature_layer, image_size, match_processor, tower_features
from probing.models.open_clip_tower import OpenClipTowerConfig
from probing.models.random_weights import with_random_weights
from probing.models.token_map import TokenMap, special_ids, token_kinds
from probing.recipe import TOKEN_KINDS, BackboneRecipe, model_name
from probing.utils.checkpoint_files import loading
from probing.utils.errors import UserError, first_line
from probing.utils.pretrained import checkpoint_path, identity, load_config, pretrained, require_whole

MODEL_TYPE = "llava"


@dataclass(frozen=True)
class LlavaInputs:
    """Images → `Batch`, with the checkpoint's processor; all sequences carry the same text.

    Attributes:
        processor: the checkpoint's own.
        text: the rendered chat template, with one image tag.
        image_token_id: id of the placeholder of one image token.
        grid: rows and columns of the image tokens.
        border: colour that images are padded with to a square; None if the processor decides.
        extra: number of class and register tokens before the grid; negative if the first patches are dropped.
    """

    processor: Any
    text: str
    image_token_id: int
    grid: tuple[int, int]
    border: tuple[int, ...] | None = None
    extra: int = 0

    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str] | None = None) -> Batch:
        """Prepares a batch of RGB images."""
        inputs = self.encode(images, texts or [self.text] * len(images))
        return Batch(inputs, self.token_map(inputs))

    def encode(self, images: Sequence[Image.Image], texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Returns the model's arguments for images and one rendered prompt each."""
        if self.border is not None:
            images = [_pad_to_square(image, self.border) for image in images]
        inputs = dict(self.processor(images=list(images), text=list(texts), return_tensors="pt", padding=True))
        inputs.pop("token_type_ids", None)
        return inputs

    def count_features(self, inputs: dict[str, Any], row: int) -> int:
        """Returns the number of features that the model has for one image of a batch."""
        return self.grid[0] * self.grid[1] + self.extra

    def token_map(self, inputs: dict[str, torch.Tensor]) -> TokenMap:
        """Maps every position of the processor's output to its kind.

        Raises:
            UserError: images have different numbers of tokens.
        """
        ids, attention = inputs["input_ids"], inputs["attention_mask"]
        image, expected = ids == self.image_token_id, self.count_features(inputs, 0)
        counts = image.sum(dim=1)
        if bool((counts != expected).any()):
            raise UserError(
                f"the processor places {counts.tolist()} image tokens where square images have {expected}; set "
                "data.view=square"
            )
        kinds = token_kinds(ids, attention, self.image_token_id, special_ids(self.processor.tokenizer))
        if self.extra > 0:
            kinds[image & (image.cumsum(dim=1) <= self.extra)] = TOKEN_KINDS.index("cls")
        return TokenMap(kinds, self.grid, dropped=max(0, -self.extra))


def _pad_to_square(image: Image.Image, border: tuple[int, ...]) -> Image.Image:
    side = max(image.size)
    square = Image.new("RGB", (side, side), border)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def read_config(source: str, recipe: BackboneRecipe) -> Any:
    """Reads the checkpoint's configuration."""
    allowed = recipe.trust_remote_code
    return load_config(source, "checkpoint", revision=recipe.revision, trust_remote_code=allowed)


def open_processor(source: str, recipe: BackboneRecipe) -> Any:
    """Opens the checkpoint's processor, with the recipe's chat template if it gives one.

    Raises:
        UserError: there is no processor.
    """
    from transformers import AutoProcessor

    try:
        processor: Any = AutoProcessor.from_pretrained(
            source, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"checkpoint {source} has no usable processor ({first_line(error)}); save it with "
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


def prompt(processor: Any, recipe: BackboneRecipe, answer: str = "") -> str:
    """Renders the prompt, and perhaps its answer, with the checkpoint's chat template, with or without special tokens.

    From then on, shorter sequences of a batch are padded at their end: none of their tokens attends to padding.

    Raises:
        UserError: there is no usable chat template, or no special tokens where the recipe requires them.
    """
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    content = [{"type": "image"}, {"type": "text", "text": recipe.prompt}]
    turns = [{"role": "user", "content": content}]
    if answer:
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    text = render(processor, turns, generation_prompt=not answer)
    special = [token for ids in special_ids(tokenizer).values() for token in tokenizer.convert_ids_to_tokens(ids)]
    if recipe.special_tokens == "on" and not special:
        raise UserError(f"checkpoint {recipe.checkpoint} has no special tokens; leave out backbone.special_tokens")
    for token in special if recipe.special_tokens == "off" else ():
        text = text.replace(token, "")
    return text


def make_inputs(source: str, config: Any, recipe: BackboneRecipe) -> LlavaInputs:
    """Builds the input side of a checkpoint from its processor.

    Raises:
        UserError: the processor is missing, its chat template cannot be used, or it writes another number of image
            tokens than the model has features.
    """
    processor = open_processor(source, recipe)
    features = fit_processor(processor, source, config, recipe.revision)
    text = prompt(processor, recipe)
    return LlavaInputs(processor, text, config.image_token_id, features.grid, extra=features.extra)


def fit_processor(processor: Any, source: str, config: Any, revision: str | None) -> ImageFeatures:
    """Makes a processor write as many image tokens as the model has features; see `match_processor`."""
    features = tower_features(processor, config)
    inputs = LlavaInputs(processor, "", config.image_token_id, features.grid, extra=features.extra)
    match_processor(inputs, features, source, config, revision)
    return features


Load = Callable[[str, Any, BackboneRecipe, torch.device, int | None], Backbone]


def loader(make_inputs: Callable[[str, Any, BackboneRecipe], InputProcessor]) -> Load:
    """Makes the function `load` of a family from its `make_inputs`."""

    def load(
        source: str, config: Any, recipe: BackboneRecipe, device: torch.device, random_seed: int | None
    ) -> Backbone:
        from transformers import AutoModelForImageTextToText

        inputs = make_inputs(source, config, recipe)
        arguments = loading_arguments(recipe) | {"trust_remote_code": recipe.trust_remote_code}
        with loading(f"checkpoint {source}"):
            model, missing, unexpected = pretrained(AutoModelForImageTextToText, source, config, device, **arguments)
        require_whole(source, missing, unexpected)
        if random_seed is not None:
            model = with_random_weights(model, random_seed)
        return backbone_of(source, model, recipe, device, inputs)

    return load


load = loader(make_inputs)


def loading_arguments(recipe: BackboneRecipe) -> dict[str, Any]:
    """Returns the recipe's arguments of `from_pretrained`."""
    arguments: dict[str, Any] = {"dtype": recipe.dtype, "revision": recipe.revision}
    if recipe.attn_implementation:
        arguments["attn_implementation"] = recipe.attn_implementation
    if recipe.device_map:
        arguments["device_map"] = recipe.device_map
    if recipe.quantization_config:
        from transformers.quantizers.auto import AutoQuantizationConfig

        try:
            arguments["quantization_config"] = AutoQuantizationConfig.from_dict(dict(recipe.quantization_config))
        except (ValueError, ImportError) as error:
            raise UserError(f"quantization_config cannot be used: {first_line(error)}") from None
    return arguments


def family_name(config: Any) -> str:
    """Returns the model type, marked if it is of LLaVA's original format."""
    original = getattr(config, "original", None)
    return f"original {original['model_type']}" if original else str(config.model_type)


def backbone_of(
    source: str, model: Any, recipe: BackboneRecipe, device: torch.device, inputs: InputProcessor
) -> Backbone:
    """Wraps a loaded model as a `Backbone` on its device, with the decoder that the model names itself."""
    if not recipe.device_map and not recipe.quantization_config:
        model = model.to(device)
    blocks, norm = decoder_parts(model)
    path = checkpoint_path(source, model.config)
    return Backbone(
        name=model_name(path),
        source=path,
        family=family_name(model.config),
        core=model.base_model.eval().requires_grad_(False),
        blocks=blocks,
        norm=norm,
        hidden_size=model.config.get_text_config().hidden_size,
        prepare=inputs,
        sha256=identity(source, model.config, device, recipe.revision),
        words=model.get_input_embeddings(),
        projector=getattr(model.base_model, "multi_modal_projector", None),
        head=model.get_output_embeddings(),
        writer=model,
    )


def describe_common(config: Any, inputs: InputProcessor, batch: Batch, parts: dict[str, Any]) -> dict[str, Any]:
    """Returns what `probing inspect` shows of every family, and of the parts of this one."""
    text, dtype = config.get_text_config(), getattr(config, "dtype", None)
    return {
        "family": family_name(config),
        "class": (config.architectures or ["?"])[0],
        "llm": describe_llm(text),
        **parts,
        "dtype": str(dtype).removeprefix("torch.") if dtype is not None else "not stated",
        "prompt": inputs.text,
        "layers": f"0 to {text.num_hidden_layers}, and final",
        "tokens": {"total": int(batch.tokens.kinds.shape[1]), **batch.tokens.counts()},
        "image_grid": list(batch.tokens.grid),
    }


def describe_llm(text: Any) -> dict[str, Any]:
    """Returns what `probing inspect` shows of the LLM."""
    return {
        "type": text.model_type,
        "layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "vocabulary": text.vocab_size,
    }


def tower_type(vision: Any) -> str:
    """Returns the type of a vision tower as `probing inspect` shows it."""
    return f"{vision.architecture} ({vision.library})" if isinstance(vision, OpenClipTowerConfig) else vision.model_type


def describe(config: Any, inputs: LlavaInputs) -> dict[str, Any]:
    """Returns what `probing inspect` shows, from configuration and processor alone."""
    vision, layer = config.vision_config, feature_layer(config)
    batch = inputs([Image.new("RGB", image_size(config)[::-1])])
    width = vision.hidden_size * (1 if isinstance(layer, int) else len(layer))
    blocks = getattr(vision, "num_hidden_layers", None)  # towers of open_clip and timm do not state it
    tower = {
        "type": tower_type(vision),
        **({} if blocks is None else {"layers": blocks}),
        "hidden_size": vision.hidden_size,
        "image_size": getattr(vision, "image_size", "?"),
        "patch_size": getattr(vision, "patch_size", "?"),
        "feature_layer": layer,
    }
    depth = getattr(config, "projector_depth", 2)
    kind = ("identity", "linear")[depth] if depth < 2 else f"MLP of {depth} layers, {config.projector_hidden_act}"
    projector = {"type": kind, "in": width, "out": config.text_config.hidden_size}
    return {
        **describe_common(config, inputs, batch, {"vision_tower": tower, "projector": projector}),
        **({"patches_dropped": batch.tokens.dropped} if batch.tokens.dropped else {}),
        **({"tile_grid": list(batch.tokens.tiles[0])} if batch.tokens.tiles else {}),
    }
