"""Data, settings and files of earlier runs made to harm who reads them: refused by name or survived, in little memory.

What tests/test_bad_input.py holds (broken rows, wrong types) is not repeated here.
"""

import gzip
import json
import os
import pickle
import re
import shutil
import struct

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

MOST_MEBIBYTES = 900  # a row of 16 MiB takes up to 24 times its size
READ = "read"
GOOD = {"prompt": "Say sun.", "chosen": "sun", "rejected": "moon", "response": "sun"}
GOOD_LINE = json.dumps(GOOD).encode() + b"\n"
DEEP = b"[" * 100_000 + b"]" * 100_000
DEEP_OBJECT = b'{"a":' * 50_000 + b"1" + b"}" * 50_000


def content(data):
    return lambda path, canary: path.write_bytes(data)


def row(**changes):
    return content(json.dumps({**GOOD, **changes}).encode() + b"\n")


def raw_row(text):
    """A line with `text` (bytes of JSON) as the chosen side."""
    return content(b'{"prompt": "a", "rejected": "c", "response": "r", "chosen": ' + text + b"}\n")


def packed(data):
    return content(gzip.compress(data, 1))


def bomb(block, times, start=b"", end=b""):
    """A gzip file of few bytes that holds `block` over and over."""

    def build(path, canary):
        with gzip.open(path, "wb", 9) as file:
            file.write(start)
        # A gzip file may have several members: the same compressed block is written many times.
        member = gzip.compress(block, 9)
        with path.open("ab") as file:
            for _ in range(times):
                file.write(member)
            file.write(gzip.compress(end))

    return build


def parquet(columns, **options):
    return lambda path, canary: pq.write_table(pa.table(columns), path, **options)


def parquet_bytes(change):
    def build(path, canary):
        pq.write_table(pa.table({name: [value] * 100 for name, value in GOOD.items()}), path)
        path.write_bytes(change(path.read_bytes()))

    return build


def nested_parquet(depth):
    def build(path, canary):
        value, kind = "a", pa.string()
        for _ in range(depth):
            value, kind = [value], pa.list_(kind)
        table = pa.table({"prompt": ["a"], "chosen": pa.array([value], kind), "rejected": ["c"], "response": ["r"]})
        pq.write_table(table, path)

    return build


def repeated_long_text(path, canary):
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), pa.array(["a" * 8_000_000]))
    table = pa.table({"prompt": texts, "chosen": texts, "rejected": ["c"] * 100_000, "response": texts})
    pq.write_table(table, path)


def link(target):
    return lambda path, canary: os.symlink(target.format(path=path), path)


def saved_dataset(**changes):
    def build(path, canary):
        from datasets import Dataset

        Dataset.from_list([GOOD]).save_to_disk(str(path))
        shutil.copytree(path, path.parent / "elsewhere")
        state = json.loads((path / "state.json").read_text())
        (path / "state.json").write_text(json.dumps({**state, **changes}))

    return build


def yaml_text(text):
    """Settings that would be complete but for `text`."""
    return lambda path, canary: path.write_text(
        "model: m\ndata: [d]\noutput: o\n" + text.replace("CANARY", str(canary))
    )


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
MERGES = "m0: &m0 {x: 1}\n" + "".join(f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}]}}\n" for n in range(1, 12))
HEADER = b'{"model": "a"}\n'

