"""Options that verbs of the command line share, and what becomes of them; like the verbs, it imports late."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from analysis.evaluation.registry import metrics
from probing.utils.errors import UserError

if TYPE_CHECKING:
    from analysis.evaluation.options import Options

F = TypeVar("F", bound=Callable[..., None])

TARGET_CACHE = click.option(
    "--target-cache",
    metavar="off|auto|DIR",
    help="Keep the teachers' features on disk: auto is the user's cache folder, if there is room. Default: off, or as "
    "in training.",
)
DRY_RUN = click.option(
    "--dry-run", is_flag=True, help="Check what is given, say what would be done, and write nothing."
)
EVALUATION_OPTIONS = (
    click.option(
        "--metric",
        "metrics",
        multiple=True,
        type=click.Choice(list(metrics())),
        help=f"{'; '.join(f'{name}: {metric.help}' for name, metric in metrics().items())}. Repeat for several. "
        "Default: cosine.",
    ),
    click.option(
        "--protocol",
        "protocols",
        multiple=True,
        type=click.Choice(["strict", "paper", "blind"]),
        help="For the metrics that have it; the others, and without, all that a metric has.",
    ),
    click.option("--layers", help="Some of the probed layers, such as 0,4,8-12,final. Default: all."),
    click.option(
        "--probe",
        "probes",
        multiple=True,
        type=click.Choice(["resampler", "ridge"]),
        help="Default: both; for fid and frechet the resampler.",
    ),
    click.option(
        "--control",
        "controls",
        multiple=True,
        type=click.Choice(["none", "shuffled", "random", "blank", "other", "caption"]),
        help="no is the checkpoint itself. Default: all the run has; for fid and frechet no. blank, other and caption "
        "show the checkpoint a grey image, the next one, or the caption as text in place of the image.",
    ),
    click.option("--images", type=click.IntRange(1), help="Images per decoded metric. Default: all."),
    click.option("--da2k", type=click.Path(path_type=Path), help="Folder in DA-2K's layout, for --metric da2k."),
    click.option(
        "--inception-weights",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        help="pytorch-fid's weights, for --metric fid. Default: download.",
    ),
    click.option("--extractor", help="Image classifier (folder or Hub id) whose features --metric frechet compares."),
    click.option("--steps", type=click.IntRange(1), default=25, show_default=True, help="Diffusion steps per image."),
    click.option("--guidance", type=click.FloatRange(1), default=10.0, show_default=True, help="Diffusion guidance."),
    click.option(
        "--pictures",
        type=click.IntRange(0),
        default=4,
        show_default=True,
        help="Images to draw at every layer, where a metric is decoded.",
    ),
    click.option("--micro-batch", type=click.IntRange(1), help="Images per forward pass. Default: as in training."),
    TARGET_CACHE,
)


def evaluation_options(verb: F) -> F:
    """Options that say what to score, for the verbs that do it or say what it costs."""
    for option in reversed(EVALUATION_OPTIONS):
        verb = option(verb)
    return verb


def evaluation(options: dict[str, Any]) -> "Options":
    """What `evaluation_options` say."""
    from analysis.evaluation.options import Options

    return Options(**options | {"metrics": tuple(dict.fromkeys(options["metrics"])) or ("cosine",)})


def teacher_values(options: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """Section `teachers` of a recipe, from `--teacher NAME[=ID]`.

    Raises:
        UserError: a name of its own has no id, or is given twice.
    """
    from probing.teachers.registry import CATALOGUE

    values: dict[str, dict[str, str]] = {}
    for option in options:
        name, _, identifier = option.partition("=")
        if name not in CATALOGUE and not identifier:
            raise UserError(
                f"no teacher is called {name!r}; there are {', '.join(CATALOGUE)}, and any vision encoder: --teacher "
                f"{name or 'NAME'}=FOLDER_OR_HUB_ID"
            )
        if name in values:
            raise UserError(f"two teachers are called {name!r}; give each a name of its own, such as {name}2=…")
        values[name] = {"id": identifier or CATALOGUE[name].default_id}
    return values


def quiet_libraries() -> None:
    """Loading bars of every tiny model would bury the program's own lines."""
    import warnings

    from transformers.utils import logging as transformers_logging

    import probing.utils.torchvision_shim  # noqa: F401

    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def as_lines(values: dict[str, Any]) -> str:
    """Formats a description as lines of name and value."""
    lines = []
    for name, value in values.items():
        if isinstance(value, dict):
            value = ", ".join(f"{inner} {part}" for inner, part in value.items())
        elif isinstance(value, list):
            value = " x ".join(map(str, value))
        elif isinstance(value, str) and ("\n" in value or name == "prompt"):
            value = json.dumps(value)
        lines.append(f"{name.replace('_', ' '):<16}{value}")
    return "\n".join(lines)
