"""Does the bottleneck keep a reward model from learning chance by heart? A map over pairs, noise and neutral features.

    python benchmarks/mechanism.py --output runs/mechanism --parts table --processes 1
    python benchmarks/mechanism.py --output runs/mechanism --parts table map --device cuda --processes 5 --minutes 3.5

The world is that of `mechanism_world.py`, models and training are in `mechanism_models.py`; `mechanism_report.py`
makes tables and figures of the results. Each part is a list of runs (variant, seed, dials), trained many at once.
Results are lines of ``results/*.jsonl`` in the output folder, one a run; started again, it does what is missing.
"""

import argparse
import json
import multiprocessing
import os
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
Run = tuple[Any, int, Dials]  # (variant, seed, dials)


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
    """As many settings of InfoRM, with the head that the package had until these runs showed a better start."""
    from mechanism_models import Variant

    grid = ((0.01, 0.25), (0.03, 0.0), (0.03, 0.1), (0.1, 0.0), (0.1, 0.05), (0.1, 0.1), (0.1, 0.25), (0.3, 0.1))
    return [Variant(beta=beta, kl_warmup_steps=warmup, start=HEAD_STARTS[0]) for beta, warmup in grid]


def runs_of(part: str) -> Iterator[Run]:
    """All runs of a part, the most wanted first."""
    from mechanism_models import Variant

    inform, standard, both = inform_candidates(), standard_candidates(), [*SELECTION_SEEDS, *REPORT_SEEDS]
    short = Variant(kl_warmup_steps=0.1)
    if part == "table":
        yield from crossed([*standard, *inform], both, [Dials()])
        yield from crossed([Variant(beta=0.01, latent_dim=32, start=HEAD_STARTS[0])], both, [Dials()])
    elif part == "head":
        heads = [Variant(start=each, decoder="linear" if each.startswith("linear") else "mlp") for each in HEAD_STARTS]
        free = [replace(each, beta=0.001, kl_warmup_steps=warmup) for warmup in (0.1, 0.25) for each in heads]
        free.append(Variant(beta=0.0, start=NEW_START))  # what is left behind without a price
        yield from crossed([Variant("standard"), *free], SELECTION_SEEDS, [Dials(12000, noise=0.0, epochs=1)])
        chosen = [replace(each, beta=beta, kl_warmup_steps=0.1) for beta in (0.1, 0.03) for each in heads]
        yield from crossed(chosen, SELECTION_SEEDS, [Dials()])
    elif part == "new head":
        yield from crossed([short], both[::-1], [Dials(), Dials(6000)])
    elif part == "map":
        cells = [Dials(1000), Dials(6000), Dials(noise=0.0), Dials(noise=0.4), Dials(neutral=40), Dials(neutral=488),
                 *(Dials(pairs, noise) for pairs in (1000, 6000) for noise in (0.0, 0.4))]  # fmt: skip
        yield from crossed([*standard, *inform], both, cells)
    elif part == "bias":
        yield from crossed([standard[0], short, standard[2]], both[::-1], [Dials(bias=0.7)])
    elif part == "rule":
        wide = [
            Variant(beta=beta, kl_warmup_steps=warmup) for beta in (0.03, 0.1, 0.3) for warmup in (0.05, 0.1, 0.25)
        ]
        yield from crossed(wide, both, [Dials(epochs=2), Dials(epochs=12)])
        shapes = [replace(short, latent_dim=size) for size in (32, 512)]
        yield from crossed([*shapes, *(replace(each, decoder="linear") for each in shapes)], both, [Dials()])


PARTS = ("table", "head", "bias", "map", "rule", "new head")


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
    arguments = parser.parse_args()
    start = time.time()
    folder = arguments.output / "results"
    folder.mkdir(parents=True, exist_ok=True)
    done = {row["key"] for row in read_results(arguments.output)}
    groups: list[list[Run]] = []
    for part in arguments.parts:
        left = [run for run in dict.fromkeys(runs_of(part)) if key_of(*run) not in done]
        left = [run for run in left if not arguments.seeds or run[1] in arguments.seeds]
        done |= {key_of(*run) for run in left}
        groups += grouped(left, arguments.models)
    print(f"{sum(map(len, groups))} runs in {len(groups)} groups", flush=True)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    last_start, attack = start + 60 * arguments.minutes, not arguments.judge_only
    jobs = [(group, folder, arguments.device, last_start, attack) for group in groups]
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        for number, words in enumerate(pool.imap_unordered(one_group, jobs), 1):
            print(f"{number}/{len(groups)}, {time.time() - start:.0f} s: {words}", flush=True)


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


def one_group(job: tuple[list[Run], Path, str, float, bool]) -> str:
    """Do one group of runs in this process and append its results to a file of its own."""
    import torch

    from inform_rm.util.files import versions
    from mechanism_models import run_group

    runs, folder, device, last_start, attack = job
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
        for kept, figures, _, _ in run_group(runs, torch.device(device), attack):
            for row, found in zip(rows, figures, strict=True):
                row[kept] = found
    except RuntimeError as error:  # of the card: the other groups go on
        return f"FAILED {len(runs)} runs from {first}: {error}"
    seconds = time.time() - start
    lines = "".join(
        json.dumps(rounded(row | {"group_seconds": seconds, "group_size": len(runs)})) + "\n" for row in rows
    )
    with (folder / f"{os.getpid()}-{time.time_ns()}.jsonl").open("w", encoding="utf-8") as file:
        file.write(lines)
    return f"{len(runs)} runs in {seconds:.0f} s from {first}"


def key_of(variant: Any, seed: int, dials: Dials) -> str:
    return json.dumps([asdict(variant), seed, asdict(dials)])


def read_results(output: Path) -> list[dict[str, Any]]:
    """All results, one a run; a line cut off by a kill is left out."""
    rows = []
    for path in sorted((output / "results").glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows


def rounded(value: Any) -> Any:
    """Numbers to five digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
