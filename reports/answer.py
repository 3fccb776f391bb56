"""The answer of a report: what the best layer holds, and whether random weights hold as much."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from analysis.evaluation.above_random import PairedScores, verdict
from analysis.evaluation.registry import describe
from analysis.evaluation.scores import ScoreKey
from probing.training.convergence import AT_THE_MEAN, NOT_TRAINED
from reports.curves import PROBES, teachers_of, with_panels, with_positions
from reports.results import AVERAGE, MEASURE, RunResults, best_layer, interval_text, sign, teacher_title
from reports.theme import CHECKPOINT
from reports.use import NO_EVIDENCE, used, where

CODE_LENGTH = ("code_length", "strict")
NOTHING = "no more than the mean target"
UNKNOWN = "not compared with random weights"
NO_INTERVAL = "no verdict without an interval"
USED_BY, BITS_BY = "used by answers", "bits of the mean feature, by tokens"


@dataclass(frozen=True)
class Answer:
    """What one checkpoint holds about one teacher.

    Attributes:
        run: the checkpoint's results.
        teacher: the teacher.
        probe: the probe that is answered with; see `leading_probe`.
        measure: metric and protocol.
        best: row of the best layer.
        floor: score of the mean target; None if unknown.
        difference: best layer minus that of random weights, with `layer`, `random_layer` and `paired`, whether scores
            per image make it paired; None without the control.
        layers: the same layer by layer.
    """

    run: RunResults
    teacher: str
    probe: str
    measure: tuple[str, str]
    best: pd.Series
    floor: float | None
    difference: pd.Series | None
    layers: pd.DataFrame

    @property
    def verdict(self) -> str:
        """Returns the verdict, by the rules of `analysis.evaluation.above_random.verdict`.

        If the best layer's own interval reaches the mean target, nothing is read, and nothing is compared.
        """
        better = sign(self.measure[0])
        if (
            self.floor is not None
            and min(better * self.best["ci_low"], better * self.best["ci_high"]) <= better * self.floor
        ):
            return NOTHING
        if self.difference is None:
            return UNKNOWN
        if math.isnan(self.difference["ci_low"]):
            return NO_INTERVAL
        return verdict(*sorted(better * self.difference[name] for name in ("ci_low", "ci_high")))

    @property
    def above(self) -> str:
        """Returns at how many layers the checkpoint is clearly above random weights at the same layer."""
        low = (self.layers["ci_low"] if sign(self.measure[0]) > 0 else -self.layers["ci_high"]).dropna()
        return f"{int((low > 0).sum())} of {len(low)}" if len(low) else ""

    @property
    def sentence(self) -> str:
        """Returns the verdict as a sentence with its numbers."""
        info = describe(*self.measure)
        start = (
            f"{teacher_title(self.teacher)}, {self.run.label}: {self.verdict}. Its best layer is {self.best['layer']}, "
            f"where the {info.label} of the {PROBES[self.probe]} is {interval_text(self.best, info.digits)}"
        )
        if self.difference is None:
            text = f"{start}. Add the control to know what the number means: probing train … --control random."
        else:
            minus = interval_text(self.difference, info.digits, "+")
            layer = self.difference["random_layer"]
            text = f"{start}. The best layer of random weights is {layer}; difference: {minus}."
        found = used(self.run, self.teacher)
        if found == NO_EVIDENCE:
            return f"{text} Erasing it costs nowhere surely more than a random subspace: no evidence that it is used."
        return f"{text} Is it used by answers? {found[0].upper()}{found[1:]}." if found else text

    def cells(self) -> dict[str, str]:
        """Returns the row of the table: title of the column → text."""
        digits = describe(*self.measure).digits
        score, minus = interval_text(self.best, digits), interval_text(self.difference, digits, "+")
        return {
            "teacher": teacher_title(self.teacher),
            "checkpoint": self.run.label,
            "verdict": self.verdict,
            USED_BY: used(self.run, self.teacher),
            "best layer": str(self.best["layer"]),
            "score": score.replace(" ", "\u00a0"),
            "minus random weights": minus.replace(" ", "\u00a0"),
            "layers above random": self.above,
            "probe": PROBES[self.probe],
            BITS_BY: where(self.run, self.teacher),
        }


def answers(runs: Sequence[RunResults]) -> list[Answer]:
    """Returns an answer per teacher and checkpoint, in the best measure that all checkpoints have."""
    candidates = (CODE_LENGTH, MEASURE, *(measure for run in runs for measure in run.measures))
    measure = next((one for one in candidates if all(one in run.measures for run in runs)), None)
    if measure is None:
        return []
    paired = {run.label: PairedScores.read(run.source, measure[0]) for run in runs}
    found = (_answer(run, t, measure, paired[run.label]) for t in teachers_of(runs, *measure) for run in runs)
    return [answer for answer in found if answer is not None]


def _answer(run: RunResults, teacher: str, measure: tuple[str, str], paired: PairedScores) -> Answer | None:
    probe = leading_probe(run, teacher, measure)
    curve = run.curve(teacher, probe, "none", *measure)
    if curve.empty:
        return None
    best, random = best_layer(curve, measure[0]), run.curve(teacher, probe, "random", *measure)
    floor = 0.0 if measure == CODE_LENGTH else run.mean_target_score(teacher, *measure)
    key = ScoreKey(teacher, "", probe, "none", *measure)
    difference = _difference(best, best_layer(random, measure[0]), key, paired) if len(random) else None
    at = random.set_index("layer", drop=False)
    rows = [
        _difference(row, at.loc[row["layer"]], key, paired) for _, row in curve.iterrows() if row["layer"] in at.index
    ]
    layers = pd.DataFrame(rows, columns=["layer", "random_layer", "value", "ci_low", "ci_high", "n"])
    return Answer(run, teacher, probe, measure, best, floor, difference, layers)


def leading_probe(run: RunResults, teacher: str, measure: tuple[str, str]) -> str:
    """Returns the probe to answer with: the one that reads more, but no resampler that did not converge.

    A resampler has converged if its loss was flat at every layer, with random weights too. One that reads less than
    the linear readout is limited by its training, not by the layer.
    """
    curves = {probe: run.curve(teacher, probe, "none", *measure) for probe in PROBES}
    if curves["resampler"].empty or curves["ridge"].empty:
        return "ridge" if curves["resampler"].empty else "resampler"
    rows = [row for row in run.manifest["convergence"] if row["teacher"] == teacher and row["control"] != "shuffled"]
    flat = bool(rows) and all(row["state"] == "flat" for row in rows)
    own, ridge = (sign(measure[0]) * best_layer(curves[probe], measure[0])["value"] for probe in PROBES)
    return "resampler" if flat and own > ridge else "ridge"


def _difference(own: pd.Series, random: pd.Series, key: ScoreKey, paired: PairedScores) -> pd.Series:
    """Returns one difference, paired by image; without scores per image, its interval is as wide as both together."""
    if found := paired.minus_random(replace(key, layer=own["layer"]), random["layer"]):
        interval, n = found
        value, low, high = interval.value, interval.low, interval.high
    else:
        value, n = own["value"] - random["value"], min(own["n"], random["n"])
        low, high = own["ci_low"] - random["ci_high"], own["ci_high"] - random["ci_low"]
    layers = {"layer": own["layer"], "random_layer": random["layer"], "paired": bool(found)}
    return pd.Series(layers | {"value": value, "ci_low": low, "ci_high": high, "n": n})


def answer_table(found: Sequence[Answer]) -> pd.DataFrame:
    """Builds the table of answers, with the columns that have results."""
    table = pd.DataFrame([one.cells() for one in found])
    return table.loc[:, (table != "").any()].replace("", "not measured")


def pair_table(found: Sequence[Answer], differences: pd.DataFrame) -> pd.DataFrame:
    """Returns a row per teacher and probe, a column per checkpoint: its difference from the first one.

    Differences are of the mean over layers, measure and probe those of the answers. Differences between the others are
    further down on the page.
    """
    first = differences["reference"].iloc[0]
    rows = differences[(differences["layer"] == AVERAGE) & (differences["reference"] == first) & (differences["n"] > 0)]
    columns = (rows[name] for name in ("teacher", "probe", "metric", "protocol", "variant"))
    rows = rows.assign(series=list(zip(*columns, strict=True)))
    table = []
    for series in dict.fromkeys((answer.teacher, answer.probe, *answer.measure, "") for answer in found):
        info, cells = describe(*series[2:4]), {}
        for _, row in rows[rows["series"].isin([series])].iterrows():
            meaning = "better" if (row["value"] > 0) == info.higher_is_better else "worse"
            clear = row["ci_low"] > 0 or row["ci_high"] < 0
            text = f"{interval_text(row, info.digits, '+')}: {meaning if clear else 'no clear difference'}"
            cells[f"{row['checkpoint']} − {first}"] = text
        if cells:
            table.append({"teacher": teacher_title(series[0]), "probe": PROBES[series[1]]} | cells)
    return pd.DataFrame(table).fillna("")


def random_frame(found: Sequence[Answer]) -> pd.DataFrame:
    """Returns checkpoint minus random weights by layer, for charts."""
    parts = [
        answer.layers.assign(
            teacher=answer.teacher, probe=answer.probe, checkpoint=answer.run.label, control=CHECKPOINT
        )
        for answer in found
        if len(answer.layers)
    ]
    return with_positions(with_panels(pd.concat(parts, ignore_index=True))) if parts else pd.DataFrame()


STATES = {
    "still falling": "more steps would raise their scores",
    AT_THE_MEAN: "their score says nothing about the layer",
    NOT_TRAINED: "no image had a finite loss, so they have no score",
}
"""States of probes that did not converge → meaning."""


def _excluded_images(run: RunResults) -> Iterator[str]:
    """Counts the images excluded from layers or teachers because their values are not finite."""
    rows = pd.DataFrame(run.manifest.get("not_finite", []), columns=["image", "split", "control", "layers", "teachers"])
    for (split, control, layers, teachers), part in rows.groupby(["split", "control", "layers", "teachers"]):
        where = [f"layers {layers}"] * bool(layers) + [f"the teachers {teachers}"] * bool(teachers)
        weights = " with random weights" if control == "random" else ""
        yield (
            f"{part['image'].nunique()} images of {split}{weights} have non-finite values at {' and '.join(where)} "
            "and are excluded there; the manifest lists them."
        )


def convergence(run: RunResults) -> list[str]:
    """Lists probes that did not converge, and images excluded during training."""
    rows = pd.DataFrame(run.manifest["convergence"])
    if rows.empty:
        return ["Unknown: these probes were imported."]
    sentences = []
    for control, name in (("none", "of the checkpoint"), ("random", "of the random-weights control")):
        part = rows[rows["control"] == control]
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
        if len(part) and (part["state"] == "flat").all():
            sentences.append(f"The loss of all {len(part)} probes {name} was flat at the end of training.")
    return [
        *sentences,
        *_excluded_images(run),
        "A flat loss does not prove convergence: the learning rate decays to zero in any case. Only a run with more "
        "steps shows whether scores would rise.",
    ]
