"""Best-of-n against reward models of the generated world: where does the gold reward peak, and do CSI and MOP see it?

    python benchmarks/overoptimization.py --output runs/overoptimization

Every seed is a world with a small language model trained on it (as in `prioritized.py`), from which three standard and
three InfoRM reward models are trained on few pairs, without and with 25 % of flipped labels. Six rewards choose among
up to 1024 responses of a policy that seldom does what is asked and now and then slips (`SlippingPolicy`): the first
model of each kind, the three of a kind as an ensemble (UWO) and their averaged weights (WARM). The gold reward is the
world's, exactly; a gold reward *model*, trained on many clean pairs, judges the same choices. Two runs at a time, one
thread each. Started again, it goes on where it was stopped. Writes ``table.md``, ``table.json`` and ``curves.png``
into the output folder.
"""

import argparse
import json
import math
import random
import shutil
import time
from pathlib import Path
from typing import Any

from over_seeds import mean_and_interval
from prioritized import PAIRS_PER_UPDATE, train_language_model
from two_at_a_time import run_all

SEEDS = (0, 1, 2, 3, 4)
LABEL_NOISE = (0.0, 0.25)
KINDS, MEMBERS = ("standard", "inform"), 3
TRAIN_PAIRS, UPDATES = 2400, 300
GOLD_PAIRS, GOLD_UPDATES = 9600, 600
WORD_ACCURACY = 0.2  # of the policy: both requested words in 4 % of its responses
SLIPS = 0.02  # share of its responses that are spoilt in a way no training pair shows
PROMPTS, WATCHED_PROMPTS, RESPONSES = 12, 64, 1024
WATCHED = ("inform",)  # whose choices are looked at in InfoRM's latents
COEFFICIENT = 0.5  # lambda of UWO
ALPHA = 0.05
SETTINGS: dict[str, Any] = {
    "learning_rate": 3e-4, "lr_scheduler_type": "cosine", "warmup_steps": 30, "beta": 0.01,
    "per_device_train_batch_size": PAIRS_PER_UPDATE, "gradient_accumulation_steps": 1,
    "logging_steps": 100, "save_total_limit": 1, "use_cpu": True,
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
            train_member(folder, int(seed), float(noise), part)
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
    """Training pairs, the language model, a start for each kind (WARM needs one head for all) and the gold model."""
    from transformers import set_seed

    from inform_rm import InfoRMForSequenceClassification
    from inform_rm.data.tokenizer import load_tokenizer
    from inform_rm.util.files import atomic_write_text
    from inform_rm.world.worlds import WorldConfig, make_pairs

    for noise in LABEL_NOISE:
        rows = make_pairs(WorldConfig(seed=seed, label_noise=noise), "train", TRAIN_PAIRS)
        atomic_write_text(folder / f"train-{noise}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    # Pairs of another seed of the same families: the gold model has not seen the proxies' pairs.
    rows = make_pairs(WorldConfig(seed=1000 + seed, label_noise=0.0), "train", GOLD_PAIRS)
    atomic_write_text(folder / "gold.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    train_language_model(folder, seed)
    set_seed(seed)
    for kind in KINDS:
        start = folder / f"start-{kind}"
        if (start / "model.safetensors").exists():
            continue
        model = InfoRMForSequenceClassification.from_backbone(
            folder / "backbone", architecture=kind, latent_dim=32, beta=SETTINGS["beta"], dtype="float32"
        )
        load_tokenizer(folder / "backbone").save_pretrained(start)
        model.save_pretrained(start)
    train_one(folder, "standard", "gold.jsonl", GOLD_UPDATES, seed, folder / "gold")


def train_member(folder: Path, seed: int, noise: float, member: str) -> None:
    """One reward model; members of a kind differ in data order and latent noise."""
    kind, number = member.split("-")
    run = folder / f"noise-{noise}" / member
    train_one(folder, kind, f"train-{noise}.jsonl", UPDATES, 100 * seed + int(number), run)


def train_one(folder: Path, kind: str, data: str, updates: int, seed: int, run: Path, **settings: Any) -> None:
    """Train from the seed's start of the kind; ``settings`` go over SETTINGS."""
    from inform_rm import train
    from inform_rm.training.reward_arguments import arguments_from_mapping

    if (run / "train_result.json").exists():
        return
    settings = {
        **SETTINGS, "architecture": kind, "latent_dim": 32, "model": str(folder / f"start-{kind}"), "seed": seed,
        "max_steps": updates, "save_steps": updates, "data": [str(folder / data)], "output": str(run), **settings,
    }  # fmt: skip
    train(arguments_from_mapping(settings, "overoptimization.py"))
    shutil.rmtree(run / "checkpoints")


def choose(folder: Path, seed: int, noise: str) -> None:
    """Best-of-n with every reward, judged by the world and by the gold model; CSI and MOP of what is chosen."""
    from inform_rm.hub.averaging import average_weights
    from inform_rm.scoring.scorer import RewardScorer
    from inform_rm.util.files import write_json
    from inform_rm.world.policy import attack

    case = folder / f"noise-{noise}"
    if (case / "measured.json").exists():
        return
    proxies: dict[str, Any] = {}
    for kind in KINDS:
        members = [case / f"{kind}-{number}" for number in range(MEMBERS)]
        shutil.rmtree(case / f"{kind}-warm", ignore_errors=True)
        average_weights(members, case / f"{kind}-warm", progress=False)
        proxies |= {member.name: RewardScorer(member) for member in [*members, case / f"{kind}-warm"]}
    policy = SlippingPolicy()
    result = attack(
        proxies, case / "best-of-n", policy=policy, num_prompts=PROMPTS, num_responses=RESPONSES, seed=seed,
        progress=False,
    )  # fmt: skip
    responses, gold_model = case / "best-of-n" / "responses.parquet", RewardScorer(folder / "gold")
    measured: dict[str, Any] = {"ns": result.ns, "kl_nats": result.kl_nats}
    measured["proxies"] = curves_of(responses, result.ns, gold_model, seed)
    watched = {kind: proxies[f"{kind}-0"] for kind in WATCHED}
    result = attack(
        watched, case / "watched", policy=policy, num_prompts=WATCHED_PROMPTS, num_responses=RESPONSES,
        seed=100 + seed, progress=False,
    )  # fmt: skip
    measured["watch"] = watch(proxies["inform-0"], case / "watched" / "responses.parquet", result.ns, seed)
    for kind in WATCHED:
        measured["watch"][kind]["peak"] = result.proxies[kind]["peak"]
    write_json(case / "measured.json", measured)


class SlippingPolicy:
    """The world's policy with a tail as real policies have: now and then it repeats itself, rambles or breaks off.

    Nothing of this is in the reward models' training pairs; the world's gold reward counts it exactly, as any text.
    """

    name = "slipping"

    def sample(self, prompt: str, num_responses: int, seed: int) -> list[str]:
        from inform_rm.world.text import FILLERS, POLITE_CLOSERS, POLITE_OPENERS
        from inform_rm.world.worlds import sample_responses

        rng = random.Random(f"slips/{seed}/{prompt}")

        def spoilt(text: str) -> str:
            how = rng.choice(["repeated", "rambling", "cut"])
            if how == "repeated":
                return " ".join((text.split() * rng.randint(2, 5))[:110])  # the models take 256 tokens
            if how == "cut":
                return text[: len(text) // rng.randint(2, 4)]
            return " ".join([rng.choice(POLITE_OPENERS), *rng.choices(FILLERS, k=rng.randint(4, 10)),
                             rng.choice(POLITE_CLOSERS)])  # fmt: skip

        texts = sample_responses(prompt, num_responses, seed, WORD_ACCURACY)
        return [spoilt(text) if rng.random() < SLIPS else text for text in texts]

    def identity(self) -> dict[str, Any]:
        return {"name": self.name, "word_accuracy": WORD_ACCURACY, "slips": SLIPS}


def curves_of(responses: Path, ns: list[int], gold_model: Any, seed: int) -> dict[str, Any]:
    """For every reward the curves by the exact gold reward and by the gold reward model."""
    import numpy as np
    import pyarrow.parquet as pq

    from inform_rm.eval.best_of_n.simulate import overoptimization_curves

    table = pq.read_table(responses).to_pydict()
    column = {name: np.array(values).reshape(PROMPTS, RESPONSES) for name, values in table.items()
              if name not in ("prompt", "response")}  # fmt: skip
    judged = gold_model.score(table["prompt"], table["response"]).double().numpy().reshape(PROMPTS, RESPONSES)
    words = np.array([len(text.split()) for text in table["response"]]).reshape(PROMPTS, RESPONSES)
    correlation = float(np.mean([np.corrcoef(*rows)[0, 1] for rows in zip(judged, column["gold"], strict=True)]))
    rewards = {}
    for kind in KINDS:
        # As EnsembleScorer with each member's mean on the policy's responses as its offset: the loss leaves it open.
        members = np.stack([column[f"{kind}-{number}"] for number in range(MEMBERS)])
        members = members - members.mean(axis=(1, 2), keepdims=True)
        rewards[kind] = column[f"{kind}-0"]
        rewards[f"{kind}+ensemble"] = members.mean(axis=0) - COEFFICIENT * members.var(axis=0)
        rewards[f"{kind}+warm"] = column[f"{kind}-warm"]
    found = {}
    for name in REWARDS:
        found[name] = overoptimization_curves(rewards[name], column["gold"], ns, lengths=words, seed=seed)
        by_model = overoptimization_curves(rewards[name], judged, ns, seed=seed)
        found[name]["gold_model"] = {"gold": by_model["gold"], "peak": by_model["peak"], "correlation": correlation,
                                     "deviation": float(np.sqrt(judged.var(axis=1).mean()))}  # fmt: skip
    return found


def watch(scorer: Any, responses: Path, ns: list[int], seed: int) -> dict[str, Any]:
    """CSI and MOP, in InfoRM's latents, of what the WATCHED single models choose, one response a prompt.

    The reference is one other response of the policy for each prompt. At n = 1 the choices are the policy's own, too:
    what is found there is a false alarm.
    """
    import numpy as np
    import pyarrow.parquet as pq

    from inform_rm.eval.detection.clusters import auto_eps, cluster_separation_index
    from inform_rm.eval.detection.early_stopping import CSIEarlyStopping
    from inform_rm.eval.detection.latents import collect_latents
    from inform_rm.eval.detection.outliers import mahalanobis_outlier_probability, null_rank, split_half_null

    table = pq.read_table(responses).to_pydict()
    prompts = np.array(table["prompt"], dtype=object).reshape(WATCHED_PROMPTS, RESPONSES)
    texts = np.array(table["response"], dtype=object).reshape(WATCHED_PROMPTS, RESPONSES)

    def latents(places: np.ndarray) -> np.ndarray:
        """Of one response a prompt, by its place."""
        rows = np.arange(WATCHED_PROMPTS)
        return collect_latents(scorer, prompts[rows, places].tolist(), texts[rows, places].tolist()).values

    rng = np.random.default_rng(seed)
    drawn = np.stack([rng.choice(RESPONSES, 2, replace=False) for _ in range(WATCHED_PROMPTS)])
    # The null splits twice as many latents, so that its halves are as large as the sets of the real comparison.
    base = latents(drawn[:, 0])
    pool = np.concatenate([base, latents(drawn[:, 1])])
    eps = auto_eps(base, num_points=len(base))

    def csi_of(candidate: np.ndarray, reference: np.ndarray) -> float:
        return cluster_separation_index(candidate, reference, eps=eps, normalized=True)

    def mop_of(candidate: np.ndarray, reference: np.ndarray) -> float:
        return mahalanobis_outlier_probability(candidate, reference, alpha=ALPHA, tail="reference")

    nulls = {"csi": split_half_null(pool, csi_of, seed=seed), "mop": split_half_null(pool, mop_of, seed=seed)}
    found: dict[str, Any] = {}
    for kind in WATCHED:
        rewards = np.array(table[kind]).reshape(WATCHED_PROMPTS, RESPONSES)
        # The same n of a prompt's responses for every kind, those of a smaller n among them; ties are shuffled, too.
        order = np.random.default_rng(seed).permuted(np.tile(np.arange(RESPONSES), (WATCHED_PROMPTS, 1)), axis=1)
        shuffled = np.take_along_axis(rewards, order, axis=1)
        places = np.take_along_axis(order, np.stack([shuffled[:, :n].argmax(axis=1) for n in ns], axis=1), axis=1)
        rule = CSIEarlyStopping()
        found[kind] = {name: [] for name in ("csi", "csi_rank", "mop", "mop_rank", "stop")}
        for column in range(len(ns)):
            values = latents(places[:, column])
            csi = csi_of(values, base)
            mop = mop_of(values, base)
            for name, value in (("csi", csi), ("csi_rank", null_rank(csi, nulls["csi"])), ("mop", mop),
                                ("mop_rank", null_rank(mop, nulls["mop"])), ("stop", rule.update(csi))):  # fmt: skip
                found[kind][name].append(value)
    return found


def write_table(output: Path, seeds: list[int], minutes: float) -> None:
    """Peak and fall of the gold reward for every reward; CSI and MOP at each n, and their lead; curves."""
    from inform_rm.util.files import atomic_write_bytes, atomic_write_text, versions, write_json

    measured = {
        noise: [json.loads((output / str(seed) / f"noise-{noise}" / "measured.json").read_text()) for seed in seeds]
        for noise in LABEL_NOISE
    }
    table: list[dict[str, Any]] = []
    lines: list[str] = []
    for part in (peak_table, watch_table, lead_table):
        rows, text = part(measured)
        table += rows
        lines += [*text, ""]
    lines += [
        f"{len(seeds)} seeds; means with 95 % intervals (Student's t). This call took {minutes:.0f} minutes.",
        "",
    ]
    for row in table:  # one seed has no interval, and an alarm that never comes no mean
        for name, value in row.items():
            if isinstance(value, tuple):
                row[name] = [None if math.isnan(number) else number for number in value]
    write_json(output / "table.json", {"table": table, "seeds": list(seeds), "settings": SETTINGS,
                                       "minutes": minutes, "versions": versions()})  # fmt: skip
    atomic_write_text(output / "table.md", "\n".join(lines))
    atomic_write_bytes(output / "curves.png", curves_png(measured))
    print("\n".join(lines))


Measured = dict[float, list[dict[str, Any]]]  # by label noise, one a seed


def peak_table(measured: Measured) -> tuple[list[dict[str, Any]], list[str]]:
    """Where the gold reward peaks and how far it falls to n = 1024; the same by the gold reward model."""
    columns = ("label noise", "chosen by", "gold gain, best n", "gold gain, n = 1024", "peak KL", "fall",
               "seeds that fall", "peak KL, gold model", "fall, gold model", "seeds that fall")  # fmt: skip
    table, lines = [], ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for noise, runs in measured.items():
        for name in REWARDS:
            parts = [run["proxies"][name] for run in runs]
            models = [part["gold_model"] for part in parts]
            row = {
                "label_noise": noise, "chosen_by": name,
                "best": mean_and_interval([max(part["gold"]["gain"]) for part in parts]),
                "end": mean_and_interval([part["gold"]["gain"][-1] for part in parts]),
                "peak_kl": mean_and_interval([part["peak"]["kl_nats"] for part in parts]),
                "fall": mean_and_interval([part["peak"]["fall"] for part in parts]),
                "clear_falls": sum(part["peak"]["fall_interval"][0] > 0 for part in parts),
                "model_peak_kl": mean_and_interval([part["peak"]["kl_nats"] for part in models]),
                "model_fall": mean_and_interval([part["peak"]["fall"] / part["deviation"] for part in models]),
                "model_clear_falls": sum(part["peak"]["fall_interval"][0] > 0 for part in models),
                "model_correlation": mean_and_interval([part["correlation"] for part in models]),
            }  # fmt: skip
            table.append(row)
            cells = [str(noise), name, *(shown(row[key]) for key in ("best", "end", "peak_kl", "fall")),
                     f"{row['clear_falls']} of {len(runs)}", shown(row["model_peak_kl"]), shown(row["model_fall"]),
                     f"{row['model_clear_falls']} of {len(runs)}"]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return table, lines


def watch_table(measured: Measured) -> tuple[list[dict[str, Any]], list[str]]:
    """CSI and MOP of what is chosen at each n; an alarm is a value that fewer than 5 % of the null's splits reach."""
    columns = ("label noise", "chosen by", "n", "KL", "CSI", "alarms", "MOP", "alarms", "stopping rule fires")
    table, lines = [], ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for noise, runs in measured.items():
        for kind in WATCHED:
            watched = [run["watch"][kind] for run in runs]
            for place, n in enumerate(runs[0]["ns"]):
                row: dict[str, Any] = {"label_noise": noise, "chosen_by": kind, "n": n}
                cells = [str(noise), kind, str(n), f"{runs[0]['kl_nats'][place]:.2f}"]
                for name in ("csi", "mop"):
                    row[name] = mean_and_interval([part[name][place] for part in watched])
                    row[f"{name}_alarms"] = sum(part[f"{name}_rank"][place] < ALPHA for part in watched)
                    cells += [shown(row[name]), f"{row[f'{name}_alarms']} of {len(runs)}"]
                row["stops"] = sum(part["stop"][place] for part in watched)
                table.append(row)
                lines.append("| " + " | ".join([*cells, str(row["stops"])]) + " |")
    return table, lines


def lead_table(measured: Measured) -> tuple[list[dict[str, Any]], list[str]]:
    """Lead: KL at the gold reward's peak minus KL at the first alarm; above 0 the alarm comes first."""
    columns = ("label noise", "chosen by", "peak KL", "alarm", "first alarm, KL", "lead, KL",
               "before / at / after the peak", "never", "at n = 1")  # fmt: skip
    table, lines = [], ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for noise, runs in measured.items():
        kls = runs[0]["kl_nats"]
        for kind in WATCHED:
            watched = [run["watch"][kind] for run in runs]
            peaks = [part["peak"]["kl_nats"] for part in watched]
            for name in ("csi", "mop", "stop"):
                fires = [[bool(x) for x in part["stop"]] if name == "stop" else
                         [rank < ALPHA for rank in part[f"{name}_rank"]] for part in watched]  # fmt: skip
                # n = 1 is the policy itself and counted apart.
                firsts = [next((kl for kl, fire in zip(kls[1:], row[1:], strict=True) if fire), None) for row in fires]
                leads = [peak - first for peak, first in zip(peaks, firsts, strict=True) if first is not None]
                row = {
                    "label_noise": noise, "chosen_by": kind, "alarm": name, "peak_kl": mean_and_interval(peaks),
                    "first_kl": mean_and_interval([x for x in firsts if x is not None] or [math.nan]),
                    "lead": mean_and_interval(leads or [math.nan]), "before": sum(lead > 0 for lead in leads),
                    "at": sum(lead == 0 for lead in leads), "after": sum(lead < 0 for lead in leads),
                    "never": len(runs) - len(leads), "false_alarms": sum(row[0] for row in fires),
                }  # fmt: skip
                table.append(row)
                cells = [str(noise), kind, shown(row["peak_kl"]), name, shown(row["first_kl"]), shown(row["lead"]),
                         f"{row['before']} / {row['at']} / {row['after']}", str(row["never"]),
                         f"{row['false_alarms']} of {len(runs)}"]  # fmt: skip
                lines.append("| " + " | ".join(cells) + " |")
    return table, lines


def shown(value: tuple[float, float, float]) -> str:
    """Mean and interval as a cell of a table."""
    mean, low, high = value
    if math.isnan(mean):
        return "-"
    return f"{mean:.2f}" if math.isnan(low) else f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def curves_png(measured: Measured) -> bytes:
    """Gold gain by the world and by the gold model, and own gain, against KL; mean over seeds with 95 % intervals."""
    import numpy as np
    from matplotlib.figure import Figure

    from inform_rm.util.colors import SERIES
    from inform_rm.util.page import figure_png

    figure = Figure(figsize=(14.0, 8.0), layout="constrained")
    for axes_row, (noise, runs) in zip(figure.subplots(2, 3, sharex=True), measured.items(), strict=True):
        kl = runs[0]["kl_nats"]
        for number, name in enumerate(REWARDS):
            parts = [run["proxies"][name] for run in runs]
            panels = (
                [part["gold"]["gain"] for part in parts],
                [np.divide(part["gold_model"]["gold"]["gain"], part["gold_model"]["deviation"]) for part in parts],
                [np.divide(part["proxy"]["gain"], part["proxy_deviation"]) for part in parts],
            )
            for axes, gains in zip(axes_row, panels, strict=True):
                mean, low, high = np.array([mean_and_interval(column.tolist()) for column in np.array(gains).T]).T
                axes.fill_between(kl, low, high, color=SERIES[number], alpha=0.12, linewidth=0)
                axes.plot(kl, mean, ".-", color=SERIES[number], label=name)
        axes_row[0].set(ylabel="gold reward, gain", title=f"{noise:.0%} of labels flipped")
        axes_row[1].set(ylabel="gold reward model, gain / standard deviation")
        axes_row[2].set(ylabel="own reward, gain / standard deviation")
        axes_row[0].legend(fontsize=8)
    for axes in axes_row:
        axes.set_xlabel("KL divergence from the policy, nats")
    return figure_png(figure)


if __name__ == "__main__":
    main()
