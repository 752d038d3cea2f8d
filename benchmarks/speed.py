"""Speed of packed batches against TRL, transformers' pipeline and padded loops, on real text and a real small Llama.

    python benchmarks/speed.py --shared DIR --output runs/speed               # everything, about 75 minutes
    python benchmarks/speed.py --shared DIR --output runs/speed --only train score

Each measurement writes a table (NAME.md, NAME.json) with the median of the repeats and their range, the tokens that
went through the model, the ratio to the first contestant, and the peak memory of a process of its own.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from contest import Contest, Contestant, hold, peak_memory, peak_memory_alone, write

TEMPLATE = Path(__file__).parent / "chatml.jinja"
BACKBONE = "models/smollm2-135m-first6-v16k"
PAIRS_A_STEP = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder of real data/ and models/")
    parser.add_argument("--output", type=Path, default=Path("runs/speed"))
    names = [*MEASUREMENTS, "profile"]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--alone", nargs=2, metavar=("CONTEST", "CONTESTANT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.alone:
        contests = {contest.name: contest for contest in MEASUREMENTS[arguments.only[0]](arguments.shared)}
        peak_memory_alone(contests[arguments.alone[0]], arguments.alone[1])
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in arguments.only:
        if name == "profile":
            write_profile(arguments.shared, arguments.output / "profile.md")
            continue
        contests = [hold(contest, arguments.repeats) for contest in MEASUREMENTS[name](arguments.shared)]
        for contest in contests if name in WITH_MEMORY else []:
            for contestant, result in contest["results"].items():
                result["before_mib"], result["peak_mib"] = peak_memory(
                    [__file__, "--shared", str(arguments.shared), "--threads", str(arguments.threads),
                     "--only", name, "--alone", contest["name"], contestant]
                )  # fmt: skip
        write(arguments.output, name, contests, arguments.threads)
        if name == "growth":
            plot_growth(arguments.output / "growth.png", contests)


# --- training


def measure_training(shared: Path) -> list[Contest]:
    """Pairs a second of whole training steps (forward, backward, AdamW), standard head, float32."""
    return [
        training_contest(shared, "hh-rlhf", pairs=32),
        training_contest(shared, "qa-feedback", pairs=16),
    ]


def measure_large_shape(shared: Path) -> list[Contest]:
    """The same on all 30 layers of SmolLM2-135M's shape (random weights: time does not depend on them)."""
    return [training_contest(shared, "hh-rlhf", pairs=8, layers=30)]


def measure_head(shared: Path) -> list[Contest]:
    """A training step with the InfoRM head against one with the linear head, both packed."""
    grouped, _ = training_pairs(shared, "hh-rlhf", 16)
    contestants = {
        f"{architecture} head": ours(shared, grouped, "packed", architecture=architecture)
        for architecture in ("standard", "inform")
    }
    setting = f"16 pairs of hh-rlhf, {PAIRS_A_STEP} a step, packed; K = 128, MLP decoder"
    return [Contest("InfoRM head against linear head", "pairs", 16, contestants, setting)]


def measure_last_layer(shared: Path) -> list[Contest]:
    """CPU seconds of training with the last layer at every token, and where rewards are read; with TRL's."""
    from inform_rm.training.passes import PassesThatFit

    where_read = PassesThatFit.computed_where_read
    grouped, _ = training_pairs(shared, "hh-rlhf", 32)
    packed = ours(shared, grouped, "packed")

    def with_block(block: Any) -> Contestant:
        def prepare() -> None:
            packed.prepare()
            PassesThatFit.computed_where_read = block

        return Contestant(packed.run, prepare)

    contestants = {
        "TRL, length-grouped, no checkpointing": trl(shared, grouped, None, gradient_checkpointing=False),
        "inform-rm packed, the last layer at every token": with_block(lambda trainer, part: nullcontext()),
        "inform-rm packed": with_block(where_read),
    }
    setting = f"32 pairs, {PAIRS_A_STEP} a step, as in training; CPU seconds"
    return [Contest("the last layer on hh-rlhf", "pairs", 32, contestants, setting, clock=time.process_time)]


