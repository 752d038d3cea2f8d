"""Runs of a benchmark, each in a process of its own with one thread, two at a time."""

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def run_all(command: list[str], runs: Iterable[str], logs: Path) -> None:
    """Start ``command --one RUN`` for every run and wait; what it prints goes to ``logs/RUN.log``.

    Raises:
        subprocess.CalledProcessError: as soon as a run that failed is looked at; the others go on to their end.
    """
    start = time.monotonic()
    logs.mkdir(parents=True, exist_ok=True)

    def launch(run: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        with (logs / f"{run.replace(':', '-')}.log").open("w") as log:
            subprocess.run(
                [sys.executable, *command, "--one", run], env=environment, stdout=log, stderr=log, check=True
            )
        print(f"{run}: done after {(time.monotonic() - start) / 60:.1f} min", flush=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(launch, runs))
