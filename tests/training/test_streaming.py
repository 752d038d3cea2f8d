"""Streamed pairs: those of the path in memory, each once an epoch, for any number of readers; exact continuation."""

import dataclasses
import functools
import gzip
import itertools
import json
from types import SimpleNamespace

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from transformers import AutoModelForSequenceClassification

from inform_rm.data import sources
from inform_rm.data.encoding import encode_pairs
from inform_rm.data.pairs import BadRow
from inform_rm.data.preferences import load_preferences
from inform_rm.errors import InputError
from inform_rm.training import stream_sources, streaming
from inform_rm.training.reward_arguments import RewardTrainingArguments
from inform_rm.training.run import train
from inform_rm.training.stream_sources import StreamSource, open_stream, stream_of
from inform_rm.training.streaming import EncodedStream


def pair(number, **fields):
    return {
        "prompt": f"Name fruit {number}" + " please" * (number % 5),
        "chosen": f"The apple {number}." * (number % 3 + 1),
        "rejected": "No.",
        **fields,
    }


def write_jsonl(path, rows):
    opened = gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w")
    with opened as file:
        file.writelines(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    return path


def write_parquet(folder, sizes, row_group_size=4):
    """A folder with files of these numbers of rows, numbered through."""
    folder.mkdir()
    start = 0
    schema = pa.schema([(name, pa.string()) for name in ("prompt", "chosen", "rejected")])
    for number, size in enumerate(sizes):
        rows = [pair(index) for index in range(start, start + size)]
        path = folder / f"part-{number}.parquet"
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=row_group_size)
        start += size
    return folder


def opened(*data, seed=0, buffer=6):
    return open_stream(data, seed=seed, shuffle_buffer=buffer)


def stream(source, tokenizer, batch_size=4, workers=0, process=0, processes=1, **options):
    args = SimpleNamespace(
        train_batch_size=batch_size, process_index=process, world_size=processes, dataloader_num_workers=workers,
        dataloader_pin_memory=False, dataloader_prefetch_factor=None,
    )  # fmt: skip
    source = source if isinstance(source, StreamSource) else opened(source)
    return EncodedStream(source, tokenizer, args, **{"max_length": None, **options})


def batches(encoded, count):
    """The next batches as lists of pairs, as training takes them."""
    found = list(itertools.islice(encoded.loader(lambda rows: {"pairs": rows}), count))
    for batch in found:
        encoded.take(batch)
    return [batch["pairs"] for batch in found]


def ids(found):
    return [row["id"] for batch in found for row in batch]


def by_id(rows):
    return sorted(rows, key=lambda row: row["id"])


def in_memory(path, tokenizer, **options):
    loaded = load_preferences(path, on_bad_row=options.pop("on_bad_row", "error"))
    return encode_pairs(loaded.dataset, tokenizer, **{"max_length": None, **options}), loaded


@pytest.mark.parametrize("kind", ["jsonl.gz", "parquet", "saved", "own"])
def test_rows_and_tokens_are_those_of_the_path_in_memory(kind, tmp_path, tokenizer):
    turns = [{"role": "user", "content": "Name a fruit."}, {"role": "assistant", "content": "Which?"}]
    rows = [pair(n, margin=n / 2, id=str(n + 10), subset="a") for n in range(21)]
    for row in rows if kind in ("parquet", "own") else []:
        row["prompt"] = [*turns, {"role": "user", "content": row["prompt"]}]
    path = source = tmp_path / f"pairs.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "saved":
        Dataset.from_list(rows).save_to_disk(path)
    else:
        path = source = write_jsonl(tmp_path / "pairs.jsonl.gz", rows)
    if kind == "own":
        source = stream_of(Dataset.from_list(rows).to_iterable_dataset(num_shards=3).shuffle(seed=1, buffer_size=8))
    expected = in_memory(path, tokenizer)[0].dataset.to_list()
    found = [row for batch in batches(stream(source, tokenizer, batch_size=7), 3) for row in batch]
    assert found != expected  # shuffled
    assert by_id(found) == expected


