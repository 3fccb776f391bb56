"""`probing import`: probes that were trained elsewhere become a run, which is evaluated and reported like any other.

Two kinds: the embedding predictors beside a checkpoint of `probing distill`, and the published probe checkpoints of
OLA-VLM / VisPer-LM, full models of 36 to 38 GB of which only the probes are read. The embedding predictors of OLA-VLM's
own pre-training checkpoints are refused: their depth target is the mean of four features, their gen query the mean of
the states at the gen tokens.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from probing.data.coco import ImageList, Skipped
from probing.data.dataloader import micro_batches, no_student
from probing.distillation.predictors import FOLDER
from probing.models import FINAL, identify, layer_name, parse_layers
from probing.models.chat_templates import rendering_at
from probing.models.finite import finite_rows
from probing.probes.bank import ProbeBank, ProbeKey, bank_config, bank_layers
from probing.probes.resampler import Resampler, ResamplerConfig
from probing.recipe import ProbeRecipe, ProbeRunRecipe, apply_overrides, validate
from probing.runs.compatibility import recorded_moment
from probing.runs.directory import Run
from probing.teachers import Teacher
from probing.teachers.registry import CATALOGUE
from probing.training.run import held_out_images, load_teachers, provenance_of, training_images, write_manifest
from probing.utils.distributed import alone
from probing.utils.errors import UserError
from probing.utils.files import disk_errors, reading, whole_file, whole_folder, write_text
from probing.utils.pretrained import locate, read_json, read_tensors
from probing.utils.progress import Progress


@dataclass
class Found:
    """Probes that were trained elsewhere.

    Attributes:
        bank: the probes, on the CPU.
        teachers: id and grid of the teacher of each, as a recipe has them.
        trained_towards: per teacher the hash of its weights and its target's shape, where that is known.
        trained: how they were trained: epochs, batch_size, steps, lr; empty where nobody says.
        kind: what they are, behind the checkpoint's name.
    """

    bank: ProbeBank
    teachers: dict[str, dict[str, Any]]
    trained_towards: dict[str, tuple[str, list[int]]]
    trained: dict[str, Any]
    kind: str


def find_probes(checkpoint: str) -> Found:
    """Reads the probes of a checkpoint, and nothing else of it.

    Args:
        checkpoint: folder or Hub id.

    Raises:
        UserError: there are none, or they are incomplete.
    """
    source = locate(checkpoint, "checkpoint")
    raw = read_json(source, "config.json")
    if raw.get("probe_mode"):
        return _published(source, raw)
    folder = Path(source) / FOLDER
    layers = bank_layers(folder)
    if not layers and str(raw.get("model_type")).startswith("ola_"):
        raise UserError(
            f"{checkpoint}: embedding predictors of OLA-VLM's own format are not imported, because their targets and "
            "queries differ; train probes"
        )
    if not layers:
        raise UserError(
            f"{checkpoint} has neither embedding predictors (a folder {FOLDER} with probes, as probing distill writes "
            "for a stage with embedding losses) nor probes in its configuration (probe_mode)"
        )
    configs = {teacher: bank_config(folder, teacher) for teacher in layers}
    with reading(folder.parent, "give it as probing distill wrote it"):
        record = json.loads((folder.parent / "training.json").read_text(encoding="utf-8"))
        stage = yaml.safe_load(record["recipe"])
        return Found(
            bank=ProbeBank.load(folder, torch.device("cpu")),
            teachers={
                n: {"id": config["teacher"]["id"]} | _target(n, config["resampler"]) for n, config in configs.items()
            },
            trained_towards={n: (c["teacher"]["sha256"], c["teacher"]["shape"]) for n, c in configs.items()},
            trained={name: stage[name] for name in ("epochs", "batch_size", "lr")} | {"steps": record["steps"]},
            kind="predictors",
        )


def _target(teacher: str, resampler: dict[str, int]) -> dict[str, Any]:
    """What a recipe says of the target that probes predict."""
    side = round(resampler["queries"] ** 0.5)
    if side > 1:
        return {"grid": side}
    return {} if teacher in CATALOGUE else {"features": "pooled"}


def _published(source: str, raw: dict[str, Any]) -> Found:
    """The probes of one teacher, a layer each; the last layer's is of the state after the final norm.

    That is how `output_hidden_states` counted when they were trained: its last entry is normalised.
    """
    mode = raw["probe_mode"]
    sizes, count = raw.get(f"image_{mode}"), int(raw.get("num_hidden_layers", 0))
    if mode not in CATALOGUE or not isinstance(sizes, dict):
        raise UserError(
            f"{source}: config.json says probe_mode {mode!r} and not the sizes of its probes (image_{mode})"
        )
    config = ResamplerConfig(
        key_width=raw["hidden_size"],
        queries=sizes["num_tokens"],
        width=sizes["output_dim"],
        output_width=sizes["output_dim"],
        heads=sizes["num_heads"],
        dim_head=sizes["dim_head"],
        ff_mult=sizes["ff_mult"],
    )
    heads = f"image_{mode}_heads."
    tensors = {name.removeprefix(heads): tensor for name, tensor in read_tensors(source, heads)}
    probes = {}
    for index in range(count):
        prefix = f"{index}.projector."
        own = {name.removeprefix(prefix): t.float() for name, t in tensors.items() if name.startswith(prefix)}
        probe = Resampler(config)
        try:
            probe.load_state_dict(own)
        except RuntimeError as error:
            said = " ".join(str(error).split())
            raise UserError(
                f"{source}: the probe of layer {index + 1} is incomplete, or of other sizes: {said}"
            ) from None
        layer = index + 1 if index + 1 < count else FINAL
        probes[ProbeKey(mode, layer, 0)] = probe.eval().requires_grad_(False)
    teacher = {"id": CATALOGUE[mode].default_id} | _target(mode, config.to_dict())
    return Found(ProbeBank(probes, {mode: list(ProbeRecipe().keys)}), {mode: teacher}, {}, {}, "(published probes)")


def import_recipe(checkpoint: str, data: str, found: Found, overrides: Sequence[str] = ()) -> ProbeRunRecipe:
    """The recipe of a run whose probes were trained elsewhere.

    Args:
        checkpoint: where they come from.
        data: `coco:DIR`.
        found: the probes.
        overrides: `KEY=VALUE`, such as `teachers.depth.id=DIR` where a teacher has moved.
    """
    layers = {layer_name(key.layer) for key in found.bank.probes}
    blocks = sorted(layers - {FINAL}, key=int)
    values: dict[str, Any] = {
        "backbone": {"checkpoint": checkpoint},
        "data": {"path": data},
        "teachers": found.teachers,
        "layers": ",".join([*blocks, *(layers & {FINAL})]),
        "controls": [],
        "fit": {"ridge": False, "workers": 0},
    }
    apply_overrides(values, overrides)
    return validate(ProbeRunRecipe, values, "import").with_absolute_paths()


def import_probes(recipe: ProbeRunRecipe, found: Found, out: Path) -> Run:
    """Makes a run of probes that were trained elsewhere; nothing is trained, and the checkpoint is not loaded.

    Args:
        recipe: from `import_recipe`.
        found: from `find_probes`.
        out: the run's folder; a finished one is kept.

    Raises:
        UserError: checkpoint or teachers are not those of the probes, or data cannot be read.
    """
    device = alone("import").device
    train_images, eval_images = training_images(recipe.data), held_out_images(recipe.data)
    moment = recorded_moment(None)
    with rendering_at(moment):
        checkpoint = identify(recipe.backbone)
    teachers = load_teachers(recipe, device)
    _require_theirs(found, checkpoint.hidden_size, teachers)
    chosen = set(parse_layers(recipe.layers, checkpoint.layers))
    probes = {k: p for k, p in found.bank.probes.items() if k.teacher in recipe.teachers and k.layer in chosen}
    for name in recipe.teachers:
        if not any(key.teacher == name for key in probes):
            there = [layer_name(key.layer) for key in found.bank.probes if key.teacher == name]
            raise UserError(f"the {name} probes have no layer {recipe.layers}; there are {', '.join(there)}")
    run = Run.create(out, recipe)
    if run.finished:
        return run
    with rendering_at(moment):
        provenance = provenance_of(recipe, checkpoint, teachers, train_images, eval_images)
    provenance["checkpoint"]["name"] += f" {found.kind}"
    means, skipped = mean_targets(recipe, teachers, train_images, device)
    with disk_errors(out):
        with whole_folder(run.probes("none")) as part:
            made = {name: value for name, value in provenance.items() if name != "inputs"}
            ProbeBank(probes, found.bank.keys).save(part, {"control": "none", **made})
        with whole_file(run.means) as file:
            save_file(means, file)
        write_text(out / "learning_curves.csv", "control,teacher,layer,seed,step,loss\n")
        trained = found.trained | {"seeds": recipe.fit.seeds, "imported": True}
        write_manifest(run, provenance, trained, [], [vars(s) for s in skipped], 0.0)
    return run


def _require_theirs(found: Found, width: int, teachers: dict[str, Teacher]) -> None:
    """Raises UserError where probes were trained with another LLM's width or another teacher."""
    for name, teacher in teachers.items():
        config = next(p.config for key, p in found.bank.probes.items() if key.teacher == name)
        if config.key_width != width:
            raise UserError(
                f"the {name} probes read states of width {config.key_width}, and the checkpoint's have {width}"
            )
        sha256, shape = found.trained_towards.get(name, (teacher.sha256, [config.queries, config.output_width]))
        if sha256 != teacher.sha256 or list(shape) != list(teacher.shape):
            raise UserError(
                f"the {name} probes were trained towards another teacher, with targets of {shape} "
                f"({found.teachers[name]['id']}; this one gives {list(teacher.shape)}); name it: teachers.{name}.id=DIR"
            )


