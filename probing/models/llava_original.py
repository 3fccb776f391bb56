"""LLaVA in its original format, and OLA-VLM / VisPer-LM: read into transformers' LLaVA by declarative renames.

Checkpoints that see tiles of the image (`anyres`: LLaVA-1.6) become transformers' LLaVA-NeXT.

The original code has vision tower and projector inside the LLM, other names of layers, and flat fields in `config.json`
(`mm_vision_tower`, …) instead of nested configurations. OLA-VLM adds special tokens as parameters of the model; here
they become rows of the embedding table and entries of the vocabulary, as in `probing distill`.
"""

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import probing.utils.torchvision_shim  # noqa: F401  # isort: skip
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaNextConfig, MistralConfig, Phi3Config

from probing.models import llava, llava_next
from probing.models.base import Backbone
from probing.models.chat_templates import TEMPLATES, find_template
from probing.models.image_tokens import tower_grid
from probing.models.llava import LlavaInputs
from probing.models.llava import describe as describe_llava
from probing.models.llava_next import parse_pinpoints
from probing.models.llava_projector import ProjectorConfig, projector_depth
from probing.models.open_clip_tower import OpenClipTowerConfig, convnext_config
from probing.models.random_weights import with_random_weights
from probing.models.token_map import SPECIAL, special_ids, token_name
from probing.recipe import BackboneRecipe
from probing.utils.checkpoint_files import loading, read_json_or_empty, read_tensors
from probing.utils.errors import UserError, first_line
from probing.utils.paths import local_path
from probing.utils.pretrained import load_config, pretrained

LLMS: dict[str, Any] = {
    "llava": LlamaConfig,
    "llava_llama": LlamaConfig,
    "llava_mistral": MistralConfig,
    "llava_phi3": Phi3Config,
    "ola_llama": LlamaConfig,
    "ola_phi3": Phi3Config,
    "probe_dsg_llava_llama": LlamaConfig,
}
"""Model types of the original formats, and the LLM inside."""

ALWAYS_POOLED = ("ola_llama", "ola_phi3", "probe_dsg_llava_llama")
"""Model types whose class in the original code always pools the special tokens' rows."""
TOWER = "model.vision_tower."

RENAMES = {
    r"^model\.mm_projector\.(?=weight|bias)": "model.multi_modal_projector.linear_1.",
    **{rf"^model\.mm_projector\.{2 * k}\.": f"model.multi_modal_projector.linear_{k + 1}." for k in range(4)},
    r"^model\.vision_tower\.vision_tower\.vision_model\.": "model.vision_tower.",
    r"^model\.vision_tower\.vision_tower\.(?!vision_model\.)": "model.vision_tower.trunk.",
    r"^model\.embed_tokens\.": "model.language_model.embed_tokens.",
    r"^model\.layers\.": "model.language_model.layers.",
    r"^model\.norm\.": "model.language_model.norm.",
}
"""Names in the file → names in transformers' LLaVA."""

IGNORED = {
    r"\.rotary_emb\.inv_freq$": "computed from the configuration",
    r"^model\.vision_tower\..*\.position_ids$": "counts up",
    r"^model\.special_(gen|depth|seg)_tokens$": "special tokens, read separately",
    r"^image_(gen|depth|seg)_heads\.": "embedding predictors, or probes, which probing import reads",
    r"^(gen|depth|seg)_logit_scale$": "scales of the contrastive losses",
    r"^model\.vision_tower\.(vision_tower|trunk)\.head\.": "layers of a ConvNeXt after the features that are read",
    r"^(da_v2_head|dav2_backbone|oneformer|gen_encoder)\.": "weights of a teacher",
}
"""Tensors that are not part of the probed model, and why."""

CLIP_L: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "patch_size": 14, "projection_dim": 768,
}  # fmt: skip
TOWERS = {
    "clip-vit-large-patch14-336": CLIP_L | {"image_size": 336},
    "clip-vit-large-patch14": CLIP_L | {"image_size": 224},
}
"""Configurations of OpenAI's towers by the last part of the path that a checkpoint names."""


def is_original(raw: dict[str, Any]) -> bool:
    """Returns whether a `config.json` is of the original format."""
    return "mm_vision_tower" in raw or str(raw.get("model_type")) in set(LLMS) - {"llava"}


