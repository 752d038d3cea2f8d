"""Model cards: the Hub's own classes read back what results say, and nothing else gets in."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import EvalResult, ModelCard, metadata_load

from inform_rm import InfoRMForSequenceClassification, evaluate
from inform_rm.cli import main
from inform_rm.errors import InputError
from inform_rm.hub.cards import average_card, complete_card, model_card, whole_model_card
from inform_rm.hub.eval_results import eval_results
from inform_rm.hub.export import export_model
from inform_rm.scoring.reward_models import fingerprint_model, load_reward_model
from inform_rm.training.reward_arguments import RewardTrainingArguments, settings_of
from inform_rm.util.result_folders import read_result_folder

NASTY = "<script>alert('x')</script> [a](javascript:b) `c` | d\nline"
RUN = {
    "settings": {"eval_data": ["org/pairs"]},
    "data_fingerprints": {"org/pairs": "e" * 64},
    "train_pairs": {"pairs": 12},
    "evaluation": {"accuracy": 0.75, "num_pairs": 8, "accuracy_interval": [0.41, 0.93]},
    "versions": {"torch": "2"},
}
SUITE = {
    "suite": "rewardbench", "title": "RewardBench", "complete": False, "score": None,
    "missing": ["Chat Hard: llmbar-adver-neighbor 0 of 134 items"],
    "sections": {"Chat": {"score": 0.5, "num_items": 20, "interval": [0.4, 0.6]}},
    "subsets": {
        "whole": {"accuracy": 0.25, "num_items": 20, "published_items": 20, "interval": [0.1, 0.5]},
        "partial": {"accuracy": 1.0, "num_items": 3, "published_items": 20, "interval": [0.4, 1.0]},
        "dropped": {"accuracy": 1.0, "num_items": 3, "published_items": None, "num_dropped": 2, "interval": [0, 1]},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def model_dir(causal_lm_dir, tokenizer, tmp_path_factory):
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("alice") / "model"
    InfoRMForSequenceClassification.from_backbone(str(causal_lm_dir("llama")), latent_dim=4).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def fingerprint(model_dir):
    return fingerprint_model(load_reward_model(model_dir, device="cpu"))


@pytest.fixture(scope="module")
def evaluated(model_dir, tmp_path_factory):
    """A real folder of `evaluate`; one subset has a name that no page should swallow."""
    folder = tmp_path_factory.mktemp("alice")
    rows = [{"prompt": f"Say {n}.", "chosen": "yes" * (n + 1), "rejected": "no", "subset": ["plain", NASTY][n % 2]}
            for n in range(8)]  # fmt: skip
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate(model_dir, folder / "pairs.jsonl", folder / "evaluated", progress=False)
    return folder / "evaluated"


@pytest.fixture
def results(tmp_path, fingerprint, evaluated):
    """Write a folder of results as `evaluate` leaves it, with some values changed; returns it."""

    def write(name="made-up", **changes):
        folder = tmp_path / name
        folder.mkdir()
        result = json.loads((evaluated / "result.json").read_text())
        if "suite" in changes:
            result = {"model": "m", "settings": {"dtype": "float32"}}
        (folder / "result.json").write_text(json.dumps({**result, "model_fingerprint": fingerprint, **changes}))
        return folder

    return write


def exported(model, output, *folders, **options):
    export_model(str(model), str(output), results=folders, **options)
    return ModelCard.load(output / "README.md")


def source(name, fingerprint, is_local=True):
    return {"source": name, "fingerprint": fingerprint, "is_local": is_local}


def test_the_hubs_classes_read_back_what_evaluate_found(model_dir, evaluated, tmp_path):
    card = exported(model_dir, tmp_path / "my-rm", evaluated, license="apache-2.0")
    result = json.loads((evaluated / "result.json").read_text())
    assert card.data.eval_results == eval_results(read_result_folder(evaluated))
    found = {entry.metric_name: entry for entry in card.data.eval_results}
    assert set(found) == {"pairwise accuracy", "pairwise accuracy, plain", f"pairwise accuracy, {NASTY}"}
    for suffix, part in {"": result, ", plain": result["subsets"]["plain"]}.items():
        entry = found[f"pairwise accuracy{suffix}"]
        assert entry.metric_type == "accuracy" and entry.metric_value == part["accuracy"]
        assert entry.metric_args == {"n": part["num_pairs"], "interval_95": part["accuracy_interval"]}
    assert entry.dataset_name == "pairs.jsonl" and entry.task_type == "text-classification"
    assert entry.dataset_args == {"fingerprints": [result["data"][0]["fingerprint"][:12]]}

    metadata = metadata_load(tmp_path / "my-rm" / "README.md")
    assert metadata == card.data.to_dict()
    assert metadata["model-index"][0]["name"] == "my-rm"
    assert metadata["tags"] == ["reward-model", "inform", "rlhf"] and metadata["license"] == "apache-2.0"
    assert metadata["pipeline_tag"] == "text-classification" and metadata["library_name"] == "transformers"
    assert ModelCard(str(card)).data.to_dict() == metadata


def test_the_table_holds_every_result_in_one_row_and_no_markup_of_names(model_dir, evaluated, tmp_path):
    text = exported(model_dir, tmp_path / "out", evaluated).text
    result = json.loads((evaluated / "result.json").read_text())
    low, high = result["accuracy_interval"]
    value = f"{result['accuracy']:.3f}"
    assert f"| pairs.jsonl | pairwise accuracy | 8 | {value} | {low:.3f} to {high:.3f} |" in text
    assert len([line for line in text.splitlines() if line.startswith("| pairs.jsonl |")]) == 3
    assert "<script" not in text and "[a](" not in text and "\\| d line" in text
    assert text.index("## Results") < text.index("## Limits")


def test_a_card_without_results_claims_none(model_dir, tmp_path):
    card = exported(model_dir, tmp_path / "out")
    assert not card.data.eval_results and "## Results" not in card.text
    assert {"license", "model-index", "datasets", "base_model"}.isdisjoint(card.data.to_dict())


def test_local_paths_are_shortened_and_hub_ids_stay(causal_lm_dir, tmp_path):
    home = tmp_path / "alice"
    home.mkdir()
    for name in ("pairs.jsonl", "template.jinja"):
        (home / name).write_text("x")
    settings = RewardTrainingArguments(
        model=str(causal_lm_dir("llama")), data=("org/pairs[train]", str(home / "pairs.jsonl")),
        output_dir=str(home / "my-rm"),
        chat_template=str(home / "template.jinja"),
    )  # fmt: skip
    config = SimpleNamespace(architecture="inform", text_config=SimpleNamespace(model_type="llama"))
    card = ModelCard(model_card(config, settings_of(settings), RUN))
    assert card.data.datasets == ["org/pairs"] and card.data.base_model is None
    assert "base_model_relation" not in card.data.to_dict()
    assert card.data.model_name == "my-rm"
    assert "alice" not in str(card) and str(tmp_path) not in str(card)
    assert (
        "| data | org/pairs[train], pairs.jsonl |" in card.text and "| chat_template | template.jinja |" in card.text
    )

    settings = settings_of(dataclasses.replace(settings, model="org/base", data=(str(home / "pairs.jsonl"),)))
    card = ModelCard(model_card(config, settings, RUN))
    assert card.data.base_model == "org/base" and card.data.datasets is None
    assert card.data.base_model_relation == "finetune" and card.data.library_name == "transformers"
    (entry,) = card.data.eval_results
    assert (entry.dataset_type, entry.metric_value, entry.metric_args["n"]) == ("org/pairs", 0.75, 8)
    assert "| org/pairs | pairwise accuracy | 8 | 0.750 | 0.410 to 0.930 |" in card.text


def test_an_adapter_is_one_until_it_is_merged(tmp_path):
    config = SimpleNamespace(architecture="inform", text_config=SimpleNamespace(model_type="llama"))
    path = tmp_path / "README.md"
    path.write_text(model_card(config, {"model": "org/base", "merge_adapters": False}, None))
    found = [metadata_load(path)]
    whole_model_card(path)
    found.append(metadata_load(path))
    assert [(data["base_model_relation"], data["library_name"]) for data in found] == [
        ("adapter", "peft"), ("finetune", "transformers"),
    ]  # fmt: skip
    assert all(data["base_model"] == "org/base" for data in found)


def test_results_on_local_data_carry_its_fingerprint_and_no_folder(model_dir, evaluated, tmp_path):
    text = str(exported(model_dir, tmp_path / "out", evaluated))
    assert "alice" not in text and str(tmp_path) not in text and "/tmp" not in text


def test_files_of_one_name_stay_two_results(model_dir, results, tmp_path):
    """The Hub's classes join entries that differ in the data's name alone."""
    one, two, hub = (
        results(name, data=[source(f"/home/{name}/test.jsonl", digit * 64)], accuracy=value, subsets={})
        for name, digit, value in (("one", "1", 0.25), ("two", "2", 0.5), ("three", "3", 0.75))
    )
    card = exported(model_dir, tmp_path / "out", one, two, hub)
    index = metadata_load(tmp_path / "out" / "README.md")["model-index"][0]["results"]
    assert [part["dataset"]["revision"] for part in index] == ["1" * 12, "2" * 12, "3" * 12]
    assert [part["metrics"][0]["value"] for part in index] == [0.25, 0.5, 0.75]
    names = [part["dataset"]["name"] for part in index] + [entry.dataset_name for entry in card.data.eval_results]
    assert names == ["test.jsonl"] * 6


def test_what_was_left_out_is_said_once(model_dir, results, tmp_path):
    record = {**source("test.jsonl", "1" * 64), "bad_rows": 0, "dropped": 3, "truncated": 2}
    card = exported(model_dir, tmp_path / "out", results(data=[record, record]))
    assert card.data.eval_results[0].dataset_args == {"fingerprints": ["1" * 12] * 2, "dropped": 6, "truncated": 4}
    assert card.text.count("test.jsonl + test.jsonl: 6 over-long pairs left out, 4 prompts cut.") == 1


def test_hub_data_is_named_by_id_and_revision(results):
    folder = results(
        data=[source("org/pairs[test]", "1" * 64, is_local=False)], settings={"dtype": "float32"}, subsets={}
    )
    (entry,) = eval_results(read_result_folder(folder))
    assert (entry.dataset_type, entry.dataset_split, entry.dataset_revision) == ("org/pairs", "test", None)
    pinned = results(
        "pinned", data=[source("org/pairs", "1" * 64, is_local=False), source("x/y.csv", "2" * 64)], seed=7,
        settings={"data_revision": "abc", "max_pairs": 5, "dtype": "float32"}, subsets={},
    )  # fmt: skip
    (entry,) = eval_results(read_result_folder(pinned))
    assert (entry.dataset_name, entry.dataset_revision) == ("org/pairs + y.csv", "abc")
    assert entry.dataset_args == {"fingerprints": ["1" * 12, "2" * 12], "max_pairs": 5, "seed": 7}


def test_what_an_older_result_does_not_say_is_taken_for_local(results):
    folder = results(data=[{"source": "alice/pairs", "fingerprint": "1" * 64}], subsets={})
    (entry,) = eval_results(read_result_folder(folder))
    assert (entry.dataset_type, entry.dataset_name) == ("pairs", "pairs")


def test_an_incomplete_suite_has_no_total(model_dir, results, tmp_path):
    card = exported(model_dir, tmp_path / "out", results(**SUITE))
    found = {entry.metric_name: entry.metric_value for entry in card.data.eval_results}
    assert found == {"section Chat of an incomplete suite": 0.5, "subset whole of an incomplete suite": 0.25}
    assert {entry.dataset_name for entry in card.data.eval_results} == {"RewardBench (incomplete)"}
    assert "no score of the whole. Missing: Chat Hard: llmbar-adver-neighbor 0 of 134 items." in card.text
    row = "| RewardBench (incomplete) | section Chat of an incomplete suite | 20 | 0.500 | 0.400 to 0.600 |"
    assert row in card.text


def test_a_complete_suite_has_a_total(model_dir, results, tmp_path):
    suite = {**SUITE, "complete": True, "score": 0.625, "missing": [], "interval": [0.5, 0.75]}
    card = exported(model_dir, tmp_path / "out", results(**suite))
    assert card.data.eval_results[0].dataset_name == "RewardBench"
    total, *_ = card.data.eval_results
    assert (total.metric_name, total.metric_value, total.dataset_type) == ("score", 0.625, "rewardbench")
    assert total.metric_args == {"interval_95": [0.5, 0.75]} and "Missing" not in card.text


def test_a_suite_scored_by_another_rule_than_the_published_one_says_so(results):
    folder = results(**SUITE, settings={"ties": "half"})
    names = {entry.dataset_name for entry in eval_results(read_result_folder(folder))}
    assert names == {"RewardBench (ties count half, incomplete)"}


def test_results_of_another_model_are_refused(model_dir, results, tmp_path):
    folder = results(model_fingerprint="0" * 64, model="other/model")
    with pytest.raises(InputError, match=r"made-up is about another model, other/model: .* 000000000000"):
        export_model(str(model_dir), str(tmp_path / "out"), results=[folder])
    assert not (tmp_path / "out").exists()


def test_a_bfloat16_model_that_was_scored_in_float32_is_recognised(model_dir, tokenizer, evaluated, tmp_path):
    model = load_reward_model(model_dir, device="cpu").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    evaluate(tmp_path / "model", evaluated.parent / "pairs.jsonl", tmp_path / "scored", progress=False)
    assert json.loads((tmp_path / "scored" / "result.json").read_text())["settings"]["dtype"] == "float32"
    assert len(exported(tmp_path / "model", tmp_path / "out", tmp_path / "scored").data.eval_results) == 3
    with pytest.raises(InputError, match="another model"):
        exported(tmp_path / "model", tmp_path / "no", evaluated)


def test_exported_again_new_results_replace_those_on_the_same_data(model_dir, results, tmp_path):
    one, two = (results(name, data=[source("test.jsonl", digit * 64)], accuracy=value, subsets={})
                for name, digit, value in (("one", "1", 0.25), ("two", "2", 0.5)))  # fmt: skip
    exported(model_dir, tmp_path / "first", one, two, license="mit")
    better = results("better", data=[source("test.jsonl", "1" * 64)], accuracy=0.875, subsets={})
    card = exported(tmp_path / "first", tmp_path / "second", better)
    assert [entry.metric_value for entry in card.data.eval_results] == [0.5, 0.875]
    assert card.text.count("## Results") == 1
    rows = [line.split(" | ")[0] for line in card.text.splitlines() if line.startswith("| test.jsonl")]
    assert rows == [f"| test.jsonl ({'2' * 12})", f"| test.jsonl ({'1' * 12})"]
    assert "0.250" not in card.text and card.data.license == "mit" and card.data.model_name == "second"
    assert exported(tmp_path / "second", tmp_path / "third").content == card.content


def test_one_data_set_twice_is_refused(model_dir, results, tmp_path):
    with pytest.raises(InputError, match=r"one and .*two are both about pairs.jsonl"):
        exported(model_dir, tmp_path / "out", results("one"), results("two"))


@pytest.mark.parametrize("license", ["", "mit\nbase_model: x"])
def test_a_licence_is_a_name(model_dir, tmp_path, license):
    with pytest.raises(InputError, match=r"license: .* is no name of a licence"):
        export_model(str(model_dir), str(tmp_path / "out"), license=license)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "header",
    ["a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "- a list", "a: [", "model-index: 3", "model-index: [{name: x}]",
     "x: " + "[" * 50],
)  # fmt: skip
def test_a_card_that_cannot_be_completed_is_named(results, tmp_path, header):
    path = tmp_path / "README.md"
    path.write_text(f"---\n{header}\n---\n\n# Mine\n")
    with pytest.raises(InputError, match=r"README.md cannot be completed"):
        complete_card(path, "name", [read_result_folder(results())], None)
    assert path.read_text().endswith("# Mine\n")


def test_a_card_of_ones_own_keeps_its_words(results, tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\nlanguage: en\nmy_key: [1, 2]\n---\n\n# Mine\n\nMy words.\n")
    complete_card(path, "name", [read_result_folder(results())], "mit")
    card = ModelCard.load(path)
    assert card.data.language == "en" and card.data.to_dict()["my_key"] == [1, 2] and card.data.license == "mit"
    assert "# Mine\n\nMy words.\n" in card.text and "## Results" in card.text and len(card.data.eval_results) == 3


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no result.json"),
        ("{", "is damaged"),
        ("[" * 100_000, "is damaged"),
        ("[1]", "of another command"),
        ('{"settings": {}, "log_history": []}', "of another command"),
        ('{"response_decides": 0, "quadrants": []}', "of inform-rm decompose, which has no place here"),
        ('{"suite": 1, "complete": 1, "sections": 3, "subsets": {}, "model_fingerprint": 1}', "is damaged"),
    ],
)
def test_a_folder_that_holds_no_results_is_named(model_dir, tmp_path, content, reason, capsys):
    (tmp_path / "odd").mkdir()
    if content is not None:
        (tmp_path / "odd" / "result.json").write_text(content)
    command = ["export", "--model", str(model_dir), "--output", str(tmp_path / "out"), "--results"]
    assert main([*command, str(tmp_path / "odd")]) == 2
    assert reason in capsys.readouterr().err
    assert main([*command, str(tmp_path / "nowhere")]) == 2
    assert "nowhere is not a folder" in capsys.readouterr().err


def test_command_line(model_dir, evaluated, results, tmp_path):
    command = ["export", "--model", str(model_dir), "--output", str(tmp_path / "out"), "--license", "mit"]
    assert main([*command, "--results", str(evaluated), str(results(**SUITE))]) == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert len(card.data.eval_results) == 5 and card.data.license == "mit"


def test_the_card_of_averaged_weights_names_how_many():
    card = ModelCard(average_card(None, 3, "members.json"))
    assert "3 reward models" in card.text and "members.json" in card.text and card.data.tags == ["reward-model"]
    assert all(not isinstance(value, EvalResult) for value in card.data.to_dict().values())