def measure_row_length(shared: Path) -> list[Contest]:
    """Packed training and scoring with rows of at most so many tokens."""
    from inform_rm.scoring.scorer import RewardScorer

    grouped, _ = training_pairs(shared, "qa-feedback", 16)
    model = fresh_inform_rm(shared, "standard").eval()
    sequences, lengths = made_up_rows(4, 16, 200, 100)
    budgets = (1024, 2048, 4096, 8192)
    scorers = {budget: RewardScorer(model, tokens_per_batch=budget) for budget in budgets}
    setting = "tokens in one forward pass, packed, standard head"
    return [
        Contest(
            "row length in training", "pairs", 16,
            {str(budget): ours(shared, grouped, "packed", tokens_per_batch=budget) for budget in budgets},
            f"16 pairs of qa-feedback, {PAIRS_A_STEP} a step; {setting}",
            warm_up=False,
        ),
        Contest(
            "row length in scoring", "responses", 64,
            {
                str(budget): Contestant(partial(scorer.score_encoded, sequences, lengths))
                for budget, scorer in scorers.items()
            },
            f"4 prompts of 200 tokens with 16 responses of 100; {setting}",
        ),
    ]  # fmt: skip


def training_contest(shared: Path, source: str, pairs: int, layers: int | None = None) -> Contest:
    grouped, shuffled = training_pairs(shared, source, pairs)
    longer = statistics.mean(grouped["length"])
    name = f"training on {source}" + (f", {layers} layers" if layers else "")
    return Contest(
        name,
        "pairs",
        pairs,
        {
            "TRL, its defaults": trl(shared, shuffled, layers),
            "TRL, length-grouped, no checkpointing": trl(shared, grouped, layers, gradient_checkpointing=False),
            "the same, 2 pairs at a time, 4 accumulated": trl(
                shared,
                grouped,
                layers,
                gradient_checkpointing=False,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=PAIRS_A_STEP // 2,
            ),
            "inform-rm padded": ours(shared, grouped, "padded", layers),
            "inform-rm packed": ours(shared, grouped, "packed", layers),
        },
        f"{pairs} pairs, longer side {longer:.0f} tokens on average, {PAIRS_A_STEP} a step: batches that "
        "length-grouped sampling makes of the source's first 800 pairs, at even quantiles of length (shuffled for "
        "TRL's defaults).",
        warm_up=False,
    )


