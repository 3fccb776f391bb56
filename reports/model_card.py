"""The card of a published run: README.md with the front matter that the Hub reads, and its figures."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from huggingface_hub import ModelCardData
from matplotlib.figure import Figure

from analysis.evaluation.metrics.frechet import is_distance
from probing.hub.sanitize import elsewhere
from probing.recipe import read_yaml
from probing.runs.manifest import PACKAGES
from probing.teachers.registry import CATALOGUE
from probing.utils.paths import ELSEWHERE
from reports.charts import PROBES, SHOWN, layer_figure
from reports.results import AVERAGE, FRECHET, KERNEL, TITLES, RunResults, best_layer, load_runs, metric_label
from reports.summary import METRIC, PROTOCOL, convergence, random_control, teacher_finding

OPEN_LICENCE = "other"
"""What the Hub calls a licence that is none of its list, as long as nobody has said which."""
NOT_STATED = "not stated"
TAGS = ("probing", "interpretability", "multimodal", "vision-language-model")
SAVED_WITH = PACKAGES[0]
MEANINGS = {
    ("cosine_centred", "strict"): "mean over tokens of the cosine per token, after the training split's mean target is "
    "taken from prediction and target; 0 is what a constant scores.",
    (
        "cosine",
        "strict",
    ): "mean over tokens of the cosine per token; most of it is the mean target, which stands beside.",
    (
        "cosine",
        "paper",
    ): "one cosine over the flattened feature of an image, as the paper's released evaluation has it.",
    (
        "da2k",
        "strict",
    ): "share of DA-2K's pairs ordered rightly by the depth teacher's decoder, at the image's own size; "
    "ties count half, so a constant scores one half.",
    ("miou", "blind"): "one confusion matrix over the split; a constant in place of the image's own early stages.",
    (
        "miou",
        "strict",
    ): "one confusion matrix over the split; the decoder sees the image's own early stages, so even the "
    "mean target scores high.",
    ("miou", "paper"): "mean over images, early stages shrunk, as the paper's released evaluation has it.",
    ("fid", "strict"): "Fréchet distance of Inception features, generated images from real ones, seen as squares; "
    "jackknife interval over groups of images.",
    ("kid", "strict"): "kernel distance of the same features; the range is that of its sub-samples.",
}
"""The protocol of every metric, in a line."""
OTHER_NETWORK = "the same distance between the features of the network that is named, not of Inception."


def write_card(folder: Path, repo: str, licence: str = OPEN_LICENCE) -> None:
    """Writes README.md and `figures/` of a published run, from what lies in its folder and nothing else.

    Args:
        folder: as `probing.hub.sanitize.clean_copy` leaves it.
        repo: what it will be called.
        licence: of the probes, as the Hub names licences.

    Raises:
        UserError: results, curves or manifest cannot be read.
    """
    run = load_runs([folder])[0]
    recipe, manifest = read_yaml(folder / "recipe.yaml"), run.manifest
    measures = sorted(_measures(run), key=lambda measure: measure != (METRIC, PROTOCOL))
    (folder / "figures").mkdir()
    figures = [_figure(layer_figure([run], *measure), folder, *measure) for measure in measures]
    places = [f"{field}={'coco:' if field == 'data.path' else ''}PATH/{name}" for field, name in elsewhere(recipe)]
    own = repo.rsplit("/", 1)[-1]
    teachers = [
        {"name": name, "place": _place(teacher["id"]), **{key: teacher[key] for key in ("class", "shape", "sha256")}}
        for name, teacher in manifest["teachers"].items()
    ]
    first = run.curve(run.teachers[0], "resampler", "none", *measures[0], with_empty=True)
    text = _template().render(
        name=_escaped(manifest["checkpoint"]["name"]),
        repo=repo,
        folder=own,
        places=" ".join(_quoted(place) for place in places),
        left_out="; ".join(f"{what} {', '.join(n)}" for what, n in manifest.get("left_out", {}).items() if n),
        checkpoint={**manifest["checkpoint"], "place": _place(manifest["checkpoint"]["path"])},
        prompt=manifest["prompt"],
        teachers=teachers,
        data={**manifest["data"], "place": _place(manifest["data"]["path"].removeprefix("coco:"))},
        preprocessing=manifest["preprocessing"],
        training=_training(manifest),
        skipped=f"{len(manifest['skipped'])} images, named in `manifest.json`" if manifest["skipped"] else "no image",
        figures=figures,
        tables=[_table(run, *measure) for measure in measures],
        seeds=len(manifest["fit"]["seeds"]),
        controls=[*_found(run, measures), *random_control(run)],
        convergence=convergence(run),
        example={"layer": first["layer"].iloc[0], "teacher": run.teachers[0]},
        steps_to_make=_commands(run, recipe, own, places),
        notes=_notes(run),
        licences=_licences(manifest),
        versions=manifest["versions"],
    )
    (folder / "README.md").write_text(_front_matter(manifest, licence) + text.rstrip() + "\n", encoding="utf-8")


def _measures(run: RunResults) -> list[tuple[str, str]]:
    """Metric and protocol of whatever a layer was scored with."""
    of_layers = run.results[run.results["layer"] != ""]
    there = set(zip(of_layers["metric"], of_layers["protocol"], strict=True))
    return [measure for measure in run.measures if measure in there]


def _front_matter(manifest: dict[str, Any], licence: str) -> str:
    checkpoint, data = manifest["checkpoint"], manifest["data"]["path"].removeprefix("coco:")
    unnamed = licence == OPEN_LICENCE
    front = ModelCardData(
        library_name=SAVED_WITH,
        tags=[*TAGS, *dict.fromkeys([re.sub(r"\W+", "-", checkpoint["family"]), *manifest["teachers"]])],
        license=licence,
        license_name="not-stated" if unnamed else None,
        license_link="README.md" if unnamed else None,
        base_model=None if checkpoint["path"].startswith(ELSEWHERE) else checkpoint["path"],
        datasets=[data.removeprefix(ELSEWHERE)],
    )
    return f"---\n{front.to_yaml()}\n---\n\n"


def _place(source: str) -> str:
    """Where something comes from, as a reader elsewhere may be told."""
    return f"{source.removeprefix(ELSEWHERE)} (not on the Hub)" if source.startswith(ELSEWHERE) else source


def _figure(figure: Figure, folder: Path, metric: str, protocol: str) -> dict[str, str]:
    name = f"figures/layers_{re.sub(r'[^0-9A-Za-z_.-]', '_', f'{metric}_{protocol}')}.png"
    figure.savefig(folder / name, dpi=130, metadata={"Software": None})
    title = metric_label(metric, protocol)
    return {"file": name, "title": _escaped(title), "alt": _escaped(f"{title} by layer")}


def _table(run: RunResults, metric: str, protocol: str) -> dict[str, Any]:
    """A row per teacher and probe: the best layer, layer 0 and the mean, with the controls beside."""
    head = ["teacher, probe", "best layer", "value there", "layer 0", "mean", "random weights, best", "shuffled, best"]
    rows = []
    for teacher in run.teachers_of(metric, protocol):
        for probe, name in PROBES.items():
            curve = run.curve(teacher, probe, "none", metric, protocol)
            if curve.empty:
                continue
            best = best_layer(curve, metric)
            zero = curve[curve["layer"] == "0"]
            controls = [run.curve(teacher, probe, control, metric, protocol) for control in ("random", "shuffled")]
            cells = [best, zero.iloc[0] if len(zero) else None, run.average(teacher, probe, "none", metric, protocol)]
            cells += [best_layer(one, metric) if len(one) else None for one in controls]
            outside = [run.mean_target(teacher, metric, protocol), run.own_feature(teacher, metric, protocol)]
            rows.append(
                [f"{TITLES.get(teacher, _escaped(teacher))}, {name}", best["layer"]]
                + [_cell(cell, metric) for cell in cells]
                + ["" if value is None else _number(value, metric) for value in outside]
                + [str(int(best["n"]))]
            )
    meaning = MEANINGS.get((metric, protocol), OTHER_NETWORK)
    title = f"{metric_label(metric, protocol)} ({protocol}){', less is better' if is_distance(metric) else ''}"
    return {
        "title": _escaped(title),
        "meaning": meaning,
        "head": [*head, "mean target", "teacher's own feature", "n"],
        "rows": rows,
    }


def _cell(row: pd.Series | None, metric: str) -> str:
    if row is None:
        return ""
    value, low, high = (_number(row[name], metric) for name in ("value", "ci_low", "ci_high"))
    return f"{value} [{low}, {high}]"


def _number(value: float, metric: str) -> str:
    return f"{value:.{1 if is_distance(metric) else 3}f}"


def _training(manifest: dict[str, Any]) -> str:
    fit = manifest["fit"]
    how = f"{fit['steps']} steps of {fit['batch_size']}, AdamW at {fit['lr']}" if "steps" in fit else ""
    if fit.get("imported"):
        return f"elsewhere, and imported{f' ({how})' if how else ''}"
    return f"{how}, epochs {fit['epochs']}, smooth L1, seeds {', '.join(map(str, fit['seeds']))}"


def _found(run: RunResults, measures: Sequence[tuple[str, str]]) -> list[str]:
    if (METRIC, PROTOCOL) not in measures:
        return []
    return [
        f"{TITLES.get(teacher, teacher)}: {sentence}"
        for teacher in run.teachers_of(METRIC, PROTOCOL)
        for sentence in teacher_finding(run, teacher).sentences
    ]


def _commands(run: RunResults, recipe: dict[str, Any], name: str, places: Sequence[str]) -> list[str]:
    """What to type to make it again; scores add up over calls of `probing evaluate`."""
    out, given = f"runs/{name}", " ".join(_quoted(place) for place in places)
    first = f"probing train --recipe recipe.yaml --out {out} {given}".rstrip()
    if run.manifest["fit"].get("imported"):
        kept = {place.partition("=")[0]: place.partition("=")[2] for place in places}
        checkpoint = kept.get("backbone.checkpoint", recipe["backbone"]["checkpoint"])
        rest = [_quoted(place) for place in places if place.startswith("teachers.")]
        first = " ".join(["probing import", checkpoint, out, "--data", kept.get("data.path", "coco:DIR"), *rest])
    lines = [first]
    own = run.results[run.results["layer"] != AVERAGE]
    for metric, rows in own.groupby(own["metric"].map(_asked), sort=False):
        lines.append(_evaluation(run, recipe, str(metric), rows, out))
    return lines


def _asked(metric: str) -> str:
    """The `--metric` that a number comes from."""
    if metric.startswith((FRECHET, KERNEL)):
        return "frechet"
    return {"cosine_centred": "cosine", "kid": "fid"}.get(metric, metric)


def _evaluation(run: RunResults, recipe: dict[str, Any], metric: str, rows: pd.DataFrame, out: str) -> str:
    line = f"probing evaluate {out} --metric {metric}"
    line += {"da2k": " --da2k PATH/DA-2K", "frechet": " --extractor PATH/NETWORK"}.get(metric, "")
    probed = rows[rows["layer"] != ""]
    layers = list(dict.fromkeys(probed["layer"]))
    if set(layers) != set(run.results["layer"]) - {"", AVERAGE}:
        line += f" --layers {','.join(layers)}"
    generated = metric in ("fid", "frechet")
    probes, controls = list(dict.fromkeys(probed["probe"])), list(dict.fromkeys(probed["control"]))
    usual = ["resampler"] if generated or not recipe["fit"]["ridge"] else list(PROBES)
    if set(probes) != set(usual):
        line += "".join(f" --probe {probe}" for probe in probes)
    if set(controls) != ({"none"} if generated else {"none", *recipe["controls"]}):
        line += "".join(f" --control {control}" for control in controls)
    # A flattened cosine is a protocol of its own; where one is missing, it was not asked for.
    protocols = set(rows["protocol"])
    every = {protocol for name, protocol in MEANINGS if _asked(name) == metric} or protocols
    if protocols != every:
        line += "".join(f" --protocol {protocol}" for protocol in sorted(protocols))
    number = int(rows["n"].max())
    return line + (
        f" --images {number}" if metric != "cosine" and number != run.manifest["data"]["eval_images"] else ""
    )


def _notes(run: RunResults) -> list[str]:
    notes = []
    if any(is_distance(metric) for metric, _ in run.measures):
        notes.append(
            "Steps and guidance of the diffusion are not kept with the scores; the command has the usual ones, "
            "25 and 10, unless --steps and --guidance said otherwise."
        )
    if set(SHOWN) & set(run.results["control"]):
        notes.append("The controls blank, other and caption show the checkpoint something in place of the image.")
    return notes


def _licences(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """Of checkpoint and teachers, as far as the catalogue has them."""
    stated = [(f"checkpoint {_place(manifest['checkpoint']['path'])}", NOT_STATED)]
    for name, teacher in manifest["teachers"].items():
        known = CATALOGUE[name].licences if name in CATALOGUE else {}
        stated.append((f"{name} teacher {_place(teacher['id'])}", known.get(teacher["id"], NOT_STATED)))
    return stated


def _escaped(text: str) -> str:
    """Text that Markdown takes for nothing but text, in one line."""
    return re.sub(r"([\\`*_\[\]<>|#$])", r"\\\1", " ".join(str(text).split()))


def _quoted(argument: str) -> str:
    """An argument as a shell takes it."""
    return argument if re.fullmatch(r"[\w./:=,@+-]+", argument) else "'" + argument.replace("'", "'\\''") + "'"


def _template() -> jinja2.Template:
    folder = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(loader=folder, trim_blocks=True, lstrip_blocks=True)  # Markdown
    environment.filters |= {"cell": _escaped, "text": _escaped}
    return environment.get_template("card.md")
