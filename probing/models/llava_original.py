"""LLaVA in its original format, and OLA-VLM / VisPer-LM: read into transformers' LLaVA by declarative renames.

Checkpoints that look at tiles of the image (`anyres`: LLaVA-1.6) become transformers' LLaVA-NeXT.

The original code keeps vision tower and projector below the LLM, names its layers otherwise, and says in `config.json`
(`mm_vision_tower`, …) what transformers says in nested configurations. OLA-VLM adds special tokens as parameters of the
model; here they become rows of the embedding table and entries of the vocabulary, as `probing distill` has them.
"""

import contextlib
import re
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import probing.utils.torchvision_shim  # noqa: F401  # isort: skip
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaNextConfig, MistralConfig, Phi3Config

from probing.models import llava, llava_next
from probing.models.base import Backbone
from probing.models.chat_templates import TEMPLATES, find_template
from probing.models.convnext import ConvNextTower, convnext_of, stand_in
from probing.models.llava import LlavaInputs
from probing.models.llava import describe as describe_llava
from probing.models.llava_next import parse_pinpoints
from probing.models.token_map import SPECIAL, special_ids, token_name
from probing.recipe import BackboneRecipe
from probing.utils.errors import UserError, first_line
from probing.utils.paths import local_path
from probing.utils.pretrained import (
    load_config,
    loading,
    pretrained,
    read_json,
    read_tensors,
    refuse_other_shapes,
    tensor_shapes,
)

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
"""Model types whose class in the original code pools the special tokens' rows whatever the configuration says."""

RENAMES = {
    r"^model\.mm_projector\.0\.": "model.multi_modal_projector.linear_1.",
    r"^model\.mm_projector\.2\.": "model.multi_modal_projector.linear_2.",
    r"^model\.vision_tower\.vision_tower\.vision_model\.": "model.vision_tower.",
    r"^model\.embed_tokens\.": "model.language_model.embed_tokens.",
    r"^model\.layers\.": "model.language_model.layers.",
    r"^model\.norm\.": "model.language_model.norm.",
}
"""Names in the file → names in transformers' LLaVA."""

IGNORED = {
    r"\.rotary_emb\.inv_freq$": "computed from the configuration",
    r"^model\.vision_tower\..*\.position_ids$": "counts up",
    r"^model\.special_(gen|depth|seg)_tokens$": "special tokens, read apart",
    r"^image_(gen|depth|seg)_heads\.": "embedding predictors, or probes, which probing import reads",
    r"^(gen|depth|seg)_logit_scale$": "scales of the contrastive losses",
    r"^model\.vision_tower\.vision_tower\.head\.": "what a ConvNeXt has behind the features that are read",
    r"^(da_v2_head|dav2_backbone|oneformer|gen_encoder)\.": "weights of a teacher",
}
"""Tensors that are no part of the model that is probed, and why."""

TOWERS: dict[str, tuple[str, dict[str, Any]]] = {
    "clip-vit-large-patch14-336": (
        "openai/clip-vit-large-patch14-336",
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        | {"image_size": 336, "patch_size": 14, "projection_dim": 768},
    ),
    "clip-vit-large-patch14": (
        "openai/clip-vit-large-patch14",
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        | {"image_size": 224, "patch_size": 14, "projection_dim": 768},
    ),
}
"""Vision towers by the last part of the path that a checkpoint names: Hub id and configuration."""


def is_original(raw: dict[str, Any]) -> bool:
    """Whether a `config.json` is of the original format."""
    return "mm_vision_tower" in raw or str(raw.get("model_type")) in set(LLMS) - {"llava"}


