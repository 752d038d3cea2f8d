"""A generated preference world whose reward is known exactly: ``r(x, y) = r1(x, y) + r2(y)``.

Prompts ask for two things (a red fox, soup with ginger, ...); responses say two things in some style. Both gold parts
are read from the text alone, so any prompt and response of the world can be scored, also one sampled later for
best-of-n:

- ``r1`` (prompt-related): 1 for each requested word that the response uses and does not contradict; 0, 1 or 2.
- ``r2`` (style, prompt-free): up to 0.3 for length, 0.15 for politeness, 0.15 for a list, minus 0.15 for hedging.

The spread of ``r2`` (0.75) is below one step of ``r1``: what is asked always outweighs style, and style decides
between responses that do it equally well. Labels are hard (the higher gold reward is chosen) and then flipped with
probability `label_noise`, rather than drawn from the Bradley-Terry model: the best possible accuracy is then 1 on
every noise-free set, so that a test accuracy reads as a share of what can be learnt. Only training pairs are flipped.
"""

import random
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from inform_rm.errors import InputError
from inform_rm.world.text import FAMILIES, FILLERS, HEDGES, POLITE_CLOSERS, POLITE_OPENERS, SLOT_WORDS

LENGTH_WEIGHT, LENGTH_CAP_WORDS = 0.3, 40
POLITE_WEIGHT, LIST_WEIGHT, HEDGE_WEIGHT = 0.15, 0.15, -0.15
MAX_FILLERS = 3
SPLITS = ("train", "validation", "in_distribution", "bias_reversed", "adversarial_prompt", "unseen_family")
SLOT_OF_WORD = {word: slot for slot, words in SLOT_WORDS.items() for word in words}


@dataclass(frozen=True)
class WorldConfig:
    """What a world is like. Two equal configurations give the same rows on every machine.

    Attributes:
        style_bias: how far length goes with correctness in training: the response that does what the prompt asks has
            more filler sentences than the other with probability ``(1 + style_bias) / 2``; 0 is unbiased.
        label_noise: probability, below 0.5, that a training label is flipped.
        adversarial_share: share of training pairs that come as twins: the same two responses under a prompt that the
            other one answers, the preference reversed.
        equal_content_share: share of training and in-distribution pairs whose responses do what is asked equally
            well, so that style alone decides.
        off_topic_share: share of wrong responses that answer another kind of task; the others answer the same kind
            about one or two other things, which is harder to see.
        unseen_families: task families that only the `unseen_family` set uses (names in `FAMILIES`).
        seed: seed of every draw.
    """

    style_bias: float = 0.6
    label_noise: float = 0.05
    adversarial_share: float = 0.1
    equal_content_share: float = 0.1
    off_topic_share: float = 0.4
    unseen_families: tuple[str, ...] = ("verse", "dinner")
    seed: int = 0

    def __post_init__(self) -> None:
        shares = ("adversarial_share", "equal_content_share", "off_topic_share")
        rules = [
            ("style_bias", -1 <= self.style_bias <= 1, "lie in [-1, 1]"),
            ("label_noise", 0 <= self.label_noise < 0.5, "lie in [0, 0.5)"),
            *((name, 0 <= getattr(self, name) <= 1, "lie in [0, 1]") for name in shares),
            ("unseen_families", set() < set(self.unseen_families) < set(FAMILIES), f"be some of {sorted(FAMILIES)}"),
        ]
        faults = [f"{name}={getattr(self, name)!r} must {rule}" for name, holds, rule in rules if not holds]
        if self.adversarial_share + self.equal_content_share > 1:
            faults.append("adversarial_share + equal_content_share must not exceed 1")
        if faults:
            raise InputError("WorldConfig: " + "; ".join(faults) + ".")


class GoldReward(NamedTuple):
    """The two parts of the gold reward of one response, and their sum `total`."""

    prompt_related: float
    style: float

    @property
    def total(self) -> float:
        """``r1 + r2``."""
        return self.prompt_related + self.style


class Task(NamedTuple):
    """What a prompt asks for, or what a response answers: a family and a word for each of its slots."""

    family: str
    words: dict[str, str]


