"""The report of a run: what was measured is on the page, what was not is named, on a phone and in the dark, too."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from inform_rm import evaluate, write_report
from inform_rm.cli import main
from inform_rm.errors import InputError
from inform_rm.eval.decompose import decompose
from inform_rm.eval.detection.detect import detect
from inform_rm.hub.run_report import curves_figure
from inform_rm.training.reward_arguments import RewardTrainingArguments, settings_of
from inform_rm.training.run import train
from inform_rm.util.result_folders import read_result_folder

NASTY = "<script>document.title='taken'</script><img src=x onerror=alert(1)>&amp;\"'"
WORDS = ["sun", "moon", "sea", "sky", "tree", "bird", "rain", "snow"]
SUITE = {
    "suite": "rewardbench", "title": NASTY, "complete": False, "score": None, "missing": [f"Chat: {NASTY}"],
    "sections": {NASTY: {"score": 0.5, "num_items": 20, "interval": [0.4, 0.6]}},
    "subsets": {"one": {"accuracy": 0.25, "num_items": 20, "published_items": 30}}, "model": "m",
    "settings": {"dtype": "float32"},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, drawn):
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def pairs_file(folder):
    rows = [{"prompt": f"Say {WORDS[n % 8]}.", "chosen": WORDS[n % 8], "rejected": WORDS[n % 7] + "!",
             "subset": ["plain", NASTY][n % 2]} for n in range(24)]  # fmt: skip
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def config(folder, pairs_file, causal_lm_dir):
    return RewardTrainingArguments(
        model=str(causal_lm_dir("llama")), data=(str(pairs_file),), eval_data=(str(pairs_file),),
        output_dir=str(folder / "run"), latent_dim=4, max_steps=4, eval_steps=2, logging_steps=1, save_steps=2,
        use_cpu=True, per_device_train_batch_size=4, gradient_accumulation_steps=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(config):
    train(config)
    return config.output_dir


@pytest.fixture(scope="module")
def results(folder, run, pairs_file):
    """Real folders of `evaluate`, `decompose` and `detect`, and one as `evaluate --suite` leaves it."""
    for number, name in enumerate(("reference", "candidate", "candidate2")):
        rows = [{"prompt": f"Say {WORDS[n % 8]}.", "response": f"{WORDS[(n * 3 + number) % 7]} {n}"}
                for n in range(24)]  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluated = evaluate(run, pairs_file, folder / "evaluated", progress=False)
    decompose(run, pairs_file, folder / "decomposed", num_prompts=3, progress=False)
    detect(run, folder / "reference.jsonl", [folder / "candidate.jsonl", folder / "candidate2.jsonl"],
           folder / "detected", eps=0.7, alpha=0.2, num_splits=4, num_resamples=4, progress=False)  # fmt: skip
    (folder / "suite").mkdir()
    suite = {**SUITE, "model_fingerprint": evaluated.model_fingerprint}
    (folder / "suite" / "result.json").write_text(json.dumps(suite))
    return [folder / name for name in ("evaluated", "decomposed", "detected", "suite")]


@pytest.fixture(scope="module")
def source(folder, run, results):
    write_report(run, folder / "report.html", results)
    return (folder / "report.html").read_text(encoding="utf-8")


def test_page_holds_what_was_measured(source, run, results, config, read_page):
    page = read_page(source)
    trained = json.loads(open(f"{run}/train_result.json").read())
    evaluation = trained["evaluation"]
    low, high = evaluation["accuracy_interval"]
    cell = f"{evaluation['accuracy']:.3f} (n = 24, 95 % interval {low:.3f} to {high:.3f})"
    assert ["accuracy on the run's evaluation pairs", cell] in page.rows
    assert ["trained for", "4 steps"] in page.rows and ["training pairs", "24"] in page.rows
    result = json.loads((results[0] / "result.json").read_text())
    low, high = result["accuracy_interval"]
    assert ["all", "24", f"{result['accuracy']:.3f}", f"{low:.3f} to {high:.3f}"] in [row[:4] for row in page.rows]
    decomposed = json.loads((results[1] / "result.json").read_text())
    assert f"{decomposed['response_decides']:.3f}" in [row[3] for row in page.rows if row[0] == "all"]
    detected = json.loads((results[2] / "result.json").read_text())
    for part in detected["candidates"]:
        assert [part["name"], "24", f"{part['csi_normalized']:.3f}"] in [row[:3] for row in page.rows]
    for name, value in settings_of(config).items():
        shown = ", ".join(value or ["none"]) if isinstance(value, list) else "none" if value is None else str(value)
        assert [name, shown] in page.rows
    for file, digest in trained["data_fingerprints"].items():
        assert [file, digest] in page.rows
    for name, version in trained["versions"].items():
        assert [name, version] in page.rows
    assert "Not on this page" not in page.text
    assert source.count("<picture>") == 4  # curves, plane, map, candidates


def test_of_an_incomplete_suite_parts_are_shown_and_no_total(source, read_page):
    page = read_page(source)
    assert [f"section {NASTY}", "20", "0.500", "0.400 to 0.600"] in page.rows
    assert ["subset one", "20 of 30", "0.250", ""] in page.rows
    assert "whole suite" not in page.text and f"no score of the whole. Missing: Chat: {NASTY}." in page.text


def test_names_from_data_are_text(source, read_page):
    page = read_page(source)
    assert NASTY in [row[0] for row in page.rows]
    assert set(page.tags).isdisjoint({"script", "link", "iframe", "object", "base"})
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_page_needs_no_other_file(source, read_page):
    values = read_page(source).values("src", "srcset", "href")
    assert len(values) == 8 and all(value.startswith("data:image/png;base64,") for value in values)
    style = source.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style and "@import" not in style


def test_what_was_not_given_is_named_in_one_line_and_a_complete_suite_has_its_total(run, results, tmp_path, read_page):
    suite = json.loads((results[-1] / "result.json").read_text())
    (tmp_path / "result.json").write_text(json.dumps(suite | {"complete": True, "score": 0.625}))
    write_report(run, tmp_path / "page.html", [tmp_path])
    source = (tmp_path / "page.html").read_text()
    page = read_page(source)
    (line,) = [line for line in page.text.splitlines() if line.startswith("Not on this page")]
    for name in ("accuracy on other data", "prompt-free and prompt-related", "map of latents"):
        assert name in line
    assert "suites" not in line and ["whole suite", "", "0.625", ""] in page.rows
    assert source.count("<picture>") == 1


def test_rankings_and_scores_are_shown_with_what_they_measure(run, tmp_path, read_page):
    ranked = [{"prompt": f"Say {word}.", "responses": [word, "no", "never"], "ranks": [1, 2, 3]} for word in WORDS]
    scored = [{"prompt": f"Say {word}.", "response": word, "score": place} for place, word in enumerate(WORDS)]
    folders = [tmp_path / "ranked", tmp_path / "scored"]
    results = [
        evaluate(run, rows, folder, progress=False) for rows, folder in zip((ranked, scored), folders, strict=True)
    ]
    write_report(run, tmp_path / "page.html", folders)
    page = read_page((tmp_path / "page.html").read_text())
    assert "95 % bootstraps over prompts" in page.text and "Wilson intervals" not in page.text
    tau, rmse = f"{results[0].kendall_tau:.3f}", f"{results[1].rmse:.3f}"
    assert any(tau in row for row in page.rows) and any(rmse in row for row in page.rows)
    with pytest.raises(InputError, match="of inform-rm evaluate on scored responses, which has no place here"):
        read_result_folder(folders[1], ("evaluate", "suite"))


def test_an_unfinished_run_is_called_so(run, results, tmp_path, read_page):
    unfinished = tmp_path / "unfinished"
    shutil.copytree(f"{run}/checkpoints", unfinished / "checkpoints")
    shutil.rmtree(unfinished / "checkpoints" / "checkpoint-4")
    write_report(unfinished, tmp_path / "page.html")
    page = read_page((tmp_path / "page.html").read_text())
    assert "is not finished" in page.text and ["trained for", "2 of 4 steps"] in page.rows
    assert ["latent_dim", "4"] in page.rows and "<picture>" in (tmp_path / "page.html").read_text()
    with pytest.raises(InputError, match=r"results: the run in .* is not finished"):
        write_report(unfinished, tmp_path / "no.html", [results[0]])


def test_curves_are_those_of_the_log():
    log = [
        {"step": 1, "loss": 0.9, "accuracy": 0.5, "learning_rate": 0.1, "grad_norm": 1.0},
        {"step": 2, "loss": 0.7, "accuracy": 0.75, "learning_rate": 0.05, "grad_norm": float("nan")},
        {"step": 2, "eval_bradley_terry_loss": 0.6, "eval_accuracy": 0.8},
        {"train_runtime": 3.0, "step": 2},
    ]
    panels = curves_figure(log).axes
    assert [axes.get_title(loc="left") for axes in panels] == [
        "loss (nats)", "accuracy (share)", "learning rate", "gradient norm",
    ]  # fmt: skip
    drawn = [[line.get_xydata().tolist() for line in axes.lines] for axes in panels]
    assert drawn[0] == [[[1, 0.9], [2, 0.7]], [[2, 0.6]]] and drawn[1] == [[[1, 0.5], [2, 0.75]], [[2, 0.8]]]
    assert drawn[2:] == [[[[1, 0.1], [2, 0.05]]], [[[1, 1.0]]]]


def test_results_of_another_model_are_refused(run, results, tmp_path):
    for folder in results:
        changed = tmp_path / folder.name
        shutil.copytree(folder, changed)
        result = json.loads((changed / "result.json").read_text())
        (changed / "result.json").write_text(json.dumps({**result, "model_fingerprint": "0" * 64}))
        with pytest.raises(InputError, match=f"{folder.name} is about another model"):
            write_report(run, tmp_path / "page.html", [changed])
    assert not (tmp_path / "page.html").exists()


def test_damage_is_named(run, results, tmp_path):
    for name in ("decomposed", "detected"):
        shutil.copytree(results[0].parent / name, tmp_path / name)
        for table in (tmp_path / name).glob("*.parquet"):
            table.write_bytes(b"PAR1")
        with pytest.raises(InputError, match=rf"{name}/result.json is damaged"):
            write_report(run, tmp_path / "page.html", [tmp_path / name])
    for content in ("{", "[]", '{"settings": 3, "steps": 1, "log_history": []}',
                    '{"settings": {}, "steps": 1, "log_history": [3]}'):  # fmt: skip
        (tmp_path / "train_result.json").write_text(content)
        with pytest.raises(InputError, match=r"train_result.json is damaged"):
            write_report(tmp_path, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_command_line(run, results, tmp_path, capsys):
    command = ["report", "--run", run, "--output", str(tmp_path / "page.html")]
    assert main([*command, "--results", str(results[-1])]) == 0
    assert "page.html" in capsys.readouterr().out and (tmp_path / "page.html").stat().st_size > 10_000
    assert main(["report", "--run", str(tmp_path), "--output", str(tmp_path / "no.html")]) == 2
    assert "holds no training run" in capsys.readouterr().err
    assert main(["report", "--run", run, "--output", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert main([*command, "--results", run]) == 2
    assert "has no result.json" in capsys.readouterr().err


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """Run headless Chromium with some flags on a file; returns what it prints."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium")

    def start(path, *flags):
        command = [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
            f"--user-data-dir={tmp_path_factory.mktemp('profile')}", *flags, path.as_uri(),
        ]  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False).stdout

    return start


