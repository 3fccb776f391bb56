"""Writes the model card of a published run."""

import re
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from analysis.evaluation.registry import describe
from probing.utils.paths import ELSEWHERE
from reports.answer import answers, convergence
from reports.curves import PROBES
from reports.figures import layer_plot
from reports.results import AVERAGE, RunResults, best_layer, interval_text, load_runs, teacher_title

TAGS = ("probing", "interpretability", "multimodal", "vision-language-model")
FIGURE = "figures/layers.png"
TEMPLATE = Path(__file__).parent / "templates" / "card.md"


def write_card(folder: Path, repo: str, licence: str | None = None) -> None:
    """Writes `README.md` and a figure into a folder with the published files of a run.

    Args:
        folder: as `probing.hub.push_pull.push` prepares it.
        repo: Hub id, or name of the folder.
        licence: licence of the probes, by its name on the Hub.
    """
    run = load_runs([folder])[0]
    manifest, checkpoint = run.manifest, run.manifest["checkpoint"]
    measures = [measure for measure in run.measures if any(_rows(run, *measure))]
    if measures:
        (folder / FIGURE).parent.mkdir(exist_ok=True)
        layer_plot([run], *measures[0]).savefig(folder / FIGURE, dpi=130, metadata={"Software": None})
    card = ModelCard.from_template(
        ModelCardData(
            library_name="mllm-probing",
            tags=[*TAGS, *manifest["teachers"]],
            license=licence,
            base_model=None if checkpoint["path"].startswith(ELSEWHERE) else checkpoint["path"],
        ),
        template_path=str(TEMPLATE),
        repo=repo,
        name=_escaped(checkpoint["name"]),
        properties={name: _escaped(text) for name, text in _properties(run).items()},
        figure=FIGURE if measures else "",
        measure=describe(*measures[0]).label if measures else "",
        rows=[row for measure in measures for row in _rows(run, *measure)],
        notes=[_escaped(note) for note in [*(answer.sentence for answer in answers([run])), *convergence(run)]],
        teacher=(teacher := run.teachers[0]),
        layer=next(layer for layer in run.results[run.results["teacher"] == teacher]["layer"] if layer),
    )
    card.save(folder / "README.md")


def _properties(run: RunResults) -> dict[str, str]:
    """Describes checkpoint, teachers, data and training, by name."""
    checkpoint, data, fit = (run.manifest[name] for name in ("checkpoint", "data", "fit"))
    training = "imported" if fit.get("imported") else f"{fit['epochs']} epochs, seeds {fit['seeds']}"
    if "steps" in fit:
        training += f", {fit['steps']} steps of {fit['batch_size']}, lr {fit['lr']}"
    return {
        "checkpoint": f"{checkpoint['path']} ({checkpoint['family']}, {checkpoint['layers']} decoder blocks)",
        "weights": checkpoint["sha256"],
        "prompt": run.manifest["prompt"],
        **{
            f"teacher {name}": f"{teacher['id']}, target {' × '.join(map(str, teacher['shape']))}; {teacher['licence']}"
            for name, teacher in run.manifest["teachers"].items()
        },
        "training images": f"{data['train_images']} of {data['train_split']}",
        "held-out images": f"{data['eval_images']} of {data['eval_split']}",
        "training": training,
        "versions": ", ".join(f"{package} {version}" for package, version in run.manifest["versions"].items()),
    }


def _rows(run: RunResults, metric: str, protocol: str) -> Iterator[list[str]]:
    """Yields the scores of each teacher and probe: best layer, mean over layers, and references."""
    digits = describe(metric).digits
    for teacher in run.teachers_of(metric, protocol):
        for probe, title in PROBES.items():
            curve, random = (run.curve(teacher, probe, control, metric, protocol) for control in ("none", "random"))
            if curve.empty:
                continue
            best = best_layer(curve, metric)
            mean_target = run.mean_target_score(teacher, metric, protocol)
            yield [
                teacher_title(teacher),
                title,
                _escaped(describe(metric, protocol).label),
                str(best["layer"]),
                interval_text(best, digits),
                interval_text(run.row(teacher, probe, "none", metric, protocol, AVERAGE), digits),
                interval_text(None if random.empty else best_layer(random, metric), digits),
                "" if mean_target is None else f"{mean_target:.{digits}f}",
                str(int(best["n"])),
            ]


def _escaped(text: str) -> str:
    """Escapes Markdown and HTML, and removes line breaks."""
    return re.sub(r"([\\`*_\[\]<>|#$])", r"\\\1", " ".join(str(text).split()))