def mean_targets(
    recipe: ProbeRunRecipe, teachers: dict[str, Teacher], images: ImageList, device: torch.device
) -> tuple[dict[str, Tensor], list[Skipped]]:
    """The mean target (N, D) of every teacher over a split, in float32, and the images that could not be read."""
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    skipped: list[Skipped] = []
    batch = recipe.fit.micro_batch
    plan = [list(range(first, min(first + batch, len(images)))) for first in range(0, len(images), batch)]
    prepare = {name: teacher.prepare for name, teacher in teachers.items()}
    batches = micro_batches(images, plan, no_student, prepare, recipe.data.view, recipe.fit.workers, device)
    with Progress("mean targets", len(plan), unit="batches") as bar:
        for prepared in batches:
            skipped += prepared.skipped
            for name, pixels in prepared.pixels.items():
                target = teachers[name].target(pixels)
                target = target[finite_rows(target)]
                total = target.sum(dim=0, dtype=torch.float64)
                totals[name] = totals[name] + total if name in totals else total
                counts[name] = counts.get(name, 0) + len(target)
            bar.advance()
    if not totals:
        raise UserError(f"no image of {images.split} could be read; check {images.folder}")
    for name, count in counts.items():
        if not count:
            raise UserError(f"teacher {name} gives no finite features of {images.split}; check its weights")
    return {name: (total / counts[name]).float().cpu().contiguous() for name, total in totals.items()}, skipped
