"""The reference's procedure beside ours: the same model, images, probes and machine.

    python -m tests.benchmarks.reference

OLA-VLM's released code, as far as it costs time: one run per teacher; all hidden states kept and the logits of every
position computed; images prepared in the training process; the teacher run on one image at a time; in the depth run the
teacher's decoder run on every layer's prediction at every step. The optimiser is ours (fused), so that no difference
comes from there.

Steps are timed in turns on one batch, the best of each counts, and the reference's is the sum of its three runs'. Ours:
with nothing kept on disk; a whole first run of two passes over the images, as the paper trains, which fills the caches
and then reads them; with the teachers' features there already, as every later run of any checkpoint finds them; and
with the vision tower's too, as every later run of the same checkpoint does. Writing the caches is not in it: 2 MB an
image at the paper's sizes, beside seconds of work.
"""

import argparse
import logging
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from transformers import AutoModelForImageTextToText

from probing.data.coco import square
from probing.data.loader import Prepared, micro_batches
from probing.fit import Fit
from probing.recipe import ProbeRunRecipe
from probing.schedule import plan_steps
from probing.teachers import depth
from probing.train import arm_backbone, load_teachers, training_images
from tests.benchmarks.sizes import SIZES
from tests.benchmarks.timing import best_in_turns

BATCH, PASSES = {"toy": 16, "middle": 4}, 2
BOUNDS = {"first run": 3, "all kept": 4}


def make_fit(values: dict[str, Any], root: Path, batch: int) -> Fit:
    """One batch of images; all layers, one seed, no controls."""
    fit = {"epochs": 1, "batch_size": batch, "micro_batch": batch, "workers": 0, "ridge": False}
    recipe = ProbeRunRecipe.model_validate({**values, "fit": fit, "controls": []})
    accelerator = Accelerator(cpu=True)
    backbone, teachers = arm_backbone(recipe, "no", accelerator.device), load_teachers(recipe, accelerator.device)
    layers = list(range(1, backbone.layers + 1))  # the reference has no layer 0
    return Fit(recipe, backbone, teachers, training_images(recipe.data), layers, ["no"], root, accelerator)


def reference_step(values: dict[str, Any], name: str, model: Any, root: Path, batch: int) -> Callable[[], None]:
    """A step of the reference's run for one teacher."""
    fit = make_fit({**values, "teachers": {name: values["teachers"][name]}}, root / name, batch)
    state, teacher = fit.start(), fit.teachers[name]
    probes = {int(key.layer): probe for key, probe in state.banks["no"].probes.items()}
    parameters = state.optimizer.param_groups[0]["params"]
    ((micro,),) = plan_steps(len(fit.images), fit.recipe.fit)

    def step() -> None:
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

    return step


def our_steps(values: dict[str, Any], root: Path, batch: int) -> dict[str, Callable[[], object]]:
    """A step of ours with nothing, the teachers' features, or the tower's too kept; and the filling of these caches."""
    fit = make_fit(values, root / "ours", batch)
    state = fit.start()
    (step,) = plan_steps(len(fit.images), fit.recipe.fit)
    prepare = {name: teacher.prepare for name, teacher in fit.teachers.items()}

    def read() -> Prepared:
        device = fit.accelerator.device
        return next(micro_batches(fit.images, step, fit.backbone.prepare, prepare, "square", 0, device))

    prepared = read()
    assert prepared.student is not None
    student = prepared.student

    def fill() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        now = read()
        targets = {name: now.target(teacher) for name, teacher in fit.teachers.items()}
        return targets, fit.backbone.embed_images(student)

    targets, tower = fill()
    teachers_kept = replace(prepared, kept=targets)
    all_kept = replace(teachers_kept, student=student.with_embedded(tower))

    def run(batches: Prepared) -> None:
        fit._step(state, step, iter([batches]), 1000, gather=False)

    return {
        "nothing kept": lambda: run(read()),
        "filling": fill,
        "teachers kept": lambda: run(teachers_kept),
        "all kept": lambda: run(all_kept),
    }


def main() -> None:
    """Prints both sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    threads = parser.parse_args().threads
    logging.disable(logging.WARNING)
    torch.set_num_threads(threads)
    out = sys.stdout.write
    out("size    images  reference, ms   ours, ms and ratio\n")
    for size, make in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            root, batch = Path(folder), BATCH[size]
            values = make(root, batch)
            checkpoint = values["backbone"]["checkpoint"]
            model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
            theirs = {name: reference_step(values, name, model, root, batch) for name in values["teachers"]}
            best = best_in_turns({**theirs, **our_steps(values, root, batch)})
        reference = sum(best.pop(name) for name in theirs)
        best["first run"] = best.pop("filling") / PASSES + best["all kept"]
        out(f"{size:7s} {batch:6d} {reference:14.0f}  ")
        for name in ("nothing kept", "first run", "teachers kept", "all kept"):
            ratio = reference / best[name]
            below = f" (below {BOUNDS[name]})" if ratio < BOUNDS.get(name, 0) else ""
            out(f" {name} {best[name]:.0f} {ratio:.2f}{below};")
        out("\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