def test_a_dataset_of_ones_own_is_read_by_mapping_and_layout_and_only_as_far_as_it_is_used(tokenizer):
    def rows():
        for n in range(2000):
            assert n < 1000, "read ahead without bound"
            yield {"question": f"Fruit {n}?", "chosen": f"Fruit {n}? Apple.", "rejected": f"Fruit {n}? No."}

    own = IterableDataset.from_generator(rows).shuffle(seed=0, buffer_size=8)
    source = stream_of(own, {"prompt": "question"})
    assert source.readings["train_dataset"]["columns"]["prompt"] == "question"
    (found,) = batches(stream(source, tokenizer), 1)
    text = tokenizer.decode(found[0]["chosen_input_ids"])
    assert text.count("Fruit") == 1 and "Apple" in text and found[0]["id"].startswith("train_dataset/")
    with pytest.raises(InputError, match="columns names 'query' for 'prompt', which no row has"):
        stream_of(own, {"prompt": "query"})
    with pytest.raises(InputError, match="split over processes already"):
        stream_of(split_dataset_by_node(own, 0, 2))


@pytest.mark.parametrize("sizes", [(20,), (13, 0, 1, 6), (1,)], ids=["one file", "uneven and empty", "one row"])
def test_order_depends_on_seed_and_epoch_and_not_on_workers(sizes, tmp_path, tokenizer):
    folder, total, count = write_parquet(tmp_path / "data", sizes), sum(sizes), 15  # three epochs of 20 rows
    plain = ids(batches(stream(folder, tokenizer), count))
    assert ids(batches(stream(folder, tokenizer, workers=3), count)) == plain
    epochs = [plain[start : start + total] for start in range(0, 4 * count, total)]
    assert all(set(one) == set(plain) and len(set(one)) == total for one in epochs)
    if total > 1:
        assert epochs[0] != epochs[1] != epochs[2]
        other = ids(batches(stream(opened(folder, seed=1), tokenizer), count))
        assert other != plain and sorted(other) == sorted(plain)


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_divide_the_batches_of_one_process(workers, tmp_path, tokenizer):
    folder = write_parquet(tmp_path / "data", (13, 0, 1, 6, 11))
    whole = batches(stream(folder, tokenizer), 12)
    for process in range(3):
        own = batches(stream(folder, tokenizer, workers=workers, process=process, processes=3), 4)
        assert own == whole[process::3]


def test_a_buffer_of_one_keeps_the_order_of_a_file_and_a_larger_one_mixes_sources(tmp_path, tokenizer):
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", [pair(n) for n in range(10)]) for name in "ab"]
    found = ids(batches(stream(opened(*paths, buffer=1), tokenizer), 5))
    assert {tuple(found[:10]), tuple(found[10:])} == {tuple(f"{name}/{n}" for n in range(1, 11)) for name in "ab"}
    mixed = ids(batches(stream(opened(*paths, buffer=20), tokenizer), 5))
    assert sorted(mixed) == sorted(found) and len({name[0] for name in mixed[:8]}) == 2


BAD = [pair(0), pair(1, chosen=""), '{"prompt": ', *(pair(n) for n in range(2, 8)), pair(9, rejected=None)]


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_row_is_refused_with_file_and_row_as_in_memory(workers, tmp_path, tokenizer):
    for row in BAD[1:3]:
        path = write_jsonl(tmp_path / "pairs.jsonl", [pair(0), row, pair(1)])
        with pytest.raises(BadRow) as expected:
            load_preferences(path)
        with pytest.raises(BadRow) as found:
            batches(stream(path, tokenizer, workers=workers), 2)
        assert str(found.value) == str(expected.value) and "row 2" in str(found.value)


@pytest.mark.parametrize("workers", [0, 3])
def test_skipped_rows_are_counted_and_listed_and_batches_are_full(workers, tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "pairs.jsonl", BAD)
    expected, loaded = in_memory(path, tokenizer, on_bad_row="skip")
    encoded = stream(path, tokenizer, batch_size=3, workers=workers, on_bad_row="skip")
    found = batches(encoded, 30)
    assert all(len(batch) == 3 for batch in found)
    assert {row["id"]: row for batch in found for row in batch} == {row["id"]: row for row in expected.dataset}
    counts = encoded.counts
    assert sorted(counts.bad_rows) == sorted(str(bad) for bad in loaded.bad_rows)
    assert counts.pairs == 90
    if not workers:
        # 90 pairs of 7 an epoch: 12 epochs with 3 bad rows each, then part of the 13th.
        assert counts.passes == 13 and 36 <= counts.num_bad_rows <= 39


