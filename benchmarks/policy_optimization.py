"""A small policy trained with GRPO against a reward model of the generated world, and what gold, CSI and MOP say.

    python benchmarks/overoptimization.py --output runs/overoptimization      # trains policy and reward models
    python benchmarks/policy_optimization.py --models runs/overoptimization --output runs/policy

Policy: the world's small language model, trained on right responses. Rewards: the first standard and the first InfoRM
model of each seed, trained with 25 % of flipped labels; KL coefficient 0 and 0.05. Every 20 steps responses to
held-aside prompts are sampled: proxy and gold reward, an estimate of the KL divergence from the start, words, and CSI
and MOP of InfoRM's latents, with the start's responses as reference; an alarm is a value that fewer than 5 % of random
splits of the start's own responses reach. Two runs at a time, one thread each. Writes ``curves.json``, ``table.md``
and ``curves.png`` into the output folder.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

from over_seeds import mean_and_interval
from two_at_a_time import run_all

SEEDS = (0, 1, 2)
KINDS, COEFFICIENTS = ("standard", "inform"), (0.0, 0.05)
LABEL_NOISE = 0.25  # of the reward models' training pairs
STEPS, EVERY = 120, 20
PROMPTS, RESPONSES = 32, 8  # measured; the reference has as many
ALPHA = 0.05
NEW_TOKENS = 80
CURVES = {"proxy": "proxy reward", "gold": "gold reward", "kl_nats": "KL from the start, nats", "words": "words",
          "csi": "CSI per response", "mop": "MOP"}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-4, "per_device_train_batch_size": 32, "num_generations": 8,
    "max_completion_length": NEW_TOKENS, "temperature": 1.0,
    "logging_steps": EVERY, "save_strategy": "no", "report_to": "none", "use_cpu": True,
    "bf16": False, "disable_tqdm": True,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("runs/overoptimization"))
    parser.add_argument("--output", type=Path, default=Path("runs/policy"))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="default: 0 1 2")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # one run, in a process of its own
    arguments = parser.parse_args()
    if arguments.one is not None:
        seed, kind, coefficient = arguments.one.split(":")
        one_run(arguments.models / seed, arguments.output, int(seed), kind, float(coefficient))
        return
    start = time.monotonic()
    command = [__file__, "--models", str(arguments.models), "--output", str(arguments.output)]
    cases = [(kind, coefficient) for kind in KINDS for coefficient in COEFFICIENTS]
    run_all(command, [f"{seed}:{kind}:{value}" for seed in arguments.seeds for kind, value in cases],
            arguments.output / "logs")  # fmt: skip
    write_curves(arguments.output, arguments.seeds, minutes=(time.monotonic() - start) / 60)


def one_run(models: Path, output: Path, seed: int, kind: str, coefficient: float) -> None:
    """Optimise one policy and write its measurements."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback

    from inform_rm.data.tokenizer import load_tokenizer
    from inform_rm.integrations.trl import RewardFunction
    from inform_rm.scoring.scorer import RewardScorer
    from inform_rm.util.files import write_json
    from inform_rm.world.worlds import WorldConfig, sample_prompts

    path = output / f"{seed}-{kind}-{coefficient}.json"
    if path.exists():
        return
    proxy = RewardScorer(models / f"noise-{LABEL_NOISE}" / f"{kind}-0")
    policy = AutoModelForCausalLM.from_pretrained(models / "backbone", dtype="float32")
    tokenizer = load_tokenizer(models / "backbone")
    prompts = list(dict.fromkeys(sample_prompts(WorldConfig(seed=seed), 600, seed=21)))
    measured, trained = prompts[:PROMPTS], prompts[PROMPTS:]
    measure = measurements(models, proxy, tokenizer, measured, seed)
    curve = [{"step": 0, **measure(policy)}]

    class Measure(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step % EVERY == 0:
                curve.append({"step": state.global_step, **measure(model)})

    trainer = trl.GRPOTrainer(
        policy,
        reward_funcs=RewardFunction(proxy),
        args=trl.GRPOConfig(str(output / "trainer"), max_steps=STEPS, beta=coefficient, seed=seed, **SETTINGS),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": prompt}]} for prompt in trained]),
        processing_class=tokenizer,
        callbacks=[Measure()],
    )
    trainer.train()
    write_json(path, {"curve": curve, "settings": SETTINGS, "steps": STEPS, "seed": seed, "coefficient": coefficient})


def measurements(models: Path, proxy: Any, tokenizer: Any, prompts: list[str], seed: int) -> Any:
    """A function that measures a policy on held-aside prompts; the start's own responses are the reference."""
    import numpy as np
    from transformers import AutoModelForCausalLM

    from inform_rm.data.encoding import encode
    from inform_rm.decomposition.likelihoods import ResponseLikelihood
    from inform_rm.eval.best_of_n.policies import CausalLMPolicy
    from inform_rm.eval.detection.clusters import auto_eps, cluster_separation_index
    from inform_rm.eval.detection.early_stopping import CSIEarlyStopping
    from inform_rm.eval.detection.latents import collect_latents
    from inform_rm.eval.detection.outliers import mahalanobis_outlier_probability, null_rank, split_half_null
    from inform_rm.scoring.scorer import RewardScorer
    from inform_rm.world.worlds import gold_reward

    watcher = RewardScorer(models / f"noise-{LABEL_NOISE}" / "inform-0")
    start = AutoModelForCausalLM.from_pretrained(models / "backbone", dtype="float32")
    asked = [prompt for prompt in prompts for _ in range(RESPONSES)]

    def sample(policy: Any, draw: int) -> list[str]:
        writer = CausalLMPolicy(policy, tokenizer, max_new_tokens=NEW_TOKENS)
        return [text for prompt in prompts for text in writer.sample(prompt, RESPONSES, draw)]

    def log_likelihoods(model: Any, responses: list[str]) -> np.ndarray:
        encoded = [encode(tokenizer, prompt, text) for prompt, text in zip(asked, responses, strict=True)]
        found = np.empty(len(encoded))
        scores = ResponseLikelihood(model, tokenizer).iter_scores(
            [row.input_ids for row in encoded], [len(row.prompt_ids) for row in encoded]
        )
        for rows, values, _ in scores:
            found[rows] = values.numpy()
        return found

    # The null splits twice as many latents, so that its halves are as large as the sets of the real comparison.
    base, more = (collect_latents(watcher, asked, sample(start, draw + seed)).values for draw in (1000, 2000))
    pool = np.concatenate([base, more])
    eps = auto_eps(base)

    def csi_of(candidate: np.ndarray, reference: np.ndarray) -> float:
        return cluster_separation_index(candidate, reference, eps=eps, normalized=True)

    def mop_of(candidate: np.ndarray, reference: np.ndarray) -> float:
        return mahalanobis_outlier_probability(candidate, reference, alpha=ALPHA, tail="reference")

    nulls = {"csi": split_half_null(pool, csi_of, seed=seed), "mop": split_half_null(pool, mop_of, seed=seed)}
    rule = CSIEarlyStopping()

    def measure(policy: Any) -> dict[str, Any]:
        responses = sample(policy, seed)
        latents = collect_latents(watcher, asked, responses).values
        csi = csi_of(latents, base)
        mop = mop_of(latents, base)
        return {
            "proxy": float(proxy.score(asked, responses).mean()),
            "gold": float(np.mean([gold_reward(*row).total for row in zip(asked, responses, strict=True)])),
            "kl_nats": float((log_likelihoods(policy, responses) - log_likelihoods(start, responses)).mean()),
            "words": float(np.mean([len(text.split()) for text in responses])),
            "csi": csi, "mop": mop, "csi_alarm": null_rank(csi, nulls["csi"]) < ALPHA,
            "mop_alarm": null_rank(mop, nulls["mop"]) < ALPHA, "stop": rule.update(csi),
        }  # fmt: skip

    return measure


def write_curves(output: Path, seeds: list[int], minutes: float) -> None:
    """All curves over steps: mean over seeds, with every seed as a thin line."""
    import numpy as np
    from matplotlib.figure import Figure

    from inform_rm.util.colors import SERIES
    from inform_rm.util.files import atomic_write_bytes, atomic_write_text, versions, write_json
    from inform_rm.util.page import figure_png

    figure = Figure(figsize=(12.0, 7.0), layout="constrained")
    panels = dict(zip(CURVES, figure.subplots(2, 3, sharex=True).flat, strict=True))
    result: dict[str, Any] = {}
    for number, (kind, value) in enumerate((kind, value) for kind in KINDS for value in COEFFICIENTS):
        curves = [json.loads((output / f"{seed}-{kind}-{value}.json").read_text())["curve"] for seed in seeds]
        steps = [point["step"] for point in curves[0]]
        label = f"{kind}, KL coefficient {value:g}"
        result[label] = {"step": steps}
        for name, axes in panels.items():
            table = np.array([[point[name] for point in curve] for curve in curves])
            means = [mean_and_interval(column.tolist()) for column in table.T]
            result[label][name] = [[None if math.isnan(x) else x for x in mean] for mean in means]
            axes.plot(steps, table.T, color=SERIES[number], linewidth=0.5, alpha=0.5)
            axes.plot(steps, table.mean(axis=0), color=SERIES[number], label=label)
            axes.set_title(CURVES[name])
    panels["proxy"].legend(fontsize=8)
    for name in list(CURVES)[3:]:
        panels[name].set_xlabel("GRPO step")
    atomic_write_bytes(output / "curves.png", figure_png(figure))
    write_json(output / "curves.json", {"curves": result, "seeds": list(seeds), "settings": SETTINGS, "steps": STEPS,
                                        "minutes": minutes, "versions": versions()})  # fmt: skip
    lines = alarm_table(output, seeds)
    lines += ["", f"Seeds {', '.join(map(str, seeds))}. This call took {minutes:.0f} minutes.", ""]
    atomic_write_text(output / "table.md", "\n".join(lines))
    print("\n".join(lines))


def alarm_table(output: Path, seeds: list[int]) -> list[str]:
    """One line a run: gold reward at the start, at its peak and at the end, and when the alarms come."""
    columns = ("reward", "KL coefficient", "seed", "proxy, start / end", "gold, start / peak / end", "KL, peak / end",
               "words, start / end", "CSI alarm", "MOP alarm", "stopping rule")  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for kind in KINDS:
        for value in COEFFICIENTS:
            for seed in seeds:
                curve = json.loads((output / f"{seed}-{kind}-{value}.json").read_text())["curve"]
                peak = max(curve, key=lambda point: point["gold"])
                first, last = curve[0], curve[-1]
                firsts = [next((point for point in curve if point[name]), None)
                          for name in ("csi_alarm", "mop_alarm", "stop")]  # fmt: skip
                cells = [
                    kind, f"{value:g}", str(seed), f"{first['proxy']:.2f} / {last['proxy']:.2f}",
                    f"{first['gold']:.2f} / {peak['gold']:.2f} / {last['gold']:.2f}",
                    f"{peak['kl_nats']:.1f} / {last['kl_nats']:.1f}",
                    f"{first['words']:.0f} / {last['words']:.0f}",
                    *("never" if point is None else f"step {point['step']} (KL {point['kl_nats']:.1f})"
                      for point in firsts),
                ]  # fmt: skip
                lines.append("| " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
