"""From scored items to a suite's figures: subsets, whole sections, the score, and what is missing for it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inform_rm.eval.suites import scores
from inform_rm.eval.suites.scores import ScoredItem, item_credit
from inform_rm.eval.suites.tables import Section, Suite
from inform_rm.util.intervals import wilson_interval

_NUM_RESAMPLES = 2000


def summarize_suite(
    suite: Suite,
    items: Sequence[ScoredItem],
    ties: str = "wrong",
    seed: int = 0,
    dropped: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """The figures of `inform_rm.eval.suites.report.SuiteResult`; the order of the items does not matter.

    A section is whole if each of its subsets has exactly the published number of items (any, where none is
    published) and none was dropped. Only whole sections have a score, and the suite has one only if all sections that
    make it are whole: nothing is averaged over a part as if it were all.

    Intervals hold 95 %: Wilson's for subsets (wide for marks other than 0 and 1), percentiles of a bootstrap within
    the subsets for sections and score. The formula of Ties has none.

    ``ties`` is that of `item_credit`; ``dropped`` says of subsets how many items were read and not scored.
    """
    groups: dict[str, list[ScoredItem]] = {name: [] for name in suite.subsets}
    for item in items:
        groups[item.subset].append(item)
    credits = {
        name: np.sort([item_credit(item, suite.subsets[name].credit, ties) for item in group])
        for name, group in groups.items()
    }
    dropped = dropped or {}
    lacks = {section.name: _lacks(section, credits, dropped) for section in suite.sections}
    values = {name: float(marks.mean()) for name, marks in credits.items() if len(marks)}
    ties_parts = scores.ties_score(groups["Ties"]) if "Ties" in groups else None
    if ties_parts is not None:
        values["Ties"] = ties_parts["score"]
    elif "Ties" in values:  # items, but no question with both of its parts
        lacks["Ties"].append("no question of Ties has both of its parts")
    sections: dict[str, dict[str, Any]] = {}
    draws: dict[str, NDArray[np.float64]] = {}
    for section in suite.sections:
        name, shares = section.name, _shares(section, credits)
        if lacks[name]:
            continue
        score = np.average([values[part.name] for part in section.subsets], weights=shares)
        num_items = sum(len(credits[part.name]) for part in section.subsets)
        sections[name] = {"score": float(score), "num_items": num_items, "weight": section.weight}
        if name != "Ties":
            draws[name] = _draws(section, shares, credits, seed)
            sections[name]["interval"] = _percentiles(draws[name])

    needed = {section.name: section.weight for section in suite.sections if section.weight}
    missing = [f"{name}: {lack}" for name in needed for lack in lacks[name]]
    result: dict[str, Any] = {"suite": suite.name, "complete": not missing, "score": None}
    if not missing:
        weights = list(needed.values())
        result["score"] = float(np.average([sections[name]["score"] for name in needed], weights=weights))
        if needed.keys() <= draws.keys():
            result["interval"] = _percentiles(np.average([draws[name] for name in needed], axis=0, weights=weights))
    result |= {"missing": missing, "sections": sections, "subsets": _subset_figures(suite, groups, credits, dropped)}
    if ties_parts is not None:
        result["ties"] = ties_parts
    return result | _own_figures(suite, groups, result, lacks)


def _shares(section: Section, credits: dict[str, NDArray[np.float64]]) -> list[float]:
    """The weights of a section's subsets."""
    if section.pooled_items is not None:
        return [float(len(credits[subset.name])) for subset in section.subsets]
    return [subset.share for subset in section.subsets]


def _lacks(section: Section, credits: dict[str, NDArray[np.float64]], dropped: Mapping[str, int]) -> list[str]:
    found = []
    for subset in section.subsets:
        number = len(credits[subset.name])
        read = number + dropped.get(subset.name, 0)
        expected = read if subset.items is None else subset.items
        if number != expected or number == 0:
            found.append(f"{subset.name} {number} of {expected} items" if expected else f"{subset.name} 0 items")
    total = sum(len(credits[subset.name]) for subset in section.subsets)
    if section.pooled_items not in (None, total):
        names = " and ".join(subset.name for subset in section.subsets)
        found.append(f"{names} {total} of {section.pooled_items} items")
    return found


def _draws(
    section: Section, shares: list[float], credits: dict[str, NDArray[np.float64]], seed: int
) -> NDArray[np.float64]:
    """Bootstrap draws of a section's score: items drawn anew within each subset."""
    total = np.zeros(_NUM_RESAMPLES)
    for subset, share in zip(section.subsets, shares, strict=True):
        marks = credits[subset.name]
        # One stream for each subset, so that a subset's draws do not depend on which others there are.
        rng = np.random.default_rng([seed, *subset.name.encode()])
        if np.isin(marks, (0.0, 1.0)).all():
            means = rng.binomial(len(marks), marks.mean(), _NUM_RESAMPLES) / len(marks)  # the same law, at once
        else:
            means = np.array([rng.choice(marks, len(marks)).mean() for _ in range(_NUM_RESAMPLES)])
        total += share * means
    return total / sum(shares)


def _percentiles(draws: NDArray[np.float64]) -> list[float]:
    return [float(value) for value in np.quantile(draws, (0.025, 0.975))]


def _subset_figures(
    suite: Suite, groups: dict[str, list[ScoredItem]], credits: dict[str, Any], dropped: Mapping[str, int]
) -> dict[str, Any]:
    return {
        name: {
            "accuracy": float(marks.mean()),
            "interval": list(wilson_interval(min(float(marks.sum()), len(marks)), len(marks))),
            "num_items": len(marks),
            "published_items": suite.subsets[name].items,
            "num_ties": sum(max(x.rewards[: x.num_correct]) == max(x.rewards[x.num_correct :]) for x in groups[name]),
            "num_dropped": dropped.get(name, 0),
        }
        for name, marks in credits.items()
        if len(marks)
    }


def _own_figures(
    suite: Suite, groups: dict[str, list[ScoredItem]], result: dict[str, Any], lacks: dict[str, list[str]]
) -> dict[str, Any]:
    """What only this suite has, but for Ties."""
    sections = result["sections"]
    if suite.name == "rewardbench":
        prior, with_prior = sections.get("Prior Sets"), None
        if prior is not None and result["complete"]:
            four = [sections[section.name]["score"] for section in suite.sections[:-1]]
            with_prior = scores.score_with_prior_sets(four, prior["score"])
        return {"score_with_prior_sets": with_prior, "prior_sets_missing": lacks["Prior Sets"]}
    if suite.name == "rm-bench":
        domains = {}
        for section in suite.sections:
            if section.name in sections:
                pooled = [item for subset in section.subsets for item in groups[subset.name]]
                matrix = np.mean([scores.style_matrix(item.rewards) for item in pooled], axis=0)
                domains[section.name] = {**scores.style_difficulties(matrix), "matrix": matrix.tolist()}
        styles: dict[str, Any] = {"domains": domains}
        if result["complete"]:
            for kind in ("hard", "normal", "easy"):
                styles[kind] = float(np.mean([domain[kind] for domain in domains.values()]))
        return {"styles": styles}
    if suite.name == "prompt-swap":
        marks = {item.id: item_credit(item, "strict") for group in groups.values() for item in group}
        right, number = scores.both_twins_right(marks)
        if number:
            interval = list(wilson_interval(right, number))
            return {"twins": {"both_right": right / number, "interval": interval, "num_twins": number}}
    return {}
