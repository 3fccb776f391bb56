"""Verbs of probes: `probing train`, `evaluate`, `compare` and `report`."""

from pathlib import Path
from typing import Any, Literal

import click

from probing.cli.options import (
    DRY_RUN,
    OPEN,
    OUT,
    OVERRIDES,
    FieldCommand,
    build_recipe,
    print_page,
    print_plan,
    teacher_values,
)

PAPER_TEACHERS = ("depth", "seg", "gen")
RECIPE_FIELDS = {
    "checkpoint": "backbone__checkpoint",
    "data": "data__path",
    "teacher": "teachers",
    "layers": "layers",
    "controls": "controls",
    "target_cache": "data__target_cache",
}
RUNS = click.argument("runs", type=click.Path(path_type=Path), nargs=-1, required=True)
FIGURES = click.option("--figures", is_flag=True, help="Also write every figure as a file: PNG, SVG and PDF.")
STYLE = click.option(
    "--style",
    type=click.Choice(["screen", "paper"]),
    help="Write figures in this style. paper: SVG and PDF in column widths of 3.25 and 6.75 inches.",
)


@click.command(cls=FieldCommand, model="probing.recipe:ProbeRunRecipe", fields=RECIPE_FIELDS, keys=True)
@click.option("--recipe", "recipe_file", type=click.Path(path_type=Path), help="Recipe to start from.")
@DRY_RUN
@OUT
@OVERRIDES
def train(recipe_file: Path | None, out: Path, dry_run: bool, overrides: tuple[str, ...], **options: Any) -> None:
    """Train probes on every LLM layer.

    KEY=VALUE sets any field of the recipe, e.g. data.train_limit=10000 fit.lr=3e-3 fit.seeds=[0,1,2]. --control adds to
    the recipe's controls; the teachers default to the paper's three. An unfinished run resumes.
    """
    from probing.recipe import ProbeRunRecipe, read_yaml

    values = read_yaml(recipe_file) if recipe_file else {}
    if "teachers" not in values:
        options["teachers"] = options["teachers"] or teacher_values(PAPER_TEACHERS)
    controls = options.pop("controls")
    recipe = build_recipe(ProbeRunRecipe, values, options, overrides, str(recipe_file or "command line"))
    recipe.controls = [*recipe.controls, *controls]
    recipe = recipe.with_absolute_paths()
    if dry_run:
        from analysis.planning.probe_training import plan_training
        from probing.utils.distributed import world_size

        print_plan(plan_training(recipe, out, world_size()))
        return
    from probing.training.run import train

    run = train(recipe, out)
    click.echo(f"probes: {run.path / 'probes'}; next: probing evaluate {run.path}")


@click.command(cls=FieldCommand, model="analysis.evaluation.options:Options")
@click.argument("run", type=click.Path(path_type=Path))
@DRY_RUN
def evaluate(run: Path, dry_run: bool, **options: Any) -> None:
    """Score probes on held-out images.

    Writes results.csv. Scores with identical settings are reused; an interrupted evaluation resumes.
    """
    from analysis.evaluation.options import Options

    selected = build_recipe(Options, {}, options)
    if dry_run:
        from analysis.planning.evaluation import plan_evaluation

        print_plan(plan_evaluation(run, selected))
        return
    from analysis.evaluation.run import evaluate

    click.echo(f"results: {evaluate(run, selected)}; next: probing report {run}")


@click.command(cls=FieldCommand, model="analysis.erasure.options:Options")
@click.argument("run", type=click.Path(path_type=Path))
@DRY_RUN
def erase(run: Path, dry_run: bool, **options: Any) -> None:
    """Measure whether the model uses what probes read.

    At each layer, LEACE (fitted on training images) erases what can be read linearly of a teacher's feature, and the
    forward pass continues. Measures how much worse answers about held-out images, by default captions, are predicted.
    Controls erase a random subspace of the same rank and change, and the features of other images. After the last layer
    only the head follows, so image tokens have no effect there. Adds to results.csv.
    """
    from analysis.erasure.options import Options

    selected = build_recipe(Options, {}, options)
    if dry_run:
        from analysis.planning.erasure import plan_erasure

        print_plan(plan_erasure(run, selected))
        return
    from analysis.erasure.run import erase

    click.echo(f"results: {erase(run, selected)}; next: probing report {run}")


@click.command()
@RUNS
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the report.")
@FIGURES
def compare(runs: tuple[Path, ...], out: Path, figures: bool) -> None:
    """Compare runs by paired differences.

    RUNS are evaluated runs of probing train, runs of probing align or probing bench, or folders with one run per
    training seed; the first is the reference. Runs of probing bench are compared question by question. Writes an HTML
    report.
    """
    import pandas as pd

    from analysis.alignment.headlines import HEADLINE_METRICS
    from analysis.benchmarks.compare import answer_statements
    from analysis.evaluation.compare import DETAILS, statements
    from probing.api import paired_differences
    from reports.page import check_report_paths, write_report

    check_report_paths(runs, out)
    differences, answers = paired_differences(runs)
    sentences, shown = [], []
    if differences is not None:
        sentences = statements(differences, HEADLINE_METRICS)
        shown = statements(differences[~differences["metric"].isin(DETAILS)], HEADLINE_METRICS)
    for sentence in [*shown, *([] if answers is None else answer_statements(answers))]:
        click.echo(sentence)
    both = pd.concat([differences, answers])
    page = write_report(runs, out, both, sentences, "screen" if figures else None)
    click.echo(f"report, with all differences: {page}")


@click.command()
@RUNS
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the report. Default: report/ in the first run.")
@FIGURES
@STYLE
@OPEN
def report(
    runs: tuple[Path, ...], out: Path | None, figures: bool, style: Literal["screen", "paper"] | None, show: bool
) -> None:
    """Write the HTML report.

    One page that needs no network. The order of RUNS sets colours and markers of checkpoints.
    """
    from reports.page import write_report

    style = style or ("screen" if figures else None)
    print_page(write_report(runs, out or runs[0] / "report", style=style), show)
