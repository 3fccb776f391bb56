"""A training stage of a LLaVA checkpoint, on transformers' Trainer."""

import copy
import dataclasses
import difflib
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
from probing.distillation.callbacks import AllStepsTaken, Bar, Losses, Watch
from probing.distillation.model import Trainee
from probing.distillation.patch_alignment import attach_pairs
from probing.distillation.predictors import FOLDER
from probing.distillation.recipe import DistillRecipe
from probing.distillation.sample_log import Notes
from probing.distillation.setup import Parts, Start, images_of, open_start, put_together
from probing.distillation.teacher_targets import attach_targets
from probing.models import Identity, multi_encoder
from probing.models.chat_templates import rendering_at
from probing.models.image_tokens import tower_grid
from probing.models.llava import LlavaInputs
from probing.recipe import dump_recipe, validate
from probing.runs.compatibility import describe_inputs, recorded_moment, require_same, to_record, vocabulary
from probing.runs.manifest import versions
from probing.teachers import Teacher
from probing.utils.errors import UserError, first_line
from probing.utils.files import disk_errors, read_json, remove_left_overs, whole_folder, write_text
from probing.utils.interrupt import Interrupted, Interruption
from probing.utils.paths import is_file, local_path
from probing.utils.pretrained import identity
from probing.utils.weights_hash import file_hash

logger = logging.getLogger(__name__)

INPUTS = "inputs.json"
"""What a stage began with, in the folder of its states."""

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


