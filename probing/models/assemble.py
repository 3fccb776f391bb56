"""Makes a LLaVA of an LLM, a vision tower and a fresh projector, ready for `probing distill`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import probing.utils.torchvision_shim  # noqa: F401  # isort: skip
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from probing.models.chat_templates import TAG, TEMPLATES, find_template, with_images
from probing.models.image_tokens import tower_features
from probing.models.llava import LlavaInputs, describe, prompt
from probing.models.llava_projector import ProjectorConfig, ProjectorForConditionalGeneration, projector_depth
from probing.models.open_clip_tower import TowerSource, find_tower
from probing.recipe import AssembleRecipe, BackboneRecipe
from probing.utils.checkpoint_files import loading
from probing.utils.errors import BROKEN, UserError, first_line
from probing.utils.files import atomic_folder, disk_errors
from probing.utils.pretrained import load_config, locate, pretrained, require_whole

CPU, META = torch.device("cpu"), torch.device("meta")
LOGIT_SCALES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
"""What LLMs call a change of their logits: Gemma 2, Cohere, Granite, Falcon-H1."""


@dataclass(frozen=True)
class Parts:
    """The parts of a model, before any weights.

    Attributes:
        llm: folder or Hub id of the LLM.
        tower: folder or Hub id of the vision tower, of transformers; or one of open_clip or timm.
        model_class: class of the assembled model.
        config: of the assembled model.
        processor: of the assembled model.
        inputs: images → model inputs.
    """

    llm: str
    tower: str | TowerSource
    model_class: Any
    config: Any
    processor: Any
    inputs: LlavaInputs

    @property
    def dtype(self) -> torch.dtype:
        """The LLM's, which the whole model gets."""
        return self.config.text_config.dtype or torch.float32


def assemble(recipe: AssembleRecipe, out: Path) -> Path:
    """Loads LLM and tower, initialises the projector, and writes a LLaVA folder.

    Args:
        recipe: the parts.
        out: folder of the new checkpoint.

    Raises:
        UserError: a part cannot be used or does not fit the others, or `out` is not empty.
    """
    with disk_errors(out):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} is not empty; choose another --out")
    parts = read_parts(recipe)
    model = _join(parts, CPU, recipe.seed)
    with disk_errors(out), atomic_folder(out) as folder:
        model.save_pretrained(folder)
        parts.processor.save_pretrained(folder)
    return out


def describe_assembly(recipe: AssembleRecipe) -> dict[str, Any]:
    """Describes the model that `assemble` would write, from configurations alone; raises as `assemble`."""
    parts = read_parts(recipe)
    model = _join(parts, META, recipe.seed)
    core = model.model
    named = {"vision_tower": core.vision_tower, "projector": core.multi_modal_projector, "llm": core.language_model}
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in named.items()}
    total = sum(p.numel() for p in model.parameters())
    size = total * parts.dtype.itemsize / 1e9
    parts.config.architectures, parts.config.dtype = [type(model).__name__], parts.dtype
    return {
        "checkpoint": "not built",
        **describe(parts.config, parts.inputs),
        "parameters": {**{name: f"{count:,}" for name, count in counts.items()}, "total": f"{total:,}"},
        "memory": f"{size:.2f} GB to assemble, and on disk; {4 * total / 1e9:.2f} GB of weights in training",
    }


def read_parts(recipe: AssembleRecipe) -> Parts:
    """Reads configurations, tokenizer and image processor of the parts.

    Raises:
        UserError: a part cannot be used, or does not fit the others.
    """
    depth = projector_depth(recipe.projector)
    llm, text = _read_llm(recipe.llm)
    tower, vision, layer, image_processor = _read_tower(recipe.vision_tower, recipe.image_size)
    tokenizer, template = _read_tokenizer(llm, recipe.template)
    values = {
        "vision_config": vision,
        "text_config": text,
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": "full",
        "image_token_index": tokenizer.convert_tokens_to_ids(TAG),
    }
    config: Any = LlavaConfig(**values) if depth == 2 else ProjectorConfig(**values, projector_depth=depth)
    processor: Any = LlavaProcessor(
        image_processor=image_processor, tokenizer=tokenizer, patch_size=1,
        vision_feature_select_strategy="full", chat_template=template,
    )  # fmt: skip
    features = tower_features(processor, config)
    class_token = features.extra > 0
    if class_token:
        config.vision_feature_select_strategy = processor.vision_feature_select_strategy = "default"
        features = tower_features(processor, config)
    config.image_seq_length = features.count
    processor.patch_size = features.pixels[0] // features.grid[0]
    processor.num_additional_image_tokens = features.extra + class_token
    text_prompt = prompt(processor, BackboneRecipe(checkpoint=recipe.llm))
    inputs = LlavaInputs(processor, text_prompt, config.image_token_id, features.grid, extra=features.extra)
    model_class = LlavaForConditionalGeneration if depth == 2 else ProjectorForConditionalGeneration
    return Parts(llm, tower, model_class, config, processor, inputs)


def _read_llm(source: str) -> tuple[str, Any]:
    """Returns folder or Hub id of an LLM, and its configuration."""
    location = locate(source, "LLM")
    config = load_config(location, "LLM")
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{source} is an encoder-decoder ({config.model_type}); give a decoder-only LLM")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or hasattr(config, "vision_config"):
        raise UserError(f"{source} is no text LLM (model type {config.model_type!r}); give a decoder-only LLM")
    if scales := [name for name in LOGIT_SCALES if getattr(config, name, None) not in (None, 1)]:
        raise UserError(f"{source} scales its logits ({scales[0]}), which LLaVA does not; give another LLM")
    return location, config


