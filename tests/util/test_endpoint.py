"""Asking an endpoint: what is tried again, what is refused, and that the key goes nowhere else."""

import email.utils
import socket
import threading
import time

import pytest

from inform_rm.errors import InputError
from inform_rm.util.endpoint import ChatEndpoint, EndpointError, RefusedRequest, Reply, ask_all, checked_url

KEY = "sk-scripted-0123456789abcdef"
HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5, "temperature": 0.5}


def test_a_request_says_what_was_asked_and_the_reply_is_read(chat_server, monkeypatch):
    server = chat_server(lambda fields: "Good day.")
    monkeypatch.setenv("MY_KEY", KEY)
    endpoint = ChatEndpoint(server.url, "small", api_key_env="MY_KEY")
    assert endpoint.ask(**HELLO, top_p=0.9, seed=3) == Reply("Good day.", "stop", 10, 2)
    assert server.paths == ["/v1/chat/completions"]
    assert server.requests == [{"model": "small", **HELLO, "top_p": 0.9, "seed": 3}]
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    ChatEndpoint(server.url, "small").ask(**HELLO)
    assert "Authorization" not in server.headers[1] and "top_p" not in server.requests[1]


@pytest.mark.parametrize(
    "failure",
    [
        (429, {"error": "slow down"}, {"Retry-After": "0"}), (500, b"oops", {}), (503, b"", {}),
        (200, b"<html>not JSON</html>", {}), (200, {"choices": []}, {}), (200, {"error": "in a 200"}, {}),
        (200, b'{"choices": [{"message": {"content": "\\ud800"}}]}', {}),
        (200, b'{"choices"', {"Content-Length": "100"}),  # the connection ends too early
        (200, {"choices": [{"message": {"content": ["parts"]}}]}, {}),
    ],
)  # fmt: skip
def test_what_may_pass_is_tried_again(chat_server, failure):
    replies = iter([failure, failure, "At last."])
    server = chat_server(lambda fields: next(replies))
    # A body that never comes whole is a timeout; on a busy machine other answers are not to be one.
    timeout = 0.3 if "Content-Length" in failure[2] else 60
    assert ChatEndpoint(server.url, "small", timeout=timeout).ask(**HELLO).text == "At last."
    assert len(server.requests) == 3
    server.script = lambda fields: failure
    with pytest.raises(EndpointError, match="no usable reply in 2 tries"):
        ChatEndpoint(server.url, "small", tries=2, timeout=timeout).ask(**HELLO)
    assert len(server.requests) == 5


def test_waits_double_or_are_what_the_server_says(chat_server, monkeypatch):
    waits = []
    monkeypatch.setattr(ChatEndpoint, "_wait", lambda self, seconds: waits.append(seconds))
    date = email.utils.formatdate(time.time() + 100, usegmt=True)
    headers = iter([{}, {}, {}, {"Retry-After": "7"}, {"Retry-After": date}, {"Retry-After": "1e9"}])
    server = chat_server(lambda fields: (429, b"", next(headers)))
    with pytest.raises(EndpointError, match="HTTP 429"):
        ChatEndpoint(server.url, "small", tries=6).ask(**HELLO)
    assert [0.75 * n <= wait <= 1.25 * n for n, wait in zip((1, 2, 4), waits, strict=False)] == [True] * 3
    assert waits[3] == 7 and 90 < waits[4] <= 100 and len(waits) == 5  # after the last try nobody waits


def test_a_slow_server_is_given_up(chat_server):
    ended = threading.Event()
    server = chat_server(lambda fields: (ended.wait(10) and "") or "late")
    with pytest.raises(EndpointError, match=r"in 1 tries.*[Tt]ime"):
        ChatEndpoint(server.url, "small", tries=1, timeout=0.1).ask(**HELLO)
    ended.set()


def test_a_reply_that_trickles_or_never_ends_is_given_up():
    def serve(listening, body):
        connection, _ = listening.accept()
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        try:
            while True:
                connection.sendall(body)
                time.sleep(0.02 if len(body) == 1 else 0)
        except OSError:
            pass

    for body, reason in ((b"x", "took too long"), (b"x" * 2**20, "more than 16777216 bytes")):
        with socket.create_server(("127.0.0.1", 0)) as listening:
            threading.Thread(target=serve, args=(listening, body), daemon=True).start()
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            with pytest.raises(EndpointError, match=reason):
                ChatEndpoint(url, "small", tries=1, timeout=0.3 if len(body) == 1 else 20).ask(**HELLO)


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (401, InputError, "refuses the key.*Name the variable"), (403, InputError, "refuses the key"),
        (404, InputError, "the model 'small' is not there"), (400, RefusedRequest, "HTTP 400: too long"),
        (413, RefusedRequest, "HTTP 413"), (422, RefusedRequest, "HTTP 422"),
    ],
)  # fmt: skip
def test_what_would_fail_again_is_not_tried_again(chat_server, status, error, message):
    server = chat_server(lambda fields: (status, b"too long", {}))
    with pytest.raises(error, match=message):
        ChatEndpoint(server.url, "small").ask(**HELLO)
    assert len(server.requests) == 1


