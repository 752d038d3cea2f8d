"""Stage 1 of `real_text.py`: texts with their states, in files of a few megabytes that are made one by one.

A part is a list of chunks, and which texts a chunk holds follows from the sizes and the data alone, so that parts can
be made by several processes, stopped and repeated. Files: ``samples/PART/NUMBER.safetensors`` and ``.jsonl``, one line
a row of the tensors.
"""

import gzip
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from real_text_policy import TEMPLATE, LlamaWithStates, Rows, read_rows, write_rows

PROXY_LAYERS, GOLD_LAYERS = range(5, 6), range(29, 30)  # trained: of proxies the last of 6, of gold that of 30
REAL_SOURCES = {"hh-rlhf": 1.0, "swap-hh-helpful": 0.5, "swap-truthfulqa": 0.5}  # shares of what fits
OTHERS_ANSWER = "hh-rlhf, another prompt's answer"
SPLITS = ("test", "test", "validation", *["train"] * 7)  # of pair prompts, in turn


@dataclass(frozen=True)
class Sizes:
    """How much of everything; the defaults are the full experiment.

    Attributes:
        real_pairs: human preference pairs for the gold model, a fifth of them held out.
        real_tokens: longest response of those, in tokens.
        pair_prompts: prompts for training pairs; 7 of 10 for training, 1 for validation, 2 for test.
        per_prompt: responses to each; as many were written to its partner and are read under it.
        policy_prompts: prompts that policies are trained on, held aside of the same set.
        measured_prompts: prompts that policies are measured on, held aside of those of best-of-n.
        new_tokens: longest response of the policy.
        attack_prompts: prompts of best-of-n, held aside of the same set as the pairs' prompts.
        other_prompts: prompts of best-of-n out of distribution.
        candidates: responses to each of them.
        rows: responses written at once.
        prompt_tokens: longest prompt.
    """

    real_pairs: int = 3000
    real_tokens: int = 128
    pair_prompts: int = 700
    per_prompt: int = 8
    policy_prompts: int = 250
    measured_prompts: int = 32
    new_tokens: int = 64
    attack_prompts: int = 96
    other_prompts: int = 32
    candidates: int = 512
    rows: int = 128
    prompt_tokens: int = 32


SMALL = Sizes(
    real_pairs=1000, real_tokens=48, pair_prompts=416, per_prompt=4, new_tokens=32, attack_prompts=8, other_prompts=4
)
PARTS = ("pairs", "real", "attack", "other", "swapped")


def jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON Lines file, plain or gzipped."""
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
    with opened as file:
        return [json.loads(line) for line in file]


class Texts:
    """Which texts each chunk of each part has; needs the tokenizer, because sizes are in tokens."""

    def __init__(self, data: Path, tokenizer: Any, sizes: Sizes):
        self.data, self.tokenizer, self.sizes = data, tokenizer, sizes
        tokenizer.chat_template = TEMPLATE.read_text(encoding="utf-8")
        self.end = tokenizer.eos_token_id

    def prompt_ids(self, prompt: str) -> list[int]:
        turn = [{"role": "user", "content": prompt}]
        return list(
            self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]
        )

    def response_ids(self, response: str) -> list[int]:
        return [*self.tokenizer(response, add_special_tokens=False)["input_ids"], self.end]

    def fits(self, text: str, tokens: int) -> bool:
        return 0 < len(self.tokenizer(text, add_special_tokens=False)["input_ids"]) <= tokens

    def first_turns(self, split: str) -> list[str]:
        """Distinct first turns of helpful dialogues of several turns, whose pairs the gold model never sees."""
        rows = jsonl(self.data / "hh-rlhf" / f"{split}.jsonl.gz")
        dialogues = [
            row["prompt"] for row in rows if row["subset"] == "helpful-base" and "\n\nAssistant:" in row["prompt"]
        ]
        firsts = (each.split("\n\nAssistant:")[0].removeprefix("Human:").strip() for each in dialogues)
        return [each for each in dict.fromkeys(firsts) if self.fits(each, self.sizes.prompt_tokens)]

    def prompts(self, part: str) -> list[str]:
        """Prompts of a part of the policy, in seeded order."""
        if part == "other":
            rows = [
                row for split in ("train", "test") for row in jsonl(self.data / "pandalm-human" / f"{split}.jsonl.gz")
            ]
            found = [
                each
                for each in dict.fromkeys(row["prompt"] for row in rows)
                if self.fits(each, self.sizes.prompt_tokens)
            ]
        else:
            found = self.first_turns("test" if part in ("attack", "measured") else "train")
        sizes = self.sizes
        start, count = {
            "pairs": (0, sizes.pair_prompts), "policy": (sizes.pair_prompts, sizes.policy_prompts),
            "attack": (0, sizes.attack_prompts), "measured": (sizes.attack_prompts, sizes.measured_prompts),
            "other": (0, sizes.other_prompts),
        }[part]  # fmt: skip
        order = np.random.default_rng(0).permutation(len(found))
        return [found[place] for place in order[start : start + count]]

    def real_pairs(self) -> list[dict[str, Any]]:
        """Human preference pairs that fit, with ``split``; the held-out ones come from the sources' test files.

        Behind them, so that gold reads the prompt, a pair for each of hh-rlhf: its preferred response over the one
        that was preferred under the prompt of another pair of its split.
        """
        found: list[dict[str, Any]] = []
        for split, count in (("train", self.sizes.real_pairs * 4 // 5), ("test", self.sizes.real_pairs // 5)):
            rows = []
            for name in ("hh-rlhf", "prompt-swap"):
                for row in jsonl(self.data / name / f"{split}.jsonl.gz"):
                    source = name if name in REAL_SOURCES else row["subset"]
                    texts = [row["chosen"], row["rejected"]]
                    if source in REAL_SOURCES and not row["prompt"].startswith("Human: ") and row["id"] is not None:
                        fits = self.fits(row["prompt"], 2 * self.sizes.prompt_tokens)
                        if fits and all(self.fits(text, self.sizes.real_tokens) for text in texts):
                            rows.append(
                                {
                                    "source": source,
                                    **{key: row[key] for key in ("prompt", "chosen", "rejected", "id")},
                                    "split": split,
                                }
                            )
            rows = [row for row in rows if _share(row["id"]) < REAL_SOURCES[row["source"]]]
            found += [rows[place] for place in np.random.default_rng(1).permutation(len(rows))[:count]]
        for split in ("train", "test"):
            own = [row for row in found if row["source"] == "hh-rlhf" and row["split"] == split]
            for row, other in zip(own, [*own[1:], *own[:1]], strict=True):
                if row["prompt"] != other["prompt"]:
                    found.append({**row, "source": OTHERS_ANSWER, "rejected": other["chosen"]})
        return found

    def num_chunks(self, part: str) -> int:
        sizes = self.sizes
        if part in ("attack", "other"):
            return len(self.prompts(part)) * -(-sizes.candidates // sizes.rows)
        if part == "pairs":
            return -(-len(self.prompts(part)) // (sizes.rows // sizes.per_prompt))
        if part == "real":
            return -(-len(self.real_pairs()) // 16)
        prompts = len(self.prompts("pairs"))
        paired = partners([(place, SPLITS[place % 10]) for place in range(prompts)])
        return -(-len(paired) * sizes.per_prompt // sizes.rows)


def _share(identity: str) -> float:
    """A number from 0 to 1 that is the same for the twins of a swapped pair (``.../a`` and ``.../b``)."""
    name = identity.removesuffix("/a").removesuffix("/b")
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32


def make_chunk(reader: LlamaWithStates, texts: Texts, part: str, number: int) -> tuple[Rows, list[dict[str, Any]]]:
    """Tensors of a chunk and one line for each of their rows."""
    sizes = texts.sizes
    if part == "real":
        pairs = texts.real_pairs()[16 * number : 16 * (number + 1)]
        lines = [
            {"prompt": pair["prompt"], "source": pair["source"], "split": pair["split"], "response": pair[side],
             "chosen": side == "chosen"}
            for pair in pairs for side in ("chosen", "rejected")
        ]  # fmt: skip
        prompts = [texts.prompt_ids(line["prompt"]) for line in lines]
        return read_rows(reader, prompts, [texts.response_ids(line["response"]) for line in lines]), lines
    asked = texts.prompts(part)
    if part == "pairs":
        per_chunk = sizes.rows // sizes.per_prompt
        places, per_prompt = list(range(len(asked)))[per_chunk * number : per_chunk * (number + 1)], sizes.per_prompt
    else:  # all prompts get their first responses before any gets more
        wave, place = divmod(number, len(asked))
        places, per_prompt = [place], min(sizes.rows, sizes.candidates - wave * sizes.rows)
    seed = int.from_bytes(hashlib.sha256(f"{part}/{number}".encode()).digest()[:7], "big")
    rows = write_rows(
        reader, [texts.prompt_ids(asked[place]) for place in places], per_prompt, sizes.new_tokens, texts.end, seed
    )
    return rows, lines_of(texts, rows, part, asked, [place for place in places for _ in range(per_prompt)])


def lines_of(texts: Texts, rows: Rows, part: str, asked: list[str], places: list[int]) -> list[dict[str, Any]]:
    lines = []
    for row, place in enumerate(places):
        ids = rows.ids[row, rows.prompt_lengths[row] : rows.lengths[row] - 1].tolist()
        split = SPLITS[place % 10] if part == "pairs" else part
        lines.append({"prompt": asked[place], "prompt_number": place, "split": split, "tokens": len(ids),
                      "response": texts.tokenizer.decode(ids), "cut": len(ids) == texts.sizes.new_tokens})  # fmt: skip
    return lines


def partners(prompts: list[tuple[int, str]]) -> dict[int, int]:
    """By prompt number its partner, mutually: neighbours of the same split; an odd one out has none."""
    found = {}
    for split in dict.fromkeys(SPLITS):
        own = sorted({number for number, name in prompts if name == split})
        for one, other in zip(own[::2], own[1::2], strict=False):
            found |= {one: other, other: one}
    return found


def swapped_rows(reader: LlamaWithStates, folder: Path, number: int, size: int) -> tuple[Rows, list[dict[str, Any]]]:
    """Responses to pair prompts once more, each under the partner of its prompt; `size` of them, chunk `number`."""
    rows, lines = read_part(folder, "pairs", ())
    partner = partners([(line["prompt_number"], line["split"]) for line in lines])
    first_row = {line["prompt_number"]: place for place, line in reversed(list(enumerate(lines)))}
    every = [place for place, line in enumerate(lines) if line["prompt_number"] in partner]
    places = every[size * number : size * (number + 1)]
    under = [first_row[partner[lines[place]["prompt_number"]]] for place in places]
    prompts = [rows.ids[place, : rows.prompt_lengths[place]].tolist() for place in under]
    responses = [rows.ids[place, rows.prompt_lengths[place] : rows.lengths[place]].tolist() for place in places]
    kept = [
        {**lines[place], **{name: lines[other][name] for name in ("prompt", "prompt_number")}, "of_row": place}
        for place, other in zip(places, under, strict=True)
    ]
    return read_rows(reader, prompts, responses), kept


def concatenated(parts: list[Rows]) -> Rows:
    """Rows of several chunks as one, padded to the longest."""
    width = max(part.ids.shape[1] for part in parts)

    def wide(tensors: list[torch.Tensor]) -> torch.Tensor:
        found = tensors[0].new_zeros(sum(len(each) for each in tensors), width, *tensors[0].shape[2:])
        start = 0
        for each in tensors:
            found[start : start + len(each), : each.shape[1]] = each
            start += len(each)
        return found

    return Rows(
        wide([part.ids for part in parts]), torch.cat([part.prompt_lengths for part in parts]),
        torch.cat([part.lengths for part in parts]),
        {depth: wide([part.states[depth] for part in parts]) for depth in parts[0].states},
    )  # fmt: skip


def save_chunk(folder: Path, part: str, number: int, rows: Rows, lines: list[dict[str, Any]], seconds: float) -> None:
    """Both files whole or not at all; the tensors come last, and say that the chunk is there."""
    target = folder / "samples" / part / f"{number:04d}.safetensors"
    target.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    temporary = target.with_suffix(".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.rename(target.with_suffix(".jsonl"))
    save_file(
        {name: value.contiguous() for name, value in rows.tensors().items()},
        temporary,
        {"cpu_seconds": f"{seconds:.1f}"},
    )
    temporary.rename(target)


def read_part(folder: Path, part: str, depths: tuple[int, ...]) -> tuple[Rows, list[dict[str, Any]]]:
    """All chunks of a part that are there, in order, with the states of these depths."""
    found, lines = [], []
    for path in sorted((folder / "samples" / part).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            ids, prompt_lengths, lengths = (file.get_tensor(name) for name in ("ids", "prompt_lengths", "lengths"))
            states = {depth: file.get_tensor(f"states.{depth}") for depth in depths}
        found.append(Rows(ids, prompt_lengths, lengths, states))
        lines += jsonl(path.with_suffix(".jsonl"))
    if not found:
        raise FileNotFoundError(f"{folder / 'samples' / part}: no chunk. Run the stage 'sample' first.")
    return concatenated(found), lines


def sample(
    folder: Path, data: Path, model_folder: Path, sizes: Sizes, parts: tuple[str, ...], worker: tuple[int, int]
) -> None:
    """Make what is missing of these parts; worker (i, n) makes every n-th chunk from the i-th on."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = Texts(data, AutoTokenizer.from_pretrained(model_folder), sizes)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    reader = LlamaWithStates(model, [span.start for span in depths_of(model.config.num_hidden_layers)])
    index, workers = worker
    for part, number in _missing(folder, texts, parts, index, workers):
        start = time.process_time()
        if part == "swapped":
            rows, lines = swapped_rows(reader, folder, number, sizes.rows)
        else:
            rows, lines = make_chunk(reader, texts, part, number)
        seconds = time.process_time() - start
        save_chunk(folder, part, number, rows, lines, seconds)
        print(
            f"{part} {number}: {len(lines)} rows, {int(rows.lengths.sum())} tokens, {seconds:.0f} s of CPU", flush=True
        )


def layers_of(model: Path) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(model).num_hidden_layers)


def depths_of(layers: int) -> tuple[range, range]:
    """Which layers of proxies and of gold are trained; of a smaller model the last but one and the last layer."""
    if layers >= GOLD_LAYERS.stop:
        return PROXY_LAYERS, GOLD_LAYERS
    return range(layers - 2, layers - 1), range(layers - 1, layers)


def _missing(
    folder: Path, texts: Texts, parts: tuple[str, ...], index: int, workers: int
) -> Iterator[tuple[str, int]]:
    for part in parts:
        for number in range(index, texts.num_chunks(part), workers):
            if not (folder / "samples" / part / f"{number:04d}.safetensors").exists():
                yield part, number
