"""What happens between the Trainer's steps: stopping, checking, showing progress."""

from typing import Any

import torch

import probing.utils.torchvision_shim  # noqa: F401  # isort: skip
from transformers import TrainerCallback, TrainerControl, TrainerState

from probing.distillation.model import Trainee
from probing.utils.errors import UserError
from probing.utils.interrupt import Interruption
from probing.utils.progress import Progress


class AllStepsTaken(Exception):
    """The saved state is that after the last step; the Trainer would take one more."""


class Watch(TrainerCallback):
    """Saves and stops after the step in which the user asks for it; logs the last step whatever its number.

    Raises:
        UserError: every loss so far is exactly zero: no conversation had anything to learn from.
        AllStepsTaken: there is nothing left to do; weights and state are loaded.
    """

    def __init__(self, interruption: Interruption) -> None:
        self.interruption = interruption
        self.stopped = False
        self.learned = False

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Looks whether the stage was interrupted behind its last step."""
        if state.global_step >= state.max_steps:
            raise AllStepsTaken

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stops all processes after the same step."""
        asked = torch.tensor(int(self.interruption.asked), device=args.device)
        if args.world_size > 1:  # a signal may reach the processes in different steps
            torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        if state.global_step >= state.max_steps:
            control.should_log = True
        elif asked:
            self.stopped = control.should_save = control.should_training_stop = True

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Looks whether there was anything to learn from."""
        loss = (logs or {}).get("loss")
        self.learned = self.learned or bool(loss)
        if loss is not None and not self.learned and state.global_step >= min(10, state.max_steps):
            raise UserError(
                f"nothing to learn from up to step {state.global_step}: every conversation is left out or cut before "
                "its first answer ends; look at the data, or raise max_length"
            )


class Bar(TrainerCallback):
    """The program's own progress in place of the Trainer's, which prints every log where there is no terminal."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.progress: Progress | None = None
        self.note = ""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Starts where the stage goes on."""
        self.progress = Progress(self.what, state.max_steps, state.global_step, show=state.is_world_process_zero)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """One step."""
        assert self.progress is not None
        self.progress.advance(self.note)

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Shows the loss from now on."""
        if logs and "loss" in logs:
            self.note = f"loss {float(logs['loss']):.4f}"

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leaves the bar."""
        assert self.progress is not None
        self.progress.close()


class Losses(TrainerCallback):
    """Stops before a step that a loss or gradient which is not finite would spoil.

    Raises:
        UserError: naming the loss, its samples and the step; the last saved state stays.
    """

    def __init__(self, trainee: Trainee) -> None:
        self.trainee = trainee

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Looks at the losses of all micro-batches of the step."""
        bad = self.trainee.not_finite()
        if bad:
            raise UserError(
                f"{bad} is not finite at step {state.global_step + 1}, which was not taken; lower lr, or leave out "
                "these samples"
            )

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keeps them for the log."""
        self.trainee.finish_step()
