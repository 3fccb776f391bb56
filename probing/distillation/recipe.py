"""Recipes of the training stages."""

import math
from typing import Any, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from probing.recipe import Strict, TeacherName, TeacherRecipe
from probing.utils.errors import UserError

SPEED_ONLY = ("workers", "save_steps", "target_cache")
"""Fields that a stage may change when it goes on: they do not move a number."""

STAGE_DEFAULTS: dict[str, dict[str, float]] = {
    "pt": {"lr": 1e-3, "batch_size": 256},
    "vpt": {"lr": 2e-5, "batch_size": 128},
    "ift": {"lr": 2e-5, "batch_size": 128},
}
"""Learning rate and global batch of each stage (OLA-VLM, sec. 5.1; those of LLaVA-1.5)."""


class ConversationData(Strict):
    """What a stage is trained on."""

    conversations: str
    """LLaVA-format JSON or JSONL."""
    image_root: str
    """Folder that image names are relative to."""
    limit: int | None = Field(default=None, ge=1)
    """Take only the first so many conversations."""


Task = Literal["gen", "depth", "seg"]
KeyKind = Literal["system", "image", "special", "text", "answer"]


class EmbeddingRecipe(Strict):
    """Embedding losses: at some layers, a predictor's output is drawn to a teacher's features (OLA-VLM, sec. 4)."""

    teachers: dict[TeacherName, TeacherRecipe] = Field(min_length=1)
    """Teachers of the tasks. A task without teacher, or with weight 0, is not there: no tokens, no predictors, no loss
    (Table II). Plain encoders have no special tokens: with one, `seek` is 0."""
    layers: dict[TeacherName, str] = Field(default={"depth": "8,20", "seg": "10,18", "gen": "12,20"})
    """Decoder blocks whose states are read (Table 3, Fig. 5)."""
    weights: dict[TeacherName, float] = Field(default={"depth": 0.5, "seg": 0.5, "gen": 0.5})
    """Weight of each task's losses (Table IV)."""
    contrastive: float = Field(default=0.3, ge=0)
    """Weight of InfoNCE beside smooth L1; 0 leaves it out (Table V)."""
    seek: int = Field(default=8, ge=0)
    """Special tokens per task; 0 has none (Table 5)."""
    order: list[Task] = Field(default=["gen", "depth", "seg"])
    """Order of the special tokens after an image (Table III)."""
    keys: list[KeyKind] = Field(default=["system", "image", "special", "text"], min_length=1)
    """What predictors read; `special` is the task's own tokens, `answer` the supervised ones (Table I)."""
    heads: int = Field(default=4, ge=1)
    """Attention heads of a predictor."""
    dim_head: int = Field(default=32, ge=1)
    """Width of one head."""

    @property
    def tasks(self) -> list[str]:
        """Tasks that take part, in the order of their tokens."""
        every = dict.fromkeys([*self.order, *self.teachers])
        return [task for task in every if task in self.teachers and self.weights.get(task, 0.5) > 0]

    @field_validator("layers", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return {task: str(layers) for task, layers in value.items()} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _every_task_once(self) -> Self:
        plain = [name for name in self.teachers if name not in get_args(Task)]
        if len(set(self.order)) != len(self.order) or not set(self.teachers) <= {*self.order, *plain}:
            raise ValueError("order must name every task that has a teacher, once")
        if plain and self.seek:
            raise ValueError(
                f"special tokens stand for {', '.join(get_args(Task))}, and not for {plain[0]}; set seek=0"
            )
        for task in self.tasks:
            if task not in self.layers:
                raise ValueError(f"layers does not name those of {task}")
        return self


class EncodersRecipe(Strict):
    """Teachers as further vision encoders of the model itself: the multi-encoder baselines (OLA-VLM, sec. 5.2)."""

    mode: Literal["feature", "token"]
    """`feature`: joined to the tower's features, channel by channel; `token`: tokens of their own after the image."""
    teachers: dict[Task, TeacherRecipe] = Field(min_length=1)
    """Which teachers."""
    tokens: int = Field(default=8, ge=1)
    """Tokens per teacher, in mode `token`."""


class PatchAlignmentRecipe(Strict):
    """Patch-aligned training: image tokens of what a word stands for are drawn to the word's input embedding."""

    annotations: str
    """`coco:DIR`: what is where, from `DIR/annotations/{panoptic,instances}_SPLIT.json`, SPLIT being the folder that an
    image lies in."""
    weight: float = Field(default=0.5, gt=0)
    """Weight of the loss beside next-token prediction."""
    loss: Literal["cosine", "contrastive"] = "cosine"
    """`cosine` draws tokens to their word; `contrastive` away from the other words of the same image too."""
    coverage: float = Field(default=0.5, gt=0, le=1)
    """Share of a patch that a class must cover to be its label."""
    temperature: float = Field(default=0.07, gt=0)
    """Of the contrast (InfoNCE, arXiv:1807.03748; the value is that of arXiv:1805.01978)."""

    @field_validator("annotations")
    @classmethod
    def _known_scheme(cls, value: str) -> str:
        if not value.startswith("coco:"):
            raise ValueError(f"must look like coco:DIR, not {value!r}")
        return value


class DistillRecipe(Strict):
    """One stage of training."""

    checkpoint: str
    """Folder or Hub id of the LLaVA to start from."""
    revision: str | None = None
    """Hub revision."""
    stage: Literal["pt", "vpt", "ift"]
    """pt trains the projector, predictors and special tokens; vpt the whole model; ift LLM and projector."""
    data: ConversationData
    embedding: EmbeddingRecipe | None = None
    """Embedding losses; without, the stage learns by next-token prediction alone (Table 4)."""
    encoders: EncodersRecipe | None = None
    """Makes the checkpoint a multi-encoder one; later stages find that out themselves."""
    patches: PatchAlignmentRecipe | None = None
    """Draws image tokens to the words for what they show, beside whatever else the stage learns."""
    train_special_tokens: bool | None = None
    """Whether special tokens are trained; by default in pt alone (Table 6)."""
    view: Literal["own", "square"] = "own"
    """`own`: each model applies its own preprocessing to the original image; `square`: the image is squashed to a
    square first, so that student and teachers see the same."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate; by default the stage's: 1e-3 in pt, 2e-5 in vpt and ift."""
    batch_size: int | None = Field(default=None, ge=1)
    """Conversations per optimiser step, over all processes; by default 256 in pt, 128 in vpt and ift."""
    micro_batch: int = Field(default=8, ge=1)
    """Conversations per forward pass and process."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the conversations."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after so many optimiser steps, whatever `epochs` says."""
    warmup: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps over which the rate rises; then it falls as a cosine to zero."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's weight decay."""
    max_length: int = Field(default=4096, ge=8)
    """Longer conversations are cut at their end, and counted; one cut inside an image is left out, and named."""
    seed: int = 0
    """Of the order of the conversations."""
    bf16: bool = False
    """Compute in bfloat16 under autocast; weights are trained in float32."""
    gradient_checkpointing: bool = False
    """Trade time for memory."""
    save_steps: int = Field(default=200, ge=1)
    """Optimiser steps between saved training states; the newest is kept."""
    workers: int = Field(default=2, ge=0)
    """Processes that read images."""
    target_cache: str = "off"
    """Teachers' features are kept on disk and not computed again: `off`, `auto` (the user's cache folder, if there is
    room), or a folder."""
    target_cache_dtype: Literal["float32", "float16"] = "float32"
    """Of what is kept; float16 takes half the disk and rounds features to 11 bits."""
    trainer: dict[str, Any] = Field(default_factory=dict)
    """Further fields of transformers' TrainingArguments: report_to, fsdp, deepspeed, logging_steps, … Not those that
    the recipe has a field for."""

    @model_validator(mode="after")
    def _one_or_the_other(self) -> Self:
        if self.embedding is not None and self.encoders is not None:
            raise ValueError(
                "embedding and encoders cannot be had together: a model that sees a teacher learns nothing"
            )
        return self

    def difference(self, other: "DistillRecipe") -> str:
        """The first field that moves a number and differs in another recipe, or an empty string."""
        for name in type(self).model_fields:
            mine, others = getattr(self, name), getattr(other, name)
            if mine != others and name not in SPEED_ONLY:
                return f"{name} is {others} there and {mine} here"
        return ""

    @property
    def trains_special_tokens(self) -> bool:
        """Whether special tokens are trained, default filled in."""
        return self.stage == "pt" if self.train_special_tokens is None else self.train_special_tokens

    @property
    def peak_lr(self) -> float:
        """The learning rate, default filled in."""
        return self.lr if self.lr is not None else STAGE_DEFAULTS[self.stage]["lr"]

    @property
    def global_batch(self) -> int:
        """The batch size, default filled in."""
        return self.batch_size if self.batch_size is not None else int(STAGE_DEFAULTS[self.stage]["batch_size"])

    def cut_up(self, processes: int) -> tuple[int, int]:
        """Conversations of one forward pass, and forward passes of a process in one optimiser step.

        Raises:
            UserError: the batch cannot be shared evenly.
        """
        micro = min(self.micro_batch, self.global_batch)
        if self.global_batch % (micro * processes):
            raise UserError(
                f"batch_size {self.global_batch} is not a multiple of micro_batch {micro} times {processes} processes; "
                "change one of them"
            )
        return micro, self.global_batch // (micro * processes)

    def steps(self, conversations: int) -> int:
        """Optimiser steps of the stage."""
        return self.max_steps or math.ceil(self.epochs * math.ceil(conversations / self.global_batch))
