"""Trains a stage of a LLaVA checkpoint with transformers' Trainer."""

import copy
import dataclasses
import difflib
import errno
import glob
import hashlib
import json
import logging
import math
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

import probing.utils.torchvision_shim  # noqa: F401  # isort: skip
from accelerate.utils import broadcast_object_list
from transformers import PrinterCallback, Trainer

from probing.data.coco import ImageList
from probing.data.conversations import CachedTargets
from probing.data.target_cache import CacheOptions, build_target_caches
from probing.distillation.callbacks import AllStepsTaken, StageCallback
from probing.distillation.data_log import DataLog
from probing.distillation.predictors import FOLDER
from probing.distillation.recipe import SPEED_ONLY, DistillRecipe
from probing.distillation.saving import save_stage
from probing.distillation.setup import Stage, build_stage, load_inputs
from probing.models import Identity
from probing.models.chat_templates import rendering_at
from probing.models.image_tokens import tower_grid
from probing.models.llava import LlavaInputs
from probing.recipe import dump_recipe, validate
from probing.runs.recorded_inputs import describe_inputs, recorded_moment, require_same, to_record, vocabulary
from probing.runs.resume import first_difference
from probing.utils.distributed import has_gpu
from probing.utils.errors import UserError, first_line
from probing.utils.files import disk_errors, read_json, remove_temporary_files, write_text
from probing.utils.interrupt import Interrupted, Interruption
from probing.utils.paths import is_file, local_path
from probing.utils.pretrained import identity
from probing.utils.weights_hash import file_hash

logger = logging.getLogger(__name__)

INPUTS = "inputs.json"
"""Description of a stage's inputs, in the folder of its states."""