def test_a_redirect_takes_neither_key_nor_text_elsewhere(chat_server, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    other = chat_server(lambda fields: "stolen")
    for status in (301, 302, 303, 307, 308):
        server = chat_server(
            lambda fields, status=status: (status, b"", {"Location": f"{other.url}/chat/completions"})
        )
        with pytest.raises(InputError, match="redirects"):
            ChatEndpoint(server.url, "small", api_key_env="MY_KEY").ask(**HELLO)
    assert other.requests == []


def test_the_key_is_in_no_text_that_comes_back(chat_server, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    server = chat_server(lambda fields: (400, f"\x1b[2J\nBearer {KEY} is odd".encode(), {}))
    endpoint = ChatEndpoint(server.url, "small", api_key_env="MY_KEY", tries=1)
    with pytest.raises(RefusedRequest) as refused:
        endpoint.ask(**HELLO)
    assert str(refused.value) == "HTTP 400: [2J Bearer *** is odd"
    server.script = lambda fields: f"Your key is {KEY}."
    assert endpoint.ask(**HELLO).text == "Your key is ***."
    server.script = lambda fields: (200, f"no JSON: {KEY}".encode(), {})
    with pytest.raises(EndpointError) as failed:
        endpoint.ask(**HELLO)
    shown = "".join(map(str, (refused.value, failed.value, endpoint)))
    assert "***" in shown and KEY not in shown


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:8000", "expected an address"), ("file:///etc/passwd", "expected an address"),
        ("ftp://host", "expected an address"), ("", "expected an address"), ("http://", "expected an address"),
        ("http://host:99999/v1", "expected an address"), ("http://host/a b", "expected an address"),
        (f"https://user:{KEY}@host/v1", "holds a user"), (f"https://host/v1?key={KEY}", "holds a user"),
        (f"https://user:{KEY}@ho st/v1", "an address with '@'"),
    ],
)  # fmt: skip
def test_an_address_that_is_none_or_holds_a_secret_is_refused(url, message):
    with pytest.raises(InputError, match=message) as refused:
        checked_url(url)
    assert KEY not in str(refused.value)


def test_a_key_is_named_and_never_shown(monkeypatch):
    with pytest.raises(InputError, match="variable NOT_SET is not set") as refused:
        ChatEndpoint("http://localhost", "small", api_key_env="NOT_SET")
    with pytest.raises(InputError, match="the name given") as refused:
        ChatEndpoint("http://localhost", "small", api_key_env=KEY)
    assert KEY not in str(refused.value)
    monkeypatch.setenv("MY_KEY", f"{KEY}\r\nHost: elsewhere")
    with pytest.raises(InputError, match="what MY_KEY holds is no key") as refused:
        ChatEndpoint("http://localhost", "small", api_key_env="MY_KEY")
    assert KEY not in str(refused.value)
    monkeypatch.setenv("MY_KEY", KEY)
    with pytest.warns(UserWarning, match="goes to far.example unencrypted"):
        ChatEndpoint("http://far.example/v1", "small", api_key_env="MY_KEY")


def test_a_server_that_knows_another_name_for_the_limit_gets_it(chat_server):
    def script(fields):
        if "max_tokens" in fields:
            return 400, {"error": "Unsupported parameter: use 'max_completion_tokens' instead."}, {}
        return "Fine."

    server = chat_server(script)
    endpoint = ChatEndpoint(server.url, "small", tries=1)
    assert endpoint.ask(**HELLO).text == endpoint.ask(**HELLO).text == "Fine."
    assert [("max_tokens" in each, each.get("max_completion_tokens")) for each in server.requests] == [
        (True, None), (False, 5), (False, 5)
    ]  # fmt: skip


def test_requests_that_were_under_way_when_the_other_name_was_learnt_are_sent_again(chat_server):
    both = threading.Barrier(2)

    def script(fields):
        if "max_tokens" in fields:
            both.wait(timeout=60)  # neither is answered before both have come
            return 400, {"error": "Unsupported parameter: use 'max_completion_tokens' instead."}, {}
        return "Fine."

    endpoint = ChatEndpoint(chat_server(script).url, "small")
    found = dict(ask_all(endpoint, {"one": HELLO, "two": HELLO}, 2))
    assert [reply.text for reply in found.values()] == ["Fine.", "Fine."]


def test_replies_under_way_are_given_before_an_error_is_raised(chat_server):
    def script(fields):
        text = fields["messages"][0]["content"]
        return (401, b"", {}) if text == "3" else (422, b"no", {}) if text == "1" else f"reply {text}"

    server = chat_server(script)
    requests = {
        str(n): {"messages": [{"role": "user", "content": str(n)}], "max_tokens": 5, "temperature": 0}
        for n in range(9)
    }
    found = {}
    with pytest.raises(InputError, match="refuses the key"):
        for name, reply in ask_all(ChatEndpoint(server.url, "small"), requests, 1):
            found[name] = reply
    assert found["0"].text == "reply 0" and isinstance(found["1"], RefusedRequest) and set(found) == {"0", "1", "2"}


def test_every_request_is_asked_once_and_none_after_an_error(monkeypatch):
    endpoint = ChatEndpoint("http://localhost", "small")
    requests = {str(n): {"number": n} for n in range(100)}
    with monkeypatch.context() as patch:
        patch.setattr(endpoint, "ask", lambda number: number**2)
        assert dict(ask_all(endpoint, requests, 8)) == {str(n): n**2 for n in range(100)}
        assert list(ask_all(endpoint, {}, 8)) == []
    asked, gate = set(), threading.Barrier(2)

    def ask(number):
        asked.add(number)
        gate.wait(10)  # both are under way
        if number == 1:
            raise ValueError("one")
        endpoint._stopped.wait(10)
        return number

    monkeypatch.setattr(endpoint, "ask", ask)
    given = []
    with pytest.raises(ValueError, match="one"):
        given.extend(name for name, _ in ask_all(endpoint, requests, 2))
    assert given == ["0"] and asked == {0, 1}


def test_requests_are_sent_at_once_up_to_the_limit(chat_server):
    gate = threading.Barrier(4)
    server = chat_server(lambda fields: str(gate.wait(10) >= 0))
    requests = {str(n): HELLO for n in range(8)}
    assert len(list(ask_all(ChatEndpoint(server.url, "small"), requests, 4))) == 8