def training_pairs(shared: Path, source: str, count: int) -> tuple[Any, Any]:
    """The same pairs twice: in batches as length-grouped sampling of a larger set makes them, and in random order."""
    from transformers.trainer_pt_utils import get_length_grouped_indices

    _, encoded = encoded_pairs(shared, source, 800)
    generator = torch.Generator().manual_seed(0)
    lengths = encoded["length"][:]
    order = get_length_grouped_indices(lengths, PAIRS_A_STEP, generator=generator)
    batches = [order[start : start + PAIRS_A_STEP] for start in range(0, len(order), PAIRS_A_STEP)]
    batches.sort(key=lambda batch: sum(lengths[row] for row in batch))
    wanted = count // PAIRS_A_STEP
    # Quantiles of the batches' length, so that few batches stand for all.
    chosen = [batches[(2 * index + 1) * len(batches) // (2 * wanted)] for index in range(wanted)]
    rows = [row for batch in chosen for row in batch]
    grouped = encoded.select(rows)
    return grouped, grouped.shuffle(seed=0)


def ours(
    shared: Path,
    pairs: Any,
    batching: str,
    layers: int | None = None,
    architecture: str = "standard",
    tokens_per_batch: int = 2048,
) -> Contestant:
    from inform_rm.scoring.packing import use_packed_attention
    from inform_rm.training.collators import PackedPairCollator, PairCollator
    from inform_rm.training.reward_arguments import RewardTrainingArguments
    from inform_rm.training.trainer import RewardTrainer

    tokenizer = tokenizer_of(shared)
    holder: dict[str, Any] = {}

    def prepare() -> None:
        model = fresh_inform_rm(shared, architecture, layers)
        if batching == "packed":
            use_packed_attention(model)
        holder["trainer"] = RewardTrainer(
            model=model, args=RewardTrainingArguments(scratch(), kl_warmup_steps=0, **common_arguments()),
            train_dataset=pairs, processing_class=tokenizer,
            data_collator=PackedPairCollator(tokens_per_batch) if batching == "packed" else PairCollator(tokenizer),
        )  # fmt: skip

    return Contestant(lambda: holder["trainer"].train(), prepare)


def trl(shared: Path, pairs: Any, layers: int | None, **settings: Any) -> Contestant:
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    tokenizer = tokenizer_of(shared)
    columns = {"chosen_ids": pairs["chosen_input_ids"][:], "rejected_ids": pairs["rejected_input_ids"][:]}
    holder: dict[str, Any] = {}

    def prepare() -> None:
        torch.manual_seed(0)
        one_reward = {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id}
        if layers is None:
            model = AutoModelForSequenceClassification.from_pretrained(
                shared / BACKBONE, dtype=torch.float32, **one_reward
            )
        else:
            config = AutoConfig.from_pretrained(shared / BACKBONE, num_hidden_layers=layers, **one_reward)
            model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        holder["trainer"] = RewardTrainer(
            model=model, args=RewardConfig(scratch(), max_length=None, **{**common_arguments(), **settings}),
            train_dataset=Dataset.from_dict(columns), processing_class=tokenizer,
        )  # fmt: skip

    return Contestant(lambda: holder["trainer"].train(), prepare)


def fresh_inform_rm(shared: Path, architecture: str, layers: int | None = None) -> Any:
    from transformers import AutoConfig

    from inform_rm import InfoRMConfig, InfoRMForSequenceClassification

    torch.manual_seed(0)
    if layers is None:
        return InfoRMForSequenceClassification.from_backbone(
            shared / BACKBONE, architecture=architecture, dtype=torch.float32
        )
    text_config = AutoConfig.from_pretrained(shared / BACKBONE, num_hidden_layers=layers, dtype=torch.float32)
    return InfoRMForSequenceClassification(InfoRMConfig(text_config=text_config, architecture=architecture))


def common_arguments() -> dict[str, Any]:
    # The order of the pairs is part of the measurement, so nobody shuffles them again. Without accumulation: of
    # ourselves we would make one update of 64 pairs.
    return {
        "per_device_train_batch_size": PAIRS_A_STEP, "gradient_accumulation_steps": 1,
        "num_train_epochs": 1, "learning_rate": 1e-5,
        "report_to": "none", "seed": 0, "save_strategy": "no", "logging_strategy": "no", "use_cpu": True,
        "disable_tqdm": True, "bf16": False, "train_sampling_strategy": "sequential",
    }  # fmt: skip


# --- scoring


def measure_scoring(shared: Path) -> list[Contest]:
    """Responses a second, from text to rewards: pairs as they are, and the best of 16 responses to a prompt."""
    from inform_rm.data.preferences import load_preferences

    pairs = load_preferences(shared / "data/hh-rlhf/test.jsonl.gz", on_bad_row="skip").dataset.shuffle(seed=0)
    pairs = pairs.select(range(48))
    prompts = [prompt for prompt in pairs["prompt"] for _ in range(2)]
    responses = [text for pair in zip(pairs["chosen"], pairs["rejected"], strict=True) for text in pair]
    contests = [scoring_contest(shared, "scoring the pairs of hh-rlhf", prompts, responses)]
    for prompt_tokens, response_tokens in ((200, 100), (300, 100)):
        texts = texts_of_length(shared, 4, prompt_tokens, 16, response_tokens)
        name = f"best of 16, prompts of {prompt_tokens} and responses of {response_tokens} tokens"
        contests.append(scoring_contest(shared, name, *texts))
    return contests


def scoring_contest(shared: Path, name: str, prompts: list[Any], responses: list[str]) -> Contest:
    from transformers import pipeline

    from inform_rm.scoring.scorer import RewardScorer

    tokenizer = tokenizer_of(shared)
    model = fresh_inform_rm(shared, "standard").eval()
    packed, padded = RewardScorer(model, tokenizer), RewardScorer(model, tokenizer, batching="padded")
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, function_to_apply="none")

    def by_pipeline(batch_size: int) -> torch.Tensor:
        texts = [
            tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": response}], tokenize=False)
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        return torch.tensor([found["score"] for found in classify(texts, batch_size=batch_size)])

    return Contest(
        name,
        "responses",
        len(responses),
        {
            "pipeline, batches of 8": Contestant(lambda: by_pipeline(8)),
            "pipeline, one at a time (its default)": Contestant(lambda: by_pipeline(1)),
            "inform-rm padded (sorted by length)": Contestant(lambda: padded.score(prompts, responses)),
            "inform-rm packed": Contestant(lambda: packed.score(prompts, responses)),
        },
        f"{len(responses)} responses, text to reward, standard head",
    )


def texts_of_length(
    shared: Path, num_prompts: int, prompt_tokens: int, num_responses: int, response_tokens: int
) -> tuple[list[Any], list[str]]:
    """Real prompts and responses of hh-rlhf whose lengths are nearest to those asked for; each with each."""
    from inform_rm.data.preferences import load_preferences

    tokenizer = tokenizer_of(shared)
    pairs = load_preferences(shared / "data/hh-rlhf/train.jsonl.gz", on_bad_row="skip").dataset
    prompts = [prompt for prompt in pairs["prompt"][:2000]]
    responses = [text for text in pairs["chosen"][:2000]]
    sizes = [len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]) for prompt in prompts]
    lengths = [len(ids) for ids in tokenizer(responses)["input_ids"]]
    near_prompts = sorted(range(len(prompts)), key=lambda row: abs(sizes[row] - prompt_tokens))[:num_prompts]
    near_responses = sorted(range(len(responses)), key=lambda row: abs(lengths[row] - response_tokens))
    rows = [
        (prompts[prompt], responses[response])
        for prompt in near_prompts
        for response in near_responses[:num_responses]
    ]
    random.Random(0).shuffle(rows)  # files of candidates are in any order
    return [prompt for prompt, _ in rows], [response for _, response in rows]


