"""Stage 1 of `real_text.py`: prompts of real data, human pairs, and responses of the policy, as rows of tokens.

Files: ``samples/PART.safetensors``, written once. Which prompts a part has follows from sizes and data alone.
"""

import gzip
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from real_text_writer import Writer, padded

TEMPLATE = Path(__file__).parent / "chatml.jinja"  # without the system message that would come before each prompt
# Of the human pairs that gold learns from: folder, its subsets (all that begin so).
REAL_SOURCES = {
    "hh-rlhf": "helpful-base", "oasst-sample": "oasst-depth0", "pandalm-human": "pandalm", "truthfulqa": "truthfulqa",
    "piqa": "piqa", "prompt-swap": ("swap-hh-helpful", "swap-truthfulqa", "swap-piqa"),
}  # fmt: skip
ROLES = {"Human": "user", "Assistant": "assistant"}
OTHERS_ANSWER = "another prompt's answer"
SPLITS = ("train", "validation", "test")  # of the prompts that pairs are made for


@dataclass(frozen=True)
class Sizes:
    """How much of everything.

    Attributes:
        real_tokens: longest prompt and longest response of the human pairs, in tokens.
        prompts: for pairs, by split.
        per_prompt: responses to each of them; as many were written to its partner and are read under it.
        policy_prompts: prompts that policies are trained on.
        attack_prompts: prompts of best-of-n; as many out of distribution.
        candidates: responses to each of them.
        measured_prompts: prompts that policies are measured on.
        prompt_tokens: longest prompt of the policy.
        new_tokens: its longest response.
        rows: responses written at once.
    """

    real_tokens: int = 128
    prompts: tuple[int, int, int] = (2000, 300, 400)
    per_prompt: int = 6
    policy_prompts: int = 800
    attack_prompts: int = 64
    candidates: int = 512
    measured_prompts: int = 256
    prompt_tokens: int = 48
    new_tokens: int = 64
    rows: int = 2048


@dataclass
class Rows:
    """Texts of a part, padded at the end.

    Attributes:
        ids: ``(N, T)`` tokens, prompt and response; the last one ends the response.
        prompt_lengths: ``(N,)`` tokens of the prompt.
        lengths: ``(N,)`` all tokens.
        prompts: ``(N,)`` number of the prompt.
    """

    ids: Tensor
    prompt_lengths: Tensor
    lengths: Tensor
    prompts: Tensor

    def responses(self) -> Tensor:
        """``(N,)`` tokens of the response, its end among them."""
        return self.lengths - self.prompt_lengths


def jsonl(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _pairs(data: Path, source: str, split: str) -> list[dict[str, Any]]:
    path = data / source / f"{split}.jsonl.gz"
    return jsonl(path) if path.exists() else []


class Texts:
    """Prompts and human pairs; needs the tokenizer, because sizes are in tokens."""

    def __init__(self, data: Path, tokenizer: Any, sizes: Sizes):
        self.data, self.tokenizer, self.sizes = data, tokenizer, sizes
        tokenizer.chat_template = TEMPLATE.read_text(encoding="utf-8")
        self.end = tokenizer.eos_token_id

    def conversation_ids(self, prompts: list[str]) -> list[list[int]]:
        """Prompts of one turn, or of several (``Human: ...``, ``Assistant: ...``), up to where the response begins."""
        conversations = []
        for prompt in prompts:
            several = prompt.startswith("Human: ")
            parts = re.split(r"(?:^|\n\n)(Human|Assistant):", prompt) if several else ["", "Human", prompt]
            turns = zip(parts[1::2], parts[2::2], strict=True)
            conversations.append([{"role": ROLES[name], "content": text.strip()} for name, text in turns])
        if not conversations:
            return []
        return self._ids(self.tokenizer.apply_chat_template(conversations, add_generation_prompt=True, tokenize=False))

    def response_ids(self, responses: list[str]) -> list[list[int]]:
        return [[*ids, self.end] for ids in self._ids(responses)]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    def _fit(self, texts: list[str], tokens: int) -> list[bool]:
        return [0 < len(ids) <= tokens for ids in self._ids(texts)]

    def prompts(self, part: str) -> list[str]:
        """Prompts of ``pairs``, ``policy``, ``attack``, ``other``, ``measured``: distinct ones, in seeded order."""
        sizes, pairs, held_out = self.sizes, sum(self.sizes.prompts), self.sizes.prompts[2]
        if part == "other":
            return self._pool("test", {"hh-rlhf": "harmless-base"})[: sizes.attack_prompts]
        sources = {"hh-rlhf": "helpful-base", "truthfulqa": "truthfulqa", "piqa": "piqa"}
        train, test = (self._pool(split, sources) for split in ("train", "test"))
        own, wanted = {
            "pairs": (train[: pairs - held_out] + test[:held_out], pairs),
            "policy": (train[pairs - held_out :], sizes.policy_prompts),
            "attack": (test[held_out:], sizes.attack_prompts),
            "measured": (test[held_out + sizes.attack_prompts :], sizes.measured_prompts),
        }[part]
        if len(own) < wanted:
            raise ValueError(f"{self.data}: {len(own)} prompts for {part}, {wanted} are wanted. Ask for fewer.")
        return own[:wanted]

    def _pool(self, split: str, sources: dict[str, str]) -> list[str]:
        firsts = [row["prompt"].split("\n\nAssistant:")[0].removeprefix("Human:").strip()
                  for source, subset in sources.items() for row in _pairs(self.data, source, split)
                  if row["subset"].startswith(subset)]  # fmt: skip
        firsts = sorted(set(firsts))
        known = [each for each, fits in zip(firsts, self._fit(firsts, self.sizes.prompt_tokens), strict=True) if fits]
        return [known[place] for place in np.random.default_rng(1).permutation(len(known))]

    def real_pairs(self) -> list[dict[str, Any]]:
        """Human pairs with ``source`` and ``split``, and each chosen response over one that was chosen for another
        prompt of the source."""
        found, most = [], self.sizes.real_tokens
        for source, subsets in REAL_SOURCES.items():
            for split in ("train", "test"):
                rows = [{**row, "source": row["subset"] if source == "prompt-swap" else source, "split": split}
                        for row in _pairs(self.data, source, split) if row["subset"].startswith(subsets)]  # fmt: skip
                fits = [self._fit([row[key] for row in rows], most) for key in ("prompt", "chosen", "rejected")]
                rows = [row for row, *each in zip(rows, *fits, strict=True) if all(each)]
                found += rows
                if source != "prompt-swap":
                    order = np.random.default_rng(2).permutation(len(rows))
                    found += [
                        {**rows[one], "source": OTHERS_ANSWER, "rejected": rows[other]["chosen"]}
                        for one, other in zip(order, np.roll(order, 1), strict=True)
                        if rows[one]["prompt"] != rows[other]["prompt"]
                    ]
        return found


def partners(splits: list[str]) -> list[int]:
    """By prompt number that of its partner, mutually: neighbours of the same split; an odd one out has itself."""
    found = list(range(len(splits)))
    for split in dict.fromkeys(splits):
        own = [number for number, name in enumerate(splits) if name == split]
        for one, other in zip(own[::2], own[1::2], strict=False):
            found[one], found[other] = other, one
    return found


def splits_of(sizes: Sizes) -> list[str]:
    """By number of a pair prompt its split."""
    return [name for name, count in zip(SPLITS, sizes.prompts, strict=True) for _ in range(count)]


def is_train(rows: Rows, sizes: Sizes) -> Tensor:
    """Which of the pairs' rows are responses to their own prompt, of the training split."""
    splits, own = splits_of(sizes), sizes.per_prompt
    known = torch.tensor([name == "train" for name in splits])[rows.prompts]
    return known & (torch.arange(len(rows.prompts)) % (2 * own) < own)


def seed_of(*parts: Any) -> int:
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:6], "big")


