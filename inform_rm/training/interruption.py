"""SIGTERM during training (spot instances, cluster queues): save a checkpoint, then end."""

import signal
import threading
from typing import Any

import torch
from accelerate.utils import reduce
from transformers import Trainer, TrainerCallback


class StopOnSignal(TrainerCallback):
    """In its ``with`` block SIGTERM makes the trainer save and stop at the end of its step, on all processes.

    ``received`` is the signal's number afterwards, or ``None``. A signal during an evaluation or a save waits for the
    next step. Only the main thread can take signals: elsewhere nothing changes.
    """

    def __init__(self, trainer: Trainer):
        self.received: int | None = None
        self._seen = 0  # by this process
        self._trainer = trainer

    def __enter__(self) -> "StopOnSignal":
        if threading.current_thread() is threading.main_thread():
            self._before: Any = signal.signal(signal.SIGTERM, self._note)
            self._trainer.add_callback(self)
        return self

    def __exit__(self, *_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            self._trainer.remove_callback(self)
            signal.signal(signal.SIGTERM, self._before)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop if any process was told to: all of them must save the same step."""
        seen = self._seen
        if args.world_size > 1:
            seen = int(reduce(torch.tensor(seen, device=args.device), reduction="sum"))
        if seen:
            self.received = signal.SIGTERM
            control.should_save = control.should_training_stop = True

    def _note(self, *_: Any) -> None:
        self._seen = 1
