"""Reports say what the result says, stand alone, and stay intact whatever the names hold."""

import base64
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from inform_rm.eval.accuracy import pairwise_accuracy, reliability_bins
from inform_rm.eval.results import EvaluationResult, reliability_figure
from inform_rm.util.page import figure_png, png_data_uri


def make_result(subsets=("sky", "sea", "sea", "sky"), name="some/model"):
    statistics = pairwise_accuracy(
        [1.0, 2.0, 3.0, 0.5], [0.0, 2.0, 5.0, 0.0], list(subsets), [9, 5, 5, 9], [5, 9, 5, 5]
    )
    counts = dict.fromkeys(("bad_rows", "not_sampled", "overlong", "truncated"), 0)
    source = {"source": "data.jsonl", "fingerprint": "f" * 64, "pairs_read": 7, **counts, "dropped": 3, "evaluated": 4}
    return {
        "model": name,
        "model_fingerprint": "a" * 64,
        "tokenizer_fingerprint": "b" * 64,
        "settings": {"data": ["data.jsonl"], "max_length": 128},
        "seed": 5,
        "versions": {"python": "3.11"},
        "data": [source],
        **statistics,
    }


# Intervals: roots of |p_hat - p| = 1.96 sqrt(p (1 - p) / n), found by bisection.
EXPECTED_ROWS = [
    ["all", "4", "0.625", "0.219 to 0.908", "1", "0.500", "-0.125"],
    ["sea", "2", "0.250", "0.027 to 0.802", "1", "0.000", "-1.000"],
    ["sky", "2", "1.000", "0.342 to 1.000", "0", "1.000", "0.750"],
    ["chosen is longer", "2", "1.000", "0.342 to 1.000", "0", "1.000", "0.750"],
    ["chosen is shorter", "1", "0.500", "0.055 to 0.945", "1", "0.000", "0.000"],
    ["same length", "1", "0.000", "0.000 to 0.793", "0", "0.000", "-2.000"],
]


def test_markdown_and_html_hold_the_figures(read_page):
    result = make_result()
    found = EvaluationResult(**result, rows=[])
    assert found.table().cells() == EXPECTED_ROWS
    written = found.page()
    page, markdown = read_page(written.html()), written.markdown()
    assert page.rows[1:7] == EXPECTED_ROWS
    cells = [re.split(r"\s*\|\s*", line.strip("| ")) for line in markdown.splitlines() if line.startswith("| ")]
    assert cells[1:7] == EXPECTED_ROWS
    error = f"{result['calibration']['expected_calibration_error']:.3f}"
    for text in (markdown, written.html()):
        for expected in (error, "0.625", "some/model", "data.jsonl", "ffffffffffff", "128", "seed", "3.11"):
            assert expected in text
    assert ["data.jsonl", "7", "0", "0", "0", "3", "0", "4", "f" * 12] in page.rows


def test_parts_that_were_not_measured_are_absent():
    result = {**make_result(), **pairwise_accuracy([1.0], [0.0])}
    for key in ("subsets", "by_length", "longer_wins_accuracy"):
        result.pop(key)
    assert len(EvaluationResult(**result, rows=[]).table().rows) == 1
    assert "longer" not in EvaluationResult(**result, rows=[]).page().markdown()


@pytest.mark.parametrize("nasty", ["<script>alert(1)</script>", "a\"b'c&amp;", "pipe|new\nline", "é 表"])
def test_names_from_data_cannot_break_the_page_or_the_table(nasty, read_page):
    result = make_result((nasty, "x", "x", nasty), name=nasty)
    written = EvaluationResult(**result, rows=[]).page()
    page, markdown = read_page(written.html()), written.markdown()
    assert "script" not in page.tags
    assert nasty in [row[0] for row in page.rows]
    table = [line for line in markdown.split("\n\n")[1].splitlines()]
    assert len(table) == 8  # header, rule, all, two subsets, three lengths
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {8}


def test_html_needs_no_other_file(read_page):
    page = read_page(EvaluationResult(**make_result(), rows=[]).page().html())
    sources = page.values("src", "href")
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert not set(page.tags) & {"script", "link", "iframe"}


@given(st.binary(max_size=200))
def test_embedded_image_decodes_to_the_same_bytes(png):
    assert base64.b64decode(png_data_uri(png).removeprefix("data:image/png;base64,")) == png


def test_reliability_figure_draws_the_bins():
    bins = reliability_bins(np.random.default_rng(0).normal(1, 2, 500))
    figure = reliability_figure(bins)
    axes, counts = figure.axes
    line = axes.containers[0].lines[0]
    np.testing.assert_allclose(line.get_xdata(orig=False), [part["mean_confidence"] for part in bins])
    np.testing.assert_allclose(line.get_ydata(orig=False), [part["accuracy"] for part in bins])
    (bars,) = axes.containers[0].lines[2]
    segments = np.array([segment[:, 1] for segment in bars.get_segments()])
    np.testing.assert_allclose(segments, np.array([part["accuracy_interval"] for part in bins]))
    assert [patch.get_height() for patch in counts.patches] == [part["num_pairs"] for part in bins]
    assert sum(patch.get_height() for patch in counts.patches) == 500


def test_figure_png_is_an_image_without_a_display(monkeypatch, savefig):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setattr(Figure, "savefig", savefig)
    png = figure_png(reliability_figure(reliability_bins([0.5, -0.2])))
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and png.endswith(b"IEND\xaeB`\x82")


def test_reliability_figure_takes_bins_that_are_all_right_or_all_wrong():
    """Rounding once left the interval of a perfect bin 1e-16 below 1, which matplotlib refuses to draw."""
    for n in (10, 13, 25, 27, 28):
        right = pairwise_accuracy(np.full(n, 9.0), np.zeros(n))
        wrong = pairwise_accuracy(np.zeros(n), np.full(n, 9.0))
        for result in (right, wrong):
            reliability_figure(result["calibration"]["bins"])
