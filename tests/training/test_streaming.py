"""Streamed pairs: those of the path in memory, each once a pass, for any number of readers; exact continuation."""

import dataclasses
import gzip
import itertools
import json
from collections import Counter

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from inform_rm.training.stream_sources import hub_shards, open_stream
from transformers import AutoModelForSequenceClassification

from inform_rm.data.encoding import encode_pairs
from inform_rm.data.pairs import BadRow
from inform_rm.data.preferences import load_preferences
from inform_rm.errors import InputError
from inform_rm.training.reward_arguments import RewardTrainingArguments
from inform_rm.training.run import train
from inform_rm.training.streaming import PairStream, StreamCounts


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
    """Files of these numbers of rows, numbered through, and their paths."""
    folder.mkdir()
    start, paths = 0, []
    schema = pa.schema([(name, pa.string()) for name in ("prompt", "chosen", "rejected")])
    for number, size in enumerate(sizes):
        rows = [pair(index) for index in range(start, start + size)]
        paths.append(folder / f"part-{number}.parquet")
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), paths[-1], row_group_size=row_group_size)
        start += size
    return paths


def settings(*data, **changes):
    values = {"model": "unused", "output": "unused", "streaming": True, "max_steps": 8, "shuffle_buffer": 6}
    return RewardTrainingArguments(**values | {"data": tuple(map(str, data))} | changes)


def stream(config, tokenizer, batch_size=4, **place):
    return PairStream(
        open_stream(config).shards, config, tokenizer, batch_size=batch_size, collate=lambda pairs: {"pairs": pairs},
        **place,
    )  # fmt: skip


def batches(pair_stream, count, workers=0):
    loader = torch.utils.data.DataLoader(pair_stream, batch_size=None, collate_fn=lambda x: x, num_workers=workers)
    found = list(itertools.islice(loader, count))
    for item in found:
        if "error" in item:
            raise item["error"]
    return found


def ids(found):
    return [row["id"] for item in found for row in item["pairs"]]


def in_memory(path, tokenizer, **options):
    loaded = load_preferences(path, on_bad_row=options.pop("on_bad_row", "error"))
    return encode_pairs(loaded.dataset, tokenizer, **{"max_length": None, **options}), loaded


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet"])
def test_rows_and_tokens_are_those_of_the_path_in_memory(suffix, tmp_path, tokenizer):
    if suffix == "parquet":
        (path,) = write_parquet(tmp_path / "one", [21])
    else:
        path = write_jsonl(tmp_path / f"pairs.{suffix}", [pair(n, margin=n / 2) for n in range(21)])
    expected = in_memory(path, tokenizer)[0].dataset.to_list()
    found = [row for item in batches(stream(settings(path), tokenizer, batch_size=7), 3) for row in item["pairs"]]
    assert found != expected  # shuffled
    assert sorted(found, key=lambda row: row["id"]) == sorted(expected, key=lambda row: row["id"])


def test_messages_in_parquet_are_read_as_in_memory(tmp_path, tokenizer):
    turns = [{"role": "user", "content": "Name a fruit."}, {"role": "assistant", "content": "Which?"}]
    rows = [{**pair(n), "prompt": [*turns, {"role": "user", "content": f"Fruit {n}."}]} for n in range(5)]
    path = tmp_path / "pairs.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    (found,) = batches(stream(settings(path), tokenizer, batch_size=5), 1)
    expected = in_memory(path, tokenizer)[0].dataset.to_list()
    assert sorted(found["pairs"], key=lambda row: row["id"]) == expected


