"""One pass over the data trains every probe.

Each micro-batch goes through the backbone once. As soon as a layer's state exists, the probes of that layer (every
teacher, every seed, the shuffled control) run forward and backward on it, and the state is free again: memory grows
with the probes, not with the states. Probes share nothing, so training many gives the same numbers as training one.
"""

import contextlib
import itertools
import logging
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor

from probing.data.coco import ImageList
from probing.data.dataloader import MicroBatches, Prepared, micro_batches
from probing.data.target_cache import TargetCache
from probing.models.base import Backbone, Layer, layer_name
from probing.models.finite import NotFinite, finite_rows, zero_others
from probing.probes.bank import ProbeBank, ProbeKey, probe_configs
from probing.probes.ridge import RidgeReadout, RidgeSums, place_states
from probing.recipe import ProbeRunRecipe
from probing.teachers import Teacher
from probing.training.schedule import learning_rate, plan_steps, require_enough
from probing.training.state import FitState
from probing.training.trackers import curve_names, curves
from probing.utils.distributed import add_up_gradients
from probing.utils.errors import UserError
from probing.utils.files import disk_errors, reading, whole_file
from probing.utils.interrupt import Interrupted, Interruption
from probing.utils.pretrained import slow_in_bfloat16
from probing.utils.progress import Progress

logger = logging.getLogger(__name__)


@dataclass
class _Tally:
    """What micro-batches leave on the device.

    Attributes:
        sums: (2, columns and teachers), shares of the losses, and how many images count.
        finite: per micro-batch its images, and (layers and teachers, B), False where one is not finite.
    """

    sums: Tensor
    finite: list[tuple[list[int], Tensor]] = field(default_factory=list)

    @classmethod
    def empty(cls, columns: int, dtype: torch.dtype, device: torch.device) -> "_Tally":
        """Of no micro-batch."""
        return cls(torch.zeros(2, columns, dtype=dtype, device=device))

    def __iadd__(self, other: "_Tally") -> "_Tally":
        self.sums += other.sums
        self.finite += other.finite
        return self


