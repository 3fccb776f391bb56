"""A training stage of a LLaVA checkpoint, on transformers' Trainer."""

import dataclasses
import difflib
import functools
import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import probing.compat  # noqa: F401
from probing.data.conversations import ConversationDataset, Encoder, collate, read_conversations
from probing.distill.recipe import DistillRecipe
from probing.errors import UserError
from probing.hub import first_line, identity, load_config, locate
from probing.provenance import versions
from probing.recipe import dump_recipe
from probing.run import disk_errors, whole_folder

logger = logging.getLogger(__name__)

TRAINED_PARTS = {"pt": ("multi_modal_projector",), "ift": ("multi_modal_projector", "language_model", "lm_head")}


class Trainee(nn.Module):
    """A LLaVA inside a plain module.

    The model is composed, not subclassed, and the Trainer sees no PreTrainedModel: it would save such a one under
    legacy tensor names and, on resuming, silently fail to load them.
    """

    def __init__(self, model: Any, stage: str) -> None:
        super().__init__()
        self.model = model
        self.parts = TRAINED_PARTS[stage]
        self.skipped: set[str] = set()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in name for part in self.parts))

    def train(self, mode: bool = True) -> "Trainee":
        """Frozen parts stay in eval mode: no dropout in a tower that is not trained."""
        super().train(mode)
        self.model.model.vision_tower.eval()
        return self

    def losses(self, labels: Tensor, items: Tensor | None, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The stage's named losses; their sum is minimised."""
        output = self.model(**inputs, labels=labels, num_items_in_batch=items, use_cache=False)
        return {"next_token": output.loss}

    def forward(
        self, labels: Tensor, skipped: list[str] | None = None, num_items_in_batch: Tensor | None = None, **inputs: Any
    ) -> dict[str, Tensor]:
        """One micro-batch; the loss is averaged over the supervised tokens of the whole batch.

        Args:
            labels: (B, T), ignored positions -100.
            skipped: samples of this micro-batch that could not be read.
            num_items_in_batch: supervised tokens of the whole accumulated batch, from the Trainer.
            **inputs: the model's own.
        """
        self.skipped.update(skipped or [])
        return {"loss": torch.stack(list(self.losses(labels, num_items_in_batch, inputs).values())).sum()}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Tied weights are listed once; safetensors refuses to write them twice."""
        state = super().state_dict(*args, **kwargs)
        seen: set[int] = set()
        for name in list(state):
            pointer = state[name].data_ptr() if isinstance(state[name], Tensor) and state[name].numel() else None
            if pointer is not None and pointer in seen:
                del state[name]
            elif pointer is not None:
                seen.add(pointer)
        return state


def run_stage(recipe: DistillRecipe, out: Path) -> Path:
    """Runs one stage and writes an ordinary LLaVA folder.

    An interrupted stage goes on from its last saved state when it is called again with the same recipe.

    Args:
        recipe: the stage.
        out: folder of the new checkpoint; beside weights and processor it gets `training.json`.

    Returns:
        `out`.

    Raises:
        UserError: checkpoint, data or recipe cannot be used, or `out` holds something else.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer

    text = dump_recipe(recipe)
    if (out / "training.json").exists():
        if json.loads((out / "training.json").read_text(encoding="utf-8"))["recipe"] != text:
            raise UserError(f"{out} holds a checkpoint of another recipe; choose another --out")
        logger.info("%s is finished already", out)
        return out
    work = out.parent / f"{out.name}.training"
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty and holds no checkpoint of this recipe; choose another --out")
    if (work / "recipe.yaml").exists() and (work / "recipe.yaml").read_text(encoding="utf-8") != text:
        raise UserError(f"{work} holds the unfinished training of another recipe; remove it or choose another --out")
    conversations = read_conversations(Path(recipe.data.conversations), recipe.data.limit)
    if not Path(recipe.data.image_root).is_dir():
        raise UserError(f"no such image folder: {recipe.data.image_root}; set data.image_root")
    source = locate(recipe.checkpoint, "checkpoint")
    config = load_config(source, "checkpoint", revision=recipe.revision)
    if config.model_type != "llava":
        raise UserError(f"{recipe.checkpoint} is no LLaVA checkpoint (model type {config.model_type!r})")
    arguments = _training_arguments(recipe, work, len(conversations))
    try:
        processor = AutoProcessor.from_pretrained(source, revision=recipe.revision)
        # Weights are trained in float32, whatever they are stored in; bf16 is autocast.
        model = AutoModelForImageTextToText.from_pretrained(source, revision=recipe.revision, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {recipe.checkpoint} cannot be loaded: {first_line(error)}") from None
    encoder = Encoder(processor, config.image_token_id, recipe.max_length)
    if processor.tokenizer.pad_token_id is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    trainee = Trainee(model, recipe.stage)
    trainer = Trainer(
        model=trainee,
        args=arguments,
        train_dataset=ConversationDataset(conversations, Path(recipe.data.image_root), encoder),
        data_collator=functools.partial(collate, pad_id=processor.tokenizer.pad_token_id),
    )
    with disk_errors(work):
        work.mkdir(parents=True, exist_ok=True)
        (work / "recipe.yaml").write_text(text, encoding="utf-8")
        result = trainer.train(resume_from_checkpoint=_last_state(work))
    if not trainer.is_world_process_zero():
        return out
    if trainee.skipped:
        logger.warning("%d conversations were skipped, first: %s", len(trainee.skipped), min(trainee.skipped))
    with disk_errors(out), whole_folder(out) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        record = {
            "recipe": text,
            "started_from": identity(source, getattr(config, "_commit_hash", None)),
            "stage": recipe.stage,
            "steps": result.global_step,
            "train_loss": result.training_loss,
            "log": trainer.state.log_history,
            "conversations": len(conversations),
            "skipped": sorted(trainee.skipped),
            "versions": versions(),
        }
        (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(work, ignore_errors=True)
    return out


def _last_state(work: Path) -> str | None:
    """The newest saved state that is whole: the Trainer writes its own state file last."""
    states = [p for p in work.glob("checkpoint-*") if (p / "trainer_state.json").exists()]
    return str(max(states, key=lambda p: int(p.name.rsplit("-", 1)[1]))) if states else None


def _training_arguments(recipe: DistillRecipe, work: Path, conversations: int) -> Any:
    from accelerate import PartialState
    from transformers import TrainingArguments

    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    for name in recipe.trainer:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "see transformers.TrainingArguments"
            raise UserError(f"unknown field 'trainer.{name}'; {hint}")
    processes = PartialState().num_processes
    micro = min(recipe.micro_batch, recipe.global_batch)
    if recipe.global_batch % (micro * processes):
        raise UserError(
            f"batch_size {recipe.global_batch} is not a multiple of micro_batch {micro} times {processes} processes; "
            "change one of them"
        )
    steps = recipe.max_steps or math.ceil(recipe.epochs * math.ceil(conversations / recipe.global_batch))
    values: dict[str, Any] = {
        "output_dir": str(work),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": recipe.global_batch // (micro * processes),
        "num_train_epochs": recipe.epochs,
        "max_steps": recipe.max_steps or -1,
        "learning_rate": recipe.peak_lr,
        "lr_scheduler_type": "cosine",
        "warmup_steps": math.ceil(recipe.warmup * steps),
        "weight_decay": recipe.weight_decay,
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "bf16": recipe.bf16,
        "save_steps": recipe.save_steps,
        "save_total_limit": 1,
        "logging_steps": 10,
        "dataloader_num_workers": recipe.workers,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "remove_unused_columns": False,
        "report_to": "tensorboard",
        "label_names": ["labels"],
    }
    return TrainingArguments(**(values | recipe.trainer))