def rows_of(prompts: list[list[int]], responses: list[list[int]], numbers: list[int]) -> Rows:
    ids, lengths = padded([[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)])
    return Rows(ids, torch.tensor([len(each) for each in prompts]), lengths, torch.tensor(numbers))


def written(writer: Writer, texts: Texts, part: str, asked: list[str], per_prompt: int) -> Rows:
    """Responses of the policy, those of one prompt together."""
    ids, found = texts.conversation_ids(asked), []
    at_once = max(1, texts.sizes.rows // per_prompt)
    for start in range(0, len(ids), at_once):
        own = ids[start : start + at_once]
        found += writer.write(own, per_prompt, seed_of(part, start))
    numbers = [number for number in range(len(ids)) for _ in range(per_prompt)]
    return rows_of([ids[number] for number in numbers], found, numbers)


def with_partners(rows: Rows, per_prompt: int, splits: list[str]) -> Rows:
    """After each prompt's responses those to its partner, read under this prompt: ``2 * per_prompt`` rows a prompt."""
    ids = [row[:length].tolist() for row, length in zip(rows.ids, rows.lengths.tolist(), strict=True)]
    starts = rows.prompt_lengths.tolist()
    prompts, responses, numbers = [], [], []
    for number, other in enumerate(partners(splits)):
        first = number * per_prompt
        own = ids[first][: starts[first]]
        for place in (*range(first, first + per_prompt), *range(other * per_prompt, (other + 1) * per_prompt)):
            prompts.append(own)
            responses.append(ids[place][starts[place] :])
            numbers.append(number)
    return rows_of(prompts, responses, numbers)


def save_rows(folder: Path, part: str, rows: Rows) -> None:
    target = folder / "samples" / f"{part}.safetensors"
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in vars(rows).items()}, target.with_suffix(".part"))
    target.with_suffix(".part").rename(target)


def read_rows(folder: Path, part: str) -> Rows:
    return Rows(**load_file(folder / "samples" / f"{part}.safetensors"))


def sample(folder: Path, data: Path, model: Path, sizes: Sizes, device: str, part: str) -> None:
    """Make ``real``, ``pairs``, ``attack`` or ``other``, unless it is there."""
    from transformers import AutoTokenizer

    if (folder / "samples" / f"{part}.safetensors").exists():
        return
    texts = Texts(data, AutoTokenizer.from_pretrained(model), sizes)
    if part == "real":
        pairs = texts.real_pairs()
        prompts = [ids for ids in texts.conversation_ids([pair["prompt"] for pair in pairs]) for _ in range(2)]
        responses = texts.response_ids([pair[side] for pair in pairs for side in ("chosen", "rejected")])
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        about = [{"source": pair["source"], "split": pair["split"]} for pair in pairs]
        (folder / "samples" / "real.json").write_text(json.dumps(about))
        save_rows(folder, part, rows_of(prompts, responses, [place // 2 for place in range(len(prompts))]))
        return
    writer = Writer.of_folder(model, sizes.new_tokens, texts.end, device)
    per_prompt = sizes.per_prompt if part == "pairs" else sizes.candidates
    rows = written(writer, texts, part, texts.prompts(part), per_prompt)
    save_rows(folder, part, with_partners(rows, per_prompt, splits_of(sizes)) if part == "pairs" else rows)
