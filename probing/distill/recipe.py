"""Recipes of the training stages."""

from typing import Any, Literal

from pydantic import Field

from probing.recipe import Strict

SPEED_ONLY = ("workers", "save_steps")
"""Fields that a stage may change when it goes on: they do not move a number."""

STAGE_DEFAULTS: dict[str, dict[str, float]] = {
    "pt": {"lr": 1e-3, "batch_size": 256},
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


class DistillRecipe(Strict):
    """One stage of training."""

    checkpoint: str
    """Folder or Hub id of the LLaVA to start from."""
    revision: str | None = None
    """Hub revision."""
    stage: Literal["pt", "ift"]
    """pt trains the projector; ift trains LLM and projector. The vision tower is always frozen."""
    data: ConversationData
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate; by default the stage's: 1e-3 in pt, 2e-5 in ift."""
    batch_size: int | None = Field(default=None, ge=1)
    """Conversations per optimiser step, over all processes; by default 256 in pt, 128 in ift."""
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
    trainer: dict[str, Any] = Field(default_factory=dict)
    """Further fields of transformers' TrainingArguments: report_to, fsdp, deepspeed, logging_steps, … Not those that
    the recipe has a field for."""

    def difference(self, other: "DistillRecipe") -> str:
        """The first field that moves a number and differs in another recipe, or an empty string."""
        for name in type(self).model_fields:
            mine, others = getattr(self, name), getattr(other, name)
            if mine != others and name not in SPEED_ONLY:
                return f"{name} is {others} there and {mine} here"
        return ""

    @property
    def peak_lr(self) -> float:
        """The learning rate, default filled in."""
        return self.lr if self.lr is not None else STAGE_DEFAULTS[self.stage]["lr"]

    @property
    def global_batch(self) -> int:
        """The batch size, default filled in."""
        return self.batch_size if self.batch_size is not None else int(STAGE_DEFAULTS[self.stage]["batch_size"])
