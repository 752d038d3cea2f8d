"""Best-of-n against reward models of the generated world: where does the gold reward peak, and do CSI and MOP see it?

    python benchmarks/overoptimization.py --output runs/overoptimization

Every seed is a world with a small language model trained on it (as in `prioritized.py`), from which three standard and
three InfoRM reward models are trained on pairs without and with 25 % of flipped labels. Six rewards choose among up to
1024 responses of the world's policy: the first model of each kind, the three of a kind as an ensemble (UWO) and their
averaged weights (WARM). The gold reward is the world's, exactly. Two runs at a time, one thread each. Started again,
it goes on where it was stopped. Writes ``table.md``, ``table.json`` and ``curves.png`` into the output folder.
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

from prioritized import PAIRS_PER_UPDATE, mean_and_interval, train_language_model
from two_at_a_time import run_all

SEEDS = (0, 1, 2, 3, 4)
LABEL_NOISE = (0.0, 0.25)
KINDS, MEMBERS = ("standard", "inform"), 3
UPDATES, TRAIN_PAIRS = 900, 9600
PROMPTS, RESPONSES = 32, 1024
COEFFICIENT = 0.5  # lambda of UWO
REFERENCE_RESPONSES = 8  # of each prompt, for CSI and MOP
ALPHA = 0.05
SETTINGS: dict[str, Any] = {
    "learning_rate": 3e-4, "lr_scheduler_type": "cosine", "warmup_steps": 30, "beta": 0.01,
    "per_device_train_batch_size": PAIRS_PER_UPDATE, "gradient_accumulation_steps": 1, "max_steps": UPDATES,
    "logging_steps": 100, "save_steps": UPDATES, "save_total_limit": 1, "use_cpu": True,
}  # fmt: skip
REWARDS = [f"{kind}{part}" for kind in KINDS for part in ("", "+ensemble", "+warm")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/overoptimization"))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="default: 0 1 2 3 4")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # one part of the work, in a process of its own
    arguments = parser.parse_args()
    if arguments.one is not None:
        seed, noise, part = arguments.one.split(":")
        folder = arguments.output / seed
        if part == "start":
            write_start(folder, int(seed))
        elif part == "choose":
            choose(folder, int(seed), noise)
        else:
            train_one(folder, int(seed), float(noise), part)
        return
    start = time.monotonic()
    command = [__file__, "--output", str(arguments.output)]
    logs = arguments.output / "logs"
    run_all(command, [f"{seed}:0:start" for seed in arguments.seeds], logs)
    cases = [(seed, noise) for seed in arguments.seeds for noise in LABEL_NOISE]
    members = [f"{kind}-{number}" for kind in KINDS for number in range(MEMBERS)]
    run_all(command, [f"{seed}:{noise}:{member}" for seed, noise in cases for member in members], logs)
    run_all(command, [f"{seed}:{noise}:choose" for seed, noise in cases], logs)
    write_table(arguments.output, arguments.seeds, minutes=(time.monotonic() - start) / 60)


def write_start(folder: Path, seed: int) -> None:
    """Training pairs with and without noise, the language model, and an InfoRM start: WARM needs one head for all."""
    from transformers import set_seed

    from inform_rm import InfoRMForSequenceClassification
    from inform_rm.encoding import load_tokenizer
    from inform_rm.files import atomic_write_text
    from inform_rm.worlds import WorldConfig, make_pairs

    for noise in LABEL_NOISE:
        world = WorldConfig(seed=seed, label_noise=noise)
        lines = [json.dumps(row) + "\n" for row in make_pairs(world, "train", TRAIN_PAIRS)]
        atomic_write_text(folder / f"train-{noise}.jsonl", "".join(lines))
    train_language_model(folder, seed)
    set_seed(seed)
    for kind in KINDS:
        start = folder / f"start-{kind}"
        model = InfoRMForSequenceClassification.from_backbone(
            folder / "backbone", architecture=kind, latent_dim=32, beta=SETTINGS["beta"], dtype="float32"
        )
        model.save_pretrained(start)
        load_tokenizer(folder / "backbone").save_pretrained(start)


def train_one(folder: Path, seed: int, noise: float, member: str) -> None:
    """One reward model; members of a kind differ in data order and latent noise."""
    from inform_rm import train
    from inform_rm.training.config import config_from_mapping

    run = folder / f"noise-{noise}" / member
    if (run / "train_result.json").exists():
        return
    kind, number = member.split("-")
    settings = {
        **SETTINGS, "architecture": kind, "latent_dim": 32, "model": str(folder / f"start-{kind}"),
        "data": [str(folder / f"train-{noise}.jsonl")], "seed": 100 * seed + int(number), "output": str(run),
    }  # fmt: skip
    train(config_from_mapping(settings, "overoptimization.py"))
    shutil.rmtree(run / "checkpoints")


def choose(folder: Path, seed: int, noise: str) -> None:
    """Best-of-n with every reward, and CSI and MOP of InfoRM's choices at each n."""
    from inform_rm import simulate
    from inform_rm.ensembles import average_weights
    from inform_rm.files import write_json
    from inform_rm.scoring import RewardScorer

    case = folder / f"noise-{noise}"
    if (case / "measured.json").exists():
        return
    proxies: dict[str, Any] = {}
    for kind in KINDS:
        members = [case / f"{kind}-{number}" for number in range(MEMBERS)]
        shutil.rmtree(case / f"{kind}-warm", ignore_errors=True)
        average_weights(members, case / f"{kind}-warm", progress=False)
        scorers = [RewardScorer(member) for member in members]
        proxies[kind] = scorers[0]
        proxies[f"{kind}+ensemble"] = centred_ensemble(scorers, seed)
        proxies[f"{kind}+warm"] = RewardScorer(case / f"{kind}-warm")
    result = simulate(
        proxies, case / "best-of-n", num_prompts=PROMPTS, num_responses=RESPONSES, seed=seed, progress=False
    )
    measured = {"ns": result["ns"], "kl_nats": result["kl_nats"]}
    measured["proxies"] = {name: {key: part[key] for key in ("proxy", "gold", "words", "peak", "proxy_deviation")}
                           for name, part in result["proxies"].items()}  # fmt: skip
    measured["watch"] = watch(proxies["inform"], case / "best-of-n" / "responses.parquet", result["ns"], seed)
    write_json(case / "measured.json", measured)


