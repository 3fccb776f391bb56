"""Trains all probes in one pass over the data.

Each micro-batch goes through the backbone once. When a layer's state exists, all probes of that layer (each teacher,
seed and control) run forward and backward on it, and the state is freed, so memory grows with the probes, not with the
states. Probes share no parameters, so joint training gives the same numbers as separate training.
"""

import contextlib
import functools
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from numpy.typing import NDArray
from torch import Tensor

from probing.data.coco import ImageList
from probing.data.dataloader import MicroBatches, Prepared, micro_batches
from probing.data.target_cache import TargetCache
from probing.models.base import Backbone, Layer, layer_name
from probing.models.finite import NotFinite, finite_rows, zero_others
from probing.models.token_map import TokenMap
from probing.probes.bank import ProbeBank, ProbeKey, probe_configs
from probing.probes.ridge import RidgeReadout, RidgeSource, RidgeSums, batch_precision, resize_states
from probing.recipe import ProbeRunRecipe
from probing.teachers import Teacher
from probing.training.buffer import ActivationBuffer, plan_window
from probing.training.prequential import POOLED, ErrorKey, PrequentialErrors
from probing.training.schedule import Step, last_visits, learning_rate, plan_steps, require_enough
from probing.training.state import TrainerState
from probing.training.state_files import StateFiles
from probing.training.trackers import curve_names, loss_logger
from probing.utils.distributed import all_reduce_gradients
from probing.utils.interrupt import Interrupted, Interruption
from probing.utils.pretrained import slow_in_bfloat16
from probing.utils.progress import Progress

logger = logging.getLogger(__name__)


@dataclass
class _StepSums:
    """Sums over the micro-batches of a step, on the device.

    Attributes:
        sums: (2, columns + teachers), weighted losses and numbers of valid images.
        finite: per micro-batch its image indices, and a mask (layers + teachers, B) of finite features.
    """

    sums: Tensor
    finite: list[tuple[list[int], Tensor]] = field(default_factory=list)

    @classmethod
    def empty(cls, columns: int, dtype: torch.dtype, device: torch.device) -> "_StepSums":
        return cls(torch.zeros(2, columns, dtype=dtype, device=device))

    def __iadd__(self, other: "_StepSums") -> "_StepSums":
        self.sums += other.sums
        self.finite += other.finite
        return self