def read_config(raw: dict[str, Any], recipe: BackboneRecipe) -> LlavaConfig | LlavaNextConfig:
    """Returns transformers' configuration of an original checkpoint.

    Args:
        raw: its `config.json`.
        recipe: may name the vision tower.

    Returns:
        The configuration, with `original` (raw) and `tower` (its folder or Hub id).

    Raises:
        UserError: the checkpoint is of an unsupported kind.
    """
    kind = str(raw.get("model_type", ""))
    if kind not in LLMS:
        raise UserError(f"{recipe.checkpoint} has model type {kind!r}; give one of {', '.join(LLMS)}")
    tiled = raw.get("image_aspect_ratio") == "anyres"
    for name, default, supported in (
        *([("mm_projector_type", "linear", ("mlp2x_gelu",))] if tiled else []),
        ("image_aspect_ratio", "square", ("square", "pad", "anyres")),
        *([("mm_patch_merge_type", "flat", ("spatial_unpad",))] if tiled else []),
        ("mm_vision_select_feature", "patch", ("patch",)),
        ("mm_use_im_start_end", False, (False,)),
    ):
        if (value := raw.get(name, default)) not in supported:
            raise UserError(
                f"{recipe.checkpoint}: {name} is {value!r}, not {' or '.join(map(repr, supported))}; convert it to "
                "transformers' format"
            )
    depth = projector_depth(raw.get("mm_projector_type", "linear"))
    llm = LLMS[kind]
    fields = (set(llm().to_dict()) | {"rope_theta", "rope_scaling"}) - NOT_OF_THE_LLM
    source, vision = _find_tower(raw, recipe)
    convnext = isinstance(vision, OpenClipTowerConfig)
    values: dict[str, Any] = {
        "vision_config": vision,
        "text_config": llm(**{name: value for name, value in raw.items() if name in fields}),
        "projector_hidden_act": "gelu",
        "image_token_index": 0,  # `make_inputs` sets it
        "vision_feature_layer": -1 if convnext else raw.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": "full" if convnext else "default",
        "image_seq_length": (vision.image_size // vision.patch_size) ** 2,
        "tie_word_embeddings": raw.get("tie_word_embeddings", False),
    }
    config: LlavaConfig | LlavaNextConfig
    if tiled:
        pinpoints = parse_pinpoints(raw.get("image_grid_pinpoints"), vision.image_size)
        config = LlavaNextConfig(**values, image_grid_pinpoints=pinpoints)
    elif depth == 2:
        config = LlavaConfig(**values)
    else:
        config = ProjectorConfig(**values, projector_depth=depth)
    config.original, config.tower = raw, source
    config.architectures, config.dtype = raw.get("architectures"), raw.get("torch_dtype")
    return config


NOT_OF_THE_LLM = {
    "model_type", "architectures", "auto_map", "transformers_version", "_name_or_path", "id2label", "label2id"
}  # fmt: skip


def _find_tower(raw: dict[str, Any], recipe: BackboneRecipe) -> tuple[str, Any]:
    """Returns folder or Hub id of the tower, and its configuration.

    The path that a checkpoint names is often one of another machine, whose last part is enough.
    """
    path = str(recipe.vision_tower or raw.get("mm_vision_tower") or "")
    name, local = path.rstrip("/").rsplit("/", 1)[-1], local_path(path).is_dir()
    if not local and name in TOWERS:
        return f"openai/{name}", CLIPVisionConfig(**TOWERS[name])
    if convnext := convnext_config(name, read_json_or_empty(path, "config.json") if local else {}):
        return path, convnext
    if not path or (not local and path.startswith(("/", ".", "~"))):
        raise UserError(
            f"{recipe.checkpoint} names the vision tower {path!r}, which is not here; give "
            "backbone.vision_tower=FOLDER_OR_HUB_ID"
        )
    config = load_config(path, "vision tower")
    config = getattr(config, "vision_config", config)
    if config.model_type != "clip_vision_model":
        raise UserError(f"vision tower {path} is a {config.model_type}; give a CLIP or ConvNeXt tower")
    return path, config


class PieceInputs(LlavaInputs):
    """Images → `Batch`, where the text before and after an image is tokenized separately, as LLaVA's code does.

    That matters for tokenizers that treat the beginning of a text differently: sentencepiece with `legacy: false`.
    """

    def encode(self, images: Sequence[Image.Image], texts: Sequence[str]) -> dict[str, Tensor]:
        """Returns the model's arguments for images and one rendered prompt each."""
        inputs = super().encode(images, texts)
        tokenizer = self.processor.tokenizer
        rows = [tokenize_pieces(tokenizer, text, ids) for text, ids in zip(texts, inputs["input_ids"], strict=True)]
        return inputs | dict(tokenizer.pad({"input_ids": rows}, return_tensors="pt"))


class TiledPieceInputs(PieceInputs, llava_next.TiledInputs):
    """The same for checkpoints that see tiles of the image."""


def tokenize_pieces(tokenizer: Any, text: str, ids: Tensor) -> list[int]:
    """Tokenizes the pieces of a prompt between images one by one; only the first begins with a BOS.

    Args:
        tokenizer: has `<image>` and the special tokens as entries.
        text: the prompt, with one `<image>` for each image.
        ids: the prompt tokenized as a whole, with all tokens of each image.
    """
    special = [number for numbers in special_ids(tokenizer).values() for number in numbers]
    names = ["<image>", *tokenizer.convert_ids_to_tokens(special)]
    inserted = {*tokenizer.convert_tokens_to_ids(names)}
    runs = [list(run) for is_inserted, run in groupby(ids.tolist(), inserted.__contains__) if is_inserted]
    pieces = re.split(f"(?:{'|'.join(map(re.escape, names))})+", text)
    first, *rest = (list(tokenizer(piece).input_ids) for piece in pieces)
    bos = int(first[:1] == [tokenizer.bos_token_id])
    return first + [number for run, piece in zip(runs, rest, strict=True) for number in [*run, *piece[bos:]]]


def make_inputs(source: str, config: Any, recipe: BackboneRecipe) -> LlavaInputs:
    """Builds the input side: the checkpoint's tokenizer, the tower's preprocessing, a template of the original code.

    Raises:
        UserError: there is no tokenizer, or the template that the checkpoint was trained with is unknown.
    """
    from transformers import (
        AutoTokenizer,
        CLIPImageProcessor,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
        LlavaProcessor,
    )

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=recipe.revision)
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {source} has no usable tokenizer ({first_line(error)})") from None
    template = find_template(recipe.template or _template(config.original, tokenizer))
    counts = special_counts(config) if recipe.special_tokens != "off" else {}
    tokens = [token_name(task, k) for task, number in counts.items() for k in range(number)]
    tokenizer.add_tokens(["<image>", *tokens], special_tokens=True)
    size, tiled = config.vision_config.image_size, isinstance(config, LlavaNextConfig)
    sizes: dict[str, Any] = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    if tiled:
        image_processor: Any = LlavaNextImageProcessor(**sizes, image_grid_pinpoints=config.image_grid_pinpoints)
    else:
        image_processor = CLIPImageProcessor(**sizes)
    processor: Any = (LlavaNextProcessor if tiled else LlavaProcessor)(
        image_processor=image_processor,
        tokenizer=tokenizer, patch_size=config.vision_config.patch_size,
        num_additional_image_tokens=0 if config.vision_feature_select_strategy == "full" else 1,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=template.replace("<image>", "<image>" + "".join(tokens)),
    )  # fmt: skip
    config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    parts = processor, llava.prompt(processor, recipe), config.image_token_id, tower_grid(config)
    if tiled:
        return TiledPieceInputs(*parts, config=config)
    pad = config.original.get("image_aspect_ratio") == "pad"
    return PieceInputs(*parts, tuple(int(255 * mean) for mean in image_processor.image_mean) if pad else None)


