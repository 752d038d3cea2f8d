"""What comparisons with Bradley-Terry at equal updates and at equal compute share: marks, a clock, runs, tables."""

import json
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from over_seeds import mean_and_interval

Runs = dict[str, list[dict[str, Any]]]  # method -> runs, in the order of their seeds


@dataclass(frozen=True)
class Plan:
    """Every method gets the time of ``budget`` updates of ``bt``, and at least ``updates`` of its own.

    ``costs`` is the CPU time of an update in units of one of ``bt``, measured before.
    """

    updates: int
    budget: int
    costs: dict[str, float]

    def marks_of(self, method: str) -> dict[str, int]:
        """What is compared -> updates of a method after which it is looked at."""
        half, whole = (round(self.budget * share / self.costs[method]) for share in (0.5, 1.0))
        return {"half of the time": half, "the whole time": whole, "equal updates": self.updates}


def watch(at: Container[int], measure: Callable[[], dict[str, Any]], marks: list[dict[str, Any]], name: str) -> Any:
    """A callback that counts the CPU time of the steps alone, and appends to ``marks`` between them."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.seconds, self.since = 0.0, 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.since = time.process_time()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seconds += time.process_time() - self.since
            if state.global_step in at:
                marks.append({"updates": state.global_step, "cpu_seconds": self.seconds, **measure()})
                print(f"{name}: {json.dumps(marks[-1])}", flush=True)

    return Watch()


def read_runs(path: Path) -> list[dict[str, Any]]:
    """The finished runs, one a line."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append_run(path: Path, run: dict[str, Any]) -> None:
    """One more line."""
    with path.open("a") as file:
        file.write(json.dumps(run) + "\n")


def by_method(runs: list[dict[str, Any]], methods: Sequence[str]) -> Runs:
    """The methods that ran, in the order of ``methods``."""
    ordered = sorted(runs, key=lambda run: run["seed"])
    return {method: own for method in methods if (own := [run for run in ordered if run["method"] == method])}


def accuracies(runs: Runs, plan: Plan, tests: Sequence[str]) -> str:
    """Means over seeds after each mark; ``time`` in units of all updates of Bradley-Terry, in CPU time."""
    lines = head("at", "method", "seeds", "updates", "time", *tests)
    for at in plan.marks_of("bt"):
        for method, own in runs.items():
            updates = plan.marks_of(method)[at]
            marks = [_mark(run, updates) for run in own]
            whole = {run["seed"]: _mark(run, plan.budget)["cpu_seconds"] for run in runs["bt"]}
            share = np.mean([mark["cpu_seconds"] / whole[run["seed"]] for mark, run in zip(marks, own, strict=True)])
            cells = [interval([mark[test] for mark in marks]) for test in tests]
            lines.append(row(at, method, len(own), updates, f"{share:.2f}", *cells))
    return "\n".join(lines)


def differences(runs: Runs, plan: Plan, tests: Sequence[str]) -> str:
    """Accuracy minus that of Bradley-Terry with the same seed."""
    lines = head("at", "method, minus bt", *tests)
    for at, updates in plan.marks_of("bt").items():
        base = {run["seed"]: _mark(run, updates) for run in runs["bt"]}
        for method, own in runs.items():
            if method == "bt":
                continue
            marks = [_mark(run, plan.marks_of(method)[at]) for run in own]
            cells = [
                interval([mark[test] - base[run["seed"]][test] for mark, run in zip(marks, own, strict=True)], "+")
                for test in tests
            ]
            lines.append(row(at, method, *cells))
    return "\n".join(lines)


def audits(runs: Runs, names: Sequence[str]) -> str:
    """What ``decompose`` says of the finished models."""
    lines = head("audit", *names)
    for method, own in runs.items():
        lines.append(row(method, *(interval([run["audit"][name] for run in own]) for name in names)))
    return "\n".join(lines)


def interval(values: Sequence[float], sign: str = "") -> str:
    """Mean over seeds and its interval; one seed has none."""
    mean, low, high = (f"{value:{sign}.3f}" for value in mean_and_interval(list(values)))
    return f"{mean} [{low}, {high}]" if len(values) > 1 else mean


def row(*cells: Any) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def head(*cells: str) -> list[str]:
    """Its first two lines."""
    return [row(*cells), "|" + "---|" * len(cells)]


def _mark(run: dict[str, Any], updates: int) -> dict[str, Any]:
    return next(mark for mark in run["marks"] if mark["updates"] == updates)
