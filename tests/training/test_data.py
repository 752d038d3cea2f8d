"""The cache of encoded pairs: equal to encoding anew, and never used after a change."""

import copy
import dataclasses
import json
import logging

import datasets
import pytest

from inform_rm.errors import InputError
from inform_rm.training import data as training_data
from inform_rm.training.data import load_training_pairs
from inform_rm.training.reward_arguments import RewardTrainingArguments


def pair(number, **fields):
    return {"prompt": f"Name fruit {number}.", "chosen": f"The apple {number}.", "rejected": "No.", **fields}


@pytest.fixture
def pairs_file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [pair(number) for number in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def settings(pairs_file):
    return RewardTrainingArguments(model="unused", data=(str(pairs_file),), output_dir="unused")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of this test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "inform_rm_pairs"


@pytest.fixture
def encodings(cache, monkeypatch):
    """Grows by one with every call that encodes instead of reading the cache."""
    calls = []
    original = training_data._encode
    monkeypatch.setattr(training_data, "_encode", lambda *args: (calls.append(args), original(*args))[1])
    return calls


def load(config, tokenizer, max_pairs=None):
    return load_training_pairs(config, config.data, max_pairs, tokenizer, "data", config.max_length)


def test_a_second_run_reads_what_the_first_encoded(settings, tokenizer, pairs_file, encodings):
    with pairs_file.open("a") as file:
        file.write(json.dumps(pair(7, chosen="")) + "\n")
    config = dataclasses.replace(settings, on_bad_row="skip")
    first, second = load(config, tokenizer), load(config, tokenizer)
    assert len(encodings) == 1
    assert second.dataset.to_list() == first.dataset.to_list() and second.dataset.features == first.dataset.features
    assert second.counts == first.counts and second.fingerprints == first.fingerprints
    assert second.counts["pairs"] == 6 and "row 7" in second.counts["bad_rows"][0]


def _append_a_row(path, config, tokenizer):
    with path.open("a") as file:
        file.write(json.dumps(pair(8)) + "\n")
    return config


def _change_a_letter(path, config, tokenizer):
    path.write_text(path.read_text().replace("apple", "grape"))
    return config


def _change_template(path, config, tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace("</s>", "")
    return config


def _add_token(path, config, tokenizer):
    tokenizer.add_tokens(["apple"])
    return config


@pytest.mark.parametrize(
    "change",
    [
        _append_a_row,
        _change_a_letter,
        _change_template,
        _add_token,
        lambda path, config, tokenizer: dataclasses.replace(config, max_length=100),
        lambda path, config, tokenizer: dataclasses.replace(config, overlong="drop"),
        lambda path, config, tokenizer: dataclasses.replace(config, on_bad_row="skip"),
        lambda path, config, tokenizer: dataclasses.replace(config, data=config.data * 2),
    ],
)
def test_a_change_of_anything_that_decides_the_tokens_is_encoded_anew(
    settings, tokenizer, pairs_file, encodings, change
):
    tokenizer = copy.deepcopy(tokenizer)
    config = dataclasses.replace(settings, max_length=120)
    load(config, tokenizer)
    changed = change(pairs_file, config, tokenizer)
    found = load(changed, tokenizer).dataset.to_list()
    assert len(encodings) == 2
    datasets.disable_caching()
    try:
        assert found == load(changed, tokenizer).dataset.to_list()
    finally:
        datasets.enable_caching()


def test_the_choice_of_pairs_and_its_seed_are_part_of_the_key(settings, tokenizer, encodings):
    other_seed = dataclasses.replace(settings, seed=settings.seed + 1)
    chosen = [load(config, tokenizer, max_pairs=3).dataset["id"][:] for config in (settings, other_seed)]
    assert len(encodings) == 2 and chosen[0] != chosen[1]
    load(settings, tokenizer)
    load(other_seed, tokenizer)  # all pairs: the seed chooses nothing
    assert len(encodings) == 3


def test_settings_that_do_not_change_the_tokens_share_the_cache(settings, tokenizer, encodings):
    load(settings, tokenizer)
    load(dataclasses.replace(settings, learning_rate=1.0, output_dir="elsewhere", beta=0.5), tokenizer)
    assert len(encodings) == 1


def test_a_saved_dataset_folder_is_known_by_its_files(settings, tokenizer, tmp_path, encodings):
    folder = tmp_path / "saved"
    config = dataclasses.replace(settings, data=(str(folder),))
    for rows in ([pair(1), pair(2)], [pair(1), pair(3)]):
        datasets.Dataset.from_list(rows).save_to_disk(str(folder))
        load(config, tokenizer)
        load(config, tokenizer)
    assert len(encodings) == 2


def test_a_damaged_cache_is_encoded_anew(settings, tokenizer, cache, encodings, caplog):
    first = load(settings, tokenizer).dataset.to_list()
    (arrow,) = cache.glob("*/pairs/*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        assert load(settings, tokenizer).dataset.to_list() == first
    assert len(encodings) == 2 and "unreadable" in caplog.text
    load(settings, tokenizer)
    assert len(encodings) == 2  # it was mended


def test_a_cache_that_cannot_be_written_does_not_stop_the_run(settings, tokenizer, cache, monkeypatch, caplog):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(datasets.Dataset, "save_to_disk", full)
    with caplog.at_level(logging.WARNING):
        assert load(settings, tokenizer).counts["pairs"] == 6
    assert "No space left" in caplog.text
    assert list(cache.iterdir()) == []


def test_caching_can_be_turned_off(settings, tokenizer, cache, encodings):
    datasets.disable_caching()
    try:
        load(settings, tokenizer)
        load(settings, tokenizer)
    finally:
        datasets.enable_caching()
    assert len(encodings) == 2 and not cache.exists()


def test_bad_data_is_reported_by_file_and_row_and_leaves_no_cache(settings, tokenizer, pairs_file, cache):
    _append_a_row(pairs_file, settings, tokenizer)
    pairs_file.write_text(pairs_file.read_text() + json.dumps(pair(9, rejected="")) + "\n")
    with pytest.raises(InputError, match=r"pairs.jsonl, row 8"):
        load(settings, tokenizer)
    with pytest.raises(InputError, match="no such file"):
        load(dataclasses.replace(settings, data=("/nowhere.jsonl",)), tokenizer)
    assert not cache.exists()