@pytest.mark.parametrize("sizes", [(20,), (13, 0, 1, 6), (1,)], ids=["one file", "uneven and empty", "one row"])
def test_order_depends_on_seed_and_pass_and_not_on_workers(sizes, tmp_path, tokenizer):
    write_parquet(tmp_path / "data", sizes)
    config = settings(tmp_path / "data")
    total, count = sum(sizes), 15  # three passes of 20 rows
    plain = ids(batches(stream(config, tokenizer), count))
    for workers in (1, 3):
        assert ids(batches(stream(config, tokenizer), count, workers)) == plain
    passes = [plain[start : start + total] for start in range(0, 4 * count, total)]
    assert all(set(one) == set(plain) and len(set(one)) == total for one in passes)
    if total > 1:
        assert passes[0] != passes[1] != passes[2]
        other = ids(batches(stream(dataclasses.replace(config, seed=1), tokenizer), count))
        assert other != plain and Counter(other) == Counter(plain)


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_divide_the_batches_of_one_process(workers, tmp_path, tokenizer):
    write_parquet(tmp_path / "data", (13, 0, 1, 6, 11))
    config = settings(tmp_path / "data")
    whole = [ids([item]) for item in batches(stream(config, tokenizer), 12)]
    for process in range(3):
        place = {"process_index": process, "num_processes": 3}
        own = [ids([item]) for item in batches(stream(config, tokenizer, **place), 4, workers)]
        assert own == whole[process::3]


def test_a_buffer_of_one_keeps_the_order_of_a_file(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "pairs.jsonl", [pair(n) for n in range(8)])
    assert ids(batches(stream(settings(path, shuffle_buffer=1), tokenizer), 2)) == [f"pairs/{n}" for n in range(1, 9)]


def test_several_sources_are_mixed(tmp_path, tokenizer):
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", [pair(n) for n in range(10)]) for name in "ab"]
    found = ids(batches(stream(settings(*paths, shuffle_buffer=20), tokenizer), 5))
    assert len(set(found)) == 20 and len({name[0] for name in found[:8]}) == 2


BAD = [pair(0), pair(1, chosen=""), '{"prompt": ', *(pair(n) for n in range(2, 8)), pair(9, rejected=None)]


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_row_is_refused_with_file_and_row_as_in_memory(workers, tmp_path, tokenizer):
    for row in BAD[1:3]:
        path = write_jsonl(tmp_path / "pairs.jsonl", [pair(0), row, pair(1)])
        with pytest.raises(BadRow) as expected:
            load_preferences(path)
        with pytest.raises(BadRow) as found:
            batches(stream(settings(path), tokenizer), 2, workers)
        assert str(found.value) == str(expected.value) and "row 2" in str(found.value)


@pytest.mark.parametrize("workers", [0, 3])
def test_skipped_rows_are_counted_and_listed_and_batches_are_full(workers, tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "pairs.jsonl", BAD)
    expected, loaded = in_memory(path, tokenizer, on_bad_row="skip")
    config = settings(path, on_bad_row="skip")
    found = batches(stream(config, tokenizer, batch_size=3), 30, workers)
    assert all(len(item["pairs"]) == 3 for item in found)
    assert {row["id"]: row for item in found for row in item["pairs"]} == {
        row["id"]: row for row in expected.dataset.to_list()
    }
    total = StreamCounts()
    for item in found:
        total.add(item["stream_counts"])
    assert sorted(total.bad_rows) == sorted(str(bad) for bad in loaded.bad_rows)
    assert total.pairs == 90
    if not workers:
        # 90 pairs of 7 a pass: 12 passes with 3 bad rows each, then part of the 13th.
        assert total.passes == 13 and 36 <= total.num_bad_rows <= 39


@pytest.mark.parametrize("overlong", ["drop", "truncate_prompt"])
def test_overlong_pairs_are_treated_and_counted_as_in_memory(overlong, tmp_path, tokenizer):
    rows = [pair(n, prompt="Name a fruit" + " please" * (n % 4 * 8)) for n in range(12)]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    expected, _ = in_memory(path, tokenizer, max_length=90, overlong=overlong)
    assert 0 < expected.counts["overlong"] < 12
    config = settings(path, max_length=90, overlong=overlong)
    size = len(expected.dataset)
    (found,) = batches(stream(config, tokenizer, batch_size=size), 1)
    assert sorted(found["pairs"], key=lambda row: row["id"]) == sorted(expected.dataset, key=lambda row: row["id"])
    counts = found["stream_counts"]
    assert counts.truncated == expected.counts["truncated"]
    assert counts.dropped <= expected.counts["dropped"] and counts.overlong == counts.dropped + counts.truncated
    with pytest.raises(BadRow, match=r"pairs\.jsonl, row \d+: \d+ tokens, over max_length 90"):
        batches(stream(settings(path, max_length=90), tokenizer, batch_size=12), 1)