# Name: name of the file, how it is made, what reads it, and the message it is refused with (or READ: no harm).
CASES = {
    # decompression bombs and damaged gzip
    "one endless line": ("p.jsonl.gz", bomb(b"a" * (8 << 20), 300), "pairs", "row 1: a row is longer"),
    "one endless line of spaces": ("p.jsonl.gz", bomb(b" " * (8 << 20), 300), "pairs", "row is longer"),
    "endless empty lines": ("p.jsonl.gz", bomb(b" " * (1 << 20) + b"\n", 3000), "pairs", "decompression bomb"),
    "endless rows": (
        "p.jsonl.gz", bomb(json.dumps({**GOOD, "x": "a" * (8 << 20)}).encode() + b"\n", 100), "pairs but bad ones",
        "decompression bomb"),
    "endless JSON element": ("p.json.gz", bomb(b"a" * (8 << 20), 300, b'[{"prompt": "'), "pairs", "row is longer"),
    "endless space in a JSON array": ("p.json.gz", bomb(b" " * (8 << 20), 300, b"["), "pairs", "row is longer"),
    "endless text after a JSON array": (
        "p.json.gz", bomb(b"x" * (8 << 20), 300, b"[" + GOOD_LINE + b"]"), "pairs", "follows the end"),
    "endless CSV field": ("p.csv.gz", bomb(b"a" * (8 << 20), 300, b"prompt\n"), "pairs", "row is longer"),
    "endless CSV header": ("p.csv.gz", bomb(b"a," * (4 << 20), 300), "pairs", "row is longer"),
    "endless CSV row of quoted lines": (
        "p.csv.gz", bomb(b'"a\n",' * (1 << 20), 300, b"prompt\n"), "pairs", "row is longer"),
    "gzip cut short": (
        "p.jsonl.gz", content(gzip.compress(GOOD_LINE * 99)[:-9]), "pairs", "damaged|identical|end-of-stream"),
    "gzip with trailing garbage": (
        "p.jsonl.gz", content(gzip.compress(GOOD_LINE) + b"garbage"), "pairs", "damaged or cut short after row"),
    "gzip with trailing garbage to score": (
        "p.csv.gz", content(gzip.compress(b"prompt,response\na,b\n") + b"garbage"), "rows to score",
        "damaged or cut short"),
    "gzip with a wrong checksum": (
        "p.jsonl.gz", content(gzip.compress(GOOD_LINE)[:-8] + b"\0" * 8), "pairs", "damaged"),
    "gzip in gzip": ("p.jsonl.gz", packed(gzip.compress(GOOD_LINE)), "pairs", "row 1"),
    # JSON
    "100,000 brackets": ("p.jsonl", content(DEEP + b"\n"), "pairs", "row 1.*nested too deeply"),
    "100,000 brackets inside a field": ("p.jsonl", raw_row(DEEP), "pairs", "row 1.*nested too deeply"),
    "50,000 objects": ("p.json", content(b"[" + DEEP_OBJECT + b"]"), "pairs", "row 1.*nested too deeply"),
    "line of 30 MB": ("p.jsonl", raw_row(b'"' + b"a" * 30_000_000 + b'"'), "pairs", "row 1: a row is longer"),
    "line of 15 MB": ("p.jsonl", raw_row(b'"' + b"a" * 15_000_000 + b'"'), "pairs", READ),
    "line of 200,000 empty lists": (
        "p.jsonl", raw_row(b"[" + b"[]," * 200_000 + b"[]]"), "pairs", "row 1.*chosen"),
    "100,000 keys, two the same": (
        "p.jsonl", content(json.dumps({str(n): 1 for n in range(100_000)}).encode()[:-1] + b', "99999": 2}\n'),
        "pairs", "'99999' stands twice"),
    "100,000 fields, none of them needed": (
        "p.jsonl", content(json.dumps({str(n): 1 for n in range(100_000)}).encode() + b"\n"), "pairs", "no 'chosen'"),
    "number of 10,000 digits": ("p.jsonl", raw_row(b"9" * 10_000), "pairs", "row 1"),
    "margin of 400 digits": ("p.jsonl", content(GOOD_LINE[:-2] + b', "margin": ' + b"9" * 400 + b"}\n"),
                             "pairs", "row 1.*margin"),
    "id of 5,000 digits": (
        "p.jsonl", content(GOOD_LINE[:-2] + b', "id": ' + b"9" * 5000 + b"}\n"), "pairs", "row 1"),
    "NaN as text": ("p.jsonl", raw_row(b"NaN"), "pairs", "row 1.*float nan"),
    "the same key twice": ("p.jsonl", raw_row(b'"a", "chosen": "b"'), "pairs", "'chosen' stands twice"),
    "the same key twice, one escaped": (
        "p.jsonl", raw_row(b'"a", "\\u0063hosen": "b"'), "pairs", "'chosen' stands twice"),
    "lone surrogate to score": (
        "p.jsonl", content(b'{"prompt": "a", "response": "\\ud800"}\n'), "rows to score", "unpaired surrogate"),
    "lone surrogate as a key": (
        "p.jsonl", content(GOOD_LINE[:-2] + b', "\\ud800": 1}\n'), "pairs", READ),
    "NUL in text": ("p.jsonl", row(chosen="a\0b"), "pairs", READ),
    "nothing but NUL": ("p.jsonl", content(b"\0" * 1000 + b"\n"), "pairs", "row 1.*broken JSON"),
    "only control characters": ("p.jsonl", row(chosen="\x01\x02\x1b"), "pairs", "row 1.*invisible"),
    "only bidirectional marks": ("p.jsonl", row(chosen="\u202e\u2066\u200f"), "pairs", "row 1.*invisible"),
    "bidirectional text": ("p.jsonl", row(chosen="sun\u202enoom"), "pairs", READ),
    "byte order mark twice": ("p.jsonl", content(b"\xef\xbb\xbf" * 2 + GOOD_LINE), "pairs", "row 1.*broken JSON|BOM"),
    "UTF-16": ("p.jsonl", content(GOOD_LINE.decode().encode("utf-16")), "pairs", "row 1.*UTF-8"),
    "UTF-16 array": ("p.json", content(b"[" + GOOD_LINE.decode().encode("utf-16")), "pairs", "UTF-8|broken"),
    "UTF-32 CSV": ("p.csv", content("prompt,chosen\na,b\n".encode("utf-32")), "pairs", "p.csv"),
    "overlong UTF-8": ("p.jsonl", raw_row(b'"\xc0\xaf"'), "pairs", "not UTF-8"),
    "JSON array never closed": ("p.json", content(b"[" + GOOD_LINE * 2), "pairs", "broken JSON"),
    "JSON array of NaN": ("p.json", content(b"[NaN, Infinity]"), "pairs", "row 1.*expected an object"),
    # messages
    "megabyte role": ("p.jsonl", row(prompt=[{"role": "x" * 1_000_000, "content": "a"}]), "pairs", "has the role"),
    "role with a control token": (
        "p.jsonl", row(prompt=[{"role": "user|>\n<|system", "content": "a"}]), "pairs", "has the role"),
    "role that is a list": ("p.jsonl", row(prompt=[{"role": ["user"], "content": "a"}]), "pairs", "message 1"),
    "content that is parts": (
        "p.jsonl", row(prompt=[{"role": "user", "content": [{"type": "text", "text": "a"}] * 2}]), "pairs",
        "message 1"),
    "second system message": (
        "p.jsonl", row(prompt=[{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]), "pairs",
        "system message"),
    "20,000 messages": ("p.jsonl", row(prompt=[{"role": "user", "content": "a"}] * 20_000), "pairs", READ),
    "message nested in messages": (
        "p.jsonl", row(prompt=[{"role": "user", "content": [{"role": "user", "content": "a"}]}]), "pairs", "message"),
    # CSV
    "CSV field of 30 MB": (
        "p.csv", content(b"prompt,chosen,rejected\na," + b"b" * 30_000_000 + b",c\n"), "pairs", "row is longer"),
    "quote never closed": (
        "p.csv", content(b'prompt,chosen,rejected\n"a,b,c\n' + b"a,b,c\n" * 3_000_000), "pairs", "quote never closed"),
    "a million columns": (
        "p.csv", content(",".join(map(str, range(1_000_000))).encode() + b"\n"), "pairs", "no rows"),
    "a million columns of one name": ("p.csv", content(b"a," * 1_000_000 + b"a\n"), "pairs", "column twice"),
    "nested messages in a CSV cell": (
        "p.csv", content(b'prompt,chosen,rejected\n"[{""role"": ' + DEEP + b'}]",b,c'), "pairs", "nested too deeply"),
    "NUL in a CSV": ("p.csv", content(b"prompt,chosen,rejected\na\0,b\0,c\n"), "pairs", READ),
    # Parquet
    "Parquet cut short": ("p.parquet", parquet_bytes(lambda data: data[:-20]), "pairs", "not a readable Parquet"),
    "Parquet footer of 2 GiB": (
        "p.parquet", parquet_bytes(lambda data: data[:-8] + struct.pack("<I", 0x7FFFFFFF) + b"PAR1"), "pairs",
        "not a readable Parquet"),
    "Parquet footer of nothing": (
        "p.parquet", parquet_bytes(lambda data: data[:-8] + struct.pack("<I", 0) + b"PAR1"), "pairs", "Parquet"),
    "Parquet footer of noise": (
        "p.parquet", parquet_bytes(lambda data: data[:-508] + bytes(range(250)) * 2 + data[-8:]), "pairs", "Parquet"),
    "Parquet pages of noise": (
        "p.parquet", parquet_bytes(lambda data: data[:4] + b"\xff" * 200 + data[204:]), "pairs", "Parquet"),
    "Parquet without rows": (
        "p.parquet", parquet({"prompt": pa.array([], pa.string())}), "pairs", "no rows"),
    "Parquet nested 20 deep": ("p.parquet", nested_parquet(20), "pairs", "row 1.*message 1 of .chosen. is list"),
    "Parquet nested 60 deep": ("p.parquet", nested_parquet(60), "pairs", "not a readable Parquet.*nested"),
    "Parquet with a text of 17 MB": (
        "p.parquet", lambda path, canary: pq.write_table(
            pa.table({name: pa.array(["a" * (17_000_000 if name == "chosen" else 1)]) for name in GOOD}), path,
            compression="zstd"),
        "pairs", "row is longer|decompression bomb"),
    "Parquet that repeats a long text": ("p.parquet", repeated_long_text, "pairs", "row is longer|bomb|identical"),
    "Parquet of bytes": (
        "p.parquet", parquet({"prompt": [b"\xff"], "chosen": [b"a"], "rejected": [b"c"]}), "pairs", "row 1"),
    # no ordinary file
    "pipe": ("p.jsonl", lambda path, canary: os.mkfifo(path), "pairs", "no such file"),
    "endless device": ("p.jsonl", link("/dev/zero"), "pairs", "no such file"),
    "link to itself": ("p.jsonl", link("{path}"), "pairs", "no such file"),
    "link to itself, digest": ("p.jsonl", link("{path}"), "digest", "no such file"),
    "folder with the name of a file": (
        "p.jsonl", lambda path, canary: path.mkdir(), "pairs", "no data in this folder"),
    "folder with a pipe and a loop, digest": (
        "d", lambda path, canary: [path.mkdir(), os.mkfifo(path / "x"), os.symlink(path, path / "y")], "digest",
        "no data in this folder"),
    # saved datasets
    "saved dataset of another folder": (
        "d", saved_dataset(_data_files=[{"filename": "../elsewhere/data-00000-of-00001.arrow"}]), "pairs",
        "names a file outside"),
    "saved dataset of an absolute path": (
        "d", saved_dataset(_data_files=[{"filename": "/etc/passwd"}]), "pairs", "names a file outside"),
    "saved dataset of a number": ("d", saved_dataset(_data_files=7), "pairs", "cannot be read|names"),
    "saved dataset with code as format": (
        "d", saved_dataset(_format_type="os.system", _format_kwargs={"x": "1"}), "pairs", "cannot be read"),
    # settings
    "YAML that runs a command": (
        "s.yaml", yaml_text("seed: !!python/object/apply:os.mkdir [CANARY]\n"), "settings", "not valid YAML"),
    "YAML that makes an object": (
        "s.yaml", yaml_text("seed: !!python/name:os.system\n"), "settings", "not valid YAML"),
    "YAML that imports": ("s.yaml", yaml_text("seed: !!python/module:this\n"), "settings", "not valid YAML"),
    "a billion laughs": ("s.yaml", yaml_text(LAUGHS + "eval_data: *a11\n"), "settings", "unknown setting 'a0'"),
    "a billion laughs in a setting": (
        "s.yaml", yaml_text("eval_data: " + "&b [" * 50 + "x" + "]" * 50 + "\n" + LAUGHS), "settings", "eval_data"),
    "a billion merged keys": ("s.yaml", yaml_text(MERGES), "settings", "merge keys"),
    "YAML nested 20,000 deep": ("s.yaml", yaml_text("seed: " + "[" * 20_000), "settings", "not valid YAML"),
    "YAML that holds itself": ("s.yaml", yaml_text("eval_data: &x [*x]\n"), "settings", "eval_data"),
    "YAML mapping that is its own key": ("s.yaml", yaml_text("? &x {*x : 1}\n: 2\n"), "settings", "s.yaml"),
    "YAML number of 10,000 digits": ("s.yaml", yaml_text("seed: " + "9" * 10_000 + "\n"), "settings", "s.yaml"),
    "YAML number of 400 digits": ("s.yaml", yaml_text("seed: " + "9" * 400 + "\n"), "settings", "seed"),
    "YAML text of a million digits": (
        "s.yaml", yaml_text("seed: '" + "9" * 1_000_000 + "'\n"), "settings", "seed"),
    "YAML base 60": ("s.yaml", yaml_text("lora_alpha: " + ":".join(["59"] * 300) + "\n"), "settings", "lora_alpha"),
    "YAML not a number": ("s.yaml", yaml_text("lora_alpha: .nan\n"), "settings", "lora_alpha"),
    "YAML infinity": ("s.yaml", yaml_text("lora_alpha: -.inf\n"), "settings", "lora_alpha"),
    "YAML date that is none": ("s.yaml", yaml_text("seed: 2026-99-99\n"), "settings", "not valid YAML"),
    "YAML key twice": ("s.yaml", yaml_text("seed: 1\nseed: 2\n"), "settings", "seed"),
    "YAML of two documents": ("s.yaml", yaml_text("---\nseed: 2\n"), "settings", "single document"),
    "YAML key that is a list": ("s.yaml", yaml_text("? [a, b]\n: 2\n"), "settings", "s.yaml"),
    "YAML of 9 MB": ("s.yaml", yaml_text("seed: 1\n" * 1_000_000), "settings", "settings have at most"),
    "YAML with a NUL": ("s.yaml", yaml_text("seed: 1\0\n"), "settings", "not valid YAML"),
    "YAML that is a pipe": ("s.yaml", lambda path, canary: os.mkfifo(path), "settings", "pipe or device"),
    "YAML that is a device": ("s.yaml", link("/dev/zero"), "settings", "pipe or device"),
    "YAML that is a folder": ("s.yaml", lambda path, canary: path.mkdir(), "settings", "folder"),
    "YAML that is a pickle": (
        "s.yaml", lambda path, canary: path.write_bytes(pickle.dumps({"seed": 1})), "settings", "not valid YAML"),
    # a journal of rewards
    "journal nested deep": ("j", content(DEEP_OBJECT + b"\n"), "journal", "not the record"),
    "journal row nested deep": ("j", content(HEADER + DEEP + b"\n"), "journal", "line 2 is damaged"),
    "journal of one endless line": ("j", content(b"a" * 50_000_000 + b"\n"), "journal", "not the record"),
    "journal of bytes": ("j", content(b"\xff\xfe\n"), "journal", "not the record"),
    "journal row of text": ("j", content(HEADER + b'["a", "b"]\n'), "journal", "line 2 is damaged"),
    "journal row below 0": ("j", content(HEADER + b"[-1, 0.5]\n"), "journal", "line 2 is damaged"),
    "journal reward NaN": ("j", content(HEADER + b"[0, NaN]\n"), "journal", "line 2 is damaged"),
    "journal reward of text": ("j", content(HEADER + b'[0, "9"]\n'), "journal", "line 2 is damaged"),
    "journal row of four": ("j", content(HEADER + b"[0, 0.5, 0.5, 0.5]\n"), "journal", "line 2 is damaged"),
    "journal that is a pipe": ("j", lambda path, canary: os.mkfifo(path), "journal", "not the record"),
    "journal that is a device": ("j", link("/dev/zero"), "journal", "not the record"),
}  # fmt: skip


@pytest.fixture(scope="module")
def reports(read_all, tmp_path_factory):
    base = tmp_path_factory.mktemp("hostile-data")
    cases = []
    for number, (name, (file, build, operation, _)) in enumerate(CASES.items()):
        place = base / str(number)
        place.mkdir()
        build(place / file, place / "canary")
        cases.append((name, operation, [place / file]))
    answers = read_all(cases)
    for number, name in enumerate(CASES):
        answers[name]["place"] = base / str(number)
    yield answers
    shutil.rmtree(base)  # some of these are large


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_hostile_file_is_refused_or_harmless(name, reports):
    expected, report = CASES[name][3], reports[name]
    assert not (report["place"] / "canary").exists(), "its payload ran"
    if expected == READ:
        assert report["outcome"] == "read", report
    else:
        assert report["outcome"] in ("InputError", "BadRow"), report
        assert re.search(expected, report["message"], re.DOTALL), report["message"]
        assert len(report["message"]) < 3000
    assert report["mebibytes"] < MOST_MEBIBYTES, report
