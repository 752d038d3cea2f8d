"""Rows of many requests scored together, by tokens; knows threads and futures, not HTTP."""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from inform_rm.data.encoding import Encoded
from inform_rm.scoring.scorer import NonFiniteRewardError, RewardScorer

logger = logging.getLogger(__name__)


class QueueFullError(RuntimeError):
    """More rows wait than the queue takes; the request was not accepted."""


@dataclass(frozen=True)
class Scored:
    """Rewards of one request's rows in its order, and the tokens that these rows have, shared prompts counted anew."""

    rewards: list[float]
    tokens: int


@dataclass(eq=False)
class _Request:
    future: "Future[Scored]"
    rewards: list[float]
    rows_left: int
    tokens: int = 0


@dataclass(frozen=True)
class _Row:
    ids: list[int]
    prompt_ids: tuple[int, ...]
    request: _Request
    place: int


class TokenBatcher:
    """Takes requests from any thread and scores their rows in batches of the scorer's token budget.

    Two threads: one encodes requests in the order in which they came, the other takes rows from the front of the queue
    until they fill ``scorer.tokens_per_batch`` (each prompt counted once) and scores them. It does not wait for a
    batch to fill: whatever came while the last batch was computed makes the next one. Rewards are those of
    `RewardScorer.score`. The scorer must not be used elsewhere meanwhile.

    ``max_queued_rows`` are those accepted and not yet answered, of all requests together. ``on_batch`` is called after
    each batch with its rows, its tokens (each prompt counted once) and its seconds.
    """

    def __init__(
        self,
        scorer: RewardScorer,
        max_queued_rows: int,
        on_batch: Callable[[int, int, float], None] | None = None,
    ):
        self.scorer = scorer
        self.max_queued_rows = max_queued_rows
        self.queued_rows = 0
        self._on_batch = on_batch
        self._rows: deque[_Row] = deque()
        self._changed = threading.Condition()
        self._accepts = True
        self._more_may_come = True
        self._encoder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="inform-rm-encode")
        self._worker = threading.Thread(target=self._work, name="inform-rm-score", daemon=True)
        self._worker.start()

    def submit(self, num_rows: int, encode: Callable[[], list[Encoded]]) -> "Future[Scored]":
        """Accept a request; its future gets the rewards, or the exception that ``encode`` or the model raised.

        ``encode`` makes so many rows, in the encoding thread. `QueueFullError` if the queue has no place for them.
        """
        with self._changed:
            if not self._accepts:
                raise RuntimeError("the batcher is closed")
            if self.queued_rows + num_rows > self.max_queued_rows:
                raise QueueFullError(
                    f"{self.queued_rows} rows wait, and {num_rows} more would exceed the limit of "
                    f"{self.max_queued_rows}. Try again later."
                )
            self.queued_rows += num_rows
            request = _Request(Future(), [math.nan] * num_rows, num_rows)
            request.future.set_running_or_notify_cancel()  # accepted work is finished: nobody can cancel it
            self._encoder.submit(self._encode, request, encode)
        return request.future

    def close(self) -> None:
        """Accept nothing more, finish what was accepted, and end both threads."""
        with self._changed:
            self._accepts = False
        self._encoder.shutdown(wait=True)
        with self._changed:
            self._more_may_come = False
            self._changed.notify_all()
        self._worker.join()

    def _encode(self, request: _Request, encode: Callable[[], list[Encoded]]) -> None:
        try:
            encoded = encode()
        except Exception as error:
            self._finish(request, error)
            return
        rows = [_Row(row.input_ids, tuple(row.prompt_ids), request, place) for place, row in enumerate(encoded)]
        request.tokens = sum(len(row.ids) for row in rows)
        if not rows:
            self._finish(request)
            return
        with self._changed:
            self._rows.extend(rows)
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._rows or not self._more_may_come)
                batch, tokens = self._take()
                if not batch and not self._more_may_come:
                    return
            if batch:
                started = time.perf_counter()
                self._score(batch)
                if self._on_batch is not None:
                    self._on_batch(len(batch), tokens, time.perf_counter() - started)

    def _take(self) -> tuple[list[_Row], int]:
        """Rows from the front of the queue that keep the token budget, at least one, and their tokens."""
        batch: list[_Row] = []
        tokens = 0
        prompts: set[tuple[int, ...]] = set()
        budget = self.scorer.tokens_per_batch
        while self._rows:
            row = self._rows[0]
            if not row.request.future.done():  # else an earlier row of the request failed
                is_shared = row.prompt_ids in prompts
                cost = len(row.ids) - is_shared * len(row.prompt_ids)
                # As in packing.packed_batches: a long prompt is not computed again for every few responses.
                limit = max(budget, 4 * len(row.prompt_ids)) if is_shared else budget
                if batch and tokens + cost > limit:
                    break
                batch.append(row)
                tokens += cost
                prompts.add(row.prompt_ids)
            self._rows.popleft()
        return batch, tokens

    def _score(self, batch: Sequence[_Row]) -> None:
        """Give each row's request its reward; what one request breaks is not the others' failure."""
        try:
            rewards = self._rewards(batch)
        except Exception as error:
            requests = list(dict.fromkeys(row.request for row in batch))
            if len(requests) == 1:
                self._finish(requests[0], error)
            else:
                for request in requests:
                    self._score([row for row in batch if row.request is request])
            return
        for row, reward in zip(batch, rewards, strict=True):
            request = row.request
            request.rewards[row.place] = reward
            request.rows_left -= 1
            if request.future.done():  # an earlier row of it failed
                continue
            if not math.isfinite(reward):
                self._finish(request, NonFiniteRewardError(row.place, reward))
            elif not request.rows_left:
                self._finish(request)

    def _rewards(self, batch: Sequence[_Row]) -> list[float]:
        sequences, prompt_lengths = [row.ids for row in batch], [len(row.prompt_ids) for row in batch]
        rewards = [math.nan] * len(batch)
        for places, values, _ in self.scorer.iter_scores(sequences, prompt_lengths, check_finite=False):
            for place, value in zip(places, values.tolist(), strict=True):
                rewards[place] = value
        return rewards

    def _finish(self, request: _Request, error: Exception | None = None) -> None:
        with self._changed:
            self.queued_rows -= len(request.rewards)
        if error is None:
            request.future.set_result(Scored(request.rewards, request.tokens))
        else:
            request.future.set_exception(error)
