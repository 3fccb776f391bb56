"""Computes sentences that summarise the results."""

from dataclasses import dataclass

import pandas as pd

from reports.charts import INPUT_CONTROLS
from reports.results import RunResults, interval_text, teacher_title

METRIC, PROTOCOL = "cosine_centred", "strict"

STATES = {
    "still falling": "more steps would raise their scores",
    "stuck at the mean": "their score says nothing about the layer",
    "not trained": "no image had a finite loss, so they have no score",
}
"""States of probes that did not converge → meaning."""


@dataclass(frozen=True)
class Finding:
    """Sentences about one teacher of a run."""

    run: str
    teacher: str
    sentences: list[str]


def _overlap(a: pd.Series, b: pd.Series) -> bool:
    return bool(a["ci_low"] <= b["ci_high"] and b["ci_low"] <= a["ci_high"])


def teacher_finding(run: RunResults, teacher: str) -> Finding:
    """Describes best layer, trend, margin over the controls, and the ridge readout."""
    curve = run.curve(teacher, "resampler", "none", METRIC, PROTOCOL)
    if curve.empty:
        return Finding(run.label, teacher, ["No layer has a finite score."])
    best = curve.loc[curve["value"].idxmax()]
    sample = f"{int(best['n'])} images" + (f" and {run.manifest['runs']} runs" if "runs" in run.manifest else "")
    sentences = [f"Best layer: {best['layer']}, centred cosine {interval_text(best)}, over {sample}."]
    numbered = curve[curve["layer"] != "final"]
    if len(numbered) > 2:
        first, last = numbered.iloc[0], numbered.iloc[-1]
        if _overlap(first, last):
            change = f"does not clearly change ({first['value']:.3f} and {last['value']:.3f}; the intervals overlap)"
        else:
            direction = "rises" if last["value"] > first["value"] else "falls"
            change = f"{direction} from {first['value']:.3f} to {last['value']:.3f}"
        sentences.append(f"From layer {first['layer']} to layer {last['layer']} it {change}.")
    raw = run.curve(teacher, "resampler", "none", "cosine", PROTOCOL)
    mean = run.mean_target_score(teacher, "cosine", PROTOCOL)
    if len(raw) and mean is not None:
        below = raw[raw["ci_low"] <= mean]
        row = raw.loc[raw["value"].idxmax()]
        verdict = (
            "the intervals of all layers are above it"
            if below.empty
            else f"layers not clearly above it: {', '.join(below['layer'])}"
        )
        sentences.append(f"Best raw cosine {row['value']:.3f}; the mean target alone scores {mean:.3f}; {verdict}.")
    shuffled = run.curve(teacher, "resampler", "shuffled", METRIC, PROTOCOL)
    if len(shuffled):
        top = shuffled.loc[shuffled["value"].idxmax()]
        verdict = "the intervals overlap" if _overlap(best, top) else "the intervals do not overlap"
        sentences.append(f"Trained on shuffled pairs, the best probe scores {interval_text(top)}; {verdict}.")
    for control, (name, _) in INPUT_CONTROLS.items():
        controlled = run.curve(teacher, "resampler", control, METRIC, PROTOCOL)
        controlled = controlled[controlled["layer"] == best["layer"]]
        if len(controlled):
            score = interval_text(controlled.iloc[0])
            sentences.append(
                f"When the checkpoint is {name}, the same probe at layer {best['layer']} scores {score}: the "
                "difference came from the image."
            )
    ridge = run.curve(teacher, "ridge", "none", METRIC, PROTOCOL)
    if len(ridge):
        top = ridge.loc[ridge["value"].idxmax()]
        text = f"The ridge readout, which needs no training, is best at layer {top['layer']} with {interval_text(top)}"
        higher = top["ci_low"] > best["ci_high"]
        sentences.append(f"{text}: more than the resampler, which its training limits here." if higher else f"{text}.")
    return Finding(run.label, teacher, sentences)


def random_control(run: RunResults) -> list[str]:
    """Compares each teacher's probes with the random-weights control; says so if it was not run."""
    sentences = []
    for teacher in run.teachers:
        trained = run.curve(teacher, "resampler", "none", METRIC, PROTOCOL)
        random = run.curve(teacher, "resampler", "random", METRIC, PROTOCOL)
        if trained.empty or random.empty:
            continue
        best, best_random = (curve.loc[curve["value"].idxmax()] for curve in (trained, random))
        title = teacher_title(teacher)
        start = (
            f"{title}: with random weights in LLM and projector the best layer scores {interval_text(best_random)}; "
            f"the checkpoint's best scores {interval_text(best)}"
        )
        both = trained.merge(random, on="layer", suffixes=("", "_random"))
        above = int((both["ci_low"] > both["ci_high_random"]).sum())
        if best["ci_low"] > best_random["ci_high"]:
            end = f"Training helps: the checkpoint scores clearly higher at {above} of {len(both)} layers."
        else:
            clear = best_random["ci_low"] > best["ci_high"]
            verdict = "higher than the trained one" if clear else "as high as the trained one (the intervals overlap)"
            end = (
                f"A random network scores {verdict}: this curve alone does not show that training added the "
                "information, since untrained layers pass the image on too."
            )
        sentences.append(f"{start}. {end}")
    if not sentences:
        return [
            "Not run. A network with random weights often scores as high as a trained one; before interpreting a "
            "curve, add this control: probing train … --control random"
        ]
    return sentences


def _excluded_images(run: RunResults) -> list[str]:
    """Counts the images excluded from layers or teachers because their values are not finite."""
    rows = pd.DataFrame(run.manifest.get("not_finite", []))
    if rows.empty:
        return []
    sentences = []
    for (split, control, layers, teachers), part in rows.groupby(["split", "control", "layers", "teachers"]):
        where = [f"layers {layers}"] * bool(layers) + [f"the teachers {teachers}"] * bool(teachers)
        weights = " with random weights" if control == "random" else ""
        sentences.append(
            f"{part['image'].nunique()} images of {split}{weights} have non-finite values at {' and '.join(where)} "
            "and are excluded there; the manifest lists them."
        )
    return sentences


def convergence(run: RunResults) -> list[str]:
    """Lists probes that did not converge, and images excluded during training."""
    rows = pd.DataFrame(run.manifest["convergence"])
    if rows.empty:
        return ["Unknown: these probes were imported."]
    sentences = []
    for control, name in (("none", "of the checkpoint"), ("random", "of the random-weights control")):
        part = rows[rows["control"] == control]
        if part.empty:
            continue
        for state, meaning in STATES.items():
            affected = part[part["state"] == state]
            if len(affected):
                where = "; ".join(
                    f"{teacher} {', '.join(map(str, dict.fromkeys(group['layer'])))}"
                    for teacher, group in affected.groupby("teacher", sort=False)
                )
                sentences.append(
                    f"{len(affected)} of {len(part)} probes {name} were {state} at the end of training ({meaning}): "
                    f"{where}."
                )
        if not (part["state"] != "flat").any():
            sentences.append(f"The loss of all {len(part)} probes {name} was flat at the end of training.")
    return [
        *sentences,
        *_excluded_images(run),
        "A flat loss does not prove convergence: the learning rate decays to zero in any case. Only a run with more "
        "steps shows whether scores would rise.",
    ]