def _norm(parameters: Sequence[Tensor]) -> Tensor:
    """Norm of a probe's gradient, on the probe's device; 0 where it has none."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device=parameters[0].device)


def _load(file: Path) -> Any:
    # To the CPU first: processes without accelerator have devices such as cpu:0, which torch cannot load to.
    return torch.load(file, map_location=lambda storage, _: storage, weights_only=True)


@dataclass
class Fit:
    """The training of all probes on one set of backbone weights.

    Attributes:
        recipe: of the run.
        backbone: where the hidden states come from.
        teachers: where the targets come from.
        images: training images.
        layers: probed layers, of this process where `spread`.
        controls: what is trained: `none` and perhaps `shuffled`, or `random`.
        folder: where the training state is kept while the work lasts.
        accelerator: device and processes.
        kept: features of teachers that are read instead of being computed.
        spread: the other processes train other layers, each on all images; see `spread_layers`.
        tracked: where TensorBoard's files go, of the layers of the main process; None for no curves.
    """

    recipe: ProbeRunRecipe
    backbone: Backbone
    teachers: dict[str, Teacher]
    images: ImageList
    layers: Sequence[Layer]
    controls: Sequence[str]
    folder: Path
    accelerator: Accelerator
    kept: dict[str, TargetCache] = field(default_factory=dict)
    spread: bool = False
    tracked: Path | None = None

    @property
    def _place(self) -> tuple[int, int]:
        """Which part of every batch is this process's, and of how many."""
        return (0, 1) if self.spread else (self.accelerator.process_index, self.accelerator.num_processes)

    def start(self, device: torch.device | None = None) -> FitState:
        """Fresh probes and optimiser, on the accelerator unless a device is given."""
        configs = probe_configs(self.recipe.probe, self.backbone.hidden_size, self.teachers)
        fit, device = self.recipe.fit, device or self.accelerator.device
        banks = {
            c: ProbeBank.build(configs, self.layers, fit.seeds, self.recipe.probe.keys, device) for c in self.controls
        }
        parameters = [p for bank in banks.values() for p in bank.parameters()]
        fused = device.type in ("cpu", "cuda")
        optimizer = torch.optim.AdamW(parameters, lr=fit.lr, weight_decay=fit.weight_decay, fused=fused)
        return FitState(banks, optimizer)

    def run(self) -> FitState:
        """Trains to the end, from the last saved state where there is one.

        Raises:
            Interrupted: Ctrl-C or SIGTERM; the state is saved.
            UserError: the disk is full, or the saved state does not fit.
        """
        fit, main = self.recipe.fit, self.accelerator.is_main_process
        if fit.bf16 and slow_in_bfloat16(self.accelerator.device):
            logger.warning("fit.bf16 is slow on this CPU, which has no bfloat16 instructions; leave it out")
        state = self.start()
        self._resume(state)
        self.accelerator.wait_for_everyone()  # where no step is left, the main process soon clears the state away
        require_enough(len(self.images), fit, self._place[1])
        steps = plan_steps(len(self.images), fit, *self._place)
        first_epoch = len(steps) // fit.epochs
        batches = self.batches(steps[state.step :])
        saved = time.monotonic()
        what = "random-weights control" if "random" in self.controls else "probes"
        progress = Progress(what, len(steps), state.step, show=main)
        names = curve_names(state.columns, list(self.teachers))
        told = curves(fit.report_to if main else "none", self.tracked, names, state.step)
        with Interruption().watch() as interruption, progress, told as told_of:
            while state.step < len(steps):
                started = time.monotonic()
                row = self._step(state, steps[state.step], batches, len(steps), gather=state.step < first_epoch)
                state.losses.append(row)
                state.step += 1
                state.seconds += time.monotonic() - started
                told_of.after_step(state.losses, len(steps), state.optimizer.param_groups[0]["lr"])
                finite = [loss for loss in row[: len(state.columns)] if math.isfinite(loss)]
                progress.advance(f"mean loss {np.mean(finite):.4f}" if finite else "no finite loss")
                stop, due = self._agree(interruption.asked, time.monotonic() - saved >= 60 * fit.save_minutes)
                if stop or due or state.step == len(steps):
                    self._save(state)
                    saved = time.monotonic()
                if stop:
                    raise Interrupted
        return state

    def batches(self, steps: list[list[list[int]]]) -> Iterator[Prepared]:
        """The micro-batches of some steps, one after the other."""
        plan = [micro for step in steps for micro in step]
        if not plan:
            return iter(())
        prepare = {name: teacher.prepare for name, teacher in self.teachers.items()}
        dataset = MicroBatches(
            self.images, plan, self.backbone.prepare, prepare, self.recipe.data.view, target_caches=self.kept
        )
        return micro_batches(dataset, self.recipe.fit.workers, self.accelerator.device)

    def _step(
        self, state: FitState, micros: list[list[int]], batches: Iterator[Prepared], steps: int, gather: bool
    ) -> list[float]:
        """One optimiser step; returns one loss per column, then the mean targets' losses.

        A loss is the mean over the images that count for its column. Where there is none, or loss or gradient is not
        finite, the probe takes no step: its weights and moments stay as they are, and the loss is NaN. All of that is
        decided on the host, from one transfer per step.
        """
        _, world = self._place
        columns = {column: index for index, column in enumerate(state.columns)}
        batch = self._global_batch(micros)
        tally = _Tally.empty(len(columns) + len(self.teachers), self._wide, self.accelerator.device)
        state.gathered |= gather
        for prepared in itertools.islice(batches, len(micros)):
            state.skipped |= {skip.image: skip for skip in prepared.skipped}
            if prepared.student is not None:
                tally += self.micro_batch(state, prepared, len(prepared.indices) / batch, gather, columns)
        if world > 1:
            add_up_gradients(state.optimizer.param_groups[0]["params"], self.accelerator)
            tally.sums = self.accelerator.reduce(tally.sums, "sum")
        norms = [_norm(own) for own in state.parameters]
        (losses, counts), norms_found = self._to_host(state, tally, norms)
        counted = counts > 0
        losses = np.divide(losses * batch, counts, out=np.full_like(losses, math.nan), where=counted)
        fit = self.recipe.fit
        for index, (own, norm) in enumerate(zip(state.parameters, norms, strict=True)):
            if not np.isfinite([losses[index], norms_found[index]]).all():
                losses[index] = math.nan
                for parameter in own:
                    parameter.grad = None  # a zero gradient would still decay the weights and move along old moments
                continue
            if counts[index] != batch:
                scale = batch / counts[index]
                norm = norm * scale
                torch._foreach_mul_([p.grad for p in own if p.grad is not None], scale)
            if fit.max_grad_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(own, fit.max_grad_norm, norm)
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(state.step, steps, fit.lr, fit.warmup)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        return losses.tolist()

    def _to_host(
        self, state: FitState, tally: "_Tally", norms: list[Tensor]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Brings losses and counts (2, columns) and gradient norms over, and notes images that are not finite."""
        flags = [finite.flatten().to(tally.sums.dtype) for _, finite in tally.finite]
        everything = [tally.sums.flatten(), torch.stack(norms).to(tally.sums.dtype), *flags]
        sums, norm, found = np.split(
            torch.cat(everything).cpu().double().numpy(), np.cumsum([tally.sums.numel(), len(norms)])
        )
        places = [("layer", layer_name(layer)) for layer in self.layers] + [("teacher", name) for name in self.teachers]
        for indices, _ in tally.finite:
            flag, found = np.split(found, [len(places) * len(indices)])
            for place, row in zip(places, flag.reshape(len(places), -1), strict=True):
                if not row.all():
                    images = state.not_finite.setdefault(place, np.zeros(len(self.images), dtype=np.bool_))
                    images[np.asarray(indices)[row == 0]] = True
        return sums.reshape(2, -1), norm

    def _global_batch(self, micros: list[list[int]]) -> int:
        mine = sum(map(len, micros))
        if self.spread:
            return mine
        return int(self.accelerator.reduce(torch.tensor(mine, device=self.accelerator.device), "sum"))

    def micro_batch(
        self, state: FitState, prepared: Prepared, weight: float, gather: bool, columns: dict[tuple[str, ProbeKey], int]
    ) -> "_Tally":
        """Forward and backward of every probe on one micro-batch.

        An image whose hidden state at a layer is not finite is left out of that layer, and one whose target is not
        finite of that teacher; both are masked on the device.

        Args:
            state: probes and sums; gradients are added to the probes' own.
            prepared: the micro-batch.
            weight: of its losses in those of the step.
            gather: whether it is seen for the first time, so that it counts in ridge sums and mean targets.
            columns: place of each probe in the result.

        Returns:
            Its share of the losses and the images that count, one per column and then one per teacher, for the mean
            target so far.
        """
        assert prepared.student is not None
        device = self.accelerator.device
        batch = prepared.student.to(self.backbone.device)
        features = {name: prepared.target(teacher).to(device) for name, teacher in self.teachers.items()}
        finite = {name: finite_rows(feature) for name, feature in features.items()}
        targets = {name: zero_others(feature, finite[name]) for name, feature in features.items()}
        wanted = {control: (targets, finite) for control in state.banks}
        if "shuffled" in state.banks:
            rolled = [{n: t.roll(1, dims=0) for n, t in one.items()} for one in (targets, finite)]
            wanted["shuffled"] = (rolled[0], rolled[1])
        tally = _Tally.empty(len(columns) + len(self.teachers), self._wide, device)
        losses, counts = tally.sums
        for index, (name, target) in enumerate(targets.items(), start=len(columns)):
            zero = torch.zeros_like(target[0], dtype=self._wide), torch.zeros((), dtype=torch.long, device=device)
            total, count = state.target_sums.get(name, zero)
            if gather:
                total, count = total + target.sum(dim=0, dtype=self._wide), count + finite[name].sum()
                state.target_sums[name] = (total, count)
            mean = (total / count.clamp(min=1)).float().expand_as(target)
            losses[index] = F.smooth_l1_loss(zero_others(mean, finite[name]), target) * weight
            counts[index] = finite[name].sum()
        rows: list[Tensor] = []

        def visit(layer: Layer, hidden: Tensor) -> None:
            states = hidden.to(device=device, dtype=None if self.recipe.fit.bf16 else torch.float32)
            keys, mask = batch.tokens.select(states, self.recipe.probe.keys)
            good = finite_rows(keys)
            keys = zero_others(keys, good)
            rows.append(good)
            for control, bank in state.banks.items():
                if control == "shuffled" and len(prepared.indices) < 2:
                    continue  # one image cannot be paired with another
                own_targets, own_finite = wanted[control]
                chosen = {name: good & own for name, own in own_finite.items()}
                numbers = {name: one.sum() for name, one in chosen.items()}
                for key, probe in bank.at(layer):
                    with self._products():
                        prediction = probe(keys, mask)
                    target = own_targets[key.teacher]
                    compared = torch.where(chosen[key.teacher][:, None, None], prediction.float(), target)
                    loss = F.smooth_l1_loss(compared, target)
                    (loss * weight).backward()
                    losses[columns[control, key]] += loss.detach() * weight
                    counts[columns[control, key]] += numbers[key.teacher]
            if gather and self.recipe.fit.ridge:
                image_states = batch.tokens.image_states(hidden).to(device)
                for name, teacher in self.teachers.items():
                    placed = place_states(image_states, batch.tokens.grid, teacher.grid)
                    state.ridge[name, layer].add(placed, targets[name], finite_rows(placed) & finite[name])

        self.backbone.stream(batch, self.layers, visit)
        tally.finite.append((prepared.indices, torch.stack([*rows, *finite.values()])))
        return tally

    def _products(self) -> contextlib.AbstractContextManager[Any]:
        if self.recipe.fit.bf16:
            return torch.autocast(self.accelerator.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    @property
    def _wide(self) -> torch.dtype:
        """Numbers for sums: float64, where the device has it."""
        return torch.float32 if self.accelerator.device.type == "mps" else torch.float64

    def _agree(self, *flags: bool) -> list[bool]:
        """Raises a flag on every process where one process raises it, so that all save at the same step."""
        if self.accelerator.num_processes == 1:
            return list(flags)
        raised = self.accelerator.reduce(
            torch.tensor(flags, dtype=torch.float32, device=self.accelerator.device), "sum"
        )
        return [bool(flag) for flag in raised > 0]

    def _collect(self, state: FitState) -> None:
        """Adds up what each process has summed: of ridge readouts in the main one, of targets in all of them.

        All add the same things in the same order, whatever they have seen: each waits here for the others.
        """
        if self._place[1] == 1:
            return
        state.skipped = {skip.image: skip for skip in gather_object(list(state.skipped.values()))}
        not_finite: NotFinite = {}
        for place, images in gather_object(list(state.not_finite.items())):
            not_finite[place] = images | not_finite.get(place, False)
        state.not_finite = not_finite
        if not state.gathered:
            return
        state.gathered = False
        device = self.accelerator.device
        for layer, name in itertools.product(self.layers, self.teachers) if self.recipe.fit.ridge else ():
            nothing = RidgeSums.of_nothing(self.backbone.hidden_size, self.teachers[name].shape[1], device)
            own = state.ridge.pop((name, layer), nothing).sums
            sums = {part: self.accelerator.reduce(value, "sum") for part, value in own.items()}
            if self.accelerator.is_main_process and sums["n"]:
                state.ridge[name, layer] = RidgeSums(sums)
        for name, teacher in self.teachers.items():
            none = (
                torch.zeros(teacher.shape, dtype=self._wide, device=device),
                torch.zeros((), dtype=torch.long, device=device),
            )
            (total, count), (shared, known) = state.target_sums.get(name, none), state.shared_sums.get(name, none)
            number = known + self.accelerator.reduce(count - known, "sum")
            total = shared + self.accelerator.reduce(total - shared, "sum")
            if number:
                state.target_sums[name] = state.shared_sums[name] = (total, number)

    def _save(self, state: FitState) -> None:
        """Saves the training state; the last one is replaced only when the new one is whole."""
        self._collect(state)
        file = self._state_file(state.step)
        if self.spread or self.accelerator.is_main_process:
            # Through a file of Python's own: torch's would report a full disk as an unnamed stream error.
            with disk_errors(self.folder), whole_file(file) as temporary, temporary.open("wb") as opened:
                torch.save(state.dump(), opened)
            logger.info("saved the training state at step %d", state.step)
        self.accelerator.wait_for_everyone()
        for old in self._own_parts().values() if self.spread else ():
            if old != file:
                old.unlink(missing_ok=True)  # the main process may be clearing all away

    def _state_file(self, step: int) -> Path:
        """Where the state is saved; where every process saves its own part, the step tells which of them fit."""
        if not self.spread:
            return self.folder / "state.pt"
        return self.folder / f"state_{self.accelerator.process_index}_of_{self.accelerator.num_processes}.{step}.pt"

    def _own_parts(self) -> dict[int, Path]:
        """Saved parts of this process, by step."""
        there = self.folder.glob(self._state_file(0).name.replace(".0.pt", ".*.pt"))
        return {int(file.suffixes[0][1:]): file for file in there}

    def _last_saved(self) -> Path | None:
        """The newest state that all processes can go on from.

        Raises:
            UserError: there is one of another number of processes, or of another `fit.spread`.
        """
        kinds = {re.sub(r"\d+_of", "_of", file.name.split(".")[0]) for file in self.folder.glob("state*.pt")}
        mine = re.sub(r"\d+_of", "_of", self._state_file(0).name.split(".")[0])
        if kinds - {mine}:
            raise UserError(
                f"{self.folder} was saved by another number of processes, or with another fit.spread; start as many as "
                "then, with the same, or remove it to train from the start"
            )
        if not self.spread:
            return self._state_file(0) if self._state_file(0).exists() else None
        steps = set.intersection(*gather_object([set(self._own_parts())]))
        return self._state_file(max(steps)) if steps else None

    def _resume(self, state: FitState) -> None:
        file = self._last_saved()
        if file is None:
            return
        with reading(file, f"remove {self.folder} to train from the start"):
            state.restore(_load(file))
        if not self.spread and not self.accelerator.is_main_process:  # the main process holds those of all
            state.ridge.clear()
        logger.info("going on from step %d", state.step)

    def whole(self, layers: Sequence[Layer], step: int) -> FitState:
        """What all processes trained, each some of the layers, on the CPU; call it on the main process, after `run`.

        Args:
            layers: all of them.
            step: the last one; a process that was killed may have left an earlier state.
        """
        together = replace(self, layers=layers).start(torch.device("cpu"))
        for file in sorted(self.folder.glob(f"state_*.{step}.pt")):
            together.take_in(_load(file), len(self.teachers))
        return together

    def readout(self, state: FitState) -> RidgeReadout:
        """Solves the ridge readouts from the sums; call it on the main process, after `run`."""
        penalty = self.recipe.fit.ridge_penalty
        return RidgeReadout({key: sums.solve(penalty) for key, sums in state.ridge.items()})

    def means(self, state: FitState) -> dict[str, Tensor]:
        """Mean target (N, D) per teacher over the training split, float32."""
        return {name: (total / count.clamp(min=1)).float().cpu() for name, (total, count) in state.target_sums.items()}