def test_data_without_a_usable_row_ends(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "pairs.jsonl", [pair(n, chosen="") for n in range(5)])
    for workers in (0, 2):
        with pytest.raises(InputError, match=r"none of \d+ rows can be used. .*row \d+: 'chosen' is empty"):
            batches(stream(settings(path, on_bad_row="skip"), tokenizer), 1, workers)
    with pytest.raises(InputError, match="all are over max_length 3"):
        path = write_jsonl(tmp_path / "long.jsonl", [pair(0)])
        batches(stream(settings(path, max_length=3, overlong="drop"), tokenizer), 1)
    (tmp_path / "blank.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match="no rows in"):
        batches(stream(settings(tmp_path / "blank.jsonl"), tokenizer), 1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"on_bad_row": "skip"},
        {"max_length": 30, "overlong": "drop"},
        {"max_length": 30, "on_bad_row": "skip"},  # which rows are bad shows only in their tokens
    ],
    ids=["all", "skip", "drop", "skip over-long"],
)
def test_skipped_batches_are_followed_by_the_right_ones(options, workers, tmp_path, tokenizer):
    rows = [pair(n, chosen="" if n % 5 == 0 and "on_bad_row" in options else f"Apple {n}.") for n in range(1, 40)]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    config = settings(path, **options)
    whole = batches(stream(config, tokenizer), 20, workers)
    if options.get("overlong"):
        assert sum(item["stream_counts"].dropped for item in whole)
    elif options.get("max_length"):
        assert any("over max_length 30" in text for item in whole for text in item["stream_counts"].bad_rows)
    for skipped in (1, 13):
        late = stream(config, tokenizer)
        late.skip_batches = skipped
        found = batches(late, 20, workers)
        assert found[:skipped] == [{}] * skipped and found[skipped:] == whole[skipped:]


def test_skipping_encodes_nothing(tmp_path, tokenizer):
    write_parquet(tmp_path / "data", (30,))
    config = settings(tmp_path / "data")
    fourth = batches(stream(config, tokenizer), 4)[3]

    class Once:
        """Lets a single batch be encoded."""

        chat_template, bos_token_id = tokenizer.chat_template, tokenizer.bos_token_id
        calls = 0

        def apply_chat_template(self, *args, **kwargs):
            self.calls += 1
            return tokenizer.apply_chat_template(*args, **kwargs)

        def __call__(self, *args, **kwargs):
            return tokenizer(*args, **kwargs)

    counting = Once()
    late = stream(config, counting)
    late.skip_batches = 3
    assert batches(late, 4)[3] == fourth
    assert counting.calls == 2  # the prompts of one batch, and its conversations


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
    folder = tmp_path / "data"
    folder.mkdir()
    path = write_jsonl(folder / "pairs.jsonl", [pair(n) for n in range(8)])
    config = settings(folder)
    before = open_stream(config).fingerprints
    assert open_stream(config).fingerprints == before
    change(path)
    assert open_stream(config).fingerprints != before