def centred_ensemble(scorers: list[Any], seed: int) -> Any:
    """UWO with each member's mean reward on responses of the policy subtracted, which the loss leaves open."""
    from inform_rm.ensembles import EnsembleScorer
    from inform_rm.worlds import WorldConfig, sample_prompts, sample_responses

    plain = EnsembleScorer(scorers, coefficient=COEFFICIENT)
    prompts = sample_prompts(WorldConfig(seed=seed), 100, seed=9)
    responses = [sample_responses(prompt, 1, seed=9)[0] for prompt in prompts]
    offsets = plain.member_rewards(prompts, responses).mean(dim=1).tolist()
    return EnsembleScorer(scorers, coefficient=COEFFICIENT, offsets=offsets)


def watch(scorer: Any, responses: Path, ns: list[int], seed: int) -> dict[str, Any]:
    """CSI and MOP of InfoRM's choices at each n against other responses of the policy, and what chance gives.

    At n = 1 the choices are the policy's own: what is found there is a false alarm.
    """
    import numpy as np
    import pyarrow.parquet as pq

    from inform_rm.eval.early_stopping import CSIEarlyStopping
    from inform_rm.eval.latents import collect_latents
    from inform_rm.eval.outliers import auto_eps, cluster_separation_index, fit_mahalanobis, null_rank, split_half_null
    from inform_rm.eval.overoptimization import draw_best_of_n

    table = pq.read_table(responses).to_pydict()
    prompts = np.array(table["prompt"], dtype=object).reshape(PROMPTS, RESPONSES)
    texts = np.array(table["response"], dtype=object).reshape(PROMPTS, RESPONSES)
    rewards = np.array(table["inform"]).reshape(PROMPTS, RESPONSES)
    # Several choices a prompt, by disjoint draws: one would be too few points for clusters.
    draws = [draw_best_of_n(rewards, ns, seed=1000 * seed + draw) for draw in range(REFERENCE_RESPONSES)]
    rng = np.random.default_rng(seed)
    reference = np.stack([rng.choice(RESPONSES, REFERENCE_RESPONSES, replace=False) for _ in range(PROMPTS)])
    rows = np.arange(PROMPTS)[:, None]

    def latents(places: np.ndarray) -> np.ndarray:
        """Of ``(P, R)`` places of responses."""
        return collect_latents(
            scorer, prompts[rows, places].ravel().tolist(), texts[rows, places].ravel().tolist()
        ).values

    base = latents(reference)
    eps = auto_eps(base, num_points=len(base))
    fitted = fit_mahalanobis(base)
    null_csi = split_half_null(
        base, lambda one, other: cluster_separation_index(one, other, eps=eps, normalized=True), seed=seed
    )
    null_mop = split_half_null(
        base,
        lambda one, other: fit_mahalanobis(other).outlier_probability(one, alpha=ALPHA, tail="reference").estimate,
        seed=seed,
    )
    found: dict[str, list[Any]] = {name: [] for name in ("csi", "csi_rank", "mop", "mop_rank", "stop")}
    rule = CSIEarlyStopping()
    for column in range(len(ns)):
        values = latents(np.stack([draw[:, column] for draw in draws], axis=1))
        csi = cluster_separation_index(values, base, eps=eps, normalized=True)
        mop = fitted.outlier_probability(values, alpha=ALPHA, tail="reference").estimate
        for name, value in (("csi", csi), ("csi_rank", null_rank(csi, null_csi)), ("mop", mop),
                            ("mop_rank", null_rank(mop, null_mop)), ("stop", rule.update(csi))):  # fmt: skip
            found[name].append(value)
    return found