def _norm(parameters: Sequence[Tensor]) -> Tensor:
    """Returns the norm of a probe's gradient, on its device; 0 without gradient."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device=parameters[0].device)


@dataclass
class ProbeTrainer:
    """Trains all probes on one set of backbone weights.

    Attributes:
        recipe: of the run.
        backbone: computes the hidden states.
        teachers: compute the targets.
        images: training images.
        layers: probed layers; if `spread`, those of this process.
        controls: `none` and possibly `shuffled`, or `random`.
        folder: of the training state.
        accelerator: device and processes.
        target_caches: cached targets by teacher.
        spread: whether each process trains some of the layers on all images, see `spread_layers`.
        log_folder: of the tracker's files; None for no logging.
    """

    recipe: ProbeRunRecipe
    backbone: Backbone
    teachers: dict[str, Teacher]
    images: ImageList
    layers: Sequence[Layer]
    controls: Sequence[str]
    folder: Path
    accelerator: Accelerator
    target_caches: dict[str, TargetCache] = field(default_factory=dict)
    spread: bool = False
    log_folder: Path | None = None

    @property
    def files(self) -> StateFiles:
        """Of the training state."""
        return StateFiles(self.folder, self.accelerator, self.spread)

    @property
    def _rank_and_world_size(self) -> tuple[int, int]:
        """Rank and number of the processes that divide each batch."""
        return (0, 1) if self.spread else (self.accelerator.process_index, self.accelerator.num_processes)

    @functools.cached_property
    def _ridge_teachers(self) -> dict[RidgeSource, list[str]]:
        """Names of the teachers whose ridge readouts share XᵀX: of one grid, or all at a position."""
        if not self.recipe.fit.ridge:
            return {}
        groups: dict[RidgeSource, list[str]] = {}
        for name, teacher in self.teachers.items():
            groups.setdefault(teacher.grid, []).append(name)
        return groups | {position: list(self.teachers) for position in self.recipe.fit.positions}

    def initial_state(self, device: torch.device | None = None) -> TrainerState:
        """Initialises probes and optimiser, by default on the accelerator."""
        configs = probe_configs(self.recipe.probe, self.backbone.hidden_size, self.teachers)
        fit, device = self.recipe.fit, device or self.accelerator.device
        banks = {
            c: ProbeBank.build(configs, self.layers, fit.seeds, self.recipe.probe.keys, device) for c in self.controls
        }
        parameters = [p for bank in banks.values() for p in bank.parameters()]
        fused = device.type in ("cpu", "cuda")
        optimizer = torch.optim.AdamW(parameters, lr=fit.lr, weight_decay=fit.weight_decay, fused=fused)
        return TrainerState(banks, optimizer, PrequentialErrors(len(self.images)))

    def run(self) -> TrainerState:
        """Trains to the last step, from the saved state if there is one.

        Raises:
            Interrupted: Ctrl-C or SIGTERM; the state is saved.
            UserError: the disk is full, or the saved state is of another training.
        """
        fit, main = self.recipe.fit, self.accelerator.is_main_process
        if fit.bf16 and slow_in_bfloat16(self.accelerator.device):
            logger.warning("fit.bf16 is slow on this CPU, which has no bfloat16 instructions; set fit.bf16=false")
        state = self.initial_state()
        self.files.restore(state)
        self.accelerator.wait_for_everyone()  # if no step is left, the main process soon removes the state
        rank, world_size = self._rank_and_world_size
        require_enough(len(self.images), fit, world_size)
        if state.window is None:
            window = plan_window(
                self.recipe, self.backbone, self.teachers.values(), self.layers, self.images, world_size
            )
            state.window = int(broadcast_object_list([window])[0])  # processes may see different free memory
        steps = plan_steps(len(self.images), fit, rank, world_size, state.window)
        buffer = ActivationBuffer(self.layers, self.accelerator.device) if state.window else None
        leaving = last_visits(steps) if buffer else []
        if buffer:
            self._refill(buffer, steps[: state.step], leaving[: state.step])
        batches = self.batches([step for step in steps[state.step :] if step.first or not buffer])
        saved = time.monotonic()
        title = "random-weights control" if "random" in self.controls else "probes"
        progress = Progress(title, len(steps), state.step, show=main)
        names = curve_names(state.columns, list(self.teachers))
        loss_log = loss_logger(fit.report_to if main else "none", self.log_folder, names, state.step)
        with Interruption().watch() as interruption, progress, loss_log as log:
            while state.step < len(steps):
                started = time.monotonic()
                row = self.take_step(state, steps[state.step], batches, len(steps), buffer)
                if buffer:
                    buffer.drop(leaving[state.step])
                state.losses.append(row)
                state.step += 1
                state.seconds += time.monotonic() - started
                log.after_step(state.losses, len(steps), state.optimizer.param_groups[0]["lr"])
                finite = [loss for loss in row[: len(state.columns)] if math.isfinite(loss)]
                progress.advance(f"mean loss {np.mean(finite):.4f}" if finite else "no finite loss")
                stop, due = self._agree(interruption.requested, time.monotonic() - saved >= 60 * fit.save_minutes)
                if stop or due or state.step == len(steps):
                    self._collect(state)
                    self.files.save(state)
                    saved = time.monotonic()
                if stop:
                    raise Interrupted
        return state

    def _refill(self, buffer: ActivationBuffer, taken: list[Step], left: list[list[int]]) -> None:
        """Computes again what the buffer held after the steps that were taken, in the same micro-batches."""
        gone = {image for images in left for image in images}
        due = [[m for m in step.micros if not gone.issuperset(m)] for step in taken if step.first]
        for prepared in self.batches([Step(micros, True) for micros in due]):
            if prepared.student is not None:
                self._targets(prepared, buffer)
                self._visit_layers(prepared, buffer, lambda *_: None)
            buffer.drop(gone)
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def batches(self, steps: list[Step]) -> Iterator[Prepared]:
        """Yields the micro-batches of steps, in order."""
        plan = [micro for step in steps for micro in step.micros]
        if not plan:
            return iter(())
        prepare = {name: teacher.prepare for name, teacher in self.teachers.items()}
        dataset = MicroBatches(
            self.images, plan, self.backbone.prepare, prepare, self.recipe.data.view, target_caches=self.target_caches
        )
        return micro_batches(dataset, self.recipe.fit.workers, self.accelerator.device)

    def take_step(
        self,
        state: TrainerState,
        step: Step,
        batches: Iterator[Prepared],
        steps: int,
        buffer: ActivationBuffer | None = None,
    ) -> list[float]:
        """Takes one optimiser step; returns one loss per probe, then those of the mean targets.

        A loss is the mean over the valid images of its probe. Without valid image, or with a loss or gradient that is
        not finite, the probe skips the step: weights and moments do not change, and the loss is NaN. The
        host decides this after one transfer per step.
        """
        columns = {column: index for index, column in enumerate(state.columns)}
        batch = self._global_batch(step.micros)
        totals = _StepSums.empty(len(columns) + len(self.teachers), torch.float64, self.accelerator.device)
        state.sums_changed |= step.first
        if step.first and state.prequential.part_begins:
            self._begin_part(state)
        if buffer and not step.first:
            batches = map(buffer.prepared, step.micros)
        for prepared in itertools.islice(batches, len(step.micros)):
            state.skipped |= {skip.image: skip for skip in prepared.skipped}
            if prepared.indices:
                weight = len(prepared.indices) / batch
                totals += self.micro_batch(state, prepared, weight, step.first, columns, buffer)
        state.prequential.batches += step.first
        if self._rank_and_world_size[1] > 1:
            all_reduce_gradients(state.optimizer.param_groups[0]["params"])
            totals.sums = self.accelerator.reduce(totals.sums, "sum")
        norms = [_norm(parameters) for parameters in state.parameters]
        (losses, counts), host_norms = self._to_host(state, totals, norms)
        losses = np.divide(losses * batch, counts, out=np.full_like(losses, math.nan), where=counts > 0)
        fit = self.recipe.fit
        for index, (parameters, norm) in enumerate(zip(state.parameters, norms, strict=True)):
            if not np.isfinite([losses[index], host_norms[index]]).all():
                losses[index] = math.nan
                for parameter in parameters:
                    parameter.grad = None  # a zero gradient would still apply weight decay and momentum
                continue
            scale = batch / counts[index]
            if scale != 1:
                norm = norm * scale
                torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], scale)
            # Below the limit clipping would multiply by one; torch adds 1e-6 to the norm.
            if fit.max_grad_norm is not None and scale * host_norms[index] + 1e-6 > fit.max_grad_norm:
                torch.nn.utils.clip_grads_with_norm_(parameters, fit.max_grad_norm, norm)
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(state.step, steps, fit.lr, fit.warmup)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        return losses.tolist()

    def _to_host(
        self, state: TrainerState, totals: "_StepSums", norms: list[Tensor]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Transfers losses and counts (2, columns) and gradient norms, and records images that are not finite."""
        dtype = totals.sums.dtype
        masks = [finite.flatten().to(dtype) for _, finite in totals.finite]
        values = torch.cat([totals.sums.flatten(), torch.stack(norms).to(dtype), *masks]).cpu().double().numpy()
        sums, norm, flags = np.split(values, np.cumsum([totals.sums.numel(), len(norms)]))
        sources = [("layer", layer_name(layer)) for layer in self.layers] + [
            ("teacher", name) for name in self.teachers
        ]
        for indices, _ in totals.finite:
            mask, flags = np.split(flags, [len(sources) * len(indices)])
            for source, row in zip(sources, mask.reshape(len(sources), -1), strict=True):
                if not row.all():
                    images = state.not_finite.setdefault(source, np.zeros(len(self.images), dtype=np.bool_))
                    images[np.asarray(indices)[row == 0]] = True
        return sums.reshape(2, -1), norm

    def _global_batch(self, micros: list[list[int]]) -> int:
        count = sum(map(len, micros))
        if self._rank_and_world_size[1] == 1:
            return count
        return int(self.accelerator.reduce(torch.tensor(count, device=self.accelerator.device), "sum"))

    def micro_batch(
        self,
        state: TrainerState,
        prepared: Prepared,
        weight: float,
        gather: bool,
        columns: dict[tuple[str, ProbeKey], int],
        buffer: ActivationBuffer | None = None,
    ) -> "_StepSums":
        """Runs every probe forward and backward on one micro-batch.

        Images with a non-finite hidden state are excluded from that layer, and those with a non-finite target from that
        teacher; both are masked on the device.

        Args:
            state: probes and sums; gradients accumulate in the probes.
            prepared: the micro-batch.
            weight: of its losses in those of the step.
            gather: whether to add it to ridge sums and mean targets, as on the first visit of its images.
            columns: column of each probe in the result.
            buffer: has the states of a micro-batch without inputs; gets those of any other.

        Returns:
            Weighted losses and numbers of valid images, per probe and then per teacher for its running mean target.
        """
        device = self.accelerator.device
        features = self._targets(prepared, buffer)
        finite = {name: finite_rows(feature) for name, feature in features.items()}
        targets = {name: zero_others(feature, finite[name]) for name, feature in features.items()}
        by_control = {control: (targets, finite) for control in state.banks}
        if "shuffled" in state.banks:
            rolled = [{n: t.roll(1, dims=0) for n, t in tensors.items()} for tensors in (targets, finite)]
            by_control["shuffled"] = (rolled[0], rolled[1])
        totals = _StepSums.empty(len(columns) + len(self.teachers), torch.float64, device)
        losses, counts = totals.sums
        weights = "random" if "random" in state.banks else "none"
        positions = self.recipe.fit.positions
        mean_weights = None
        if positions and gather and prepared.student is not None:
            mean_weights = prepared.student.tokens.mean_weights(positions).to(device, non_blocking=True)
        mean_targets = {name: target.mean(dim=1, keepdim=True) for name, target in targets.items()} if positions else {}
        unseen = state.prequential if gather and state.prequential.means else None
        indices = torch.tensor(prepared.indices).to(device, non_blocking=True)
        for index, (name, target) in enumerate(targets.items(), start=len(columns)):
            zero = torch.zeros_like(target[0], dtype=torch.float64), torch.zeros((), dtype=torch.long, device=device)
            total, count = state.target_sums.get(name, zero)
            if gather:
                total, count = total + target.sum(dim=0, dtype=torch.float64), count + finite[name].sum()
                state.target_sums[name] = (total, count)
            mean = (total / count.clamp(min=1)).float().expand_as(target)
            losses[index] = F.smooth_l1_loss(zero_others(mean, finite[name]), target) * weight
            counts[index] = finite[name].sum()
            if unseen:
                for probe, constant in (("mean", unseen.means[name]), ("constant", unseen.means[name].mean(dim=0))):
                    unseen.add(ErrorKey(probe, weights, name, "", 0), indices, constant, target, finite[name])
                if positions:
                    pooled = ErrorKey("mean", weights, name, "", 0, POOLED)
                    unseen.add(pooled, indices, constant, mean_targets[name], finite[name])
        finite_states: list[Tensor] = []

        def train(layer: Layer, keys: Tensor, mask: Tensor | None) -> None:
            keys = keys if self.recipe.fit.bf16 else keys.float()
            finite_keys = finite_rows(keys)
            keys = zero_others(keys, finite_keys)
            finite_states.append(finite_keys)
            for control, bank in state.banks.items():
                if control == "shuffled" and len(prepared.indices) < 2:
                    continue  # one image cannot be paired with another
                control_targets, finite_targets = by_control[control]
                valid = {name: finite_keys & rows for name, rows in finite_targets.items()}
                valid_counts = {name: rows.sum() for name, rows in valid.items()}
                for key, probe in bank.at(layer):
                    with self._autocast():
                        prediction = probe(keys, mask)
                    prediction, target = prediction.float(), control_targets[key.teacher]
                    # Compared with itself, an excluded image has neither loss nor gradient.
                    compared = torch.where(valid[key.teacher][:, None, None], target, prediction.detach())
                    loss = F.smooth_l1_loss(prediction, compared)
                    (loss * weight).backward()
                    losses[columns[control, key]] += loss.detach() * weight
                    counts[columns[control, key]] += valid_counts[key.teacher]
                    if unseen:
                        series = ErrorKey("resampler", control, key.teacher, layer_name(layer), key.seed)
                        unseen.add(series, indices, prediction, target, valid[key.teacher])

        def add_to_ridge(layer: Layer, hidden: Tensor, tokens: TokenMap) -> None:
            patches = tokens.image_states(hidden).to(device)
            means: Iterator[Tensor] = iter(())
            if mean_weights is not None:
                means = iter((mean_weights.to(hidden.device) @ hidden.float()).to(device).split(1, dim=1))
            for source, names in self._ridge_teachers.items():
                if isinstance(source, str):
                    position, states, own_targets = source, next(means), mean_targets
                else:
                    position, states, own_targets = "", resize_states(patches, tokens.grid, source), targets
                chosen = torch.stack([finite_rows(states), *(finite[name] for name in names)]).all(dim=0)
                if unseen:
                    for name in names:
                        weight, bias = unseen.maps[name, layer_name(layer), position]
                        prediction = F.linear(states.to(weight.dtype), weight, bias)
                        seed = self.recipe.fit.seeds[0]
                        series = ErrorKey("ridge", weights, name, layer_name(layer), seed, position)
                        unseen.add(series, indices, prediction, own_targets[name], chosen)
                state.ridge[source, layer].add(states, {name: own_targets[name] for name in names}, chosen)

        self._visit_layers(prepared, buffer, train, add_to_ridge if gather and self._ridge_teachers else None)
        totals.finite.append((prepared.indices, torch.stack([*finite_states, *finite.values()])))
        return totals

    def _visit_layers(
        self,
        prepared: Prepared,
        buffer: ActivationBuffer | None,
        visit: Callable[[Layer, Tensor, Tensor | None], None],
        visit_all: Callable[[Layer, Tensor, TokenMap], None] | None = None,
    ) -> None:
        """Hands over each layer's states, from the buffer or from a forward pass, which fills the buffer.

        Args:
            prepared: the micro-batch; without inputs its states are in the buffer.
            buffer: of hidden states.
            visit: gets the layer, the states (B, T, H) that probes read and a mask (B, T), as `TokenMap.select`.
            visit_all: gets the layer, the states (B, T, H) of all positions and their kinds; only in a forward pass.
        """
        device = self.accelerator.device
        if prepared.student is None:
            assert buffer is not None
            for layer in self.layers:
                visit(layer, *buffer.states(prepared.indices, layer))
            return
        batch, kinds = prepared.student.to(self.backbone.device), self.recipe.probe.keys
        positions = [row.nonzero().flatten() for row in batch.tokens.mask(*kinds)]

        def emit(layer: Layer, hidden: Tensor) -> None:
            if buffer is not None:
                buffer.add_states(prepared.indices, layer, hidden, positions)
            visit(layer, *batch.tokens.select(hidden.to(device), kinds))
            if visit_all is not None:
                visit_all(layer, hidden, batch.tokens)

        self.backbone.stream(batch, self.layers, emit)

    def _targets(self, prepared: Prepared, buffer: ActivationBuffer | None) -> dict[str, Tensor]:
        """Returns each teacher's targets (B, N, D) on the accelerator; the buffer gets those that it has not."""
        device = self.accelerator.device
        targets = {name: prepared.target(teacher).to(device) for name, teacher in self.teachers.items()}
        if buffer is not None and prepared.student is not None:
            buffer.add_targets(prepared.indices, targets)
        return targets

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.recipe.fit.bf16:
            return torch.autocast(self.accelerator.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def _agree(self, *flags: bool) -> list[bool]:
        """Returns which flags any process sets, so that all save at the same step."""
        if self.accelerator.num_processes == 1:
            return list(flags)
        counts = self.accelerator.reduce(
            torch.tensor(flags, dtype=torch.float32, device=self.accelerator.device), "sum"
        )
        return [bool(flag) for flag in counts > 0]

    def _begin_part(self, state: TrainerState) -> None:
        """Solves what predicts the next part of the images, from those of all processes so far."""
        unseen, device = state.prequential, self.accelerator.device
        for name in self.teachers:
            total, count = self._all_targets(state, name)
            unseen.means[name] = (total / count.clamp(min=1)).float()
        for (source, layer), sums in self._all_ridge_sums(state):
            position = source if isinstance(source, str) else ""
            for name, (weight, bias) in sums.solve(self.recipe.fit.ridge_penalty).items():
                precision = batch_precision(device)
                solution = weight.to(precision).to(device), bias.to(precision).to(device)
                unseen.maps[name, layer_name(layer), position] = solution

    def _all_targets(self, state: TrainerState, teacher: str) -> tuple[Tensor, Tensor]:
        """Returns sum (N, D) and number of a teacher's targets over all processes."""
        shape, device = self.teachers[teacher].shape, self.accelerator.device
        zero = torch.zeros(shape, dtype=torch.float64, device=device), torch.zeros((), dtype=torch.long, device=device)
        total, count = state.target_sums.get(teacher, zero)
        if self._rank_and_world_size[1] == 1:
            return total, count
        shared_total, shared_count = state.shared_sums.get(teacher, zero)
        count = shared_count + self.accelerator.reduce(count - shared_count, "sum")
        return shared_total + self.accelerator.reduce(total - shared_total, "sum"), count

    def _all_ridge_sums(self, state: TrainerState) -> Iterator[tuple[tuple[RidgeSource, Layer], RidgeSums]]:
        """Yields the ridge sums of all processes, in the same order in each."""
        for layer, (source, names) in itertools.product(self.layers, self._ridge_teachers.items()):
            widths = {name: self.teachers[name].shape[1] for name in names}
            local = state.ridge.get((source, layer))
            local = local or RidgeSums.zeros(self.backbone.hidden_size, widths, self.accelerator.device)
            if self._rank_and_world_size[1] > 1:
                local = RidgeSums({part: self.accelerator.reduce(v, "sum") for part, v in local.sums.items()})
            yield (source, layer), local

    def _collect(self, state: TrainerState) -> None:
        """Sums over processes: ridge sums and errors in the main process, target sums in all.

        Every process reduces the same tensors in the same order, even those without any image.
        """
        if self._rank_and_world_size[1] == 1:
            return
        state.skipped = {skip.image: skip for skip in gather_object(list(state.skipped.values()))}
        not_finite: NotFinite = {}
        for source, images in gather_object(list(state.not_finite.items())):
            not_finite[source] = images | not_finite.get(source, False)
        state.not_finite = not_finite
        if not state.sums_changed:
            return
        state.sums_changed = False
        for key, sums in self._all_ridge_sums(state):
            state.ridge.pop(key, None)
            if self.accelerator.is_main_process and sums.sums["n"]:
                state.ridge[key] = sums
        for name in self.teachers:
            total, count = self._all_targets(state, name)
            if count:
                state.target_sums[name] = state.shared_sums[name] = (total, count)
        state.prequential.collect(self.accelerator)

    def merge_processes(self, layers: Sequence[Layer], step: int) -> TrainerState:
        """Merges the layers of all processes on the CPU; only in the main process, after `run`.

        Args:
            layers: of all processes.
            step: the last one.
        """
        merged = replace(self, layers=layers).initial_state(torch.device("cpu"))
        for part in self.files.all_parts(step):
            merged.merge(part, len(self.teachers))
        return merged

    def readout(self, state: TrainerState) -> RidgeReadout:
        """Solves the ridge readouts of image tokens; only in the main process, after `run`."""
        penalty = self.recipe.fit.ridge_penalty
        return RidgeReadout(
            {
                (name, layer): (weight.float(), bias.float())
                for (source, layer), sums in state.ridge.items()
                if not isinstance(source, str)
                for name, (weight, bias) in sums.solve(penalty).items()
            }
        )

    def means(self, state: TrainerState) -> dict[str, Tensor]:
        """Returns the mean target (N, D) per teacher over the training split, float32."""
        return {name: (total / count.clamp(min=1)).float().cpu() for name, (total, count) in state.target_sums.items()}
