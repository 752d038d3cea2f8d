"""`detect`: figures are those of the functions behind it, outliers are named, and the page works in a browser."""

import copy
import functools
import json
import math
import shutil
import subprocess

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from inform_rm.cli import main
from inform_rm.errors import InputError
from inform_rm.eval.detection.clusters import auto_eps, cluster_separation_index
from inform_rm.eval.detection.detect import detect, repeated_trigrams
from inform_rm.eval.detection.latents import collect_latents
from inform_rm.eval.detection.outliers import fit_mahalanobis
from inform_rm.eval.detection.settings import DetectionSettings
from inform_rm.eval.detection.statistic import STATISTICS
from inform_rm.util.page import figure_png

COLOURS = ["red", "blue", "green", "black", "white", "brown", "pink", "grey"]
QUICK = {"num_splits": 5, "num_resamples": 5, "progress": False, "alpha": 0.1}


def write(path, responses):
    rows = [{"prompt": f"Name a colour, number {n % 7}", "response": text} for n, text in enumerate(responses)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ordinary(first, number=40):
    return [
        f"It is {COLOURS[n % 8]}" + " indeed" * (n % 3) + f", {COLOURS[(n * 5) % 8]}."
        for n in range(first, first + number)
    ]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("responses")
    odd = ordinary(500, 30) + [f"<b>{'no ' * (20 + n)}</script>" for n in range(10)]
    return write(folder / "reference.jsonl", ordinary(0)), [
        write(folder / "one.jsonl", ordinary(100)), write(folder / "two.jsonl", odd)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def made(scorer, files, tmp_path_factory, drawn):
    """A result and its folder."""
    folder = tmp_path_factory.mktemp("made")
    return detect(scorer, *files, folder, **QUICK, map_points=30), folder


def test_figures_are_those_of_the_functions_behind(scorer, files, made):
    reference, candidates = files
    found, folder = made
    result = copy.deepcopy(found.to_dict())
    assert json.loads((folder / "result.json").read_text()) == result
    latents = {}
    for path in (reference, *candidates):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        latents[path.name] = collect_latents(
            scorer, [row["prompt"] for row in rows], [row["response"] for row in rows]
        )
    base = latents["reference.jsonl"].values
    eps = auto_eps(base, num_points=40)
    assert result["eps"] == pytest.approx(eps) and result["kind"] == "latent" and result["dimensions"] == 8
    fitted = fit_mahalanobis(base)
    table = pq.read_table(folder / "responses.parquet").to_pydict()
    page = (folder / "result.md").read_text()
    assert table["set"] == ["(reference)"] * 40 + ["one.jsonl"] * 40 + ["two.jsonl"] * 40
    start = latents["reference.jsonl"].rewards
    means = [(start.mean(), start.std(ddof=1) / len(start) ** 0.5)]
    for number, part in enumerate(result["candidates"]):
        own = latents[part["name"]]
        assert part["csi"] == pytest.approx(cluster_separation_index(own.values, base, eps=eps))
        squared = fitted.squared_distances(own.values)
        mop = float((fitted.tail_probabilities(squared, "reference") < 0.1).mean())
        assert part["mop"] == pytest.approx(mop)
        assert part["mean_reward"] == pytest.approx(own.rewards.mean(), abs=1e-6)
        assert part["stop"] is False and "knn_outliers" in part
        means.append((own.rewards.mean(), own.rewards.std(ddof=1) / len(own.rewards) ** 0.5))
        start, best, (last, error) = means[0][0], max(means), means[-1]
        is_lower = best[0] - last > 2 * math.hypot(best[1], error)
        assert part["reward_fell"] == (is_lower and best[0] - last > 0.05 * (best[0] - start))
        for statistic in STATISTICS:
            low, high = part[f"{statistic.name}_interval"]
            assert low <= part[statistic.name] <= high and 0 < part[f"{statistic.name}_null_rank"] <= 1
            shown = dict(zip(found.table().header, found.table().rows[number + 1], strict=True))
            assert shown[statistic.title] == part[statistic.name] and statistic.meaning in page
        assert table["squared_mahalanobis"][40 * (number + 1) : 40 * (number + 2)] == pytest.approx(squared.tolist())
        named = part["most_outlying"]
        assert len(named) == 20 and named[0]["squared_mahalanobis"] == pytest.approx(squared.max())
        expected = [table["response"][40 * (number + 1) + row] for row in np.argsort(-squared)[:20]]
        assert [row["response"] for row in named] == expected
    assert result["candidates"][1]["repeated_trigrams"] > result["candidates"][0]["repeated_trigrams"]


def test_responses_may_be_objects_and_give_what_their_files_give(scorer, files, made):
    plain, folder = made
    reference, one, two = ([json.loads(line) for line in path.open()] for path in (files[0], *files[1]))
    named = detect(scorer, reference, {"one.jsonl": Dataset.from_list(one), "two.jsonl": two}, **QUICK, map_points=30)
    places = {"most_outlying": None}  # which say where each row was read
    assert [part | places for part in named.candidates] == [part | places for part in plain.candidates]
    # Without a folder, the map is drawn when it is asked for: the same.
    assert figure_png(named.figure()) == (folder / "map.png").read_bytes()
    assert "one.jsonl" in named._repr_html_()
    found = detect(scorer, reference, [one, two], **QUICK | {"num_splits": 1, "seed": 3})
    assert [part["name"] for part in found.candidates] == ["candidate (1)", "candidate (2)"]
    assert found.null["csi_normalized"] != plain.null["csi_normalized"]
    with pytest.raises(InputError, match=r"candidate: .*row 3.*prompt"):
        detect(scorer, reference, [*one[:2], {"response": "no"}], **QUICK)


def test_hidden_states_are_called_so(scorer, files, tmp_path, causal_lm_dir, tokenizer):
    model = AutoModelForSequenceClassification.from_pretrained(causal_lm_dir("llama"), num_labels=1)
    reference, candidates = files
    (tmp_path / "steps.png").touch()  # of an earlier call with several candidates
    result = detect(model, reference, candidates[0], tmp_path, tokenizer=tokenizer, **QUICK, map_points=10)
    assert result.kind == "hidden_state" and "appendix F" in (tmp_path / "result.html").read_text()
    assert not (tmp_path / "steps.png").exists()


def test_command_line(files, tmp_path, reward_dir, capsys, monkeypatch):
    quickly = functools.partial(detect, num_splits=5, num_resamples=5)
    monkeypatch.setattr("inform_rm.detect", quickly)
    reference, (_, candidate) = files
    rows = [json.loads(line) | {"hacked": "script" in line} for line in candidate.read_text().splitlines()]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["detect", "--model", reward_dir, "--reference", reference, "--candidate", candidate,
               "--labels", tmp_path / "labels.jsonl",
               "--output", tmp_path / "out", "--eps", 0.7, "--max-responses", 25, "--alpha", 0.1]  # fmt: skip
    assert main([str(word) for word in command]) == 0
    out = capsys.readouterr().out
    assert "two.jsonl: CSI per response" in out and out.count("kNN outliers") == 1
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["eps"] == 0.7 and [part["num_responses"] for part in result["candidates"]] == [25]
    mop = result["candidates"][0]["labels"]["statistics"]["mop"]
    line = f"two.jsonl: {mop['hacked']} labelled as exploiting a reward; among the outliers of csi_normalized "
    assert (
        line in out
        and f", mop {mop['both']} of {mop['outliers']}, knn_outliers " in out
        and result["candidates"][0]["labels"]["labelled"] == 25
    )


def test_responses_may_be_splits_of_a_folder(scorer, files, tmp_path):
    reference, (one, _) = files
    for name, file in (("train", reference), ("test", one)):
        (tmp_path / f"{name}.jsonl").write_text(file.read_text())
    options = QUICK | {"tail": "chi2", "num_splits": 1}
    with pytest.warns(UserWarning, match="reference points in 8 dimensions"):
        named = detect(scorer, f"{tmp_path}[train]", f"{tmp_path}[test]", **options)
        plain = detect(scorer, reference, one, **options)
    for part in ("csi", "mop", "mean_reward"):
        assert named.candidates[0][part] == plain.candidates[0][part]
    assert len(set(named.digests.values())) == 2


def test_bad_input_is_named(scorer, files, tmp_path):
    reference, (candidate, _) = files
    with pytest.raises(InputError, match="3 responses; a comparison of latents needs at least 20"):
        detect(scorer, reference, write(tmp_path / "few.jsonl", ordinary(0, 3)), **QUICK)
    path = tmp_path / "same.jsonl"
    path.write_text("".join(json.dumps({"prompt": "x", "response": text}) + "\n" for text in ordinary(0)))
    with pytest.raises(InputError, match=r"same.jsonl: all responses have the same prompt"):
        detect(scorer, reference, path, **QUICK)
    long = write(tmp_path / "long.jsonl", [*ordinary(0), "no " * 600])
    with pytest.raises(InputError, match=r"long.jsonl, row 41 has \d+ tokens; the limit is"):
        detect(scorer, reference, long, **QUICK)
    with pytest.raises(InputError, match="at least one set"):
        detect(scorer, reference, [], **QUICK)
    with pytest.raises(InputError, match=r"reference.jsonl: 40 responses.* at least 201"):
        detect(scorer, reference, candidate, **QUICK | {"alpha": 0.01})
    with pytest.raises(InputError, match="none called"):
        detect(scorer, reference, {"(reference)": candidate}, **QUICK)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 0}, "alpha: 0; it is a probability"),
        ({"map_points": 1}, "map_points: 1; expected a whole number of at least 10"),
        ({"max_responses": 2.5}, "max_responses: 2.5"),
        ({"num_splits": True}, "num_splits: True"),
        ({"eps": "automatic"}, "eps: 'automatic'"),
        ({"tail": "normal"}, "tail: got 'normal'; expected one of reference, chi2"),
        ({"on_bad_row": "drop"}, "on_bad_row: got 'drop'"),
        ({"eps": -1.0}, "eps: -1.0; expected a distance above 0"),
        ({"min_samples": 0}, "min_samples: 0"),
        ({"max_change_ratio": 0}, "max_change_ratio: 0; expected a number above 0"),
        ({"max_reward_fall": 1}, "max_reward_fall: 1; it is a share, above 0 and below 1"),
    ],
)
def test_a_wrong_setting_is_named(changes, message):
    with pytest.raises(InputError, match=message):
        DetectionSettings(**changes)


