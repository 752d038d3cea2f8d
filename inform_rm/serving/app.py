"""The application: endpoints, and what each failure looks like to a client."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer

import inform_rm
from inform_rm.data.encoding import Encoded
from inform_rm.errors import InputError, check_whole_number, shortened
from inform_rm.scoring.scorer import NonFiniteRewardError, RewardScorer
from inform_rm.serving import wire
from inform_rm.serving.batcher import QueueFullError, Scored, TokenBatcher
from inform_rm.serving.gate import Gate, RequestError, refusal
from inform_rm.serving.metrics import CONTENT_TYPE, Metrics
from inform_rm.serving.rows import RowError, encode_ids, encode_rows, encode_texts, warn_of_template_end

logger = logging.getLogger(__name__)

_ENDPOINTS = ("/score", "/get_reward", "/classify", "/health", "/metrics")
_ERRORS: dict[int, str] = {
    400: "The body is not JSON.",
    401: "The bearer token is missing or wrong.",
    408: "The body took too long to arrive.",
    413: "The body is too large.",
    422: "The body is JSON, but not a request, or a row cannot be scored; `row` names it.",
    429: "Too much waits already; `Retry-After` says when to try again.",
    500: "The model failed, or gave NaN or infinity for `row`.",
}


@dataclass(frozen=True)
class Limits:
    """What clients may ask for; a row's tokens are limited by the scorer's ``max_length``.

    Attributes:
        max_body_bytes: of one request (413).
        max_rows: of one request (422).
        max_queued_rows: accepted and not yet answered, of all requests together (429).

    Raises:
        InputError: on a limit below 1, or a queue that a single allowed request would overfill.
    """

    max_body_bytes: int = 16 * 2**20
    max_rows: int = 8192
    max_queued_rows: int = 32768

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_whole_number(name, value)
        if self.max_queued_rows < self.max_rows:
            raise InputError(
                f"max_queued_rows: {self.max_queued_rows} is below max_rows, {self.max_rows}. Raise the one or "
                "lower the other: a request of that many rows would never be taken."
            )


def create_app(scorer: RewardScorer, limits: Limits | None = None, token: str | None = None) -> FastAPI:
    """The ASGI application that serves one reward model; its threads run until its lifespan ends.

    Without a lifespan (tests call the application directly) end it by ``app.state.batcher.close()``. The scorer is not
    to be used elsewhere meanwhile. ``token`` is what clients must send as ``Authorization: Bearer``; ``None`` lets
    everyone in, and one with characters that no header can carry is an `InputError`.
    """
    limits = limits or Limits()
    if token is not None and (not token or not token.isascii() or not token.isprintable() or " " in token):
        raise InputError("token: expected printable ASCII characters without spaces, at least one.")
    metrics = Metrics(_ENDPOINTS)
    batcher = TokenBatcher(scorer, limits.max_queued_rows, metrics.observe_batch)
    metrics.watch_queue(lambda: batcher.queued_rows)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(batcher.close)

    app = FastAPI(
        title="inform-rm serve", version=inform_rm.__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )  # fmt: skip
    app.state.batcher = batcher
    app.add_middleware(
        Gate,
        token=None if token is None else token.encode(),
        max_body_bytes=limits.max_body_bytes,
        observe=metrics.observe_request,
    )
    for kind in (RequestError, RequestValidationError, Exception, 400, 404, 405):
        app.add_exception_handler(kind, _refuse)
    # The gate asks for the token; this is how the schema says so.
    bearer = [] if token is None else [Depends(HTTPBearer(auto_error=False))]
    _add_endpoints(app, scorer, limits, batcher, metrics, bearer)
    return app


def _add_endpoints(
    app: FastAPI, scorer: RewardScorer, limits: Limits, batcher: TokenBatcher, metrics: Metrics, bearer: list[Any]
) -> None:
    # A folder's own name, without those that lead to it: a client need not know where the model lies.
    name = Path(scorer.name).resolve().name if Path(scorer.name).is_dir() else scorer.name
    label = (getattr(getattr(scorer.model, "config", None), "id2label", None) or {}).get(0)

    async def scored(num_rows: int, encode: Callable[[], list[Encoded]]) -> Scored:
        if num_rows > limits.max_rows:
            raise RequestError(
                422, f"{num_rows} rows; the limit is {limits.max_rows}. Send several requests.", row=limits.max_rows
            )
        try:
            return await asyncio.wrap_future(batcher.submit(num_rows, encode))
        except QueueFullError as error:
            raise RequestError(429, str(error), headers={"Retry-After": "1"}) from error
        except RowError as error:
            raise RequestError(422, str(error), error.row) from error
        except NonFiniteRewardError as error:
            logger.error("a request failed: %s", error)
            raise RequestError(500, str(error), error.row) from error
        except Exception as error:
            logger.exception("the model failed on %d rows", num_rows)
            raise RequestError(500, f"the model failed ({type(error).__name__}); the log says more.") from error

    def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
        return {status: {"model": wire.ErrorBody, "description": _ERRORS[status]} for status in statuses}

    tell_of_template = cache(partial(warn_of_template_end, scorer.tokenizer))  # once, and only who is asked so
    refusals = [status for status in _ERRORS if bearer or status != 401]
    every: dict[str, Any] = {"responses": errors(*refusals), "dependencies": bearer}

    @app.post("/score", **every)
    async def score(request: wire.ScoreRequest) -> wire.ScoreResponse:
        """Rewards of prompt/response rows."""
        rows = [row.model_dump() for row in request.rows]
        prompts, responses = [row["prompt"] for row in rows], [row["response"] for row in rows]
        result = await scored(len(responses), lambda: encode_rows(scorer, prompts, responses))
        return wire.ScoreResponse(model=name, rewards=result.rewards, tokens=result.tokens)

    @app.post("/get_reward", **every)
    async def get_reward(request: wire.RemoteRewardRequest) -> wire.RemoteRewardResponse:
        """OpenRLHF's remote reward: whole texts, tokenised as they stand."""
        tell_of_template()
        texts = request.query
        result = await scored(len(texts), lambda: encode_texts(scorer, texts, add_special_tokens=False))
        return wire.RemoteRewardResponse(rewards=result.rewards, scores=result.rewards)

    @app.post("/classify", **every)
    async def classify(request: wire.ClassifyRequest) -> wire.ClassifyResponse:
        """Classification as vLLM has it; `probs` holds the raw reward."""
        result = await scored(*_classify_rows(scorer, request))
        data = [wire.ClassifyItem(index=i, label=label, probs=[reward]) for i, reward in enumerate(result.rewards)]
        usage = wire.Usage(prompt_tokens=result.tokens, total_tokens=result.tokens)
        return wire.ClassifyResponse(model=name, data=data, usage=usage)

    @app.get("/health", responses=errors(408, 413, 429))
    async def health() -> wire.Health:
        """Answers as soon as the model is loaded; open to all."""
        return wire.Health(model=name)

    text: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
    answers = text | errors(*([401] if bearer else []), 408, 413, 429)

    @app.get("/metrics", response_class=Response, responses=answers, dependencies=bearer)
    async def read_metrics() -> Response:
        """Metrics for Prometheus."""
        return Response(metrics.exposition(), media_type=CONTENT_TYPE)


