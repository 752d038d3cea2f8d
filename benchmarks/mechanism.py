"""Does the bottleneck keep a reward model from learning chance by heart? A map over pairs, noise and neutral features.

    python benchmarks/mechanism.py --output runs/mechanism --parts kept --keep
    python benchmarks/mechanism.py --output runs/mechanism --parts cells --seeds 20 21 22 23 24 25
    python benchmarks/mechanism.py --output runs/mechanism --parts table --device cuda --processes 6 --models 64

The world is that of `mechanism_world.py`, models and training are in `mechanism_models.py`; `mechanism_report.py`
makes tables and figures of the results. Each part is a list of runs (variant, seed, dials), trained many at once.
``--keep`` writes weights and policies to ``kept/``, which `mechanism_detection.py` and `mechanism_penalty.py` read.
``table`` is a search for settings at the default dials; ``cells`` carries settings over to other dials (`carried`).
Results are lines of ``results/*.jsonl`` in the output folder, one a run; started again, it does what is missing.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mechanism_world import Dials

SELECTION_SEEDS, REPORT_SEEDS = range(4), range(20, 28)  # settings are chosen on the first, reported are the second
HEAD_STARTS = (  # see `mechanism_models.restart`
    "random 1 0", "random 1 -4", "mirrored 1 0", "mirrored 1 -4", "mirrored 0.3 0", "mirrored 0.3 -2",
    "mirrored 0.3 -4", "mirrored 0.3 -6", "mirrored 0.1 0", "mirrored 0.1 -4", "path 0.3 0", "path 0.3 -4",
    "linear 1 0", "linear 1 -4", "linear 0.1 0", "linear 0.1 -4",
)  # fmt: skip
NEW_START = "mirrored 0.3 -4"  # as the package's head starts
STATES = ("end", "best")  # a model at the end of its training, and at the epoch that was best on validation pairs
Run = tuple[Any, int, Dials]  # (variant, seed, dials)
Choice = tuple[Any, str]  # a variant in one of the states
Results = dict[str, dict[str, Any]]


def standard_candidates() -> list[Any]:
    """The regularisers of a careful user; each also with early stopping."""
    from mechanism_models import Variant

    plain = Variant("standard")
    settings: list[dict[str, float]] = [
        {}, {"weight_decay": 1.0}, {"weight_decay": 3.0}, {"label_smoothing": 0.1}, {"label_smoothing": 0.25},
        {"weight_decay": 1.0, "label_smoothing": 0.1}, {"dropout": 0.1}, {"dropout": 0.3},
    ]  # fmt: skip
    return [replace(plain, **each) for each in settings]


def inform_candidates() -> list[Any]:
    """As many settings of InfoRM."""
    from mechanism_models import Variant

    grid = ((0.01, 0.25), (0.03, 0.0), (0.03, 0.1), (0.1, 0.0), (0.1, 0.05), (0.1, 0.1), (0.1, 0.25), (0.3, 0.1))
    return [Variant(beta=beta, kl_warmup_steps=warmup) for beta, warmup in grid]


def kept_variants() -> dict[str, Choice]:
    """Models whose weights and policies are kept at the default dials, by name."""
    from mechanism_models import Variant

    return {
        "standard": (Variant("standard"), "end"),
        "standard, regularised": (Variant("standard", weight_decay=1.0, label_smoothing=0.1), "best"),
        "InfoRM, beta 0.1, warm-up 0.1": (Variant(kl_warmup_steps=0.1), "end"),
        "InfoRM, beta 0.01, warm-up 0.25": (Variant(beta=0.01), "end"),
    }


def carried(dials: Dials) -> dict[str, Choice]:
    """What is compared at any dials, by name: settings that are carried over, without a search.

    The standard model as validation pairs chose it at the default dials (commit 846e196), the package's InfoRM, and
    where its beta is far from the rule of docs/how-to/beta-and-k.md InfoRM with the beta of that rule.
    """
    from mechanism_models import Variant

    kept = kept_variants()
    found = {"standard": kept["standard, regularised"], "default": kept["InfoRM, beta 0.1, warm-up 0.1"]}
    if dials.noise > 0.3:  # at most 0.1 nats are paid for at beta 0.1
        found["rule"] = (Variant(beta=0.01, kl_warmup_steps=0.1), "end")
    return found


def cells() -> list[Dials]:
    """The dials one at a time, around the default; the most wanted first."""
    return [Dials(), Dials(noise=0.4), Dials(bias=0.7), Dials(neutral=488), Dials(6000), Dials(neutral=40),
            Dials(noise=0.0), Dials(1000)]  # fmt: skip


def runs_of(part: str) -> Iterator[Run]:
    """All runs of a part, the most wanted first."""
    from mechanism_models import Variant

    inform, standard, both = inform_candidates(), standard_candidates(), [*SELECTION_SEEDS, *REPORT_SEEDS]
    short = Variant(kl_warmup_steps=0.1)
    if part == "table":
        yield from crossed([*standard, *inform], both, [Dials()])
    elif part == "head":
        heads = [Variant(start=each, decoder="linear" if each.startswith("linear") else "mlp") for each in HEAD_STARTS]
        free = [replace(each, beta=0.001, kl_warmup_steps=warmup) for warmup in (0.1, 0.25) for each in heads]
        free.append(Variant(beta=0.0, start=NEW_START))  # what is left behind without a price
        yield from crossed([Variant("standard"), *free], SELECTION_SEEDS, [Dials(12000, noise=0.0, epochs=1)])
        chosen = [replace(each, beta=beta, kl_warmup_steps=0.1) for beta in (0.1, 0.03) for each in heads]
        yield from crossed(chosen, SELECTION_SEEDS, [Dials()])
    elif part == "kept":
        yield from crossed([choice[0] for choice in kept_variants().values()], both[::-1], [Dials()])
    elif part == "cells":
        for dials in cells():
            yield from crossed([choice[0] for choice in carried(dials).values()], both, [dials])
    elif part == "rule":
        wide = [
            Variant(beta=beta, kl_warmup_steps=warmup) for beta in (0.03, 0.1, 0.3) for warmup in (0.05, 0.1, 0.25)
        ]
        yield from crossed(wide, both, [Dials(epochs=2), Dials(epochs=12)])
        shapes = [replace(short, latent_dim=size) for size in (32, 512)]
        yield from crossed([*shapes, *(replace(each, decoder="linear") for each in shapes)], both, [Dials()])


PARTS = ("kept", "cells", "table", "head", "rule")


def crossed(variants: Iterable[Any], seeds: Iterable[int], cells: Iterable[Dials]) -> Iterator[Run]:
    return ((variant, seed, dials) for dials in cells for variant in variants for seed in seeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/mechanism"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--models", type=int, default=96, help="most models that are trained at once")
    parser.add_argument("--minutes", type=float, default=1e9, help="start nothing after so long")
    parser.add_argument("--judge-only", action="store_true", help="train and judge, optimise nothing against them")
    parser.add_argument("--seeds", type=int, nargs="+", help="these seeds only")
    parser.add_argument("--cells", type=int, nargs="+", help="of the part cells those with these numbers only")
    parser.add_argument("--keep", action="store_true", help="keep weights and policies")
    arguments = parser.parse_args()
    start = time.time()
    folder = arguments.output / "results"
    folder.mkdir(parents=True, exist_ok=True)
    attack, results = not arguments.judge_only, read_results(arguments.output)
    wanted = None if arguments.cells is None else [cells()[number] for number in arguments.cells]
    groups: list[tuple[list[Run], tuple[str, ...]]] = []
    asked: set[tuple[str, str]] = set()
    for part in arguments.parts:
        for states, runs in runs_by_states(part).items():
            left = [
                run for run in dict.fromkeys(runs)
                if (not arguments.seeds or run[1] in arguments.seeds) and (wanted is None or run[2] in wanted)
                and (key_of(*run), states) not in asked and not is_done(results, run, states, attack)
            ]  # fmt: skip
            asked |= {(key_of(*run), states) for run in left}
            groups += [(group, states) for group in grouped(left, arguments.models)]
    print(f"{sum(len(group) for group, _ in groups)} runs in {len(groups)} groups", flush=True)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    last_start, keep = start + 60 * arguments.minutes, arguments.output if arguments.keep else None
    jobs = [(group, states, folder, arguments.device, last_start, attack, keep) for group, states in groups]
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        for number, words in enumerate(pool.imap_unordered(one_group, jobs), 1):
            print(f"{number}/{len(groups)}, {time.time() - start:.0f} s: {words}", flush=True)


def runs_by_states(part: str) -> dict[tuple[str, ...], list[Run]]:
    """The runs of a part by the states that are wanted of them: of carried settings, one."""
    found: dict[tuple[str, ...], list[Run]] = {}
    for run in runs_of(part):
        named = carried(run[2]) if part == "cells" else kept_variants() if part == "kept" else {}
        states = tuple(state for variant, state in named.values() if variant == run[0])
        found.setdefault(states or STATES, []).append(run)
    return found


def is_done(results: Results, run: Run, states: tuple[str, ...], attack: bool) -> bool:
    row = results.get(key_of(*run), {})
    return all(state in row and (not attack or "policy" in row[state]) for state in states)


def rows_of(results: Results, choice: Choice, dials: Dials, seeds: Iterable[int]) -> list[dict[str, Any]]:
    """Figures of one choice, one row a seed; empty if a seed is missing."""
    found = [results.get(key_of(choice[0], seed, dials), {}).get(choice[1]) for seed in seeds]
    return [] if None in found else found


def chosen(results: Results, candidates: list[Any], dials: Dials) -> Choice | None:
    """What is right about most validation pairs of the selection seeds, of what was run; both states are tried."""
    choices = [(variant, state) for variant in candidates for state in STATES]
    ran = [each for each in choices if rows_of(results, each, dials, SELECTION_SEEDS)]

    def accuracy(choice: Choice) -> float:
        rows = rows_of(results, choice, dials, SELECTION_SEEDS)
        return statistics.mean(row["validation_accuracy"] for row in rows)

    return max(ran, key=accuracy, default=None)


def grouped(runs: list[Run], most: int) -> list[list[Run]]:
    """Runs that can be trained at once, in order of the first of each group."""
    found: dict[Any, list[list[Run]]] = {}
    in_order: list[list[Run]] = []
    for variant, seed, dials in runs:
        kind = variant.shape(), variant.start.startswith("path"), dials.pairs, dials.epochs
        groups = found.setdefault(kind, [])
        if not groups or len(groups[-1]) >= most:
            groups.append([])
            in_order.append(groups[-1])
        groups[-1].append((variant, seed, dials))
    return in_order


def one_group(job: tuple[list[Run], tuple[str, ...], Path, str, float, bool, Path | None]) -> str:
    """Do one group of runs in this process and append its results to a file of its own."""
    import torch

    from inform_rm.util.files import versions
    from mechanism_models import run_group

    runs, states, folder, device, last_start, attack, keep = job
    first = f"{asdict(runs[0][0])} {asdict(runs[0][2])}"
    if time.time() > last_start:
        return f"left out {len(runs)} runs from {first}"
    torch.set_num_threads(1)
    start, about = time.time(), {"versions": versions(), "device": device}
    if device == "cuda":
        about["card"] = torch.cuda.get_device_name()
    rows: list[dict[str, Any]] = [
        {"key": key_of(*run), "variant": asdict(run[0]), "seed": run[1], "dials": asdict(run[2]), **about}
        for run in runs
    ]
    try:
        for state, figures, weights, policies in run_group(runs, torch.device(device), states, attack):
            for place, (row, found) in enumerate(zip(rows, figures, strict=True)):
                row[state] = found
                if keep is not None:
                    keep_model(keep, runs[place], state, {name: each[place] for name, each in weights.items()},
                               None if policies is None else policies[place])  # fmt: skip
    except RuntimeError as error:  # of the card: the other groups go on
        return f"FAILED {len(runs)} runs from {first}: {error}"
    seconds = time.time() - start
    lines = "".join(
        json.dumps(rounded(row | {"group_seconds": seconds, "group_size": len(runs)})) + "\n" for row in rows
    )
    with (folder / f"{os.getpid()}-{time.time_ns()}.jsonl").open("w", encoding="utf-8") as file:
        file.write(lines)
    return f"{len(runs)} runs in {seconds:.0f} s from {first}"


def keep_model(output: Path, run: Run, state: str, weights: dict[str, Any], log_policy: Any) -> None:
    """Weights, and log probabilities ``(points, V)`` of the policy at the measured steps, of one model."""
    from safetensors.torch import save_file

    path = kept_file(output, run, state)
    path.parent.mkdir(exist_ok=True)
    tensors = {f"weights.{name}": value.cpu().contiguous() for name, value in weights.items()}
    save_file(tensors | ({} if log_policy is None else {"log_policy": log_policy.contiguous()}), path)


def kept_file(output: Path, run: Run, state: str) -> Path:
    return output / "kept" / f"{hashlib.sha256(key_of(*run).encode()).hexdigest()[:16]}-{state}.safetensors"


def key_of(variant: Any, seed: int, dials: Dials) -> str:
    return json.dumps([asdict(variant), seed, asdict(dials)])


def read_results(output: Path) -> Results:
    """All results by key, the states of a run together; a line cut off by a kill is left out."""
    found: Results = {}
    for path in sorted((output / "results").glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            before = found.setdefault(row["key"], {})
            # A state that was attacked says more than the same one judged only.
            row = {name: value for name, value in row.items()
                   if not (name in STATES and "policy" in before.get(name, ()) and "policy" not in value)}  # fmt: skip
            before |= row
    return found


def rounded(value: Any) -> Any:
    """Numbers to five digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
