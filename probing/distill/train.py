"""A training stage of a LLaVA checkpoint, on transformers' Trainer."""

import contextlib
import copy
import dataclasses
import difflib
import functools
import json
import logging
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

import probing.compat  # noqa: F401  # isort: skip
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.modeling_layers import GradientCheckpointingLayer

from probing.data.conversations import (
    NOTES,
    ConversationDataset,
    Encoder,
    collate,
    read_conversations,
    require_some_image,
)
from probing.distill.recipe import DistillRecipe
from probing.errors import UserError
from probing.hub import first_line, identity, load_config, locate
from probing.progress import Progress
from probing.provenance import versions
from probing.recipe import dump_recipe, validate
from probing.run import Interruption, disk_errors, whole_folder, write_text

logger = logging.getLogger(__name__)

TRAINED_PARTS = {"pt": ("multi_modal_projector",), "ift": ("multi_modal_projector", "language_model", "lm_head")}
OWN_ARGUMENTS = {
    "output_dir": "--out",
    "per_device_train_batch_size": "micro_batch",
    "gradient_accumulation_steps": "batch_size",
    "num_train_epochs": "epochs",
    "max_steps": "max_steps",
    "learning_rate": "lr",
    "warmup_steps": "warmup",
    "weight_decay": "weight_decay",
    "seed": "seed",
    "data_seed": "seed",
    "bf16": "bf16",
    "gradient_checkpointing": "gradient_checkpointing",
    "save_steps": "save_steps",
    "dataloader_num_workers": "workers",
}
"""Arguments of the Trainer that the recipe sets itself, and where."""
REFUSED = "the Trainer refuses the recipe"
FIXED_ARGUMENTS = ("remove_unused_columns", "label_names", "average_tokens_across_devices", "save_only_model")


class Notes:
    """What batches told about their samples, on disk: it outlives an interruption, and every process writes its own."""

    def __init__(self, folder: Path, process: int) -> None:
        self.file = folder / f"notes-{process}.jsonl"
        self.written: set[tuple[str, str]] = set()

    def add(self, kind: str, names: list[str]) -> None:
        """Writes down the names that are new."""
        new = {(kind, name) for name in names} - self.written
        if new:
            self.written |= new
            with self.file.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(note) + "\n" for note in sorted(new))

    @staticmethod
    def read(folder: Path) -> dict[str, list[str]]:
        """All names of all processes, sorted, by kind."""
        found: dict[str, set[str]] = {kind: set() for kind in NOTES}
        for file in folder.glob("notes-*.jsonl"):
            for line in file.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):  # the last line of a process that was killed
                    kind, name = json.loads(line)
                    found[kind].add(name)
        return {kind: sorted(names) for kind, names in found.items()}