RECIPE_FIELDS = {
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
"""Arguments of the Trainer that fields of the recipe set."""
FIXED = ("remove_unused_columns", "label_names", "average_tokens_across_devices", "save_only_model")


class LossLog:
    """Named losses of the current step and since the last log line; a process's share of each."""

    def __init__(self) -> None:
        self.step: list[tuple[list[str], dict[str, torch.Tensor]]] = []
        self.sums: dict[str, torch.Tensor] = {}
        self.steps = 0

    def add(self, samples: list[str], losses: dict[str, torch.Tensor]) -> None:
        """Adds the losses of a micro-batch."""
        self.step.append((samples, losses))

    def not_finite(self, gradient_norm: float) -> str:
        """Names the loss or gradient of the step that is not finite and its samples; empty if all are finite."""
        if self.step:
            finite = torch.stack([torch.stack(list(losses.values())) for _, losses in self.step]).isfinite().tolist()
            for column, name in enumerate(self.step[0][1]):
                bad = [n for (names, _), row in zip(self.step, finite, strict=True) if not row[column] for n in names]
                if not all(row[column] for row in finite):
                    return f"the loss {name} of {_shorten(bad)}"
        if not math.isfinite(gradient_norm):
            return f"the gradient of {_shorten([name for names, _ in self.step for name in names])}"
        return ""

    def end_step(self) -> None:
        """Adds the losses of the step to the sums."""
        for _, losses in self.step:
            for name, value in losses.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
        self.step, self.steps = [], self.steps + 1

    def take_means(self) -> dict[str, torch.Tensor]:
        """Returns the mean of every loss over the steps since the last call."""
        means = {name: value / max(self.steps, 1) for name, value in self.sums.items()}
        self.sums, self.steps = {}, 0
        return means


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


class StageTrainer(Trainer):
    """Trainer that prepares auxiliary losses once per optimiser step, logs every loss, and stops at non-finite ones."""

    def __init__(self, stage: Stage, data_log: DataLog, **kwargs: Any) -> None:
        super().__init__(model=stage.model, data_collator=stage.collate, **kwargs)
        self.auxiliary, self.data_log, self.losses = stage.model.auxiliary, data_log, LossLog()

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[Any, Any]:
        """Returns the micro-batches of one step, prepared for the auxiliary losses."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            self.data_log.take(batch)
        for auxiliary in self.auxiliary:
            auxiliary.prepare(batches, device, self.args.world_size)
        return batches, items

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Computes the loss of a micro-batch and logs its parts."""
        names = inputs.pop("names")
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.losses.add(names, outputs["losses"])
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Checks losses and gradient before the step (DeepSpeed has just taken it); the last saved state stays.

        Raises:
            UserError: naming what is not finite, its samples and the step.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if bad := self.losses.not_finite(float(norm)):
            raise UserError(
                f"{bad} is not finite at step {self.state.global_step + 1}; lower lr, or remove these samples"
            )
        self.losses.end_step()
        return norm

    def _save_checkpoint(self, model: Any, *args: Any) -> None:
        """Saves a state; a full disk is an OSError, in place of torch's error about its archive."""
        try:
            super()._save_checkpoint(model, *args)
        except RuntimeError as error:
            if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
                raise
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.args.output_dir) from error

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of every named loss since the last log."""
        if "loss" in logs:
            means = self.losses.take_means()
            sums = self.accelerator.reduce(torch.stack([value.to(self.args.device) for value in means.values()]), "sum")
            logs |= {f"loss/{name}": round(value, 6) for name, value in zip(means, sums.tolist(), strict=True)}
        super().log(logs, start_time)


def run_stage(recipe: DistillRecipe, out: Path) -> Path:
    """Runs one stage and writes a LLaVA folder.

    An interrupted stage resumes from its last saved state, in a folder next to `out` whose name ends in `.training`,
    if it is called again with the same recipe. That folder is removed at the end.

    Args:
        recipe: the stage.
        out: folder of the new checkpoint, with weights, processor and `training.json`.

    Raises:
        UserError: checkpoint, data or recipe cannot be used, or `out` holds something else.
        Interrupted: Ctrl-C or SIGTERM; the state is saved.
    """
    work = work_folder(out)
    with disk_errors(out):
        if is_finished(recipe, out):
            logger.warning("%s is finished already", out)
            if int(os.environ.get("RANK", "0")) == 0:  # it may have been killed before it removed the states
                shutil.rmtree(work, ignore_errors=True)
            return out
    recorded = None
    if last_state(work):
        require_same_recipe(recipe, work / "recipe.yaml")
        recorded = read_json(work / INPUTS, f"remove {work} to train from the start")
    inputs = load_inputs(recipe)
    arguments = training_arguments(recipe, work, len(inputs.conversations))
    moment = [recorded_moment(recorded)]
    broadcast_object_list(moment)
    with rendering_at(moment[0]):
        stage = build_stage(recipe, inputs, arguments.device)
        description = _describe(stage)
        record = to_record(description)
    if recorded is not None:
        require_same(recorded, description, out, f"restore it, or remove {work} to train from the start")
    with disk_errors(work), arguments.main_process_first():
        if arguments.process_index == 0:
            remove_temporary_files(out.parent.glob(f".{glob.escape(out.name)}.*.tmp"))
            if recorded is None:
                shutil.rmtree(work, ignore_errors=True)
            write_text(work / "recipe.yaml", dump_recipe(recipe))
            write_text(work / INPUTS, json.dumps(record))
    with disk_errors(work):
        trainer = train(stage, arguments, work)
    with disk_errors(out):
        save_stage(stage, trainer, out, record["rendered_at"])
    return out


def train(stage: Stage, arguments: Any, work: Path) -> StageTrainer:
    """Trains a stage to its last step, from its last saved state if there is one.

    Raises:
        UserError: the Trainer refuses the recipe, a saved state is unsafe, or training cannot resume.
        Interrupted: Ctrl-C or SIGTERM; the state is saved.
    """
    interruption = Interruption()
    callback = StageCallback(interruption, f"stage {stage.recipe.stage}")
    dataset, log = stage.dataset(_cached_targets(stage, arguments)), DataLog(work, arguments.process_index)
    try:
        trainer = StageTrainer(stage, log, args=arguments, train_dataset=dataset, callbacks=[callback])
    except ValueError as error:
        raise _refused(error) from None
    trainer.remove_callback(PrinterCallback)
    saved = last_state(work)
    with interruption.watch():
        try:
            trainer.train(resume_from_checkpoint=saved)
        except AllStepsTaken:
            logger.info("all steps were taken already")
        except pickle.UnpicklingError:
            raise UserError(
                f"the state {saved} is a pickle that may run code; remove {work} to train from the start"
            ) from None
        if callback.stopped:
            trainer.accelerator.wait_for_everyone()  # a launcher stops the others as soon as one has ended
            raise Interrupted
    return trainer


def _refused(error: Exception) -> UserError:
    return UserError(f"the Trainer refuses the recipe: {first_line(error)}; change its section `trainer`")


def _describe(stage: Stage) -> dict[str, Any]:
    """Describes what the numbers of a stage depend on, see `probing.runs.recorded_inputs`."""
    inputs, text = stage.inputs, stage.encoder.sample_text()
    prepare = LlavaInputs(stage.processor, text, inputs.config.image_token_id, tower_grid(inputs.config))
    weights = identity(inputs.source, inputs.config, revision=stage.recipe.revision)
    checkpoint = Identity("", inputs.source, "", weights, 0, 0, text, prepare)
    conversations = hashlib.sha256()
    for conversation in inputs.conversations:
        conversations.update(repr(conversation).encode(errors="surrogatepass"))
    predictors = sorted((Path(inputs.source) / FOLDER).glob("**/*.safetensors")) if stage.recipe.embedding else []
    data = {
        "conversations": conversations.hexdigest(),
        "embedding predictors": [file_hash(file) for file in predictors],
    }
    return describe_inputs(checkpoint, stage.teachers, stage.recipe.view, data) | vocabulary(checkpoint)


def _cached_targets(stage: Stage, arguments: Any) -> CachedTargets | None:
    """Returns the teachers' features of all images on disk, if the recipe requests it and there is room."""
    recipe, annotations = stage.recipe, stage.inputs.annotations
    if recipe.target_cache == "off":
        return None
    root = local_path(recipe.data.image_root)
    names = [name for name in stage.inputs.images if is_file(root / name)]
    turned = annotations.turned if annotations else frozenset()
    images = ImageList(root, "conversations", names, turned=turned)
    options = CacheOptions(
        recipe.target_cache, recipe.target_cache_dtype, recipe.view, recipe.micro_batch, recipe.workers
    )
    caches = build_target_caches(stage.teachers, images, options, arguments.process_index, arguments.world_size)
    return CachedTargets({name: row for row, name in enumerate(images.names)}, caches) if caches else None


