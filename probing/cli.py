"""The command line. Each verb imports its own weight, so that `--help` answers at once."""

import logging
import os
import sys
from pathlib import Path
from typing import Any, Literal, NoReturn

import click

from probing import __version__
from probing.cli_hub import pull, push
from probing.cli_look import doctor, inspect, plan, teachers
from probing.cli_options import DRY_RUN, TARGET_CACHE, evaluation, evaluation_options, quiet_libraries, teacher_values
from probing.environment import prepare_environment
from probing.errors import UserError
from probing.interrupt import exit_interrupted, raise_on_signals

TEACHERS = ("depth", "seg", "gen")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="probing")
@click.option("--quiet", "-q", is_flag=True, help="Only warnings and errors.")
def cli(quiet: bool) -> None:
    """What does each layer of a multimodal LLM know about the picture?

    Start with `probing demo`. On your own checkpoint: train, evaluate, report.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    level = logging.WARNING if quiet else logging.INFO
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for package in ("probing", "analysis", "reports"):
        logging.getLogger(package).setLevel(level)


@cli.command()
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

    from probing.demo import run_demo
    from probing.run import disk_errors

    with disk_errors(out):
        page = run_demo(preset, out)
    click.echo(f"report: {page}")
    if show and not webbrowser.open(page.absolute().as_uri()):
        click.echo("no browser was found; open the report by hand", err=True)


@cli.command()
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
        from probing.rehearsal import rehearse_training

        click.echo("\n".join(rehearse_training(recipe, out)))
        return
    from probing.train import train as train_run

    run = train_run(recipe, out)
    click.echo(f"probes: {run.path / 'probes'}; next: probing evaluate {run.path}")


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@DRY_RUN
@evaluation_options
def evaluate(run: Path, dry_run: bool, **options: Any) -> None:
    """Score the probes of RUN on held-out images; writes results.csv.

    cosine: similarity with the teacher's features. The others go through the teacher's own decoder. da2k: accuracy on
    depth pairs. miou: mean IoU of the segmentation. fid: distance of generated images from real ones, with KID;
    frechet: the same between the features of another network.

    What was scored with the same settings is kept; an interrupted evaluation goes on.
    """
    quiet_libraries()
    if dry_run:
        from analysis.plan import rehearse_evaluation

        click.echo("\n".join(rehearse_evaluation(run, evaluation(options))))
        return
    from analysis.evaluate import evaluate as evaluate_run

    results = evaluate_run(run, evaluation(options))
    click.echo(f"results: {results}; next: probing report {run}")


@cli.command()
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

    from analysis.compare import compare as compare_runs
    from analysis.compare import statements
    from analysis.compare_answers import answer_statements, compare_answers
    from probing.run import is_alignment, is_benchmark
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
        sentences = statements(tables[0])
    for sentence in [*sentences, *of_answers]:
        click.echo(sentence)
    click.echo(f"report: {write_report(list(runs), out, pd.concat(tables), sentences)}")


@cli.command()
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


@cli.command()
@click.argument("recipe_file", type=click.Path(path_type=Path), metavar="RECIPE")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the new checkpoint.")
@DRY_RUN
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def distill(recipe_file: Path, out: Path, dry_run: bool, overrides: tuple[str, ...]) -> None:
    """Train a checkpoint: stage pt, vpt or ift of RECIPE. An interrupted stage goes on."""
    quiet_libraries()
    from probing.distill.recipe import DistillRecipe
    from probing.distill.train import rehearse_stage, run_stage
    from probing.recipe import load_recipe

    recipe = load_recipe(DistillRecipe, recipe_file, overrides)
    if dry_run:
        click.echo("\n".join(rehearse_stage(recipe, out)))
        return
    folder = run_stage(recipe, out)
    click.echo(f"checkpoint: {folder}; next: probing inspect {folder}")


@cli.command()
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
    from analysis.align import AlignRecipe, rehearse_alignment
    from analysis.align import align as align_checkpoint
    from probing.recipe import apply_overrides, validate

    values: dict[str, Any] = {"backbone": {"checkpoint": checkpoint}, "data": {"path": data}}
    values |= {"layers": layers} if layers else {}
    values["teachers"] = teacher_values(teacher_options)
    if images:
        values["data"]["eval_limit"] = images
    apply_overrides(values, overrides)
    recipe = validate(AlignRecipe, values, "command line").with_absolute_paths()
    if dry_run:
        click.echo("\n".join(rehearse_alignment(recipe, out)))
        return
    results = align_checkpoint(recipe, out)
    click.echo(f"results: {results}; next: probing report {out}")


@cli.command()
@click.argument("checkpoint")
@click.option(
    "--benchmark", required=True, type=click.Choice(["cvbench", "mmstar", "realworldqa", "okvqa"]), help="Which one."
)
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
    from analysis.bench import BenchRecipe
    from analysis.bench import bench as ask_benchmark
    from probing.recipe import apply_overrides, model_name, validate

    values: dict[str, Any] = {"backbone": {"checkpoint": checkpoint}, "benchmark": benchmark, "data": data}
    apply_overrides(values, overrides)
    out = out or Path("runs") / f"{model_name(checkpoint).rsplit('/', 1)[-1]}_{benchmark}"
    results = ask_benchmark(validate(BenchRecipe, values, "command line").with_absolute_paths(), out)
    click.echo(f"results: {results}; next: probing report RUN {out}")


@cli.command(name="import")
@click.argument("checkpoint")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--data", required=True, help="coco:DIR, a folder in COCO's official layout.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def import_(checkpoint: str, run: Path, data: str, overrides: tuple[str, ...]) -> None:
    """Make RUN of probes that CHECKPOINT brings: its embedding predictors, or OLA-VLM's published probes.

    They are then scored and decoded as any: probing evaluate RUN. KEY=VALUE sets any field of the run's recipe, e.g.
    data.eval_limit=500, or teachers.depth.id=DIR where a teacher has moved.
    """
    quiet_libraries()
    from probing.import_probes import find_probes, import_probes, import_recipe

    found = find_probes(checkpoint)
    made = import_probes(import_recipe(checkpoint, data, found, overrides), found, run)
    click.echo(f"probes: {made.path / 'probes'}; next: probing evaluate {made.path}")


for verb in (inspect, teachers, doctor, plan, push, pull):
    cli.add_command(verb)


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"probing: {' '.join(message.split())}", err=True)
    sys.exit(code)


def main() -> None:
    """Runs the command line.

    Exit codes: 2 and one line where the user can fix it, 130 and the command to resume after Ctrl-C or SIGTERM, 1 and a
    traceback for our faults.
    """
    raise_on_signals()
    prepare_environment()
    try:
        cli.main(prog_name="probing", standalone_mode=False)
    except UserError as error:
        _fail(str(error), 2)
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "probing"
        _fail(f"{error.format_message()} See: {path} --help", 2)
    except click.ClickException as error:
        _fail(error.format_message(), 2)
    except click.Abort as abort:
        if isinstance(abort.__cause__, EOFError):  # to click, the end of what a user types; to us, a file cut short
            raise abort.__cause__ from None
        exit_interrupted()
    except KeyboardInterrupt:
        exit_interrupted()
