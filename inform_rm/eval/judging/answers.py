"""Asking a judge many things, each once: answers are kept beside the result and never paid for twice."""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from inform_rm.data.messages import Message
from inform_rm.eval.judging.settings import JudgeSettings
from inform_rm.util.endpoint import ChatEndpoint, RefusedRequest, ask_all
from inform_rm.util.journal import RecordJournal

CACHE_FILE = "answers.jsonl"


@dataclass
class Answers:
    """What a judge said.

    Attributes:
        texts: by request, see `request_name`.
        refused: likewise, why there is no answer.
        cut: names of answers that had not ended.
        asked: how many were asked in this call; the others were known.
        tokens: ``prompt`` and ``completion`` tokens of all answers, as the server counts them.
    """

    texts: dict[str, str]
    refused: dict[str, str]
    cut: set[str]
    asked: int
    tokens: dict[str, int]


def request_name(endpoint: ChatEndpoint, settings: JudgeSettings, messages: list[Message]) -> str:
    """What tells a request from others: everything that is sent, and where."""
    content = [endpoint.base, endpoint.model, _arguments(settings, messages)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def ask_judge(
    endpoint: ChatEndpoint,
    requests: Mapping[str, list[Message]],
    settings: JudgeSettings,
    *,
    folder: Path | None,
    concurrency: int,
    progress: bool,
) -> Answers:
    """Answers to requests by their `request_name`; ``folder/answers.jsonl`` holds those that are known, and gets all.

    `InputError` and `EndpointError` as of `ask_all`, the former for a damaged file, too.
    """
    with contextlib.ExitStack() as stack:
        journal = None
        if folder is not None:
            journal = RecordJournal(folder / CACHE_FILE, {"kind": "answers of a judge", "version": 1})
            stack.enter_context(contextlib.closing(journal))
        known = {} if journal is None else journal.finished()
        records = {name: known[name] for name in requests if name in known}
        todo = {name: _arguments(settings, messages) for name, messages in requests.items() if name not in records}
        refused = {}
        tokens = {"prompt": 0, "completion": 0}
        for record in records.values():
            _add(tokens, record)
        with tqdm(total=len(requests), initial=len(records), unit="answer", desc="judge", disable=not progress) as bar:
            for name, reply in ask_all(endpoint, todo, concurrency):
                if isinstance(reply, RefusedRequest):
                    refused[name] = str(reply)
                else:
                    records[name] = asdict(reply)
                    _add(tokens, records[name])
                    if journal is not None:
                        journal.add({name: records[name]})
                bar.update()
                bar.set_postfix_str(_spent(tokens, settings), refresh=False)
    return Answers(
        texts={name: record["text"] for name, record in records.items()},
        refused=refused,
        cut={name for name, record in records.items() if record["finish_reason"] == "length"},
        asked=len(todo),
        tokens=tokens,
    )


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