def _slot_words(text: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for word in re.findall(r"[a-z]+", text.lower()):
        if word in SLOT_OF_WORD:
            found.setdefault(SLOT_OF_WORD[word], set()).add(word)
    return found


def gold_prompt_related(prompt: str, response: str) -> float:
    """``r1``: how many of the requested words the response uses without naming a rival of the same kind."""
    requested = _slot_words(prompt)
    if not requested:
        raise InputError(f"prompt {prompt!r} asks for nothing this world knows. Use a prompt of `sample_prompt`.")
    said = _slot_words(response)
    return float(sum(said.get(slot) == words for slot, words in requested.items()))


def gold_style(response: str) -> float:
    """``r2``: length, politeness, lists and hedging, read from the text; the prompt does not enter."""
    length = min(len(response.split()), LENGTH_CAP_WORDS) / LENGTH_CAP_WORDS
    polite = any(phrase in response for phrase in POLITE_OPENERS + POLITE_CLOSERS)
    hedged = any(phrase in response for phrase in HEDGES)
    listed = re.search(r"^- ", response, flags=re.MULTILINE) is not None
    return LENGTH_WEIGHT * length + POLITE_WEIGHT * polite + LIST_WEIGHT * listed + HEDGE_WEIGHT * hedged


def gold_reward(prompt: str, response: str) -> GoldReward:
    """Both gold parts of a response of the world, from the text alone.

    Example:
        >>> gold_reward("Describe a red fox.", "A red wolf is easy to know by its shape.").prompt_related
        1.0
    """
    return GoldReward(gold_prompt_related(prompt, response), gold_style(response))


def _render_response(rng: random.Random, task: Task, fillers: int) -> str:
    """A response with so many filler sentences, worded in a style that is drawn."""
    polite, listed, hedged = rng.random() < 0.5, rng.random() < 0.5, rng.random() < 0.4
    sentences = [rng.choice(HEDGES)] if hedged else []
    sentences.append(rng.choice(FAMILIES[task.family].bodies).format(**task.words))
    sentences += rng.sample(FILLERS, fillers)
    text = "\n".join(f"- {sentence}" for sentence in sentences) if listed else " ".join(sentences)
    separator = "\n" if listed else " "
    if polite:
        opens = rng.random() < 0.5
        phrase = rng.choice(POLITE_OPENERS if opens else POLITE_CLOSERS)
        text = phrase + separator + text if opens else text + separator + phrase
    return text


def _draw_task(rng: random.Random, families: list[str]) -> Task:
    family = rng.choice(families)
    return Task(family, {slot: rng.choice(SLOT_WORDS[slot]) for slot in FAMILIES[family].slots})


def _draw_other_task(rng: random.Random, task: Task, families: list[str], off_topic_share: float) -> Task:
    """A task of another family, or the same with one (half of the time) or both words replaced."""
    others = [family for family in families if family != task.family]
    if others and rng.random() < off_topic_share:
        return _draw_task(rng, others)
    changed = rng.choice([[slot] for slot in task.words] + [list(task.words)] * 2)
    words = {
        slot: rng.choice([w for w in SLOT_WORDS[slot] if w != word]) if slot in changed else word
        for slot, word in task.words.items()
    }
    return Task(task.family, words)


def _render_prompt(rng: random.Random, task: Task) -> str:
    return rng.choice(FAMILIES[task.family].prompts).format(**task.words)


def _row(split: str, index: int, family: str, prompt: str, responses: tuple[str, str], flip: bool) -> dict[str, Any]:
    golds = [gold_reward(prompt, response) for response in responses]
    best = int(golds[1].total > golds[0].total)
    chosen, rejected = (1 - best, best) if flip else (best, 1 - best)
    return {
        "prompt": prompt,
        "chosen": responses[chosen],
        "rejected": responses[rejected],
        "subset": split,
        "id": f"{split}-{index:06d}",
        "family": family,
        "gold_r1_chosen": golds[chosen].prompt_related,
        "gold_r1_rejected": golds[rejected].prompt_related,
        "gold_r2_chosen": golds[chosen].style,
        "gold_r2_rejected": golds[rejected].style,
        "label_flipped": flip,
    }


def make_pairs(config: WorldConfig, split: str, num_pairs: int) -> list[dict[str, Any]]:
    """Preference rows of one split, with gold columns.

    Splits: `train` (bias, twins and label noise as configured); `validation` and `in_distribution` (the same without
    label noise); `bias_reversed` (the response that does what is asked always has fewer filler sentences);
    `adversarial_prompt` (twins only: every two responses come under two prompts with opposite preference, so that a
    reward blind to the prompt has accuracy exactly 0.5); `unseen_family` (unbiased, families that training never saw,
    words that it did).

    Returns:
        Rows with `prompt`, `chosen`, `rejected`, `subset` (the split), `id`, `family`, `gold_r1_chosen`,
        `gold_r1_rejected`, `gold_r2_chosen`, `gold_r2_rejected` and `label_flipped`. A shorter run is a prefix of a
        longer one.
    """
    if split not in SPLITS:
        raise InputError(f"split={split!r} is not one of {', '.join(SPLITS)}.")
    if num_pairs < 1 or (split == "adversarial_prompt" and num_pairs % 2):
        raise InputError(f"num_pairs={num_pairs!r} must be positive, and even for adversarial_prompt (twins).")
    rng = random.Random(f"{config.seed}/{split}")  # seeding by text is stable across Python versions and processes
    like_training = split in ("train", "validation", "in_distribution")
    style_bias = {"bias_reversed": -1.0, "unseen_family": 0.0}.get(split, config.style_bias)
    # A twin event gives two rows and any other event one: this probability makes twins the wanted share of rows.
    twin_probability = config.adversarial_share / (2 - config.adversarial_share)
    equal_probability = config.equal_content_share * (1 + twin_probability)
    families = [f for f in FAMILIES if (f in config.unseen_families) == (split == "unseen_family")]
    rows: list[dict[str, Any]] = []
    while len(rows) < num_pairs:
        event = rng.random()
        twins = split == "adversarial_prompt" or (like_training and event < twin_probability)
        equal = like_training and not twins and event < twin_probability + equal_probability
        task = _draw_task(rng, families)
        other = task if equal else _draw_other_task(rng, task, families, config.off_topic_share)
        few, many = sorted(rng.sample(range(MAX_FILLERS + 1), 2))
        right_is_longer = rng.random() < (1 + style_bias) / 2
        right = _render_response(rng, task, many if right_is_longer else few)
        wrong = _render_response(rng, other, few if right_is_longer else many)
        for asked in [task, other] if twins else [task]:
            prompt = _render_prompt(rng, asked)
            flip = split == "train" and rng.random() < config.label_noise
            if gold_reward(prompt, right).total == gold_reward(prompt, wrong).total:
                continue  # a tie of two styles has no preference
            rows.append(_row(split, len(rows), asked.family, prompt, (right, wrong), flip))
    return rows[:num_pairs]


def sample_prompts(config: WorldConfig, num_prompts: int, seed: int = 0, unseen: bool = False) -> list[str]:
    """Prompts of the training families, or of the unseen ones."""
    rng = random.Random(f"{config.seed}/prompts/{seed}")
    families = [f for f in FAMILIES if (f in config.unseen_families) == unseen]
    return [_render_prompt(rng, _draw_task(rng, families)) for _ in range(num_prompts)]


def sample_responses(prompt: str, num_responses: int, seed: int = 0, word_accuracy: float = 0.6) -> list[str]:
    """Responses of the world's policy to one of its prompts; `gold_reward` scores each of them exactly.

    Each requested word is met with probability `word_accuracy`, and style is drawn independently of that.
    """
    requested = {slot: next(iter(words)) for slot, words in _slot_words(prompt).items()}
    families = [name for name, family in FAMILIES.items() if set(family.slots) == set(requested)]
    if not families:
        raise InputError(f"prompt {prompt!r} is not one of this world. Use a prompt of `sample_prompts`.")
    rng = random.Random(f"responses/{seed}/{prompt}")
    responses = []
    for _ in range(num_responses):
        words = {
            slot: word if rng.random() < word_accuracy else rng.choice([w for w in SLOT_WORDS[slot] if w != word])
            for slot, word in requested.items()
        }
        responses.append(_render_response(rng, Task(families[0], words), rng.randint(0, MAX_FILLERS)))
    return responses