def _classify_rows(scorer: RewardScorer, request: wire.ClassifyRequest) -> tuple[int, Callable[[], list[Encoded]]]:
    if request.truncate_prompt_tokens is not None:
        raise RequestError(422, "truncate_prompt_tokens: nothing is cut here. Leave it out and send shorter rows.")
    if request.use_activation or request.activation or request.softmax:
        raise RequestError(422, "use_activation: a reward has no activation; probs holds it raw. Leave it out.")
    if (request.input is None) == (request.messages is None):
        raise RequestError(422, "expected either input (texts) or messages (one conversation).")
    if request.messages is not None:
        turns = [turn.model_dump() for turn in request.messages]
        if not turns or turns[-1]["role"] != "assistant":
            raise RequestError(422, "messages: the last one must be the assistant's, the response to score.")
        return 1, lambda: encode_rows(scorer, [turns[:-1]], [turns[-1]["content"]])
    rows: list[Any] = [request.input] if isinstance(request.input, str) else request.input or []
    if rows and isinstance(rows[0], int):
        rows = [rows]
    if rows and isinstance(rows[0], list):
        return len(rows), lambda: encode_ids(scorer, rows)
    return len(rows), lambda: encode_texts(scorer, rows, request.add_special_tokens)


async def _refuse(_: Request, error: Any) -> JSONResponse:
    """The answer to whatever ended a request."""
    if isinstance(error, RequestValidationError):
        error = _invalid(error)
    elif hasattr(error, "status_code"):  # the framework's own: no such path or method
        error = RequestError(error.status_code, f"{error.detail}.", headers=error.headers)
    elif not isinstance(error, RequestError):
        error = RequestError(500, f"internal error ({type(error).__name__}); the server's log says more.")
    return refusal(error)


def _invalid(error: RequestValidationError) -> RequestError:
    """422 with the most precise fault; the input is not repeated, which could be anything."""
    first = max(error.errors(), key=lambda fault: len(fault["loc"]))  # a union has one for each of its types
    if first["type"] == "json_invalid":
        return RequestError(400, f"the body is not JSON: {first['ctx']['error']} at {first['loc'][-1]}.")
    if first["loc"] == ("body",):
        return RequestError(422, "the body is no JSON object sent with 'Content-Type: application/json'.")
    is_row = first["loc"][1] in ("rows", "query") and len(first["loc"]) > 2
    place = shortened(".".join(str(part) for part in first["loc"][1:]))
    hint = ""
    if first["loc"] == ("body", "rows") and first["type"] == "missing":
        hint = ' Send {"rows": [{"prompt": "...", "response": "..."}]}; a whole conversation goes to /classify.'
    return RequestError(422, f"{place}: {first['msg']}.{hint}", first["loc"][2] if is_row else None)