def test_fingerprint_sees_the_ends_of_a_large_file_and_samples_between(tmp_path):
    path = tmp_path / "pairs.jsonl"
    content = bytearray(json.dumps(pair(0)).encode() + b" " * (3 << 20) + b"\n")
    found = set()
    for place in (None, 20, len(content) - 20, (len(content) - (1 << 16)) * 7 // 15 + 5):
        changed = bytearray(content)
        if place is not None:
            changed[place] ^= 1
        path.write_bytes(changed)
        found.add(open_stream(settings(path)).fingerprints[str(path)])
    assert len(found) == 4


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train-0.jsonl", "test-0.jsonl"], r"no split was named. Name one: .*data\[train\], .*data\[test\]"),
        (
            ["train/a.jsonl", "validation/a.jsonl"],
            r"no split was named. Name one: .*data\[train\], .*data\[validation\]",
        ),
        (["a.jsonl", "b.csv"], r"b.csv belongs to no split .*Name the files to read"),
        (["notes.txt"], "no data in this folder"),
        (["state.json"], r"save_to_disk cannot be streamed"),
    ],
)
def test_folders_of_which_it_is_not_clear_what_to_read_are_refused(names, message, tmp_path):
    for name in names:
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(path, [pair(0)])
    with pytest.raises(InputError, match=message):
        open_stream(settings(tmp_path / "data"))


def test_missing_empty_and_damaged_sources_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        open_stream(settings("/nowhere.jsonl"))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(InputError, match="the file is empty"):
        open_stream(settings(tmp_path / "empty.jsonl"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match="not a readable Parquet file"):
        open_stream(settings(tmp_path / "bad.parquet"))
    write_parquet(tmp_path / "none", (0,))
    with pytest.raises(InputError, match="no rows"):
        open_stream(settings(tmp_path / "none"))


def test_hub_id_that_cannot_be_reached_is_refused(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"org/name: no such file or folder, and not found on the Hugging Face Hub"):
        open_stream(settings("org/name"))


@pytest.mark.parametrize("workers", [0, 2])
def test_hub_dataset_is_streamed_shard_by_shard(workers, tmp_path, tokenizer):
    """A local folder stands for a Hub id: no network here. The loader and its shards are the same."""
    write_parquet(tmp_path / "data", (7, 2, 5))
    config = settings("org/name")
    shards = hub_shards(str(tmp_path / "data"), None)
    assert [shard.label for shard in shards] == [f"{tmp_path / 'data'}, shard {n} of 3" for n in (1, 2, 3)]
    hub = PairStream(shards, config, tokenizer, batch_size=7, collate=lambda pairs: {"pairs": pairs})
    found = [row for item in batches(hub, 2, workers) for row in item["pairs"]]
    local = [row for item in batches(stream(settings(tmp_path / "data"), tokenizer, 7), 2) for row in item["pairs"]]
    tokens = [sorted((row["chosen_input_ids"], row["rejected_input_ids"]) for row in rows) for rows in (found, local)]
    assert len(found) == 14 and tokens[0] == tokens[1]


def test_bad_row_of_a_hub_dataset_is_named_by_its_shard(tmp_path, tokenizer):
    write_parquet(tmp_path / "data", (3, 3))
    rows = [pair(1), pair(2, chosen="")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / "part-1.parquet")
    shards = hub_shards(str(tmp_path / "data"), None)
    hub = PairStream(shards, settings("org/name"), tokenizer, batch_size=5, collate=lambda pairs: {"pairs": pairs})
    with pytest.raises(BadRow, match=r"data, shard 2 of 2, row 2: 'chosen' is empty"):
        batches(hub, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": -1}, "streaming needs max_steps, because the number of pairs is not known"),
        ({"objective": "prioritized"}, "objective 'prioritized' does not go with streaming: it draws prompts"),
        ({"augmentation": "rrm"}, "augmentation 'rrm' does not go with streaming"),
        ({"group_by_length": True}, "group_by_length does not go with streaming"),
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
        "num_partly_rendered": 0, "partly_rendered": [],
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


def test_changed_file_and_changed_readers_are_refused_on_resume(run_settings, tmp_path):
    config = dataclasses.replace(run_settings, max_steps=1, save_steps=1, on_bad_row="skip")
    train(config)
    (tmp_path / "run" / "train_result.json").unlink()  # as if killed before the end
    with pytest.raises(InputError, match=r"other settings or data .*1 processes, 0 workers.*1 processes, 2 workers"):
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
