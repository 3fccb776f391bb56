"""LLaVA-1.5 and VipLLaVA in the format of transformers, any LLM inside."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

import probing.compat  # noqa: F401
from probing.backbones.base import Backbone, Batch, TokenMap, special_ids, token_kinds
from probing.chat import find_template, render
from probing.errors import UserError
from probing.hub import checkpoint_path, first_line, identity, loading, pretrained, require_whole
from probing.recipe import BackboneRecipe, model_name

MODEL_TYPES = ("llava", "vipllava")


@dataclass(frozen=True)
class LlavaInputs:
    """Images → `Batch`, through the checkpoint's processor; all sequences carry the same text.

    Attributes:
        processor: the checkpoint's own.
        text: the rendered chat template, with one image tag.
        image_token_id: id of the placeholder that stands for one image token.
        grid: rows and columns of the image tokens.
        border: colour that images are padded with to a square; None leaves them to the processor.
    """

    processor: Any
    text: str
    image_token_id: int
    grid: tuple[int, int]
    border: tuple[int, ...] | None = None

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

    def token_map(self, inputs: dict[str, torch.Tensor]) -> TokenMap:
        """Says what every position of the processor's output is."""
        ids, attention = inputs["input_ids"], inputs["attention_mask"]
        rows, columns = self.grid
        counts = (ids == self.image_token_id).sum(dim=1)
        if bool((counts != rows * columns).any()):
            raise UserError(
                f"the processor places {counts.tolist()} image tokens where the vision tower gives {rows * columns}; "
                "mend patch_size or vision_feature_select_strategy in processor_config.json"
            )
        special = special_ids(self.processor.tokenizer)
        return TokenMap(token_kinds(ids, attention, self.image_token_id, special), self.grid)


def _padded(image: Image.Image, border: tuple[int, ...]) -> Image.Image:
    """The image in the middle of a square."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), border)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def make_inputs(source: str, config: Any, recipe: BackboneRecipe) -> LlavaInputs:
    """Builds the input side of a checkpoint; needs its processor, not its weights.

    Raises:
        UserError: the processor is missing, or has no chat template that can be used.
    """
    return inputs_of(open_processor(source, recipe), config, recipe)


def inputs_of(processor: Any, config: Any, recipe: BackboneRecipe, pad_to_square: bool = False) -> LlavaInputs:
    """The input side of a processor."""
    border = tuple(int(255 * mean) for mean in processor.image_processor.image_mean) if pad_to_square else None
    return LlavaInputs(processor, prompt(processor, recipe), config.image_token_id, tower_grid(config), border)


def tower_grid(config: Any) -> tuple[int, int]:
    """Rows and columns of the vision tower's features of one square image."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    return side, side


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
    llm = model.get_decoder()
    return Backbone(
        name=model_name(checkpoint_path(source, model.config)),
        source=checkpoint_path(source, model.config),
        family=family or model.config.model_type,
        core=model.base_model.eval().requires_grad_(False),
        blocks=llm.layers,
        norm=llm.norm,
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
    image = Image.new("RGB", (vision.image_size, vision.image_size))
    batch = inputs([image])
    dtype = getattr(config, "dtype", None)
    layer = config.vision_feature_layers if config.model_type == "vipllava" else config.vision_feature_layer
    width = vision.hidden_size * (1 if isinstance(layer, int) else len(layer))
    return {
        "family": config.model_type,
        "class": (config.architectures or ["?"])[0],
        "llm": describe_llm(text),
        "vision_tower": {
            "type": vision.model_type,
            "layers": vision.num_hidden_layers,
            "hidden_size": vision.hidden_size,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "feature_layer": layer,
        },
        "projector": {"type": f"MLP, {config.projector_hidden_act}", "in": width, "out": text.hidden_size},
        "dtype": str(dtype).removeprefix("torch.") if dtype is not None else "not stated",
        "prompt": inputs.text,
        "layers": f"0 to {text.num_hidden_layers}, and final",
        "tokens": {"total": int(batch.tokens.kinds.shape[1]), **batch.tokens.counts()},
        "image_grid": list(inputs.grid),
        **({"tile_grid": list(batch.tokens.tiles[0])} if batch.tokens.tiles else {}),
    }
