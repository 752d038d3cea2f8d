"""What clients see: rewards as from `RewardScorer`, and for everything else a status code with a reason."""

import asyncio
import base64
import copy
import hmac
import json
import random
import re
import threading
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from inform_rm.data.tokenizer import render
from inform_rm.errors import InputError
from inform_rm.scoring.scorer import RewardScorer
from inform_rm.serving import gate
from inform_rm.serving.app import Limits, create_app

JSON = {"content-type": "application/json"}


def row(prompt, response):
    return {"prompt": prompt, "response": response}


def conversation(*texts):
    roles = ("user", "assistant")
    return [{"role": roles[place % 2], "content": text} for place, text in enumerate(texts)]


async def posted(app, path, bodies):
    """Responses to all bodies, sent at once."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://served", timeout=60) as client:
        return await asyncio.gather(*(client.post(path, json=body) for body in bodies))


_WORDS = st.lists(st.sampled_from(["red", "apples", "seven", "the sea", "ünï", "</s>"]), min_size=1, max_size=8)
_TEXT = _WORDS.map(" ".join)
_RESPONSE = st.sampled_from(["", " "]) | _TEXT
_PROMPT = _TEXT | _TEXT.map(conversation) | st.tuples(_TEXT, _TEXT, _TEXT).map(lambda texts: conversation(*texts))


@given(st.lists(st.lists(st.tuples(_PROMPT, _RESPONSE), max_size=5), min_size=1, max_size=6))
@hypothesis_settings(max_examples=6)
def test_rewards_are_those_of_the_scorer_for_any_mix_of_requests(scorer, requests):
    expected = [
        scorer.score([prompt for prompt, _ in part], [response for _, response in part]).tolist() for part in requests
    ]
    app = create_app(scorer)
    try:
        bodies = [{"rows": [row(*pair) for pair in part]} for part in requests]
        answers = asyncio.run(posted(app, "/score", bodies))
    finally:
        app.state.batcher.close()
    for answer, rewards, part in zip(answers, expected, requests, strict=True):
        assert answer.status_code == 200, answer.text
        assert answer.json()["rewards"] == pytest.approx(rewards, abs=1e-5)
        assert answer.json()["tokens"] == sum(len(scorer.encode(*pair, "").input_ids) for pair in part)


def test_clients_at_once_each_get_their_own_rewards(scorer, make_app):
    generator = random.Random(0)
    words = ["red", "apples", "seven", "the", "sea", "blue"]

    def rows_of_a_client():
        return [
            (f"How many {generator.choice(words)}?", " ".join(generator.choices(words, k=generator.randint(1, 12))))
            for _ in range(generator.randint(1, 6))
        ]  # fmt: skip

    requests = [rows_of_a_client() for _ in range(12 * 2)]
    flat = [pair for part in requests for pair in part]
    known = scorer.score([prompt for prompt, _ in flat], [response for _, response in flat]).tolist()
    of = dict(zip(flat, known, strict=True))
    assert len(set(known)) > 40  # a mix-up would show
    app = make_app(scorer)

    async def client(client_requests):
        return [
            (await posted(app, "/score", [{"rows": [row(*pair) for pair in part]}]))[0] for part in client_requests
        ]  # fmt: skip

    async def clients():
        return await asyncio.gather(*(client(requests[start::12]) for start in range(12)))

    answers = asyncio.run(clients())
    for start in range(12):
        for answer, part in zip(answers[start], requests[start::12], strict=True):
            assert answer.status_code == 200
            assert answer.json()["rewards"] == pytest.approx([of[pair] for pair in part], abs=1e-5)
    assert app.state.batcher.queued_rows == 0


def test_openrlhf_text_is_the_rendered_conversation_and_gets_its_reward(client, scorer, tokenizer):
    prompts, responses = ["an apple", "two"], ["a sea", "the sky"]
    expected = scorer.score(prompts, responses).tolist()
    texts = [
        tokenizer.apply_chat_template(conversation(prompt, response), tokenize=False)
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    answer = client.post("/get_reward", json={"query": texts, "prompts": prompts, "labels": [None, "x"]})
    assert answer.status_code == 200
    rewards = pytest.approx(expected, abs=1e-5)
    assert answer.json() == {"rewards": rewards, "scores": rewards, "extra_logs": {}}
    plain = scorer.score_encoded([tokenizer("no template", add_special_tokens=False)["input_ids"]]).tolist()
    assert client.post("/get_reward", json={"query": ["no template"]}).json()["rewards"] == pytest.approx(plain)
    # Several servers share one list, and the last may get none of it.
    assert client.post("/get_reward", json={"query": []}).json()["rewards"] == []


@pytest.mark.parametrize(
    ("end", "fault"),
    [("</s>\\n", r"writes '\n' after the end token"), ("", "ends a reply without the end token"), ("</s>", None)],
)
def test_openrlhf_is_told_once_that_its_texts_end_elsewhere(
    scorer, tokenizer, make_app, caplog, monkeypatch, end, fault
):
    other = copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("</s>", end)
    monkeypatch.setattr(scorer, "tokenizer", other)
    client = TestClient(make_app(scorer))
    assert client.post("/score", json={"rows": [row("a", "b")]}).status_code == 200
    assert "/get_reward" not in caplog.text
    for _ in range(2):
        assert client.post("/get_reward", json={"query": ["a"]}).status_code == 200
    assert caplog.text.count("/get_reward: this model's chat template") == (fault is not None)
    assert fault is None or fault in caplog.text


def test_classify_takes_texts_ids_and_messages(client, scorer, tokenizer):
    texts = ["an apple", "the sea is blue"]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    expected = scorer.score_encoded(ids).tolist()

    def rewards(body):
        answer = client.post("/classify", json=body)
        assert answer.status_code == 200, answer.text
        content = answer.json()
        assert content["object"] == "list" and content["id"].startswith("classify-")
        assert [item["index"] for item in content["data"]] == list(range(len(content["data"])))
        assert {(item["label"], item["num_classes"]) for item in content["data"]} == {("LABEL_0", 1)}
        return [item["probs"][0] for item in content["data"]], content["usage"]

    found, usage = rewards({"model": "any", "input": texts})
    assert found == pytest.approx(expected, abs=1e-5)
    assert usage == {"prompt_tokens": sum(map(len, ids)), "total_tokens": sum(map(len, ids)), "completion_tokens": 0}
    assert rewards({"input": ids})[0] == pytest.approx(expected, abs=1e-5)
    assert rewards({"input": texts[1]})[0] == pytest.approx(expected[1:], abs=1e-5)
    assert rewards({"input": ids[1]})[0] == pytest.approx(expected[1:], abs=1e-5)
    turns = conversation("an apple", "a sea", "two", "red")
    by_scorer = scorer.score([turns[:-1]], ["red"]).tolist()
    assert rewards({"messages": turns})[0] == pytest.approx(by_scorer, abs=1e-5)
    rendered = render(tokenizer, [turns], tokenize=False)
    assert rewards({"input": rendered, "add_special_tokens": False})[0] == pytest.approx(by_scorer, abs=1e-5)


def test_add_special_tokens_is_the_tokenizers(scorer, tokenizer, make_app, monkeypatch):
    seen = []
    app = make_app(scorer)
    monkeypatch.setattr(
        "inform_rm.serving.app.encode_texts",
        lambda _, texts, add_special_tokens: seen.append(add_special_tokens) or [],
    )
    client = TestClient(app)
    for body in ({"input": "a"}, {"input": "a", "add_special_tokens": False}):
        client.post("/classify", json=body)
    client.post("/get_reward", json={"query": ["a"]})
    assert seen == [True, False, False]


@pytest.mark.parametrize(
    ("path", "body", "message", "place"),
    [
        ("/score", {"rows": [row("a", "b"), row("", "b")]}, "row 1 .* prompt", 1),
        ("/score", {"rows": [row("a", "b"), row("a", "red " * 200)]}, r"row 1 .* tokens; the limit is 128", 1),
        ("/score", {"rows": [row("a", "b"), row(conversation("a", "b"), "c")]}, "row 1 .* expected 'user'", 1),
        ("/score", {"rows": [row("a", "b"), row([{"role": "robot", "content": "a"}], "c")]}, "row 1 .*role", 1),
        ("/score", {"rows": [row("a", "b"), {"prompt": "a"}]}, r"rows\.1\.response: Field required", 1),
        ("/score", {"rows": [row("a", 5)]}, r"rows\.0\.response: Input should be a valid string", 0),
        ("/score", {"rows": [{**row("a", "b"), "reponse": "c"}]}, r"rows\.0\.reponse: Extra inputs", 0),
        ("/score", {"rows": [row(["a"], "b")]}, r"rows\.0\.prompt", 0),
        ("/score", row("a", "b"), r'rows: Field required\. Send \{"rows": \[.* goes to /classify', None),
        # What vLLM's endpoint of this name takes: two texts, joined without the template.
        ("/score", {"queries": "a", "documents": "b"}, "rows: Field required", None),
        ("/score", {"rows": "a"}, "rows: Input should be a valid list", None),
        ("/score", ["a"], "no JSON object", None),
        ("/score", {"rows": [row("a\ud800", "b")]}, "row 0 .* unpaired surrogate at character 2", 0),
        ("/score", {"rows": [row(conversation("a\ud800"), "b")]}, "row 0 .* unpaired surrogate at character 2", 0),
        ("/score", {"rows": [row([{"role": "\ud800", "content": "a"}], "b")]}, "row 0 .* role", 0),
        ("/score", {"rows": [row("a", "b"), row("a", "b\ud800")]}, "row 1 .* unpaired surrogate at character 2", 1),
        ("/score", {"rows": [{**row("a", "b"), "\ud800" * 500: 1}]}, r"rows\.0: .* unicode string", 0),
        ("/get_reward", {"query": ["a", "b\ud800"]}, "row 1 .* unpaired surrogate at character 2", 1),
        ("/get_reward", {"query": ["a", ""]}, "row 1 .* no tokens", 1),
        ("/get_reward", {"query": ["a", "red " * 200]}, "row 1 .* tokens; the limit is 128", 1),
        ("/get_reward", {"query": "a"}, "query: Input should be a valid list", None),
        ("/classify", {}, "either input .* or messages", None),
        ("/classify", {"input": "a", "messages": conversation("a", "b")}, "either input .* or messages", None),
        ("/classify", {"messages": conversation("a")}, "last one must be the assistant's", None),
        ("/classify", {"messages": []}, "last one must be the assistant's", None),
        ("/classify", {"input": [[1], [5000]]}, "row 1 .* token id 5000; .* has 320", 1),
        ("/classify", {"input": [[1], []]}, "row 1 .* no tokens", 1),
        ("/classify", {"input": [True]}, r"input\..*0", None),
        ("/classify", {"messages": [{"role": "user"}]}, r"messages\.0\.content: Field required", None),
        ("/score", {"rows": [row([{"role": "user", "content": 1}], "b")]}, r"prompt\..*0\.content: Input should", 0),
        ("/classify", {"input": "a", "truncate_prompt_tokens": 4}, "nothing is cut", None),
        ("/classify", {"input": "a", "use_activation": True}, "no activation", None),
        ("/classify", {"input": "a", "softmax": True}, "no activation", None),
    ],
)
def test_wrong_requests_get_422_with_the_row(client, path, body, message, place):
    answer = client.post(path, content=json.dumps(body), headers=JSON)
    assert answer.status_code == 422, answer.text
    assert set(answer.json()) == {"error", "row"}
    assert re.search(message, answer.json()["error"]), answer.json()
    assert answer.json()["row"] == place


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 422),
        (b"{", 400),
        (b'{"rows": [' + b"[" * 100_000, 400),
        (b'{"rows": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
        (b'{"rows": [{"prompt": "\xff", "response": "a"}]}', 400),
        (b'{"rows": NaN}', 422),
        (b'{"rows": [{"prompt": Infinity, "response": "a"}]}', 422),
        (b'{"rows": [{"prompt": -1e999, "response": "a"}]}', 422),
        (b'{"rows": ' + b"9" * 10_000 + b"}", 400),
        (b"null", 422),
        (b'"rows"', 422),
        (b'{"rows": [' + b"1," * 100_000 + b"1]}", 422),
    ],
)
def test_strange_bodies_are_the_clients_fault(client, content, status):
    for path in ("/score", "/get_reward", "/classify"):
        answer = client.post(path, content=content, headers=JSON)
        assert 400 <= answer.status_code < 500 and set(answer.json()) == {"error", "row"}
    assert client.post("/score", content=content, headers=JSON).status_code == status


def test_the_documented_requests_are_answered(client):
    page = Path(__file__).resolve().parents[2] / "docs" / "serving.md"
    if not page.is_file():
        pytest.skip("no source checkout around these tests")
    found = re.findall(r"curl \S+:8000(/\w+) .*? -d '(.*?)'\n", page.read_text(encoding="utf-8"), re.DOTALL)
    assert [path for path, _ in found] == ["/score", "/classify"]
    for path, content in found:
        assert client.post(path, content=content, headers=JSON).status_code == 200


def test_only_json_is_read(client):
    content = json.dumps({"rows": []})
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        answer = client.post("/score", content=content, headers={"content-type": kind})
        assert answer.status_code == 422 and "Content-Type: application/json" in answer.json()["error"]
    assert client.post("/score", content=content, headers=JSON).json()["rewards"] == []


def test_unknown_paths_and_methods(client):
    assert client.get("/nothing").status_code == 404 and client.get("/nothing").json()["error"] == "Not Found."
    answer = client.get("/score")
    assert answer.status_code == 405 and answer.headers["allow"] == "POST" and "error" in answer.json()
    assert client.get("/docs").status_code == 404  # its page would load scripts from elsewhere


def test_a_body_over_the_limit_gets_413_with_and_without_its_length_in_the_header(scorer, make_app):
    client = TestClient(make_app(scorer, Limits(max_body_bytes=200)))
    fits = json.dumps({"rows": [row("a", "b" * 30)]})
    padded = fits + " " * (200 - len(fits))
    assert client.post("/score", content=padded, headers=JSON).status_code == 200
    for content in (padded + " ", iter([padded.encode(), b" "]), iter([b" " * 50] * 1000)):
        answer = client.post("/score", content=content, headers=JSON)
        assert answer.status_code == 413 and "more than 200 bytes" in answer.json()["error"]


async def raw(app, receive, path="/score", headers=()):
    """Status of a request whose body comes from ``receive``."""
    statuses = []

    async def send(message):
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": path,
             "raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http",
             "headers": [(b"content-type", b"application/json"), *headers], "server": ("x", 1)}  # fmt: skip
    await app(scope, receive, send)
    return statuses


def test_the_stream_is_not_kept_beyond_the_limit(scorer, make_app, monkeypatch):
    monkeypatch.setattr(gate, "_DISCARD_SECONDS", 300)
    app = make_app(scorer, Limits(max_body_bytes=1000))
    held = []

    async def endless():
        held.append(find_gate(app)._held_bytes)
        await asyncio.sleep(0)
        return {"type": "http.request", "body": b" " * 100, "more_body": len(held) < 500}

    assert asyncio.run(raw(app, endless)) == [413]
    assert len(held) == 500 and max(held) == 1000 and find_gate(app)._held_bytes == 0


def find_gate(app):
    if app.middleware_stack is None:
        app.middleware_stack = app.build_middleware_stack()
    layer = app.middleware_stack
    while not isinstance(layer, gate.Gate):
        layer = layer.app
    return layer


def test_a_body_that_does_not_arrive_gets_408(scorer, make_app, monkeypatch):
    monkeypatch.setattr(gate, "_BODY_SECONDS", 0.05)

    async def silent():
        await asyncio.sleep(60)

    app = make_app(scorer)
    assert asyncio.run(raw(app, silent)) == [408]
    assert find_gate(app)._held_bytes == 0


def test_a_client_that_goes_away_gets_nothing_and_leaves_nothing(scorer, make_app):
    messages = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])

    async def receive():
        return next(messages)

    app = make_app(scorer)
    assert asyncio.run(raw(app, receive)) == []
    assert find_gate(app)._held_bytes == 0
    metrics = TestClient(app).get("/metrics").text
    assert 'inform_rm_requests_total{endpoint="/score",status="499"} 1.0' in metrics


def test_bodies_that_wait_together_are_limited(scorer, make_app):
    app = make_app(scorer, Limits(max_body_bytes=100))

    async def many():
        release = asyncio.Event()

        def body(state):
            async def receive():
                if not state:
                    state.append(1)
                    return {"type": "http.request", "body": b" " * 90, "more_body": True}
                await release.wait()
                return {"type": "http.request", "body": b"", "more_body": False}

            return receive

        waiting = [asyncio.create_task(raw(app, body([]))) for _ in range(8)]
        await asyncio.sleep(0.05)
        assert find_gate(app)._held_bytes == 720
        more = [asyncio.create_task(raw(app, body([]))) for _ in range(2)]
        await asyncio.sleep(0.05)
        release.set()
        return await asyncio.gather(*waiting), await asyncio.gather(*more)

    first, second = asyncio.run(many())
    assert first == [[400]] * 8  # taken, and found to be no JSON
    assert second == [[429]] * 2
    assert find_gate(app)._held_bytes == 0


def test_too_many_rows_get_422(scorer, make_app):
    client = TestClient(make_app(scorer, Limits(max_rows=3)))
    for path, body in (
        ("/score", {"rows": [row("a", "b")] * 4}),
        ("/get_reward", {"query": ["a"] * 4}),
        ("/classify", {"input": ["a"] * 4}),
    ):
        answer = client.post(path, json=body)
        assert answer.status_code == 422 and answer.json()["row"] == 3
        assert "4 rows; the limit is 3" in answer.json()["error"]


def test_a_full_queue_gets_429_and_those_before_it_their_rewards(scorer, make_app, wrapped):
    may_score = threading.Event()
    app = make_app(wrapped(scorer, lambda _: may_score.wait(30)), Limits(max_rows=4, max_queued_rows=6))
    bodies = [{"rows": [row("an apple", text) for text in "abcd"]}, {"rows": [row("two", text) for text in "ab"]}]

    async def run():
        waiting = asyncio.create_task(posted(app, "/score", bodies))
        while app.state.batcher.queued_rows < 6:
            await asyncio.sleep(0.01)
        (refused,) = await posted(app, "/score", [{"rows": [row("a", "b")]}])
        may_score.set()
        return await waiting, refused

    answers, refused = asyncio.run(run())
    assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
    assert "6 rows wait" in refused.json()["error"]
    for answer, body in zip(answers, bodies, strict=True):
        expected = scorer.score([one["prompt"] for one in body["rows"]], [one["response"] for one in body["rows"]])
        assert answer.json()["rewards"] == pytest.approx(expected.tolist(), abs=1e-5)


def test_limits_that_contradict_are_named():
    with pytest.raises(InputError, match="max_queued_rows: 5 is below max_rows, 10"):
        Limits(max_rows=10, max_queued_rows=5)
    with pytest.raises(InputError, match="max_body_bytes: 0"):
        Limits(max_body_bytes=0)


def basic(user_and_password):
    return "Basic " + base64.b64encode(user_and_password.encode()).decode()


def test_the_token_opens_all_and_nothing_else_does(scorer, make_app, monkeypatch, caplog):
    compared = []
    monkeypatch.setattr(
        gate.hmac, "compare_digest", lambda a, b, real=hmac.compare_digest: compared.append((a, b)) or real(a, b)
    )
    client = TestClient(make_app(scorer, token="s3cret-token"))
    for path in ("/score", "/get_reward", "/classify", "/metrics", "/openapi.json", "/nothing"):
        for wrong in ("", "s3cret-token", "Bearer", "Bearer s3cret-toke", "Bearer s3cret-tokenx",
                      "Basic s3cret-token", basic("s3cret-token"), basic("any:s3cret-toke"),
                      basic("s3cret-token:any"), "Digest s3cret-token", "Bearer \xff", None):  # fmt: skip
            headers = {} if wrong is None else {"authorization": wrong.encode("latin-1")}
            answer = client.request("GET", path, headers=headers)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert set(answer.json()) == {"error", "row"} and "s3cret" not in answer.text
    assert compared and all(isinstance(a, bytes) and b == b"s3cret-token" for a, b in compared)
    right = {"authorization": "bearer s3cret-token"}
    assert client.post("/score", json={"rows": []}, headers=right).status_code == 200
    assert client.get("/metrics", headers=right).status_code == 200
    # What a client makes of http://any:s3cret-token@host.
    assert client.get("/metrics", headers={"authorization": basic("any:s3cret-token")}).status_code == 200
    assert client.get("/health").json() == {"status": "ok", "model": client.get("/health").json()["model"]}
    assert "s3cret" not in caplog.text
    schema = client.get("/openapi.json", headers=right).json()
    assert all("security" in schema["paths"][path]["post"] for path in ("/score", "/get_reward", "/classify"))
    assert "security" not in schema["paths"]["/health"]["get"]


@pytest.mark.parametrize("token", ("", "two words", "ümlaut", "line\nbreak"))
def test_a_token_that_no_header_carries_is_refused(scorer, token):
    before = threading.active_count()
    with pytest.raises(InputError, match="token"):
        create_app(scorer, token=token)
    assert threading.active_count() == before


def test_nan_gets_500_with_the_row_and_the_others_their_rewards(scorer, make_app, wrapped):
    class Spoiled(wrapped):
        def iter_scores(self, sequences, prompt_lengths, **options):
            spoiled = scorer.encode("spoil", "it", "").input_ids
            for places, rewards, stds in self._scorer.iter_scores(sequences, prompt_lengths, **options):
                for index, place in enumerate(places):
                    if sequences[place] == spoiled:
                        rewards[index] = float("nan")
                yield places, rewards, stds

    app = make_app(Spoiled(scorer))
    good, bad = {"rows": [row("an apple", "a")]}, {"rows": [row("two", "b"), row("spoil", "it"), row("two", "c")]}
    answers = asyncio.run(posted(app, "/score", [good, bad, good]))
    assert [answer.status_code for answer in answers] == [200, 500, 200]
    assert answers[1].json()["row"] == 1 and "row 1" in answers[1].json()["error"]
    assert answers[0].json()["rewards"] == pytest.approx(scorer.score(["an apple"], ["a"]).tolist(), abs=1e-5)


def test_a_model_that_fails_gets_500_without_the_text_and_the_server_goes_on(scorer, make_app, wrapped, caplog):
    def break_once(sequences):
        if broken:
            raise RuntimeError(broken.pop())

    broken = ["no memory for: private text"]
    client = TestClient(make_app(wrapped(scorer, break_once)), raise_server_exceptions=False)
    answer = client.post("/score", json={"rows": [row("a", "b")]})
    assert answer.status_code == 500 and "RuntimeError" in answer.json()["error"]
    assert "private text" not in answer.text and "the model failed on 1 rows" in caplog.text
    assert client.post("/score", json={"rows": [row("a", "b")]}).status_code == 200


def test_health_and_metrics(scorer, make_app, served_dir):
    client = TestClient(make_app(scorer))
    assert client.get("/health").json() == {"status": "ok", "model": served_dir.name}  # not the path to it
    client.post("/score", json={"rows": [row("an apple", "a"), row("an apple", "b")]})
    client.post("/score", json={"rows": [row("", "a")]})
    client.get("/no/such/path")
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    values = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#"))
    assert values['inform_rm_requests_total{endpoint="/score",status="200"}'] == "1.0"
    assert values['inform_rm_requests_total{endpoint="/score",status="422"}'] == "1.0"
    assert values['inform_rm_requests_total{endpoint="other",status="404"}'] == "1.0"
    assert values["inform_rm_batch_rows_sum"] == "2.0" and values["inform_rm_batch_rows_count"] == "1.0"
    shared = [len(scorer.encode("an apple", text, "").response_ids) for text in "ab"]
    tokens = len(scorer.encode("an apple", "a", "").prompt_ids) + sum(shared)
    assert values["inform_rm_batch_tokens_sum"] == f"{tokens}.0"
    assert values["inform_rm_queued_rows"] == "0.0"
    other = TestClient(make_app(scorer)).get("/metrics").text
    assert 'endpoint="/score"' not in other  # each application counts for itself


def test_the_lifespan_ends_the_threads(scorer):
    before = set(threading.enumerate())
    with TestClient(create_app(scorer)) as client:
        assert client.post("/score", json={"rows": [row("a", "b")]}).status_code == 200
        assert {thread.name for thread in threading.enumerate()} > {thread.name for thread in before}
    assert not {thread.name for thread in set(threading.enumerate()) - before if "inform-rm" in thread.name}


def test_a_tokenizer_without_template_scores_rows_and_whole_texts(scorer, tokenizer, make_app):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    other = RewardScorer(scorer.model, plain)
    expected = other.score(["an apple"], [" is red"]).tolist()
    client = TestClient(make_app(other))
    assert client.post("/score", json={"rows": [row("an apple", " is red")]}).json()["rewards"] == pytest.approx(
        expected
    )
    # Without a template the end token is the only thing that a whole text must bring along.
    whole = client.post("/get_reward", json={"query": ["an apple is red</s>"]}).json()["rewards"]
    assert whole == pytest.approx(expected, abs=1e-5)
    refused = client.post("/score", json={"rows": [row(conversation("a", "b", "c"), "d")]})
    assert refused.status_code == 422 and "needs a chat template" in refused.json()["error"]
