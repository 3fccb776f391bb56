"""Builds a training stage: checkpoint, conversations, teachers and losses."""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

import probing.utils.torchvision_shim  # noqa: F401  # isort: skip
from transformers import AutoModelForImageTextToText, AutoProcessor

from probing.data.conversations import (
    CachedTargets,
    Conversation,
    ConversationDataset,
    Encoder,
    collate,
    read_conversations,
    require_some_image,
)
from probing.data.patch_words import Annotations, PatchWords, read_annotations
from probing.distillation.losses import AuxiliaryLoss, EmbeddingLoss
from probing.distillation.model import DistillationModel
from probing.distillation.patch_alignment import PatchAlignmentLoss
from probing.distillation.predictors import FOLDER, EmbeddingPredictors, Task
from probing.distillation.recipe import DistillRecipe, EncodersRecipe
from probing.distillation.special_tokens import SpecialTokens, add_special_tokens
from probing.models import llava, llava_original, llava_projector, multi_encoder
from probing.models.base import parse_layers
from probing.models.chat_templates import rendering_moment
from probing.models.decoder import decoder_parts
from probing.models.image_tokens import tower_grid
from probing.models.llava import fit_processor, use_tokenizer_template
from probing.models.token_map import SPECIAL, special_ids
from probing.teachers import Teacher, load_teachers
from probing.utils.checkpoint_files import read_json_or_empty
from probing.utils.errors import UserError, first_line
from probing.utils.paths import local_path
from probing.utils.pretrained import load_config, locate, pretrained, require_whole
from probing.utils.processors import describe_processor

logger = logging.getLogger(__name__)
CPU, META = torch.device("cpu"), torch.device("meta")


@dataclass(frozen=True)
class StageInputs:
    """What a stage reads before any weights.

    Attributes:
        conversations: training data.
        annotations: of their images, for patch alignment.
        source: folder or Hub id of the checkpoint.
        config: its configuration.
    """

    conversations: list[Conversation]
    annotations: Annotations | None
    source: str
    config: Any

    @property
    def images(self) -> list[str]:
        """Names of all images."""
        return sorted({name for conversation in self.conversations for name in conversation.images})


def load_inputs(recipe: DistillRecipe) -> StageInputs:
    """Reads conversations, annotations and the checkpoint's configuration.

    Raises:
        UserError: they cannot be used.
    """
    conversations = read_conversations(local_path(recipe.data.conversations), recipe.data.limit)
    root = local_path(recipe.data.image_root)
    require_some_image(conversations, root)
    source = locate(recipe.checkpoint, "checkpoint")
    if llava_original.is_original(read_json_or_empty(source, "config.json", recipe.revision)):
        raise UserError(
            f"{recipe.checkpoint} has LLaVA's original format, which cannot be trained; "
            "convert it to transformers' format"
        )
    config = load_config(source, "checkpoint", revision=recipe.revision)
    if config.model_type not in (llava.MODEL_TYPE, llava_projector.MODEL_TYPE, multi_encoder.MODEL_TYPE):
        raise UserError(f"{recipe.checkpoint} is no LLaVA checkpoint (model type {config.model_type!r})")
    if config.model_type == multi_encoder.MODEL_TYPE and (recipe.encoders or recipe.embedding):
        raise UserError(f"{recipe.checkpoint} has several encoders already; remove embedding and encoders")
    inputs = StageInputs(conversations, None, source, config)
    if recipe.patches is None:
        return inputs
    folder = local_path(recipe.patches.annotations.removeprefix("coco:"))
    return StageInputs(conversations, read_annotations(folder, root, inputs.images), source, config)


