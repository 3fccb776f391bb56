"""The verbs that publish and take over runs: `probing push`, `pull` and `import`."""

from functools import partial
from pathlib import Path

import click

from probing.cli.options import quiet_libraries


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option("--license", "licence", default="other", show_default=True, help="Of the probes, as the Hub names it.")
@click.option("--private", is_flag=True, help="A repository that is made is seen by its owner alone.")
def push(run: Path, repo: str, licence: str, private: bool) -> None:
    """Publish RUN, trained and evaluated, with a model card: in REPO, USER/NAME on the Hub or a folder.

    Probes, readouts, controls, results and scores go there. Training state, pictures and features do not; folders of
    this machine are called elsewhere:NAME. What is there is replaced as a whole, if it is the same run.
    """
    from probing.hub.push_pull import push as push_run
    from reports.model_card import write_card

    place = push_run(run, repo, partial(write_card, licence=licence), private)
    click.echo(f"published: {place}; next: probing pull {repo} DIR")


@click.command()
@click.argument("repo")
@click.argument("out", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--layer", "layers", multiple=True, help="One alone, such as 12 or final; repeat. Default: all.")
@click.option("--teacher", "teachers", multiple=True, help="One alone; repeat. Default: all.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def pull(repo: str, out: Path, layers: tuple[str, ...], teachers: tuple[str, ...], overrides: tuple[str, ...]) -> None:
    """Make the run DIR of what was pushed to REPO, USER/NAME on the Hub or a folder, or of a part of it.

    KEY=VALUE says where things lie on this machine, which scoring needs: backbone.checkpoint=DIR data.path=coco:DIR
    teachers.depth.id=DIR. The same command with other values tells a run that is there already.
    """
    from analysis.evaluation.subset import copy_results
    from probing.hub.push_pull import pull as pull_run

    run = pull_run(repo, out, copy_results, layers, teachers, overrides)
    click.echo(f"probes: {run.path / 'probes'}; next: probing report {run.path}")


@click.command(name="import")
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
    from probing.hub.import_probes import find_probes, import_probes, import_recipe

    found = find_probes(checkpoint)
    made = import_probes(import_recipe(checkpoint, data, found, overrides), found, run)
    click.echo(f"probes: {made.path / 'probes'}; next: probing evaluate {made.path}")
