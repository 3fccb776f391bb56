"""What the numbers say, in words; every sentence is computed."""

from dataclasses import dataclass

import pandas as pd

from reports.charts import SHOWN
from reports.results import RunResults, teacher_title

METRIC, PROTOCOL = "cosine_centred", "strict"

STATES = {
    "still falling": "more steps would raise them",
    "stuck at the mean": "their score says nothing about the layer",
    "not trained": "no image had a finite loss, so they have no score",
}
"""How a training may end besides flat, and what that means."""


@dataclass(frozen=True)
class Finding:
    """Sentences about one teacher of one run."""

    run: str
    teacher: str
    sentences: list[str]


def _number(row: pd.Series) -> str:
    return f"{row['value']:.3f} [{row['ci_low']:.3f}, {row['ci_high']:.3f}]"


def _apart(one: pd.Series, two: pd.Series) -> str:
    """Whether two intervals overlap, in words."""
    if one["ci_low"] > two["ci_high"] or two["ci_low"] > one["ci_high"]:
        return "the intervals do not overlap"
    return "the intervals overlap"


def teacher_finding(run: RunResults, teacher: str) -> Finding:
    """Best layer, trend, margin over the controls, and the ridge readout beside it."""
    curve = run.curve(teacher, "resampler", "none", METRIC, PROTOCOL)
    if curve.empty:
        return Finding(run.label, teacher, ["No layer has a finite number."])
    best = curve.loc[curve["value"].idxmax()]
    over = f"{int(best['n'])} images" + (f" and {run.manifest['runs']} runs" if "runs" in run.manifest else "")
    sentences = [f"Read best at layer {best['layer']}: centred cosine {_number(best)}, over {over}."]
    numbered = curve[curve["layer"] != "final"]
    if len(numbered) > 2:
        first, last = numbered.iloc[0], numbered.iloc[-1]
        if _apart(first, last).endswith("not overlap"):
            direction = "rises" if last["value"] > first["value"] else "falls"
            change = f"{direction} from {first['value']:.3f} to {last['value']:.3f}"
        else:
            change = f"ends where it began ({first['value']:.3f} and {last['value']:.3f}; the intervals overlap)"
        sentences.append(f"From layer {first['layer']} to layer {last['layer']} it {change}.")
    raw = run.curve(teacher, "resampler", "none", "cosine", PROTOCOL)
    mean = run.mean_target(teacher, "cosine", PROTOCOL)
    if len(raw) and mean is not None:
        below = raw[raw["ci_low"] <= mean]
        row = raw.loc[raw["value"].idxmax()]
        verdict = (
            "every layer is above it, interval included"
            if below.empty
            else f"not clearly above it: layers {', '.join(below['layer'])}"
        )
        sentences.append(f"Raw cosine at best {row['value']:.3f}; the mean target alone scores {mean:.3f}; {verdict}.")
    shuffled = run.curve(teacher, "resampler", "shuffled", METRIC, PROTOCOL)
    if len(shuffled):
        top = shuffled.loc[shuffled["value"].idxmax()]
        sentences.append(f"Trained on shuffled pairs, the best probe scores {_number(top)}; {_apart(best, top)}.")
    for control, (name, _) in SHOWN.items():
        other = run.curve(teacher, "resampler", control, METRIC, PROTOCOL)
        other = other[other["layer"] == best["layer"]]
        if len(other):
            left = other.iloc[0]
            sentences.append(
                f"When the checkpoint is {name}, the same probe at layer {best['layer']} scores {_number(left)}: what "
                "is missing came from the picture."
            )
    ridge = run.curve(teacher, "ridge", "none", METRIC, PROTOCOL)
    if len(ridge):
        top = ridge.loc[ridge["value"].idxmax()]
        text = f"The ridge readout, which needs no training, is best at layer {top['layer']} with {_number(top)}"
        limited = top["ci_low"] > best["ci_high"]
        sentences.append(
            f"{text}: more than the resampler, which was limited by its training here." if limited else f"{text}."
        )
    return Finding(run.label, teacher, sentences)


def random_control(run: RunResults) -> list[str]:
    """What the random-weights control does, per teacher; never silent."""
    sentences = []
    for teacher in run.teachers:
        trained = run.curve(teacher, "resampler", "none", METRIC, PROTOCOL)
        random = run.curve(teacher, "resampler", "random", METRIC, PROTOCOL)
        if trained.empty or random.empty:
            continue
        best, other = (curve.loc[curve["value"].idxmax()] for curve in (trained, random))
        title = teacher_title(teacher)
        start = (
            f"{title}: with random weights in LLM and projector the best layer scores {_number(other)}; "
            f"the checkpoint's best scores {_number(best)}"
        )
        both = trained.merge(random, on="layer", suffixes=("", "_random"))
        above = int((both["ci_low"] > both["ci_high_random"]).sum())
        if best["ci_low"] > other["ci_high"]:
            end = f"Training shows: the checkpoint's interval lies above its own at {above} of {len(both)} layers."
        else:
            clear = other["ci_low"] > best["ci_high"]
            verdict = "higher than the trained one" if clear else "as high as the trained one (the intervals overlap)"
            end = (
                f"A random network scores {verdict}: this curve alone does not show that training put the information "
                "there, since the picture also travels through untrained layers."
            )
        sentences.append(f"{start}. {end}")
    if not sentences:
        return [
            "Not run. A network with random weights often scores as high as a trained one; before reading anything "
            "into a curve, add it: probing train … --control random"
        ]
    return sentences


def _left_out(run: RunResults) -> list[str]:
    """How many images of each split were left out of which layers or teachers: their numbers are not finite."""
    rows = pd.DataFrame(run.manifest.get("not_finite", []))
    if rows.empty:
        return []
    sentences = []
    for (split, control, layers, teachers), part in rows.groupby(["split", "control", "layers", "teachers"]):
        where = [f"layers {layers}"] * bool(layers) + [f"the teachers {teachers}"] * bool(teachers)
        weights = " with random weights" if control == "random" else ""
        sentences.append(
            f"{part['image'].nunique()} images of {split}{weights} are not finite at {' and '.join(where)}, and are "
            "left out there; the manifest names them."
        )
    return sentences


def convergence(run: RunResults) -> list[str]:
    """Which probes had not finished learning, which never left the mean target, and what was left out on the way."""
    rows = pd.DataFrame(run.manifest["convergence"])
    if rows.empty:
        return ["Not known: these probes were trained elsewhere, and imported."]
    sentences = []
    for control, name in (("none", "of the checkpoint"), ("random", "of the random-weights control")):
        part = rows[rows["control"] == control]
        if part.empty:
            continue
        for state, meaning in STATES.items():
            bad = part[part["state"] == state]
            if len(bad):
                where = "; ".join(
                    f"{teacher} {', '.join(map(str, dict.fromkeys(group['layer'])))}"
                    for teacher, group in bad.groupby("teacher", sort=False)
                )
                sentences.append(
                    f"{len(bad)} of {len(part)} probes {name} were {state} when training ended ({meaning}): {where}."
                )
        if not (part["state"] != "flat").any():
            sentences.append(f"The loss of all {len(part)} probes {name} was flat when training ended.")
    return [
        *sentences,
        *_left_out(run),
        "Flat is not finished: the learning rate falls to zero at the end, whatever the loss. Whether more steps would "
        "raise a curve, only training with more steps tells.",
    ]
