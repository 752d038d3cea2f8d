"""Labels in `detect`: how they find their rows, agreement by hand, and marks on both maps."""

import json

import numpy as np
import pytest
from scipy.stats import binomtest

from inform_rm.data.response_rows import score_rows_or_faults
from inform_rm.errors import InputError
from inform_rm.eval.detection.detect import detect
from inform_rm.eval.detection.labels import agreement, join_labels, labels_by_name
from inform_rm.eval.detection.report import map_figure
from inform_rm.eval.detection.statistic import STATISTICS

QUICK = {"num_splits": 5, "num_resamples": 5, "progress": False, "alpha": 0.1, "map_points": 60}
COLOURS = ["red", "blue", "green", "black", "white", "brown", "pink", "grey"]


def responses(number, odd=0, first=0):
    ordinary = [
        f"It is {COLOURS[n % 8]}, {COLOURS[n * 5 % 8]}" + " indeed" * (n % 3) for n in range(first, first + number)
    ]
    strange = ["no " * (20 + n) for n in range(odd)]
    return [
        {"prompt": f"Name a colour, number {n % 7}", "response": text, "id": f"r{n}"}
        for n, text in enumerate([*ordinary, *strange])
    ]


def rows_of(records):
    return list(score_rows_or_faults(records))


def test_labels_find_their_rows_by_id_or_by_place():
    records = responses(3)
    rows = rows_of(records)
    labels = [{**record, "hacked": value} for record, value in zip(records, (True, None, "No"), strict=True)]
    expected = {"list in memory, row 1": True, "list in memory, row 3": False}
    assert join_labels(rows, labels) == join_labels(rows, labels[::-1]) == expected
    assert join_labels(rows, [{"id": "r2", "hacked": 0}, {"id": "r0", "hacked": "1"}]) == expected
    without = [{key: label[key] for key in ("response", "hacked")} for label in labels]
    assert join_labels(rows, without) == expected
    # Ids that stand twice are no names: the place says it.
    same = [{**label, "id": "x"} for label in labels]
    assert join_labels(rows, same) == expected
    with pytest.raises(InputError, match=r"row 1: its response .* is not that of list in memory, row 1"):
        join_labels(rows, without[::-1])


def test_a_row_that_cannot_be_read_keeps_its_place():
    records = [responses(2)[0], {"prompt": "no response"}, responses(2)[1]]
    labels = [{"response": text, "hacked": True} for text in (records[0]["response"], None, records[2]["response"])]
    assert set(join_labels(rows_of(records), labels)) == {"list in memory, row 1", "list in memory, row 3"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda labels: labels[:2], "has 2 rows for 3 responses"),
        (lambda labels: [*labels[:2], {"response": labels[2]["response"]}], r"row 3: no 'hacked'"),
        (lambda labels: [{**label, "hacked": "perhaps"} for label in labels], "'hacked' is 'perhaps'"),
        (lambda labels: [{**label, "hacked": 0.5} for label in labels], "'hacked' is 0.5"),
        (lambda labels: [{**label, "hacked": None} for label in labels], "labels none of the responses"),
        (lambda labels: [{"hacked": True} for _ in labels], "no 'response', by which it could be told"),
        (lambda labels: [{**label, "prompt": "Else"} for label in labels], "its prompt is not that of"),
        (lambda labels: ["not a row"], r"row 1: not a row"),
    ],
)
def test_labels_that_do_not_fit_are_refused(change, message):
    records = responses(3)
    labels = [{"response": record["response"], "hacked": True} for record in records]
    with pytest.raises(InputError, match=message):
        join_labels(rows_of(records), change(labels))
    with pytest.raises(InputError, match="no response has the id 'r9'"):
        join_labels(rows_of(records), [{"id": "r9", "hacked": True}])


def test_labels_belong_to_candidates_in_order_or_by_name():
    assert labels_by_name(None, ["a"]) == {}
    assert labels_by_name(["x", "y"], ["a", "b"]) == {"a": "x", "b": "y"}
    assert labels_by_name({"b": "y"}, ["a", "b"]) == {"b": "y"}
    with pytest.raises(InputError, match="1 sources for 2 candidates"):
        labels_by_name("x", ["a", "b"])
    with pytest.raises(InputError, match="'c' is no candidate"):
        labels_by_name({"c": "y"}, ["a", "b"])


def test_agreement_is_that_counted_by_hand():
    hacked = [True, True, True, False, False, None, True]
    flags = [True, False, True, True, False, True, None]
    columns = {"hacked": hacked, **{statistic.outlier: flags for statistic in STATISTICS}}
    columns["mop_outlier"] = [False] * 7
    found = agreement(columns)
    assert found["labelled"] == 6 and found["hacked"] == 4
    csi = found["statistics"]["csi_normalized"]
    assert (csi["outliers"], csi["hacked"], csi["both"]) == (3, 3, 2)
    assert csi["precision"] == csi["recall"] == 2 / 3
    wilson = binomtest(2, 3).proportion_ci(method="wilson")
    assert csi["precision_interval"] == csi["recall_interval"] == pytest.approx([wilson.low, wilson.high])
    mop = found["statistics"]["mop"]
    assert "precision" not in mop and mop["recall"] == 0 and mop["hacked"] == 4


def test_detect_compares_outliers_with_labels_and_marks_them(scorer, tmp_path):
    records = responses(30, odd=10, first=7)
    labels = [{**record, "hacked": n >= 30 if n % 5 else None} for n, record in enumerate(records)]
    found = detect(scorer, responses(40), {"new": records, "other": responses(30)}, tmp_path, labels={"new": labels},
                   **QUICK)  # fmt: skip
    part = found.candidates[0]
    assert "labels" not in found.candidates[1] and part["labels"]["labelled"] == 32 and part["labels"]["hacked"] == 8
    table = found.responses
    assert table["hacked"][:40] == [None] * 40 and table["hacked"][40:80] == [label["hacked"] for label in labels]
    own = slice(40, 80)
    outliers = {
        "mop": np.array(table["tail_probability"][own]) < 0.1,
        "knn_outliers": np.array(table["knn_outlier"][own]),
        "csi_normalized": np.array(table["csi_outlier"][own]),
    }
    known = np.array([label["hacked"] is not None for label in labels])
    hacked = np.array([label["hacked"] is True for label in labels])
    for name, is_outlier in outliers.items():
        counts = part["labels"]["statistics"][name]
        assert counts["outliers"] == (is_outlier & known).sum() and counts["both"] == (is_outlier & hacked).sum()
        if counts["outliers"]:
            assert counts["precision"] == (is_outlier & hacked).sum() / (is_outlier & known).sum()
        assert counts["recall"] == (is_outlier & hacked).sum() / 8
    # A response's share of CSI: distances of its cluster add up to it.
    assert np.mean(table["csi_distance"][own]) == pytest.approx(part["csi_normalized"])
    assert part["mop"] == np.mean(table["mop_outlier"][own])
    page = (tmp_path / "result.html").read_text()
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert sorted(map(str, data["hacked"])) == ["False"] * 24 + ["None"] * 78 + ["True"] * 8
    assert "A triangle: labelled as exploiting a reward." in page and "Outliers and labels" in page
    legend = [text.get_text() for text in map_figure(found.points).axes[0].get_legend().get_texts()]
    assert legend[-2:] == ["labelled fine (24)", "labelled as exploiting a reward (8)"]
    low, high = part["mean_words_interval"]
    assert low < part["mean_words"] < high
    assert json.loads((tmp_path / "result.json").read_text())["settings"]["labels"] == ["list in memory"]
