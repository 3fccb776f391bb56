"""What others do for parts of the same work, against this toolkit.

    python -m tests.benchmarks.peers

Hidden states: a loop that follows the published description of VLM-Lens (one image at a time, a whole forward pass with
`output_hidden_states=True` for each chosen layer, the states pickled into an SQLite database) against one pass over
micro-batches that visits every layer. The pass stores nothing, since probes need nothing stored; each layer's states
are copied to the CPU and summed. Both prepare the same images.

Fréchet distance of 2,048 features: pytorch-fid's function against ours, both on given features.
"""

import argparse
import logging
import pickle
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import probing.utils.torchvision_shim  # noqa: F401  # isort: skip
from pytorch_fid.fid_score import calculate_frechet_distance
from transformers import AutoModelForImageTextToText

from analysis.evaluation.generated_images.distances import Gaussian, frechet_distance
from probing.data.coco import list_images
from probing.models import Backbone, Layer, load_backbone, parse_layers
from probing.recipe import BackboneRecipe
from probing.utils.images import square
from tests.benchmarks.sizes import SIZES

IMAGES, MICRO_BATCH = {"toy": 64, "middle": 4}, {"toy": 16, "middle": 4}
FEATURES, SAMPLES = 2048, 4096
LEAST_STATES, MOST_FRECHET = 10, 0.3


def seconds(work: Callable[[], object], turns: int) -> float:
    """The shortest of some timings."""
    best = float("inf")
    for _ in range(turns):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def loop(model: Any, backbone: Backbone, images: list[Image.Image], file: Path) -> None:
    """Every layer's states of every image, pickled into SQLite, a pass for each layer and image."""
    file.unlink(missing_ok=True)
    database = sqlite3.connect(file)
    database.execute("CREATE TABLE states (image INTEGER, layer INTEGER, tensor BLOB)")
    for layer in range(backbone.layers + 1):
        for index, image in enumerate(images):
            with torch.no_grad():
                output = model(**backbone.prepare([image]).inputs, output_hidden_states=True)
            row = index, layer, pickle.dumps(output.hidden_states[layer])
            database.execute("INSERT INTO states VALUES (?, ?, ?)", row)
            database.commit()
    database.close()


def one_pass(backbone: Backbone, images: list[Image.Image], batch: int) -> None:
    """Every layer's states of every image, in one pass."""
    layers, sums = parse_layers("all", backbone.layers), dict[Layer, Tensor]()

    @torch.no_grad()
    def visit(layer: Layer, state: Tensor) -> None:
        total = state.cpu().sum(dim=(0, 1))
        sums[layer] = sums[layer] + total if layer in sums else total

    for first in range(0, len(images), batch):
        backbone.stream(backbone.prepare(images[first : first + batch]), layers, visit)


def states(size: str) -> None:
    """Prints both times at one size."""
    with tempfile.TemporaryDirectory() as folder:
        root, count = Path(folder), IMAGES[size]
        values = SIZES[size](root, count)
        listed = list_images(Path(values["data"]["path"].removeprefix("coco:")), "train2017")
        images = [square(listed.read(index)) for index in range(count)]
        recipe = BackboneRecipe.model_validate({**values["backbone"], "dtype": "float32"})
        backbone = load_backbone(recipe, torch.device("cpu"))
        model = AutoModelForImageTextToText.from_pretrained(recipe.checkpoint, dtype=torch.float32).eval()
        theirs = seconds(lambda: loop(model, backbone, images, root / "states.db"), 1)
        ours = seconds(lambda: one_pass(backbone, images, MICRO_BATCH[size]), 3)
    below = "" if theirs / ours >= LEAST_STATES else f" (below {LEAST_STATES})"
    sys.stdout.write(
        f"hidden states, {size}: {count} images, {backbone.layers + 1} layers: loop {theirs:.1f} s, "
        f"one pass {ours:.2f} s, ratio {theirs / ours:.1f}{below}\n"
    )
    sys.stdout.flush()


def frechet() -> None:
    """Prints both times and both distances."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(FEATURES, FEATURES)) / FEATURES**0.5
    one, two = (rng.normal(size=(SAMPLES, FEATURES)) @ mixing + shift for shift in (0, 0.01))
    found = {}

    def peer() -> None:
        moments = [value for table in (one, two) for value in (table.mean(axis=0), np.cov(table, rowvar=False))]
        found["pytorch-fid"] = calculate_frechet_distance(*moments)

    def ours() -> None:
        found["ours"] = frechet_distance(Gaussian.fit(one), Gaussian.fit(two))

    theirs, own = seconds(peer, 2), seconds(ours, 2)
    above = "" if own / theirs <= MOST_FRECHET else f" (above {MOST_FRECHET})"
    sys.stdout.write(
        f"Fréchet distance, {FEATURES} features: pytorch-fid {theirs:.1f} s, ours {own:.1f} s, "
        f"ratio {own / theirs:.2f}{above}; distances {found['pytorch-fid']:.6g}, {found['ours']:.6g}\n"
    )


def main() -> None:
    """Prints both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    threads = parser.parse_args().threads
    logging.disable(logging.WARNING)
    torch.set_num_threads(threads)
    frechet()
    for size in SIZES:
        states(size)


if __name__ == "__main__":
    main()
