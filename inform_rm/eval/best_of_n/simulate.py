"""Best-of-n overoptimization: how far the gold reward follows a proxy that chooses ever harder (Gao et al. 2023)."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike
from tqdm import tqdm

from inform_rm.data.sources import Source, source_label, source_list
from inform_rm.errors import InputError
from inform_rm.eval.best_of_n.policies import CausalLMPolicy, Policy, RecordedPolicy, choose_prompts, is_recorded
from inform_rm.eval.best_of_n.report import BestOfNResult
from inform_rm.eval.frame import parquet, settings_of
from inform_rm.eval.settings import SimulationSettings, check_numbers
from inform_rm.scoring.scorer import NonFiniteRewardError, Prompt, RewardScorer
from inform_rm.util.files import check_output_directory

BOOTSTRAP_DRAWS = 2000
_ROWS_IN_MEMORY = 8192
_COLUMNS = ("prompt_id", "prompt", "response", "gold")


class Scorer(Protocol):
    """What gives rewards: a `RewardScorer`, or an ensemble with the same interface."""

    name: str

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Any:
        """``(N,)`` rewards."""

    def identity(self) -> dict[str, Any]:
        """What decides a reward, as JSON values."""


def kl_nats(ns: ArrayLike) -> np.ndarray:
    """``log n - (n - 1) / n`` of ``(M,)`` ns: KL of best-of-n from the policy, in nats (Gao et al. 2023, section 2).

    Exact where no two responses have the same proxy reward; with ties, an upper bound.
    """
    ns = np.asarray(ns, dtype=np.float64)
    return np.log(ns) - (ns - 1) / ns


def best_of_n_weights(num_responses: int, ns: Sequence[int]) -> np.ndarray:
    """``(M, N)``: probability that the i-th lowest of N is the highest of n drawn from them without replacement.

    ``C(i - 1, n - 1) / C(N, n)``, computed downwards from ``n / N`` by the ratio of neighbours, so that nothing
    overflows. Each row sums to 1. Raises `InputError` on ns that do not rise from 1 or more to at most N.

    Example:
        >>> best_of_n_weights(3, [1, 2, 3]).round(3).tolist()
        [[0.333, 0.333, 0.333], [0.0, 0.333, 0.667], [0.0, 0.0, 1.0]]
    """
    check_numbers(ns, num_responses)
    ranks = np.arange(num_responses, 1, -1, dtype=np.float64)
    weights = np.empty((len(ns), num_responses))
    for row, n in enumerate(ns):
        ratios = np.maximum(ranks - n, 0) / (ranks - 1)
        weights[row, ::-1] = n / num_responses * np.concatenate([[1.0], np.cumprod(ratios)])
    return weights


def best_of_n_expectation(proxy: ArrayLike, values: ArrayLike, ns: Sequence[int]) -> np.ndarray:
    """Expected value of the response with the highest proxy among n, for each prompt: an unbiased estimate from N.

    ``sum_i C(i - 1, n - 1) / C(N, n) v_(i)``, v in the order of the proxy: the mean over all n-subsets of the N
    responses. Responses with equal proxy are as likely chosen as each other.

    Both are ``(P, N)``, the rewards by which the response is chosen and what is averaged (gold rewards, lengths, or
    the proxy again); the result is ``(P, M)`` float64. `InputError` as of `best_of_n_weights`.
    """
    proxy, values = np.asarray(proxy, dtype=np.float64), np.asarray(values, dtype=np.float64)
    order = np.argsort(proxy, axis=1, kind="stable")
    ordered = np.take_along_axis(proxy, order, axis=1)
    is_new = np.ones(proxy.shape, dtype=bool)
    is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    # The winner is equally likely to be any response of its tie, so each of them may stand for their mean.
    tie = np.cumsum(is_new) - 1
    sums = np.bincount(tie, weights=np.take_along_axis(values, order, axis=1).ravel())
    return (sums / np.bincount(tie))[tie].reshape(proxy.shape) @ best_of_n_weights(proxy.shape[1], ns).T


def overoptimization_curves(
    proxy: ArrayLike, gold: ArrayLike, ns: Sequence[int], *, lengths: ArrayLike | None = None, seed: int = 0
) -> dict[str, Any]:
    """Mean proxy and gold reward of the best of n by proxy, and the gold reward's peak (arXiv:2402.09345, Fig. 3).

    Intervals are 95 % percentile bootstrap intervals over prompts; one seed draws the same prompts for every proxy.
    A peak is found again in every bootstrap sample. A fall is never negative, and noise alone makes it positive.

    Of the ``(P, N)`` responses ``proxy`` holds the rewards by which one is chosen, ``gold`` those by which it is
    judged, ``lengths`` the words; the M ``ns`` rise from 1 or more to at most N, or it is an `InputError`.

    Returns:
        ``proxy``, ``gold`` and, if given, ``words``, each with ``mean`` (M), ``interval`` (M pairs), ``gain`` over a
        response drawn at random (n = 1) and ``gain_interval``; ``proxy_deviation``, the standard deviation of the
        proxy within prompts; ``peak`` with ``n`` (the smallest), ``kl_nats``, ``kl_nats_interval``, ``gold``, the
        ``fall`` from there to the last n and ``fall_interval``.
    """
    proxy = np.asarray(proxy, dtype=np.float64)
    even = np.full(len(proxy), 1 / len(proxy))
    shares = np.random.default_rng(seed).multinomial(len(proxy), even, BOOTSTRAP_DRAWS) / len(proxy)
    result: dict[str, Any] = {}
    for name, values in (("proxy", proxy), ("gold", gold), ("words", lengths)):
        if values is None:
            continue
        table = np.asarray(values, dtype=np.float64)
        chosen = best_of_n_expectation(proxy, table, ns)
        gains = chosen - table.mean(axis=1, keepdims=True)
        result[name] = {
            "mean": chosen.mean(axis=0).tolist(), "interval": _interval(shares @ chosen),
            "gain": gains.mean(axis=0).tolist(), "gain_interval": _interval(shares @ gains),
        }  # fmt: skip
    expected = best_of_n_expectation(proxy, gold, ns)
    means, draws, kls = expected.mean(axis=0), shares @ expected, kl_nats(ns)
    peak = int(_peak(means))
    falls = draws.max(axis=1) - draws[:, -1]
    result["proxy_deviation"] = float(np.sqrt(proxy.var(axis=1).mean()))
    result["peak"] = {
        "n": int(ns[peak]), "kl_nats": float(kls[peak]), "kl_nats_interval": _interval(kls[_peak(draws)]),
        "gold": float(means[peak]), "fall": float(means.max() - means[-1]), "fall_interval": _interval(falls),
    }  # fmt: skip
    return result


def simulate(
    proxy: str | Path | Scorer | Mapping[str, str | Path | Scorer],
    output: str | Path | None = None,
    *,
    gold: str | Path | Scorer,
    policy: str | Path | Policy,
    prompts: Sequence[Prompt] | None = None,
    data: "Source | Sequence[Source] | None" = None,
    progress: bool = True,
    **options: Any,
) -> BestOfNResult:
    """Best-of-n with one or several proxy rewards against a gold reward, up to KL = log n - (n - 1) / n.

    A policy writes ``num_responses`` responses to each prompt; proxies and gold score them; `overoptimization_curves`
    says what choosing by the proxy does to the gold reward. With ``output`` the folder receives ``responses.parquet``
    (one row a response), ``curves.png``, ``result.html``, ``result.md`` and at last ``result.json``.

    Args:
        proxy: folder or Hub id of a reward model, a `RewardScorer` or an ensemble; or several of them by name.
        output: folder for the results; ``None`` only returns them.
        gold: another reward model, which is taken for the truth.
        policy: causal language model (folder or Hub id), a file of responses, such as `inform_rm.generate` writes
            with several samples (its prompts are used where none are given), or an object with the interface of
            `Policy`, such as `CausalLMPolicy` of a loaded model.
        prompts: distinct prompts.
        data: in place of these, sources of preference pairs, whose distinct prompts are used.
        progress: show progress bars.
        options: fields of `SimulationSettings`, and keywords of `RewardScorer` for all models named by folder or Hub
            id; ``device`` and ``trust_remote_code`` hold for such a policy, too.

    Returns:
        By proxy the curves of `overoptimization_curves`, and what they were computed with.

    Raises:
        InputError: on bad settings, fewer than two prompts, repeated prompts, or a model that cannot be loaded.
        NonFiniteRewardError: if a model gives NaN or infinity.
    """
    settings, scorer_options = settings_of(SimulationSettings, options)
    models = dict(proxy) if isinstance(proxy, Mapping) else {"proxy": proxy}
    if not models or set(models) & set(_COLUMNS) or not all(isinstance(name, str) and name for name in models):
        raise InputError(f"proxy: names {list(models)}; expected at least one name, none of {', '.join(_COLUMNS)}.")
    folder = None if output is None else check_output_directory(output)
    if is_recorded(policy):
        policy = RecordedPolicy(policy)
        prompts = policy.prompts if prompts is None and data is None else prompts
    asked = choose_prompts(prompts, data, settings.num_prompts, settings.seed, settings.columns)
    proxies = {name: _scorer(model, f"proxy {name}", scorer_options) for name, model in models.items()}
    judge = _scorer(gold, "gold", scorer_options)
    if hasattr(judge, "check_prompts"):  # a gold reward that is not defined everywhere says so before time is spent
        judge.check_prompts(asked)
    writer = _policy(policy, settings, scorer_options)

    cut_before = getattr(writer, "num_cut", 0)
    bar = tqdm(asked, unit="prompt", desc="sample", disable=not progress)
    responses = [writer.sample(prompt, settings.num_responses, settings.seed) for prompt in bar]
    gold_rewards = _score(judge, "gold", asked, responses, progress)
    rewards = {name: _score(scorer, name, asked, responses, progress) for name, scorer in proxies.items()}
    words = np.array([[len(text.split()) for text in texts] for texts in responses])
    texts_of_prompts = [each if isinstance(each, str) else json.dumps(each, ensure_ascii=False) for each in asked]
    sources = None if data is None else ", ".join(map(source_label, source_list(data)))
    given = {"data": sources, "columns": settings.columns, **scorer_options}
    flat = [text for texts in responses for text in texts]
    result = BestOfNResult(
        ns=[int(n) for n in settings.numbers],
        kl_nats=kl_nats(settings.numbers).tolist(),
        num_prompts=len(asked),
        num_responses=settings.num_responses,
        distinct_responses=sum(len(set(texts)) for texts in responses),
        empty_responses=sum(not text.strip() for text in flat),
        cut_responses=writer.num_cut - cut_before if hasattr(writer, "num_cut") else None,
        intervals=f"95 %, percentile bootstrap over prompts, {BOOTSTRAP_DRAWS} draws",
        gold=_about(judge),
        policy=_about(writer),
        proxies={
            name: _about(scorer)
            | overoptimization_curves(rewards[name], gold_rewards, settings.numbers, lengths=words, seed=settings.seed)
            for name, scorer in proxies.items()
        },
        prompts_fingerprint=hashlib.sha256(json.dumps(asked).encode("utf-8", "surrogatepass")).hexdigest(),
        settings={name: str(value) for name, value in given.items() if value is not None},
        seed=settings.seed,
        responses={
            "prompt_id": np.repeat(np.arange(len(asked)), settings.num_responses),
            "prompt": [text for text in texts_of_prompts for _ in range(settings.num_responses)],
            "response": flat,
            "gold": gold_rewards.ravel(),
            **{name: values.ravel() for name, values in rewards.items()},
        },
    )
    if folder is not None:
        result.save(folder, {"responses.parquet": parquet(result.responses)})
    return result


def _about(model: Scorer | Policy) -> dict[str, Any]:
    return {"model": model.name, "identity": model.identity()}


def _interval(draws: np.ndarray) -> list[Any]:
    """95 % of draws along the first axis: a pair, or one a column."""
    return np.quantile(draws, [0.025, 0.975], axis=0).T.tolist()


def _peak(means: np.ndarray) -> np.ndarray:
    """Place of the maximum along the last axis; of values that differ by rounding alone, the first."""
    highest = means.max(axis=-1, keepdims=True)
    return (means >= highest - 1e-12 * np.maximum(1.0, np.abs(highest))).argmax(axis=-1)


def _scorer(model: Any, argument: str, options: dict[str, Any]) -> Scorer:
    if isinstance(model, str | Path):
        return RewardScorer(model, **options)
    # A module may have a head that is called score.
    if isinstance(model, torch.nn.Module) or not callable(getattr(model, "score", None)):
        raise InputError(
            f"{argument}: got a {type(model).__name__}; expected a folder, a Hub id or a RewardScorer, which is made "
            "of a loaded model by RewardScorer(model, tokenizer)."
        )
    return model


def _policy(policy: Any, settings: SimulationSettings, options: dict[str, Any]) -> Policy:
    if isinstance(policy, str | Path):
        of_model = {name: options[name] for name in ("device", "trust_remote_code") if name in options}
        return CausalLMPolicy(
            policy, temperature=settings.temperature, max_new_tokens=settings.max_new_tokens, **of_model
        )
    if not callable(getattr(policy, "sample", None)):
        raise InputError(
            f"policy: got a {type(policy).__name__}; expected a folder, a Hub id or an object with a method sample, "
            "such as CausalLMPolicy(model, tokenizer)."
        )
    return policy


def _score(
    scorer: Scorer, name: str, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]], progress: bool
) -> np.ndarray:
    """``(P, N)`` float64. Equal responses are scored once: their rewards are then ties to the last bit."""
    rows = [(number, text) for number, texts in enumerate(responses) for text in dict.fromkeys(texts)]
    found: dict[tuple[int, str], float] = {}
    with tqdm(total=len(rows), unit="response", desc=f"score {name}", disable=not progress) as bar:
        for start in range(0, len(rows), _ROWS_IN_MEMORY):
            part = rows[start : start + _ROWS_IN_MEMORY]
            try:
                values = scorer.score([prompts[number] for number, _ in part], [text for _, text in part])
            except NonFiniteRewardError as error:
                number, text = part[error.row]
                where = f"{name}: the response {text[:60]!r} to prompt {number} (from 0)"
                raise NonFiniteRewardError(start + error.row, error.value, where) from error
            except InputError as error:
                raise InputError(f"{name}, distinct responses from {start} on: {error}") from error
            found |= zip(part, np.asarray(values, dtype=np.float64).tolist(), strict=True)
            bar.update(len(part))
    rewards = np.array([[found[number, text] for text in texts] for number, texts in enumerate(responses)])
    if len(bad := np.argwhere(~np.isfinite(rewards))):
        row, column = bad[0]
        raise InputError(
            f"{name}: response {column} of prompt {row} (from 0) has {rewards[row, column]}; expected finite numbers."
        )
    return rewards
