"""Contestants that do the same work take turns: seconds, tokens through the model, peak memory, a table.

Not a command; `speed.py` says what competes.
"""

import contextlib
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass
class Contestant:
    """One way to do the work.

    Attributes:
        run: the work; only this is timed. It may return a tensor of rewards.
        prepare: called before each run.
    """

    run: Callable[[], Any]
    prepare: Callable[[], None] = lambda: None


@dataclass
class Contest:
    """Work of ``units`` of ``unit``, done by every contestant; ratios are to the first one.

    With ``warm_up`` the first round is not counted: for work of seconds, of which it would be a visible part.
    ``clock`` may be `time.process_time`: CPU seconds, in which other work on the machine does not count.
    """

    name: str
    unit: str
    units: int
    contestants: dict[str, Contestant]
    setting: str
    warm_up: bool = True
    clock: Callable[[], float] = time.perf_counter


def hold(contest: Contest, repeats: int) -> dict[str, Any]:
    """Let all contestants take turns, ``repeats`` rounds.

    Returns:
        Name, setting and, for each contestant, seconds of each round, median rate, tokens of one round and, where
        rewards are returned, their largest difference from those of the first contestant.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contest.contestants}
    tokens: dict[str, int] = {}
    rewards: dict[str, torch.Tensor] = {}
    for number in range(repeats + contest.warm_up):
        for name, contestant in contest.contestants.items():
            contestant.prepare()
            # The Trainer begins with a collection of garbage, a quarter of a second in a process with so much loaded:
            # no part of a step, and the same for all.
            gc.collect()
            gc.freeze()
            with counting_tokens() as counted:
                start = contest.clock()
                result = contestant.run()
                taken = contest.clock() - start
            gc.unfreeze()
            gc.collect()
            tokens[name] = counted[0]
            if isinstance(result, torch.Tensor):
                rewards[name] = result
            if number >= contest.warm_up:
                seconds[name].append(taken)
            print(f"{contest.name}: {name}: {taken:.2f} s, {counted[0]} tokens", flush=True)
    first = next(iter(contest.contestants))
    results: dict[str, Any] = {}
    for name, values in seconds.items():
        median = statistics.median(values)
        results[name] = {
            "seconds": values,
            "median_seconds": median,
            "per_second": contest.units / median,
            "tokens": tokens[name],
            "speed_up": statistics.median(seconds[first]) / median,
        }
        if name in rewards:
            results[name]["largest_difference"] = (rewards[name] - rewards[first]).abs().max().item()
    return {
        "name": contest.name, "unit": contest.unit, "units": contest.units, "setting": contest.setting,
        "results": results,
    }  # fmt: skip


@contextlib.contextmanager
def counting_tokens() -> Any:
    """Yield a list whose only number grows by the tokens that go through an embedding of token ids."""
    counted = [0]

    def count(module: Any, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, torch.nn.Embedding):
            counted[0] += inputs[0].numel()

    handle = torch.nn.modules.module.register_module_forward_pre_hook(count)
    try:
        yield counted
    finally:
        handle.remove()


def peak_memory_alone(contest: Contest, contestant: str) -> None:
    """Run one contestant once and print the process's memory before and at its peak, in MiB (Linux)."""
    contest.contestants[contestant].prepare()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the preparation
    before = _memory("VmRSS")
    contest.contestants[contestant].run()
    print(f"PEAK {before} {_memory('VmHWM')}")


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) // 1024


def peak_memory(command: list[str]) -> tuple[int, int]:
    """The two numbers that `peak_memory_alone` prints, from a process of its own."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("PEAK"))
    _, before, peak = line.split()
    return int(before), int(peak)


def table(contest: dict[str, Any]) -> list[str]:
    """A Markdown table of what `hold` returned."""
    has_memory = any("peak_mib" in result for result in contest["results"].values())
    has_rewards = any("largest_difference" in result for result in contest["results"].values())
    head = ["", f"{contest['unit']}/s", "seconds, median (range)", "tokens", "times the first"]
    head += ["peak memory, MiB (before the run)"] * has_memory + ["rewards differ by"] * has_rewards
    lines = [f"### {contest['name']}", "", contest["setting"], ""]
    lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, result in contest["results"].items():
        low, high = min(result["seconds"]), max(result["seconds"])
        cells = [
            name, f"{result['per_second']:.2f}", f"{result['median_seconds']:.2f} ({low:.2f} to {high:.2f})",
            str(result["tokens"]), f"{result['speed_up']:.2f}",
        ]  # fmt: skip
        if has_memory:
            cells.append(f"{result['peak_mib']} ({result['before_mib']})" if "peak_mib" in result else "")
        if has_rewards:
            cells.append(f"{result['largest_difference']:.1e}" if "largest_difference" in result else "")
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def write(output: Path, name: str, contests: list[dict[str, Any]], threads: int) -> None:
    """``NAME.json`` and ``NAME.md`` with host and versions; the table is printed too."""
    from inform_rm.util.files import atomic_write_text, versions, write_json

    host = {"cpu": cpu_name(), "threads": threads, "dtype": "float32", "versions": versions()}
    write_json(output / f"{name}.json", {**host, "contests": contests})
    lines = [line for contest in contests for line in table(contest)]
    lines.append(f"{host['cpu']}, {threads} threads, float32; {packages(host['versions'])}")
    atomic_write_text(output / f"{name}.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


def packages(found: dict[str, str]) -> str:
    """Versions as one line of text."""
    return ", ".join(f"{name} {version}" for name, version in found.items())


def cpu_name() -> str:
    """The processor as Linux names it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