class Trainee(nn.Module):
    """A LLaVA inside a plain module.

    The model is composed, not subclassed, and the Trainer sees no PreTrainedModel: it would save such a one under
    legacy tensor names and, on resuming, silently fail to load them.
    """

    def __init__(self, model: Any, stage: str, notes: Notes | None = None) -> None:
        super().__init__()
        self.model = model
        self.parts = TRAINED_PARTS[stage]
        self.notes = notes
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in name for part in self.parts))
        once = {name for name, _ in self.named_parameters()}
        # The Trainer asks for this name, and ties weights again where exactly these are missing from a saved state.
        self._keys_to_ignore_on_save = [n for n, _ in self.named_parameters(remove_duplicate=False) if n not in once]

    def tie_weights(self) -> None:
        """For the Trainer, after it has loaded a saved state."""
        self.model.tie_weights()

    def train(self, mode: bool = True) -> "Trainee":
        """Frozen parts stay in eval mode: no dropout in what is not trained."""
        super().train(mode)
        for part in (self.model.model.vision_tower, self.model.model.language_model, self.model.lm_head):
            if any(parameter.requires_grad for parameter in part.parameters()):
                continue
            part.eval()
            for layer in part.modules():
                if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
                    layer.training = mode  # it checkpoints in training mode only; what is inside it stays in eval mode
        return self

    def losses(self, labels: Tensor, items: Tensor | None, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The stage's named losses; their sum is minimised."""
        items = None if items is None else items.clamp(min=1)  # a batch may have nothing to learn from
        output = self.model(**inputs, labels=labels, num_items_in_batch=items, use_cache=False)
        return {"next_token": output.loss}

    def forward(
        self,
        labels: Tensor,
        skipped: list[str] | None = None,
        cut: list[str] | None = None,
        num_items_in_batch: Tensor | None = None,
        **inputs: Any,
    ) -> dict[str, Tensor]:
        """One micro-batch; the loss is averaged over the supervised tokens of the whole batch.

        Args:
            labels: (B, T), ignored positions -100.
            skipped: samples of this micro-batch that were left out.
            cut: samples of this micro-batch that were too long.
            num_items_in_batch: supervised tokens of the whole accumulated batch, from the Trainer.
            **inputs: the model's own.
        """
        if self.notes is not None:
            self.notes.add("skipped", skipped or [])
            self.notes.add("cut", cut or [])
        loss = torch.stack(list(self.losses(labels, num_items_in_batch, inputs).values())).sum()
        if "pixel_values" not in inputs:
            # The projector takes part in every backward pass: without it a stage that trains nothing else has no
            # gradient at all, and several processes would wait for each other's.
            projector = self.model.model.multi_modal_projector
            nothing = loss.new_zeros((1, 1, projector.linear_1.in_features), dtype=projector.linear_1.weight.dtype)
            loss = loss + 0.0 * projector(nothing).sum()
        return {"loss": loss}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Tied weights are listed once; safetensors refuses to write them twice."""
        state = super().state_dict(*args, **kwargs)
        for name in self._keys_to_ignore_on_save:
            state.pop(kwargs.get("prefix", "") + name, None)
        return state


class _Watch(TrainerCallback):
    """Saves and stops after the step in which the user asks for it; logs the last step whatever its number.

    Raises:
        UserError: every loss so far is exactly zero: no conversation had anything to learn from.
    """

    def __init__(self, interruption: Interruption) -> None:
        self.interruption = interruption
        self.stopped = False
        self.learned = False

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        asked = torch.tensor(int(self.interruption.asked), device=args.device)
        if args.world_size > 1:  # a signal may reach the processes in different steps
            torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        if state.global_step >= state.max_steps:
            control.should_log = True
        elif asked:
            self.stopped = control.should_save = control.should_training_stop = True

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        loss = (logs or {}).get("loss")
        self.learned = self.learned or bool(loss)
        if loss is not None and not self.learned and state.global_step >= min(10, state.max_steps):
            raise UserError(
                f"nothing to learn from up to step {state.global_step}: every conversation is left out or cut before "
                "its first answer ends; look at the data, or raise max_length"
            )


class _Bar(TrainerCallback):
    """The program's own progress in place of the Trainer's, which prints every log where there is no terminal."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.progress: Progress | None = None
        self.note = ""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.progress = Progress(self.what, state.max_steps, state.global_step, show=state.is_world_process_zero)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self.progress is not None
        self.progress.advance(self.note)

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if logs and "loss" in logs:
            self.note = f"loss {float(logs['loss']):.4f}"

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self.progress is not None
        self.progress.close()


def run_stage(recipe: DistillRecipe, out: Path) -> Path:
    """Runs one stage and writes an ordinary LLaVA folder.

    An interrupted stage goes on from its last saved state when it is called again with the same recipe. That state lies
    beside `out`, in a folder that is named as it and ends in `.training`, and is removed at the end.

    Args:
        recipe: the stage.
        out: folder of the new checkpoint; beside weights and processor it gets `training.json`.

    Returns:
        `out`.

    Raises:
        UserError: checkpoint, data or recipe cannot be used, or `out` holds something else.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the state is saved.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer

    work = out.parent / f"{out.name}.training"
    if _is_finished(recipe, out):
        logger.warning("%s is finished already", out)
        return out
    if _last_state(work):
        _require_same(recipe, work / "recipe.yaml")
    conversations = read_conversations(Path(recipe.data.conversations), recipe.data.limit)
    require_some_image(conversations, Path(recipe.data.image_root))
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
        # The LLM alone: asked of the whole model, transformers makes the frozen tower's inputs require gradients too,
        # and the backward pass goes through it for nothing.
        llm = model.model.language_model
        enable = getattr(llm, "activation_checkpointing_enable", None) or llm.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    with disk_errors(work), arguments.main_process_first():
        if arguments.process_index == 0:
            if not _last_state(work):  # what never reached a saved state tells nothing
                shutil.rmtree(work, ignore_errors=True)
            write_text(work / "recipe.yaml", dump_recipe(recipe))
    with Interruption().watch() as interruption, disk_errors(work):
        watch = _Watch(interruption)
        try:
            trainer = Trainer(
                model=Trainee(model, recipe.stage, Notes(work, arguments.process_index)),
                args=arguments,
                train_dataset=ConversationDataset(conversations, Path(recipe.data.image_root), encoder),
                data_collator=functools.partial(collate, pad_id=processor.tokenizer.pad_token_id),
                callbacks=[watch, _Bar(f"stage {recipe.stage}")],
            )
            trainer.remove_callback(PrinterCallback)
        except ValueError as error:
            raise UserError(f"{REFUSED}: {first_line(error)}; see its section `trainer`") from None
        result = trainer.train(resume_from_checkpoint=_last_state(work))
    if watch.stopped:
        raise KeyboardInterrupt
    # Gathered by all processes where weights are sharded over them.
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        notes = Notes.read(work)
        if notes["skipped"]:
            logger.warning("%d images could not be used, first: %s", len(notes["skipped"]), notes["skipped"][0])
        if notes["cut"]:
            logger.warning("%d conversations are longer than max_length and were cut", len(notes["cut"]))
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        record = {
            "recipe": dump_recipe(recipe),
            "started_from": identity(source, getattr(config, "_commit_hash", None)),
            "stage": recipe.stage,
            "steps": result.global_step,
            "final_loss": losses[-1],
            "log": trainer.state.log_history,
            "conversations": len(conversations),
            **notes,
            "versions": versions(),
        }
        with disk_errors(out), whole_folder(out) as folder:
            weights = {name.removeprefix("model."): tensor for name, tensor in state.items()}
            model.save_pretrained(folder, state_dict=weights)
            processor.save_pretrained(folder)
            if (work / "runs").exists():  # TensorBoard's curves
                shutil.copytree(work / "runs", folder / "runs")
            (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(work, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return out


def _require_same(recipe: DistillRecipe, saved: Path, text: str | None = None) -> None:
    """Compares with a saved recipe, where there is one.

    Raises:
        UserError: they differ in a field that moves a number.
    """
    if text is None:
        if not saved.exists():
            return
        text = saved.read_text(encoding="utf-8")
    difference = recipe.difference(validate(DistillRecipe, yaml.safe_load(text), str(saved)))
    if difference:
        raise UserError(f"{saved.parent} holds another recipe ({difference}); choose another --out, or remove it")


def _is_finished(recipe: DistillRecipe, out: Path) -> bool:
    """Whether `out` holds this stage already; raises UserError where it holds anything else."""
    record = out / "training.json"
    if record.exists():
        try:
            text = json.loads(record.read_text(encoding="utf-8"))["recipe"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{record} is not written by probing distill; choose another --out") from None
        _require_same(recipe, record, text)
        return True
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty and holds no checkpoint of this recipe; choose another --out")
    return False


def _last_state(work: Path) -> str | None:
    """The newest saved state that is whole: the Trainer writes its own state file last."""
    for folder in sorted(work.glob("checkpoint-*"), key=lambda p: int(p.name.rsplit("-", 1)[1]), reverse=True):
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
            return str(folder)
        except (OSError, ValueError):
            continue
    return None


def _training_arguments(recipe: DistillRecipe, work: Path, conversations: int) -> Any:
    from transformers import TrainingArguments
    from transformers.integrations import get_available_reporting_integrations

    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    for name in recipe.trainer:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "see transformers.TrainingArguments"
            raise UserError(f"unknown field 'trainer.{name}'; {hint}")
        if name in OWN_ARGUMENTS:
            raise UserError(f"'trainer.{name}' is the recipe's own; set {OWN_ARGUMENTS[name]} instead")
        if name in FIXED_ARGUMENTS:
            raise UserError(f"'trainer.{name}' cannot be changed; leave it out")
    # From the launcher, not from accelerate's state: that would be set up here, before the Trainer's own device choice.
    processes = int(os.environ.get("WORLD_SIZE", "1"))
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
        "disable_tqdm": True,
        "label_names": ["labels"],
        "average_tokens_across_devices": True,
        "ddp_find_unused_parameters": False,
    }
    try:
        arguments = TrainingArguments(**(values | copy.deepcopy(recipe.trainer)))  # it fills in fsdp_config in place
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"{REFUSED}: {first_line(error)}; see its section `trainer`") from None
    if arguments.world_size != processes:
        raise UserError(
            f"{processes} processes were started, and the Trainer takes part in {arguments.world_size}; on a machine "
            "without accelerator set trainer.use_cpu=true"
        )
    missing = [name for name in arguments.report_to or [] if name not in get_available_reporting_integrations()]
    if missing:
        raise UserError(f"trainer.report_to names {missing[0]!r}, which is not installed; install it or write none")
    # One process, one device: the Trainer would otherwise split a single process's batches over every GPU it sees, and
    # so multiply the batch size. Several GPUs are for `accelerate launch`.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
