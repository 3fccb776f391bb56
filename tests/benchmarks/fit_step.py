"""What one training step costs over its floor, and how memory grows with the number of layers.

    python -m tests.benchmarks.fit_step

Floor = the bare forward of the backbone (no lm_head) + the same probes' own forward and backward + the optimiser's
step, each measured alone. The step also reads, decodes and preprocesses images and runs the teachers; those are
printed apart, so that one sees what is overhead and what is work.
Peak memory is that of a fresh process with 4 and with 32 probed layers, above the process before its first step.
"""

import argparse
import json
import logging
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator

import probing.compat  # noqa: F401
from probing.data.loader import micro_batches
from probing.fit import Fit, plan_steps
from probing.recipe import ProbeRunRecipe
from probing.train import arm_backbone, load_teachers, training_images
from tests import tiny

BATCH = 32
HIDDEN = 256


def best_of(repeats: int, work: Callable[[], object]) -> float:
    """Shortest of several timings, in milliseconds: the least disturbed one."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - start))
    return min(times)


def make_fit(root: Path, layers: int) -> Fit:
    """A LLaVA of 32 blocks with some of its layers probed against three tiny teachers."""
    recipe = ProbeRunRecipe.model_validate(
        {
            "backbone": {"checkpoint": str(tiny.llava(root / "llava", layers=32, hidden=HIDDEN, image=48))},
            "data": {"path": f"coco:{tiny.coco(root / 'coco', train=BATCH, val=2)}"},
            "teachers": {
                "depth": {"id": str(tiny.depth_teacher(root / "depth", width=64, size=42))},
                "seg": {"id": str(tiny.seg_teacher(root / "seg", width=8))},
                "gen": {"id": str(tiny.gen_teacher(root / "gen", projection=64))},
            },
            "fit": {"epochs": 1, "batch_size": BATCH, "micro_batch": BATCH, "workers": 0, "ridge": False},
        }
    )
    accelerator = Accelerator(cpu=True)
    images = training_images(recipe.data)
    backbone = arm_backbone(recipe, "no", accelerator.device)
    chosen = list(range(32 - layers + 1, 33))  # the last ones: the forward is as deep in both cases
    return Fit(
        recipe, backbone, load_teachers(recipe, accelerator.device), images, chosen, ["no"], root / "state", accelerator
    )


def measure(layers: int, repeats: int) -> dict[str, float]:
    """Times one step and its parts, in milliseconds, and the peak memory it adds, in MB."""
    with tempfile.TemporaryDirectory() as folder:
        fit = make_fit(Path(folder), layers)
        state = fit.start()
        steps = plan_steps(len(fit.images), fit.recipe.fit)
        (micro,) = steps[0]
        prepare = {name: teacher.prepare for name, teacher in fit.teachers.items()}
        read = (fit.images, [micro], fit.backbone.prepare, prepare, "square", 0, fit.accelerator.device)
        prepared = next(micro_batches(*read))
        assert prepared.student is not None
        batch = prepared.student
        parameters = state.optimizer.param_groups[0]["params"]
        base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        def step() -> None:
            fit._step(state, steps[0], iter([prepared]), 1000, gather=False)

        step()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base
        own = 16 * sum(p.numel() for p in parameters)  # weights, gradients, two moments: grows with the layers, rightly
        targets = {name: teacher.target(prepared.pixels[name]) for name, teacher in fit.teachers.items()}
        states, _ = fit.backbone.hidden_states([fit.images.read(0)] * BATCH, str(fit.layers[0]))
        hidden = states[fit.layers[0]]

        def probes_alone() -> None:
            for key, probe in state.banks["no"].probes.items():
                F.smooth_l1_loss(probe(hidden), targets[key.teacher]).backward()

        @torch.no_grad()
        def forward() -> None:
            fit.backbone.core(**batch.inputs, use_cache=False)

        def optimise() -> None:
            for bank in state.banks.values():
                for probe in bank.probes.values():
                    torch.nn.utils.clip_grad_norm_(probe.parameters(), 1.0)
            state.optimizer.step()

        return {
            "step": best_of(repeats, step),
            "backbone": best_of(repeats, forward),
            "probes": best_of(repeats, probes_alone),
            "optimiser": best_of(repeats, optimise),
            "teachers": best_of(repeats, lambda: [t.target(prepared.pixels[n]) for n, t in fit.teachers.items()]),
            "reading": best_of(2, lambda: next(micro_batches(*read))),
            "peak_mb": peak / 1024,
            "probe_state_mb": own * 3 / 4 / 2**20,  # gradients and moments; the weights were there before
        }


def main() -> None:
    """Prints a table; each row is measured in a process of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    if options.layers:
        torch.set_num_threads(2)
        sys.stdout.write("\n" + json.dumps(measure(options.layers, options.repeats)))
        return
    out = sys.stdout.write
    out("layers  step/floor  step  = backbone + probes + optimiser + teachers (ms)")
    out("   reading (ms)   peak MB  probe state MB\n")
    rows = {}
    for layers in (4, 32):
        command = [sys.executable, "-m", "tests.benchmarks.fit_step", "--layers", str(layers)]
        done = subprocess.run([*command, "--repeats", str(options.repeats)], capture_output=True, text=True, check=True)
        row = rows[layers] = json.loads(done.stdout.splitlines()[-1])
        floor = row["backbone"] + row["probes"] + row["optimiser"]
        parts = f"{row['backbone']:8.0f} {row['probes']:8.0f} {row['optimiser']:9.0f} {row['teachers']:9.0f}"
        out(f"{layers:6d}  {row['step'] / floor:10.2f}  {row['step']:4.0f}  {parts} {row['reading']:23.0f}")
        out(f" {row['peak_mb']:13.0f} {row['probe_state_mb']:15.0f}\n")
    grown = rows[32]["peak_mb"] - rows[4]["peak_mb"]
    expected = rows[32]["probe_state_mb"] - rows[4]["probe_state_mb"]
    out(f"from 4 to 32 layers the peak grows by {grown:.0f} MB; ")
    out(f"gradients and moments of the probes are {expected:.0f} MB of it\n")


if __name__ == "__main__":
    main()
