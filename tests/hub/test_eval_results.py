"""``.eval_results``: the Hub's own reader reads back what was measured on whole data sets of the Hub, and no more."""

import json

import pytest
import yaml
from huggingface_hub import EvalResultEntry, ModelCard, parse_eval_result_entries

from inform_rm.hub.eval_results import entries_of_run, eval_entries, is_local, write_entries
from inform_rm.hub.export import export_model
from inform_rm.scoring.reward_models import fingerprint_model, load_reward_model
from inform_rm.util.result_folders import ResultFolder

COMMIT = "0123456789abcdef" * 2 + "01234567"
DATA = {"source": "org/pairs[en/test]", "fingerprint": "1" * 64, "is_local": False, "bad_rows": 0, "dropped": 0}
PAIRS = {
    "data": [DATA],
    "settings": {"data_revision": COMMIT, "dtype": "float32"}, "seed": 0,
    "accuracy": 0.75, "num_pairs": 8, "accuracy_interval": [0.41, 0.93], "calibration": {}, "model": "m",
}  # fmt: skip
SUITE = {
    "suite": "judgebench", "title": "JudgeBench", "complete": True, "score": 0.625, "interval": [0.5, 0.75],
    "sections": {}, "subsets": {}, "settings": {}, "data": [{"source": "/home/ada/judge"}],
    "on_hub": [{"id": "ScalerLab/JudgeBench", "config": None, "split": split} for split in ("gpt", "claude")],
}  # fmt: skip
RUN = {
    "settings": {"eval_data": ["org/pairs[test]"]}, "eval_pairs": {"pairs": 8, "dropped": 0, "bad_rows": []},
    "evaluation": {key: PAIRS[key] for key in ("accuracy", "num_pairs", "accuracy_interval")},
}  # fmt: skip


def entries_of(tmp_path, result):
    return eval_entries(ResultFolder(tmp_path, "suite" if "suite" in result else "evaluate", result))


def read_back(folder):
    """File name to entries, by the Hub's own reader."""
    files = sorted((folder / ".eval_results").glob("*"))
    return {path.name: parse_eval_result_entries(yaml.safe_load(path.read_text())) for path in files}


def test_the_hubs_reader_reads_back_the_accuracy_on_a_data_set_of_the_hub(tmp_path):
    write_entries(tmp_path, entries_of(tmp_path, PAIRS))
    assert read_back(tmp_path) == {"org--pairs--en--test.yaml": [EvalResultEntry(
        dataset_id="org/pairs", task_id="en", value=0.75, dataset_revision=COMMIT,
        notes="pairwise accuracy of n = 8, ties half, split test, 95 % interval 0.410 to 0.930",
    )]}  # fmt: skip


def test_a_whole_suite_is_a_result_on_its_authors_data_set(tmp_path):
    write_entries(tmp_path, entries_of(tmp_path, {**SUITE, "counts": {"truncated": 2}}))
    notes = "score of the whole, 2 prompts cut, split gpt + claude, 95 % interval 0.500 to 0.750"
    assert read_back(tmp_path) == {
        "ScalerLab--JudgeBench--gpt--claude.yaml": [
            EvalResultEntry("ScalerLab/JudgeBench", "default", 0.625, notes=notes)
        ]
    }


def test_the_evaluation_of_a_run_is_one_too(tmp_path):
    ((name, entry),) = entries_of_run({**RUN, "eval_pairs": {"truncated": 3, "dropped": 0}})
    assert "3 prompts cut" in entry.notes
    ((name, entry),) = entries_of_run(RUN)
    assert name == "org--pairs--test.yaml" and (entry.dataset_id, entry.task_id) == ("org/pairs", "default")
    assert entry.value == 0.75 and entry.dataset_revision is None and "chosen" not in entry.notes
    ((_, entry),) = entries_of_run({**RUN, "settings": {**RUN["settings"], "load_best_model_at_end": True}})
    assert "by which the checkpoint was chosen" in entry.notes


@pytest.mark.parametrize(
    "result",
    [
        {**PAIRS, "data": [{**DATA, "is_local": True}]},
        {**PAIRS, "data": [{"source": "org/pairs", "fingerprint": "1" * 64}]},  # an older result does not say
        {**PAIRS, "data": [{**DATA, "dropped": 1}]},
        {**PAIRS, "data": [{**DATA, "bad_rows": 1}]},
        {**PAIRS, "data": [DATA, {**DATA, "source": "org/other"}]},
        {**PAIRS, "data": [{**DATA, "source": "squad"}]},  # no owner, no data set of today's Hub
        {**PAIRS, "settings": {"max_pairs": 8}},
        {**SUITE, "complete": False, "score": None},
        {**SUITE, "settings": {"ties": "half"}},
        {**SUITE, "on_hub": None},
        {key: value for key, value in SUITE.items() if key != "on_hub"},  # an older result
    ],
)  # fmt: skip
def test_a_part_a_mixture_and_local_data_are_no_such_results(tmp_path, result):
    assert entries_of(tmp_path, result) == []


@pytest.mark.parametrize(
    "changes",
    [{"evaluation": None}, {"settings": {"eval_data": ["pairs.d/x.jsonl/y"]}}, {"eval_pairs": {"dropped": 2}},
     {"eval_pairs": {"bad_rows": ["x"]}}, {"settings": {**RUN["settings"], "max_eval_pairs_per_source": 8}}],
)  # fmt: skip
def test_nor_is_the_evaluation_of_a_run_on_a_part(changes):
    assert entries_of_run({**RUN, **changes}) == []


def test_a_revision_that_can_move_is_not_written(tmp_path):
    ((_, entry),) = entries_of(tmp_path, {**PAIRS, "settings": {"data_revision": "main"}})
    assert entry.dataset_revision is None


def test_a_split_does_not_make_a_hub_id_local():
    assert not is_local("org/pairs[test]") and is_local("../pairs[test]") and is_local("a/b/c")


def test_export_keeps_what_the_model_had_and_replaces_what_is_measured_anew(reward_dir, tmp_path):
    fingerprint = fingerprint_model(load_reward_model(reward_dir, device="cpu"))

    def results(name, **changes):
        (tmp_path / name).mkdir()
        result = {**PAIRS, "model_fingerprint": fingerprint, **changes}
        (tmp_path / name / "result.json").write_text(json.dumps(result))
        return tmp_path / name

    other = {"data": [{**DATA, "source": "org/other", "fingerprint": "2" * 64}]}
    first, second = tmp_path / "first", tmp_path / "second"
    export_model(str(reward_dir), str(first), results=[results("one"), results("two", **other)])
    files = export_model(str(first), str(second), results=[results("three", accuracy=0.5)])
    assert {".eval_results/org--other.yaml", ".eval_results/org--pairs--en--test.yaml"} < set(files)
    values = {name: [entry.value for entry in entries] for name, entries in read_back(second).items()}
    assert values == {"org--other.yaml": [0.75], "org--pairs--en--test.yaml": [0.5]}
    card = ModelCard.load(second / "README.md")  # the legacy form says the same
    assert {entry.dataset_name: entry.metric_value for entry in card.data.eval_results} == {
        "org/pairs": 0.5, "org/other": 0.75,
    }  # fmt: skip
