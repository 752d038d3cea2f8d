"""The benchmark suites that people quote, as tables: sections, subsets, published counts, weights, sources.

How credits become scores is in `scores`, how rows become items in `items`. A subset's ``items`` is the number
that the source publishes; with another number of items a section has no score. The sources were read in November 2026;
only facts were taken from them.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from inform_rm.errors import InputError


@dataclass(frozen=True)
class Subset:
    """One subset.

    Attributes:
        name: as the source calls it.
        items: how many the source publishes, if it says so.
        weight: share in its section, relative to the others; by default ``items``.
        credit: how one item is marked, see `scores.item_credit`.
    """

    name: str
    items: int | None
    weight: float | None = None
    credit: str = "strict"

    @property
    def share(self) -> float:
        """Its weight in the section."""
        return float(self.weight if self.weight is not None else self.items or 1)


@dataclass(frozen=True)
class Section:
    """Subsets whose values are averaged by their weights.

    Attributes:
        name: as the source calls it.
        subsets: its parts.
        weight: its own in the suite's score; with 0 it is reported beside the score.
        pooled_items: the number of items, where the source gives it for all parts together: they count as one.
    """

    name: str
    subsets: tuple[Subset, ...]
    weight: float = 1.0
    pooled_items: int | None = None


@dataclass(frozen=True)
class HubSource:
    """Where a suite lies on the Hub; ``subset`` is that of every row, where the rows do not say it."""

    hub_id: str
    split: str
    config: str | None = None
    data_dir: str | None = None
    subset: str | None = None
    by_default: bool = True


@dataclass(frozen=True)
class Suite:
    """One suite; ``name`` is that of the command line, ``title`` is for people.

    Attributes:
        citation: paper and repository of data and aggregation.
        rule: the aggregation in one or two sentences, for the report.
        sections: their weights make the score.
        layouts: the row layouts that it takes, as `items` calls them.
        hub: its data sets; empty where only files can be given.
        aliases: other names of its subsets, in local files and folders.
    """

    name: str
    title: str
    citation: str
    rule: str
    sections: tuple[Section, ...]
    layouts: tuple[str, ...]
    hub: tuple[HubSource, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()

    @cached_property
    def subsets(self) -> dict[str, Subset]:
        """All its subsets by name."""
        return {subset.name: subset for section in self.sections for subset in section.subsets}

    @cached_property
    def subset_names(self) -> dict[str, str]:
        """What a subset may be called in data, in small letters, to its name."""
        return {alias.lower(): name for alias, name in (*((name, name) for name in self.subsets), *self.aliases)}

    @property
    def on_hub(self) -> list[dict[str, Any]] | None:
        """The parts of its own data set on the Hub, if there is one."""
        parts = [part for part in self.hub if part.by_default]
        return [{"id": part.hub_id, "config": part.config, "split": part.split} for part in parts] or None

    def section_of(self, subset: str) -> str:
        """The name of the section that a subset belongs to."""
        return next(part.name for part in self.sections if subset in (inner.name for inner in part.subsets))


def _subsets(credit: str = "strict", **items: int) -> tuple[Subset, ...]:
    return tuple(Subset(name.replace("_", "-"), number, credit=credit) for name, number in items.items())


_REWARDBENCH = Suite(
    name="rewardbench",
    title="RewardBench",
    citation="arXiv:2403.13787; github.com/allenai/reward-bench; prior sets: allenai/preference-test-sets",
    rule="An item is right if the chosen response has the strictly larger reward. A section is the mean of its "
    "subsets weighted by their published counts, math-prm as 984; the score is the mean of the four sections. With "
    "prior sets it is (2 x the four sections + their mean) / 9.",
    sections=(
        Section("Chat", _subsets(alpacaeval_easy=100, alpacaeval_length=95, alpacaeval_hard=95, mt_bench_easy=28,
                                 mt_bench_med=40)),
        Section("Chat Hard", _subsets(mt_bench_hard=37, llmbar_natural=100, llmbar_adver_neighbor=134,
                                      llmbar_adver_GPTInst=92, llmbar_adver_GPTOut=47, llmbar_adver_manual=46)),
        # reward-bench's table once had the two xstest counts swapped (commit 318d282); the data has these.
        Section("Safety", _subsets(refusals_dangerous=100, refusals_offensive=100, xstest_should_refuse=154,
                                   xstest_should_respond=250, donotanswer=136)),
        # 447 items weigh as much as the 6 x 164 of code.
        Section("Reasoning", (Subset("math-prm", 447, weight=984),
                              *_subsets(hep_cpp=164, hep_go=164, hep_java=164, hep_js=164, hep_python=164,
                                        hep_rust=164))),
        Section("Prior Sets", tuple(Subset(name, items, weight=1) for name, items in (
            ("anthropic_helpful", 6192), ("anthropic_hhh", 221), ("shp", 1741), ("summarize", 9000))), weight=0),
    ),
    layouts=("pair",),
    hub=(
        HubSource("allenai/reward-bench", "filtered"),
        *(HubSource("allenai/preference-test-sets", name, subset=name, by_default=False)
          for name in ("anthropic_helpful", "anthropic_hhh", "shp", "summarize")),
    ),
    aliases=tuple((f"hhh-{part}", "anthropic_hhh") for part in ("helpful", "honest", "harmless", "other")),
)  # fmt: skip

_REWARDBENCH2 = Suite(
    name="rewardbench2",
    title="RewardBench 2",
    citation="arXiv:2506.01937; github.com/allenai/reward-bench",
    rule="Best of 4: an item gives 1/k if the chosen response is among the k largest rewards. Ties is scored by the "
    "formula of docs/reference/suites.md. The score is the mean of the six.",
    sections=tuple(
        Section(name, (Subset(name, items, credit="strict" if name == "Ties" else "shared"),))
        for name, items in (("Factuality", 475), ("Precise IF", 160), ("Math", 183), ("Safety", 450), ("Focus", 495),
                            ("Ties", 102))
    ),
    layouts=("lists",),
    hub=(HubSource("allenai/reward-bench-2", "test"),),
)  # fmt: skip

_RM_BENCH = Suite(
    name="rm-bench",
    title="RM-Bench",
    citation="arXiv:2410.16184; github.com/THU-KEG/RM-Bench",
    rule="Each of three chosen styles against each of three rejected ones, right if strictly larger: an item gives "
    "its share of nine. Hard, normal and easy are the cells above, on and below the diagonal (rows: chosen, columns: "
    "rejected; concise, detailed, markdown). Safety pools its two parts; every figure is the mean of the domains.",
    sections=(
        Section("Chat", _subsets("styles", chat=129)),
        Section("Math", _subsets("styles", math=529)),
        Section("Code", _subsets("styles", code=228)),
        Section("Safety", tuple(Subset(name, None, credit="styles") for name in ("safety-refuse", "safety-response")),
                pooled_items=441),
    ),
    layouts=("styles",),
    hub=(HubSource("THU-KEG/RM-Bench", "train"),),
    aliases=tuple((f"{name}_filtered", name) for name in ("chat", "math", "code", "safety-refuse", "safety-response")),
)  # fmt: skip

_JUDGEBENCH = Suite(
    name="judgebench",
    title="JudgeBench",
    citation="arXiv:2410.12784; github.com/ScalerLab/JudgeBench",
    rule="An item is right if the better response has the strictly larger reward. The score is the share of the 350 "
    "pairs of GPT-4o, as published; the 270 pairs of Claude 3.5 Sonnet stand beside it.",
    sections=(
        *(Section(name, (Subset(f"gpt/{name.lower()}", items),), weight=items)
          for name, items in (("Knowledge", 154), ("Reasoning", 98), ("Math", 56), ("Coding", 42))),
        Section("Claude 3.5 Sonnet", tuple(Subset(f"claude/{name}", items) for name, items in (
            ("knowledge", 154), ("reasoning", 51), ("math", 34), ("coding", 31))), weight=0),
    ),
    layouts=("judge", "judge pair"),
    hub=(HubSource("ScalerLab/JudgeBench", "gpt"), HubSource("ScalerLab/JudgeBench", "claude")),
)  # fmt: skip

_LLMBAR = Suite(
    name="llmbar",
    title="LLMBar",
    citation="arXiv:2310.07641; github.com/princeton-nlp/LLMBar",
    rule="An item is right if the better output has the strictly larger reward. Adversarial is the mean of its four "
    "subsets, the score the mean of the five subsets. The case studies stand beside it.",
    sections=(
        Section("Natural", _subsets(natural=100)),
        Section("Adversarial", tuple(Subset(name, items, weight=1) for name, items in (
            ("neighbor", 134), ("gptinst", 92), ("gptout", 47), ("manual", 46))), weight=4),
        *(Section(f"Case study: {name}", (Subset(name, None),), weight=0)
          for name in ("constraint", "negation", "normal", "base-9", "base-10")),
    ),
    layouts=("llmbar", "pair"),
    aliases=(
        ("llmbar-natural", "natural"), ("llmbar-adver-neighbor", "neighbor"), ("llmbar-adver-gptinst", "gptinst"),
        ("llmbar-adver-gptout", "gptout"), ("llmbar-adver-manual", "manual"), ("case-constraint", "constraint"),
        ("case-base9", "base-9"), ("case-base10", "base-10"), ("base_9", "base-9"), ("base_10", "base-10"),
    ),
)  # fmt: skip

_HH = Suite(
    name="hh",
    title="Anthropic HH and AlpacaEval pairs",
    citation="arXiv:2204.05862; Anthropic/hh-rlhf; table 3 of arXiv:2402.09345",
    rule="An item is right if the preferred reply has the strictly larger reward. Table 3 of arXiv:2402.09345 quotes "
    "each section by itself; the score here is the mean of helpful and harmless.",
    sections=(
        Section("Helpful", _subsets(helpful_base=2354)),
        Section("Harmless", _subsets(harmless_base=2312)),
        Section("AlpacaEval", (Subset("alpacaeval", None),), weight=0),
    ),
    layouts=("alpacaeval", "pair"),
    hub=tuple(
        HubSource("Anthropic/hh-rlhf", "test", data_dir=name, subset=name)
        for name in ("helpful-base", "harmless-base")
    ),
)

_TRUTHFULQA = Suite(
    name="truthfulqa-mc",
    title="TruthfulQA, multiple choice",
    citation="arXiv:2109.07958; github.com/sylinrl/TruthfulQA; table 3 of arXiv:2402.09345",
    rule="MC1: right if the one true answer has the strictly largest reward. MC2: the share of the true answers in "
    "softmax(rewards), rewards taking the place of log-probabilities; it changes with the scale of the reward. The "
    "score is MC1.",
    sections=(
        Section("MC1", (Subset("mc1", 817),)),
        Section("MC2", (Subset("mc2", 817, credit="mass"),), weight=0),
        Section("Pairs", (Subset("truthfulqa-best", None), Subset("truthfulqa-other", None)), weight=0),
    ),
    layouts=("choices", "pair"),
    hub=(HubSource("truthfulqa/truthful_qa", "validation", config="multiple_choice"),),
)

_PROMPT_SWAP = Suite(
    name="prompt-swap",
    title="Prompt-swap twins",
    citation="made for this project from truthfulqa, piqa, gsm8k, hh-rlhf and UKPConvArg1",
    rule="The same two replies under two prompts with opposite preference, similar in length. An item is right if the "
    "preferred reply has the strictly larger reward; the score is the share of all items. A reward that ignores the "
    "prompt gets at most half of the items and not one pair of twins.",
    sections=(
        Section("All items", _subsets(swap_truthfulqa=208, swap_piqa=476, swap_gsm8k=400, swap_ukp_stance=178,
                                      swap_hh_helpful=90)),
    ),
    layouts=("pair",),
)  # fmt: skip

SUITES = {
    suite.name: suite
    for suite in (
        _REWARDBENCH, _REWARDBENCH2, _RM_BENCH, _JUDGEBENCH, _LLMBAR, _HH, _TRUTHFULQA, _PROMPT_SWAP,
    )
}  # fmt: skip


def suite_named(name: str) -> Suite:
    """The suite of that name; `InputError` if there is none."""
    if name not in SUITES:
        raise InputError(f"suite: {name!r}; expected one of {', '.join(SUITES)}.")
    return SUITES[name]
