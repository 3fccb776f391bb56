"""Reads the truth about scenes from every layer of the toy checkpoints, without any teacher.

    python examples/toy/ground_truth.py runs/ground_truth [NAME=CHECKPOINT ...]

The truth is exact: mean inverse depth and shares of the nine classes in each patch, from its own token, and the number
of solids, from the mean of all image tokens. Ridge regression is fitted on 1,500 scenes; the score is the share of the
variance between images that it explains on 500 others, with 95 % intervals over images. A NAME may be given once per
seed: the figure shows the median of its checkpoints and a band over their intervals, and the same for five random
initialisations of the first.

About a minute on two CPU cores for two checkpoints. Writes `ground_truth.csv` and `ground_truth.png`.
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from PIL import Image
from torch import Tensor

from probing.models import Backbone, load_backbone
from probing.probes.ridge import RidgeSums, resize_states
from probing.recipe import BackboneRecipe
from probing.toyworld.models import ASSETS
from probing.toyworld.scenes import CLASSES, SIZE, Scenes, generate
from probing.toyworld.teachers import PATCH

TRAIN, HELD_OUT, SEED, RANDOM_SEEDS, PENALTY = 1500, 500, 31, 5, 1e-3
SIDE = SIZE // PATCH
TITLES = {"depth": "inverse depth of a patch", "class": "classes in a patch", "count": "number of solids"}


def truth(scenes: Scenes) -> dict[str, Tensor]:
    """Returns what is true of each scene, (n, 36, D), or (n, 1, 1) for the number of solids."""

    def by_patch(pixels: Tensor) -> Tensor:
        patches = pixels.unflatten(1, (SIDE, PATCH)).unflatten(3, (SIDE, PATCH))
        return patches.mean(dim=(2, 4)).flatten(1, 2)

    classes = torch.nn.functional.one_hot(torch.from_numpy(scenes.semantic).long(), len(CLASSES)).float()
    depth = torch.from_numpy(scenes.inverse_depth)[..., None]
    return {
        "depth": by_patch(depth),
        "class": by_patch(classes),
        "count": torch.from_numpy(scenes.count).float()[:, None, None],
    }


def image_states(backbone: Backbone, scenes: Scenes) -> Iterator[tuple[slice, int, Tensor]]:
    """Yields the states of image tokens (B, 36, H), by batch and layer."""
    for start in range(0, len(scenes), 100):
        part = slice(start, start + 100)
        states, tokens = backbone.hidden_states([Image.fromarray(image) for image in scenes.images[part]])
        for layer, hidden in states.items():
            yield part, int(layer), tokens.image_states(hidden)


def explained(backbone: Backbone, train: Scenes, held_out: Scenes) -> Iterator[dict[str, object]]:
    """Yields a row per layer and truth: the explained share of the variance around the mean of each position."""
    known, wanted = truth(train), truth(held_out)
    grids = {name: (SIDE, SIDE) if target.shape[1] > 1 else None for name, target in known.items()}
    sums: dict[tuple[int, str], RidgeSums] = {}
    for part, layer, states in image_states(backbone, train):
        for name, target in known.items():
            resized = resize_states(states, (SIDE, SIDE), grids[name])
            everything = torch.ones(len(states), dtype=torch.bool)
            sums.setdefault((layer, name), RidgeSums()).add(resized, {name: target[part]}, everything)
    maps = {key: one.solve(PENALTY)[key[1]] for key, one in sums.items()}
    errors: dict[tuple[int, str], list[Tensor]] = {key: [] for key in maps}
    for part, layer, states in image_states(backbone, held_out):
        for name, target in wanted.items():
            weight, bias = maps[layer, name]
            prediction = resize_states(states, (SIDE, SIDE), grids[name]).double() @ weight.T + bias
            errors[layer, name].append((prediction - target[part]).square().sum(dim=(1, 2)))
    draws = np.random.default_rng(0).integers(0, len(held_out), (2000, len(held_out)))
    for (layer, name), parts in errors.items():
        error = torch.cat(parts).numpy()
        spread = (wanted[name] - known[name].mean(dim=0)).square().sum(dim=(1, 2)).double().numpy()
        low, high = np.quantile(1 - error[draws].sum(axis=1) / spread[draws].sum(axis=1), (0.025, 0.975))
        value = 1 - error.sum() / spread.sum()
        yield {"truth": name, "layer": layer, "value": value, "ci_low": low, "ci_high": high}


def measure(checkpoints: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """Measures every checkpoint (name, folder), and the first with random weights."""
    train, held_out = generate(TRAIN, SEED), generate(HELD_OUT, SEED + 1)
    rows = []
    arms: list[tuple[str, str, int | None]] = [(*checkpoint, None) for checkpoint in checkpoints]
    arms += [("random weights", checkpoints[0][1], seed) for seed in range(RANDOM_SEEDS)]
    for index, (name, folder, random) in enumerate(arms):
        recipe = BackboneRecipe(checkpoint=folder, dtype="float32")
        backbone = load_backbone(recipe, torch.device("cpu"), random)
        number = sum(arm[0] == name for arm in arms[:index])
        rows += [{"checkpoint": name, "number": number, **row} for row in explained(backbone, train, held_out)]
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, file: Path) -> None:
    """Draws a panel per truth, a line per checkpoint."""
    curves = table.groupby(["truth", "checkpoint", "layer"], sort=False, as_index=False).agg(
        {"value": "median", "ci_low": "min", "ci_high": "max"}
    )
    names = list(dict.fromkeys(table["checkpoint"]))
    colours = dict(zip(names, sns.color_palette("colorblind"), strict=False))
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.9), layout="constrained")
    for axis, (truth_name, title) in zip(axes, TITLES.items(), strict=True):
        for name in names:
            curve = curves[(curves["truth"] == truth_name) & (curves["checkpoint"] == name)]
            style = "--" if name == "random weights" else "-"
            axis.plot(curve["layer"], curve["value"], style, marker=".", color=colours[name], label=name)
            axis.fill_between(curve["layer"], curve["ci_low"], curve["ci_high"], color=colours[name], alpha=0.2, lw=0)
        axis.set(title=title, xlabel="layer")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("explained variance")
    axes[0].legend(frameon=False)
    sns.despine(figure)
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    shipped = [("LLaVA", str(ASSETS / "llava")), ("OLA", str(ASSETS / "ola"))]
    results = measure([(name, path) for name, _, path in (pair.partition("=") for pair in sys.argv[2:])] or shipped)
    results.to_csv(out / "ground_truth.csv", index=False)
    draw(results, out / "ground_truth.png")
