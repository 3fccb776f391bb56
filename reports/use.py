"""Where a feature is in the prompt, and whether the model uses it: code length by position, and erasure."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from scipy.stats import norm

from analysis.evaluation.registry import describe
from reports.charts import chart_group
from reports.curves import stack, with_positions
from reports.results import RunResults, best_layer, interval_text, sort_teachers, teacher_title
from reports.theme import CONTROLS

POSITIONS = {
    "image": "image tokens", "text": "text", "last": "last token", "special": "special tokens", "all": "image and text",
}  # fmt: skip
"""Name in results → name on the page."""
READ, USED, LOSS = "code_length_mean", "erased_excess", "erased_loss"
"""Metrics: bits read at a position, loss when erased beyond a random subspace, and the loss itself."""
NO_EVIDENCE = "no evidence"


def positions_of(run: RunResults, metric: str) -> list[str]:
    """Returns the positions at which a metric was computed."""
    found = set(run.results.loc[run.results["metric"] == metric, "variant"])
    return [position for position in POSITIONS if position in found]


def where(run: RunResults, teacher: str) -> str:
    """Returns the bits that the best layer saves at each position of the prompt."""
    texts = []
    for position in positions_of(run, READ):
        curve = run.curve(teacher, "ridge", "none", READ, "strict", variant=position)
        if len(curve):
            best = best_layer(curve, READ)
            layer = f" (layer {best['layer']})" if best["ci_low"] > 0 else ""
            texts.append(f"{POSITIONS[position]} {best['value']:.0f}{layer}")
    return ", ".join(texts)


def used(run: RunResults, teacher: str) -> str:
    """Returns where erasing hurts most, if it surely does, and more than a random subspace; else that nothing shows it.

    The second alone would not do: erasing a random subspace can lower the loss. Sure is an interval above zero at the
    level of 5 % over all layers and positions together (Bonferroni), which is widened from the 95 % interval as one of
    a normal distribution.
    """
    parts = [
        run.curve(teacher, "leace", "none", metric, "strict", variant=position).assign(metric=metric, position=position)
        for metric in (USED, LOSS)
        for position in positions_of(run, USED)
    ]
    rows = pd.concat(parts) if parts else pd.DataFrame()
    if rows.empty or not (excess := rows["metric"] == USED).any():
        return ""
    wider = norm.isf(0.025 / excess.sum()) / norm.isf(0.025)
    above = rows["value"] - wider * (rows["value"] - rows["ci_low"]) > 0
    sure = rows[excess & above.groupby([rows["layer"], rows["position"]]).transform("all")]
    if sure.empty:
        return NO_EVIDENCE
    best = sure.loc[sure["value"].idxmax()]
    place = f"{POSITIONS[best['position']]}, layer {best['layer']}"
    return f"yes: {place}, {interval_text(best, describe(USED).digits, '+')} nats"


def sections(runs: Sequence[RunResults], names: Sequence[str]) -> list[dict[str, Any]]:
    """Builds the charts of both measures, a panel per teacher and position, where there are results."""
    found: list[dict[str, Any]] = []
    for title, metric, probe, controls, unit in (
        ("Which tokens hold it", READ, "ridge", ("none", "random"), "bits per image"),
        ("Does the model use it", LOSS, "leace", ("none", "subspace", "shuffled"), "nats per token"),
    ):
        frame = stack(runs, {name: CONTROLS[name] for name in controls}, metric=metric, probe=probe, protocol="strict")
        frame = frame[frame["variant"].isin(POSITIONS) & frame["value"].notna()]
        if len(frame):
            order = [*POSITIONS, *sort_teachers(frame["teacher"])]
            frame = frame.sort_values(["variant", "teacher"], key=lambda column: column.map(order.index), kind="stable")
            panels = frame["teacher"].map(teacher_title) + ", " + frame["variant"].map(POSITIONS)
            label, meaning = describe(metric).label, describe(metric).meaning
            text = f"{label[0].upper()}{label[1:]}. {meaning}"
            frame = with_positions(frame.assign(panel=panels)).drop(columns=["teacher", "probe"])
            found.append(chart_group(frame, names, metric, unit, zero=True, headline=not found, title=title, text=text))
    return found
