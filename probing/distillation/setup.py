"""What a training stage is put together from: checkpoint, conversations, teachers, and all that is trained."""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import probing.utils.torchvision_shim  # noqa: F401  # isort: skip
from transformers import AutoModelForImageTextToText, AutoProcessor

from probing.data.conversations import (
    Conversation,
    ConversationDataset,
    Encoder,
    collate,
    read_conversations,
    require_some_image,
)
from probing.data.patch_words import Annotations, PatchWords, read_annotations
from probing.distillation.model import Trainee
from probing.distillation.patch_alignment import PatchAlignment
from probing.distillation.predictors import FOLDER, EmbeddingPredictors, Task
from probing.distillation.recipe import DistillRecipe, EmbeddingRecipe, EncodersRecipe
from probing.distillation.special_tokens import add_special_tokens
from probing.models import llava_original, multi_encoder
from probing.models.base import parse_layers
from probing.models.chat_templates import rendering_moment
from probing.models.decoder import decoder_parts
from probing.models.image_tokens import tower_grid
from probing.models.llava import fit_processor, use_tokenizer_template
from probing.models.token_map import SPECIAL, special_ids
from probing.teachers import Teacher, load_teacher
from probing.utils.checkpoint_files import read_json
from probing.utils.errors import UserError, first_line
from probing.utils.paths import local_path
from probing.utils.pretrained import load_config, locate, pretrained, require_whole

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """What a stage starts from, before any weights are read.

    Attributes:
        conversations: to learn from.
        annotations: of their images, where patches are drawn to words.
        source: folder or Hub id of the checkpoint.
        config: its configuration.
    """

    conversations: list[Conversation]
    annotations: Annotations | None
    source: str
    config: Any


@dataclass(frozen=True)
class Parts:
    """A stage that could begin.

    Attributes:
        trainee: the model and what is trained beside it.
        processor: of the checkpoint, with its special tokens.
        config: of the checkpoint that it becomes.
        teachers: by name.
        encoder: makes model inputs of a conversation.
        samples: encoded conversations.
        collate: makes a batch of them.
    """

    trainee: Trainee
    processor: Any
    config: Any
    teachers: dict[str, Teacher]
    encoder: Encoder
    samples: ConversationDataset
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]


def open_start(recipe: DistillRecipe) -> Start:
    """Reads conversations, annotations and the checkpoint's configuration.

    Raises:
        UserError: they cannot be used.
    """
    conversations = read_conversations(local_path(recipe.data.conversations), recipe.data.limit)
    root, annotations = local_path(recipe.data.image_root), None
    require_some_image(conversations, root)
    if recipe.patches is not None:
        annotated = local_path(recipe.patches.annotations.removeprefix("coco:"))
        annotations = read_annotations(annotated, root, images_of(conversations))
    source = locate(recipe.checkpoint, "checkpoint")
    if llava_original.is_original(read_json(source, "config.json", recipe.revision)):
        raise UserError(
            f"{recipe.checkpoint} is in LLaVA's original format, which is probed as it is, and not trained; give the "
            "checkpoint converted to transformers' format"
        )
    config = load_config(source, "checkpoint", revision=recipe.revision)
    several = config.model_type == multi_encoder.MODEL_TYPE
    if config.model_type != "llava" and not several:
        raise UserError(f"{recipe.checkpoint} is no LLaVA checkpoint (model type {config.model_type!r})")
    if several and (recipe.encoders is not None or recipe.embedding is not None):
        raise UserError(f"{recipe.checkpoint} has several encoders already; leave out embedding and encoders")
    return Start(conversations, annotations, source, config)


def images_of(conversations: list[Conversation]) -> list[str]:
    """Names of all images."""
    return sorted({name for conversation in conversations for name in conversation.images})