def _template(raw: dict[str, Any], tokenizer: Any) -> str:
    """Returns the name of the conversation template that follows from model type and tokenizer."""
    llm = LLMS[raw["model_type"]]
    if llm is Phi3Config:
        return "llava_phi_3"
    if llm is MistralConfig:
        return "mistral_instruct"
    if "<|start_header_id|>" in tokenizer.get_vocab():
        return "llava_llama_3"
    raise UserError(
        "the conversation template that this checkpoint was trained with is unknown; give backbone.template=NAME, one "
        f"of {', '.join(TEMPLATES)} (LLaVA-1.5: vicuna_v1)"
    )


def special_counts(config: Any) -> dict[str, int]:
    """Returns the number of OLA-VLM's special tokens of each task, in their order.

    Its parameters for depth and seg have a row for every image token. The class of the pre-training stage always pools
    them. The fine-tuned class pools them for `expand_emb` and inserts them as they are for `emb`, its default; gen
    always has its few rows.

    Raises:
        UserError: they are of an unsupported format.
    """
    raw = config.original
    number = int(raw.get("num_task_tokens") or 0)
    if not number or raw.get("probe_mode"):
        return {}
    order = [task for task in str(raw.get("aux_mode", "gen-depth-seg")).split("-") if task in SPECIAL]
    form = raw.get("task_token_format", "emb")
    pooled = form == "expand_emb" or raw["model_type"] in ALWAYS_POOLED
    if form not in ("expand_emb", "emb"):
        raise UserError(
            f"task_token_format is {form!r}: the checkpoint does not hold the special tokens; set "
            "backbone.special_tokens=off"
        )
    return {task: number if pooled or task == "gen" else config.image_seq_length for task in order}


