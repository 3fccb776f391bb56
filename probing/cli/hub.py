"""The verbs `probing push`, `pull` and `import`."""

from functools import partial
from pathlib import Path

import click

from probing.cli.options import OVERRIDES


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option("--license", "licence", help="Licence of the probes, by its name on the Hub, such as apache-2.0.")
@click.option("--private", is_flag=True, help="Make a new repository private.")
def push(run: Path, repo: str, licence: str | None, private: bool) -> None:
    """Publish an evaluated run with a model card.

    REPO is USER/NAME on the Hub or a folder such as ./NAME. Uploads probes, controls, scores and results, no images, no
    training state. Local paths become elsewhere:NAME. A repository that holds anything but this run is refused.
    """
    from probing.hub.push_pull import push as push_run
    from reports.model_card import write_card

    url = push_run(run, repo, partial(write_card, licence=licence), private)
    click.echo(f"published: {url}; next: probing pull {repo} DIR")


@click.command()
@click.argument("repo")
@click.argument("out", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--layer", "layers", multiple=True, help="Keep this layer's probes, e.g. 12; repeatable. Default: all.")
@click.option("--teacher", "teachers", multiple=True, help="Download this teacher's probes; repeatable. Default: all.")
@OVERRIDES
def pull(repo: str, out: Path, layers: tuple[str, ...], teachers: tuple[str, ...], overrides: tuple[str, ...]) -> None:
    """Download a published run into DIR.

    REPO is USER/NAME on the Hub or a folder. Before evaluating the run, set the paths of this machine, now or by
    repeating the command with backbone.checkpoint=DIR data.path=coco:DIR teachers.depth.id=DIR
    """
    from probing.hub.push_pull import pull as pull_run

    run = pull_run(repo, out, layers, teachers, overrides)
    click.echo(f"probes: {run.path / 'probes'}; next: probing report {run.path}")


@click.command(name="import")
@click.argument("checkpoint")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--data", required=True, help="coco:DIR, a folder in COCO's official layout.")
@OVERRIDES
def import_(checkpoint: str, run: Path, data: str, overrides: tuple[str, ...]) -> None:
    """Turn the probes inside CHECKPOINT into a run.

    Reads the embedding predictors of probing distill, or OLA-VLM's published probes. KEY=VALUE sets fields of the run's
    recipe, e.g. data.eval_limit=500 or teachers.depth.id=DIR.
    """
    from probing.hub.import_probes import import_probes

    imported = import_probes(checkpoint, data, run, overrides)
    click.echo(f"probes: {imported.path / 'probes'}; next: probing evaluate {imported.path}")
