"""A training stage of a LLaVA checkpoint, on transformers' Trainer."""

import copy
import dataclasses
import difflib
import functools
import glob
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
from PIL import Image

import probing.compat  # noqa: F401  # isort: skip
from transformers import PrinterCallback, Trainer

from probing.backbones import multi_encoder, original
from probing.backbones.base import SPECIAL, parse_layers, special_ids
from probing.backbones.llava import tower_grid
from probing.data.conversations import ConversationDataset, Encoder, collate, read_conversations, require_some_image
from probing.data.patch_words import PatchWords, read_annotations
from probing.distill.callbacks import AllStepsTaken, Bar, Losses, Watch
from probing.distill.notes import Notes
from probing.distill.patches import PatchAlignment, attach_pairs
from probing.distill.predictors import FOLDER, EmbeddingPredictors, Task
from probing.distill.recipe import DistillRecipe, EmbeddingRecipe, EncodersRecipe
from probing.distill.targets import attach_targets
from probing.distill.tokens import add_special_tokens
from probing.distill.trainee import Trainee
from probing.errors import UserError
from probing.hub import first_line, identity, load_config, locate, read_json
from probing.provenance import versions
from probing.recipe import dump_recipe, local_path, validate
from probing.run import Interruption, disk_errors, remove_left_overs, whole_folder, write_text
from probing.teachers import Teacher, load_teacher

