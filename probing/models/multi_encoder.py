"""LLaVA with the teachers as further vision encoders: OLA-VLM's multi-encoder baselines (arXiv:2412.09585, sec. 5.2).

`feature`: one projector reads the teachers' features, concatenated with the vision tower's channel by channel.
`token`: each teacher has its own projector, and a few tokens per teacher follow the image tokens.

A checkpoint is a LLaVA folder with its own model type. The teachers are frozen and not part of its weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import probing.utils.torchvision_shim  # noqa: F401  # isort: skip
from transformers import (
    AutoConfig,
    GenerationMixin,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from probing.models import llava
from probing.models.base import Backbone
from probing.models.image_tokens import tower_grid
from probing.models.llava_projector import ProjectorConfig, ProjectorForConditionalGeneration, ProjectorModel
from probing.models.random_weights import with_random_weights
from probing.models.token_map import SPECIAL
from probing.recipe import BackboneRecipe, TeacherRecipe
from probing.teachers import Teacher, load_teacher
from probing.utils.checkpoint_files import loading
from probing.utils.errors import UserError
from probing.utils.precision import without_autocast
from probing.utils.pretrained import pretrained, require_whole
from probing.utils.processors import changed_input, describe_processor

MODEL_TYPE = "llava_multi_encoder"
PIXELS = tuple(f"pixel_values_{name}" for name in SPECIAL)
"""Model inputs that hold the teachers' pixels."""


class MultiEncoderConfig(ProjectorConfig):
    """A LLaVA's configuration and `encoders`: mode, ids of each teacher's tokens, and the teachers."""

    model_type = MODEL_TYPE

    def teacher_entries(self) -> dict[str, dict[str, Any]]:
        """Returns the teachers in the order of their features and tokens; JSON sorts a saved configuration."""
        return {name: self.encoders["teachers"][name] for name in SPECIAL if name in self.encoders["teachers"]}


AutoConfig.register(MODEL_TYPE, MultiEncoderConfig, exist_ok=True)


