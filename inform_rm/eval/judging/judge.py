"""`judge`: win rates of one policy's responses over another's, or which responses exploit a reward."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from inform_rm.data.prompt_rows import written_prompt
from inform_rm.data.response_rows import ScoreRow
from inform_rm.data.sources import Source, source_digest, source_label
from inform_rm.eval.frame import json_lines, settings_of
from inform_rm.eval.generation.settings import EndpointSettings
from inform_rm.eval.judging.answers import Answer, Answers, ask_judge
from inform_rm.eval.judging.prompts import LABEL, PAIR, JudgePrompt, Unreadable
from inform_rm.eval.judging.report import LabelResult, WinRateResult
from inform_rm.eval.judging.rows import Pair, matched, read_responses
from inform_rm.eval.judging.settings import JudgeSettings
from inform_rm.util.endpoint import EndpointError
from inform_rm.util.files import check_output_directory
from inform_rm.util.intervals import grouped_bootstrap, wilson_interval

logger = logging.getLogger(__name__)

_LISTED = 1000
_RESAMPLES = 2000
_SHOWN_CHARACTERS = 400


def judge(
    responses: Source,
    output: str | Path | None = None,
    *,
    baseline: Source | None = None,
    model: str,
    endpoint: str,
    progress: bool = True,
    **options: Any,
) -> WinRateResult | LabelResult:
    """Ask a language model which of two responses is better, or which responses exploit a reward (2402.09345, J.4).

    With ``baseline`` each pair of responses to one prompt is shown in both orders: a response wins if it is preferred
    in both, and everything else that can be read is a tie. Without it each response is labelled as exploiting a
    reward (``hacked``) or not. Answers are read by their last line; one without a verdict is counted and named, and
    left out of all figures.

    With ``output`` the folder receives ``answers.jsonl`` (every answer as it comes; a further call asks only what is
    not there), ``judgments.jsonl`` or ``labels.jsonl`` (which `inform_rm.detect` takes as ``labels``), a plot,
    ``result.html``, ``result.md`` and at last ``result.json``.

    Args:
        responses: rows with ``prompt`` and ``response``, see `inform_rm.data.response_rows.score_rows_or_faults`.
        output: folder for the results; ``None`` only returns them.
        baseline: the same of another policy; the k-th response to a prompt is compared with the k-th there.
        model: name under which the endpoint serves the judge.
        endpoint: base address such as ``http://localhost:8000/v1``.
        progress: show a progress bar with tokens and cost.
        options: fields of `inform_rm.eval.judging.settings.JudgeSettings` and, beside the address, of
            `inform_rm.eval.generation.settings.EndpointSettings`.

    Returns:
        Win rate, ties and position bias; or the share that exploits a reward. Both with intervals, tokens and cost.

    Raises:
        InputError: bad settings or rows, no common prompts, or an endpoint that refuses key or model.
        EndpointError: the endpoint gave no usable reply after all tries, or none of its answers can be read; what is
            answered is kept.
    """
    settings, of_endpoint = settings_of(JudgeSettings, options, EndpointSettings)
    asked = EndpointSettings(endpoint, **of_endpoint)
    chat = asked.open(model)
    template = JudgePrompt(LABEL if baseline is None else PAIR, settings.prompt_file)
    folder = None if output is None else check_output_directory(output)
    sources = [responses] if baseline is None else [responses, baseline]
    read = [read_responses(source, settings.columns, settings.on_bad_row) for source in sources]
    given = {**asdict(asked), **asdict(settings)}
    del given["seed"]  # it has a place of its own
    about: dict[str, Any] = {
        "judge": {"endpoint": chat.base, "model": chat.model, "prompt_sha256": template.sha256},
        "data": [
            {"source": source_label(source), "digest": source_digest(source), **counts}
            for source, (_, counts) in zip(sources, read, strict=True)
        ],
        "settings": {name: value for name, value in given.items() if value is not None}, "seed": settings.seed,
    }  # fmt: skip
    ask = partial(ask_judge, chat, settings=settings, folder=folder, concurrency=asked.concurrency, progress=progress)
    result: WinRateResult | LabelResult
    if baseline is None:
        result, rows = _label(read[0][0], template, ask, settings, about)
        name = "labels.jsonl"
    else:
        result, rows = _compare(read[0][0], read[1][0], template, ask, settings, about)
        name = "judgments.jsonl"
    if folder is not None:
        result.save(folder, {name: json_lines(rows)})
    return result


def _compare(
    own: list[ScoreRow],
    baseline: list[ScoreRow],
    template: JudgePrompt,
    ask: Callable[..., Answers],
    settings: JudgeSettings,
    about: dict[str, Any],
) -> tuple[WinRateResult, list[dict[str, Any]]]:
    pairs, unpaired = matched(own, baseline)
    if unpaired["responses"] or unpaired["baseline"]:
        text = (
            "judge: %d responses and %d of the baseline have no partner to the same prompt and are left out (%s, ...)."
        )
        logger.warning(text, unpaired["responses"], unpaired["baseline"], unpaired["examples"][0])
    requests = []
    for pair in pairs:
        both = (pair.own.response, pair.baseline.response)
        orders = () if both[0] == both[1] else (both, both[::-1])  # there is nothing to ask about equal responses
        requests.append([template.messages(pair.own.prompt, *order) for order in orders])
    answers = ask([messages for asked in requests for messages in asked])
    found = iter(answers.found)
    rows = [
        _judgment(pair, [next(found) for _ in asked], template) for pair, asked in zip(pairs, requests, strict=True)
    ]
    judged = [(row, pair) for row, pair in zip(rows, pairs, strict=True) if row["outcome"] is not None]
    unreadable = _unreadable(rows)
    if not judged:
        raise EndpointError(f"judge: none of {len(rows)} pairs has a readable verdict; the first: {unreadable[0]}")
    credits = {"win": 1.0, "tie": 0.5, "loss": 0.0}
    values = np.array([credits[row["outcome"]] for row, _ in judged])
    interval, kind = _interval(values, [pair.key for _, pair in judged], settings.seed)
    outcomes = [row["outcome"] for row, _ in judged]
    result = WinRateResult(
        **about,
        num_pairs=len(pairs),
        num_judged=len(judged),
        num_prompts=len({pair.key for _, pair in judged}),
        wins=outcomes.count("win"),
        ties=outcomes.count("tie"),
        losses=outcomes.count("loss"),
        win_rate=float(values.mean()),
        win_rate_interval=interval,
        interval_kind=kind,
        identical=sum(not asked for asked in requests),
        position=_position([row["verdicts"] for row, _ in judged if row["verdicts"]]),
        mean_words=[
            float(np.mean([len(row[name].split()) for row, _ in judged])) for name in ("response", "baseline_response")
        ],
        unpaired=unpaired,
        unreadable=unreadable[:_LISTED],
        num_unreadable=len(unreadable),
        **_spent(answers, settings),
    )
    return result, rows


def _judgment(pair: Pair, answers: Sequence[Answer], template: JudgePrompt) -> dict[str, Any]:
    """What became of a pair: ``verdicts`` are ``"1"``, ``"2"`` or ``"tie"``, in the orders that were shown."""
    row: dict[str, Any] = {
        **_identified(pair.own), "prompt": written_prompt(pair.own.prompt), "response": pair.own.response,
        "baseline_response": pair.baseline.response, "where": [pair.own.where, pair.baseline.where],
    }  # fmt: skip
    if not answers:
        return {**row, "outcome": "tie", "verdicts": [], "answers": []}
    verdicts, found = zip(*(_read_verdict(answer, template) for answer in answers), strict=True)
    faults = [f"order {number}: {fault}" for number, fault in enumerate(found, start=1) if fault]
    row |= {"outcome": None, "verdicts": list(verdicts), "answers": [answer.text for answer in answers]}
    if faults:
        return {**row, "unreadable": "; ".join(faults)}
    return {**row, "outcome": {("1", "2"): "win", ("2", "1"): "loss"}.get(verdicts, "tie")}


def _label(
    rows: list[ScoreRow],
    template: JudgePrompt,
    ask: Callable[..., Answers],
    settings: JudgeSettings,
    about: dict[str, Any],
) -> tuple[LabelResult, list[dict[str, Any]]]:
    answers = ask([template.messages(row.prompt, row.response) for row in rows])
    written = []
    for row, answer in zip(rows, answers.found, strict=True):
        verdict, fault = _read_verdict(answer, template)
        written.append(
            {
                **_identified(row), "prompt": written_prompt(row.prompt), "response": row.response,
                "hacked": None if fault else verdict == "yes", "where": [row.where],
                "answers": [answer.text], **({"unreadable": fault} if fault else {}),
            }
        )  # fmt: skip
    labels = [row["hacked"] for row in written if row["hacked"] is not None]
    unreadable = _unreadable(written)
    if not labels:
        raise EndpointError(f"judge: none of {len(rows)} answers has a readable verdict; the first: {unreadable[0]}")
    result = LabelResult(
        **about,
        num_responses=len(rows),
        num_labelled=len(labels),
        hacked=sum(labels),
        share=sum(labels) / len(labels),
        share_interval=list(wilson_interval(sum(labels), len(labels))),
        unreadable=unreadable[:_LISTED],
        num_unreadable=len(unreadable),
        **_spent(answers, settings),
    )
    return result, written


def _read_verdict(answer: Answer, template: JudgePrompt) -> tuple[str | None, str | None]:
    """The verdict of an answer, or what is wrong with it."""
    if answer.text is None:
        return None, f"refused: {answer.refused}"
    try:
        return template.verdict(answer.text), None
    except Unreadable as error:
        return None, f"{error}{' (the answer was cut)' if answer.is_cut else ''}"


def _unreadable(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Which rows have no verdict, why, and the end of what was answered."""
    return [
        {
            "where": row["where"], "reason": row["unreadable"],
            "answers": [text if text is None else text[-_SHOWN_CHARACTERS:] for text in row["answers"]],
        }
        for row in rows if "unreadable" in row
    ]  # fmt: skip


