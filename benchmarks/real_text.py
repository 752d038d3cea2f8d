"""Overoptimization on real text: a small chat model, human preferences, a gold reward model and its proxies.

    python benchmarks/real_text.py --data DIR --model DIR --output runs/real-text --processes 2
    python benchmarks/real_text.py --data DIR --model DIR --output runs/real-text --small

The simulated experiment of arXiv:2402.09345, section 4.1. Stages, each in a file of its own; each writes files into
the output folder, does only what is missing there, and can be run by itself (``--stages``):

sample  responses of the policy to real prompts, and human pairs, with the states of all tokens
gold    a reward model of all layers trained on the human pairs; its rewards of all responses
search  proxies of six layers on pairs labelled by gold, every setting on the selection seeds
proxies the chosen settings on the reported seeds, with ensembles and averaged weights
attack  their rewards of the candidates that best-of-n chooses from
report  which proxies are competent; of those best-of-n and CSI; ``report.md``, ``report.json``, ``curves.png``

DIR of ``--data`` has a folder a source with ``train.jsonl.gz`` and ``test.jsonl.gz``: pairs with the fields prompt,
chosen, rejected, subset and id. DIR of ``--model`` is SmolLM2-135M-Instruct.
"""

import argparse
import multiprocessing
import os
from pathlib import Path
from typing import Any

from real_text_samples import PARTS, SMALL, Sizes

STAGES = ("sample", "gold", "search", "proxies", "attack", "report")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of preference pairs")
    parser.add_argument("--model", type=Path, required=True, help="folder of the policy, SmolLM2-135M-Instruct")
    parser.add_argument("--output", type=Path, default=Path("runs/real-text"))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="of the stage sample")
    parser.add_argument("--small", action="store_true", help="the size of docs/results/real-text.md")
    parser.add_argument("--processes", type=int, default=1, help="one thread each")
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    run_stages(arguments, SMALL if arguments.small else Sizes())


def run_stages(arguments: argparse.Namespace, sizes: Sizes) -> None:
    """All stages that were asked for, in order."""
    folder, model = arguments.output, arguments.model
    if "sample" in arguments.stages:
        for parts in (("pairs", "real"), ("swapped",), ("attack", "other")):
            own = tuple(part for part in parts if part in arguments.parts)
            if not own:
                continue
            workers = 1 if parts == ("swapped",) else arguments.processes
            jobs = [
                (sample_parts, folder, arguments.data, model, sizes, own, (place, workers)) for place in range(workers)
            ]
            in_processes(jobs, arguments.processes)
    if "gold" in arguments.stages:
        in_processes([(train_and_score_gold, folder, model)], 1)
    for stage, runs_of in (("search", search_runs), ("proxies", report_runs), ("attack", report_runs)):
        if stage in arguments.stages:
            runs = runs_of(folder)
            if stage == "attack":
                from real_text_proxies import incompetent

                faults = incompetent(folder)
                runs = [run for run in runs if not faults[run.labels.noise]]
            parts = [runs[place :: arguments.processes] for place in range(arguments.processes)]
            if stage == "attack":
                in_processes([(attack_with, folder, model, part) for part in parts], arguments.processes)
            else:
                in_processes([(do_runs, folder, model, part, stage) for part in parts], arguments.processes)
    if "report" in arguments.stages:
        from real_text_report import write_report

        write_report(folder)


def in_processes(jobs: list[tuple[Any, ...]], processes: int) -> None:
    """Functions with their arguments, each job in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=1) as pool:
        pool.map(_one, jobs, chunksize=1)


def _one(job: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    job[0](*job[1:])


def layers_of(model: Path) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(model).num_hidden_layers)


def sample_parts(*arguments: Any) -> None:
    from real_text_samples import sample

    sample(*arguments)


def train_and_score_gold(folder: Path, model: Path) -> None:
    from real_text_gold import score_with_gold, train_gold

    if not (folder / "gold" / "result.json").exists():
        train_gold(folder, model, layers_of(model))
    score_with_gold(folder, model, layers_of(model))


def search_runs(folder: Path) -> list[Any]:
    """Every setting on the selection seeds, with flipped labels."""
    from real_text_proxies import SELECTION_SEEDS, Labels, Run, inform_candidates, standard_candidates

    variants = [*standard_candidates(), *inform_candidates()]
    return [Run(variant, Labels(), seed) for seed in SELECTION_SEEDS for variant in variants]


def report_runs(folder: Path) -> list[Any]:
    """What the search chose, and both kinds as they come, on the reported seeds, with flipped labels and without."""
    from real_text_proxies import NOISE, REPORT_SEEDS, Labels, Run, chosen_of, members_of

    runs = [
        Run(variant, Labels(noise), seed, members_of(name, noise))
        for noise in NOISE[::-1]
        for seed in REPORT_SEEDS
        for name, (variant, _) in chosen_of(folder).items()
    ]
    return list(dict.fromkeys(runs))


def do_runs(folder: Path, model: Path, runs: list[Any], stage: str) -> None:
    from real_text_proxies import World, do_run
    from real_text_samples import depths_of

    world = World(folder, model, depths_of(layers_of(model))[0])
    for number, run in enumerate(runs):
        do_run(world, model, run, keep_weights=stage == "proxies")
        print(f"{stage} {number + 1} of {len(runs)}: {run.name}", flush=True)


def attack_with(folder: Path, model: Path, runs: list[Any]) -> None:
    from real_text_attack import score_candidates
    from real_text_samples import depths_of

    score_candidates(folder, model, depths_of(layers_of(model))[0], runs)


if __name__ == "__main__":
    main()