def read_config(raw: dict[str, Any], recipe: BackboneRecipe) -> LlavaConfig | LlavaNextConfig:
    """Transformers' configuration of an original checkpoint.

    Args:
        raw: its `config.json`.
        recipe: may name the vision tower.

    Returns:
        The configuration, with `original` (raw), `tower`, where the tower comes from, and `convnext`, its architecture
        if it is a ConvNeXt.

    Raises:
        UserError: the checkpoint is of a kind that is not supported.
    """
    kind = str(raw.get("model_type", ""))
    if kind not in LLMS:
        raise UserError(f"{recipe.checkpoint} is an original LLaVA of model type {kind!r}; known are {', '.join(LLMS)}")
    projector, aspect = raw.get("mm_projector_type", "linear"), raw.get("image_aspect_ratio", "square")
    tiled = aspect == "anyres"
    merge = raw.get("mm_patch_merge_type", "flat") if tiled else "spatial_unpad"
    for name, value, known in (
        ("mm_projector_type", projector, ("mlp2x_gelu",)),
        ("image_aspect_ratio", aspect, ("square", "pad", "anyres")),
        ("mm_patch_merge_type", merge, ("spatial_unpad",)),
        ("mm_vision_select_feature", raw.get("mm_vision_select_feature", "patch"), ("patch",)),
        ("mm_use_im_start_end", raw.get("mm_use_im_start_end", False), (False,)),
    ):
        if value not in known:
            raise UserError(
                f"{recipe.checkpoint}: {name} is {value!r}, and in the original format "
                f"{' or '.join(map(repr, known))} is read; give the checkpoint converted to transformers' format"
            )
    llm = LLMS[kind]
    fields = set(llm().to_dict()) | {"rope_theta", "rope_scaling"}
    text = {name: value for name, value in raw.items() if name in fields and name not in _NOT_THE_LLMS}
    tower, vision, convnext = _tower(raw, recipe)
    strategy: Any = "full" if convnext else "default"
    side = vision.image_size // vision.patch_size
    values: dict[str, Any] = dict(
        vision_config=vision, text_config=llm(**text), projector_hidden_act="gelu", image_token_index=0,
        vision_feature_layer=-1 if convnext else raw.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy=strategy,
        image_seq_length=side * side, tie_word_embeddings=raw.get("tie_word_embeddings", False),
    )  # fmt: skip
    config: LlavaConfig | LlavaNextConfig
    if tiled:
        pinpoints = parse_pinpoints(raw.get("image_grid_pinpoints"), vision.image_size)
        config = LlavaNextConfig(**values, image_grid_pinpoints=pinpoints)
    else:
        config = LlavaConfig(**values)
    config.original, config.tower, config.convnext = raw, tower, convnext
    config.architectures, config.dtype = raw.get("architectures"), raw.get("torch_dtype")
    return config


_NOT_THE_LLMS = {
    "model_type",
    "architectures",
    "auto_map",
    "transformers_version",
    "_name_or_path",
    "id2label",
    "label2id",
}


def _tower(raw: dict[str, Any], recipe: BackboneRecipe) -> tuple[str, Any, str | None]:
    """Where the tower comes from, its configuration, and the architecture of a ConvNeXt; a path is only a hint."""
    hint = str(recipe.vision_tower or raw.get("mm_vision_tower") or "")
    name = hint.rstrip("/").rsplit("/", 1)[-1]
    if not local_path(hint).is_dir() and name in TOWERS:
        source, values = TOWERS[name]
        return source, CLIPVisionConfig(**values), None
    convnext = convnext_of(name, read_json(hint, "config.json") if local_path(hint).is_dir() else {})
    if convnext:
        return hint, stand_in(*convnext), convnext[0]
    if not hint or (not local_path(hint).is_dir() and hint.startswith(("/", ".", "~"))):
        raise UserError(
            f"{recipe.checkpoint} names the vision tower {hint!r}, which cannot be found; give it: "
            "backbone.vision_tower=FOLDER_OR_HUB_ID"
        )
    config = load_config(hint, "vision tower")
    config = getattr(config, "vision_config", config)
    if config.model_type != "clip_vision_model":
        raise UserError(f"vision tower {hint} is a {config.model_type}; in the original format a CLIP tower is read")
    return hint, config, None


class PieceInputs(LlavaInputs):
    """Images → `Batch`, where the text on either side of an image is tokenized apart, as LLaVA's code does.

    That matters for tokenizers that begin a text otherwise than its later parts: sentencepiece with `legacy: false`.
    """

    def encode(self, images: Sequence[Image.Image], texts: Sequence[str]) -> dict[str, Tensor]:
        """What the model takes, of images and as many rendered prompts."""
        inputs = super().encode(images, texts)
        tokenizer = self.processor.tokenizer
        rows = [tokenize_pieces(tokenizer, text, ids) for text, ids in zip(texts, inputs["input_ids"], strict=True)]
        return inputs | dict(tokenizer.pad({"input_ids": rows}, return_tensors="pt"))


class TiledPieceInputs(PieceInputs, llava_next.TiledInputs):
    """The same for checkpoints that look at tiles of the image."""


