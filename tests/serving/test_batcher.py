"""The queue between requests and model: nothing lost, nothing mixed up, one request's failure is its own."""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from inform_rm.data.encoding import Encoded
from inform_rm.scoring.ensembles import EnsembleScorer
from inform_rm.scoring.scorer import NonFiniteRewardError, RewardScorer
from inform_rm.serving.batcher import QueueFullError, TokenBatcher


class Sums:
    """In place of a model: the reward of a row is the sum of its token ids; id 666 breaks it, 777 gives NaN."""

    tokens_per_batch = 20

    def __init__(self):
        self.batches = []
        self.may_score = threading.Event()
        self.may_score.set()
        self.entered = threading.Event()

    def iter_scores(self, sequences, prompt_lengths, check_finite):
        assert not check_finite
        self.entered.set()
        self.may_score.wait(30)
        self.batches.append(list(sequences))
        if any(666 in ids for ids in sequences):
            raise RuntimeError("broken")
        order = sorted(range(len(sequences)), key=lambda place: -len(sequences[place]))
        for part in (order[: len(order) // 2], order[len(order) // 2 :]):
            values = [float("nan") if 777 in sequences[place] else float(sum(sequences[place])) for place in part]
            yield part, torch.tensor(values, dtype=torch.float64), None


@pytest.fixture
def sums():
    return Sums()


@pytest.fixture
def batcher(sums):
    made = TokenBatcher(sums, max_queued_rows=100)
    yield made
    sums.may_score.set()
    made.close()


def rows(*sequences, prompt=()):
    return [Encoded(list(prompt), list(ids)) for ids in sequences]


_ROW = st.lists(st.integers(0, 300), min_size=1, max_size=30)


@given(st.lists(st.lists(_ROW, max_size=6), min_size=1, max_size=16))
@hypothesis_settings(max_examples=15)
def test_every_request_gets_its_own_rewards_in_order(requests):
    batcher = TokenBatcher(Sums(), max_queued_rows=1000)
    try:
        futures = [batcher.submit(len(part), lambda part=part: rows(*part)) for part in requests]
        for part, future in zip(requests, futures, strict=True):
            scored = future.result(30)
            assert scored.rewards == [sum(ids) for ids in part]
            assert scored.tokens == sum(map(len, part))
        assert batcher.queued_rows == 0
    finally:
        batcher.close()


def held_then_scored(batcher, sums, requests):
    """Futures of requests that all waited together behind a first one, and the batches made of them."""
    sums.may_score.clear()
    first = batcher.submit(1, lambda: rows([1]))
    assert sums.entered.wait(30)
    futures = [batcher.submit(len(part), lambda part=part: part) for part in requests]
    batcher._encoder.submit(lambda: None).result(30)  # everything is encoded and waits
    sums.may_score.set()
    first.result(30)
    for future in futures:
        future.exception(30)
    return futures, [batch for batch in sums.batches if batch != [[1]]]


def test_batches_fill_the_token_budget_and_do_not_exceed_it(batcher, sums):
    requests = [rows([2] * 8, [3] * 8, [4] * 8), rows([5] * 30), rows([6] * 10), rows([7] * 10), rows([8] * 1)]
    _, batches = held_then_scored(batcher, sums, requests)
    sizes = [[len(ids) for ids in batch] for batch in batches]
    assert sizes == [[8, 8], [8], [30], [10, 10], [1]]  # 20 tokens, in the order in which they came


def test_a_shared_prompt_is_counted_once(batcher, sums):
    shared = rows(*([9] for _ in range(12)), prompt=[1] * 10)
    _, batches = held_then_scored(batcher, sums, [shared])
    assert [len(batch) for batch in batches] == [12]  # 10 + 12 tokens: up to four times a long prompt's
    assert batches[0][0] == [1] * 10 + [9]


def test_a_broken_request_fails_alone(batcher, sums):
    requests = [rows([1, 2]), rows([3], [666], [4]), rows([5])]
    futures, batches = held_then_scored(batcher, sums, requests)
    assert batches[0] == [[1, 2], [3], [666], [4], [5]]  # they did share a batch
    assert futures[0].result().rewards == [3] and futures[2].result().rewards == [5]
    assert isinstance(futures[1].exception(), RuntimeError)
    assert batcher.queued_rows == 0


def test_nan_fails_its_request_and_names_the_row(batcher, sums):
    futures, batches = held_then_scored(batcher, sums, [rows([1]), rows([2], [3], [777], [777, 1]), rows([4])])
    assert len(batches) == 1
    assert isinstance(futures[1].exception(), NonFiniteRewardError) and futures[1].exception().row == 2
    assert futures[0].result().rewards == [1] and futures[2].result().rewards == [4]


def test_rows_after_a_failed_one_are_not_computed(batcher, sums):
    futures, batches = held_then_scored(batcher, sums, [rows([777], *([1] * 15 for _ in range(9)))])
    assert isinstance(futures[0].exception(), NonFiniteRewardError)
    assert sum(map(len, batches)) == 2  # those of the first batch


def test_what_cannot_be_encoded_fails_alone(batcher):
    def broken():
        raise ValueError("no such text")

    futures = [batcher.submit(1, lambda: rows([1])), batcher.submit(5, broken), batcher.submit(1, lambda: rows([2]))]
    assert isinstance(futures[1].exception(30), ValueError)
    assert [futures[0].result(30).rewards, futures[2].result(30).rewards] == [[1], [2]]
    assert batcher.queued_rows == 0


def test_a_full_queue_refuses_and_takes_again_when_it_is_empty(batcher, sums):
    sums.may_score.clear()
    first = batcher.submit(60, lambda: rows(*([number] for number in range(60))))
    with pytest.raises(QueueFullError, match="60 rows wait, and 41 more would exceed the limit of 100"):
        batcher.submit(41, lambda: rows(*([1] for _ in range(41))))
    second = batcher.submit(40, lambda: rows(*([1] for _ in range(40))))
    sums.may_score.set()
    assert first.result(30).rewards == list(range(60)) and second.result(30).rewards == [1] * 40
    assert batcher.submit(100, lambda: rows(*([1] for _ in range(100)))).result(30).rewards == [1] * 100


def test_close_finishes_what_was_accepted_and_ends_both_threads(sums):
    before = set(threading.enumerate())
    batcher = TokenBatcher(sums, max_queued_rows=1000)
    sums.may_score.clear()
    futures = [batcher.submit(3, lambda number=number: rows(*([number] * 9,) * 3)) for number in range(50)]
    closing = threading.Thread(target=batcher.close)
    closing.start()
    sums.may_score.set()
    closing.join(30)
    assert not closing.is_alive()
    assert [future.result(0).rewards for future in futures] == [[9 * number] * 3 for number in range(50)]
    assert set(threading.enumerate()) <= before
    with pytest.raises(RuntimeError, match="closed"):
        batcher.submit(1, lambda: rows([1]))
    batcher.close()


def test_threads_that_submit_at_once_lose_nothing(batcher, sums):
    wrong = []

    def client(number):
        for turn in range(5):
            ids = [[number, turn, place] for place in range(3)]
            while True:
                try:
                    future = batcher.submit(3, lambda ids=ids: rows(*ids))
                    break
                except QueueFullError:
                    pass
            if future.result(30).rewards != [sum(row) for row in ids]:
                wrong.append((number, turn))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and batcher.queued_rows == 0
    assert sum(map(len, sums.batches)) == 16 * 5 * 3


@pytest.mark.parametrize("batching", ("packed", "padded"))
def test_rewards_are_the_scorers(scorer, batching):
    same = RewardScorer(scorer.model, scorer.tokenizer, tokens_per_batch=48, batching=batching)
    prompts = [f"{number % 5} apples" for number in range(40)]
    responses = ["so " * (number % 7 + 1) for number in range(40)]
    expected = scorer.score(prompts, responses)
    batcher = TokenBatcher(same, max_queued_rows=100)
    futures = []
    for start in range(0, 40, 8):
        pairs = list(zip(prompts, responses, strict=True))[start : start + 8]
        futures.append(
            batcher.submit(8, lambda pairs=pairs: [same.encode(prompt, response, "") for prompt, response in pairs])
        )
    batcher.close()
    found = torch.tensor([reward for future in futures for reward in future.result(0).rewards])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_an_ensemble_serves_as_one_model(scorer):
    ensemble = EnsembleScorer([scorer, scorer], coefficient=0.5, offsets=[0.0, 1.0])
    expected = ensemble.score(["an apple"] * 3, ["a", "b", "c"])
    batcher = TokenBatcher(ensemble, max_queued_rows=10)
    future = batcher.submit(3, lambda: [ensemble.encode("an apple", text, "") for text in "abc"])
    batcher.close()
    torch.testing.assert_close(torch.tensor(future.result(0).rewards), expected, atol=1e-5, rtol=0)
