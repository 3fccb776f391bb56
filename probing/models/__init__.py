"""Multimodal LLMs with one interface, one file per family."""

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from probing.models import auto, llava, llava_original, multi_encoder
from probing.models.base import (
    FINAL,
    Backbone,
    Batch,
    Family,
    Identity,
    InputProcessor,
    Layer,
    layer_name,
    parse_layers,
)
from probing.models.token_map import TokenMap
from probing.recipe import BackboneRecipe, TeacherRecipe, model_name
from probing.utils.adapters import ADAPTER_CONFIG, find_adapter
from probing.utils.checkpoint_files import fetch, loading, read_json_or_empty
from probing.utils.errors import UserError
from probing.utils.paths import local_path, looks_like_path
from probing.utils.pretrained import checkpoint_path, identity, locate

__all__ = [
    "FINAL",
    "Backbone",
    "Batch",
    "Identity",
    "InputProcessor",
    "Layer",
    "TokenMap",
    "check_models",
    "count_blocks",
    "describe_checkpoint",
    "identify",
    "layer_name",
    "load_backbone",
    "parse_layers",
]


def find_families() -> dict[str, Family]:
    """Returns the modules of this package that define `MODEL_TYPE`, by model type; see `base.Family`."""
    modules: list[Any] = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    return {module.MODEL_TYPE: module for module in modules if hasattr(module, "MODEL_TYPE")}


FAMILIES = find_families()


@dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint whose configuration was read.

    Attributes:
        recipe: for loading.
        source: folder or Hub id of the weights; an adapter's base.
        config: its configuration; `adapter` in it is the folder of an adapter.
        family: its module.
    """

    recipe: BackboneRecipe
    source: str
    config: Any
    family: Any


def _open(recipe: BackboneRecipe) -> _Checkpoint:
    adapter = find_adapter(recipe.checkpoint, recipe.revision)
    if adapter is None:
        if recipe.base:
            raise UserError(f"{recipe.checkpoint} is no adapter; leave out backbone.base")
        source = locate(recipe.checkpoint, "checkpoint")
        raw = read_json_or_empty(source, "config.json", recipe.revision)
    else:
        source = _find_base(recipe, adapter)
        recipe = recipe.model_copy(update={"revision": None})  # it is the adapter's
        raw = read_json_or_empty(adapter, "config.json")
        raw = raw if llava_original.is_original(raw) else read_json_or_empty(source, "config.json")
    if llava_original.is_original(raw):
        family: Any = llava_original
        with loading(f"checkpoint {recipe.checkpoint}"):
            config = llava_original.read_config(raw, recipe)
    else:
        family = FAMILIES.get(str(raw.get("model_type")), auto)
        with loading(f"checkpoint {source}"):
            config = getattr(family, "read_config", llava.read_config)(source, recipe)
        if family is llava and config.vision_config.model_type == "pixtral":  # takes images of any size
            family = auto
    if adapter is not None:
        config.adapter = str(adapter)
    return _Checkpoint(recipe, source, config, family)


def _find_base(recipe: BackboneRecipe, adapter: Path) -> str:
    """Returns folder or Hub id of an adapter's base: the recipe's, or the one that the adapter names.

    Raises:
        UserError: it is not here.
    """
    if recipe.base:
        return locate(recipe.base, "base model")
    name = read_json_or_empty(adapter, ADAPTER_CONFIG).get("base_model_name_or_path")
    name = str(name or read_json_or_empty(adapter, "config.json").get("_name_or_path") or "")
    try:
        if name and (local_path(name).is_dir() or (not looks_like_path(name) and fetch(name, "config.json"))):
            return locate(name, "base model")
    except UserError:
        pass  # it cannot be reached
    raise UserError(
        f"{recipe.checkpoint} is an adapter of {name or 'an unknown model'}, which is not here; give backbone.base=DIR"
    )


def load_backbone(
    recipe: BackboneRecipe, device: torch.device, random_seed: int | None = None, with_head: bool = False
) -> Backbone:
    """Loads a checkpoint.

    Args:
        recipe: the checkpoint and how to load it.
        device: where to put it, unless the recipe has a device map.
        random_seed: seed of the random-weights control, which re-initialises LLM and projector; None for the
            checkpoint's own weights.
        with_head: include what writes answers, which no probe needs.

    Raises:
        UserError: there is no such checkpoint, it is of an unsupported family, or it is incomplete.
    """
    one = _open(recipe)
    with loading(f"checkpoint {one.source}"):
        backbone: Backbone = one.family.load(one.source, one.config, one.recipe, device, random_seed)
    return backbone if with_head else dataclasses.replace(backbone, head=None, writer=None)


def count_blocks(recipe: BackboneRecipe) -> int:
    """Returns the number L of decoder blocks of a checkpoint, from its configuration alone."""
    return int(_open(recipe).config.get_text_config().num_hidden_layers)


def check_models(backbone: BackboneRecipe, teachers: Mapping[str, TeacherRecipe], layers: str) -> list[Layer]:
    """Checks that models exist, from their configurations alone; returns the selected layers.

    Quick, to be called before images are listed: COCO's annotations take many seconds to read.

    Raises:
        UserError: checkpoint or teacher does not exist, or the checkpoint lacks a layer.
    """
    for name, teacher in teachers.items():
        locate(teacher.id, f"{name} teacher")
    return parse_layers(layers, count_blocks(backbone))


def identify(recipe: BackboneRecipe) -> Identity:
    """Returns which checkpoint a recipe names; its weights are hashed, not loaded."""
    one = _open(recipe)
    with loading(f"checkpoint {one.source}"):
        inputs = one.family.make_inputs(one.source, one.config, one.recipe)
    text, path = one.config.get_text_config(), checkpoint_path(one.source, one.config)
    return Identity(
        name=model_name(path),
        path=path,
        family=llava.family_name(one.config),
        sha256=identity(one.source, one.config, revision=one.recipe.revision),
        layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        prompt=inputs.text,
        prepare=inputs,
    )


def describe_checkpoint(recipe: BackboneRecipe) -> dict[str, Any]:
    """Describes a checkpoint by its configuration, its processor, and names and shapes of its weights.

    Raises:
        UserError: it cannot be probed, as far as shapes alone show.
    """
    one = _open(recipe)
    with loading(f"checkpoint {one.source}"):
        if one.family is multi_encoder:  # its teachers may be absent
            inputs = one.family.make_inputs(one.source, one.config, one.recipe)
        else:
            inputs = one.family.load(one.source, one.config, one.recipe, torch.device("meta"), None).prepare
        values = one.family.describe(one.config, inputs)
    base = {"base": one.source} if hasattr(one.config, "adapter") else {}
    return {"checkpoint": recipe.checkpoint, **base, **values}