def work_folder(out: Path) -> Path:
    """Returns where a stage saves its states until it is finished."""
    return out.parent / f"{out.name}.training"


def require_same_recipe(recipe: DistillRecipe, file: Path) -> None:
    """Raises UserError if a recipe, in a YAML or `training.json`, differs in a field that affects results."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".json":
        try:
            text = json.loads(text)["recipe"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{file} was not written by probing distill; choose another --out") from None
    saved = validate(DistillRecipe, yaml.safe_load(text), str(file))
    if difference := first_difference(saved.model_dump(), recipe.model_dump(), SPEED_ONLY):
        raise UserError(f"{file.parent} holds another recipe ({difference}); choose another --out, or remove it")


def is_finished(recipe: DistillRecipe, out: Path) -> bool:
    """Returns whether `out` holds this stage already; raises UserError if it holds anything else."""
    record = out / "training.json"
    if record.exists():
        require_same_recipe(recipe, record)
        return True
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty and holds no checkpoint of this recipe; choose another --out")
    return False


def last_state(work: Path) -> str | None:
    """Returns the newest complete state; the Trainer writes its own state file last."""
    for folder in sorted(work.glob("checkpoint-*"), key=lambda p: int(p.name.rsplit("-", 1)[1]), reverse=True):
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
            return str(folder)
        except (OSError, ValueError):
            continue
    return None


def training_arguments(recipe: DistillRecipe, work: Path, conversations: int) -> Any:
    """Makes the Trainer's arguments of a recipe; raises UserError if its section `trainer` cannot be used."""
    from transformers import TrainingArguments
    from transformers.integrations import get_available_reporting_integrations

    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    for name in recipe.trainer:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "see transformers.TrainingArguments"
            raise UserError(f"unknown field 'trainer.{name}'; {hint}")
        if name in RECIPE_FIELDS:
            raise UserError(f"'trainer.{name}' is a field of the recipe; set {RECIPE_FIELDS[name]} instead")
        if name in FIXED:
            raise UserError(f"'trainer.{name}' cannot be changed; remove it")
    # From the launcher: accelerate's state would be set up here, before the Trainer chooses its device.
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    micro, accumulated = recipe.micro_batches(processes)
    values: dict[str, Any] = {
        "output_dir": str(work),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulated,
        "num_train_epochs": recipe.epochs,
        "max_steps": recipe.max_steps or -1,
        "learning_rate": recipe.peak_lr,
        "lr_scheduler_type": "cosine",
        "warmup_steps": math.ceil(recipe.warmup * recipe.steps(conversations)),
        "weight_decay": recipe.weight_decay,
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "bf16": recipe.bf16,
        "use_cpu": not has_gpu(),  # without, it refuses bf16 on a CPU
        "save_steps": recipe.save_steps,
        "save_total_limit": 1,
        "logging_steps": 10,
        "logging_nan_inf_filter": False,  # it would wait for the device at every micro-batch
        "dataloader_num_workers": recipe.workers,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "remove_unused_columns": False,
        "report_to": "tensorboard",
        "disable_tqdm": True,
        "label_names": ["labels"],
        "average_tokens_across_devices": True,
        "ddp_find_unused_parameters": False,  # `DistillationModel` freezes what has no gradient
    }
    try:
        arguments = TrainingArguments(**(values | copy.deepcopy(recipe.trainer)))  # it fills in fsdp_config in place
    except (ValueError, TypeError, ImportError) as error:
        raise _refused(error) from None
    if arguments.world_size != processes:
        raise UserError(
            f"{processes} processes were started, and the Trainer joins {arguments.world_size}; without accelerator "
            "set trainer.use_cpu=true"
        )
    missing = [name for name in arguments.report_to or [] if name not in get_available_reporting_integrations()]
    if missing:
        raise UserError(f"trainer.report_to names {missing[0]!r}, which is not installed; install it or write none")
    # Stage 2 loses accumulated gradients (huggingface/accelerate#3877), and stage 3 would shard the teachers too.
    if arguments.deepspeed_plugin and (zero := arguments.deepspeed_plugin.zero_stage) != 1:
        raise UserError(f"ZeRO stage {zero} is not supported; set zero_optimization.stage to 1, or use FSDP")
    # One device per process: the Trainer would otherwise split the batches of a single process over all GPUs, and so
    # multiply the batch size. `accelerate launch` starts a process per GPU.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