class MultiEncoderModel(ProjectorModel):
    """LLaVA without `lm_head`, whose image features include the teachers'.

    Attributes:
        teachers: by name; needed unless the caller gives `teacher_features`.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.teachers: dict[str, Teacher] = {}
        self.grid = tower_grid(config)
        self.concatenates = config.encoders["mode"] == "feature"
        hidden, projector = config.text_config.hidden_size, self.multi_modal_projector
        widths = {name: entry["shape"][1] for name, entry in config.teacher_entries().items()}
        if self.concatenates:
            projector.linear_1 = nn.Linear(projector.linear_1.in_features + sum(widths.values()), hidden)
        else:
            self.teacher_projectors = nn.ModuleDict()
            for name, width in widths.items():
                layers = nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden)
                self.teacher_projectors[name] = nn.Sequential(*layers)

    def get_image_features(
        self,
        pixel_values: Tensor,
        pixel_values_gen: Tensor | None = None,
        pixel_values_depth: Tensor | None = None,
        pixel_values_seg: Tensor | None = None,
        teacher_features: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Projects the features of vision tower and teachers; `generate` calls this before the first token.

        Args:
            pixel_values: (images, 3, S, S).
            pixel_values_gen: pixels of the same images for the gen teacher.
            pixel_values_depth: for the depth teacher.
            pixel_values_seg: for the seg teacher.
            teacher_features: (images, N, D) by teacher, in place of their pixels.
            **kwargs: LLaVA's options, which the configuration decides.

        Returns:
            In `pooler_output` per image (tokens, H): the image tokens, then each teacher's in mode `token`.
        """
        if teacher_features is None:
            pixels: dict[str, Any] = {"gen": pixel_values_gen, "depth": pixel_values_depth, "seg": pixel_values_seg}
            with without_autocast(pixel_values.device):
                teacher_features = {name: teacher.target(pixels[name]) for name, teacher in self.teachers.items()}
        extra = {name: teacher_features[name] for name in self.config.teacher_entries()}
        hidden_states = self.vision_tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
        layers = self.config.vision_feature_layer
        features = [hidden_states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
        if self.config.vision_feature_select_strategy == "default":
            features = [layer[:, 1:] for layer in features]
        if self.concatenates:
            features += [self._resample(one).to(features[0]) for one in extra.values()]
        projector = self.multi_modal_projector
        tokens = [projector(torch.cat(features, dim=-1).to(self.language_model.dtype))]
        if not self.concatenates:
            tokens += [self._project(name, one) for name, one in extra.items()]
        per_image: Any = list(torch.cat(tokens, dim=1))
        return BaseModelOutputWithPooling(pooler_output=per_image)

    def _resample(self, features: Tensor) -> Tensor:
        """Interpolates features (B, N, D) to the grid of the image tokens; repeats a single token."""
        count, patches = features.shape[1], self.grid[0] * self.grid[1]
        if count in (1, patches):
            return features.expand(-1, patches, -1)
        side = round(count**0.5)
        plane = features.transpose(1, 2).unflatten(2, (side, side))
        return F.interpolate(plane, size=self.grid, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)

    def _project(self, name: str, features: Tensor) -> Tensor:
        """Projects a teacher's features as tokens: means over equal groups; repeats a single one."""
        count = len(self.config.encoders["token_ids"][name])
        projector = cast(nn.Sequential, self.teacher_projectors[name])
        if features.shape[1] == 1:
            features = features.expand(-1, count, -1)
        return projector(features.unflatten(1, (count, -1)).mean(dim=2).to(next(projector.parameters()).dtype))

    def get_placeholder_mask(self, input_ids: Any, inputs_embeds: Tensor, image_features: Tensor) -> Tensor:
        """Marks (B, T, 1) the positions that image features fill: image tokens and the teachers' tokens."""
        ids = [self.config.image_token_id, *chain(*self.config.encoders["token_ids"].values())]
        filled = torch.isin(input_ids, torch.tensor(ids, device=input_ids.device))
        return super().get_placeholder_mask(
            input_ids.masked_fill(filled, self.config.image_token_id), inputs_embeds, image_features
        )

    def forward(self, pixel_values: Tensor | None = None, **kwargs: Any) -> Any:
        """Runs LLaVA; takes the arguments of `get_image_features` next to LLaVA's."""
        teachers = {name: kwargs.pop(name) for name in (*PIXELS, "teacher_features") if name in kwargs}
        if pixel_values is not None:
            ids, embeds = kwargs.pop("input_ids"), kwargs.pop("inputs_embeds", None)
            embeds = self.get_input_embeddings()(ids) if embeds is None else embeds
            per_image: Any = self.get_image_features(pixel_values, **teachers).pooler_output
            features = torch.cat(per_image).to(embeds)
            kwargs["inputs_embeds"] = embeds.masked_scatter(self.get_placeholder_mask(ids, embeds, features), features)
        return super().forward(**kwargs)


class MultiEncoderForConditionalGeneration(ProjectorForConditionalGeneration):
    """A multi-encoder LLaVA with its `lm_head`."""

    config_class = MultiEncoderConfig
    core_class = MultiEncoderModel

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """Accepts the teachers' pixels in `generate`, which hands them to `get_image_features`."""
        GenerationMixin._validate_model_kwargs(
            cast(Any, self), {name: value for name, value in model_kwargs.items() if name not in PIXELS}
        )


@dataclass(frozen=True)
class MultiEncoderInputs(llava.LlavaInputs):
    """Prepares model inputs, with each teacher's pixels.

    Attributes:
        teachers: `Teacher.prepare` by name.
    """

    teachers: dict[str, Any] = field(default_factory=dict)

    @property
    def inputs(self) -> llava.LlavaInputs:
        """The LLaVA's own, by which checkpoints are compared."""
        return llava.LlavaInputs(**{each.name: getattr(self, each.name) for each in fields(llava.LlavaInputs)})

    def encode(self, images: Sequence[Any], texts: Sequence[str]) -> dict[str, Tensor]:
        """Returns the model inputs of images and as many rendered prompts."""
        pixels = {f"pixel_values_{name}": prepare(images) for name, prepare in self.teachers.items()}
        return super().encode(images, texts) | pixels


def make_inputs(source: str, config: Any, recipe: BackboneRecipe) -> llava.LlavaInputs:
    """Builds the LLaVA's own inputs; raises UserError also if the recipe removes the teachers' tokens."""
    if recipe.special_tokens == "off" and config.encoders["mode"] == "token":
        raise UserError(f"{source} reads its teachers through special tokens; leave out backbone.special_tokens")
    return llava.make_inputs(source, config, recipe)


def load_model(source: str, config: Any, device: torch.device, **kwargs: Any) -> Any:
    """Loads a checkpoint without its teachers, with arguments of `pretrained`; raises UserError for missing tensors."""
    model, missing, unexpected = pretrained(MultiEncoderForConditionalGeneration, source, config, device, **kwargs)
    require_whole(source, missing, unexpected)
    return model


def load_teachers(config: Any, device: torch.device) -> dict[str, Teacher]:
    """Loads the configured teachers.

    Raises:
        UserError: a teacher's weights or preprocessing are not those that the checkpoint was trained with.
    """
    teachers = {}
    for name, entry in config.teacher_entries().items():
        _, of_hub, commit = entry["sha256"].partition("commit:")  # of a teacher on the Hub, which may have moved on
        recipe = TeacherRecipe(id=entry["id"], grid=entry["grid"], revision=commit if of_hub else None)
        teacher = load_teacher(name, recipe, device)
        if device.type != "meta" and entry["sha256"] != teacher.sha256:
            raise UserError(f"the {name} teacher {entry['id']} is not the one this checkpoint was trained with")
        key, processor = f"{name} teacher's processor", describe_processor(teacher.prepare, "own")
        if changed := changed_input({key: entry["processor"]}, {key: processor}):
            raise UserError(f"the {changed} changed since {config.name_or_path} was trained; restore it")
        teachers[name] = teacher
    return teachers


def load(source: str, config: Any, recipe: BackboneRecipe, device: torch.device, random_seed: int | None) -> Backbone:
    """Loads a multi-encoder checkpoint; see `probing.models.llava.load`.

    The random-weights control re-initialises LLM and projectors, and keeps vision tower and teachers.
    """
    inputs = make_inputs(source, config, recipe)
    with loading(f"checkpoint {source}"):
        model = load_model(source, config, device, dtype=recipe.dtype, revision=recipe.revision)
    if random_seed is not None:
        model = with_random_weights(model, random_seed)
    model.model.teachers = load_teachers(config, device)
    prepare = {name: teacher.prepare for name, teacher in model.model.teachers.items()}
    return llava.backbone_of(source, model, recipe, device, MultiEncoderInputs(**vars(inputs), teachers=prepare))


def describe(config: Any, inputs: llava.LlavaInputs) -> dict[str, Any]:
    """Returns what `probing inspect` shows."""
    teachers = {name: entry["id"] for name, entry in config.teacher_entries().items()}
    return llava.describe(config, inputs) | {"encoders": {"mode": config.encoders["mode"], **teachers}}
