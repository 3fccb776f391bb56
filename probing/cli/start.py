"""The verbs to start with: `probing demo`, `teachers`, `doctor` and `plan`."""

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


@click.command()
def doctor() -> None:
    """What this machine has, what is missing for which verb, and what is broken.

    Exit code 2 where something must be mended first; its line says what to type.
    """
    from probing.utils.doctor import examine  # of the libraries it imports none before it knows whether that works

    broken = 0
    for finding in examine():
        broken += finding.level == "broken"
        click.echo(f"{finding.level:<8}{finding.about:<14}{finding.text}")
    if broken:
        raise UserError(f"{broken} of these must be mended before the toolkit works; each says what to type")
    click.echo("usable")


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
    """What a run costs: training it by RECIPE, and evaluating it; of a finished RUN, what of that is there already.

    RECIPE may be one of probing distill too. Nothing is loaded but configurations: the weights need not be there.
    KEY=VALUE changes fields of the recipe; the options are those of `probing evaluate`, and where it runs.
    """
    if not math.isfinite(tflops + tflops_long):
        raise UserError("--tflops and --tflops-long are numbers of TFLOP/s; write such as 150")
    quiet_libraries()
    from analysis.planning.evaluation import plan as plan_evaluation
    from analysis.planning.probe_training import Devices, training_cost
    from probing.recipe import ProbeRunRecipe, load_recipe, read_yaml
    from probing.runs.directory import Run

    where = Devices(devices, tflops, tflops_long)
    run = Run.open(path) if path.is_dir() else None
    if run and overrides:
        raise UserError(f"{path} is a finished run, whose recipe stands; give a recipe, or leave out {overrides[0]}")
    if not run and "stage" in read_yaml(path):
        if options["metrics"]:
            raise UserError(f"{path} trains a checkpoint, which is not scored; leave out --metric")
        from analysis.planning.distillation import stage_cost
        from probing.distillation.recipe import DistillRecipe

        for line in stage_cost(load_recipe(DistillRecipe, path, overrides), devices).lines(where):
            click.echo(line)
        return
    recipe = run.recipe if run else load_recipe(ProbeRunRecipe, path, overrides)
    for line in [] if run else training_cost(recipe, devices).lines(where):
        click.echo(line)
    for cost in plan_evaluation(run, recipe, evaluation(options)):
        click.echo(f"{cost.metric}: {cost.work}; there already: {cost.there}")


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