logger = logging.getLogger(__name__)

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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of every named loss since the last log."""
        if "loss" in logs:
            taken = self.trainee.take_logged()
            values = torch.stack([value.to(self.args.device) for value in taken.values()])
            summed = self.accelerator.reduce(values, "sum").tolist()
            logs |= {f"loss/{name}": round(value, 6) for name, value in zip(taken, summed, strict=True)}
        super().log(logs, start_time)


def _embedding(
    recipe: EmbeddingRecipe, seed: int, source: str, model: Any, processor: Any, device: torch.device
) -> tuple[EmbeddingPredictors, dict[str, Teacher]]:
    """Predictors and teachers of a stage; gives the checkpoint special tokens where the recipe has some.

    Raises:
        UserError: a teacher cannot be loaded, a layer is not in the LLM, or the checkpoint has other tokens or
            predictors.
    """
    blocks, width = len(model.model.language_model.layers), model.config.text_config.hidden_size
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
    from transformers import AutoModelForImageTextToText, AutoProcessor

    work = out.parent / f"{out.name}.training"
    with disk_errors(out):
        finished = _is_finished(recipe, out)
    if finished:
        logger.warning("%s is finished already", out)
        if int(os.environ.get("RANK", "0")) == 0:  # it may have been killed before it cleared up
            shutil.rmtree(work, ignore_errors=True)
        return out
    if _last_state(work):
        _require_same(recipe, work / "recipe.yaml")
    conversations = read_conversations(local_path(recipe.data.conversations), recipe.data.limit)
    root, squared = local_path(recipe.data.image_root), recipe.view == "square"
    require_some_image(conversations, root)
    shown = sorted({name for conversation in conversations for name in conversation.images})
    annotations = None
    if recipe.patches is not None:
        annotated = local_path(recipe.patches.annotations.removeprefix("coco:"))
        annotations = read_annotations(annotated, root, shown)
    source = locate(recipe.checkpoint, "checkpoint")
    if original.is_original(read_json(source, "config.json", recipe.revision)):
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
    arguments = _training_arguments(recipe, work, len(conversations))
    try:
        processor = AutoProcessor.from_pretrained(source, revision=recipe.revision)
        # Weights are trained in float32, whatever they are stored in; bf16 is autocast.
        loading: dict[str, Any] = {"revision": recipe.revision, "dtype": torch.float32}
        if several:
            model = multi_encoder.load_inner(source, config, torch.device("cpu"), **loading)
        else:
            model = AutoModelForImageTextToText.from_pretrained(source, **loading)
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {recipe.checkpoint} cannot be loaded: {first_line(error)}") from None
    embedding: EmbeddingPredictors | None = None
    teachers: dict[str, Teacher] = {}
    if recipe.embedding is not None and recipe.embedding.tasks:
        embedding, teachers = _embedding(recipe.embedding, recipe.seed, source, model, processor, arguments.device)
    encoders: multi_encoder.Encoders | None = None
    if several or recipe.encoders is not None:
        if recipe.encoders is not None:
            config = _several(recipe.encoders, config, processor, model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            folder = Path(source) if several else None
            encoders = multi_encoder.open_encoders(config, processor.tokenizer, arguments.device, folder)
        encoders.install(model)
        teachers = encoders.teachers
    encoder = Encoder(processor, config.image_token_id, recipe.max_length)
    encoder.require_usable()
    labeller, alignment = None, None
    if recipe.patches is not None and annotations is not None:
        labeller = PatchWords(
            annotations, processor.image_processor, tower_grid(config), recipe.patches.coverage, squared
        )
        _require_one_token_a_patch(processor, config.image_token_id, labeller.grid)
        labeller.require_usable(shown)
        alignment = PatchAlignment.of(recipe.patches, processor.tokenizer, labeller.words)
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
            remove_left_overs(out.parent.glob(f".{glob.escape(out.name)}.*.tmp"))
            if not _last_state(work):  # what never reached a saved state tells nothing
                shutil.rmtree(work, ignore_errors=True)
            write_text(work / "recipe.yaml", dump_recipe(recipe))
    with Interruption().watch() as interruption, disk_errors(work):
        watch = Watch(interruption)
        trainee = Trainee(
            model,
            recipe.stage,
            Notes(work, arguments.process_index),
            embedding,
            recipe.embedding.contrastive if recipe.embedding else 0.0,
            {} if encoders else special_ids(processor.tokenizer),
            recipe.trains_special_tokens,
            encoders,
            alignment,
        )
        prepare = {name: teacher.prepare for name, teacher in teachers.items()}
        try:
            trainer = StageTrainer(
                trainee,
                teachers,
                args=arguments,
                train_dataset=ConversationDataset(
                    conversations, root, encoder, squared, prepare, encoders is not None, labeller
                ),
                data_collator=functools.partial(collate, pad_id=processor.tokenizer.pad_token_id),
                callbacks=[watch, Losses(trainee), Bar(f"stage {recipe.stage}")],
            )
            trainer.remove_callback(PrinterCallback)
        except ValueError as error:
            raise UserError(f"{REFUSED}: {first_line(error)}; see its section `trainer`") from None
        saved = _last_state(work)
        try:
            trainer.train(resume_from_checkpoint=saved)
        except AllStepsTaken:
            logger.info("all steps were taken already")
        except pickle.UnpicklingError:
            raise UserError(
                f"the saved state {saved} is a pickle that holds more than tensors, which may run code; remove {work} "
                "to train from the start"
            ) from None
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
        missing, broken = annotations.missing if annotations else [], notes["unlabelled"]
        if missing:
            logger.warning("%d images have no annotations for patches, first: %s", len(missing), missing[0])
        if broken:
            logger.warning("%d annotations of images could not be used, first: %s", len(broken), broken[0])
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        record = {
            "recipe": dump_recipe(recipe),
            "started_from": identity(source, config),
            "stage": recipe.stage,
            "steps": trainer.state.global_step,
            "final_loss": losses[-1],
            "log": trainer.state.log_history,
            "conversations": len(conversations),
            **notes,
            "not_annotated": len(missing),
            "versions": versions(),
        }
        with disk_errors(out), whole_folder(out) as folder:
            _save_checkpoint(model, processor, trainee, state, folder)
            if encoders is not None:
                _save_encoders(encoders, config, state, folder)
            if embedding is not None:
                own = {n.removeprefix("embedding."): t for n, t in state.items() if n.startswith("embedding.")}
                embedding.load_state_dict(own)
                used = {name: {"id": t.id, "sha256": t.sha256, "shape": t.shape} for name, t in teachers.items()}
                embedding.cpu().save(folder / FOLDER, {"teachers": used, "versions": versions()})
            if (work / "runs").exists():  # TensorBoard's curves
                shutil.copytree(work / "runs", folder / "runs")
            (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(work, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return out


def _require_one_token_a_patch(processor: Any, image_token_id: int, grid: tuple[int, int]) -> None:
    """Raises UserError where image tokens are not the patches of the grid, one by one."""
    ids = processor(images=[Image.new("RGB", (8, 8))], text=[processor.image_token], return_tensors="pt")["input_ids"]
    tokens = int((ids == image_token_id).sum())
    if tokens != grid[0] * grid[1]:
        raise UserError(
            f"the processor places {tokens} image tokens where the vision tower has {grid[0]} x {grid[1]} patches, so "
            "these cannot be aligned; leave out patches, or give a checkpoint with a token per patch"
        )


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


def _several(recipe: EncodersRecipe, config: Any, processor: Any, model: Any) -> multi_encoder.MultiEncoderConfig:
    """The configuration of a LLaVA that becomes a multi-encoder one; gives it tokens where the mode has some."""
    names = [name for name in SPECIAL if name in recipe.teachers]
    if recipe.mode == "token":
        add_special_tokens(processor, model, names, recipe.tokens)
    values = {name: value for name, value in model.config.to_dict().items() if name != "model_type"}
    teachers = {name: {"id": recipe.teachers[name].id, "grid": recipe.teachers[name].grid} for name in names}
    values["encoders"] = {"mode": recipe.mode, "tokens": recipe.tokens, "teachers": teachers}
    return multi_encoder.MultiEncoderConfig(**values)


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