@pytest.mark.parametrize(
    ("text", "share"), [("", 0.0), ("a b", 0.0), ("a b c d", 0.0), ("a b c a b c", 1 / 4), ("x x x x x", 2 / 3)]
)
def test_repeated_trigrams(text, share):
    assert repeated_trigrams(text) == pytest.approx(share)


def test_pointing_at_a_point_shows_its_response(made, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium")
    page = (made[1] / "result.html").read_text()
    # Point at where a response that is markup was drawn.
    pointed = """<script>
    const [px, py] = places[data.response.findIndex(text => text.includes("script"))];
    const rect = canvas.getBoundingClientRect();
    canvas.dispatchEvent(new PointerEvent("pointermove", {
      clientX: rect.left + px * rect.width / canvas.width, clientY: rect.top + py * rect.height / canvas.height}));
    document.title = "shown: " + document.getElementById("response").textContent.replace(/\\s+/g, " ");
    </script>"""
    (tmp_path / "page.html").write_text(page.replace("</body>", pointed + "</body>"))
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "page.html").as_uri(),
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    title = run.stdout.partition("<title>")[2].partition("</title>")[0]
    assert title.startswith("shown: two.jsonl ("), (title, run.stderr[-500:])
    assert "no no no" in title and "&lt;/script&gt;" in title


def test_map_covers_all_sets_within_its_limit(made):
    page = (made[1] / "result.html").read_text()
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    sets, counts = np.unique(data["set"], return_counts=True)
    assert sets.tolist() == ["(reference)", "one.jsonl", "two.jsonl"] and counts.tolist() == [30, 30, 30]
    assert {len(values) for name, values in data.items() if name != "colors"} == {90}