@pytest.mark.parametrize("overlong", ["drop", "truncate_prompt"])
def test_overlong_pairs_are_treated_and_counted_as_in_memory(overlong, tmp_path, tokenizer):
    rows = [pair(n, prompt="Name a fruit" + " please" * (n % 4 * 8)) for n in range(12)]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    expected, _ = in_memory(path, tokenizer, max_length=90, overlong=overlong)
    assert 0 < expected.counts["overlong"] < 12
    encoded = stream(path, tokenizer, batch_size=len(expected.dataset), max_length=90, overlong=overlong)
    (found,) = batches(encoded, 1)
    assert by_id(found) == by_id(expected.dataset)
    counts = encoded.counts
    assert counts.truncated == expected.counts["truncated"]
    assert counts.dropped <= expected.counts["dropped"] and counts.overlong == counts.dropped + counts.truncated
    with pytest.raises(BadRow, match=r"pairs\.jsonl, row \d+: \d+ tokens, over max_length 90"):
        batches(stream(path, tokenizer, batch_size=12, max_length=90), 1)


def test_data_without_a_usable_row_ends(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "pairs.jsonl", [pair(n, chosen="") for n in range(5)])
    for workers in (0, 2):
        with pytest.raises(InputError, match=r"none of the \d+ pairs can be used, .*row \d+: 'chosen' is empty"):
            batches(stream(path, tokenizer, workers=workers, on_bad_row="skip"), 1)
    path = write_jsonl(tmp_path / "long.jsonl", [pair(0)])
    with pytest.raises(InputError, match=r"max_length: 3 leaves none of the \d+ pairs"):
        batches(stream(path, tokenizer, max_length=3, overlong="drop"), 1)
    (tmp_path / "blank.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match="no rows in"):
        batches(stream(tmp_path / "blank.jsonl", tokenizer), 1)


@pytest.mark.parametrize(
    ("options", "workers"),
    [
        ({}, 0),
        ({"on_bad_row": "skip"}, 0),
        ({"max_length": 30, "overlong": "drop"}, 0),
        ({"max_length": 30, "overlong": "drop"}, 2),
        ({"max_length": 30, "on_bad_row": "skip"}, 0),  # which rows are bad shows only in their tokens
        ({"max_length": 30, "on_bad_row": "skip"}, 2),
    ],
    ids=["all", "skip", "drop", "drop, workers", "skip over-long", "skip over-long, workers"],
)
def test_a_resumed_stream_encodes_only_the_rest_and_is_exact(options, workers, tmp_path, tokenizer, monkeypatch):
    rows = [pair(n, chosen="" if n % 5 == 0 and "on_bad_row" in options else f"Apple {n}.") for n in range(1, 40)]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    whole = stream(path, tokenizer, workers=workers, **options)
    expected = batches(whole, 25)
    assert whole.counts.passes > 2 and bool(whole.counts.dropped) == ("overlong" in options)
    assert bool(whole.counts.overlong) == ("max_length" in options)
    encoded = []
    plain = streaming.encode_columns

    def counting(batch, *args, **kwargs):
        encoded.extend(batch["row"])
        return plain(batch, *args, **kwargs)

    monkeypatch.setattr(streaming, "encode_columns", counting)
    for done in (1, 13):
        cut = stream(path, tokenizer, workers=workers, **options)
        batches(cut, done)
        cut.save(tmp_path)
        resumed = stream(path, tokenizer, workers=workers, **options)
        resumed.load(tmp_path)
        encoded.clear()
        assert batches(resumed, 25 - done) == expected[done:] and resumed.counts == whole.counts
        if not options and not workers:
            assert len(encoded) == 4 * (25 - done)


def test_a_stream_resumed_with_other_workers_is_the_same_or_refused(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "pairs.jsonl", [pair(n) for n in range(23)])
    expected = batches(stream(path, tokenizer), 12)
    cut = stream(path, tokenizer, workers=3)
    batches(cut, 4)
    cut.save(tmp_path)
    resumed = stream(path, tokenizer, workers=2)
    resumed.load(tmp_path)
    assert batches(resumed, 8) == expected[4:]
    with pytest.raises(InputError, match=r"dataloader_num_workers: 3 in .*, now 2"):
        stream(path, tokenizer, workers=2, on_bad_row="skip").load(tmp_path)
    with pytest.raises(InputError, match=r"holds no place in a stream .*another version"):
        stream(path, tokenizer).load(tmp_path / "other")


def _append(path):
    with path.open("a") as file:
        file.write(json.dumps(pair(99)) + "\n")


@pytest.mark.parametrize(
    "change",
    [
        _append,
        lambda path: path.write_text(path.read_text().replace("apple 3", "grape 3")),
        lambda path: path.rename(path.with_name("other.jsonl")),
        lambda path: write_jsonl(path.with_name("more.jsonl"), [pair(50)]),
    ],
    ids=["longer", "a word", "renamed", "another file"],
)
def test_fingerprint_changes_with_the_files(change, tmp_path):
    (tmp_path / "data").mkdir()
    path = write_jsonl(tmp_path / "data" / "pairs.jsonl", [pair(n) for n in range(8)])
    before = opened(tmp_path / "data").fingerprints
    assert opened(tmp_path / "data").fingerprints == before
    change(path)
    assert opened(tmp_path / "data").fingerprints != before


def test_fingerprint_sees_the_ends_of_a_large_file_and_samples_between(tmp_path):
    path = tmp_path / "pairs.jsonl"
    content = bytearray(json.dumps(pair(0)).encode() + b" " * (3 << 20) + b"\n")
    found = set()
    for place in (None, 20, len(content) - 20, (len(content) - (1 << 16)) * 7 // 15 + 5):
        changed = bytearray(content)
        if place is not None:
            changed[place] ^= 1
        path.write_bytes(changed)
        found.add(opened(path).fingerprints[str(path)])
    assert len(found) == 4


def test_sources_that_cannot_be_read_are_refused(tmp_path, monkeypatch):
    """How files and folders are found is tested where it is done (tests/data)."""
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "splits").mkdir()
    for name in ("train-0.jsonl", "test-0.jsonl"):
        write_jsonl(tmp_path / "splits" / name, [pair(0)])
    write_parquet(tmp_path / "none", (0,))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name, message in (
        ("nowhere.jsonl", "no such file or folder"), ("bad.parquet", "not a readable Parquet file"),
        ("empty.jsonl", "the file is empty"), ("splits", r"no split was named. Name one: .*\[train\], .*\[test\]"),
        ("none", "no rows"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            opened(tmp_path / name)
    with pytest.raises(InputError, match=r"org/name: no such file or folder, and not found on the Hugging Face Hub"):
        opened("org/name")


@pytest.mark.parametrize("workers", [0, 2])
def test_hub_dataset_is_streamed_and_its_rows_are_named_by_shard(workers, tmp_path, tokenizer, monkeypatch):
    """A local folder stands for a Hub id: no network here. The loader and its shards are the same."""
    folder = write_parquet(tmp_path / "data", (7, 2, 5))
    load = functools.partial(sources.load_hub, str(folder), "train", None, streaming=True)
    monkeypatch.setattr(sources, "load_hub", lambda name, split, revision, **_: load() if revision == "c0" else None)
    monkeypatch.setattr(stream_sources, "_hub_commit", lambda name: "c0")
    hub = opened("org/name[train]")
    assert hub.fingerprints == {"org/name[train]": "c0"}
    found, local = (
        [row for batch in batches(stream(source, tokenizer, 7, workers), 2) for row in batch]
        for source in (hub, folder)
    )
    tokens = [sorted((row["chosen_input_ids"], row["rejected_input_ids"]) for row in rows) for rows in (found, local)]
    assert len(found) == 14 and tokens[0] == tokens[1]
    pq.write_table(pa.Table.from_pylist([pair(1), pair(2, chosen="")]), folder / "part-1.parquet")
    with pytest.raises(BadRow, match=r"org/name\[train\], shard 2 of 3, row 2: 'chosen' is empty"):
        batches(stream(opened("org/name[train]"), tokenizer), 4)


def settings(*data, **changes):
    values = {"model": "unused", "output_dir": "unused", "streaming": True, "max_steps": 8, "shuffle_buffer": 6}
    return RewardTrainingArguments(**values | {"data": tuple(map(str, data))} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": -1}, "streaming needs max_steps, because the number of pairs is not known"),
        ({"objective": "prioritized"}, "objective 'prioritized' does not go with streaming: it draws prompts"),
        ({"augmentation": "rrm"}, "augmentation 'rrm' does not go with streaming"),
        ({"train_sampling_strategy": "group_by_length"}, "group_by_length does not go with streaming"),
        ({"max_pairs_per_source": 5}, "max_pairs_per_source does not go with streaming"),
        ({"shuffle_buffer": 0}, "shuffle_buffer must be a finite number of at least 1"),
    ],
)
def test_what_needs_all_the_data_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        settings("data", **changes)


@pytest.fixture
def run_settings(causal_lm_dir, tmp_path):
    write_parquet(tmp_path / "data", (17, 0, 5, 9))
    return settings(
        tmp_path / "data", model=str(causal_lm_dir("llama")), output_dir=str(tmp_path / "run"), latent_dim=8,
        learning_rate=1e-3, max_steps=8, per_device_train_batch_size=3, gradient_accumulation_steps=2,
        logging_steps=1, save_steps=3, use_cpu=True, lr_scheduler_type="linear",
    )  # fmt: skip


def losses(result):
    return [line["loss"] for line in result["log_history"] if "loss" in line]


def weights(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder).state_dict()


def test_a_streamed_run_learns_what_a_run_in_memory_learns(run_settings, tmp_path):
    """One batch holds all the data, so order does not matter."""
    config = dataclasses.replace(
        run_settings,
        max_steps=2,
        per_device_train_batch_size=31,
        gradient_accumulation_steps=1,
        architecture="standard",
    )
    streamed = train(config)
    files = tuple(str(path) for path in sorted((tmp_path / "data").iterdir()) if "part-1" not in path.name)
    memory = train(dataclasses.replace(config, streaming=False, data=files, output_dir=str(tmp_path / "memory")))
    assert losses(streamed) == pytest.approx(losses(memory), abs=1e-5)
    assert streamed["train_pairs"] == {
        "pairs": 62, "overlong": 0, "dropped": 0, "truncated": 0, "num_bad_rows": 0, "passes": 2, "bad_rows": [],
        "num_not_as_written": 0, "not_as_written": [],
        "reading": {str(tmp_path / "data"): {
            "columns": {name: name for name in ("prompt", "chosen", "rejected")}, "layouts": {},
            "unread_columns": {},
        }},
    }  # fmt: skip


# The 48 pairs of 8 steps reach into the second pass over the 31 rows; the cut comes after 36 of them.
@pytest.mark.slow
@pytest.mark.parametrize(("workers", "on_bad_row"), [(0, "error"), (2, "error"), (2, "skip")])
def test_resumed_run_equals_the_uninterrupted_one(run_settings, workers, on_bad_row, tmp_path, train_and_kill):
    if on_bad_row == "skip":
        pq.write_table(
            pa.Table.from_pylist([pair(40), pair(41, chosen=""), pair(42)]), tmp_path / "data" / "z.parquet"
        )
    whole = dataclasses.replace(run_settings, dataloader_num_workers=workers, on_bad_row=on_bad_row)
    expected = train(whole)
    cut = dataclasses.replace(whole, output_dir=str(tmp_path / "cut"))
    train_and_kill(cut, step=6)
    resumed = train(cut)
    assert resumed["resumed_from_step"] == 6
    assert resumed["log_history"][:-1] == expected["log_history"][:-1]  # the last line has run times
    assert resumed["train_pairs"] == expected["train_pairs"] and expected["train_pairs"]["passes"] == 2
    assert bool(expected["train_pairs"]["bad_rows"]) == (on_bad_row == "skip")
    first, second = weights(whole.output_dir), weights(cut.output_dir)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_changed_file_and_changed_workers_are_refused_on_resume(run_settings, tmp_path):
    config = dataclasses.replace(run_settings, max_steps=1, save_steps=1, on_bad_row="skip")
    train(config)
    (tmp_path / "run" / "train_result.json").unlink()  # as if killed before the end
    with pytest.raises(InputError, match=r"dataloader_num_workers: 1 in .*checkpoint-1, now 2"):
        train(dataclasses.replace(config, dataloader_num_workers=2))
    write = pa.Table.from_pylist([pair(n + 1) for n in range(17)])
    pq.write_table(write, tmp_path / "data" / "part-0.parquet", row_group_size=4)
    with pytest.raises(InputError, match="other settings or data"):
        train(config)


def test_bad_row_met_by_a_worker_stops_the_run_with_its_place(run_settings, tmp_path):
    pq.write_table(pa.Table.from_pylist([pair(40), pair(41, chosen="")]), tmp_path / "data" / "z.parquet")
    with pytest.raises(BadRow, match=r"z\.parquet, row 2: 'chosen' is empty"):
        train(dataclasses.replace(run_settings, dataloader_num_workers=1))


def test_a_quantized_run_on_a_stream_says_what_full_precision_changes(run_settings):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    result = train(dataclasses.replace(run_settings, load_in_4bit=True, lora_r=2, dataloader_num_workers=0))
    assert result["quantization"]["num_responses"] == 32
    assert 0 < result["quantization"]["reward_difference_max"] < 10 * result["quantization"]["reward_std"]
