"""The reference's procedure against ours: the same model, images, probes and machine.

    python -m tests.benchmarks.reference

What takes time in OLA-VLM's released code: one run per teacher; all hidden states in memory and the logits of every
position computed; images prepared in the training process; the teacher run on one image at a time; in the depth run the
teacher's decoder run on every layer's prediction at every step. Both use our (fused) optimiser.

Steps are timed in turns on one batch, with reading and preparing images, and the best of each counts; the reference's
time is the sum of its three runs. Ours is timed with nothing cached on disk, and with cached targets, as in every later
run of any checkpoint. Later epochs read states and targets from the buffer. Without buffer they compute the states
again, and read targets from the cache that the first epoch filled; filling is timed without writing.
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
from transformers import AutoModelForImageTextToText

from probing.teachers import depth
from probing.training.buffer import ActivationBuffer
from probing.training.run import open_target_caches
from probing.training.schedule import plan_steps
from probing.training.trainer import ProbeTrainer
from probing.utils.images import square
from tests.benchmarks.sizes import SIZES
from tests.benchmarks.timing import best_in_turns
from tests.helpers.trainer import make_trainer

BATCH = {"toy": 16, "middle": 4}
SECONDS = {"toy": 20, "middle": 150}
"""Of timing; the middle size takes 18 a turn, and after five turns its best times were still up to 4 % too long."""


def trainer_of(values: dict[str, Any], root: Path, batch: int) -> ProbeTrainer:
    """One batch of images; all layers but 0, which the reference lacks, one seed, no controls."""
    fit = {"epochs": 1, "batch_size": batch, "micro_batch": batch, "workers": 0, "ridge": False}
    return make_trainer(values | {"fit": fit, "controls": []}, root)


def reference_step(values: dict[str, Any], name: str, model: Any, root: Path, batch: int) -> Callable[[], None]:
    """A step of the reference's run for one teacher."""
    trainer = trainer_of({**values, "teachers": {name: values["teachers"][name]}}, root / name, batch)
    state, teacher = trainer.initial_state(), trainer.teachers[name]
    probes = {int(key.layer): probe for key, probe in state.banks["none"].probes.items()}
    parameters = state.optimizer.param_groups[0]["params"]
    (micro,) = plan_steps(len(trainer.images), trainer.recipe.fit)[0].micros

    def step() -> None:
        images = [square(trainer.images.read(index)) for index in micro]
        prepared = trainer.backbone.prepare(images)
        with torch.no_grad():
            output = model(**prepared.inputs, output_hidden_states=True)
        again = [square(trainer.images.read(index)) for index in micro]  # the teacher's side opens every image again
        target = torch.cat([teacher.target(teacher.prepare([image])) for image in again])
        losses = []
        for layer, probe in probes.items():
            keys, mask = prepared.tokens.select(output.hidden_states[layer], trainer.recipe.probe.keys)
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
    """Our step without and with cached targets, and the filling of the cache."""
    teachers = {**values, "data": {**values["data"], "target_cache": str(root / "cache")}}
    fits = {"nothing cached": values, "targets cached": teachers}

    def step_of(name: str) -> Callable[[], object]:
        trainer = trainer_of(fits[name], root / name, batch)
        trainer.target_caches |= open_target_caches(trainer.recipe, trainer.teachers, trainer.images)
        state, steps = trainer.initial_state(), plan_steps(len(trainer.images), trainer.recipe.fit)
        return lambda: trainer.take_step(state, replace(steps[0], first=False), trainer.batches(steps), 1000)

    bare = trainer_of(values, root / "filling", batch)
    steps = plan_steps(len(bare.images), bare.recipe.fit)

    def fill() -> None:
        prepared = next(bare.batches(steps))
        for teacher in bare.teachers.values():
            prepared.target(teacher)

    def later_visit() -> Callable[[], object]:
        trainer = trainer_of(values, root / "buffered", batch)
        state, (step,) = trainer.initial_state(), plan_steps(len(trainer.images), trainer.recipe.fit)
        buffer = ActivationBuffer(trainer.layers, trainer.accelerator.device)
        trainer.take_step(state, step, trainer.batches([step]), 1000, buffer)
        return lambda: trainer.take_step(state, replace(step, first=False), iter(()), 1000, buffer)

    return {**{name: step_of(name) for name in fits}, "filling": fill, "later visit": later_visit()}


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
            best = best_in_turns({**theirs, **our_steps(values, root, batch)}, SECONDS[size])
        reference = sum(best.pop(name) for name in theirs)
        out(f"{size:7s} {batch:6d} {reference:14.0f}  ")
        for name in ("nothing cached", "targets cached", "later visit"):
            out(f" {name} {best[name]:.0f};")
        out("\n")
        for epochs in (1, 2, 10):
            out(f"        {epochs:2d} epochs, reference over ours:")
            for name in ("nothing cached", "targets cached"):
                buffered = best[name] + (epochs - 1) * best["later visit"]
                out(f" {name} {epochs * reference / buffered:.2f}")
                filled = (epochs - 1) * best["targets cached"] + best["filling"] + best["targets cached"]
                again = filled if name == "nothing cached" else epochs * best[name]
                out(f" (without buffer {epochs * reference / again:.2f});")
            out("\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
