"""Rows with one prompt and any number of responses: rankings, scored responses, and pairs seen as rankings of two.

A group is a prompt with K responses and a label for each: of a ranking (K >= 2) its scores, or its ranks with the sign
changed, so that the higher is always better and equal ones are ties; of a scored response (K = 1) its score.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value

from inform_rm.data.columns import (
    GROUP_FIELDS,
    Columns,
    Reading,
    Row,
    lists_of,
    names_of,
    required_prompt,
)
from inform_rm.data.messages import Fault, Message, check_text, finite_number, found, reply_text
from inform_rm.data.pairs import BadRow, after_prompt, label_of
from inform_rm.data.sources import source_name
from inform_rm.errors import InputError
from inform_rm.util.rankings import untied_places

LAYOUTS = ("pair", "ranking", "scored")
GROUP_FEATURES = Features(
    {
        "prompt": [{"role": Value("string"), "content": Value("string")}],
        "responses": [Value("string")],
        "labels": [Value("float64")],
        "subset": Value("string"),
        "id": Value("string"),
        "file": Value("string"),
        "row": Value("int64"),
    }
)
_IN_WORDS = {"pair": "a pair (chosen, rejected)", "ranking": "a ranking (responses)", "scored": "scored (response)"}


@dataclass(frozen=True)
class ResponseGroup:
    """A prompt, its responses in the order of the row, their labels (see the module), and where they were read."""

    prompt: list[Message]
    responses: list[str]
    labels: list[float]
    subset: str
    id: str
    file: str
    row: int


def row_layout(record: Any, columns: Columns) -> str | None:
    """Which of `LAYOUTS` a row has, by its columns; ``None`` where they do not tell. What is ignored does not count.

    Example:
        >>> row_layout({"prompt": "?", "answers": ["a", "b"]}, Columns({"responses": "answers"}))
        'ranking'
    """
    if not isinstance(record, Mapping):
        return None

    def has(field: str) -> bool:
        column = columns.given.get(field, field)
        return column not in columns.ignored and record.get(column) is not None

    if has("chosen") or has("rejected"):
        return "pair"
    return "ranking" if has("responses") else "scored" if has("response") else None


def source_layout(records: Iterable[tuple[int, Any]], columns: Columns) -> str:
    """The layout of the first row of a source that tells one; ``"pair"`` where none does, whose errors say more."""
    return next((found for _, record in records if (found := row_layout(record, columns))), "pair")


def parse_group(
    record: Any,
    file: str,
    row: int,
    *,
    layout: str,
    name: str | None = None,
    columns: Columns | Mapping[str, str] | None = None,
    reading: Reading | None = None,
    score_weights: Mapping[str, float] | None = None,
) -> ResponseGroup:
    """The group of one row.

    A ranking has ``responses``, at least two texts or lists of one assistant message, and either ``ranks`` (whole
    numbers, 1 is the best, equal ones are ties) or ``scores`` (higher is better). A scored row has ``response``
    and ``score``, or the columns that ``score_weights`` names: their weighted sum is the score. The prompt,
    ``system``, ``history``, ``subset`` and ``id`` are read as of pairs; so are the other arguments.

    Raises:
        BadRow: A missing or wrong field, responses that are all tied, or the same response with different labels.
    """
    name, columns = name or source_name(file), Columns.of(columns, GROUP_FIELDS)
    fields = Row(record, columns, Reading() if reading is None else reading)
    try:
        if not isinstance(record, dict):
            raise Fault("wrong type", f"expected an object with fields, got {found(record)}.")
        other = row_layout(record, columns)
        if other not in (None, layout):
            raise Fault(
                "mixed layouts", f"this row is {_IN_WORDS[other]}, unlike the rows before it, {_IN_WORDS[layout]}. "
                "Put each layout into a file of its own.",
            )  # fmt: skip
        weighted = tuple(score_weights or ()) if layout == "scored" else ()
        fields.reading.add_row(record, columns, fields_of(layout), also=weighted)
        read = _ranking if layout == "ranking" else _scored
        prompt, responses, labels = read(fields, score_weights or {})
        return ResponseGroup(
            prompt, responses, labels,
            label_of(fields.value("subset"), "subset") or name, label_of(fields.value("id"), "id") or f"{name}/{row}",
            file, row,
        )  # fmt: skip
    except Fault as fault:
        raise BadRow(file, row, str(fault), fault.kind) from None


def fields_of(layout: str) -> tuple[str, ...]:
    """The fields that rows of a layout may have."""
    own = {"ranking": ("responses", "ranks", "scores"), "scored": ("response", "score")}[layout]
    return ("prompt", *own, "system", "history", "subset", "id")


def of_layout(columns: Columns, layout: str) -> Columns:
    """The mapping without the fields that rows of this layout do not have, which other sources of a run may have."""
    if layout == "pair":
        own = {field: column for field, column in columns.given.items() if field not in GROUP_FIELDS[-5:]}
    else:
        own = {field: column for field, column in columns.given.items() if field in fields_of(layout)}
    return replace(columns, given=own)


def _prompt(row: Row) -> list[Message]:
    return required_prompt(row, "a row with responses needs one", (*fields_of("ranking"), *fields_of("scored")))


def _value(row: Row, field: str) -> Any:
    """As `Row.value`, but ``None`` for what is knowingly not read."""
    return None if row.columns.given.get(field, field) in row.columns.ignored else row.value(field, required=True)


def _reply(where: str, response: Any) -> str:
    response = reply_text(where, response)
    check_text(where, response)
    return response


def _ranking(row: Row, _: Mapping[str, float]) -> tuple[list[Message], list[str], list[float]]:
    listed = lists_of(row.value("responses", required=True))
    if not isinstance(listed, list | tuple) or len(listed) < 2:
        raise Fault("wrong type", f"'responses' is {found(listed)}; expected a list of at least two responses.")
    responses = [_reply(f"response {number} of 'responses'", each) for number, each in enumerate(listed, start=1)]
    labels = _labels(row, len(responses))
    if len(set(labels)) < 2:
        raise Fault("all tied", "all responses are tied. Such a row teaches nothing: remove it.")
    by_text: dict[str, float] = {}
    for text, label in zip(responses, labels, strict=True):
        if by_text.setdefault(text.strip(), label) != label:
            raise Fault("identical responses", "two responses are identical but ranked differently. Remove one.")
    prompt = _prompt(row)
    if row.columns.sides != "reply" and all(
        after_prompt(text, prompt[-1]["content"]) is not None for text in responses
    ):
        raise Fault(
            "sides diverge",
            "all responses begin with the prompt: whole dialogues? Cut it off, or say columns sides=reply "
            "(--columns sides=reply) if they are replies.",
        )
    return prompt, responses, labels


def _labels(row: Row, number: int) -> list[float]:
    """Of ranks with the sign changed, or of scores: the higher, the better."""
    given = {field: value for field in ("ranks", "scores") if (value := lists_of(_value(row, field))) is not None}
    if len(given) != 1:
        what = "both 'ranks' and 'scores': which counts? Say columns ignore=ranks or ignore=scores"
        none = f"neither 'ranks' nor 'scores'. Its fields are {names_of(row.record)}; add one, or map its column"
        raise Fault("missing field", f"{what if given else none}.")
    ((field, values),) = given.items()
    if not isinstance(values, list | tuple) or len(values) != number:
        raise Fault("wrong type", f"'{field}' is {found(values)}; expected {number} numbers, one for each response.")
    labels = [_number(f"'{field}'", value) for value in values]
    if field == "scores":
        return labels
    if any(not rank.is_integer() for rank in labels) or min(labels) != 1:
        raise Fault(
            "bad ranks",
            f"'ranks' is {found(values)}; expected whole numbers with 1 for the best. Count from 1, or give 'scores', "
            "of which the higher is better.",
        )
    return [-rank for rank in labels]


def _scored(row: Row, weights: Mapping[str, float]) -> tuple[list[Message], list[str], list[float]]:
    response = _reply("'response'", row.value("response", required=True))
    if weights:
        score = 0.0
        for column, weight in weights.items():
            if row.record.get(column) is None:
                raise Fault(
                    "missing field", f"no column {column!r}, which score_weights names. Its fields are "
                    f"{names_of(row.record)}.",
                )  # fmt: skip
            score += weight * _number(f"{column!r}", row.record[column])
        return _prompt(row), [response], [_number("the weighted sum of the columns in score_weights", score)]
    value = _value(row, "score")
    if value is None:
        raise Fault(
            "missing field",
            f"no 'score'. Its fields are {names_of(row.record)}; add or map it (columns score=COLUMN), or name "
            "columns and their weights: score_weights (--score-weights helpfulness=0.65 correctness=0.8).",
        )
    return _prompt(row), [response], [_number("'score'", value)]


def _number(where: str, value: Any) -> float:
    number = finite_number(value)
    if number is None or abs(number) > np.finfo(np.float32).max:
        raise Fault("bad number", f"{where} holds {found(value)}; expected a finite number.")
    return number


def check_score_weights(weights: Any) -> None:
    """Raise `InputError` unless weights are ``None`` or map names of columns to finite numbers."""
    if weights is None:
        return
    if not isinstance(weights, Mapping) or not weights or not all(
        isinstance(name, str) and isinstance(weight, int | float) and math.isfinite(weight)
        for name, weight in weights.items()
    ):  # fmt: skip
        raise InputError(f"score_weights: got {weights!r}; expected columns with a finite number each.")


def pairs_of_rankings(rankings: Dataset, features: Features) -> Dataset:
    """Every untied pair of each ranking, better response first, as preference pairs with its subset, file and row."""

    def pairs(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {name: [] for name in features}
        for place, labels in enumerate(batch["labels"]):
            texts = batch["responses"][place]
            for better, worse in zip(*untied_places(labels), strict=True):
                values = {
                    "chosen": texts[better], "rejected": texts[worse], "margin": None,
                    "id": f"{batch['id'][place]}/{better + 1}>{worse + 1}",
                }  # fmt: skip
                for name, values_of in found.items():
                    values_of.append(values[name] if name in values else batch[name][place])
        return found

    return rankings.map(
        pairs, batched=True, batch_size=256, remove_columns=rankings.column_names, features=features,
        load_from_cache_file=False, new_fingerprint=f"{rankings._fingerprint}-pairs", desc="Pairs of rankings",
    )  # fmt: skip
