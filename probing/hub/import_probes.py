"""Turns probes inside a checkpoint into a run that can be evaluated like any other.

Reads the embedding predictors of `probing distill`, and the published probe checkpoints of OLA-VLM / VisPer-LM: models
of 36 to 38 GB, of which only the probes are read. Refuses the embedding predictors of OLA-VLM's own pre-training
checkpoints: their depth target is the mean of four features, their gen query the mean of the states at the gen tokens.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from probing.data.coco import ImageList, Skipped
from probing.data.dataloader import MicroBatches, micro_batches
from probing.distillation.predictors import FOLDER
from probing.distillation.recipe import DistillRecipe
from probing.models import FINAL, identify, layer_name, parse_layers
from probing.models.chat_templates import rendering_at
from probing.models.finite import finite_rows
from probing.probes.bank import ProbeBank, ProbeKey, bank_config, bank_teachers
from probing.probes.resampler import Resampler, ResamplerConfig
from probing.recipe import ProbeRecipe, ProbeRunRecipe, apply_overrides, validate
from probing.runs.directory import Run
from probing.runs.recorded_inputs import recorded_moment
from probing.runs.resume import claim
from probing.teachers import Teacher, load_teachers
from probing.teachers.registry import CATALOGUE
from probing.training.run import held_out_images, provenance_of, training_images, write_manifest
from probing.utils.checkpoint_files import read_json_or_empty, read_tensors
from probing.utils.distributed import require_single_process
from probing.utils.errors import UserError
from probing.utils.files import atomic_file, atomic_folder, disk_errors, reading, write_text
from probing.utils.pretrained import locate
from probing.utils.progress import Progress


@dataclass
class CheckpointProbes:
    """Probes inside a checkpoint.

    Attributes:
        bank: the probes, on the CPU.
        teachers: per teacher the values of its recipe.
        kind: suffix of the checkpoint's name in results.
        targets: per teacher the hash of its weights and the target's shape, if recorded.
        training: epochs, batch_size, steps and lr, if recorded.
    """

    bank: ProbeBank
    teachers: dict[str, dict[str, Any]]
    kind: str
    targets: dict[str, tuple[str, list[int]]] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


def import_probes(checkpoint: str, data: str, out: Path, overrides: Sequence[str] = ()) -> Run:
    """Writes a run with the probes inside a checkpoint; nothing is trained, and the model is not loaded.

    Args:
        checkpoint: folder or Hub id.
        data: `coco:DIR`.
        out: folder of the run; a finished import of the same recipe is not repeated.
        overrides: `KEY=VALUE` for the run's recipe, such as `teachers.depth.id=DIR`.

    Raises:
        UserError: the checkpoint has no complete probes, the teachers are not theirs, or data are unreadable.
    """
    source = locate(checkpoint, "checkpoint")
    config = read_json_or_empty(source, "config.json")
    found = _published_probes(source, config) if config.get("probe_mode") else _predictors(source, config)
    recipe = _recipe(checkpoint, data, found, overrides)
    device = require_single_process("import").device
    train_images, eval_images = training_images(recipe.data), held_out_images(recipe.data)
    with rendering_at(recorded_moment(None)):
        identity = identify(recipe.backbone)
        teachers = load_teachers(recipe.teachers, device)
        provenance = provenance_of(recipe, identity, teachers, train_images, eval_images)
    provenance["checkpoint"]["name"] += f" {found.kind}"
    _require_teachers(found, identity.hidden_size, teachers)
    bank = _select(found.bank, recipe, identity.layers)
    claim(out, recipe)
    run = Run(out, recipe)
    if run.finished:
        return run
    means, skipped = mean_targets(recipe, teachers, train_images, device)
    with disk_errors(out):
        with atomic_folder(run.probes("none")) as folder:
            origin = {name: value for name, value in provenance.items() if name not in ("inputs", "rendered_at")}
            bank.save(folder, {"control": "none", **origin})
        with atomic_file(run.means) as file:
            save_file(means, file)
        write_text(out / "learning_curves.csv", "control,teacher,layer,seed,step,loss\n")
        training = found.training | {"seeds": recipe.fit.seeds, "imported": True}
        write_manifest(run, provenance, training, [], [vars(s) for s in skipped], 0.0)
    return run


def _predictors(source: str, config: dict[str, Any]) -> CheckpointProbes:
    """Reads the embedding predictors of a stage of `probing distill`."""
    folder = Path(source) / FOLDER
    configs = {teacher: bank_config(folder, teacher) for teacher in bank_teachers(folder)}
    if not configs and str(config.get("model_type")).startswith("ola_"):
        raise UserError(f"{source}: OLA-VLM's own embedding predictors have other targets and queries; train probes")
    if not configs:
        raise UserError(f"{source} has no probes: neither a folder {FOLDER} nor probe_mode in config.json; train some")
    with reading(folder.parent, "use the folder as probing distill wrote it"):
        record = json.loads((folder.parent / "training.json").read_text(encoding="utf-8"))
        stage = DistillRecipe.model_validate(yaml.safe_load(record["recipe"]))
        return CheckpointProbes(
            ProbeBank.load(folder, torch.device("cpu")),
            {name: {"id": c["teacher"]["id"], **_target(name, c["resampler"])} for name, c in configs.items()},
            "predictors",
            {name: (c["teacher"]["sha256"], c["teacher"]["shape"]) for name, c in configs.items()},
            {"epochs": stage.epochs, "batch_size": stage.global_batch, "lr": stage.peak_lr, "steps": record["steps"]},
        )


def _published_probes(source: str, config: dict[str, Any]) -> CheckpointProbes:
    """Reads the probes of one teacher at every layer.

    The last one reads the state after the final norm: they were trained on `output_hidden_states`, whose last entry is
    normalised.
    """
    mode = config["probe_mode"]
    sizes, layers = config.get(f"image_{mode}"), int(config.get("num_hidden_layers", 0))
    if mode not in CATALOGUE or not isinstance(sizes, dict):
        raise UserError(f"{source}: config.json lacks image_{mode}, the sizes of its probes; restore that file")
    resampler = ResamplerConfig(
        key_width=config["hidden_size"],
        queries=sizes["num_tokens"],
        width=sizes["output_dim"],
        output_width=sizes["output_dim"],
        heads=sizes["num_heads"],
        dim_head=sizes["dim_head"],
        ff_mult=sizes["ff_mult"],
    )
    tensors = dict(read_tensors(source, f"image_{mode}_heads."))
    probes = {}
    for index in range(layers):
        prefix = f"image_{mode}_heads.{index}.projector."
        probe = Resampler(resampler)
        try:
            probe.load_state_dict(
                {n.removeprefix(prefix): t.float() for n, t in tensors.items() if n.startswith(prefix)}
            )
        except RuntimeError:
            raise UserError(f"{source}: the probe of layer {index + 1} is incomplete; download it again") from None
        layer = index + 1 if index + 1 < layers else FINAL
        probes[ProbeKey(mode, layer, 0)] = probe.eval().requires_grad_(False)
    teacher = {"id": CATALOGUE[mode].default_id, **_target(mode, resampler.to_dict())}
    return CheckpointProbes(ProbeBank(probes, {mode: list(ProbeRecipe().keys)}), {mode: teacher}, "(published probes)")


def _target(teacher: str, resampler: dict[str, int]) -> dict[str, Any]:
    """Returns the recipe's values for the target that a resampler predicts."""
    side = round(resampler["queries"] ** 0.5)
    if side > 1:
        return {"grid": side}
    return {} if teacher in CATALOGUE else {"features": "pooled"}


