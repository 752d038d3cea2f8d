"""What the demo says while it works: one line a stage, with progress and time left, and nothing from the libraries."""

import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import transformers.trainer
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from inform_rm.eval.frame import progress_bars

_LEAST_SHARE = 0.02  # of the work must be done before the time left can be told from it


class Stages(TrainerCallback):
    """The stages of a long job, announced on standard output: as bars on a terminal, else as plain lines.

    Inside ``with`` transformers' Trainer moves the stage's bar in place of its own and of its log lines; transformers
    and datasets show no bars, and transformers no warnings. Warnings of this package stay.

    Args:
        usual_seconds: every stage in order, and how long it takes; only the ratios matter.
    """

    def __init__(self, usual_seconds: Mapping[str, float]) -> None:
        self._usual = dict(usual_seconds)
        self._starts: dict[str, float] = {}
        self._bar: tqdm | None = None
        self._restore = ExitStack()

    def __enter__(self) -> "Stages":
        """Quieten the libraries."""
        undo = self._restore.callback
        undo(transformers_logging.set_verbosity, transformers_logging.get_verbosity())
        transformers_logging.set_verbosity_error()
        if transformers_logging.is_progress_bar_enabled():
            undo(transformers_logging.enable_progress_bar)
            transformers_logging.disable_progress_bar()
        self._restore.enter_context(progress_bars(False))
        for name in ("PrinterCallback", "DEFAULT_PROGRESS_CALLBACK"):  # one of them shows the Trainer's progress
            undo(setattr, transformers.trainer, name, getattr(transformers.trainer, name))
            setattr(transformers.trainer, name, self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        """Let the libraries speak again."""
        self._end_line(is_finished=kind is None)
        self._restore.close()

    def start(self, stage: str) -> None:
        """End the stage before and announce this one."""
        self._end_line(is_finished=True)
        self._starts[stage] = time.perf_counter()
        label = f"{len(self._starts):2}/{len(self._usual)} {stage:<{max(map(len, self._usual))}}"
        shape = "{desc} {percentage:3.0f}% |{bar:20}| {elapsed}{postfix}"
        # Disabled by itself unless it is on a terminal.
        self._bar = tqdm(total=1.0, desc=label, bar_format=shape, file=sys.stdout, disable=None)
        if self._bar.disable:
            seconds = self._starts[stage] - next(iter(self._starts.values()))
            print(f"{label}  {seconds:4.0f} s gone{self._time_left(0.0)}", flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer: a part of the current stage is done."""
        if self._bar is not None and not self._bar.disable:
            self._bar.n = fraction = state.global_step / state.max_steps
            self._bar.set_postfix_str(self._time_left(fraction).removeprefix(", "))

    def seconds(self) -> dict[str, float]:
        """Wall-clock seconds of each stage so far."""
        ends = [*list(self._starts.values())[1:], time.perf_counter()]
        return {stage: round(end - start, 1) for (stage, start), end in zip(self._starts.items(), ends, strict=True)}

    def _time_left(self, fraction: float) -> str:
        """From the time gone and the share of the work done in it; empty while that is too little to tell."""
        *finished, current = self._starts
        done = sum(self._usual[stage] for stage in finished) + fraction * self._usual[current]
        whole = sum(self._usual.values())
        if done < _LEAST_SHARE * whole:
            return ""
        left = (time.perf_counter() - next(iter(self._starts.values()))) * (whole - done) / done
        return f", about {left / 60:.0f} min left" if left >= 90 else f", about {left:.0f} s left"

    def _end_line(self, is_finished: bool) -> None:
        if self._bar is not None:
            self._bar.n = 1.0 if is_finished else self._bar.n
            self._bar.set_postfix_str("", refresh=False)
            self._bar.close()
