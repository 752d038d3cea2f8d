"""Overoptimization on real text: a small chat model, human preferences, a gold reward model and its proxies.

    python benchmarks/real_text.py --data DIR --model DIR --output runs/real-text --device cuda --processes 12

The simulated experiment of arXiv:2402.09345, section 4.1. Stages, each in a file of its own; each writes files into
the output folder, does only what is missing there, and can be run by itself (``--stages``):

sample  human pairs as tokens, and responses of the policy to real prompts
gold    a reward model of all layers trained on the human pairs; its rewards of all responses
search  proxies of the first layers on pairs labelled by gold, a quarter flipped: settings by validation pairs
proxies those of the chosen settings, with further members for ensembles and averaged weights
attack  their rewards of the candidates that best-of-n chooses from
policy  policies trained against them with GRPO
report  which proxies are competent; of those best-of-n, GRPO and CSI; ``report.md``, ``.json``, figures

DIR of ``--data`` has a folder a source with ``train.jsonl.gz`` and ``test.jsonl.gz``: pairs with the fields prompt,
chosen, rejected, subset and id. DIR of ``--model`` is SmolLM2-135M-Instruct, its weights as safetensors.
"""

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

STAGES = ("sample", "gold", "search", "proxies", "attack", "policy", "report")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of preference pairs")
    parser.add_argument("--model", type=Path, required=True, help="folder of the policy, SmolLM2-135M-Instruct")
    parser.add_argument("--output", type=Path, default=Path("runs/real-text"))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--layers", type=int, default=6, help="of the proxies")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--processes", type=int, default=1, help="models trained at the same time")
    parser.add_argument("--anyway", action="store_true", help="attack proxies that are not competent, too")
    parser.add_argument("--minutes", type=float, help="longest time for all policies together; what is there is kept")
    parser.add_argument("--coefficient", type=float, help="of the policies' KL penalty: these only")
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    from real_text_texts import Sizes

    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        run_stages(arguments, Sizes(), lambda jobs: pool.map(do_job, jobs, chunksize=1))


def run_stages(arguments: argparse.Namespace, sizes: Any, do_all: Callable[[list[Any]], Any]) -> None:
    """All stages that were asked for, in order; `do_all` does jobs that do not wait for each other."""
    place = Place(arguments.output, arguments.model, arguments.data, sizes, arguments.layers, arguments.device)
    for stage in STAGES[:-1]:
        for jobs in _jobs(stage, place, arguments) if stage in arguments.stages else []:
            started = time.time()
            do_all(jobs)
            print(f"{stage}: {len(jobs)} jobs, {time.time() - started:.0f} s", flush=True)
    if "report" in arguments.stages:
        from real_text_report import write_report

        write_report(arguments.output, attacked_noises(arguments.output, arguments.anyway))


@dataclass(frozen=True)
class Place:
    """Where the experiment lives and how large it is."""

    folder: Path
    model: Path
    data: Path
    sizes: Any
    layers: int
    device: str


def do_job(job: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    job[0](*job[1:])
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # others train on the same card


def _jobs(stage: str, place: Place, arguments: argparse.Namespace) -> Iterator[list[tuple[Any, ...]]]:
    """Of a stage the jobs that do not wait for each other, and then the next ones."""
    from real_text_proxies import ATTACKED_NOISE, reported_runs, searched_runs

    folder = place.folder
    if stage == "sample":
        yield [(sample_part, place, part) for part in ("attack", "other", "pairs", "real")]
    elif stage == "gold":
        from real_text_gold import SEEDS

        yield [(gold, place, kind, seed) for seed in SEEDS for kind in ("gold", "proxy layers")]
        yield [(score, place)]
    elif stage == "search":
        yield [(proxy, place, run) for run in searched_runs()]
    elif stage == "proxies":
        runs = reported_runs(folder)
        yield [(proxy, place, run) for run in runs]
        yield [(warm, place, run) for run in runs if _has_members(run, runs)]
    elif stage == "attack":
        attacked = ATTACKED_NOISE in attacked_noises(folder, arguments.anyway)
        runs = [run for run in reported_runs(folder) if attacked and run.noise == ATTACKED_NOISE]
        yield [(attack, place, run, False) for run in runs] + [
            (attack, place, run, True) for run in runs if _has_members(run, runs)]  # fmt: skip
    elif stage == "policy":
        from real_text_grpo import policy_runs

        stop_at = None if arguments.minutes is None else time.time() + 60 * arguments.minutes
        runs = policy_runs() if ATTACKED_NOISE in attacked_noises(folder, arguments.anyway) else []
        yield [(policy, place, run, stop_at) for run in runs if arguments.coefficient in (None, run.coefficient)]


def _has_members(run: Any, runs: list[Any]) -> bool:
    return run.member == 0 and replace(run, member=1) in runs


def attacked_noises(folder: Path, anyway: bool) -> list[float]:
    """Shares of flipped labels at which the proxies are competent; all of them, if asked for."""
    from real_text_proxies import NOISE, incompetent

    faults = incompetent(folder)
    return [noise for noise in NOISE if anyway or not faults[noise]]


def sample_part(place: Place, part: str) -> None:
    from real_text_texts import sample

    sample(place.folder, place.data, place.model, place.sizes, place.device, part)


def gold(place: Place, kind: str, seed: int) -> None:
    from transformers import AutoConfig

    from real_text_gold import train_gold

    layers = AutoConfig.from_pretrained(place.model).num_hidden_layers if kind == "gold" else place.layers
    train_gold(place.folder, place.model, layers, kind, seed, place.device)


def score(place: Place) -> None:
    from real_text_gold import score_with_gold

    score_with_gold(place.folder, place.device, place.sizes)


def proxy(place: Place, run: Any) -> None:
    from real_text_proxies import World, do_run

    do_run(World(place.folder, place.sizes), place.model, place.layers, run, place.device)


def warm(place: Place, run: Any) -> None:
    from real_text_proxies import MEMBERS, World, write_warm

    runs = [replace(run, member=member) for member in range(MEMBERS)]
    write_warm(World(place.folder, place.sizes), place.model, place.layers, runs, place.device)


def attack(place: Place, run: Any, is_warm: bool) -> None:
    from real_text_attack import score_candidates

    score_candidates(place.folder, place.model, place.layers, run, place.device, is_warm)


def policy(place: Place, run: Any, stop_at: float | None) -> None:
    from transformers import AutoTokenizer

    from real_text_grpo import optimise
    from real_text_texts import Texts

    texts = Texts(place.data, AutoTokenizer.from_pretrained(place.model), place.sizes)
    optimise(place.folder, place.model, texts, place.layers, run, place.device, stop_at)


if __name__ == "__main__":
    main()
