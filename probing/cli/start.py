"""Verbs to start with: `probing demo`, `teachers` and `plan`."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import click

from probing.cli.options import (
    OPEN,
    OVERRIDES,
    FieldCommand,
    as_lines,
    build_recipe,
    print_page,
    print_plan,
    teacher_values,
)
from probing.utils.errors import UserError

rate = partial(click.option, type=click.FloatRange(0, min_open=True), show_default=True)


@click.command()
@click.option(
    "--preset",
    type=click.Choice(["quick", "full"]),
    default="quick",
    show_default=True,
    help="quick: shipped tiny models, about five minutes; full: trains all models first, an hour or more.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("runs/demo"),
    show_default=True,
    help="Folder for data, runs and report.",
)
@OPEN
def demo(preset: str, out: Path, show: bool) -> None:
    """Run everything on the toy world, on a CPU."""
    from probing.toyworld.demo import run_demo
    from probing.utils.files import disk_errors

    with disk_errors(out):
        page = run_demo(preset, out)
    print_page(page, show)


@click.command()
@click.argument("name_and_id", required=False, metavar="[NAME=ID]")
@OVERRIDES
def teachers(name_and_id: str | None, overrides: tuple[str, ...]) -> None:
    """List teachers, targets and licences.

    NAME=ID shows one teacher's target, without its weights. KEY=VALUE sets its fields, e.g. features=pooled grid=16.
    """
    from probing.teachers.registry import CATALOGUE, ENCODERS

    if name_and_id:
        from probing.teachers import describe_teacher

        click.echo(as_lines(describe_teacher(teacher_values((name_and_id,)), overrides)))
        return
    for name, entry in CATALOGUE.items():
        lines = [f"class    {entry.class_name}", f"target   {entry.target}"]
        lines += [f"licence  {licence}  ({identifier})" for identifier, licence in entry.licences.items()]
        click.echo("\n       ".join([f"{name:<6} {entry.default_id}", *lines]))
    click.echo("\nOther weights of these classes: --teacher NAME=FOLDER_OR_HUB_ID, under their own licence.")
    click.echo("Any other NAME is a plain encoder of transformers, timm or open_clip, without decoder. Its target is")
    click.echo("its patches (at most 24 x 24), or with teachers.NAME.features=pooled its pooled output. For example:")
    for name, (identifier, licence) in ENCODERS.items():
        click.echo(f"       --teacher {name}={identifier}  ({licence})")


@click.command(cls=FieldCommand, model="analysis.evaluation.options:Options")
@click.argument("path", type=click.Path(path_type=Path), metavar="RUN_OR_RECIPE")
@OVERRIDES
@click.option("--devices", type=click.IntRange(1), default=1, show_default=True, help="Processes, one per device.")
@rate("--tflops", default=150.0, help="TFLOP/s of a device in 16 bits; the default is conservative for an H100.")
@rate("--tflops-long", default=40.0, help="TFLOP/s of a device in 32 bits, for probes and teachers.")
def plan(
    path: Path, overrides: tuple[str, ...], devices: int, tflops: float, tflops_long: float, **options: Any
) -> None:
    """Estimate FLOPs, hours, memory and disk.

    Takes a recipe of probing train or distill, or a finished run, whose evaluation is estimated. Weights are not
    needed. KEY=VALUE sets fields of the recipe; options of probing evaluate add the cost of that evaluation.
    """
    from analysis.evaluation.options import Options
    from analysis.planning.distillation import plan_stage
    from analysis.planning.evaluation import plan_evaluation, plan_metrics
    from analysis.planning.plan import Devices
    from analysis.planning.probe_training import plan_training
    from probing.distillation.recipe import DistillRecipe
    from probing.recipe import ProbeRunRecipe, load_recipe, read_yaml

    if not math.isfinite(tflops + tflops_long):
        raise UserError("--tflops and --tflops-long are TFLOP/s; give a finite number such as 150")
    requested = build_recipe(Options, {}, options)
    if path.is_dir():
        if overrides:
            raise UserError(f"{path} is a run, whose recipe is fixed; leave out {overrides[0]}, or give a recipe")
        plans = [plan_evaluation(path, requested)]
    elif "stage" in read_yaml(path):
        if options["metrics"]:
            raise UserError(f"{path} trains a checkpoint, which has no score; leave out --metric")
        plans = [plan_stage(load_recipe(DistillRecipe, path, overrides), processes=devices)]
    else:
        recipe = load_recipe(ProbeRunRecipe, path, overrides)
        scoring = [plan_metrics(recipe, requested)] if requested != Options() else []
        plans = [plan_training(recipe, processes=devices), *scoring]
    for each in plans:
        print_plan(each, Devices(devices, tflops, tflops_long))
