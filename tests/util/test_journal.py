"""A journal of records: what a kill leaves, and what is refused."""

import json

import pytest

from inform_rm.errors import InputError
from inform_rm.util.journal import RecordJournal


def test_records_outlive_a_torn_line_and_the_first_of_a_name_counts(tmp_path):
    path = tmp_path / "journal"
    journal = RecordJournal(path, {"seed": 0})
    journal.add({"a": {"text": "eins\nzwei ü"}, "b": {"n": 1}})
    journal.add({"a": {"text": "other"}})
    journal.close()
    with path.open("a") as file:
        file.write('["c", {"text": "torn')
    again = RecordJournal(path, {"seed": 0})
    assert again.finished() == {"a": {"text": "eins\nzwei ü"}, "b": {"n": 1}}
    again.add({"c": {}})
    again.close()
    assert list(RecordJournal(path, {"seed": 0}).finished()) == ["a", "b", "c"]
    with pytest.raises(InputError, match="other settings: seed was 0, is 1"):
        RecordJournal(path, {"seed": 1})
    again.delete()
    assert not path.exists()


@pytest.mark.parametrize("line", ["[1, {}]", '["a", 2]', '["a"]', "{}", "nonsense", "[" * 100_000])
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "journal"
    RecordJournal(path, {}).close()
    with path.open("a") as file:
        file.write(json.dumps(["a", {}]) + "\n" + line + "\n")
    with pytest.raises(InputError, match="line 3 is damaged"):
        RecordJournal(path, {}).finished()
