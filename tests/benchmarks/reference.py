"""The reference's procedure beside ours: the same model, images, probes and machine.

    python -m tests.benchmarks.reference

OLA-VLM's released code, as far as it costs time: one run per teacher; all hidden states kept and the logits of every
position computed; images prepared in the training process; the teacher run on one image at a time; in the depth run the
teacher's decoder run on every layer's prediction at every step. The optimiser is ours (fused), so that no difference
comes from there. Both go over the images twice, as the paper does and as recipes do by default.

Ours is one run with images read beside it: with nothing kept on disk; with the teachers' features and those of the
vision tower kept, the filling of that cache included, as a first run finds it; with the teachers' features there
already, as every later run of any checkpoint finds them; and with the tower's too, as every later run of the same
checkpoint does.
"""

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from transformers import AutoModelForImageTextToText

from probing.data.coco import square
from probing.fit import Fit
from probing.recipe import ProbeRunRecipe
from probing.schedule import plan_steps
from probing.teachers import depth
from probing.train import arm_backbone, caches_of, load_teachers, tower_cache_of, training_images
from tests.benchmarks.sizes import SIZES

IMAGES, BATCH, EPOCHS = {"toy": 256, "middle": 16}, {"toy": 16, "middle": 4}, 2


def make_fit(values: dict[str, Any], root: Path, batch: int, workers: int) -> Fit:
    """All layers, one seed, no controls."""
    fit = {"epochs": EPOCHS, "batch_size": batch, "micro_batch": batch, "workers": workers, "ridge": False}
    recipe = ProbeRunRecipe.model_validate({**values, "fit": fit, "controls": []})
    accelerator = Accelerator(cpu=True)
    backbone, teachers = arm_backbone(recipe, "no", accelerator.device), load_teachers(recipe, accelerator.device)
    images = training_images(recipe.data)
    layers = list(range(1, backbone.layers + 1))  # the reference has no layer 0
    return Fit(recipe, backbone, teachers, images, layers, ["no"], root, accelerator)


def reference(values: dict[str, Any], root: Path, batch: int) -> float:
    """Seconds of the reference's runs, one per teacher."""
    model = AutoModelForImageTextToText.from_pretrained(values["backbone"]["checkpoint"], dtype=torch.float32).eval()
    seconds = 0.0
    for name in values["teachers"]:
        fit = make_fit({**values, "teachers": {name: values["teachers"][name]}}, root / name, batch, workers=0)
        state, teacher = fit.start(), fit.teachers[name]
        probes = {int(key.layer): probe for key, probe in state.banks["no"].probes.items()}
        parameters = state.optimizer.param_groups[0]["params"]
        start = time.perf_counter()
        for ((micro),) in plan_steps(len(fit.images), fit.recipe.fit):
            images = [square(fit.images.read(index)) for index in micro]
            prepared = fit.backbone.prepare(images)
            with torch.no_grad():
                output = model(**prepared.inputs, output_hidden_states=True)
            again = [square(fit.images.read(index)) for index in micro]  # the teacher's side opens every image again
            target = torch.cat([teacher.target(teacher.prepare([image])) for image in again])
            losses = []
            for layer, probe in probes.items():
                keys, mask = prepared.tokens.select(output.hidden_states[layer], fit.recipe.probe.keys)
                prediction = probe(keys, mask)
                losses.append(F.smooth_l1_loss(prediction, target))
                if name == "depth":
                    with torch.no_grad():
                        depth.decode(teacher, prediction)
            torch.stack(losses).sum().backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            state.optimizer.step()
            state.optimizer.zero_grad()
        seconds += time.perf_counter() - start
    return seconds


def ours(values: dict[str, Any], root: Path, batch: int) -> float:
    """Seconds of filling caches, where anything is missing, and of the steps; waiting for images is in them."""
    fit = make_fit(values, root, batch, workers=1)
    start = time.perf_counter()
    fit.kept |= caches_of(fit.recipe, fit.teachers, fit.images)
    fit.kept |= tower_cache_of(fit.recipe, "no", fit.backbone, fit.images)
    return time.perf_counter() - start + fit.run().seconds


def main() -> None:
    """Prints both sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    threads = parser.parse_args().threads
    logging.disable(logging.WARNING)
    torch.set_num_threads(threads)
    out = sys.stdout.write
    names = ("nothing kept", "first run", "teachers kept", "tower too")
    out(f"size    images  reference, s   ours, s and ratio: {', '.join(names)}\n")
    for size, make in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            values, batch = make(root, IMAGES[size]), BATCH[size]
            teachers = {**values, "data": {**values["data"], "target_cache": str(root / "cache")}}
            tower = {**values, "data": {**teachers["data"], "tower_cache": str(root / "cache")}}
            theirs = reference(values, root / "reference", batch)
            out(f"{size:7s} {IMAGES[size]:6d} {theirs:13.1f}  ")
            for name, kept in zip(names, (values, tower, teachers, tower), strict=True):
                seconds = ours(kept, root / name, batch)
                out(f" {seconds:6.1f} {theirs / seconds:5.2f}")
                sys.stdout.flush()
            out("\n")


if __name__ == "__main__":
    main()