def put_together(recipe: DistillRecipe, start: Start, device: torch.device) -> Parts:
    """Loads checkpoint and teachers.

    Args:
        recipe: the stage.
        start: from `open_start`.
        device: for the teachers; on the meta device no weights are read at all.

    Raises:
        UserError: something cannot be loaded, or does not fit the rest.
    """
    source, config, squared = start.source, start.config, recipe.view == "square"
    several = config.model_type == multi_encoder.MODEL_TYPE
    place = device if device.type == "meta" else torch.device("cpu")  # the Trainer moves it
    try:
        processor: Any = AutoProcessor.from_pretrained(source, revision=recipe.revision)
        use_tokenizer_template(processor)
        # Weights are trained in float32, whatever they are stored in; bf16 is autocast.
        loading: dict[str, Any] = {"revision": recipe.revision, "dtype": torch.float32}
        if several:
            model = multi_encoder.load_inner(source, config, place, **loading)
        else:
            model, missing, unexpected = pretrained(AutoModelForImageTextToText, source, config, place, **loading)
            require_whole(source, missing, unexpected)
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {recipe.checkpoint} cannot be loaded: {first_line(error)}") from None
    embedding: EmbeddingPredictors | None = None
    teachers: dict[str, Teacher] = {}
    if recipe.embedding is not None and recipe.embedding.tasks:
        embedding, teachers = _embedding(recipe.embedding, recipe.seed, source, model, processor, device)
    encoders: multi_encoder.Encoders | None = None
    if several or recipe.encoders is not None:
        if recipe.encoders is not None:
            config = _several(recipe.encoders, config, processor, model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            folder = Path(source) if several and device.type != "meta" else None
            encoders = multi_encoder.open_encoders(config, processor.tokenizer, device, folder)
        encoders.install(model)
        teachers = encoders.teachers
    fit_processor(processor, source, config, recipe.revision)
    encoder = Encoder(processor, config.image_token_id, recipe.max_length, rendering_moment())
    encoder.require_usable()
    labeller, alignment = None, None
    if recipe.patches is not None and start.annotations is not None:
        labeller = PatchWords(
            start.annotations, processor.image_processor, tower_grid(config), recipe.patches.coverage, squared
        )
        _require_one_token_a_patch(processor, config.image_token_id, labeller.grid)
        labeller.require_usable(images_of(start.conversations))
        alignment = PatchAlignment.of(recipe.patches, processor.tokenizer, labeller.words)
    if processor.tokenizer.pad_token_id is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    if recipe.gradient_checkpointing:
        # The LLM alone: asked of the whole model, transformers makes the frozen tower's inputs require gradients too,
        # and the backward pass goes through it for nothing.
        llm = model.model.language_model
        enable = getattr(llm, "activation_checkpointing_enable", None) or llm.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    trainee = Trainee(
        model,
        recipe.stage,
        None,
        embedding,
        recipe.embedding.contrastive if recipe.embedding else 0.0,
        {} if encoders else special_ids(processor.tokenizer),
        recipe.trains_special_tokens,
        encoders,
        alignment,
    )
    prepare = {name: teacher.prepare for name, teacher in teachers.items()}
    samples = ConversationDataset(
        start.conversations,
        local_path(recipe.data.image_root),
        encoder,
        squared,
        prepare,
        encoders is not None,
        labeller,
    )
    pad = functools.partial(collate, pad_id=processor.tokenizer.pad_token_id)
    return Parts(trainee.to(place), processor, config, teachers, encoder, samples, pad)


def _embedding(
    recipe: EmbeddingRecipe, seed: int, source: str, model: Any, processor: Any, device: torch.device
) -> tuple[EmbeddingPredictors, dict[str, Teacher]]:
    """Predictors and teachers of a stage; gives the checkpoint special tokens where the recipe has some.

    Raises:
        UserError: a teacher cannot be loaded, a layer is not in the LLM, or the checkpoint has other tokens or
            predictors.
    """
    blocks, width = len(decoder_parts(model)[0]), model.config.text_config.hidden_size
    chosen = {name: parse_layers(recipe.layers[name], blocks) for name in recipe.tasks}
    for name, layers in chosen.items():
        if not all(isinstance(layer, int) and layer > 0 for layer in layers):
            raise UserError(f"embedding.layers.{name} is {recipe.layers[name]!r}; give decoder blocks, 1 to {blocks}")
    teachers: dict[str, Teacher] = {name: load_teacher(name, recipe.teachers[name], device) for name in recipe.tasks}
    tasks = [
        Task(name, tuple(int(layer) for layer in chosen[name]), recipe.weights.get(name, 0.5), teachers[name].shape)
        for name in recipe.tasks
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        embedding = EmbeddingPredictors(tasks, width, recipe.seek, recipe.keys, recipe.heads, recipe.dim_head)
    saved = (Path(source) / FOLDER).is_dir()
    if recipe.seek:
        if special_ids(processor.tokenizer) and not saved:
            raise UserError(
                f"{source} has special tokens and not the predictors whose queries they are; embedding losses go on "
                f"from a folder with {FOLDER}/, as stage pt writes it"
            )
        add_special_tokens(processor, model, recipe.tasks, recipe.seek)
    if saved:
        embedding.load(Path(source) / FOLDER)
        logger.info("embedding predictors go on from %s", Path(source) / FOLDER)
    return embedding, teachers


def _require_one_token_a_patch(processor: Any, image_token_id: int, grid: tuple[int, int]) -> None:
    """Raises UserError where image tokens are not the patches of the grid, one by one."""
    ids = processor(images=[Image.new("RGB", (8, 8))], text=[processor.image_token], return_tensors="pt")["input_ids"]
    tokens = int((ids == image_token_id).sum())
    if tokens != grid[0] * grid[1]:
        raise UserError(
            f"the processor places {tokens} image tokens where the vision tower has {grid[0]} x {grid[1]} patches, so "
            "these cannot be aligned; leave out patches, or give a checkpoint with a token per patch"
        )


def _several(recipe: EncodersRecipe, config: Any, processor: Any, model: Any) -> multi_encoder.MultiEncoderConfig:
    """The configuration of a LLaVA that becomes a multi-encoder one; gives it tokens where the mode has some."""
    names = [name for name in SPECIAL if name in recipe.teachers]
    if recipe.mode == "token":
        add_special_tokens(processor, model, names, recipe.tokens)
    values = {name: value for name, value in model.config.to_dict().items() if name != "model_type"}
    teachers = {name: {"id": recipe.teachers[name].id, "grid": recipe.teachers[name].grid} for name in names}
    values["encoders"] = {"mode": recipe.mode, "tokens": recipe.tokens, "teachers": teachers}
    return multi_encoder.MultiEncoderConfig(**values)
