"""What `probing align` costs over the bare forward passes of the same images.

    python -m tests.benchmarks.alignment

Two sizes: the toy world's LLaVA over 1,000 scenes (36 patches each), and a LLaVA with LLaVA-1.5's 576 patches over
fewer images, with a proportionally smaller sample. Bootstrap and similarity take seconds for any model, so the toy's
ratio is higher than a real model's. The bare pass reads and prepares the same images, and visits every layer. Measured
without teachers.
"""

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path

import torch

import probing.utils.torchvision_shim  # noqa: F401
from analysis.alignment.run import AlignRecipe, align
from probing.data.coco import list_images
from probing.data.dataloader import MicroBatches, micro_batches
from probing.models import load_backbone, parse_layers
from probing.toyworld.layout import write_world
from probing.toyworld.models import ASSETS
from tests.helpers import tiny


def bare(recipe: AlignRecipe) -> float:
    """Seconds of reading, preparing and forwarding all images, with a visit of every layer that does nothing."""
    device = torch.device("cpu")
    backbone = load_backbone(recipe.backbone, device)
    images = list_images(Path(recipe.data.path.removeprefix("coco:")), "val2017")
    layers = parse_layers("all", backbone.layers)
    batch = recipe.micro_batch
    plan = [list(range(first, min(first + batch, len(images)))) for first in range(0, len(images), batch)]
    start = time.perf_counter()
    for prepared in micro_batches(MicroBatches(images, plan, backbone.prepare, {}), 0, device):
        assert prepared.student is not None
        backbone.stream(prepared.student, layers, lambda layer, hidden: None)
    return time.perf_counter() - start


def measured(recipe: AlignRecipe, out: Path) -> float:
    """Seconds of `align`, with everything that it reads and writes."""
    start = time.perf_counter()
    align(recipe, out)
    return time.perf_counter() - start


def compare(name: str, checkpoint: Path, root: Path, images: int, sample: int, batch: int) -> None:
    """Prints both times and their ratio."""
    world = write_world(root / f"world{images}", 2, images, seed=7)
    values = {"backbone": {"checkpoint": str(checkpoint), "dtype": "float32"}, "data": {"path": f"coco:{world}"}}
    recipe = AlignRecipe.model_validate({**values, "micro_batch": batch, "sample": sample, "pictures": 0, "workers": 0})
    before = bare(recipe)
    whole = measured(recipe, root / name)
    after = bare(recipe)  # before and after, since other work may disturb one
    least = (before + after) / 2
    sys.stdout.write(f"{name}: {images} images, bare {least:.1f} s, align {whole:.1f} s, ratio {whole / least:.2f}\n")
    sys.stdout.flush()


def main() -> None:
    """Runs both sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        compare("toy", ASSETS / "llava", root, images=1000, sample=64, batch=16)
        large = tiny.llava(root / "large", layers=16, hidden=1024, image=192)
        compare("576 patches, 16 layers of width 1,024", large, root, images=64, sample=4, batch=4)


if __name__ == "__main__":
    main()
