"""Recipes of the training stages."""

import math
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from probing.recipe import Seed, Strict, TeacherName, TeacherRecipe
from probing.utils.errors import UserError

SPEED_ONLY = ("workers", "save_steps", "target_cache")
"""Fields that may change when a stage resumes: they do not affect results."""

STAGE_DEFAULTS: dict[str, dict[str, float]] = {
    "pt": {"lr": 1e-3, "batch_size": 256},
    "vpt": {"lr": 2e-5, "batch_size": 128},
    "ift": {"lr": 2e-5, "batch_size": 128},
}
"""Learning rate and global batch of each stage (OLA-VLM, sec. 5.1; those of LLaVA-1.5)."""


class ConversationData(Strict):
    """Training data of a stage."""

    conversations: str
    """LLaVA-format JSON or JSONL."""
    image_root: str
    """Folder that image names are relative to."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first N conversations."""


TaskName = Literal["gen", "depth", "seg"]
KeyKind = Literal["system", "image", "special", "text", "answer"]


class EmbeddingRecipe(Strict):
    """Embedding losses pull a predictor's output at some layers towards a teacher's features (OLA-VLM, sec. 4)."""

    teachers: dict[TeacherName, TeacherRecipe] = Field(min_length=1)
    """Teachers of the tasks. A task without teacher, or with weight 0, has no tokens, predictors or loss (Table II).
    Plain encoders have no special tokens: with one, set `seek` to 0."""
    layers: dict[TeacherName, str] = Field(default={"depth": "8,20", "seg": "10,18", "gen": "12,20"})
    """Decoder blocks whose states are read (Table 3, Fig. 5)."""
    weights: dict[TeacherName, Annotated[float, Field(ge=0)]] = Field(default={"depth": 0.5, "seg": 0.5, "gen": 0.5})
    """Weight of each task's losses (Table IV)."""
    contrastive: float = Field(default=0.3, ge=0)
    """Weight of InfoNCE relative to smooth L1; 0 omits it (Table V)."""
    seek: int = Field(default=8, ge=0)
    """Special tokens per task; 0 for none (Table 5)."""
    order: list[TaskName] = Field(default=["gen", "depth", "seg"])
    """Order of the special tokens after an image (Table III)."""
    keys: list[KeyKind] = Field(default=["system", "image", "special", "text"], min_length=1)
    """Tokens that predictors read; `special` are the task's own, `answer` the supervised ones (Table I)."""
    heads: int = Field(default=4, ge=1)
    """Attention heads of a predictor."""
    dim_head: int = Field(default=32, ge=1)
    """Width of one head."""

    @property
    def tasks(self) -> list[str]:
        """Tasks with a teacher and a weight, in the order of their tokens."""
        every = dict.fromkeys([*self.order, *self.teachers])
        return [task for task in every if task in self.teachers and self.weights.get(task, 0.5) > 0]

    @field_validator("layers", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return {task: str(layers) for task, layers in value.items()} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _every_task_once(self) -> Self:
        plain = [name for name in self.teachers if name not in get_args(TaskName)]
        if len(set(self.order)) != len(self.order) or not set(self.teachers) <= {*self.order, *plain}:
            raise ValueError("order must name every task that has a teacher, once")
        if plain and self.seek:
            raise ValueError(f"only {', '.join(get_args(TaskName))} have special tokens, not {plain[0]}; set seek=0")
        if self.keys == ["special"] and not self.seek:
            raise ValueError("keys has only special tokens, and seek=0 makes none; add keys, such as image")
        for task in self.tasks:
            if task not in self.layers:
                raise ValueError(f"layers has none for {task}; add them")
        return self


class EncodersRecipe(Strict):
    """Teachers as further vision encoders of the model itself: the multi-encoder baselines (OLA-VLM, sec. 5.2)."""

    mode: Literal["feature", "token"]
    """`feature`: concatenated with the tower's features by channel; `token`: separate tokens after the image."""
    teachers: dict[TaskName, TeacherRecipe] = Field(min_length=1)
    """Teachers that the model reads."""
    tokens: int = Field(default=8, ge=1)
    """Tokens per teacher, in mode `token`."""


class PatchAlignmentRecipe(Strict):
    """Patch-aligned training pulls image tokens of an object towards the input embedding of the word for it."""

    annotations: str
    """`coco:DIR`: masks from `DIR/annotations/{panoptic,instances}_SPLIT.json`, SPLIT being the folder of an image."""
    weight: float = Field(default=0.5, gt=0)
    """Weight of the loss relative to next-token prediction."""
    loss: Literal["cosine", "contrastive"] = "cosine"
    """`cosine` pulls tokens towards their word; `contrastive` also pushes them from the image's other words."""
    coverage: float = Field(default=0.5, gt=0, le=1)
    """Share of a patch that a class must cover to be its label."""
    temperature: float = Field(default=0.07, gt=0)
    """Temperature of `contrastive` (InfoNCE, arXiv:1807.03748; the value of arXiv:1805.01978)."""

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
    """Embedding losses; by default the stage learns by next-token prediction alone (Table 4)."""
    encoders: EncodersRecipe | None = None
    """Makes the checkpoint a multi-encoder one; later stages detect it."""
    patches: PatchAlignmentRecipe | None = None
    """Pulls image tokens towards the words for what they show, in addition to the other losses."""
    train_special_tokens: bool | None = None
    """Whether special tokens are trained; by default only in pt (Table 6)."""
    view: Literal["own", "square"] = "own"
    """`own`: each model preprocesses the original image; `square`: the image is squashed to a square first, so that
    student and teachers see the same."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate; by default the stage's: 1e-3 in pt, 2e-5 in vpt and ift."""
    batch_size: int | None = Field(default=None, ge=1)
    """Conversations per optimiser step, over all processes; by default 256 in pt, 128 in vpt and ift."""
    micro_batch: int = Field(default=8, ge=1)
    """Conversations per forward pass and process."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the conversations."""
    max_steps: int | None = Field(default=None, ge=1)
    """Number of optimiser steps, in place of `epochs`."""
    warmup: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps over which the rate rises; then it falls as a cosine to zero."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's weight decay."""
    max_length: int = Field(default=4096, ge=8)
    """Longer conversations are truncated and counted; one that would be truncated inside an image is skipped."""
    seed: Seed = 0
    """Of the order of the conversations."""
    bf16: bool = False
    """Compute in bfloat16 under autocast; weights are trained in float32."""
    gradient_checkpointing: bool = False
    """Trade time for memory."""
    save_steps: int = Field(default=200, ge=1)
    """Optimiser steps between saved training states; only the newest remains."""
    workers: int = Field(default=2, ge=0)
    """Processes that read images."""
    target_cache: str = "off"
    """Where teachers' features are cached: `off`, `auto` (the user's cache folder, if there is room), or a folder."""
    target_cache_dtype: Literal["float32", "float16"] = "float32"
    """Of cached features; float16 takes half the disk and rounds features to 11 bits."""
    trainer: dict[str, Any] = Field(default_factory=dict)
    """Further fields of transformers' TrainingArguments: report_to, fsdp, deepspeed, logging_steps, …"""

    @model_validator(mode="after")
    def _embedding_or_encoders(self) -> Self:
        if self.embedding is not None and self.encoders is not None:
            raise ValueError("embedding and encoders exclude each other: a model that sees a teacher learns nothing")
        return self

    @property
    def trains_special_tokens(self) -> bool:
        """Whether special tokens are trained, with the stage's default."""
        return self.stage == "pt" if self.train_special_tokens is None else self.train_special_tokens

    @property
    def peak_lr(self) -> float:
        """The learning rate, with the stage's default."""
        return self.lr if self.lr is not None else STAGE_DEFAULTS[self.stage]["lr"]

    @property
    def global_batch(self) -> int:
        """The batch size, with the stage's default."""
        return self.batch_size if self.batch_size is not None else int(STAGE_DEFAULTS[self.stage]["batch_size"])

    def micro_batches(self, processes: int) -> tuple[int, int]:
        """Returns the size of a micro-batch, and how many each process runs in one optimiser step.

        Raises:
            UserError: the processes cannot share the batch evenly.
        """
        micro = min(self.micro_batch, self.global_batch)
        if self.global_batch % (micro * processes):
            raise UserError(
                f"batch_size {self.global_batch} is not a multiple of micro_batch {micro} times {processes} processes; "
                "change one of them"
            )
        return micro, self.global_batch // (micro * processes)

    def steps(self, conversations: int) -> int:
        """Returns the number of optimiser steps."""
        return self.max_steps or math.ceil(self.epochs * math.ceil(conversations / self.global_batch))