def _read_tower(source: str, image_size: int | None) -> tuple[str | TowerSource, Any, int, Any]:
    """Returns a tower, its configuration, the layer to read, and its image processor."""
    if found := find_tower(source, image_size):
        return found, found.config, found.feature_layer, _image_processor(found)
    location = locate(source, "vision tower")
    config = load_config(location, "vision tower")
    config = getattr(config, "vision_config", None) or config
    side = getattr(config, "image_size", None)
    if image_size not in (None, side):
        raise UserError(f"{source} takes images of {side} pixels; leave out --image-size")
    try:
        processor: Any = AutoImageProcessor.from_pretrained(location)
    except (*BROKEN, ImportError) as error:
        raise UserError(f"vision tower {source} has no usable image processor ({first_line(error)}); add it") from None
    blocks = getattr(config, "num_hidden_layers", None)
    return location, config, -2 if blocks is None or blocks > 1 else -1, processor


def _image_processor(tower: TowerSource) -> Any:
    """Makes transformers' image processor of open_clip's or timm's preprocessing."""
    from timm.data.transforms import str_to_pil_interp

    values, side = tower.preprocessing, tower.config.image_size
    square = {"height": side, "width": side}
    squashed = values["resize_mode"] == "squash"
    if values["resize_mode"] == "longest":
        raise UserError(f"vision tower {tower.id} pads images, which LLaVA does not; give another")
    return CLIPImageProcessor(
        size=square if squashed else {"shortest_edge": side}, do_center_crop=not squashed, crop_size=square,
        image_mean=list(values["mean"]), image_std=list(values["std"]),
        resample=int(str_to_pil_interp(values["interpolation"])),
    )  # fmt: skip


def _read_tokenizer(llm: str, template: str | None) -> tuple[Any, str]:
    """Returns the LLM's tokenizer with the image token, and a chat template that writes images."""
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(llm)
    except BROKEN as error:
        raise UserError(f"LLM {llm} has no usable tokenizer ({first_line(error)}); add its files") from None
    if TAG in tokenizer.get_vocab() and TAG not in tokenizer.all_special_tokens:
        raise UserError(f"{llm}: {TAG} is an ordinary word of its vocabulary; rename it, or give another LLM")
    if getattr(tokenizer, "image_token", TAG) != TAG:
        raise UserError(f"{llm}: its tokenizer writes images as {tokenizer.image_token!r}; give a text LLM")
    own: Any = tokenizer.chat_template
    own = own.get("default") if isinstance(own, dict) else own
    if template is None and not own:
        raise UserError(f"{llm} has no chat template; give --template {', '.join(TEMPLATES)}, or Jinja")
    tokenizer.chat_template = None  # the processor has it
    tokenizer.add_tokens([TAG], special_tokens=True)
    return tokenizer, find_template(template) if template else with_images(own)


def _join(parts: Parts, device: torch.device, seed: int) -> Any:
    """Builds the model; on the meta device without weights."""
    with loading(f"LLM {parts.llm}"):
        llm, missing, _ = pretrained(AutoModelForCausalLM, parts.llm, parts.config.text_config, device, parts.dtype)
    require_whole(parts.llm, missing, set())
    tower = _load_tower(parts, device)
    with META:
        model = parts.model_class(parts.config)
    if type(llm.base_model) is not type(model.model.language_model):
        raise UserError(f"{parts.llm} is no text LLM ({type(llm).__name__}); give a decoder-only LLM")
    if getattr(llm.get_output_embeddings(), "bias", None) is not None:
        raise UserError(f"{parts.llm} has a bias in its output layer, which LLaVA has not; give another LLM")
    core, projector = model.model, model.model.multi_modal_projector
    core.vision_tower, core.language_model, model.lm_head = tower, llm.base_model, llm.get_output_embeddings()
    projector.to_empty(device=device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in projector.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.reset_parameters()
    ends = llm.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=ends.bos_token_id, eos_token_id=ends.eos_token_id, pad_token_id=ends.pad_token_id
    )
    model.to(parts.dtype)
    _add_image_token(model, parts)
    return model


def _load_tower(parts: Parts, device: torch.device) -> Any:
    config = parts.config.vision_config
    if device == META:
        with META:
            return AutoModel.from_config(config)
    if isinstance(parts.tower, TowerSource):
        return parts.tower.load()
    with loading(f"vision tower {parts.tower}"):
        tower, missing, _ = pretrained(AutoModel, parts.tower, config, device, torch.float32)
    require_whole(parts.tower, missing, set())
    return tower


def _add_image_token(model: Any, parts: Parts) -> None:
    """Gives the image token a row in both tables: the mean of the others, so that it is never the likeliest word."""
    tokenizer, number = parts.processor.tokenizer, parts.config.image_token_id
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tables = {id(w): w for w in (model.get_input_embeddings().weight, model.get_output_embeddings().weight)}
    with torch.no_grad():
        for weight in (table for table in tables.values() if not table.is_meta):  # one, where they are tied
            weight[number] = weight[:number].float().mean(dim=0).to(weight)
