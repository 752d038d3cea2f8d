"""Speed of packed batches against TRL, transformers' pipeline and plain loops, on real text and a real small Llama.

    python benchmarks/speed.py --shared ../shared --output runs/speed               # everything
    python benchmarks/speed.py --shared ../shared --output runs/speed --only train score

Contestants of a measurement take turns in one process; a table gives the median of the repeats and their range, the
tokens that went through the model, and the ratio to the first contestant.
"""

import argparse
import contextlib
import gc
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

TEMPLATE = Path(__file__).parent / "chatml.jinja"
BACKBONE = "models/smollm2-135m-first6-v16k"


@dataclass
class Contest:
    """One measurement: contestants that do the same work of ``units``."""

    name: str
    unit: str
    units: int
    contestants: dict[str, Callable[[], None]]
    setting: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with data/ and models/")
    parser.add_argument("--output", type=Path, default=Path("runs/speed"))
    parser.add_argument("--only", nargs="+", choices=list(MEASUREMENTS), default=list(MEASUREMENTS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in arguments.only:
        contests = [run(contest, arguments.repeats) for contest in MEASUREMENTS[name](arguments.shared)]
        write(arguments.output, name, contests, arguments.threads)


# --- what is measured


def measure_training(shared: Path) -> list[Contest]:
    """Pairs a second of whole training steps (forward, backward, AdamW), `standard` head, float32, 8 pairs a step."""
    return [
        training_contest(shared, "hh-rlhf", pairs=32),
        training_contest(shared, "qa-feedback", pairs=16),
    ]


def training_contest(shared: Path, source: str, pairs: int) -> Contest:
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, TrainingArguments
    from trl import RewardConfig
    from trl import RewardTrainer as TRLRewardTrainer

    from inform_rm.packing import use_packed_attention
    from inform_rm.training.trainer import PackedPairCollator, PairCollator, RewardTrainer

    tokenizer, encoded = encoded_pairs(shared, source, pairs)
    rows = encoded.to_list()
    lengths = [max(len(row["chosen_input_ids"]), len(row["rejected_input_ids"])) for row in rows]
    scratch = tempfile.mkdtemp()
    common: dict[str, Any] = {
        "per_device_train_batch_size": 8, "num_train_epochs": 1, "learning_rate": 1e-5, "report_to": "none", "seed": 0,
        "save_strategy": "no", "logging_strategy": "no", "use_cpu": True, "disable_tqdm": True, "bf16": False,
    }  # fmt: skip

    def fresh_model() -> Any:
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(
            shared / BACKBONE, num_labels=1, dtype=torch.float32, pad_token_id=tokenizer.pad_token_id
        )

    def ours(batching: str) -> Callable[[], None]:
        from inform_rm import InfoRMForSequenceClassification

        def prepare() -> Any:
            torch.manual_seed(0)
            model = InfoRMForSequenceClassification.from_backbone(
                shared / BACKBONE, architecture="standard", dtype=torch.float32
            )
            if batching == "packed":
                use_packed_attention(model)
            arguments = TrainingArguments(
                scratch, remove_unused_columns=False, train_sampling_strategy="group_by_length", **common
            )
            return RewardTrainer(
                beta=0.0, kl_warmup_steps=0, label_smoothing=0.0, center_rewards_coefficient=0.0, model=model,
                args=arguments, train_dataset=encoded.add_column("length", lengths), processing_class=tokenizer,
                data_collator=PackedPairCollator() if batching == "packed" else PairCollator(tokenizer),
            )  # fmt: skip

        return timed_training(prepare)

    def trl(**settings: Any) -> Callable[[], None]:
        def prepare() -> Any:
            columns = {
                "chosen_ids": [row["chosen_input_ids"] for row in rows],
                "rejected_ids": [row["rejected_input_ids"] for row in rows],
                "length": lengths,
            }
            trainer = TRLRewardTrainer(
                model=fresh_model(), args=RewardConfig(scratch, max_length=None, **settings, **common),
                train_dataset=Dataset.from_dict(columns), processing_class=tokenizer,
            )  # fmt: skip
            trainer._signature_columns = ["chosen_ids", "rejected_ids", "margin", "length"]
            return trainer

        return timed_training(prepare)

    return Contest(
        f"training on {source}",
        "pairs",
        pairs,
        {
            "TRL, its defaults": trl(),
            "TRL, length-grouped, no checkpointing": trl(
                gradient_checkpointing=False, train_sampling_strategy="group_by_length"
            ),
            "inform-rm padded": ours("padded"),
            "inform-rm packed": ours("packed"),
        },
        f"{pairs} pairs of {statistics.mean(lengths):.0f} tokens (longer side, mean), 8 a step",
    )


def timed_training(prepare: Callable[[], Any]) -> Callable[[], None]:
    """Trains when called; the preparation before each run is not timed (see `run`)."""

    def call() -> None:
        call.trainer.train()  # type: ignore[attr-defined]

    def before() -> None:
        call.trainer = prepare()  # type: ignore[attr-defined]

    call.before = before  # type: ignore[attr-defined]
    return call


def measure_scoring(shared: Path) -> list[Contest]:
    """Responses a second of scoring, for pairs as they are and for 16 responses to a prompt."""
    tokenizer, encoded = encoded_pairs(shared, "hh-rlhf", 48)
    prompt_lengths = [length for length in encoded["prompt_length"] for _ in range(2)]
    sequences = [ids for pair in encoded for ids in (pair["chosen_input_ids"], pair["rejected_input_ids"])]
    pairs = scoring_contest(shared, tokenizer, "scoring hh-rlhf pairs", sequences, prompt_lengths)
    best_of_16 = made_up_rows(prompts=4, responses=16, prompt_tokens=200, response_tokens=100)
    best = scoring_contest(shared, tokenizer, "best of 16 (prompts of 200, responses of 100 tokens)", *best_of_16)
    return [pairs, best]


def measure_grid(shared: Path) -> list[Contest]:
    """The gap grid: every pair under every prompt."""
    from inform_rm.encoding import load_tokenizer

    tokenizer = load_tokenizer(shared / BACKBONE, chat_template=str(TEMPLATE))
    rows = made_up_rows(prompts=16, responses=2 * 4, prompt_tokens=200, response_tokens=100, same_responses=True)
    return [scoring_contest(shared, tokenizer, "gap grid: 4 pairs x 16 prompts (200 + 100 tokens)", *rows)]


def scoring_contest(
    shared: Path, tokenizer: Any, name: str, sequences: list[list[int]], prompt_lengths: list[int]
) -> Contest:
    from inform_rm import InfoRMForSequenceClassification
    from inform_rm.scoring import RewardScorer

    torch.manual_seed(0)
    model = InfoRMForSequenceClassification.from_backbone(
        shared / BACKBONE, architecture="standard", dtype=torch.float32
    ).eval()
    packed = RewardScorer(model, tokenizer)
    padded = RewardScorer(model, tokenizer, batching="padded")

    @torch.no_grad()
    def one_by_one() -> None:
        for ids in sequences:
            model(input_ids=torch.tensor([ids]))

    @torch.no_grad()
    def in_order() -> None:  # what `pipeline("text-classification", batch_size=8)` computes, without its tokenizing
        for start in range(0, len(sequences), 8):
            batch = tokenizer.pad({"input_ids": sequences[start : start + 8]}, return_tensors="pt")
            model(**batch)

    return Contest(
        name,
        "responses",
        len(sequences),
        {
            "batches of 8 in order, padded (the pipeline's way)": in_order,
            "one by one": one_by_one,
            "inform-rm padded (sorted by length)": lambda: padded.score_encoded(sequences, prompt_lengths),
            "inform-rm packed": lambda: packed.score_encoded(sequences, prompt_lengths),
        },
        f"{len(sequences)} responses of {statistics.mean(map(len, sequences)):.0f} tokens with prompt (mean)",
    )


def measure_growth(shared: Path) -> list[Contest]:
    """Cost against the number of responses to a prompt, of prompts and of tokens; all packed."""
    from inform_rm import InfoRMForSequenceClassification
    from inform_rm.scoring import RewardScorer

    model = InfoRMForSequenceClassification.from_backbone(
        shared / BACKBONE, architecture="standard", dtype=torch.float32
    ).eval()
    scorer = RewardScorer(model)

    def contest(name: str, sizes: list[dict[str, int]]) -> Contest:
        calls = {}
        for size in sizes:
            rows = made_up_rows(**size)
            calls[" ".join(f"{key} {value}" for key, value in size.items())] = (
                lambda rows=rows: scorer.score_encoded(*rows)
            )  # fmt: skip
        return Contest(name, "runs", 1, calls, "packed, standard head")

    base = {"prompts": 4, "responses": 4, "prompt_tokens": 100, "response_tokens": 50}
    return [
        contest("responses per prompt", [{**base, "prompts": 1, "responses": count} for count in (1, 4, 16, 64)]),
        contest("number of prompts", [{**base, "prompts": count} for count in (1, 2, 4, 8, 16)]),
        contest(
            "sequence length",
            [{"prompts": 2, "responses": 2, "prompt_tokens": count, "response_tokens": count // 2}
             for count in (64, 128, 256, 512, 1024)],
        ),
    ]  # fmt: skip


MEASUREMENTS: dict[str, Callable[[Path], list[Contest]]] = {
    "train": measure_training, "score": measure_scoring, "grid": measure_grid, "growth": measure_growth,
}  # fmt: skip


# --- helpers


def encoded_pairs(shared: Path, source: str, count: int) -> tuple[Any, Any]:
    from inform_rm.encoding import encode_pairs, load_tokenizer
    from inform_rm.preferences import load_preferences

    tokenizer = load_tokenizer(shared / BACKBONE, chat_template=str(TEMPLATE))
    pairs = load_preferences(shared / "data" / source / "test.jsonl.gz", on_bad_row="skip").dataset.shuffle(seed=0)
    return tokenizer, encode_pairs(pairs.select(range(count)), tokenizer, max_length=None).dataset


def made_up_rows(
    prompts: int, responses: int, prompt_tokens: int, response_tokens: int, same_responses: bool = False
) -> tuple[list[list[int]], list[int]]:
    """Random token ids: the time of a forward pass does not depend on which ids they are."""
    generator = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [generator.randrange(10, 16000) for _ in range(count)]

    fixed = [tokens(response_tokens) for _ in range(responses)]
    sequences = []
    for _ in range(prompts):
        prompt = tokens(prompt_tokens)
        sequences += [prompt + (fixed[i] if same_responses else tokens(response_tokens)) for i in range(responses)]
    return sequences, [prompt_tokens] * len(sequences)


def run(contest: Contest, repeats: int) -> dict[str, Any]:
    """Seconds of every contestant in every round, one after the other in each round; tokens through the embedding."""
    seconds: dict[str, list[float]] = {name: [] for name in contest.contestants}
    tokens: dict[str, int] = {}
    counted = [0]

    def count(module: Any, inputs: tuple[Any, ...]) -> None:
        counted[0] += inputs[0].numel()

    for number in range(repeats + 1):  # the first round warms up and is not reported
        for name, call in contest.contestants.items():
            with contextlib.suppress(AttributeError):
                call.before()  # type: ignore[attr-defined]
            counted[0] = 0
            handle = torch.nn.modules.module.register_module_forward_pre_hook(
                lambda module, inputs: count(module, inputs) if isinstance(module, torch.nn.Embedding) else None
            )
            start = time.perf_counter()
            call()
            taken = time.perf_counter() - start
            handle.remove()
            gc.collect()
            tokens[name] = counted[0]
            if number:
                seconds[name].append(taken)
            print(f"{contest.name}: {name}: {taken:.2f} s, {counted[0]} tokens", flush=True)
    first = statistics.median(next(iter(seconds.values())))
    results = {
        name: {
            "seconds": values,
            "median_seconds": statistics.median(values),
            "per_second": contest.units / statistics.median(values),
            "tokens": tokens[name],
            "speed_up": first / statistics.median(values),
        }
        for name, values in seconds.items()
    }
    return {"name": contest.name, "unit": contest.unit, "setting": contest.setting, "results": results}


def write(output: Path, name: str, contests: list[dict[str, Any]], threads: int) -> None:
    from inform_rm.files import atomic_write_text, versions, write_json

    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), "unknown")  # fmt: skip
    host = {"cpu": cpu, "threads": threads, "dtype": "float32", "versions": versions()}
    write_json(output / f"{name}.json", {**host, "contests": contests})
    lines = []
    for contest in contests:
        lines += [
            f"### {contest['name']}", "", contest["setting"], "",
            f"| | {contest['unit']}/s, median | seconds, median (range) | tokens | times the first |",
            "|---|---|---|---|---|",
        ]  # fmt: skip
        for contestant, result in contest["results"].items():
            low, high = min(result["seconds"]), max(result["seconds"])
            lines.append(
                f"| {contestant} | {result['per_second']:.2f} | {result['median_seconds']:.2f} ({low:.2f} to "
                f"{high:.2f}) | {result['tokens']} | {result['speed_up']:.2f} |"
            )
        lines.append("")
    lines.append(f"{cpu}, {threads} threads, float32, {versions()}")
    atomic_write_text(output / f"{name}.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
