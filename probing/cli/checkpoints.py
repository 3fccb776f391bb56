"""The verbs of checkpoints: `probing inspect`, `distill`, `align` and `bench`."""

import json
from pathlib import Path
from typing import Any

import click

from probing.cli.options import DRY_RUN, as_lines, quiet_libraries, teacher_values
from probing.utils.errors import UserError


@click.command()
@click.argument("recipe_file", type=click.Path(path_type=Path), metavar="RECIPE")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the new checkpoint.")
@DRY_RUN
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def distill(recipe_file: Path, out: Path, dry_run: bool, overrides: tuple[str, ...]) -> None:
    """Train a checkpoint: stage pt, vpt or ift of RECIPE. An interrupted stage goes on."""
    quiet_libraries()
    from analysis.planning.distillation import plan_stage
    from analysis.planning.plan import Devices
    from probing.distillation.recipe import DistillRecipe
    from probing.distillation.trainer import run_stage
    from probing.recipe import load_recipe
    from probing.utils.distributed import started

    recipe = load_recipe(DistillRecipe, recipe_file, overrides)
    if dry_run:
        click.echo("\n".join(plan_stage(recipe, out, started()).lines(Devices(started()))))
        return
    folder = run_stage(recipe, out)
    click.echo(f"checkpoint: {folder}; next: probing inspect {folder}")


@click.command()
@click.argument("checkpoint")
@click.option("--data", required=True, help="coco:DIR, a folder in COCO's official layout, with masks.")
@click.option(
    "--teacher",
    "teacher_options",
    multiple=True,
    metavar="NAME[=ID]",
    help="depth, seg or gen, or any other name for a plain vision encoder, with a folder or Hub id, to compare every "
    "layer with; repeat. By default none.",
)
@click.option("--layers", help="all, or a list such as 0,4,8-12,final.")
@click.option("--images", type=click.IntRange(1), help="Take only the first so many. Default: all with masks.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the run.")
@DRY_RUN
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def align(
    checkpoint: str,
    data: str,
    teacher_options: tuple[str, ...],
    layers: str | None,
    images: int | None,
    out: Path,
    dry_run: bool,
    overrides: tuple[str, ...],
) -> None:
    """How CHECKPOINT's projector compresses the image, and whether each patch says the word for what it shows.

    Beside it the logit lens, patches as sums of words, likeness to the teachers, and attention to the image, layer by
    layer. Writes results.csv as probing evaluate does; probing report takes the folder. KEY=VALUE sets any field of
    the recipe, e.g. data.eval_split=train2017 coverage=0.8.
    """
    quiet_libraries()
    from analysis.alignment.run import AlignRecipe
    from analysis.alignment.run import align as align_checkpoint
    from analysis.planning.alignment import plan_alignment
    from analysis.planning.plan import Devices
    from probing.recipe import apply_overrides, validate

    values: dict[str, Any] = {"backbone": {"checkpoint": checkpoint}, "data": {"path": data}}
    values |= {"layers": layers} if layers else {}
    values["teachers"] = teacher_values(teacher_options)
    if images:
        values["data"]["eval_limit"] = images
    apply_overrides(values, overrides)
    recipe = validate(AlignRecipe, values, "command line").with_absolute_paths()
    if dry_run:
        click.echo("\n".join(plan_alignment(recipe, out).lines(Devices())))
        return
    results = align_checkpoint(recipe, out)
    click.echo(f"results: {results}; next: probing report {out}")


@click.command()
@click.argument("checkpoint")
@click.option("--benchmark", required=True, help="cvbench, mmstar, realworldqa, okvqa, or a task file added to them.")
@click.option("--data", required=True, help="Folder of the benchmark's files as they are published, or one of them.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run. Default: runs/CHECKPOINT_BENCHMARK.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def bench(checkpoint: str, benchmark: str, data: str, out: Path | None, overrides: tuple[str, ...]) -> None:
    """What share of a benchmark's questions CHECKPOINT answers rightly, by the benchmark's own rule.

    Greedy answers, kept in answers.jsonl. probing report takes the folder beside runs with probes, and draws
    representation quality against accuracy. KEY=VALUE sets any field of the recipe, e.g. micro_batch=32
    max_new_tokens=16 backbone.dtype=bfloat16.
    """
    quiet_libraries()
    from analysis.benchmarks.run import BenchRecipe
    from analysis.benchmarks.run import bench as ask_benchmark
    from probing.recipe import apply_overrides, model_name, validate

    values: dict[str, Any] = {"backbone": {"checkpoint": checkpoint}, "benchmark": benchmark, "data": data}
    apply_overrides(values, overrides)
    out = out or Path("runs") / f"{model_name(checkpoint).rsplit('/', 1)[-1]}_{benchmark}"
    results = ask_benchmark(validate(BenchRecipe, values, "command line").with_absolute_paths(), out)
    click.echo(f"results: {results}; next: probing report RUN {out}")


@click.command()
@click.argument("checkpoint")
@click.option("--prompt", help="The user's turn of the sample prompt.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def inspect(checkpoint: str, prompt: str | None, as_json: bool, overrides: tuple[str, ...]) -> None:
    """What CHECKPOINT (a folder or Hub id) is: parts, layers, widths, token map of a sample prompt.

    KEY=VALUE says how it is loaded, as for probing train, e.g. backbone.template=vicuna_v1.
    """
    quiet_libraries()
    from probing.models import describe_checkpoint
    from probing.recipe import BackboneRecipe, apply_overrides, validate

    values: dict[str, Any] = {"backbone": {"checkpoint": checkpoint} | ({"prompt": prompt} if prompt else {})}
    apply_overrides(values, overrides)
    for name in values.keys() - {"backbone"}:
        raise UserError(f"inspect takes fields of backbone alone; write backbone.{name}=…")
    found = describe_checkpoint(validate(BackboneRecipe, values["backbone"], "inspect"))
    click.echo(json.dumps(found, indent=2) if as_json else as_lines(found))
