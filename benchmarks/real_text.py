"""Overoptimization on real text: a small chat model, human preferences, a gold reward model and its proxies.

    python benchmarks/real_text.py --data DIR --model DIR --output runs/real-text --processes 2
    python benchmarks/real_text.py --data DIR --model DIR --output runs/real-text --small

The simulated experiment of arXiv:2402.09345, section 4.1. Stages, each in a file of its own; each writes files into
the output folder, does only what is missing there, and can be run by itself (``--stages``):

sample  responses of the policy to real prompts, and human pairs, with the states of all tokens
gold    a reward model of all layers trained on the human pairs; its rewards of all responses
proxies those of six layers on pairs labelled by gold, with ensembles and averaged weights
attack  their rewards of the candidates that best-of-n chooses from
policy  policies trained against them with GRPO
report  which proxies are competent; of those best-of-n and CSI; ``report.md``, ``.json``, figures

DIR of ``--data`` has a folder a source with ``train.jsonl.gz`` and ``test.jsonl.gz``: pairs with the fields prompt,
chosen, rejected, subset and id. DIR of ``--model`` is SmolLM2-135M-Instruct.
"""

import argparse
import multiprocessing
import os
from pathlib import Path
from typing import Any

from real_text_samples import PARTS, SMALL, Sizes, depths_of, layers_of

STAGES = ("sample", "gold", "proxies", "attack", "policy", "report")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of preference pairs")
    parser.add_argument("--model", type=Path, required=True, help="folder of the policy, SmolLM2-135M-Instruct")
    parser.add_argument("--output", type=Path, default=Path("runs/real-text"))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="of the stage sample")
    parser.add_argument("--anyway", action="store_true", help="attack proxies that are not competent, too")
    parser.add_argument("--small", action="store_true", help="the size of docs/results/real-text.md")
    parser.add_argument("--processes", type=int, default=1, help="one thread each")
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    run_stages(arguments, SMALL if arguments.small else Sizes())


def run_stages(arguments: argparse.Namespace, sizes: Sizes) -> None:
    """All stages that were asked for, in order."""
    folder, model = arguments.output, arguments.model
    if "sample" in arguments.stages:
        for parts in (("pairs", "real"), ("swapped",), ("attack", "other")):  # swapped are responses of pairs
            own = tuple(part for part in parts if part in arguments.parts)
            jobs = [
                (sample_parts, folder, arguments.data, model, sizes, own, (place, arguments.processes))
                for place in range(arguments.processes)
            ]
            in_processes(jobs if own else [], arguments.processes)
    if "gold" in arguments.stages:
        in_processes([(train_and_score_gold, folder, model)], 1)
    for stage, does in (("proxies", do_runs), ("attack", attack_with)):
        if stage in arguments.stages:
            noises = attacked_noises(folder, arguments.anyway) if stage == "attack" else None
            parts = _shares(report_runs(noises), arguments.processes)
            in_processes([(does, folder, model, part) for part in parts], arguments.processes)
    if "policy" in arguments.stages:
        parts = _shares(optimised_runs(attacked_noises(folder, arguments.anyway)), arguments.processes)
        in_processes([(optimise, folder, arguments.data, model, sizes, part) for part in parts], arguments.processes)
    if "report" in arguments.stages:
        from real_text_report import write_report

        write_report(folder, model, attacked_noises(folder, arguments.anyway))


def in_processes(jobs: list[tuple[Any, ...]], processes: int) -> None:
    """Functions with their arguments, each job in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=1) as pool:
        pool.map(_one, jobs, chunksize=1)


def _one(job: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    job[0](*job[1:])


def sample_parts(*arguments: Any) -> None:
    from real_text_samples import sample

    sample(*arguments)


def _shares(runs: list[Any], processes: int) -> list[list[Any]]:
    return [runs[place::processes] for place in range(processes) if runs[place::processes]]


def train_and_score_gold(folder: Path, model: Path) -> None:
    from real_text_gold import score_with_gold, train_gold

    if not (folder / "gold" / "result.json").exists():
        train_gold(folder, model, layers_of(model))
    score_with_gold(folder, model, layers_of(model))


def attacked_noises(folder: Path, anyway: bool) -> list[float]:
    """Shares of flipped labels at which the proxies are competent; all of them, if asked for."""
    from real_text_proxies import NOISE, incompetent

    return [noise for noise in NOISE if anyway or not incompetent(folder)[noise]]


def report_runs(noises: list[float] | None) -> list[Any]:
    """Proxies on the reported seeds, at all shares of flipped labels or at some; ensembles last."""
    from real_text_proxies import NOISE, REPORT_SEEDS, Run, methods_of

    runs = [
        Run(variant, noise, seed, members)
        for noise in NOISE[::-1] if noises is None or noise in noises
        for seed in REPORT_SEEDS
        for variant, members, _ in methods_of(noise).values()
    ]  # fmt: skip
    return sorted(dict.fromkeys(runs), key=lambda run: run.members)


def optimised_runs(noises: list[float]) -> list[Any]:
    """Policies, if their proxies may be attacked."""
    from real_text_grpo import policy_runs
    from real_text_proxies import ATTACKED_NOISE

    return policy_runs() if ATTACKED_NOISE in noises else []


def do_runs(folder: Path, model: Path, runs: list[Any]) -> None:
    from real_text_proxies import World, do_run

    span = depths_of(layers_of(model))[0]
    world = World(folder, span.start)
    for number, run in enumerate(runs):
        do_run(world, model, span, run)
        print(f"{number + 1} of {len(runs)}: {run.name}", flush=True)


def attack_with(folder: Path, model: Path, runs: list[Any]) -> None:
    from real_text_attack import score_candidates

    score_candidates(folder, model, depths_of(layers_of(model))[0], runs)


def optimise(*arguments: Any) -> None:
    from real_text_grpo import train_policies

    train_policies(*arguments)


if __name__ == "__main__":
    main()