def _recipe(checkpoint: str, data: str, found: CheckpointProbes, overrides: Sequence[str]) -> ProbeRunRecipe:
    layers = {layer_name(key.layer) for key in found.bank.probes}
    values: dict[str, Any] = {
        "backbone": {"checkpoint": checkpoint},
        "data": {"path": data},
        "teachers": found.teachers,
        "layers": ",".join([*sorted(layers - {FINAL}, key=int), *(layers & {FINAL})]),
        "controls": [],
        "fit": {"ridge": False, "workers": 0},
    }
    return validate(ProbeRunRecipe, apply_overrides(values, overrides), "import").with_absolute_paths()


def _require_teachers(found: CheckpointProbes, hidden_size: int, teachers: dict[str, Teacher]) -> None:
    """Raises UserError if probes were trained with another width of the LLM or another teacher."""
    for name, teacher in teachers.items():
        config = next(p.config for key, p in found.bank.probes.items() if key.teacher == name)
        if config.key_width != hidden_size:
            raise UserError(
                f"{name} probes read width {config.key_width}, the checkpoint has {hidden_size}; train probes"
            )
        sha256, shape = found.targets.get(name, (teacher.sha256, [config.queries, config.output_width]))
        if sha256 != teacher.sha256 or list(shape) != list(teacher.shape):
            raise UserError(
                f"{name} probes were trained on another teacher ({found.teachers[name]['id']}, targets {shape}); "
                f"set teachers.{name}.id=DIR"
            )


def _select(bank: ProbeBank, recipe: ProbeRunRecipe, blocks: int) -> ProbeBank:
    """Selects the probes of a recipe's teachers and layers; raises UserError if a teacher has none."""
    layers = parse_layers(recipe.layers, blocks)
    probes = {key: p for key, p in bank.probes.items() if key.teacher in recipe.teachers and key.layer in layers}
    for name in recipe.teachers:
        if name not in {key.teacher for key in probes}:
            available = ", ".join(layer_name(key.layer) for key in bank.probes if key.teacher == name)
            raise UserError(f"no {name} probe at layer {recipe.layers}; choose layers from {available}")
    return ProbeBank(probes, bank.keys)


def mean_targets(
    recipe: ProbeRunRecipe, teachers: dict[str, Teacher], images: ImageList, device: torch.device
) -> tuple[dict[str, Tensor], list[Skipped]]:
    """Computes the mean target (N, D) of each teacher, in float32, and lists unreadable images.

    Raises:
        UserError: no image is readable, or a teacher gives no finite target.
    """
    totals: dict[str, Tensor] = {}
    counts = dict.fromkeys(teachers, 0)
    skipped: list[Skipped] = []
    batch = recipe.fit.micro_batch
    plan = [list(range(first, min(first + batch, len(images)))) for first in range(0, len(images), batch)]
    prepare = {name: teacher.prepare for name, teacher in teachers.items()}
    batches = micro_batches(MicroBatches(images, plan, None, prepare, recipe.data.view), recipe.fit.workers, device)
    with Progress("mean targets", len(plan), unit="batches") as bar:
        for prepared in batches:
            skipped += prepared.skipped
            for name, pixels in prepared.pixels.items():
                target = teachers[name].target(pixels)
                target = target[finite_rows(target)]
                totals[name] = totals.get(name, 0) + target.sum(dim=0, dtype=torch.float64)
                counts[name] += len(target)
            bar.advance()
    if not totals:
        raise UserError(f"no image of {images.split} is readable; check {images.folder}")
    for name, count in counts.items():
        if not count:
            raise UserError(f"teacher {name} gives no finite features of {images.split}; check its weights")
    return {name: (total / counts[name]).float().cpu().contiguous() for name, total in totals.items()}, skipped
