"""Callbacks of the Trainer: interruption, progress, and data without anything to learn."""

from typing import Any

import torch

import probing.utils.torchvision_shim  # noqa: F401  # isort: skip
from transformers import TrainerCallback, TrainerControl, TrainerState

from probing.utils.errors import UserError
from probing.utils.interrupt import Interruption
from probing.utils.progress import Progress


class AllStepsTaken(Exception):
    """The restored state is that after the last step; the Trainer would take another."""


class StageCallback(TrainerCallback):
    """Saves and stops when the user interrupts, and shows progress.

    Attributes:
        stopped: whether a signal ended the training.
    """

    def __init__(self, interruption: Interruption, title: str) -> None:
        self.interruption, self.title = interruption, title
        self.stopped = self.learned = False
        self.progress: Progress | None = None
        self.note = ""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Starts the progress bar; raises AllStepsTaken after the last step."""
        if state.global_step >= state.max_steps:
            raise AllStepsTaken
        self.progress = Progress(self.title, state.max_steps, state.global_step, show=state.is_world_process_zero)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stops all processes after the same step; logs the last step."""
        assert self.progress is not None
        self.progress.advance(self.note)
        signalled = torch.tensor(int(self.interruption.requested), device=args.device)
        if args.world_size > 1:  # a signal may reach the processes in different steps
            torch.distributed.all_reduce(signalled, op=torch.distributed.ReduceOp.MAX)
        if state.global_step >= state.max_steps:
            control.should_log = True
        elif signalled:
            self.stopped = control.should_save = control.should_training_stop = True

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Shows the loss; raises UserError if every loss so far is exactly zero."""
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        self.note = f"loss {float(loss):.4f}"
        self.learned = self.learned or bool(loss)
        if not self.learned and state.global_step >= min(10, state.max_steps):
            raise UserError(
                f"nothing to learn from up to step {state.global_step}: conversations are skipped or truncated; "
                "check the data, or raise max_length"
            )

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Closes the progress bar."""
        assert self.progress is not None
        self.progress.close()