def write_table(output: Path, seeds: list[int], minutes: float) -> None:
    """Peak and fall of the gold reward for every reward, CSI and MOP at the peak and at the end; curves."""
    from inform_rm.files import atomic_write_bytes, atomic_write_text, versions, write_json

    lines = [
        "| label noise | chosen by | gold gain, best n | gold gain, n = 1024 | peak KL | fall | fall, seeds above 0 |"
    ]
    lines.append("|" + "---|" * 7)
    table, measured = [], {}
    for noise in LABEL_NOISE:
        runs = [json.loads((output / str(seed) / f"noise-{noise}" / "measured.json").read_text()) for seed in seeds]
        measured[noise] = runs
        for name in REWARDS:
            parts = [run["proxies"][name] for run in runs]
            row = {
                "label_noise": noise, "chosen_by": name,
                "best": mean_and_interval([max(part["gold"]["gain"]) for part in parts]),
                "end": mean_and_interval([part["gold"]["gain"][-1] for part in parts]),
                "peak_kl": mean_and_interval([part["peak"]["kl_nats"] for part in parts]),
                "fall": mean_and_interval([part["peak"]["fall"] for part in parts]),
                "clear_falls": sum(part["peak"]["fall_interval"][0] > 0 for part in parts),
            }  # fmt: skip
            table.append(row)
            cells = [str(noise), name, *(f"{row[key][0]:.3f} [{row[key][1]:.3f}, {row[key][2]:.3f}]"
                                         for key in ("best", "end", "peak_kl", "fall"))]  # fmt: skip
            lines.append("| " + " | ".join([*cells, f"{row['clear_falls']} of {len(seeds)}"]) + " |")
    lines += [
        "",
        "| label noise | n | KL | CSI | rank below 0.05 | MOP | rank below 0.05 | stopping rule |",
        "|" + "---|" * 8,
    ]
    for noise, runs in measured.items():
        for place, n in enumerate(runs[0]["ns"]):
            watched = [run["watch"] for run in runs]
            cells = [str(noise), str(n), f"{runs[0]['kl_nats'][place]:.2f}"]
            for name in ("csi", "mop"):
                mean, low, high = mean_and_interval([part[name][place] for part in watched])
                alarms = sum(part[f"{name}_rank"][place] < 0.05 for part in watched)
                cells += [f"{mean:.3f} [{low:.3f}, {high:.3f}]", f"{alarms} of {len(runs)}"]
            cells.append(str(sum(part["stop"][place] for part in watched)))
            lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"{len(seeds)} seeds; means with 95 % intervals (Student's t). This call took {minutes:.0f} minutes.",
        "",
    ]
    write_json(output / "table.json", {"table": table, "seeds": list(seeds), "settings": SETTINGS,
                                       "minutes": minutes, "versions": versions()})  # fmt: skip
    atomic_write_text(output / "table.md", "\n".join(lines))
    atomic_write_bytes(output / "curves.png", curves_png(measured))
    print("\n".join(lines))


def curves_png(measured: dict[float, list[dict[str, Any]]]) -> bytes:
    """Gold gain and proxy gain against KL, one row a noise level; mean over seeds with 95 % intervals."""
    import numpy as np
    from matplotlib.figure import Figure

    from inform_rm.eval.report import figure_png

    figure = Figure(figsize=(11.0, 8.0), layout="constrained")
    for axes_row, (noise, runs) in zip(figure.subplots(2, 2, sharex=True), measured.items(), strict=True):
        kl = runs[0]["kl_nats"]
        for number, name in enumerate(REWARDS):
            for axes, part in zip(axes_row, ("gold", "proxy"), strict=True):
                unit = [run["proxies"][name]["proxy_deviation"] if part == "proxy" else 1.0 for run in runs]
                gains = np.array([run["proxies"][name][part]["gain"] for run in runs]) / np.array(unit)[:, None]
                mean, low, high = np.array([mean_and_interval(column.tolist()) for column in gains.T]).T
                axes.fill_between(kl, low, high, color=f"C{number}", alpha=0.15, linewidth=0)
                axes.plot(kl, mean, ".-", color=f"C{number}", label=name)
        axes_row[0].set(ylabel="gold reward, gain", title=f"{noise:.0%} of labels flipped")
        axes_row[1].set(ylabel="own reward, gain / standard deviation")
        axes_row[0].legend(fontsize=8)
    for axes in axes_row:
        axes.set_xlabel("KL divergence from the policy, nats")
    return figure_png(figure)


if __name__ == "__main__":
    main()
