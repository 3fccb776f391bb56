"""The verbs of probes: `probing train`, `evaluate`, `compare` and `report`."""

from pathlib import Path
from typing import Any, Literal

import click

from probing.cli.options import DRY_RUN, TARGET_CACHE, evaluation, evaluation_options, quiet_libraries, teacher_values
from probing.utils.errors import UserError

TEACHERS = ("depth", "seg", "gen")


@click.command()
@click.option("--recipe", "recipe_file", type=click.Path(path_type=Path), help="Recipe to start from.")
@click.option("--checkpoint", help="Folder or Hub id of the checkpoint.")
@click.option("--data", help="coco:DIR, a folder in COCO's official layout.")
@click.option(
    "--teacher",
    "teacher_options",
    multiple=True,
    metavar="NAME[=ID]",
    help="depth, seg or gen, or any other name for a plain vision encoder, with its folder or Hub id, e.g. "
    "dino=facebook/dinov2-large; repeat. By default all three of the paper.",
)
@click.option("--layers", help="all, or a list such as 0,4,8-12,final.")
@click.option(
    "--control",
    "controls",
    multiple=True,
    type=click.Choice(["shuffled", "random"]),
    help="Trained control besides those of the recipe; repeat. shuffled is on by default.",
)
@TARGET_CACHE
@DRY_RUN
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Run directory; an unfinished run goes on.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def train(
    recipe_file: Path | None,
    checkpoint: str | None,
    data: str | None,
    teacher_options: tuple[str, ...],
    layers: str | None,
    controls: tuple[str, ...],
    target_cache: str | None,
    dry_run: bool,
    out: Path,
    overrides: tuple[str, ...],
) -> None:
    """Train the probes of every layer and teacher in one pass.

    KEY=VALUE sets any field of the recipe, e.g. fit.lr=3e-3 fit.batch_size=64 fit.seeds=[0,1,2].
    """
    from probing.recipe import ProbeRunRecipe, apply_overrides, read_yaml, validate

    values: dict[str, Any] = read_yaml(recipe_file) if recipe_file else {}
    for section in ("backbone", "data"):
        if not isinstance(values.setdefault(section, {}), dict):
            raise UserError(f"{recipe_file}: {section} is {values[section]!r} and not a section; see examples/")
    if checkpoint:
        values["backbone"]["checkpoint"] = checkpoint
    if data:
        values["data"]["path"] = data
    if target_cache:
        values.setdefault("data", {})["target_cache"] = target_cache
    if layers:
        values["layers"] = layers
    if controls:
        there = values.get("controls", ["shuffled"])
        values["controls"] = [*(there if isinstance(there, list) else [there]), *controls]
    if teacher_options or "teachers" not in values:
        values["teachers"] = teacher_values(teacher_options or TEACHERS)
    apply_overrides(values, overrides)
    for section, field, option in (("backbone", "checkpoint", "--checkpoint"), ("data", "path", "--data")):
        if field not in values[section]:
            raise UserError(f"no {section}.{field}; give {option} or --recipe")
    recipe = validate(ProbeRunRecipe, values, str(recipe_file or "command line")).with_absolute_paths()
    quiet_libraries()
    if dry_run:
        from analysis.planning.plan import Devices
        from analysis.planning.probe_training import plan_training
        from probing.utils.distributed import started

        click.echo("\n".join(plan_training(recipe, out, started()).lines(Devices(started()))))
        return
    from probing.training.run import train as train_run

    run = train_run(recipe, out)
    click.echo(f"probes: {run.path / 'probes'}; next: probing evaluate {run.path}")


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@DRY_RUN
@evaluation_options
def evaluate(run: Path, dry_run: bool, **options: Any) -> None:
    """Score the probes of RUN on held-out images; writes results.csv.

    Scores with identical settings are reused; interrupted evaluations resume.
    """
    quiet_libraries()
    if dry_run:
        from analysis.planning.evaluation import plan_evaluation
        from analysis.planning.plan import Devices

        click.echo("\n".join(plan_evaluation(run, evaluation(options)).lines(Devices())))
        return
    from analysis.evaluation.run import evaluate as evaluate_run

    results = evaluate_run(run, evaluation(options))
    click.echo(f"results: {results}; next: probing report {run}")


@click.command()
@click.argument("runs", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the comparison's report.")
def compare(runs: tuple[Path, ...], out: Path) -> None:
    """Paired differences of every two RUNs, per teacher and layer, and a report of them all.

    RUNs are all evaluated ones with probes, or all of probing align, or folders of such runs, whose checkpoints differ
    by their seed. Runs of probing bench may stand among them, or alone: every two of one benchmark are compared
    question by question.
    """
    quiet_libraries()
    import pandas as pd

    from analysis.alignment.headlines import HEADLINE_METRICS
    from analysis.benchmarks.compare import answer_statements, compare_answers
    from analysis.evaluation.compare import compare as compare_runs
    from analysis.evaluation.compare import statements
    from probing.runs.directory import is_alignment, is_benchmark
    from reports.alignment import load_alignments
    from reports.benchmarks import arm_labels, load_benchmarks
    from reports.page import require_apart, write_report
    from reports.results import load_runs

    require_apart(runs, out)
    asked = [run for run in runs if is_benchmark(run)]
    others = [run for run in runs if run not in asked]
    if len(others) == 1 and asked:
        raise UserError(f"{others[0]} is the only run with probes; give another to compare it with, or leave it out")
    load_benchmarks(asked)  # what is missing for the page is said before the work
    tables, sentences, of_answers = [], [], []
    if asked:
        tables.append(compare_answers(asked, arm_labels(asked)))
        of_answers = answer_statements(tables[-1])
    if others:
        labels = [run.label for run in (load_alignments(others) if is_alignment(others[0]) else load_runs(others))]
        tables.insert(0, compare_runs(others, labels))
        sentences = statements(tables[0], HEADLINE_METRICS)
    for sentence in [*sentences, *of_answers]:
        click.echo(sentence)
    click.echo(f"report: {write_report(list(runs), out, pd.concat(tables), sentences)}")


@click.command()
@click.argument("runs", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder of the report; by default report/ in the first run."
)
@click.option(
    "--style",
    type=click.Choice(["screen", "paper"]),
    default="screen",
    help="Figures as PNG, SVG and PDF, or as SVG and PDF in the column widths of a paper (3.25 and 6.75 inches).",
)
def report(runs: tuple[Path, ...], out: Path | None, style: Literal["screen", "paper"]) -> None:
    """One self-contained page of one or more RUNs, with plots as files beside it.

    The order of the RUNs gives the checkpoints their colours and markers, in the page and in every figure.
    """
    from reports.page import write_report

    page = write_report(list(runs), out or runs[0] / "report", style=style)
    click.echo(f"report: {page}")
