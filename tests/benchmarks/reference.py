"""The reference's procedure beside ours: the same model, images, probes and machine.

    python -m tests.benchmarks.reference

OLA-VLM's released code, as far as it costs time: one run per teacher; all hidden states kept and the logits of every
position computed; images prepared in the training process; the teacher run on one image at a time; in the depth run the
teacher's decoder run on every layer's prediction at every step. The optimiser is ours (fused), so that no difference
comes from there. Ours is one run with images read beside it: with nothing kept, with the teachers' features kept on
disk, and with those of the vision tower as well.
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

IMAGES, BATCH = {"toy": 256, "middle": 12}, {"toy": 16, "middle": 4}


def make_fit(values: dict[str, Any], root: Path, batch: int, workers: int) -> Fit:
    """One pass over the images; all layers, one seed, no controls."""
    fit = {"epochs": 1, "batch_size": batch, "micro_batch": batch, "workers": workers, "ridge": False}
    recipe = ProbeRunRecipe.model_validate({**values, "fit": fit, "controls": []})
    accelerator = Accelerator(cpu=True)
    backbone, teachers = arm_backbone(recipe, "no", accelerator.device), load_teachers(recipe, accelerator.device)
    images = training_images(recipe.data)
    kept = caches_of(recipe, teachers, images) | tower_cache_of(recipe, "no", backbone, images)
    layers = list(range(1, backbone.layers + 1))  # the reference has no layer 0
    return Fit(recipe, backbone, teachers, images, layers, ["no"], root, accelerator, kept)


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
    """Seconds of the steps of one pass for all teachers; waiting for images is in them."""
    return make_fit(values, root, batch, workers=1).run().seconds


def main() -> None:
    """Prints both sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    threads = parser.parse_args().threads
    logging.disable(logging.WARNING)
    torch.set_num_threads(threads)
    out = sys.stdout.write
    out("size    images  reference s    ours s  ratio   teachers kept s  ratio   tower too s  ratio\n")
    for size, make in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            values, batch = make(root, IMAGES[size]), BATCH[size]
            teachers = {**values, "data": {**values["data"], "target_cache": str(root / "cache")}}
            tower = {**values, "data": {**teachers["data"], "tower_cache": str(root / "cache")}}
            make_fit(tower, root / "fill", batch, workers=0)  # fills the caches
            theirs = reference(values, root / "reference", batch)
            out(f"{size:7s} {IMAGES[size]:6d} {theirs:12.1f}")
            for width, kept in ((9, values), (17, teachers), (13, tower)):
                seconds = ours(kept, root / f"ours{width}", batch)
                out(f" {seconds:{width}.1f} {theirs / seconds:6.2f}")
                sys.stdout.flush()
            out("\n")


if __name__ == "__main__":
    main()
