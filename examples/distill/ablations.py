"""Writes the commands of one ablation of the paper as a shell script.

    python examples/distill/ablations.py "Table 5" runs/table5 | bash
    python examples/distill/ablations.py "Table 5" runs/table5 --toy | bash

Every row of ablations.md becomes a checkpoint (pt, then ift) and a run with probes at every layer. At the end all are
compared with the baseline, which has no embedding losses. The script can be repeated: finished steps are not repeated.
On a cluster, pass each command to examples/cluster/job.sh.
"""

import os
import re
import shlex
from pathlib import Path

import click
import yaml

HERE = Path(os.path.relpath(Path(__file__).parent))
BASELINE = "baseline"
EMBEDDING = re.compile("section `embedding`|that section")
"""Matches the ift column of rows that have the losses in ift too."""


def rows(table: str, toy: bool) -> dict[str, tuple[list[str], str]]:
    """Returns the rows of a table: name → overrides of pt, and text of column ift.

    Raises:
        click.ClickException: there is no such table.
    """
    lines = [line.split("|") for line in (HERE / "ablations.md").read_text(encoding="utf-8").splitlines()]
    lines = [cells for cells in lines if len(cells) == 6 and "`" in cells[2]]
    found = {}
    for _, name, full, small, ift, _ in lines:
        if name.strip().startswith(f"{table}, "):
            text = name.strip().removeprefix(f"{table}, ").removesuffix("(default)").strip()
            label = re.sub(r"\W+", "_", text).strip("_")
            found[label] = (re.findall("`([^`]+)`", small if toy else full), ift.strip())
    if not found:
        known = sorted({cells[1].strip().partition(",")[0] for cells in lines})
        raise click.ClickException(f"ablations.md has no {table!r}; there are {', '.join(known)}")
    return found


def embedding_overrides(recipe: Path) -> list[str]:
    """Returns section `embedding` of a pt recipe as an override for ift."""
    section = yaml.safe_load(recipe.read_text(encoding="utf-8"))["embedding"]
    return [f"embedding={yaml.safe_dump(section, default_flow_style=True, sort_keys=False, width=10_000).strip()}"]


def commands(table: str, out: Path, toy: bool) -> list[list[str]]:
    """Returns the commands in order."""
    recipes = HERE.parent / ("toy" if toy else "distill")
    probe = HERE.parent / ("toy/fig3.yaml" if toy else "probe/fig3_row1.yaml")
    arms = {BASELINE: (["embedding=null"], "")} | rows(table, toy)
    script = []
    for name, (overrides, ift) in arms.items():
        first, last, run = out / f"{name}-pt", out / name, out / "runs" / name
        more = embedding_overrides(recipes / "ola_pt.yaml") if EMBEDDING.search(ift) else []
        more += re.findall("`(train_special_tokens=[a-z]+)`", ift)
        script.append(["probing", "distill", str(recipes / "ola_pt.yaml"), "--out", str(first), *overrides])
        script.append(
            ["probing", "distill", str(recipes / "ift.yaml"), "--out", str(last), f"checkpoint={first}", *more]
        )
        script.append(["probing", "train", "--recipe", str(probe), "--checkpoint", str(last), "--out", str(run)])
        script.append(["probing", "evaluate", str(run)])
    script.append(["probing", "compare", *(str(out / "runs" / name) for name in arms), "--out", str(out / "report")])
    return script


@click.command()
@click.argument("table")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--toy", is_flag=True, help="Use the toy world. First run: probing demo --preset full --out runs/full")
def main(table: str, out: Path, toy: bool) -> None:
    """Writes the commands for TABLE of ablations.md, with all output below OUT."""
    click.echo("set -e")
    for command in commands(table, out, toy):
        click.echo(shlex.join(command))


if __name__ == "__main__":
    main()