def tokenize_pieces(tokenizer: Any, text: str, ids: Tensor) -> list[int]:
    """Ids of a prompt whose pieces between images are tokenized one by one; only the first begins with a BOS.

    Args:
        tokenizer: has `<image>` and the special tokens as entries of its own.
        text: the prompt, with one `<image>` for each image.
        ids: the prompt tokenized as a whole, with as many image tokens as each image has.
    """
    tasks = special_ids(tokenizer)
    names = ["<image>", *(token for task in tasks.values() for token in tokenizer.convert_ids_to_tokens(task))]
    places = {*tokenizer.convert_tokens_to_ids(names)}
    inserted = [[i for _, i in run] for known, run in groupby(((i in places, i) for i in ids.tolist()), itemgetter(0))
                if known]  # fmt: skip
    pieces = re.split(f"(?:{'|'.join(map(re.escape, names))})+", text)
    found = [list(tokenizer(piece).input_ids) for piece in pieces]
    bos = int(found[0][:1] == [tokenizer.bos_token_id])
    return found[0] + [i for run, piece in zip(inserted, found[1:], strict=True) for i in [*run, *piece[bos:]]]


def make_inputs(source: str, config: Any, recipe: BackboneRecipe) -> LlavaInputs:
    """Builds the input side: the checkpoint's tokenizer, the tower's preprocessing, a template of the original code.

    Raises:
        UserError: there is no tokenizer, or it cannot be known which template the checkpoint was trained with.
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
    size = config.vision_config.image_size
    sizes: dict[str, Any] = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    tiled = isinstance(config, LlavaNextConfig)
    if tiled:
        image_processor: Any = LlavaNextImageProcessor(**sizes, image_grid_pinpoints=config.image_grid_pinpoints)
    else:
        image_processor = CLIPImageProcessor(**sizes)
    processor: Any = (LlavaNextProcessor if tiled else LlavaProcessor)(
        image_processor=image_processor,
        tokenizer=tokenizer, patch_size=config.vision_config.patch_size,
        num_additional_image_tokens=0 if config.convnext else 1,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=template.replace("<image>", "<image>" + "".join(tokens)),
    )  # fmt: skip
    config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    if tiled:
        made: LlavaInputs = llava_next.inputs_of(processor, config, recipe)
        return TiledPieceInputs(**vars(made))
    pad = config.original.get("image_aspect_ratio") == "pad"
    return PieceInputs(**vars(llava.inputs_of(processor, config, recipe, pad_to_square=pad)))


def _template(raw: dict[str, Any], tokenizer: Any) -> str:
    """Name of the conversation template, as model type and tokenizer say without doubt."""
    llm = LLMS[raw["model_type"]]
    if llm is Phi3Config:
        return "llava_phi_3"
    if llm is MistralConfig:
        return "mistral_instruct"
    if "<|start_header_id|>" in tokenizer.get_vocab():
        return "llava_llama_3"
    raise UserError(
        "neither configuration nor tokenizer says which conversation template this checkpoint was trained with; give "
        f"it: backbone.template=NAME, one of {', '.join(TEMPLATES)} (LLaVA-1.5: vicuna_v1)"
    )


def special_counts(config: Any) -> dict[str, int]:
    """How many special tokens of OLA-VLM stand for each task, in their order; empty where there are none.

    Its parameters for depth and seg have a row for every image token. The class of the pre-training stage pools them
    whatever `task_token_format` says. The fine-tuned class pools them for `expand_emb` and inserts them as they are for
    `emb`, which is also its default; gen has its few rows in any case.

    Raises:
        UserError: they are of a format that cannot be read.
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
            f"task_token_format is {form!r}: which tokens stand for the tasks is not in the checkpoint; set "
            "backbone.special_tokens=off"
        )
    return {task: number if pooled or task == "gen" else config.image_seq_length for task in order}


