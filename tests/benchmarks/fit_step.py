"""What one training step costs over its floor, and how memory grows with the number of layers.

    python -m tests.benchmarks.fit_step

Floor = the bare forward of the backbone (no lm_head) + the same probes' own forward and backward + the optimiser's
step, each measured alone. The first ratio is for a step with cached targets; the second for a step that runs the
teachers, whose time is added to the floor. Reading images runs in parallel, and is printed separately. Parts and steps
are timed in turns, and the best of each counts.
Peak memory is that of a fresh process with 4 and with 32 probed layers, minus the memory before its first step.
"""

import argparse
import contextlib
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import probing.utils.torchvision_shim  # noqa: F401
from probing.data.dataloader import MicroBatches, Prepared, micro_batches
from probing.training.schedule import plan_steps
from probing.training.trainer import ProbeTrainer
from tests.benchmarks.sizes import SIZES
from tests.benchmarks.timing import best_in_turns
from tests.helpers import tiny
from tests.helpers.trainer import make_trainer

BATCH = {"toy": 16, "middle": 4, "deep": 32}
BOUND, GROWTH = 1.15, 1.3


def deep(root: Path, images: int) -> dict[str, Any]:
    """32 blocks of H = 256, for memory by the number of layers."""
    return {
        "backbone": {"checkpoint": str(tiny.llava(root / "llava", layers=32, hidden=256, image=48))},
        "data": {"path": f"coco:{tiny.coco(root / 'coco', train=images, val=2)}"},
        "teachers": {
            "depth": {"id": str(tiny.depth_teacher(root / "depth", width=64, size=42))},
            "seg": {"id": str(tiny.seg_teacher(root / "seg", width=8))},
            "gen": {"id": str(tiny.gen_teacher(root / "gen", projection=64))},
        },
    }


def trainer_of(size: str, root: Path, layers: int | None, bf16: bool) -> ProbeTrainer:
    """Everything that a step needs; `layers` says how many of the last ones are probed, by default all."""
    batch = BATCH[size]
    values = {**SIZES, "deep": deep}[size](root, batch)
    values["backbone"]["dtype"] = "bfloat16" if bf16 else "float32"
    fit = {"epochs": 1, "batch_size": batch, "micro_batch": batch, "workers": 0, "ridge": False, "bf16": bf16}
    trainer = make_trainer(values | {"fit": fit}, root / "state")
    depth = trainer.backbone.layers  # of the forward pass, in all cases
    trainer.layers = range(0 if layers is None else depth - layers + 1, depth + 1)
    return trainer


def measure(size: str, layers: int | None, bf16: bool) -> dict[str, float]:
    """Times one step and its parts, in milliseconds, and the peak memory it adds, in MB."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(size, Path(folder), layers, bf16)
        state = trainer.initial_state()
        planned = plan_steps(len(trainer.images), trainer.recipe.fit)[0]
        (micro,) = planned.micros
        prepare = {name: teacher.prepare for name, teacher in trainer.teachers.items()}

        def read() -> Prepared:
            device = trainer.accelerator.device
            return next(
                micro_batches(MicroBatches(trainer.images, [micro], trainer.backbone.prepare, prepare), 0, device)
            )

        prepared = read()
        assert prepared.student is not None
        batch = prepared.student
        parameters = state.optimizer.param_groups[0]["params"]
        base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        targets = {name: prepared.target(teacher) for name, teacher in trainer.teachers.items()}
        cached = replace(prepared, cached_targets=targets)

        def step(batches: Prepared = cached) -> None:
            trainer.take_step(state, replace(planned, first=False), iter([batches]), 1000)

        step()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base
        own = 16 * sum(p.numel() for p in parameters)  # weights, gradients, two moments: grows with the layers, rightly
        states, tokens = trainer.backbone.hidden_states([trainer.images.read(0)] * BATCH[size], str(trainer.layers[0]))
        hidden, _ = tokens.select(states[trainer.layers[0]], trainer.recipe.probe.keys)
        hidden = hidden if bf16 else hidden.float()
        autocast = torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()

        def probes_alone() -> None:
            for key, probe in state.banks["none"].probes.items():
                with autocast:
                    prediction = probe(hidden)
                F.smooth_l1_loss(prediction.float(), targets[key.teacher]).backward()

        @torch.no_grad()
        def forward() -> None:
            trainer.backbone.core(**batch.inputs, use_cache=False)

        def optimise() -> None:
            for bank in state.banks.values():
                for probe in bank.probes.values():
                    torch.nn.utils.clip_grad_norm_(probe.parameters(), 1.0)
            state.optimizer.step()

        works = {
            "step": step,
            "whole": lambda: step(prepared),
            "backbone": forward,
            "probes": probes_alone,
            "optimiser": optimise,
        }
        works |= {"teachers": lambda: [prepared.target(t) for t in trainer.teachers.values()], "reading": read}
        found = best_in_turns(works)
        return found | {"peak_mb": peak / 1024, "probe_state_mb": own * 3 / 4 / 2**20}  # the weights were there before


def main() -> None:
    """Prints tables; each row is measured in a separate process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=BATCH)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    if options.size:
        torch.set_num_threads(options.threads)
        found = measure(options.size, options.layers, options.bf16)
        sys.stdout.write("\n" + json.dumps(found))
        return

    def alone(*arguments: str) -> dict[str, float]:
        command = [sys.executable, "-m", "tests.benchmarks.fit_step", *arguments, "--threads", str(options.threads)]
        # Memory alone is measured so, for glibc keeps what is freed otherwise; fresh pages at every step cost time.
        returned = {"MALLOC_MMAP_THRESHOLD_": str(2**18)} if "--layers" in arguments else {}
        environment = {**os.environ, **returned}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return found

    out = sys.stdout.write
    out("size    dtype  step/floor  with teachers    step, ms  backbone   probes optimiser  teachers   reading\n")
    for size in SIZES:
        for flags in ([], ["--bf16"]):
            row = alone("--size", size, *flags)
            floor = row["backbone"] + row["probes"] + row["optimiser"]
            parts = f"{row['backbone']:8.0f} {row['probes']:8.0f} {row['optimiser']:9.0f} {row['teachers']:9.0f}"
            ratio, whole = row["step"] / floor, row["whole"] / (floor + row["teachers"])
            out(f"{size:7s} {'bf16' if flags else 'fp32':5s} {ratio:11.2f} {whole:14.2f} {row['step']:11.0f}  {parts}")
            out(f" {row['reading']:9.0f}{'' if max(ratio, whole) <= BOUND else f'   above {BOUND}'}\n")
            sys.stdout.flush()
    rows = {layers: alone("--size", "deep", "--layers", str(layers)) for layers in (4, 32)}
    out("\nlayers probed  peak MB of a step  of which gradients and moments of probes\n")
    for layers, row in rows.items():
        out(f"{layers:13d} {row['peak_mb']:17.0f} {row['probe_state_mb']:25.0f}\n")
    rest = {layers: row["peak_mb"] - row["probe_state_mb"] for layers, row in rows.items()}
    out(f"the rest with 32 layers over that with 4: {rest[32] / rest[4]:.2f} (bound {GROWTH})\n")


if __name__ == "__main__":
    main()
