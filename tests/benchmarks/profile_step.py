"""Where the time of one training step goes, by PyTorch's profiler, and what stacking probes would save.

    python -m tests.benchmarks.profile_step --size middle

Probes of one shape (the same teacher's, of another control or seed) can run as one stacked module; so can the first
projection of all probes of a layer. Both are compared with the actual code: one probe after the other.
"""

import argparse
import copy
import logging
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.func import functional_call, stack_module_state, vmap
from torch.profiler import ProfilerActivity, profile

from probing.data.dataloader import MicroBatches, micro_batches
from probing.probes.resampler import Resampler
from probing.training.schedule import plan_steps
from tests.benchmarks.fit_step import BATCH, trainer_of
from tests.benchmarks.sizes import SIZES
from tests.benchmarks.timing import best_in_turns


def main() -> None:
    """Prints the table, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="toy")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(options.threads)
    out = sys.stdout.write
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(options.size, Path(folder), None, bf16=False)
        state = trainer.initial_state()
        step = replace(plan_steps(len(trainer.images), trainer.recipe.fit)[0], first=False)
        prepare = {name: teacher.prepare for name, teacher in trainer.teachers.items()}
        read = micro_batches(
            MicroBatches(trainer.images, step.micros, trainer.backbone.prepare, prepare), 0, trainer.accelerator.device
        )
        prepared = next(read)
        assert prepared.student is not None
        trainer.take_step(state, step, iter([prepared]), 1000)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            trainer.take_step(state, step, iter([prepared]), 1000)
        out(profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=45) + "\n")

        tokens = prepared.student.tokens.select(
            torch.randn(BATCH[options.size], prepared.student.tokens.kinds.shape[1], trainer.backbone.hidden_size),
            trainer.recipe.probe.keys,
        )[0]
        probes = [probe for _, probe in state.banks["none"].at(trainer.layers[0])]
        for probe in probes:
            twins = [Resampler(probe.config) for _ in range(2)]
            parameters, _ = stack_module_state(twins)
            base = copy.deepcopy(twins[0]).to("meta")

            def apart(twins: list[Resampler] = twins) -> None:
                for twin in twins:
                    F.mse_loss(twin(tokens), torch.zeros(())).backward()

            def stacked(base: Resampler = base, parameters: dict[str, torch.Tensor] = parameters) -> None:
                found = vmap(lambda own: functional_call(base, own, (tokens,)))(parameters)
                F.mse_loss(found, torch.zeros(())).backward()

            times = best_in_turns({"apart": apart, "stacked": stacked}, seconds=3)
            shape = f"{probe.config.queries} x {probe.config.output_width}"
            out(f"two probes of a target of {shape}: stacked takes {times['stacked'] / times['apart']:.2f} x\n")
        firsts = [torch.nn.Linear(trainer.backbone.hidden_size, probe.config.width) for probe in probes]
        joined = torch.nn.Linear(trainer.backbone.hidden_size, sum(probe.config.width for probe in probes))
        works = {
            "apart": lambda: [first(tokens).sum().backward() for first in firsts],
            "joined": lambda: joined(tokens).sum().backward(),
        }
        times = best_in_turns(works, seconds=3)
        out(f"first projection of {len(probes)} probes: joined takes {times['joined'] / times['apart']:.2f} x\n")


if __name__ == "__main__":
    main()
