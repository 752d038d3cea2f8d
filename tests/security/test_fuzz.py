"""Random bytes and damaged files into every reader: what comes out is a result or an `InputError`."""

import contextlib
import csv
import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inform_rm.data.preferences import load_preferences
from inform_rm.data.response_rows import score_rows_or_faults
from inform_rm.errors import InputError
from inform_rm.safety.checkpoints import check_checkpoint
from inform_rm.training.reward_arguments import read_arguments
from inform_rm.util.journal import RewardJournal

# A quarter of what the profile asks for: each example is a file.
fuzz = settings(max_examples=settings.default.max_examples // 4, suppress_health_check=list(HealthCheck))
ROWS = [
    {"prompt": "Say sun.", "chosen": "sun", "rejected": "moon", "response": "sun", "margin": 1.5, "n": [1, {}]}
] * 3
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def csv_bytes():
    text = io.StringIO()
    writer = csv.DictWriter(text, ["prompt", "chosen", "rejected", "response"], extrasaction="ignore")
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def parquet_bytes():
    buffer = io.BytesIO()
    pq.write_table(pa.table({name: [row[name] for row in ROWS] for name in ("prompt", "chosen", "rejected")}), buffer)
    return buffer.getvalue()


SOUND = {
    "rows.jsonl": LINES,
    "rows.jsonl.gz": gzip.compress(LINES),
    "rows.json": json.dumps(ROWS).encode(),
    "rows.csv": csv_bytes(),
    "rows.parquet": parquet_bytes(),
}


@st.composite
def damaged(draw, sound):
    """Random bytes, or the sound ones with a few places cut out, repeated or written over."""
    if draw(st.integers(0, 4)) == 0:
        return draw(st.binary(max_size=200))
    content = bytearray(sound)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        end = min(len(content), at + draw(st.integers(0, 30)))
        piece = draw(st.one_of(st.binary(max_size=8), st.sampled_from([b"{", b"]", b'"', b"\n", b"null", b"1e999"])))
        content[at:end] = draw(st.sampled_from([piece, bytes(content[at:end]) * 2, b""]))
    return bytes(content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("name", SOUND)
def test_sound_files_are_read(name, folder):
    (folder / name).write_bytes(SOUND[name])
    with contextlib.suppress(InputError):
        load_preferences(folder / name)
    assert len(load_preferences(folder / name, on_bad_row="skip").dataset) >= 1


@pytest.mark.parametrize("name", SOUND)
@fuzz
@given(data=st.data())
def test_preferences(name, data, folder):
    (folder / name).write_bytes(data.draw(damaged(SOUND[name])))
    with contextlib.suppress(InputError):
        load_preferences(folder / name, on_bad_row=data.draw(st.sampled_from(["error", "skip"])))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.csv"])
@fuzz
@given(data=st.data())
def test_rows_to_score(name, data, folder):
    (folder / name).write_bytes(data.draw(damaged(SOUND[name])))
    with contextlib.suppress(InputError):
        list(score_rows_or_faults(folder / name))


@fuzz
@given(content=damaged(b"model: m\ndata: [a, b]\noutput: o\nseed: 1\nbeta: 0.1\nbf16: true\n"))
def test_settings(content, folder):
    (folder / "s.yaml").write_bytes(content)
    with contextlib.suppress(InputError):
        read_arguments(folder / "s.yaml", {})


def test_journal_whose_first_line_lacks_its_end(folder):
    path = folder / "torn"
    path.write_bytes(b'{"model": "a"}')
    for _ in range(2):
        journal = RewardJournal(path, {"model": "a"})
        assert list(journal.finished()) == []
        journal.close()
    assert path.read_bytes() == b'{"model": "a"}\n'


@fuzz
@given(content=damaged(b'{"model": "a"}\n[0, 0.5]\n[1, 0.25, 0.1]\n'))
def test_journal(content, folder):
    (folder / "journal").write_bytes(content)
    with contextlib.suppress(InputError):
        list(RewardJournal(folder / "journal", {"model": "a"}).finished())


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@fuzz
@given(data=st.data())
def test_model_config(data, folder, reward_dir):
    model = folder / "model"
    model.mkdir(exist_ok=True)
    if not (model / "model.safetensors").exists():
        (model / "model.safetensors").symlink_to(reward_dir / "model.safetensors")
    config = json.loads((reward_dir / "config.json").read_text())
    for part in (config, config["text_config"]):
        names = st.sampled_from([*part, "auto_map", "quantization_config", "transformers_weights"])
        part.update(data.draw(st.dictionaries(names, JSON_VALUES, max_size=2)))
    (model / "config.json").write_text(json.dumps(config))
    with contextlib.suppress(InputError):
        check_checkpoint(model)
