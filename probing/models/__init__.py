"""Multimodal LLMs behind one interface, one file per family."""

from typing import Any

import torch
from PIL import Image

from probing.models import auto, llava, llava_next, llava_onevision, llava_original, multi_encoder
from probing.models.adapters import open_adapter
from probing.models.base import FINAL, Backbone, Batch, Identity, Layer, layer_name, parse_layers
from probing.models.image_tokens import CANNOT_RUN
from probing.models.llava import SIDE
from probing.models.token_map import TokenMap
from probing.recipe import BackboneRecipe, model_name
from probing.utils.errors import UserError, first_line
from probing.utils.meta_device import META, dry_run
from probing.utils.pretrained import checkpoint_path, identity, load_config, loading, locate, read_json

__all__ = [
    "FINAL",
    "Backbone",
    "Batch",
    "Identity",
    "Layer",
    "TokenMap",
    "count_blocks",
    "describe_checkpoint",
    "identify",
    "layer_name",
    "load_backbone",
    "parse_layers",
]

FAMILIES: dict[str, Any] = {
    **dict.fromkeys(llava.MODEL_TYPES, llava),
    llava_next.MODEL_TYPE: llava_next,
    llava_onevision.MODEL_TYPE: llava_onevision,
    multi_encoder.MODEL_TYPE: multi_encoder,
}


def _open(recipe: BackboneRecipe) -> tuple[BackboneRecipe, str, Any, Any]:
    """The recipe for loading, the folder or Hub id of the weights, the configuration and the family's module.

    Of an adapter the weights are its base's, and the configuration names the folder of the adapter (`adapter`).
    """
    found = open_adapter(recipe)
    if found is None:
        source = locate(recipe.checkpoint, "checkpoint")
        raw = read_json(source, "config.json", recipe.revision)
    else:
        adapter, source = found
        recipe = recipe.model_copy(update={"revision": None})  # it is the adapter's
        raw = read_json(adapter, "config.json")
        raw = raw if llava_original.is_original(raw) else read_json(source, "config.json")
    if llava_original.is_original(raw):
        with loading(f"checkpoint {recipe.checkpoint}"):
            config: Any = llava_original.read_config(raw, recipe)
        family: Any = llava_original
    elif isinstance(raw.get("image_grid_pinpoints"), str) and raw.get("model_type") in FAMILIES:
        with loading(f"checkpoint {source}"):
            config = llava_next.read_config(source, recipe.revision)
        family = FAMILIES[config.model_type]
    else:
        config = load_config(source, "checkpoint", revision=recipe.revision, trust_remote_code=recipe.trust_remote_code)
        family = FAMILIES.get(config.model_type)
    if family is llava and config.vision_config.model_type == "pixtral":  # takes images of any size
        family = auto
    if family is None:
        family = auto
        if not auto.loads(config):
            found_class = ", ".join(config.architectures or [config.model_type])
            raise UserError(
                f"{source} is no vision-language model but {found_class} (model type {config.model_type!r}); give "
                f"one of the families {', '.join(FAMILIES)}, LLaVA's original format, or any other that transformers' "
                "AutoModelForImageTextToText loads"
            )
    if found is not None:
        config.adapter = found[0]
    return recipe, source, config, family


def load_backbone(
    recipe: BackboneRecipe, device: torch.device, random_seed: int | None = None, with_head: bool = False
) -> Backbone:
    """Loads a checkpoint.

    Args:
        recipe: which, and how.
        device: where to put it, unless the recipe has a device map.
        random_seed: draws LLM and projector anew with this seed (the random-weights control).
        with_head: keeps the output embeddings, and what writes answers, which no probe needs.

    Raises:
        UserError: there is no such checkpoint, it is of no known family, or it is incomplete.
    """
    recipe, source, config, family = _open(recipe)
    with loading(f"checkpoint {source}"):
        backbone: Backbone = family.load(source, config, recipe, device, random_seed)
    if not with_head:
        backbone.head = backbone.writer = None
    return backbone


def count_blocks(recipe: BackboneRecipe) -> int:
    """Number L of decoder blocks of a checkpoint, from its configuration alone."""
    _, _, config, _ = _open(recipe)
    return int(config.get_text_config().num_hidden_layers)


def identify(recipe: BackboneRecipe) -> Identity:
    """Which checkpoint a recipe names; its weights are hashed, and not loaded."""
    recipe, source, config, family = _open(recipe)
    with loading(f"checkpoint {source}"):
        inputs = family.make_inputs(source, config, recipe)
    text = config.get_text_config()
    return Identity(
        name=model_name(checkpoint_path(source, config)),
        path=checkpoint_path(source, config),
        family=f"original {config.original['model_type']}" if family is llava_original else config.model_type,
        sha256=identity(source, config),
        layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        prompt=inputs.text,
        prepare=inputs,
    )


def describe_checkpoint(recipe: BackboneRecipe) -> dict[str, Any]:
    """What a checkpoint is, from its configuration and processor, and names and shapes of its weights.

    Raises:
        UserError: it cannot be probed, as far as shapes alone show.
    """
    loadable, source, config, family = _open(recipe)
    unsure = ""
    with loading(f"checkpoint {source}"):
        if family is multi_encoder:  # its teachers need not be there
            inputs = family.make_inputs(source, config, loadable)
        else:
            with dry_run():
                backbone = family.load(source, config, loadable, META, None)
                unsure = _try(backbone)
            inputs = backbone.prepare
        found = family.describe(config, inputs)
    if unsure:
        found["not_sure"] = "; ".join(filter(None, (found.get("not_sure"), unsure)))
    base = {"base": source} if hasattr(config, "adapter") else {}
    return {"checkpoint": recipe.checkpoint, **base, **found}


def _try(backbone: Backbone) -> str:
    """Runs an image through a checkpoint on shapes alone; says why that fails, unless the lack of numbers is why."""
    batch = backbone.prepare([Image.new("RGB", (SIDE, SIDE))]).to(META)
    try:
        backbone.stream(batch, [0, backbone.layers, FINAL], lambda layer, state: None)
    except CANNOT_RUN as error:
        if isinstance(error, NotImplementedError) or "meta tensor" in str(error):
            return ""  # an operator needs numbers
        return f"its layers could not be tried without weights ({first_line(error)})"
    return ""