def measure_grid(shared: Path) -> list[Contest]:
    """The gap grid: both responses of every pair under every prompt, against plain forward passes."""
    from inform_rm.scoring.scorer import RewardScorer

    tokenizer = tokenizer_of(shared)
    model = fresh_inform_rm(shared, "standard").eval()
    packed = RewardScorer(model)
    sequences, lengths = made_up_rows(16, 2 * 8, 200, 100, same_responses=True)

    @torch.no_grad()
    def plain(batch_size: int) -> torch.Tensor:
        rewards = []
        for start in range(0, len(sequences), batch_size):
            batch = tokenizer.pad({"input_ids": sequences[start : start + batch_size]}, return_tensors="pt")
            rewards.append(model(**batch).logits.flatten())
        return torch.cat(rewards)

    @torch.no_grad()
    def with_cache() -> torch.Tensor:  # the other way to compute a prompt once
        rewards = []
        for start in range(0, len(sequences), 16):
            group = torch.tensor(sequences[start : start + 16])
            cache = model.model(input_ids=group[:1, :200], use_cache=True).past_key_values
            cache.batch_repeat_interleave(16)
            hidden = model.model(input_ids=group[:, 200:], past_key_values=cache).last_hidden_state
            rewards.append(model.score(hidden[:, -1]).flatten())
        return torch.cat(rewards)

    contestants = {
        "plain forward passes, batches of 8": Contestant(lambda: plain(8)),
        "plain forward passes, one at a time": Contestant(lambda: plain(1)),
        "key/value cache, a prompt at a time": Contestant(with_cache),
        "inform-rm packed": Contestant(lambda: packed.score_encoded(sequences, lengths)),
    }
    setting = "8 pairs x 16 prompts x 2 responses; prompts of 200, responses of 100 tokens (random ids), standard head"
    return [Contest("gap grid", "rewards", len(sequences), contestants, setting)]


# --- growth


def measure_growth(shared: Path) -> list[Contest]:
    """CPU time of packed scoring against responses to a prompt, number of prompts, and length."""
    base = {"prompts": 4, "responses": 4, "prompt_tokens": 100, "response_tokens": 50}
    return [
        growth_contest(shared, "responses to a prompt", "responses", [1, 4, 16, 64], {**base, "prompts": 1}),
        growth_contest(shared, "number of prompts, 2 responses each", "prompts", [2, 4, 8, 16, 32, 64],
                       {**base, "responses": 2}),
        growth_contest(shared, "tokens of the prompt, 2 prompts with 2 responses of 50", "prompt_tokens",
                       [128, 256, 512, 1024, 2048, 4096], {**base, "prompts": 2, "responses": 2}),
    ]  # fmt: skip