def special_rows(counts: dict[str, int], parameters: dict[str, Tensor]) -> Tensor:
    """Embeddings (tokens, H) of the special tokens: equal groups of a parameter's rows, averaged, as OLA-VLM does.

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
            raise UserError(f"special_{task}_tokens: {shape}, and {number} tokens are wanted; set special_tokens=off")
        rows.append(value.float().unflatten(0, (number, -1)).mean(dim=1))
    return torch.cat(rows)


def load(source: str, config: Any, recipe: BackboneRecipe, device: torch.device, random_seed: int | None) -> Backbone:
    """Loads the checkpoint into transformers' LLaVA; see `probing.models.llava.load`.

    Every tensor of the files is used or ignored by a rule of `IGNORED`, and every parameter of the model is filled.

    Raises:
        UserError: tensors are missing or unknown, or the tower cannot be found.
    """
    from transformers import CLIPVisionModel, LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

    model_class = (
        LlavaNextForConditionalGeneration if isinstance(config, LlavaNextConfig) else LlavaForConditionalGeneration
    )
    inputs = make_inputs(source, config, recipe)
    arguments = llava.loading_arguments(recipe) | {"revision": recipe.revision}
    no_weights = device.type == "meta"
    with loading(f"checkpoint {source}"):
        model, missing, unexpected = pretrained(model_class, source, config, device, key_mapping=RENAMES, **arguments)
        if config.convnext:
            with device if no_weights else contextlib.nullcontext():
                tower = ConvNextTower(config.convnext)
            prefix = "model.vision_tower.vision_tower."
            wanted = {prefix + name: tensor.shape for name, tensor in tower.state_dict().items()}
            if missing or unexpected:  # neither without weights
                missing = {name for name in missing if not name.startswith("model.vision_tower.")}
                missing |= wanted.keys() - unexpected
                shapes = tensor_shapes(source, recipe.revision)
                present = wanted.keys() & unexpected
                refuse_other_shapes(source, [(n, shapes[n], wanted[n]) for n in present if shapes[n] != [*wanted[n]]])
                unexpected -= wanted.keys()
            if not no_weights:
                tensors = read_tensors(source, prefix, recipe.revision)
                own = {name.removeprefix(prefix): tensor for name, tensor in tensors if name in wanted}
                tower.load_state_dict(own, strict=False)
            model.model.vision_tower = tower.to(model.device, model.dtype)
        towers = {name for name in missing if name.startswith("model.vision_tower.")}
        if towers and towers == {name for name in model.state_dict() if name.startswith("model.vision_tower.")}:
            if not no_weights:
                clip = CLIPVisionModel.from_pretrained(config.tower, dtype=model.dtype)
                model.model.vision_tower = clip.to(model.device)
            missing -= towers
    _require_all_known(source, missing, unexpected)
    tokenizer = inputs.processor.tokenizer
    special = special_ids(tokenizer)
    table = model.get_input_embeddings()
    if len(tokenizer) > table.num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if special and not no_weights:
        counts = special_counts(config)
        rows = special_rows(counts, read_special(source, recipe.revision))
        weight = model.get_input_embeddings().weight
        with torch.no_grad():
            weight[[row for task in counts for row in special[task]]] = rows.to(weight)
    if random_seed is not None:
        model = llava.randomised(model, random_seed)
    return llava.backbone_of(source, model, recipe, device, inputs, f"original {config.original['model_type']}")


def _require_all_known(source: str, missing: set[str], unexpected: set[str]) -> None:
    unknown = sorted(name for name in unexpected if not any(re.search(rule, name) for rule in IGNORED))
    for what, names in (("lacks", sorted(missing)), ("has unknown", unknown)):
        if names:
            shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
            raise UserError(f"checkpoint {source} {what} {len(names)} tensors: {shown}")


def read_special(source: str, revision: str | None) -> dict[str, Tensor]:
    """The parameters `model.special_<task>_tokens` of a checkpoint, by task; nothing else of it is read."""
    return {name.split("_")[1]: tensor for name, tensor in read_tensors(source, "model.special_", revision)}


def _convnext(config: Any) -> dict[str, Any]:
    """What `probing inspect` says of a ConvNeXt instead of its stand-in."""
    if not config.convnext:
        return {}
    return {"type": f"{config.convnext} (timm)", "layers": "stem and 4 stages", "feature_layer": "last stage"}


def describe(config: Any, inputs: LlavaInputs) -> dict[str, Any]:
    """What `probing inspect` shows."""
    raw = config.original
    found = describe_llava(config, inputs)
    special = sum(found["tokens"].get(task, 0) for task in SPECIAL)
    return found | {
        "family": f"original {raw['model_type']}",
        "vision_tower": {**found["vision_tower"], "source": config.tower} | _convnext(config),
        "special_tokens": special,
    }