# A window cannot be as narrow as a phone, a frame in it can. The page in it is as written, the check stands outside.
FRAME = """<meta charset="utf-8"><body><iframe style="width: 390px; height: 800px"></iframe><script>
const frame = document.querySelector("iframe");
frame.onload = () => {
  const page = frame.contentDocument, wide = [...page.querySelectorAll("body *")].filter(element =>
    !element.closest(".scroll") && element.getBoundingClientRect().right > frame.contentWindow.innerWidth);
  document.title = JSON.stringify({
    width: frame.contentWindow.innerWidth, page: page.documentElement.scrollWidth, wide: wide.map(x => x.tagName),
    title: page.title,
    images: [...page.images].every(image => image.complete && image.naturalWidth > 0),
    scrolling: [...page.querySelectorAll(".scroll")].filter(box => box.scrollWidth > box.clientWidth).length});
};
frame.srcdoc = PAGE;
</script></body>"""


def on_a_phone(chromium, source, path):
    path.write_text(FRAME.replace("PAGE", json.dumps(source).replace("<", "\\u003c")), encoding="utf-8")
    title = re.search(r"<title>(.*?)</title>", chromium(path, "--dump-dom")).group(1)
    return json.loads(html.unescape(title))


@pytest.mark.slow
def test_a_phone_shows_every_page_without_moving_it_sideways(chromium, source, results, tmp_path):
    pages = [source] + [(folder / "result.html").read_text() for folder in results[:3]]
    for page in pages:
        found = on_a_phone(chromium, page, tmp_path / "phone.html")
        assert found["page"] <= found["width"] == 390 and found["wide"] == [] and found["images"], found
        assert found["scrolling"] >= 1 and "taken" not in found["title"]  # wide tables move in their box


def test_the_check_for_a_phone_sees_a_page_that_is_too_wide(chromium, tmp_path):
    table = "<table><tr>" + "<td>unbreakable</td>" * 20 + "</tr></table>"
    found = on_a_phone(chromium, f"<html><body>{table}</body></html>", tmp_path / "phone.html")
    assert found["page"] > found["width"] and "TABLE" in found["wide"]


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["dark", "light"])
def test_page_follows_the_readers_theme(chromium, folder, source, tmp_path, theme):
    for name, page in {"report": "report.html", "accuracy": "evaluated/result.html"}.items():
        picture = tmp_path / f"{name}.png"
        flags = ["--window-size=1000,700", f"--screenshot={picture}"]
        chromium(folder / page, *flags, f"--blink-settings=preferredColorScheme={int(theme == 'light')}")
        brightness = np.asarray(Image.open(picture).convert("L"), dtype=float)
        background, heading = np.median(brightness), brightness[15:60, 15:400]
        if theme == "dark":
            assert background < 40 and heading.max() > 200
            if name == "report":  # also behind the curves
                assert (brightness > 128).mean() < 0.1
        else:
            assert background > 240 and heading.min() < 60
