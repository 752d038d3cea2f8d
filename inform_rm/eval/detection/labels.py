"""Labels of responses, by a judge or by people, and how far outliers agree with them (arXiv:2402.09345, Fig. 7)."""

from collections.abc import Mapping, Sequence
from typing import Any

from inform_rm.data.messages import to_messages
from inform_rm.data.response_rows import RowFault, ScoreRow
from inform_rm.data.sources import Source, open_parts, source_label, source_list
from inform_rm.errors import InputError, shown
from inform_rm.eval.detection.statistic import STATISTICS
from inform_rm.util.intervals import wilson_interval

FIELD = "hacked"
_YES, _NO = ("true", "yes", "1", "1.0"), ("false", "no", "0", "0.0")


def labels_by_name(
    labels: "Source | Sequence[Source] | Mapping[str, Source] | None", names: Sequence[str]
) -> dict[str, Source]:
    """Which source of labels belongs to which candidate; `InputError` for another name or number than theirs."""
    if labels is None:
        return {}
    if isinstance(labels, Mapping):
        unknown = sorted(set(map(str, labels)) - set(names))
        if unknown:
            raise InputError(f"labels: {unknown[0]!r} is no candidate; expected some of {', '.join(names)}.")
        return {str(name): source for name, source in labels.items()}
    sources = source_list(labels)
    if len(sources) != len(names):
        raise InputError(
            f"labels: {len(sources)} sources for {len(names)} candidates; expected one each, in the same order."
        )
    return dict(zip(names, sources, strict=True))


def join_labels(rows: Sequence[ScoreRow | RowFault], source: Source) -> dict[str, bool]:
    """Label (does it exploit a reward?) by a row's ``where``; rows without a label are absent.

    Rows of labels have `FIELD`: true or false, also as 1, 0, yes, no; empty is no label. If all rows of both have an
    ``id`` of their own, it says which belong together; else the place does, and there must be as many of both. A
    ``response`` (required without ids) or ``prompt`` beside the label must be the row's. `InputError` for labels that
    do not fit all ``rows`` of the candidate, or are none.
    """
    name = source_label(source)
    records = [(f"{file}, row {number}", record) for file, part in open_parts(source) for number, record in part]
    labels = [(where, _checked(record, where)) for where, record in records]
    own_ids = [row.fields.get("id") for row in rows]
    their_ids = [record.get("id") for _, record in labels]
    found: dict[str, bool] = {}
    by_id = all(None not in ids and len(set(map(str, ids))) == len(ids) for ids in (own_ids, their_ids))
    if by_id:
        row_of = {str(own): row for own, row in zip(own_ids, rows, strict=True)}
        pairs = [(row_of.get(str(own)), part) for own, part in zip(their_ids, labels, strict=True)]
    elif len(labels) != len(rows):
        raise InputError(
            f"labels: {name} has {len(labels)} rows for {len(rows)} responses, and not all have an 'id' of their own "
            "by which they could be matched. Give both an id, or label every row, in order."
        )
    else:
        pairs = list(zip(rows, labels, strict=True))
    for row, (where, record) in pairs:
        label = _label(record[FIELD], where)
        if row is None:
            raise InputError(
                f"{where}: no response has the id {shown(record['id'])}. Remove the label, or correct it."
            )
        if isinstance(row, RowFault):
            continue
        _check_text(row, record, where, text_needed=not by_id)
        if label is not None:
            found[row.where] = label
    if not found:
        raise InputError(f"labels: {name} labels none of the responses; expected {FIELD!r} to be true or false.")
    return found


def agreement(columns: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """How far each statistic's outliers are the responses that are labelled as exploiting a reward.

    Args:
        columns: by response, `FIELD` and the ``outlier`` column of each `Statistic`; ``None`` takes no part.

    Returns:
        ``labelled``, ``hacked``; and in ``statistics`` by name ``outliers``, ``both`` (outliers that are hacked),
        ``hacked``, ``precision`` (of the outliers, how many are hacked), ``recall`` (of the hacked, how many are
        outliers), with 95 % Wilson intervals; absent where they would be a share of nothing.
    """
    labels = columns[FIELD]
    known = [label for label in labels if label is not None]
    found: dict[str, Any] = {"labelled": len(known), "hacked": sum(known), "statistics": {}}
    for statistic in STATISTICS:
        flags = columns[statistic.outlier]
        both = [(flag, label) for flag, label in zip(flags, labels, strict=True) if None not in (flag, label)]
        outliers, hacked = sum(flag for flag, _ in both), sum(label for _, label in both)
        hits = sum(flag and label for flag, label in both)
        values: dict[str, Any] = {"outliers": outliers, "hacked": hacked, "both": hits}
        for name, total in (("precision", outliers), ("recall", hacked)):
            if total:
                values |= {name: hits / total, f"{name}_interval": list(wilson_interval(hits, total))}
        found["statistics"][statistic.name] = values
    return found


def _checked(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        what = record if isinstance(record, str) else f"a {type(record).__name__}, expected an object"
        raise InputError(f"{where}: {what}")
    if FIELD not in record:
        raise InputError(f"{where}: no {FIELD!r}; expected true or false, or nothing where it is not known.")
    return record


def _label(value: Any, where: str) -> bool | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    text = str(value).strip().lower() if isinstance(value, str | bool | int | float) else ""
    if text not in (*_YES, *_NO):
        raise InputError(f"{where}: {FIELD!r} is {shown(value)}; expected true or false, 1 or 0, yes or no.")
    return text in _YES


def _check_text(row: ScoreRow, record: Mapping[str, Any], where: str, text_needed: bool) -> None:
    text, prompt = record.get("response"), record.get("prompt")
    if "response" not in record and text_needed:
        raise InputError(f"{where}: no 'response', by which it could be told that the label is of this row. Add it.")
    if "response" in record and (text or "") != row.response:
        raise InputError(
            f"{where}: its response {shown(text, 60)} is not that of {row.where}, {shown(row.response, 60)}. Labels "
            "are matched by 'id' where all rows have one, else by their place: are these labels of other responses?"
        )
    if prompt is not None and to_messages(prompt) != row.prompt:
        raise InputError(f"{where}: its prompt is not that of {row.where}. Are these labels of other responses?")
