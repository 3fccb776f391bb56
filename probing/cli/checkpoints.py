"""Verbs of checkpoints: `probing inspect`, `assemble`, `distill`, `align` and `bench`."""

import json
from pathlib import Path
from typing import Any

import click

from probing.cli.options import DRY_RUN, OUT, OVERRIDES, FieldCommand, as_lines, build_recipe, print_plan
from probing.utils.errors import UserError

ALIGN_FIELDS = {"data": "data__path", "teacher": "teachers", "layers": "layers", "images": "data__eval_limit"}


@click.command(cls=FieldCommand, model="probing.recipe:BackboneRecipe", fields={"prompt": "prompt"})
@click.argument("checkpoint")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@OVERRIDES
def inspect(checkpoint: str, as_json: bool, overrides: tuple[str, ...], **options: Any) -> None:
    """Show a checkpoint's parts and token map.

    CHECKPOINT is a folder or Hub id; its weights are not loaded. KEY=VALUE sets how it is loaded, as in probing train,
    e.g. backbone.template=vicuna_v1.
    """
    from probing.models import describe_checkpoint
    from probing.recipe import BackboneRecipe

    for override in overrides:
        if not override.startswith("backbone."):
            raise UserError(f"inspect takes only fields of backbone; write backbone.{override}")
    fields = [override.removeprefix("backbone.") for override in overrides]
    parts = describe_checkpoint(build_recipe(BackboneRecipe, {"checkpoint": checkpoint}, options, fields))
    click.echo(json.dumps(parts, indent=2) if as_json else as_lines(parts))


@click.command(cls=FieldCommand, model="probing.recipe:AssembleRecipe")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the new checkpoint.")
@DRY_RUN
def assemble(out: Path, dry_run: bool, **options: Any) -> None:
    """Join an LLM, a vision tower and a fresh projector.

    Writes a LLaVA folder to train: its LLM and tower are pretrained, its projector is not. --dry-run shows the model,
    its parameters and memory, and reads no weights.
    """
    from probing.models.assemble import assemble, describe_assembly
    from probing.recipe import AssembleRecipe

    recipe = build_recipe(AssembleRecipe, {}, options)
    if dry_run:
        click.echo(as_lines(describe_assembly(recipe)))
        return
    click.echo(f"checkpoint: {assemble(recipe, out)}; next: probing distill RECIPE --out FOLDER checkpoint={out}")


@click.command(cls=FieldCommand, model="probing.distillation.recipe:DistillRecipe", fields={}, keys=True)
@click.argument("recipe_file", type=click.Path(path_type=Path), metavar="RECIPE")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the new checkpoint.")
@DRY_RUN
@OVERRIDES
def distill(recipe_file: Path, out: Path, dry_run: bool, overrides: tuple[str, ...]) -> None:
    """Train a checkpoint (stages pt, vpt, ift).

    KEY=VALUE sets any field of RECIPE. An interrupted stage resumes.
    """
    from probing.distillation.recipe import DistillRecipe
    from probing.recipe import load_recipe

    recipe = load_recipe(DistillRecipe, recipe_file, overrides)
    if dry_run:
        from analysis.planning.distillation import plan_stage
        from probing.utils.distributed import world_size

        print_plan(plan_stage(recipe, out, world_size()))
        return
    from probing.distillation.trainer import run_stage

    folder = run_stage(recipe, out)
    click.echo(f"checkpoint: {folder}; next: probing inspect {folder}")


@click.command(cls=FieldCommand, model="analysis.alignment.recipe:AlignRecipe", fields=ALIGN_FIELDS, keys=True)
@click.argument("checkpoint")
@OUT
@DRY_RUN
@OVERRIDES
def align(checkpoint: str, out: Path, dry_run: bool, overrides: tuple[str, ...], **options: Any) -> None:
    """Measure projector compression and patch alignment.

    Also measures, per layer, the logit lens, patches as sums of words, similarity to teachers, and attention to the
    image. Writes results.csv for probing report. KEY=VALUE sets any field of the recipe, e.g. coverage=0.8.
    """
    from analysis.alignment.recipe import AlignRecipe

    recipe = build_recipe(AlignRecipe, {"backbone": {"checkpoint": checkpoint}}, options, overrides)
    recipe = recipe.with_absolute_paths()
    if dry_run:
        from analysis.planning.alignment import plan_alignment

        print_plan(plan_alignment(recipe, out))
        return
    from analysis.alignment.run import align

    click.echo(f"results: {align(recipe, out)}; next: probing report {out}")


@click.command(
    cls=FieldCommand,
    model="analysis.benchmarks.recipe:BenchRecipe",
    fields={"benchmark": "benchmark", "data": "data"},
    keys=True,
)
@click.argument("checkpoint")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run. Default: runs/CHECKPOINT_BENCHMARK.")
@OVERRIDES
def bench(checkpoint: str, out: Path | None, overrides: tuple[str, ...], **options: Any) -> None:
    """Measure VQA accuracy.

    Answers greedily and scores by the benchmark's own rule; answers.jsonl has every answer. Give the run to probing
    report together with runs of probes to plot probe quality against accuracy. KEY=VALUE sets any field of the recipe,
    e.g. micro_batch=32 max_new_tokens=16 backbone.dtype=bfloat16.
    """
    from analysis.benchmarks.recipe import BenchRecipe
    from analysis.benchmarks.run import bench
    from probing.recipe import model_name

    recipe = build_recipe(BenchRecipe, {"backbone": {"checkpoint": checkpoint}}, options, overrides)
    out = out or Path("runs") / f"{model_name(checkpoint).rsplit('/', 1)[-1]}_{recipe.benchmark}"
    click.echo(f"results: {bench(recipe.with_absolute_paths(), out)}; next: probing report RUN {out}")