@dataclass(frozen=True)
class Stage:
    """A stage that is ready to train.

    Attributes:
        recipe: of the stage.
        inputs: conversations and checkpoint.
        model: what is trained.
        processor: of the new checkpoint, with its special tokens.
        teachers: by name.
        encoder: makes model inputs of a conversation.
        patch_words: labels patches, for patch alignment.
    """

    recipe: DistillRecipe
    inputs: StageInputs
    model: DistillationModel
    processor: Any
    teachers: dict[str, Teacher]
    encoder: Encoder
    patch_words: PatchWords | None

    @property
    def is_multi_encoder(self) -> bool:
        """Whether the checkpoint itself reads the teachers' features."""
        return isinstance(self.model.model, multi_encoder.MultiEncoderForConditionalGeneration)

    def dataset(self, cached: CachedTargets | None = None) -> ConversationDataset:
        """Returns the encoded conversations, with teachers' features where they are cached."""
        return ConversationDataset(
            self.inputs.conversations,
            local_path(self.recipe.data.image_root),
            self.encoder,
            squared=self.recipe.view == "square",
            teachers={name: teacher.prepare for name, teacher in self.teachers.items()},
            single=self.is_multi_encoder,
            patches=self.patch_words,
            cached_targets=cached,
        )

    @property
    def collate(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Makes a micro-batch of samples; holds no weights, so that workers can carry it."""
        pad_id = self.processor.tokenizer.pad_token_id
        return functools.partial(_collate_pixels if self.is_multi_encoder else collate, pad_id=pad_id)


def _collate_pixels(samples: list[dict[str, Any]], pad_id: int) -> dict[str, Any]:
    """Collates for a model that reads the teachers' pixels itself."""
    batch = collate(samples, pad_id)
    batch.pop("target_rows", None)
    return batch | {f"pixel_values_{name}": pixels for name, pixels in batch.pop("teacher_pixels", {}).items()}


def build_stage(recipe: DistillRecipe, inputs: StageInputs, device: torch.device) -> Stage:
    """Loads checkpoint and teachers.

    Args:
        recipe: the stage.
        inputs: from `load_inputs`.
        device: for the teachers; on the meta device no weights are read.

    Raises:
        UserError: something cannot be loaded, or does not fit the rest.
    """
    model, processor = _load_checkpoint(recipe, inputs, META if device == META else CPU)
    auxiliary: list[AuxiliaryLoss] = []
    teachers: dict[str, Teacher] = {}
    predictors: EmbeddingPredictors | None = None
    if recipe.embedding is not None and recipe.embedding.tasks:
        teachers = load_teachers({name: recipe.embedding.teachers[name] for name in recipe.embedding.tasks}, device)
        predictors = _build_predictors(recipe, inputs.source, model, processor, teachers)
    if recipe.encoders is not None:
        encoders = {str(name): teacher for name, teacher in recipe.encoders.teachers.items()}
        teachers = load_teachers({name: encoders[name] for name in SPECIAL if name in encoders}, device)
        model = _add_encoders(recipe.encoders, recipe.seed, model, processor, teachers)
    elif isinstance(model, multi_encoder.MultiEncoderForConditionalGeneration):
        teachers = model.model.teachers = multi_encoder.load_teachers(inputs.config, device)
    fit_processor(processor, inputs.source, model.config, recipe.revision)
    encoder = Encoder(processor, model.config.image_token_id, recipe.max_length, rendering_moment())
    encoder.require_usable()
    patch_words = _patch_words(recipe, inputs, processor)
    if patch_words is not None and recipe.patches is not None:
        words = patch_words.words
        auxiliary.append(PatchAlignmentLoss(recipe.patches, processor.tokenizer, words, model.get_input_embeddings))
    several = isinstance(model, multi_encoder.MultiEncoderForConditionalGeneration)
    ids = {} if several else special_ids(processor.tokenizer)
    rows = None
    if predictors is not None and recipe.embedding is not None:
        if recipe.embedding.seek:
            ids, rows = {name: ids[name] for name in teachers}, predictors.special_rows
        image_token = model.config.image_token_id
        auxiliary.append(EmbeddingLoss(predictors, teachers, recipe.embedding.contrastive, image_token, ids))
    special = SpecialTokens(ids, model.get_input_embeddings(), rows) if ids else None
    for module in filter(None, (predictors, special)):
        module.queries.requires_grad_(recipe.trains_special_tokens)
    if processor.tokenizer.pad_token_id is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    if recipe.gradient_checkpointing:
        # Only the LLM: for the whole model, transformers makes the frozen tower's inputs require gradients too, and
        # the backward pass would needlessly go through it.
        llm = model.model.language_model
        enable = getattr(llm, "activation_checkpointing_enable", None) or llm.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    trained = DistillationModel(model, recipe.stage, auxiliary, special)
    if not any(parameter.requires_grad for parameter in trained.parameters()):
        raise UserError(f"{recipe.checkpoint} has nothing that stage {recipe.stage} trains; add embedding, or use ift")
    return Stage(recipe, inputs, trained, processor, teachers, encoder, patch_words)


def _load_checkpoint(recipe: DistillRecipe, inputs: StageInputs, device: torch.device) -> tuple[Any, Any]:
    """Loads the LLaVA in float32, which is trained whatever the files hold, and its processor."""
    source, config = inputs.source, inputs.config
    loading: dict[str, Any] = {"revision": recipe.revision, "dtype": torch.float32}
    try:
        processor: Any = AutoProcessor.from_pretrained(source, revision=recipe.revision)
        use_tokenizer_template(processor)
        if config.model_type == multi_encoder.MODEL_TYPE:
            return multi_encoder.load_model(source, config, device, **loading), processor
        model, missing, unexpected = pretrained(AutoModelForImageTextToText, source, config, device, **loading)
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {recipe.checkpoint} cannot be loaded: {first_line(error)}") from None
    require_whole(source, missing, unexpected)
    return model, processor


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds torch's random state in a block; on the meta device, creates tensors there."""
    with torch.random.fork_rng(devices=[]), device if device == META else contextlib.nullcontext():
        torch.manual_seed(seed)
        yield


def _build_predictors(
    recipe: DistillRecipe, source: str, model: Any, processor: Any, teachers: dict[str, Teacher]
) -> EmbeddingPredictors:
    """Builds the predictors, or loads those of the checkpoint; adds special tokens to a checkpoint without them.

    Raises:
        UserError: the LLM lacks a layer, or the checkpoint has other tokens or predictors.
    """
    assert recipe.embedding is not None
    blocks, embedding, tasks = len(decoder_parts(model)[0]), recipe.embedding, []
    for name, teacher in teachers.items():
        layers = parse_layers(embedding.layers[name], blocks)
        if not all(isinstance(layer, int) and layer > 0 for layer in layers):
            raise UserError(
                f"embedding.layers.{name} is {embedding.layers[name]!r}; give decoder blocks, 1 to {blocks}"
            )
        tasks.append(Task(name, tuple(map(int, layers)), embedding.weights.get(name, 0.5), teacher.shape))
    with _seeded(recipe.seed, model.device):
        predictors = EmbeddingPredictors(tasks, model.config.text_config.hidden_size, embedding)
    folder = Path(source) / FOLDER
    if embedding.seek:
        if special_ids(processor.tokenizer) and not folder.is_dir():
            raise UserError(
                f"{source} has special tokens but no {FOLDER}/, which embedding losses resume from; use what pt wrote"
            )
        add_special_tokens(processor, model, embedding.tasks, embedding.seek)
    if folder.is_dir() and model.device != META:
        predictors.load(folder)
        logger.info("embedding predictors resume from %s", folder)
    return predictors


def _add_encoders(
    recipe: EncodersRecipe, seed: int, base: Any, processor: Any, teachers: dict[str, Teacher]
) -> multi_encoder.MultiEncoderForConditionalGeneration:
    """Makes a LLaVA a multi-encoder one: shares its modules, and initialises the projectors of the teachers.

    Raises:
        UserError: a teacher's features cannot be pooled to equal groups, one per token, or there is no projector that
            could read them.
    """
    if recipe.mode == "feature" and getattr(base.config, "projector_depth", 2) == 0:
        raise UserError("encoders.mode=feature needs a projector, and this checkpoint has none; set mode=token")
    ids = {}
    if recipe.mode == "token":
        for name, teacher in teachers.items():
            count = teacher.shape[0]
            if count > 1 and count % recipe.tokens:
                choices = ", ".join(str(n) for n in range(1, 33) if count % n == 0)
                raise UserError(
                    f"encoders.tokens = {recipe.tokens} does not divide the {count} tokens of the {name} teacher; "
                    f"choose {choices}"
                )
        ids = add_special_tokens(processor, base, list(teachers), recipe.tokens)
    grids = {str(name): teacher.grid for name, teacher in recipe.teachers.items()}
    entries = {
        name: {
            "id": teacher.id,
            "grid": grids[name],
            "shape": list(teacher.shape),
            "sha256": teacher.sha256,
            "processor": describe_processor(teacher.prepare, "own"),
        }
        for name, teacher in teachers.items()
    }
    values = {name: value for name, value in base.config.to_dict().items() if name != "model_type"}
    values["encoders"] = {"mode": recipe.mode, "token_ids": ids, "teachers": entries}
    with META:
        model = multi_encoder.MultiEncoderForConditionalGeneration(multi_encoder.MultiEncoderConfig(**values))
    core = model.model
    core.vision_tower, core.language_model = base.model.vision_tower, base.model.language_model
    model.lm_head, model.generation_config = base.lm_head, base.generation_config
    if recipe.mode == "token":
        core.multi_modal_projector = base.model.multi_modal_projector
    projectors = core.multi_modal_projector if recipe.mode == "feature" else core.teacher_projectors
    projectors.to_empty(device=base.device)
    with _seeded(seed, base.device):
        for layer in projectors.modules():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
    core.teachers = teachers
    return model


def _patch_words(recipe: DistillRecipe, inputs: StageInputs, processor: Any) -> PatchWords | None:
    """Makes the labels of patches for patch alignment.

    Raises:
        UserError: image tokens do not correspond to patches one by one, or no patch has a label.
    """
    if recipe.patches is None or inputs.annotations is None:
        return None
    grid, squared = tower_grid(inputs.config), recipe.view == "square"
    image, text = Image.new("RGB", (8, 8)), processor.image_token
    ids = processor(images=[image], text=[text], return_tensors="pt")["input_ids"]
    tokens = int((ids == inputs.config.image_token_id).sum())
    if tokens != grid[0] * grid[1]:
        raise UserError(
            f"the processor makes {tokens} image tokens for {grid[0]} x {grid[1]} patches; remove patches, or use a "
            "checkpoint with a token per patch"
        )
    words = PatchWords(inputs.annotations, processor.image_processor, grid, recipe.patches.coverage, squared)
    words.require_usable(inputs.images)
    return words
