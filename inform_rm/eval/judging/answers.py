"""Asking a judge many things, each once: answers are kept beside the result and never paid for twice."""

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from inform_rm.data.messages import Message
from inform_rm.eval.judging.settings import JudgeSettings
from inform_rm.util.endpoint import ChatEndpoint, RefusedRequest, ask_all
from inform_rm.util.journal import RecordJournal

CACHE_FILE = "answers.jsonl"


@dataclass(frozen=True)
class Answer:
    """What a judge said to a request, or why it would not; and whether the answer was cut before its end."""

    text: str | None
    refused: str = ""
    is_cut: bool = False


class Answers(NamedTuple):
    """Answers in the order of the requests, how many were asked for in this call, and the tokens of all of them."""

    found: list[Answer]
    asked: int
    tokens: dict[str, int]


def ask_judge(
    endpoint: ChatEndpoint,
    requests: Sequence[list[Message]],
    settings: JudgeSettings,
    *,
    folder: Path | None,
    concurrency: int,
    progress: bool,
) -> Answers:
    """Ask what ``folder/answers.jsonl`` does not hold already, equal requests once; the file gets all answers.

    `InputError` and `EndpointError` as of `ask_all`, the former for a damaged file, too.
    """
    with contextlib.ExitStack() as stack:
        journal = None
        if folder is not None:
            journal = RecordJournal(folder / CACHE_FILE, {"kind": "answers of a judge", "version": 1})
            stack.enter_context(contextlib.closing(journal))
        known = {} if journal is None else journal.finished()
        names = [_name(endpoint, settings, messages) for messages in requests]
        records = {name: known[name] for name in names if name in known}
        todo = {
            name: _arguments(settings, messages)
            for name, messages in zip(names, requests, strict=True)
            if name not in records
        }
        answers = {}
        tokens = {"prompt": 0, "completion": 0}
        for record in records.values():
            _add(tokens, record)
        whole = len(records) + len(todo)
        with tqdm(total=whole, initial=len(records), unit="answer", desc="judge", disable=not progress) as bar:
            for name, reply in ask_all(endpoint, todo, concurrency):
                if isinstance(reply, RefusedRequest):
                    answers[name] = Answer(None, str(reply))
                else:
                    records[name] = asdict(reply)
                    _add(tokens, records[name])
                    if journal is not None:
                        journal.add({name: records[name]})
                bar.update()
                bar.set_postfix_str(_spent(tokens, settings), refresh=False)
    for name, record in records.items():
        answers[name] = Answer(record["text"], is_cut=record["finish_reason"] == "length")
    return Answers([answers[name] for name in names], len(todo), tokens)


def _name(endpoint: ChatEndpoint, settings: JudgeSettings, messages: list[Message]) -> str:
    """What tells a request from others: everything that is sent, and where."""
    content = [endpoint.base, endpoint.model, _arguments(settings, messages)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _arguments(settings: JudgeSettings, messages: list[Message]) -> dict[str, Any]:
    return {
        "messages": messages, "max_tokens": settings.max_answer_tokens, "temperature": settings.temperature,
        "seed": settings.seed,
    }  # fmt: skip


def _add(tokens: dict[str, int], record: Mapping[str, Any]) -> None:
    for kind in tokens:
        tokens[kind] += record[f"{kind}_tokens"]


def _spent(tokens: Mapping[str, int], settings: JudgeSettings) -> str:
    cost = settings.cost(tokens["prompt"], tokens["completion"])
    return f"{sum(tokens.values()):,} tokens" + ("" if cost is None else f", cost {cost:.2f}")