def _identified(row: ScoreRow) -> dict[str, Any]:
    own = row.fields.get("id")
    return {} if own is None else {"id": own}


def _spent(answers: Answers, settings: JudgeSettings) -> dict[str, Any]:
    cost = settings.cost(answers.tokens["prompt"], answers.tokens["completion"])
    return {"asked_now": answers.asked, "tokens": answers.tokens, "cost": cost}


def _position(verdicts: Sequence[Sequence[str]]) -> dict[str, Any]:
    """How often the first place won among pairs whose two verdicts both name a place; 0.5 without a bias.

    A pair counts 0, 1/2 or 1; Wilson's interval of such values is too wide rather than too narrow.
    """
    decided = [pair for pair in verdicts if "tie" not in pair]
    first = [pair.count("1") / 2 for pair in decided]
    found: dict[str, Any] = {
        "pairs": len(decided), "both_first": first.count(1.0), "both_second": first.count(0.0),
        "same_winner": first.count(0.5),
    }  # fmt: skip
    if decided:
        found |= {"first_share": float(np.mean(first))}
        found |= {"first_share_interval": list(wilson_interval(sum(first), len(first)))}
    return found


def _interval(values: np.ndarray, prompts: Sequence[str], seed: int) -> tuple[list[float], str]:
    """95 % interval of the mean: Wilson's, or where prompts have several pairs a bootstrap over prompts."""
    if len(set(prompts)) == len(values):
        return list(wilson_interval(float(values.sum()), len(values))), "Wilson, a tie counts half"
    interval = grouped_bootstrap(values, prompts, num_resamples=_RESAMPLES, seed=seed)
    return list(interval), f"bootstrap over prompts, {_RESAMPLES} resamples"
