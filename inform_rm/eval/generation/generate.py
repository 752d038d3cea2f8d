"""`generate`: responses to a set of prompts, written as the rows that `detect`, `judge` and `score` read."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from inform_rm.data.messages import to_messages
from inform_rm.data.prompt_rows import PromptRow, PromptSet, read_prompts, written_prompt
from inform_rm.data.sources import Sources, source_digest, source_label, source_list
from inform_rm.errors import InputError
from inform_rm.eval.best_of_n.policies import CausalLMPolicy
from inform_rm.eval.frame import json_lines, settings_of
from inform_rm.eval.generation.local_model import Task, write_locally
from inform_rm.eval.generation.settings import EndpointSettings, GenerationSettings
from inform_rm.util.endpoint import ChatEndpoint, RefusedRequest, Reply, ask_all
from inform_rm.util.files import atomic_write_text, check_output_directory, file_digest, versions, write_json
from inform_rm.util.journal import RecordJournal

_LISTED = 1000


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """What `generate` wrote, and with what.

    Attributes:
        model: as it was named.
        output: the file of rows.
        sha256: of that file.
        num_responses: rows in it.
        num_prompts: that have responses.
        reused: rows that an earlier call had written.
        finish_reasons: reason -> rows; ``"length"`` was cut at ``max_new_tokens``.
        empty: responses without text.
        completion_tokens: of all rows, as the model or the server counts them.
        prompts: rows read, prompts repeated, not drawn, and bad rows with their reasons.
        data: label and digest of each source.
        identity: what decides a row's response beside prompt, sample and seed.
        settings: those that were given.
        seed: of all that was random.
        versions: of Python and the packages that decide a result.
    """

    model: str
    output: str
    sha256: str
    num_responses: int
    num_prompts: int
    reused: int
    finish_reasons: dict[str, int]
    empty: int
    completion_tokens: int
    prompts: dict[str, Any]
    data: list[dict[str, str]]
    identity: dict[str, Any]
    settings: dict[str, Any]
    seed: int
    versions: dict[str, str] = field(default_factory=versions)

    def to_dict(self) -> dict[str, Any]:
        """The content of ``OUTPUT.about``."""
        return asdict(self)


@dataclass(frozen=True)
class _Slot:
    """A response that is wanted: prompt, which sample of it, and the names and numbers that go with it."""

    prompt: PromptRow
    sample: int
    seed: int
    name: str


def generate(
    model: str | Path | torch.nn.Module,
    prompts: Sources,
    output: str | Path,
    *,
    endpoint: str | None = None,
    tokenizer: Any = None,
    progress: bool = True,
    **options: Any,
) -> GenerationResult:
    """Write responses to prompts, with a causal language model or an OpenAI-compatible endpoint (arXiv:2402.09345, C).

    Each line of ``output`` has ``prompt``, ``response``, ``model``, ``seed`` (the row's own), ``sample``,
    ``finish_reason``, ``tokens`` and, where all prompts have one, ``id``. Beside it ``OUTPUT.about`` (JSON) says how
    it was made. Finished responses wait in ``OUTPUT.partial``; after a kill the same call goes on there and gives what
    an uninterrupted one gives (of an endpoint: as far as the server does). Rows of an earlier ``output`` that was
    made in the same way are taken over, so that prompts and samples can be added.

    Args:
        model: causal language model (folder, Hub id, or loaded, with ``tokenizer``); with ``endpoint`` the name under
            which it is served. A chat template is used where the tokenizer has one.
        prompts: sources of rows with ``prompt``: pairs, responses, or prompts alone. Each prompt is taken once.
        output: JSON Lines file to write.
        endpoint: base address such as ``http://localhost:8000/v1``.
        tokenizer: of a loaded model.
        progress: show a progress bar.
        options: fields of `inform_rm.eval.generation.settings.GenerationSettings`; with ``endpoint`` those of
            `EndpointSettings` beside it, else ``device``, ``trust_remote_code``, ``chat_template`` and ``revision``.

    Returns:
        What was written and how.

    Raises:
        InputError: bad settings or prompts, a model that cannot be loaded, an endpoint that refuses key or model, or
            an unfinished run with other settings.
        EndpointError: the endpoint gave no usable reply after all tries; what is finished is kept.
    """
    rest = CausalLMPolicy if endpoint is None else EndpointSettings
    settings, others = settings_of(GenerationSettings, options, rest)
    output = _checked_output(output)
    found = read_prompts(
        prompts, settings.columns, num_prompts=settings.num_prompts, seed=settings.seed, on_bad_row=settings.on_bad_row
    )
    write: Callable[..., dict[str, str]]
    if endpoint is not None:
        asked = EndpointSettings(endpoint, **others)
        others, chat = asdict(asked), asked.open(str(model))
        write = partial(_ask, chat, asked.concurrency)
        name, identity = chat.model, {"endpoint": chat.base, "model": chat.model}
    else:
        policy = CausalLMPolicy(model, tokenizer, max_new_tokens=settings.max_new_tokens, **others)
        write, own = partial(_write_locally, policy), policy.identity()
        name, identity = policy.name, {"model": own["model"], "tokenizer": own["tokenizer"]}
    drawn = ("temperature", "top_p", "max_new_tokens", "seed")
    identity |= {setting: getattr(settings, setting) for setting in drawn}
    slots = [_slot(row, sample, settings.seed) for row in found.rows for sample in range(settings.num_samples)]
    earlier = _rows_of_earlier_output(output, identity)
    reused = sum(slot.name in earlier for slot in slots)
    todo = [slot for slot in slots if slot.name not in earlier]
    journal = RecordJournal(output.with_name(output.name + ".partial"), identity)
    try:
        finished = journal.finished()
    except InputError:
        journal.close()  # whoever reads the message decides what becomes of a damaged file
        raise
    try:
        reused += sum(slot.name in finished for slot in todo)
        with tqdm(total=len(slots), initial=reused, unit="response", desc="generate", disable=not progress) as bar:
            refused = write(settings, todo, finished, journal, bar)
        if refused and settings.on_bad_row == "error":
            raise InputError(
                f"prompts: {len(refused)} cannot be answered. {next(iter(refused.values()))} (on_bad_row='skip' "
                "leaves them out and lists them. What is finished is kept.)"
            )
        records = {**finished, **earlier}
        rows = [_row(slot, records[slot.name], name, settings.num_samples) for slot in slots if slot.name in records]
        if not rows:
            raise InputError(f"prompts: none could be answered. {next(iter(refused.values()), '')}")
        if len({row.get("id") for row in rows} - {None}) < len(rows):  # ids that name no single row are none
            rows = [{key: value for key, value in row.items() if key != "id"} for row in rows]
        atomic_write_text(output, json_lines(rows))
        result = GenerationResult(
            **_counted(rows, found, refused), model=name, output=str(output), sha256=file_digest(output),
            reused=reused,
            data=[{"source": source_label(each), "digest": source_digest(each)} for each in source_list(prompts)],
            identity=identity, seed=settings.seed,
            settings={**asdict(settings), **others},
        )  # fmt: skip
        write_json(_about(output), result.to_dict())
        journal.delete()
    finally:
        journal.close() if finished else journal.delete()  # an empty one would only bind the next call to its settings
    return result


def _checked_output(output: str | Path) -> Path:
    output = Path(output)
    check_output_directory(output.parent)
    if output.is_dir() or output.suffix != ".jsonl":
        raise InputError(f"output: {output}; expected the name of a .jsonl file, one response a line.")
    return output


def _slot(row: PromptRow, sample: int, seed: int) -> _Slot:
    """Name and seed come from what the row is, not from where it stands."""
    name = hashlib.sha256(f"{sample}/{row.key}".encode()).hexdigest()[:32]
    digest = hashlib.sha256(f"generate/{seed}/{name}".encode()).digest()
    return _Slot(row, sample, int.from_bytes(digest[:4], "big") >> 1, name)  # 31 bits, as every server takes


def _write_locally(
    policy: CausalLMPolicy, settings: GenerationSettings, todo: list[_Slot], finished: dict[str, Any],
    journal: RecordJournal, bar: Any,
) -> dict[str, str]:  # fmt: skip
    """Fill ``finished``; gives what cannot be written, by name with the reason: under ``"error"`` before all else."""
    tasks, refused = [], {}
    for slot in todo:
        try:
            tasks.append(Task(slot.name, policy.prompt_ids(slot.prompt.messages), slot.seed))
        except InputError as error:
            refused[slot.name] = f"{slot.prompt.where}: {error}"
    if refused and settings.on_bad_row == "error":
        return refused

    def show(step: int) -> None:
        bar.set_postfix_str(f"token {step} of this batch")

    for replies in write_locally(policy, settings, tasks, frozenset(finished), show):
        _keep(replies, finished, journal, bar)
    return refused


def _ask(
    endpoint: ChatEndpoint, concurrency: int, settings: GenerationSettings, todo: list[_Slot],
    finished: dict[str, Any], journal: RecordJournal, bar: Any,
) -> dict[str, str]:  # fmt: skip
    """The same of an endpoint, one request a response."""
    requests = {
        slot.name: {
            "messages": slot.prompt.messages, "max_tokens": settings.max_new_tokens, "seed": slot.seed,
            "temperature": settings.temperature, "top_p": settings.top_p,
        }
        for slot in todo if slot.name not in finished
    }  # fmt: skip
    places = {slot.name: slot.prompt.where for slot in todo}
    refused = {}
    for name, reply in ask_all(endpoint, requests, concurrency):
        if isinstance(reply, RefusedRequest):
            refused[name] = f"{places[name]}: {reply}"
        else:
            _keep({name: reply}, finished, journal, bar)
    return refused


def _keep(replies: Mapping[str, Reply], finished: dict[str, Any], journal: RecordJournal, bar: Any) -> None:
    new = {name: asdict(reply) for name, reply in replies.items() if name not in finished}
    journal.add(new)
    finished |= new
    bar.update(len(new))


def _row(slot: _Slot, record: Mapping[str, Any], model: str, num_samples: int) -> dict[str, Any]:
    own = slot.prompt.id
    number = {} if own is None else {"id": own if num_samples == 1 else f"{own}#{slot.sample}"}
    return {
        **number, "prompt": written_prompt(slot.prompt.messages), "response": record["text"], "model": model,
        "seed": slot.seed, "sample": slot.sample, "finish_reason": record["finish_reason"],
        "tokens": record["completion_tokens"],
    }  # fmt: skip


def _counted(rows: list[dict[str, Any]], found: PromptSet, refused: Mapping[str, str]) -> dict[str, Any]:
    reasons = [*(found.bad_row_reasons or []), *refused.values()]
    return {
        "num_responses": len(rows),
        "num_prompts": len({json.dumps(row["prompt"]) for row in rows}),
        "finish_reasons": dict(Counter(row["finish_reason"] for row in rows).most_common()),
        "empty": sum(not row["response"].strip() for row in rows),
        "completion_tokens": sum(row["tokens"] for row in rows),
        "prompts": {
            "rows": found.num_rows, "repeated": found.repeated, "not_drawn": found.not_drawn,
            "bad_rows": found.bad_rows, "unanswered": len(refused), "reasons": reasons[:_LISTED],
        },
    }  # fmt: skip


def _about(output: Path) -> Path:
    """Beside the rows, and by its ending no data: the folder can be read as a data set."""
    return output.with_name(output.name + ".about")


def _rows_of_earlier_output(output: Path, identity: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Records of a finished file that was made in the same way and not changed since; else none."""
    try:
        about = json.loads(_about(output).read_text(encoding="utf-8"))
        if about["identity"] != json.loads(json.dumps(identity)) or about["sha256"] != file_digest(output):
            return {}
        records = {}
        with output.open(encoding="utf-8") as file:
            for row in map(json.loads, file):
                prompt = PromptRow(to_messages(row["prompt"]), None, "")
                reply = Reply(row["response"], row["finish_reason"], 0, row["tokens"])
                records[_slot(prompt, row["sample"], 0).name] = asdict(reply)
        return records
    except (OSError, ValueError, LookupError, TypeError):
        return {}
