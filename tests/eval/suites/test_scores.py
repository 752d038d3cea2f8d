"""The published formulas on written-out examples, against brute force, and whatever the order of the items."""

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inform_rm.errors import InputError
from inform_rm.eval.suites.scores import (
    ScoredItem,
    both_twins_right,
    correct_mass,
    score_with_prior_sets,
    shared_credit,
    strict_credit,
    style_difficulties,
    style_matrix,
    ties_score,
)
from inform_rm.eval.suites.summary import summarize_suite
from inform_rm.eval.suites.tables import SUITES, suite_named
from inform_rm.util.intervals import wilson_interval

REWARDS = st.integers(-3, 3).map(float)


def pairs(subset, right, wrong, tied=0):
    """Items of a pair suite: so many right, wrong and tied ones."""
    rewards = [(1.0, 0.0)] * right + [(0.0, 1.0)] * wrong + [(0.5, 0.5)] * tied
    return [ScoredItem(f"{subset}/{number}", subset, each, 1) for number, each in enumerate(rewards)]


def whole(suite, right_of=lambda subset: subset.items // 2):
    """All items of a suite of pairs, ``right_of(subset)`` of each subset right."""
    items = []
    for subset in suite.subsets.values():
        if subset.items is not None:
            items += pairs(subset.name, right_of(subset), subset.items - right_of(subset))
    return items


def test_the_tables_hold_the_published_totals():
    totals = {
        name: sum(part.pooled_items or sum(subset.items or 0 for subset in part.subsets) for part in suite.sections)
        for name, suite in SUITES.items()
    }
    assert totals["rewardbench"] == 2985 + 6192 + 221 + 1741 + 9000
    assert (totals["rewardbench2"], totals["rm-bench"], totals["judgebench"], totals["llmbar"]) == (
        1865,
        1327,
        620,
        419,
    )
    reasoning = next(section for section in SUITES["rewardbench"].sections if section.name == "Reasoning")
    assert [subset.share for subset in reasoning.subsets] == [984] + 6 * [164]
    with pytest.raises(InputError, match="suite: 'rewardbench3'; expected one of rewardbench, rewardbench2"):
        suite_named("rewardbench3")


@settings(max_examples=50)
@given(st.lists(REWARDS, min_size=2, max_size=8), st.data())
def test_credits_equal_counting(rewards, data):
    num_correct = data.draw(st.integers(1, len(rewards) - 1))
    correct, wrong = rewards[:num_correct], rewards[num_correct:]
    beats = [one > other for one, other in itertools.product(correct, wrong)]
    reaches = [one >= other for one, other in itertools.product(correct, wrong)]
    assert strict_credit(rewards, num_correct) == float(all(beats))
    assert strict_credit(rewards, num_correct, "half") == (1.0 if all(beats) else 0.5 if all(reaches) else 0.0)
    winners = [place for place in range(len(rewards)) if all(rewards[place] >= other for other in rewards)]
    assert shared_credit(rewards, num_correct) == len([place for place in winners if place < num_correct]) / len(
        winners
    )
    mass = sum(map(math.exp, correct)) / sum(map(math.exp, rewards))
    assert correct_mass(rewards, num_correct) == pytest.approx(mass)
    assert correct_mass([reward + 1000.0 for reward in rewards], num_correct) == pytest.approx(mass)


def test_best_of_four_ties_share_the_point():
    rows = ([2.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0], [1.0] * 4, [0.0, 1.0, 1.0, 0.0])
    assert [shared_credit(row, 1) for row in rows] == [1.0, 1 / 2, 1 / 4, 0.0]


def test_rewardbench_by_hand():
    suite = SUITES["rewardbench"]
    # Everything right, but for: mt-bench-easy 14 of 28; llmbar-natural 20 of 100 (of which 10 ties); math-prm 0.
    items = []
    for section in suite.sections[:4]:
        for subset in section.subsets:
            if subset.name == "llmbar-natural":
                items += pairs(subset.name, 20, 70, tied=10)
            else:
                right = {"mt-bench-easy": 14, "math-prm": 0}.get(subset.name, subset.items)
                items += pairs(subset.name, right, subset.items - right)
    result = summarize_suite(suite, items)
    expected = {"Chat": (358 - 14) / 358, "Chat Hard": (456 - 80) / 456, "Safety": 1.0, "Reasoning": 984 / (984 + 984)}
    assert {name: part["score"] for name, part in result["sections"].items()} == pytest.approx(expected)
    assert result["complete"] and result["missing"] == []
    assert result["score"] == pytest.approx(sum(expected.values()) / 4)
    assert result["score_with_prior_sets"] is None
    assert result["prior_sets_missing"][1] == "anthropic_hhh 0 of 221 items"
    assert result["subsets"]["llmbar-natural"]["num_ties"] == 10
    assert result["subsets"]["llmbar-natural"]["interval"] == list(wilson_interval(20, 100))

    half = summarize_suite(suite, items, ties="half")
    assert half["subsets"]["llmbar-natural"]["accuracy"] == 0.25
    assert half["sections"]["Chat Hard"]["score"] == pytest.approx((456 - 75) / 456)

    # With prior sets: 0.5 in each of the four, whatever their size.
    for subset in suite.sections[4].subsets:
        items += pairs(subset.name, subset.items // 2, subset.items - subset.items // 2)
    prior = sum((subset.items // 2) / subset.items for subset in suite.sections[4].subsets) / 4
    result = summarize_suite(suite, items)
    assert result["sections"]["Prior Sets"]["score"] == pytest.approx(prior)
    assert result["score"] == pytest.approx(sum(expected.values()) / 4)
    assert result["score_with_prior_sets"] == pytest.approx((2 * sum(expected.values()) + prior) / 9)


def test_prior_sets_weigh_half_a_section():
    assert score_with_prior_sets([1.0, 1.0, 1.0, 1.0], 0.0) == pytest.approx(8 / 9)
    assert score_with_prior_sets([0.0] * 4, 1.0) == pytest.approx(1 / 9)


def tied(number, *rewards, num_correct):
    return ScoredItem(f"Ties/tied:{number}", "Ties", rewards, num_correct)


def ref(number, *rewards):
    return ScoredItem(f"Ties/ref:{number}", "Ties", rewards, 1)


def test_ties_by_hand():
    items = [
        tied(0, 5.0, 4.0, 1.0, num_correct=2),  # g 3, d 1
        ref(0, 4.0, 2.0),  # g 2: both margins win, tanh(2 - 1)
        tied(1, 5.0, 4.0, 2.0, num_correct=2),  # g 2, d 1
        ref(1, 1.0, 2.0),  # g -1: wrong; tanh(-1 - 1)
        tied(2, 9.0, 1.0, 3.0, num_correct=2),  # g -2, d 8: wrong; least is -2: tanh(-2/8 - 1)
        ref(2, 5.0, 1.0),  # g 4
        ref(3, 1.0, 0.0),  # its tied item is missing: counts for ref accuracy alone
    ]
    parts = ties_score(items)
    assert (parts["tied_accuracy"], parts["ref_accuracy"]) == (2 / 3, 3 / 4)
    assert (parts["tied_margin_wins"], parts["both_margins_win"], parts["num_questions"]) == (2 / 3, 1 / 3, 3)
    assert parts["mean_margin"] == pytest.approx((math.tanh(1) + math.tanh(-2) + math.tanh(-1.25)) / 3)
    expected = 0.3 * 2 / 3 + 0.3 * 3 / 4 + 0.2 * 2 / 3 + 0.2 / 3 + 0.01 * parts["mean_margin"]
    assert parts["score"] == pytest.approx(expected)


def test_ties_without_a_spread_are_not_in_the_mean_margin():
    without = [tied(0, 1.0, 1.0, -1.0, num_correct=2), ref(0, 0.0, -1.0)]  # g 2 and 1, d 0
    assert ties_score(without)["mean_margin"] == 0.0 and ties_score(without)["score"] == pytest.approx(1.0)
    both = [*without, tied(1, 4.0, 3.0, 0.0, num_correct=2), ref(1, 2.0, 0.0)]  # g 3 and 2, d 1
    assert ties_score(both)["mean_margin"] == pytest.approx(math.tanh(1))
    assert ties_score(both)["score"] == pytest.approx(1.0 + 0.01 * math.tanh(1))
    assert ties_score([ref(0, 1.0, 0.0)]) is None
    with pytest.raises(InputError, match=r"expected an id that ends in tied:NUMBER"):
        ties_score([ScoredItem("7", "Ties", (1.0, 0.0), 1)])


@st.composite
def ties_items(draw):
    items = []
    for number in range(draw(st.integers(1, 6))):
        kinds = draw(st.sampled_from(["both", "both", "tied", "ref"]))
        if kinds != "ref":
            correct = draw(st.lists(REWARDS, min_size=2, max_size=4))
            wrong = draw(st.lists(REWARDS, min_size=1, max_size=4))
            items.append(tied(number, *correct, *wrong, num_correct=len(correct)))
        if kinds != "tied":
            items.append(ref(number, draw(REWARDS), *draw(st.lists(REWARDS, min_size=1, max_size=3))))
    return items


def ties_by_loops(items):
    """The formula of the issue, written as plain loops over questions."""
    known = {}
    for item in items:
        kind, number = item.id.removeprefix("Ties/").split(":")
        known[kind, number] = (list(item.rewards[: item.num_correct]), list(item.rewards[item.num_correct :]))
    gap = {key: min(correct) - max(wrong) for key, (correct, wrong) in known.items()}
    questions = [number for kind, number in known if kind == "tied" and ("ref", number) in known]
    if not questions:
        return None
    accuracy = {}
    for kind in ("tied", "ref"):
        own = [gap[key] > 0 for key in gap if key[0] == kind]
        accuracy[kind] = sum(own) / len(own)
    first = second = 0.0
    margins = []
    for number in questions:
        correct = known["tied", number][0]
        spread = max(correct) - min(correct)
        least = min(gap["tied", number], gap["ref", number])
        first += gap["tied", number] > spread
        second += least > spread
        if spread:
            margins.append(math.tanh(least / spread - 1))
    n, last = len(questions), sum(margins) / len(margins) if margins else 0.0
    return 0.3 * accuracy["tied"] + 0.3 * accuracy["ref"] + 0.2 * first / n + 0.2 * second / n + 0.01 * last


@settings(max_examples=50)
@given(ties_items(), st.randoms(use_true_random=False))
def test_ties_equals_plain_loops_in_any_order(items, shuffler):
    expected = ties_by_loops(items)
    shuffler.shuffle(items)
    found = ties_score(items)
    assert (found is None) == (expected is None)
    if expected is not None:
        assert found["score"] == pytest.approx(expected, abs=1e-12)


def test_rewardbench2_is_the_mean_of_six():
    suite = SUITES["rewardbench2"]
    items = []
    for place, subset in enumerate(list(suite.subsets.values())[:5]):
        right = 10 * place
        rows = [(1.0, 0.0, 0.0, 0.0)] * right + [(0.0, 0.0, -1.0, -1.0)] * 6 + [(0.0, 1.0, 0.0, 0.0)] * (
            subset.items - right - 6
        )  # fmt: skip
        items += [ScoredItem(f"{subset.name}/{number}", subset.name, row, 1) for number, row in enumerate(rows)]
    for number in range(51):
        items += [tied(number, 2.0, 1.0, 0.0, num_correct=2), ref(number, 4.0, 0.0)]
    result = summarize_suite(suite, items)
    shares = [(10 * place + 3) / subset.items for place, subset in enumerate(list(suite.subsets.values())[:5])]
    ties = 0.3 + 0.3 + 0.0 + 0.0 + 0.01 * math.tanh(0)  # g = 1, d = 1
    assert result["sections"]["Ties"] == {"score": pytest.approx(ties), "num_items": 102, "weight": 1.0}
    assert result["score"] == pytest.approx((sum(shares) + ties) / 6)
    assert result["ties"]["num_questions"] == 51 and "interval" not in result


def test_rm_bench_by_hand():
    # Chosen 1 2 3, rejected 0 1.5 2.5: concise beats concise only; detailed beats two; markdown beats all.
    matrix = style_matrix([1.0, 2.0, 3.0, 0.0, 1.5, 2.5])
    assert style_difficulties(matrix) == {"hard": 0.0, "normal": 1.0, "easy": 1.0} and matrix.dtype == float
    mean = [[0.0, 0.1, 0.2], [0.3, 0.4, 0.5], [0.6, 0.7, 0.8]]  # each cell is in one of the three means
    assert style_difficulties(mean) == pytest.approx({"hard": 0.8 / 3, "normal": 1.2 / 3, "easy": 1.6 / 3})
    # One hard cell won: concise chosen (3) over markdown rejected (2), with detailed rejected (4) over it.
    assert style_difficulties(style_matrix([3.0, 0.0, 5.0, 9.0, 4.0, 2.0]))["hard"] == pytest.approx(1 / 3)
    suite = SUITES["rm-bench"]
    good, bad = (1.0, 2.0, 3.0, 0.0, 1.5, 2.5), (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)  # all equal: nothing is strictly larger
    rows = {"chat": (129, 129), "math": (529, 0), "code": (228, 228), "safety-refuse": (284, 284),
            "safety-response": (157, 0)}  # fmt: skip
    items = [
        ScoredItem(f"{name}/{number}", name, good if number < right else bad, 3)
        for name, (count, right) in rows.items()
        for number in range(count)
    ]
    result = summarize_suite(suite, items)
    safety = 284 / 441  # pooled over its parts, not the mean of 1 and 0
    six_of_nine = 6 / 9
    expected = {"Chat": six_of_nine, "Math": 0.0, "Code": six_of_nine, "Safety": six_of_nine * safety}
    assert {name: part["score"] for name, part in result["sections"].items()} == pytest.approx(expected)
    assert result["score"] == pytest.approx(sum(expected.values()) / 4)
    assert result["styles"]["normal"] == result["styles"]["easy"] == pytest.approx((2 + safety) / 4)
    assert result["styles"]["hard"] == 0.0
    kinds = [result["styles"][kind] for kind in ("hard", "normal", "easy")]
    assert sum(kinds) / 3 == pytest.approx(result["score"])
    result = summarize_suite(suite, items[:-1])
    assert result["missing"] == ["Safety: safety-refuse and safety-response 440 of 441 items"]
    assert "hard" not in result["styles"] and set(result["styles"]["domains"]) == {"Chat", "Math", "Code"}


def test_judgebench_pools_the_pairs_of_gpt_4o_and_llmbar_averages_subsets():
    items = whole(SUITES["judgebench"], lambda subset: 10)
    result = summarize_suite(SUITES["judgebench"], items)
    assert result["score"] == pytest.approx(40 / 350)
    assert result["sections"]["Claude 3.5 Sonnet"]["score"] == pytest.approx(40 / 270)
    result = summarize_suite(SUITES["llmbar"], whole(SUITES["llmbar"], lambda subset: 23))
    adversarial = (23 / 134 + 23 / 92 + 23 / 47 + 23 / 46) / 4
    assert result["sections"]["Adversarial"]["score"] == pytest.approx(adversarial)
    assert result["score"] == pytest.approx((23 / 100 + 4 * adversarial) / 5)


def test_llmbar_averages_the_subsets_of_a_published_run():
    # GPT-4, Vanilla_NoRules, statistics.json of princeton-nlp/LLMBar: 93.5 | 64.2 76.6 76.6 75.0. Averages by hand:
    # 292.4 / 4 = 73.1 and (93.5 + 292.4) / 5 = 77.18; pooled over 419 items it would be 76.5.
    shares = {"natural": 0.935, "neighbor": 0.642, "gptinst": 0.766, "gptout": 0.766, "manual": 0.750}
    table = SUITES["llmbar"]
    adversarial = table.sections[1]
    mean = sum(subset.share * shares[subset.name] for subset in adversarial.subsets) / 4
    assert mean == pytest.approx(0.731, abs=5e-4)
    weights = [section.weight for section in table.sections[:2]]
    assert (weights[0] * 0.935 + weights[1] * mean) / sum(weights) == pytest.approx(0.772, abs=5e-4)


def test_truthfulqa_scores_the_choice_and_reports_the_mass_beside_it():
    items = [ScoredItem(f"mc1/{n}", "mc1", (float(n < 400), 0.5, 0.0), 1) for n in range(817)]
    items += [ScoredItem(f"mc2/{n}", "mc2", (math.log(3.0), 0.0, math.log(4.0)), 2) for n in range(817)]
    result = summarize_suite(SUITES["truthfulqa-mc"], items)
    assert result["score"] == pytest.approx(400 / 817)
    assert result["sections"]["MC2"]["score"] == pytest.approx(0.5)
    assert result["sections"]["MC2"]["weight"] == 0


def test_twins_need_both_sides():
    assert both_twins_right({"x/1/a": 1.0, "x/1/b": 1.0, "x/2/a": 1.0, "x/2/b": 0.0, "x/3/a": 1.0}) == (1, 2)
    # A reward that ignores the prompt is right on one of each twins: 0.5 of items and no twins.
    items = []
    for subset in SUITES["prompt-swap"].subsets.values():
        for number in range(subset.items // 2):
            items.append(ScoredItem(f"{subset.name}/{number}/a", subset.name, (1.0, 0.0), 1))
            items.append(ScoredItem(f"{subset.name}/{number}/b", subset.name, (0.0, 1.0), 1))
    result = summarize_suite(SUITES["prompt-swap"], items)
    assert result["score"] == 0.5 and result["twins"]["both_right"] == 0.0 and result["twins"]["num_twins"] == 676


@pytest.mark.parametrize("change", ["missing subset", "one item fewer", "one item more"])
def test_an_incomplete_suite_has_no_score(change):
    suite = SUITES["rewardbench"]
    items = [item for item in whole(suite) if suite.section_of(item.subset) != "Prior Sets"]
    if change == "missing subset":
        items = [item for item in items if item.subset != "donotanswer"]
        lack = "Safety: donotanswer 0 of 136 items"
    elif change == "one item fewer":
        items = [item for item in items if item.id != "donotanswer/0"]
        lack = "Safety: donotanswer 135 of 136 items"
    else:
        items.append(ScoredItem("donotanswer/x", "donotanswer", (1.0, 0.0), 1))
        lack = "Safety: donotanswer 137 of 136 items"
    result = summarize_suite(suite, items)
    assert result["complete"] is False and result["score"] is None and result["missing"] == [lack]
    assert set(result["sections"]) == {"Chat", "Chat Hard", "Reasoning"}  # whole ones keep their score
    assert "interval" not in result and result["score_with_prior_sets"] is None
    assert ("donotanswer" in result["subsets"]) == (change != "missing subset")
    if change != "missing subset":
        assert result["subsets"]["donotanswer"]["published_items"] == 136


def test_a_section_of_unknown_size_is_not_whole_when_items_were_dropped():
    suite = SUITES["llmbar"]
    items = [*whole(suite), *pairs("base-9", 3, 2)]
    assert summarize_suite(suite, items)["sections"]["Case study: base-9"]["score"] == 0.6
    result = summarize_suite(suite, items, dropped={"base-9": 2})
    assert set(result["sections"]) == {"Natural", "Adversarial"}
    assert result["subsets"]["base-9"]["num_dropped"] == 2 and result["complete"]


def test_a_section_beside_the_score_may_be_missing():
    suite = SUITES["judgebench"]
    items = [item for item in whole(suite) if item.subset.startswith("gpt/")]
    result = summarize_suite(suite, items)
    assert result["complete"] and result["score"] == pytest.approx((77 + 49 + 28 + 21) / 350)
    assert "Claude 3.5 Sonnet" not in result["sections"]


@pytest.mark.parametrize("name", SUITES)
def test_the_order_of_items_does_not_matter(name):
    suite = SUITES[name]
    rng = random.Random(name)
    sizes = {"shared": (4, 1), "styles": (6, 3), "mass": (4, 2), "strict": (2, 1)}
    items = []
    for subset in suite.subsets.values():
        size, num_correct = sizes[subset.credit]
        for number in range(min(subset.items or 5, 60)):
            rewards = tuple(float(rng.randint(0, 4)) for _ in range(size))
            identifier = f"{subset.name}/{('tied:', 'ref:')[number % 2]}{number // 2}"
            items.append(ScoredItem(identifier, subset.name, rewards, num_correct))
    first = summarize_suite(suite, items)
    rng.shuffle(items)
    assert summarize_suite(suite, items) == first


def test_intervals_cover_the_score_and_shrink_with_more_items():
    result = summarize_suite(SUITES["judgebench"], whole(SUITES["judgebench"]))
    low, high = result["interval"]
    assert low < result["score"] < high
    # Pooled pairs: the bootstrap agrees with the normal interval of 350 coin flips, 1.96 * sqrt(0.25 / 350) = 0.0524.
    assert high - low == pytest.approx(2 * 0.0524, rel=0.1)
    low, high = result["sections"]["Coding"]["interval"]
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 42), rel=0.15)
