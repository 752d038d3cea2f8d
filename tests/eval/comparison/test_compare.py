"""`compare` on written folders whose every figure follows by counting; refusals; exit codes; the page in a browser."""

import itertools
import json
import math
import shutil
import subprocess

import numpy as np
import pytest

from inform_rm import RewardScorer, compare, evaluate
from inform_rm.cli import main
from inform_rm.errors import InputError
from inform_rm.eval.comparison.paired import length_controlled_accuracy, length_scale, mcnemar_test, paired_bootstrap
from inform_rm.eval.comparison.result_rows import matched, read_result_rows
from inform_rm.util.intervals import wilson_interval

FINGERPRINT = "f" * 64


def write_pairs(folder, margins, *, fingerprint=FINGERPRINT, ids=None, subsets="abc"):
    """A folder as `evaluate --data` leaves it: row i has margin ``margins[i]`` and subset i modulo their number."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for row, margin in enumerate(margins):
        subset = subsets[row % len(subsets)]
        line = {"source": "data.jsonl", "id": ids[row] if ids else f"row-{row}", "subset": subset}
        line |= {"chosen_characters": 40 + (7 * row) % 90, "rejected_characters": 60 + (11 * row) % 50}
        lines.append({**line, "chosen_reward": 1.0 + margin, "rejected_reward": 1.0})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    credits = [0.5 + 0.5 * np.sign(margin) for margin in margins]
    parts = {name: credits[place :: len(subsets)] for place, name in enumerate(subsets)}
    result = {
        "model": f"models/{folder.name}", "model_fingerprint": "a" * 64, "settings": {"max_length": 64}, "seed": 0,
        "num_pairs": len(lines), "accuracy": float(np.mean(credits)), "accuracy_interval": [0, 1], "calibration": {},
        "subsets": {name: {"accuracy": float(np.mean(part))} for name, part in parts.items() if part},
        "data": [{"source": "data.jsonl", "fingerprint": fingerprint}],
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def write_suite(folder, credits, *, complete=True, score=0.75, suite="rewardbench"):
    """A folder as `evaluate --suite` leaves it: pairs in sections Chat and Safety, best of 4 in Ties."""
    folder.mkdir(parents=True, exist_ok=True)
    sections = ("Chat", "Safety", "Ties")
    lines = []
    for row, credit in enumerate(credits):
        others = 3 if row % 3 == 2 else 1
        lines.append(
            {
                "id": str(row), "subset": f"subset-{row % 3}", "section": sections[row % 3],
                "rewards": [float(credit), *([0.5] * others)], "num_correct": 1,
                "characters": [30 + row, *([35] * others)], "credit": credit,
            }
        )  # fmt: skip
    (folder / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = {name: {"score": 0.5 + place / 10} for place, name in enumerate(sections)}
    if not complete:
        del found["Safety"]
    result = {
        "suite": suite, "complete": complete, "score": score if complete else None, "sections": found,
        "subsets": {}, "model": "m", "data": [{"source": "x", "fingerprint": FINGERPRINT}],
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def random_margins(seed, number=60):
    return np.random.default_rng(seed).choice([-2.0, -0.5, 0.0, 1.0, 3.0], number).tolist()


@pytest.fixture
def folders(tmp_path):
    return {
        name: write_pairs(tmp_path / name, random_margins(seed)) for seed, name in enumerate(("one", "two", "six"))
    }


def shuffled(folder):
    lines = (folder / "pairs.jsonl").read_text().splitlines(keepends=True)
    np.random.default_rng(0).shuffle(lines)
    (folder / "pairs.jsonl").write_text("".join(lines))


# --- figures


def test_figures_are_those_of_the_rows_of_each_group(folders):
    result = compare(folders, num_resamples=500, seed=4)
    margins = [np.array(random_margins(seed)) for seed in range(3)]
    credits = {name: 0.5 + 0.5 * np.sign(part) for name, part in zip(folders, margins, strict=True)}
    lengths = np.array([40 + (7 * row) % 90 - 60 - (11 * row) % 50 for row in range(60)])
    assert [(group["level"], group["name"]) for group in result.groups] == [
        ("all", "all"), ("subset", "a"), ("subset", "b"), ("subset", "c")
    ]  # fmt: skip
    for group in result.groups:
        inside = np.arange(60) % 3 == "abc".index(group["name"]) if group["name"] != "all" else np.full(60, True)
        assert group["num_rows"] == inside.sum()
        for name, entry in group["models"].items():
            own, base = credits[name][inside], credits["one"][inside]
            assert entry["accuracy"] == pytest.approx(own.mean())
            assert entry["accuracy_interval"] == list(wilson_interval(own.sum(), len(own)))
            controlled = length_controlled_accuracy(own, lengths[inside], scale=length_scale(lengths))
            assert entry["length_controlled_accuracy"] == controlled.accuracy.estimate
            assert entry["length_coefficient"] == controlled.length_coefficient
            if name == "one":
                assert "difference" not in entry and "mcnemar" not in entry
                continue
            interval = paired_bootstrap(own - base, num_resamples=500, seed=4)
            assert (entry["difference"], *entry["difference_interval"]) == (
                interval.estimate, interval.low, interval.high
            )  # fmt: skip
            test = mcnemar_test(base, own)
            assert entry["mcnemar"]["p_value"] == test.p_value <= entry["mcnemar"]["p_value_holm"]
            assert (entry["mcnemar"]["lost"], entry["mcnemar"]["gained"]) == (test.first_only, test.second_only)
    # Holm: the smallest of the six tests among subsets is multiplied by 6, of the two over all rows by 2.
    for level, number in (("subset", 6), ("all", 2)):
        tests = [
            entry["mcnemar"]
            for group in result.groups
            for entry in group["models"].values()
            if group["level"] == level and "mcnemar" in entry
        ]
        least = min(tests, key=lambda test: test["p_value"])
        assert len(tests) == number and least["p_value_holm"] == pytest.approx(min(1.0, number * least["p_value"]))


def test_flips_are_exactly_the_rows_that_one_has_right_and_the_other_wrong(folders, tmp_path):
    result = compare(folders, tmp_path / "out", num_resamples=10)
    flips = [json.loads(line) for line in (tmp_path / "out" / "flips.jsonl").read_text().splitlines()]
    base = random_margins(0)
    expected = []
    for seed, name in ((1, "two"), (2, "six")):
        for row, margin in enumerate(random_margins(seed)):
            if margin * base[row] < 0:
                change = "gained" if margin > 0 else "lost"
                expected.append((name, change, "data.jsonl", "abc"[row % 3], f"row-{row}", base[row], margin))
    names = ("model", "change", "source", "subset", "id", "baseline_margin", "margin")
    assert [tuple(flip[name] for name in names) for flip in flips] == expected
    scales = [math.sqrt(np.mean(np.square(random_margins(seed)))) for seed in range(3)]
    for flip in flips:
        scale = scales[1 if flip["model"] == "two" else 2]
        assert flip["margin_change"] == pytest.approx(flip["margin"] / scale - flip["baseline_margin"] / scales[0])
    for name, change in itertools.product(("two", "six"), ("gained", "lost")):
        assert result.flips[name][change] == sum(flip[:2] == (name, change) for flip in expected)


def test_order_of_folders_and_of_rows_changes_no_models_own_figures(folders):
    first = compare({name: folders[name] for name in ("one", "six")}, num_resamples=50)
    shuffled(folders["six"])
    turned = compare({name: folders[name] for name in ("six", "one")}, num_resamples=50)
    own = ("accuracy", "accuracy_interval", "length_controlled_accuracy", "length_coefficient")
    groups = {group["name"]: group["models"] for group in turned.groups}
    for group in first.groups:
        for name, entry in group["models"].items():
            for statistic in own:
                assert entry[statistic] == pytest.approx(groups[group["name"]][name][statistic], abs=1e-8)
        there, back = group["models"]["six"], groups[group["name"]]["one"]
        assert there["difference"] == pytest.approx(-back["difference"])
        assert there["mcnemar"]["p_value"] == pytest.approx(back["mcnemar"]["p_value"])
        assert there["mcnemar"]["gained"] == back["mcnemar"]["lost"]


def test_a_suite_gives_published_scores_sections_and_length_control_of_pairs_only(tmp_path):
    one = write_suite(tmp_path / "one", [1.0, 0.0, 0.25, 1.0, 1.0, 1.0] * 3)
    two = write_suite(tmp_path / "two", [1.0, 1.0, 1.0, 0.0, 1.0, 0.25] * 3, complete=False)
    result = compare([one, two], num_resamples=50)
    groups = {(group["level"], group["name"]): group["models"] for group in result.groups}
    # Each section has one subset: a table of the subsets would say the same again.
    assert "one and two on rewardbench" in result._repr_html_()
    assert list(groups) == [("all", "all"), ("section", "Chat"), ("section", "Safety"), ("section", "Ties")]
    assert result.models["one"]["score"] == 0.75 and result.models["two"]["score"] is None
    assert result.models["two"]["sections"] == {"Chat": 0.5, "Ties": 0.7}
    assert (
        groups["section", "Chat"]["two"]["accuracy"] == 0.5 and groups["section", "Ties"]["one"]["accuracy"] == 0.625
    )
    assert "length_controlled_accuracy" in groups["section", "Safety"]["one"]
    assert "length_controlled_accuracy" not in groups["section", "Ties"]["one"]
    assert "length_controlled_accuracy" not in groups["all", "all"]["one"]
    assert "mcnemar" not in groups["section", "Ties"]["two"]  # every row has part of a credit on one side
    assert groups["all", "all"]["two"]["mcnemar"]["left_out"] == 6
    assert result.flips["two"] == {"gained": 3, "lost": 3}
    page = result.page().markdown()
    assert "| rewardbench | 0.7500 | incomplete |" in page and "| Safety | 0.6000 | incomplete |" in page


def test_one_folder_alone_has_accuracies_and_no_differences(tmp_path, drawn):
    folder = write_pairs(tmp_path / "one", random_margins(0), subsets="a")
    result = compare(folder, tmp_path / "out")
    (group,) = result.groups  # its one subset would say the same again
    assert "difference" not in group["models"]["one"] and result.flips == {}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "result.json", "result.md", "result.html", "forest.png", "flips.jsonl"
    }  # fmt: skip
    assert (tmp_path / "out" / "flips.jsonl").read_text() == ""
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == result.to_dict()


# --- refusals


def test_different_rows_are_refused_with_counts_and_names(folders, tmp_path):
    short = write_pairs(tmp_path / "short", random_margins(1)[:56])
    with pytest.raises(
        InputError, match=r"4 rows of one are not in short \(c: row-56, a: row-57, b: row-58, \.\.\.\)"
    ):
        compare([folders["one"], short])
    other = write_pairs(tmp_path / "other", random_margins(1), ids=[f"row-{row or 99}" for row in range(60)])
    with pytest.raises(InputError, match=r"1 row of one .* \(a: row-0\); 1 row of other .* \(a: row-99\)"):
        compare([folders["one"], other])


def test_different_data_is_refused_even_if_rows_have_the_same_names(folders, tmp_path):
    other = write_pairs(tmp_path / "other", random_margins(1), fingerprint="e" * 64)
    with pytest.raises(InputError, match="different data: fingerprints ffffffffffff, and eeeeeeeeeeee"):
        compare([folders["one"], other])
    one, two = (write_suite(tmp_path / name, [1.0, 0.0] * 3) for name in ("s1", "s2"))
    text = (two / "items.jsonl").read_text()
    (two / "items.jsonl").write_text(text.replace("[30, 35]", "[31, 35]"))
    with pytest.raises(InputError, match="different data: row subset-0: 0 has other responses"):
        compare([one, two])
    with pytest.raises(InputError, match="pairs of --data, and rewardbench"):
        compare([folders["one"], one])


def test_rows_that_occur_twice_are_refused(tmp_path):
    ids = ["x", "x", "x", "x"] + [f"row-{row}" for row in range(56)]  # of subsets a, b, c, a
    folder = write_pairs(tmp_path / "one", random_margins(0), ids=ids)
    with pytest.raises(InputError, match=r"1 row occur.* \(a: x\).*Give each row"):
        compare(folder)


def test_folders_that_hold_no_finished_evaluation_are_refused(folders, tmp_path):
    with pytest.raises(InputError, match="nothing is not a folder"):
        compare([folders["one"], tmp_path / "nothing"])
    lines = (folders["two"] / "pairs.jsonl").read_text().splitlines(keepends=True)
    text = "".join(lines)
    for content, message in (
        ("".join(lines[:-1]), "59 lines for the 60 pairs"),
        ("".join(lines[:-1]) + lines[-1][:20], "line 60: broken JSON"),
        ("".join(lines[:-1]) + "3\n", "line 60: no object"),
        (text.replace('"chosen_reward"', '"reward"', 1), "KeyError: 'chosen_reward'"),
        (
            "".join(lines).replace('"rejected_reward": 1.0', '"rejected_reward": NaN', 1),
            "a reward that is no finite number",
        ),
        (
            "".join(lines).replace("data.jsonl", "else.jsonl", 1),
            "damaged, .* 'else.jsonl'",
        ),
        ("", "the file is empty"),
    ):
        (folders["two"] / "pairs.jsonl").write_text(content)
        with pytest.raises(InputError, match=message):
            compare([folders["one"], folders["two"]])
    (folders["two"] / "pairs.jsonl").unlink()
    with pytest.raises(InputError, match=r"no pairs.jsonl; expected a folder"):
        compare([folders["one"], folders["two"]])
    (folders["two"] / "result.json").write_text("[]")
    with pytest.raises(InputError, match="of another command"):
        compare([folders["one"], folders["two"]])
    suite = write_suite(tmp_path / "suite", [1.0, 2.0])
    with pytest.raises(InputError, match=r"a credit that is not in \[0, 1\]"):
        compare(suite)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either results .* or models"),
        ({"results": []}, "at least one folder"),
        ({"results": ["a/x", "b/x"]}, "two folders have the same name"),
        ({"results": ["a"], "data": "d"}, "data: belongs to models"),
        ({"results": ["a"], "max_length": 3}, "max_length: belongs to models"),
        ({"models": {"a": "m"}}, "at least one, with data"),
        ({"models": {"../a": "m"}, "data": "d"}, "cannot be that of a folder"),
        ({"models": {"result.json": "m"}, "data": "d"}, "cannot be that of a folder"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, tmp_path):
    output = {"output": tmp_path} if "data" in arguments else {}
    with pytest.raises(InputError, match=message):
        compare(**arguments, **output)


def test_reading_keeps_margins_and_matching_restores_the_order(folders):
    rows = [read_result_rows(name, folder) for name, folder in folders.items()]
    shuffled(folders["two"])
    again = read_result_rows("two", folders["two"])
    assert again.keys != rows[1].keys
    (_, ordered) = matched([rows[0], again])
    assert ordered.keys == rows[0].keys
    np.testing.assert_allclose(ordered.margins, random_margins(1))
    np.testing.assert_allclose(ordered.length_differences, rows[0].length_differences)


def test_margin_of_an_item_is_its_worst_right_candidate_over_the_best_wrong_one(tmp_path):
    folder = write_suite(tmp_path / "one", [1.0, 1.0])
    items = [
        {"id": "many", "rewards": [3.0, 2.0, 0.5, 1.5], "num_correct": 2, "characters": [1, 2, 3, 4]},
        {"id": "pair", "rewards": [1.0, 4.0], "num_correct": 1, "characters": [9, 4]},
        {"id": "no wrong one", "rewards": [1.0, 4.0], "num_correct": 2, "characters": [9, 4]},
    ]
    lines = (json.dumps({**item, "subset": "s", "section": "S", "credit": 0.5}) + "\n" for item in items)
    (folder / "items.jsonl").write_text("".join(lines))
    rows = read_result_rows("one", folder)
    np.testing.assert_array_equal(rows.margins, [0.5, -3.0, math.nan])
    np.testing.assert_array_equal(rows.length_differences, [math.nan, 5.0, math.nan])


# --- the command line


def run(*words):
    return main(["compare", *map(str, words)])


def test_limits_decide_the_exit_code_after_all_is_written(folders, tmp_path, capsys):
    output = tmp_path / "out"
    accuracies = {name: np.mean(0.5 + 0.5 * np.sign(random_margins(seed))) for seed, name in enumerate(folders)}
    low, middle, _ = sorted(accuracies.values())
    assert compare(folders, num_resamples=10, fail_below={"accuracy": low}).below == []
    names = ["--results", *folders.values(), "--output", output]
    assert run(*names, "--fail-below", f"accuracy={middle}", "a=0", "--fail-below", "b=0") == 1
    worst = min(accuracies, key=accuracies.get)
    assert capsys.readouterr().err.splitlines() == [f"{worst}: accuracy is {low:.4f}, below {middle:g}"]
    written = json.loads((output / "result.json").read_text())
    assert written["below"] == [{"model": worst, "name": "accuracy", "value": low, "limit": middle}]
    assert f"below: {low:.4f}" in (output / "result.md").read_text()


def test_limits_on_a_suite_use_the_published_scores(tmp_path):
    whole = write_suite(tmp_path / "whole", [1.0, 0.0, 1.0])
    part = write_suite(tmp_path / "part", [1.0, 0.0, 1.0], complete=False)
    held = {"rewardbench": 0.75, "rewardbench.Chat": 0.5}
    assert compare(whole, fail_below=held).below == [] == compare(part, fail_below={"rewardbench.Chat": 0.5}).below
    assert compare(whole, fail_below={"rewardbench": 0.76, "rewardbench.Safety": 0.7}).below == [
        {"model": "whole", "name": "rewardbench", "value": 0.75, "limit": 0.76},
        {"model": "whole", "name": "rewardbench.Safety", "value": 0.6, "limit": 0.7},
    ]
    for name in ("rewardbench", "rewardbench.Safety"):
        with pytest.raises(InputError, match=f"{name} was not measured"):
            compare(part, fail_below={name: 0})


def test_limits_that_cannot_be_checked_are_wrong_use(folders, tmp_path, capsys):
    names = ["--results", folders["one"], "--output", tmp_path / "out", "--fail-below"]
    for limits, message in (
        (["sky=0.5"], "measures 'accuracy', 'a', 'b', 'c'; 'sky' is not among them"),
        (["accuracy=80"], "accuracy=80.0; expected a number from 0 to 1"),
        (["accuracy=nan"], "expected a number from 0 to 1"),
        (["a=0.5", "a=0.6"], "two limits on the same name"),
    ):
        assert run(*names, *limits) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out" / "result.json").exists()
    for limit in ("accuracy", "accuracy=high"):
        with pytest.raises(SystemExit) as stopped:
            run(*names, limit)
        assert stopped.value.code == 2
    named_so = write_pairs(tmp_path / "so", random_margins(0), subsets=("accuracy", "b"))
    assert run("--results", named_so, *names[2:], "accuracy=0.1") == 2
    assert "'accuracy' names two of them" in capsys.readouterr().err


def test_a_limit_is_held_by_a_value_that_differs_by_rounding_only(tmp_path):
    folder = write_suite(tmp_path / "one", [1.0], score=0.7 + 0.1 - 1e-16)
    assert 0.7 + 0.1 - 1e-16 < 0.8
    assert compare(folder, fail_below={"rewardbench": 0.8}).below == []


def test_names_on_the_command_line(tmp_path, capsys):
    two = write_pairs(tmp_path / "two", random_margins(1), subsets="a")
    one = write_pairs(tmp_path / "one", random_margins(0), subsets="a")
    assert run("--results", f"base={one}", two, "--output", tmp_path / "out") == 0
    assert list(json.loads((tmp_path / "out" / "result.json").read_text())["models"]) == ["base", "two"]
    assert "two: accuracy" in capsys.readouterr().out
    assert run("--results", one, one, "--output", tmp_path / "out") == 2
    assert "the same name" in capsys.readouterr().err
    assert run("--results", one, "--max-length", "9", "--output", tmp_path / "out") == 2
    assert "max_length: belongs to models" in capsys.readouterr().err


def test_models_are_evaluated_into_their_folders_and_compared(reward_dir, tmp_path):
    rows = [{"prompt": f"Say {word}.", "chosen": word, "rejected": word + " now!"} for word in ("sun", "sea", "sky")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "out"
    code = run("--model", f"m={reward_dir}", f"other={reward_dir}", "--data", tmp_path / "pairs.jsonl", "--output",
               output, "--max-length", 64)  # fmt: skip
    assert code == 0
    result = json.loads((output / "result.json").read_text())
    assert list(result["models"]) == ["m", "other"]
    assert result["models"]["m"]["settings"]["max_length"] == 64
    entry = result["groups"][0]["models"]["other"]
    assert (entry["difference"], entry["difference_interval"], entry["mcnemar"]["p_value"]) == (0, [0, 0], 1)
    lines = [json.loads(line) for line in (output / "m" / "pairs.jsonl").read_text().splitlines()]
    assert [(line["chosen_characters"], line["rejected_characters"]) for line in lines] == [(3, 8)] * 3
    assert "length_coefficient" in entry
    again = compare({"m": output / "m", "other": output / "other"})
    assert again.groups == result["groups"]
    scorer = RewardScorer(reward_dir, max_length=64)
    in_memory = compare(models={"m": scorer, "other": scorer}, data=rows)
    assert in_memory.groups == again.groups
    found = evaluate(scorer, rows, progress=False)
    assert compare({"m": found, "other": found}).groups == in_memory.groups


# --- the page


@pytest.mark.parametrize("width", [1280, 390])
def test_page_fits_its_width_in_a_browser_and_names_are_text(tmp_path, width):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium")
    nasty = "<script>document.title='broken'</script> " + "long-name" * 12
    one = write_pairs(tmp_path / "one", random_margins(0), subsets=(nasty, "b", "c"))
    two = write_pairs(tmp_path / "two", random_margins(1), subsets=(nasty, "b", "c"))
    compare({nasty: one, "two": two}, tmp_path / "out", num_resamples=10, fail_below={"b": 1.0})
    page = (tmp_path / "out" / "result.html").read_text()
    measured = """<script>
    const root = document.documentElement;
    document.title = "measured " + (root.scrollWidth - root.clientWidth) + " " + document.images[0].naturalWidth +
      " " + document.querySelectorAll("tr").length + " " + (document.title === "broken");
    </script>"""
    (tmp_path / "page.html").write_text(page.replace("</body>", measured + "</body>"))
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--window-size={width},900", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
        (tmp_path / "page.html").as_uri(),
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    title = shown.stdout.partition("<title>")[2].partition("</title>")[0].split()
    assert title[:1] == ["measured"], (title, shown.stderr[-500:])
    beyond, image, rows, broken = title[1:]
    assert int(beyond) <= 0  # wide tables scroll in themselves, the page does not
    assert int(image) > 500 and int(rows) > 20 and broken == "false"


def test_a_limit_that_is_none_is_refused_before_models_are_evaluated(tmp_path):
    with pytest.raises(InputError, match=r"accuracy=80; expected a number from 0 to 1"):
        compare(models={"one": tmp_path / "absent"}, data="absent.jsonl", fail_below={"accuracy": 80})
