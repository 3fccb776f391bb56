"""Runs every measure on a checkpoint that holds information at known layers, and draws them.

    python examples/planted/run.py runs/planted

About a minute on two CPU cores. Writes the run, `planted.csv` and `planted.png`.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

import probing
from probing.toyworld import planted

PANELS = {
    "ridge, centred cosine": ("cosine_centred", "ridge", ""),
    "resampler, centred cosine": ("cosine_centred", "resampler", ""),
    "code length of the mean feature\nfrom image tokens, bits": ("code_length_mean", "ridge", "image"),
    "code length of the mean feature\nfrom text tokens, bits": ("code_length_mean", "ridge", "text"),
    "loss when erased from image tokens,\nbeyond a random subspace, nats": ("erased_excess", "leace", "image"),
    "loss when erased from text tokens,\nbeyond a random subspace, nats": ("erased_excess", "leace", "text"),
}
"""Title → metric, probe and variant."""
HELD = {"image": planted.image_layers(), "text": planted.text_layers()}
USED = {"image": range(planted.COMPUTED, planted.MOVED), "text": planted.text_layers()}


def measure(out: Path) -> pd.DataFrame:
    """Trains probes on the planted checkpoint, and scores them."""
    world = planted.write_planted(out / "world", 600, 200, 0)
    recipe = {
        "backbone": {"checkpoint": str(world.checkpoint)},
        "data": {"path": f"coco:{world.data}"},
        "teachers": {"products": {"id": str(world.teacher)}},
        "controls": ["random"],
        "fit": {
            "epochs": 8, "batch_size": 8, "micro_batch": 8, "lr": 3e-3, "workers": 0, "buffer": "auto",
            "positions": ["image", "text"],
        },
    }  # fmt: skip
    run = probing.train(recipe, out / "run")
    probing.evaluate(run, metrics=["cosine", "code_length"])
    return probing.erase(run)


def draw(table: pd.DataFrame, file: Path) -> None:
    """Draws a panel per measure; shaded are the layers where it should be high."""
    figure, axes = plt.subplots(3, 2, figsize=(8, 7.2), sharex=True, layout="constrained")
    colours = dict(zip(("none", "random"), sns.color_palette("colorblind"), strict=False))
    for axis, (title, (metric, probe, variant)) in zip(axes.flat, PANELS.items(), strict=True):
        for layer in (USED if metric == "erased_excess" else HELD)[variant or "image"]:
            axis.axvspan(layer - 0.5, layer + 0.5, color="0.9", linewidth=0)
        rows = table[(table.metric == metric) & (table.probe == probe) & (table.variant == variant)]
        rows = rows[(rows.layer != "mean") & rows.control.isin(colours)].astype({"layer": int}).sort_values("layer")
        for control, curve in rows.groupby("control"):
            label = "planted checkpoint" if control == "none" else "random weights"
            style = "-" if control == "none" else "--"
            axis.plot(curve.layer, curve.value, style, marker="o", color=colours[control], label=label)
            axis.fill_between(curve.layer, curve.ci_low, curve.ci_high, color=colours[control], alpha=0.25, linewidth=0)
        axis.set_title(title, fontsize=9)
        axis.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    for axis in axes[-1]:
        axis.set_xlabel("layer")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=9)
    sns.despine(figure)
    figure.savefig(file, dpi=110)


def main() -> None:
    """Measures and draws."""
    out = Path(sys.argv[1])
    table = measure(out)
    table.to_csv(out / "planted.csv", index=False)
    draw(table, out / "planted.png")


if __name__ == "__main__":
    main()
