"""The verbs to start with: `probing demo`, `teachers` and `plan`."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import click

from probing.cli.options import as_lines, evaluation, evaluation_options, quiet_libraries, teacher_values
from probing.utils.errors import UserError


@click.command()
@click.argument("name_and_id", required=False, metavar="[NAME=ID]")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def teachers(name_and_id: str | None, overrides: tuple[str, ...]) -> None:
    """The teachers: default id, target, licence of the weights.

    With NAME=ID, what that one's target would be; its weights need not be there. KEY=VALUE sets fields of its own, e.g.
    features=pooled grid=16.
    """
    from probing.teachers.registry import CATALOGUE, ENCODERS

    if name_and_id:
        quiet_libraries()
        from probing.teachers import describe_teacher

        click.echo(as_lines(describe_teacher(teacher_values((name_and_id,)), overrides)))
        return
    for name, entry in CATALOGUE.items():
        click.echo(f"{name:<6} {entry.default_id}\n       class    {entry.class_name}\n       target   {entry.target}")
        click.echo(f"       licence  {entry.licences[entry.default_id]}")
        for other, licence in entry.licences.items():
            if other != entry.default_id:
                click.echo(f"       also     {other}: {licence}")
    click.echo("Another one of these classes: --teacher NAME=FOLDER_OR_HUB_ID. Its licence is its own.\n")
    click.echo(
        "Any other NAME is a plain encoder of transformers or timm, without decoder: features of its patches, at"
    )
    click.echo(
        "most 24 x 24, or with teachers.NAME.features=pooled its pooled output. probing teachers NAME=ID looks at one."
    )
    for name, (identifier, licence) in ENCODERS.items():
        click.echo(f"       --teacher {name}={identifier}  ({licence})")


rate = partial(click.option, type=click.FloatRange(0, min_open=True), show_default=True)


@click.command()
@click.argument("path", type=click.Path(path_type=Path), metavar="RUN_OR_RECIPE")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--devices", type=click.IntRange(1), default=1, show_default=True, help="Processes that share the images, one each."
)
@rate(
    "--tflops",
    default=150.0,
    help="TFLOP/s that a device sustains in 16-bit numbers; the default is meant for an H100, on the careful side.",
)
@rate("--tflops-long", default=40.0, help="The same in 32-bit numbers, in which probes and teachers are computed.")
@evaluation_options
def plan(
    path: Path, overrides: tuple[str, ...], devices: int, tflops: float, tflops_long: float, **options: Any
) -> None:
    """What training by RECIPE takes, as its --dry-run; or evaluating a finished RUN.

    RECIPE may be one of probing distill too. The weights need not exist. KEY=VALUE changes fields of the recipe. With
    options of `probing evaluate`, what evaluating takes is added.
    """
    if not math.isfinite(tflops + tflops_long):
        raise UserError("--tflops and --tflops-long are numbers of TFLOP/s; write such as 150")
    quiet_libraries()
    from analysis.evaluation.options import Options
    from analysis.planning.distillation import plan_stage
    from analysis.planning.evaluation import plan_evaluation, plan_metrics
    from analysis.planning.plan import Devices
    from analysis.planning.probe_training import plan_training
    from probing.distillation.recipe import DistillRecipe
    from probing.recipe import ProbeRunRecipe, load_recipe, read_yaml

    requested = evaluation(options)
    if path.is_dir():
        if overrides:
            raise UserError(f"{path} is a run, whose recipe is fixed; leave out {overrides[0]}, or give a recipe")
        plans = [plan_evaluation(path, requested)]
    elif "stage" in read_yaml(path):
        if options["metrics"]:
            raise UserError(f"{path} trains a checkpoint, which is not scored; leave out --metric")
        plans = [plan_stage(load_recipe(DistillRecipe, path, overrides), processes=devices)]
    else:
        recipe = load_recipe(ProbeRunRecipe, path, overrides)
        plans = [plan_training(recipe, processes=devices)]
        plans += [plan_metrics(recipe, requested)] if requested != Options() else []
    for one in plans:
        click.echo("\n".join(one.lines(Devices(devices, tflops, tflops_long))))


@click.command()
@click.option(
    "--preset",
    type=click.Choice(["quick", "full"]),
    default="quick",
    show_default=True,
    help="quick: ready-made tiny models, 4 minutes; full: everything from nothing, an hour or more.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("runs/demo"),
    show_default=True,
    help="Folder for the world, the run and the report.",
)
@click.option("--open", "show", is_flag=True, help="Open the report in the browser at the end.")
def demo(preset: str, out: Path, show: bool) -> None:
    """The whole story on the toy world, ending in a report."""
    quiet_libraries()
    import webbrowser

    from probing.toyworld.demo import run_demo
    from probing.utils.files import disk_errors

    with disk_errors(out):
        page = run_demo(preset, out)
    click.echo(f"report: {page}")
    if show and not webbrowser.open(page.absolute().as_uri()):
        click.echo("no browser was found; open the report by hand", err=True)