class StageTrainer(Trainer):
    """The Trainer, with what losses are taken against in every batch, and every loss in the log."""

    def __init__(self, model: Trainee, teachers: dict[str, Teacher], **kwargs: Any) -> None:
        super().__init__(model=model, **kwargs)
        self.trainee, self.teachers = model, teachers

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[Any, Any]:
        """The micro-batches of one step, with `targets` and `patches`."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.teachers:
            attach_targets(batches, self.teachers, self.args.world_size)
        if self.trainee.patches is not None:
            attach_pairs(batches, self.trainee.patches.least, device, self.args.world_size)
        return batches, items

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Hands the norm of the gradient, which the Trainer computes in every step, to the check before the step."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.trainee.gradient_norm = norm.item() if isinstance(norm, torch.Tensor) else norm
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of every named loss since the last log."""
        if "loss" in logs:
            taken = self.trainee.take_logged()
            values = torch.stack([value.to(self.args.device) for value in taken.values()])
            summed = self.accelerator.reduce(values, "sum").tolist()
            logs |= {f"loss/{name}": round(value, 6) for name, value in zip(taken, summed, strict=True)}
        super().log(logs, start_time)


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
        Interrupted: Ctrl-C or SIGTERM; the state is saved.
    """
    work = out.parent / f"{out.name}.training"
    with disk_errors(out):
        finished = _is_finished(recipe, out)
    if finished:
        logger.warning("%s is finished already", out)
        if int(os.environ.get("RANK", "0")) == 0:  # it may have been killed before it cleared up
            shutil.rmtree(work, ignore_errors=True)
        return out
    recorded = None
    if _last_state(work):
        _require_same(recipe, work / "recipe.yaml")
        file = work / INPUTS
        recorded = read_json(file, f"remove {work} to train from the start") if file.exists() else {}
    start = open_start(recipe)
    arguments = _training_arguments(recipe, work, len(start.conversations))
    moment = [recorded_moment(recorded)]
    broadcast_object_list(moment)
    with rendering_at(moment[0]):
        parts = put_together(recipe, start, arguments.device)
        inputs = _inputs(recipe, start, parts)
        recording = to_record(inputs)
    if recorded is not None:
        require_same(recorded, inputs, out, f"put it back, or remove {work} to train from the start")
    with disk_errors(work), arguments.main_process_first():
        if arguments.process_index == 0:
            remove_left_overs(out.parent.glob(f".{glob.escape(out.name)}.*.tmp"))
            if not _last_state(work):  # what never reached a saved state tells nothing
                shutil.rmtree(work, ignore_errors=True)
            write_text(work / "recipe.yaml", dump_recipe(recipe))
            write_text(work / INPUTS, json.dumps(recording))
    interruption = Interruption()
    with disk_errors(work):
        watch = Watch(interruption)
        trainee = parts.trainee
        trainee.notes = Notes(work, arguments.process_index)
        cached = _cached_targets(recipe, parts.teachers, start, arguments)
        samples = dataclasses.replace(parts.samples, cached_targets=cached)
        try:
            trainer = StageTrainer(
                trainee,
                parts.teachers,
                args=arguments,
                train_dataset=samples,
                data_collator=parts.collate,
                callbacks=[watch, Losses(trainee), Bar(f"stage {recipe.stage}")],
            )
            trainer.remove_callback(PrinterCallback)
        except ValueError as error:
            raise UserError(f"{REFUSED}: {first_line(error)}; see its section `trainer`") from None
        saved = _last_state(work)
        with interruption.watch():
            try:
                trainer.train(resume_from_checkpoint=saved)
            except AllStepsTaken:
                logger.info("all steps were taken already")
            except pickle.UnpicklingError:
                raise UserError(
                    f"the saved state {saved} is a pickle that holds more than tensors, which may run code; remove "
                    f"{work} to train from the start"
                ) from None
            if watch.stopped:
                trainer.accelerator.wait_for_everyone()  # a launcher stops the others as soon as one has ended
                raise Interrupted
    # Gathered by all processes where weights are sharded over them.
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        notes = Notes.read(work)
        if notes["skipped"]:
            logger.warning("%d images could not be used, first: %s", len(notes["skipped"]), notes["skipped"][0])
        if notes["cut"]:
            logger.warning("%d conversations are longer than max_length and were cut", len(notes["cut"]))
        missing, broken = start.annotations.missing if start.annotations else [], notes["unlabelled"]
        if missing:
            logger.warning("%d images have no annotations for patches, first: %s", len(missing), missing[0])
        if broken:
            logger.warning("%d annotations of images could not be used, first: %s", len(broken), broken[0])
        if notes["scaled"]:
            logger.warning(
                "%d label maps were scaled to the size of their images, first: %s",
                len(notes["scaled"]), notes["scaled"][0],
            )  # fmt: skip
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        record = {
            "recipe": dump_recipe(recipe),
            "started_from": identity(start.source, start.config),
            "rendered_at": recording["rendered_at"],
            "stage": recipe.stage,
            "steps": trainer.state.global_step,
            "final_loss": losses[-1],
            "log": trainer.state.log_history,
            "conversations": len(start.conversations),
            **notes,
            "not_annotated": len(missing),
            "versions": versions(),
        }
        with disk_errors(out), whole_folder(out) as folder:
            _save_checkpoint(trainee.model, parts.processor, trainee, state, folder)
            if trainee.encoders is not None:
                _save_encoders(trainee.encoders, parts.config, state, folder)
            if trainee.embedding is not None:
                own = {n.removeprefix("embedding."): t for n, t in state.items() if n.startswith("embedding.")}
                trainee.embedding.load_state_dict(own)
                used = {name: {"id": t.id, "sha256": t.sha256, "shape": t.shape} for name, t in parts.teachers.items()}
                trainee.embedding.cpu().save(folder / FOLDER, {"teachers": used, "versions": versions()})
            if (work / "runs").exists():  # TensorBoard's curves
                shutil.copytree(work / "runs", folder / "runs")
            (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(work, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return out


def _inputs(recipe: DistillRecipe, start: Start, parts: Parts) -> dict[str, Any]:
    """What the numbers of a stage depend on, see `probing.runs.compatibility`."""
    text = parts.encoder.sample_text()
    prepare = LlavaInputs(parts.processor, text, start.config.image_token_id, tower_grid(start.config))
    checkpoint = Identity("", start.source, "", identity(start.source, start.config), 0, 0, text, prepare)
    said = hashlib.sha256()
    for conversation in start.conversations:
        said.update(repr(conversation).encode(errors="surrogatepass"))
    predictors = sorted((Path(start.source) / FOLDER).glob("**/*.safetensors")) if recipe.embedding else []
    data = {"conversations": said.hexdigest(), "embedding predictors": [file_hash(file) for file in predictors]}
    return describe_inputs(checkpoint, parts.teachers, recipe.view, data) | vocabulary(checkpoint)


def _cached_targets(
    recipe: DistillRecipe, teachers: dict[str, Teacher], start: Start, arguments: Any
) -> CachedTargets | None:
    """Builds the target caches that the recipe requests, if there is room."""
    if recipe.target_cache == "off":
        return None
    root = local_path(recipe.data.image_root)
    turned = start.annotations.turned if start.annotations else frozenset()
    names = [name for name in images_of(start.conversations) if is_file(root / name)]
    images = ImageList(root, "conversations", names, turned=turned)
    options = CacheOptions(
        recipe.target_cache, recipe.target_cache_dtype, recipe.view, recipe.micro_batch, recipe.workers
    )
    caches = build_target_caches(teachers, images, options, arguments.process_index, arguments.world_size)
    return CachedTargets({name: row for row, name in enumerate(images.names)}, caches) if caches else None


def _save_checkpoint(model: Any, processor: Any, trainee: Trainee, state: dict[str, Any], folder: Path) -> None:
    """Writes an ordinary LLaVA folder; special tokens become rows of its embedding table."""
    weights = {name.removeprefix("model."): tensor for name, tensor in state.items() if name.startswith("model.")}
    if trainee.special_ids:
        ids = [number for numbers in trainee.special_ids.values() for number in numbers]
        with torch.no_grad():
            rows = state["special"] if "special" in state else trainee.special_rows()
            table = next(name for name in weights if name.endswith("embed_tokens.weight"))
            weights[table] = weights[table].clone()
            weights[table][ids] = rows.to(weights[table])
    model.save_pretrained(folder, state_dict=weights)
    processor.save_pretrained(folder)


def _save_encoders(encoders: multi_encoder.Encoders, config: Any, state: dict[str, Any], folder: Path) -> None:
    """Writes what a multi-encoder checkpoint has beside a LLaVA."""
    projector = "model.model.multi_modal_projector."
    own = {name.removeprefix("encoders."): tensor for name, tensor in state.items() if name.startswith("encoders.")}
    if encoders.mode == "feature":
        trained = {name.removeprefix(projector): t for name, t in state.items() if name.startswith(projector)}
        own |= {f"projector.{name}": tensor for name, tensor in trained.items()}
    encoders.load_state_dict(own)
    multi_encoder.save_encoders(encoders, config, folder)


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
    micro, accumulated = recipe.cut_up(processes)
    steps = recipe.steps(conversations)
    values: dict[str, Any] = {
        "output_dir": str(work),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulated,
        "num_train_epochs": recipe.epochs,
        "max_steps": recipe.max_steps or -1,
        "learning_rate": recipe.peak_lr,
        "lr_scheduler_type": "cosine",
        "warmup_steps": math.ceil(recipe.warmup * steps),
        "weight_decay": recipe.weight_decay,
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "bf16": recipe.bf16,
        "use_cpu": not torch.accelerator.is_available(),  # else it refuses bf16 there
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
        "ddp_find_unused_parameters": recipe.stage == "vpt",  # a tower has layers behind the one that is read
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