def special_rows(counts: dict[str, int], parameters: dict[str, Tensor]) -> Tensor:
    """Returns embeddings (tokens, H) of the special tokens: means of equal groups of rows, as in OLA-VLM.

    Args:
        counts: tokens by task, from `special_counts`.
        parameters: `special_<task>_tokens` by task.

    Raises:
        UserError: a parameter is missing, or its rows cannot be pooled.
    """
    rows = []
    for task, number in counts.items():
        value = parameters.get(task)
        if value is None or len(value) % number:
            shape = "missing" if value is None else f"{len(value)} rows"
            raise UserError(f"special_{task}_tokens: {shape}, needed {number}; set backbone.special_tokens=off")
        rows.append(value.float().unflatten(0, (number, -1)).mean(dim=1))
    return torch.cat(rows)


def load(source: str, config: Any, recipe: BackboneRecipe, device: torch.device, random_seed: int | None) -> Backbone:
    """Loads the checkpoint into transformers' LLaVA; see `probing.models.load_backbone`.

    Every tensor of the files is used or ignored by a rule of `IGNORED`, and every parameter of the model is filled.

    Raises:
        UserError: tensors are missing or unknown, or the tower cannot be found.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    model_class = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    inputs, arguments = make_inputs(source, config, recipe), llava.loading_arguments(recipe)
    with loading(f"checkpoint {source}"):
        model, missing, unexpected = pretrained(model_class, source, config, device, key_mapping=RENAMES, **arguments)
        missing -= _load_separate_clip(model, missing)
    _require_all_known(source, missing, unexpected)
    _add_special_tokens(model, inputs.processor.tokenizer, source, recipe.revision)
    if random_seed is not None:
        model = with_random_weights(model, random_seed)
    return llava.backbone_of(source, model, recipe, device, inputs)


def _load_separate_clip(model: Any, missing: set[str]) -> set[str]:
    """Loads a tower that the checkpoint only names (LLaVA-1.5); returns the names of its tensors."""
    from transformers import CLIPVisionModel

    tower = {name for name in model.state_dict() if name.startswith(TOWER)}
    if isinstance(model.config.vision_config, OpenClipTowerConfig):
        return set()
    if not tower or tower != {name for name in missing if name.startswith(TOWER)}:
        return set()
    if model.device.type != "meta":
        clip = CLIPVisionModel.from_pretrained(model.config.tower, dtype=model.dtype)
        model.model.vision_tower = clip.to(model.device)
    return tower


def _add_special_tokens(model: Any, tokenizer: Any, source: str, revision: str | None) -> None:
    """Gives a model an embedding for every token of its tokenizer, OLA-VLM's parameters for the special ones."""
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    special = special_ids(tokenizer)
    if special and model.device.type != "meta":
        counts = special_counts(model.config)
        rows = special_rows(counts, read_special(source, revision))
        weight = model.get_input_embeddings().weight
        with torch.no_grad():
            weight[[row for task in counts for row in special[task]]] = rows.to(weight)


def _require_all_known(source: str, missing: set[str], unexpected: set[str]) -> None:
    unknown = sorted(name for name in unexpected if not any(re.search(rule, name) for rule in IGNORED))
    for what, names in (("lacks", sorted(missing)), ("has unknown", unknown)):
        if names:
            shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
            raise UserError(f"checkpoint {source} {what} {len(names)} tensors: {shown}")


def read_special(source: str, revision: str | None) -> dict[str, Tensor]:
    """Reads the parameters `model.special_<task>_tokens` of a checkpoint, by task, and nothing else."""
    return {name.split("_")[1]: tensor for name, tensor in read_tensors(source, "model.special_", revision)}


def describe(config: Any, inputs: LlavaInputs) -> dict[str, Any]:
    """Returns what `probing inspect` shows."""
    values = describe_llava(config, inputs)
    tower = {**values["vision_tower"], "source": config.tower}
    special = sum(values["tokens"].get(task, 0) for task in SPECIAL)
    return values | {"vision_tower": tower, "special_tokens": special}