def growth_contest(shared: Path, name: str, varied: str, values: list[int], base: dict[str, int]) -> Contest:
    from inform_rm.scoring.scorer import RewardScorer

    scorer = RewardScorer(fresh_inform_rm(shared, "standard").eval())
    contestants = {}
    for value in values:
        sequences, lengths = made_up_rows(**{**base, varied: value})
        # A list, not a tensor: the contestants' rewards are not to be compared.
        contestants[str(value)] = Contestant(
            partial(lambda *rows: scorer.score_encoded(*rows).tolist(), sequences, lengths)
        )
    setting = f"packed, standard head, CPU seconds; {varied} varies from {base}"
    return Contest(name, "runs", 1, contestants, setting, clock=time.process_time)


def plot_growth(path: Path, contests: list[dict[str, Any]]) -> None:
    """Seconds against size on logarithmic axes, with the fitted power of the last points and the tokens' growth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    from inform_rm.util.colors import BLUE, GREY

    figure, axes = plt.subplots(1, len(contests), figsize=(4.6 * len(contests), 3.8), layout="constrained")
    for axis, contest in zip(axes, contests, strict=True):
        sizes = np.array([int(name) for name in contest["results"]])
        seconds = np.array([result["median_seconds"] for result in contest["results"].values()])
        tokens = np.array([result["tokens"] for result in contest["results"].values()])
        power, _ = np.polyfit(np.log(tokens[-3:]), np.log(seconds[-3:]), 1)
        axis.loglog(sizes, seconds, "o-", color=BLUE, label="measured")
        axis.loglog(sizes, seconds[-1] * tokens / tokens[-1], "--", color=GREY, label="as the tokens grow")
        axis.set_xlabel(contest["name"])
        axis.set_ylabel("CPU seconds")
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
        axis.set_title(f"seconds ~ tokens^{power:.2f} (last three)", fontsize=10)
        axis.legend()
        print(f"{contest['name']}: seconds ~ tokens^{power:.3f} over the last three points")
    figure.savefig(path, dpi=110)


def write_profile(shared: Path, path: Path) -> None:
    """Where the time of packed training and of packed scoring goes, by operation."""
    from torch.profiler import ProfilerActivity, profile

    from inform_rm.scoring.scorer import RewardScorer

    training = {
        f"training, 8 pairs of {source}": ours(shared, training_pairs(shared, source, 8)[0], "packed")
        for source in ("hh-rlhf", "qa-feedback")
    }
    scorer = RewardScorer(fresh_inform_rm(shared, "standard").eval())
    rows = made_up_rows(4, 16, 200, 100)
    scoring = Contestant(lambda: scorer.score_encoded(*rows))
    lines = []
    for title, work in {**training, "scoring, 4 x 16 responses": scoring}.items():
        work.prepare()
        work.run()
        work.prepare()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            work.run()
        events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
        total = sum(event.self_cpu_time_total for event in events)
        lines += [f"### {title}", "", "| operation | share of time | calls |", "|---|---|---|"]
        lines += [
            f"| {event.key} | {event.self_cpu_time_total / total:.1%} | {event.count} |" for event in events[:12]
        ]
        lines.append("")
    path.write_text("\n".join(lines))
    print("\n".join(lines))


MEASUREMENTS: dict[str, Callable[[Path], list[Contest]]] = {
    "train": measure_training, "large": measure_large_shape, "last": measure_last_layer, "head": measure_head,
    "rows": measure_row_length, "score": measure_scoring,
    "grid": measure_grid, "growth": measure_growth,
}  # fmt: skip
WITH_MEMORY = ("train", "large", "score", "grid")


# --- helpers


@cache
def tokenizer_of(shared: Path) -> Any:
    from inform_rm.data.tokenizer import load_tokenizer

    return load_tokenizer(shared / BACKBONE, chat_template=str(TEMPLATE))


def encoded_pairs(shared: Path, source: str, count: int) -> tuple[Any, Any]:
    from inform_rm.data.encoding import encode_pairs
    from inform_rm.data.preferences import load_preferences

    tokenizer = tokenizer_of(shared)
    folder = shared / "data" / source
    file = next(path for path in (folder / "train.jsonl.gz", folder / "test.jsonl.gz") if path.exists())
    pairs = load_preferences(file, on_bad_row="skip").dataset
    return tokenizer, encode_pairs(pairs.select(range(min(count, len(pairs)))), tokenizer, max_length=None).dataset


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


def scratch() -> str:
    return tempfile.mkdtemp()


if __name__ == "__main__":
    main()
