"""Asking an OpenAI-compatible chat endpoint: one request at a time, tried again where that may help.

The standard library's client, because no HTTP library comes with every supported version of huggingface-hub (1.x
brings httpx, 2.x httpx2), and because its own client sends a saved Hugging Face token where no key is given.
"""

import contextlib
import email.utils
import http.client
import json
import os
import random
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from typing import Any

from inform_rm.errors import InputError, check_whole_number, shortened

_PATH = "/chat/completions"
_MOST_BYTES = 16 << 20  # of one reply
_RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_LONGEST_WAIT, _LONGEST_ASKED_WAIT = 60.0, 300.0  # seconds: of our own doubling, and of a server's Retry-After
_LEAST_HIDDEN = 8  # characters: a shorter key ("EMPTY") is an ordinary word, and no secret


class EndpointError(ConnectionError):
    """The endpoint gave nothing usable after all tries; what was answered before is kept by the caller."""


class RefusedRequest(Exception):
    """The endpoint will not answer this one request (a 4xx status that is about its content)."""


@dataclass(frozen=True)
class Reply:
    """A reply: its text, why it ended (``"stop"``, ``"length"``, ...), and the tokens that the server counted."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


class ChatEndpoint:
    """``POST URL/chat/completions``, from any number of threads.

    Redirects are not followed: with them the key and the texts would go to another host. TLS certificates are checked
    as the system says. Proxies are those of the environment.

    Args:
        url: base address as OpenAI's clients take it, such as ``http://localhost:8000/v1``; without a path ``/v1`` is
            meant.
        model: the name under which the endpoint serves the model.
        api_key_env: name of the environment variable that holds the key; ``None`` sends none.
        timeout: seconds that a reply may take.
        tries: how often a request is sent at most. Sent again are those that met a lost connection, a timeout, a
            status such as 429 or 500, or a reply that is none; the wait doubles from one second, or is what
            ``Retry-After`` says.

    Attributes:
        base: the address.

    Raises:
        InputError: an address, key or number that cannot be used.
    """

    def __init__(
        self, url: str, model: str, *, api_key_env: str | None = None, timeout: float = 300.0, tries: int = 6
    ):
        if not isinstance(model, str) or not model.strip():
            raise InputError(f"model: {model!r}; expected the name under which the endpoint serves it.")
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < 1e6:
            raise InputError(f"timeout: {timeout!r}; expected seconds above 0.")
        check_whole_number("tries", tries)
        self.model, self.base, self._timeout, self._tries = model, checked_url(url), float(timeout), tries
        self._key = _read_key(api_key_env)
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._stopped = threading.Event()
        self._limit_field = "max_tokens"
        host = urllib.parse.urlsplit(self.base).hostname or ""
        is_here = host in ("localhost", "::1") or host.startswith("127.")
        if self._key and self.base.startswith("http:") and not is_here:
            warnings.warn(f"endpoint: the key goes to {host} unencrypted (http); use https if it can.", stacklevel=2)

    def ask(
        self,
        messages: Sequence[dict[str, str]],
        *,
        max_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Reply:
        """One reply to a conversation.

        Raises:
            InputError: the endpoint says that key, address or model name are wrong (401, 403, 404), or redirects.
            RefusedRequest: it will not answer this request, and would not if it came again.
            EndpointError: no usable reply after all tries, or `stop` was called.
        """
        fields: dict[str, Any] = {"model": self.model, "messages": list(messages), "temperature": temperature}
        fields |= {"top_p": top_p} if top_p != 1 else {}
        fields |= {"seed": seed} if seed is not None else {}
        for number in range(1, self._tries + 1):
            limit_field = self._limit_field  # another thread may learn of another name meanwhile
            try:
                return _reply(self._post({**fields, limit_field: max_tokens}), self._without_key)
            except urllib.error.HTTPError as error:
                reason, wait = self._about(error), _asked_wait(error)
                if error.code == 400 and limit_field == "max_tokens" and "max_completion_tokens" in reason:
                    self._limit_field = "max_completion_tokens"  # OpenAI's later models know no other name
                    return self.ask(messages, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
                self._raise_final(error.code, reason)
            except (OSError, http.client.HTTPException, _NoReply) as error:
                reason, wait = self._without_key(f"{type(error).__name__}: {error}"), None
                _raise_certificate(error)
            if number < self._tries:
                doubled = min(_LONGEST_WAIT, 2.0 ** (number - 1)) * random.uniform(0.75, 1.25)
                self._wait(doubled if wait is None else wait)
            if self.is_stopped:
                raise EndpointError("stopped")
        raise EndpointError(f"endpoint: {self.base} gave no usable reply in {self._tries} tries; the last: {reason}")

    def stop(self) -> None:
        """End all waits: requests that are not answered yet fail."""
        self._stopped.set()

    @property
    def is_stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped.is_set()

    def _wait(self, seconds: float) -> None:
        self._stopped.wait(seconds)

    def _post(self, fields: dict[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "inform-rm"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.base + _PATH, json.dumps(fields).encode(), headers, method="POST")
        deadline = time.monotonic() + self._timeout
        with self._opener.open(request, timeout=self._timeout) as response:
            return _read(response, deadline)

    def _about(self, error: urllib.error.HTTPError) -> str:
        """Status and body of an error, short and without the key."""
        with contextlib.suppress(OSError, http.client.HTTPException), error:
            body = error.read(4096).decode("utf-8", "replace")
            plain = "".join(character if character.isprintable() else " " for character in body)  # no escape sequences
            return self._without_key(f"HTTP {error.code}: {shortened(' '.join(plain.split()), 300)}")
        return f"HTTP {error.code}"

    def _raise_final(self, status: int, reason: str) -> None:
        """Raise where sending the request again would not help."""
        if status in _RETRIED:
            return
        if 300 <= status < 400:
            raise InputError(
                f"endpoint: {self.base} redirects ({reason}); the key and the texts would go elsewhere. Give the "
                "address that answers."
            )
        if status in (401, 403):
            way_out = "" if self._key else " Name the variable that holds the key: api_key_env."
            raise InputError(f"endpoint: {self.base} refuses the key ({reason}).{way_out}")
        if status in (404, 405):
            raise InputError(
                f"endpoint: {self.base}{_PATH} or the model {self.model!r} is not there ({reason}). The address is "
                "that of the API's root, such as http://localhost:8000/v1."
            )
        raise RefusedRequest(reason)

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key and len(self._key) >= _LEAST_HIDDEN else text


def ask_all(
    endpoint: ChatEndpoint, requests: Mapping[str, Mapping[str, Any]], concurrency: int
) -> Iterator[tuple[str, Reply | RefusedRequest]]:
    """What `ChatEndpoint.ask` gives to each request (its arguments by name), as the replies come; refusals as such.

    It raises what that raises; replies that were under way are still given before. The threads are daemons that
    nothing waits for, so that Ctrl-C need not wait for a slow answer.
    """
    first_error: BaseException | None = None

    def ask(name: str) -> Any:  # (name, reply, error), or None where nothing more is asked
        try:
            return None if endpoint.is_stopped else (name, endpoint.ask(**requests[name]), None)
        except RefusedRequest as error:
            return name, error, None
        except BaseException as error:
            endpoint.stop()  # no other request need wait for a server that is not there
            return name, None, error

    with ThreadPool(max(1, min(concurrency, len(requests)))) as pool:
        for name, reply, error in filter(None, pool.imap_unordered(ask, requests)):
            if error is None:
                yield name, reply
            first_error = first_error or error
    if first_error is not None:
        raise first_error


def checked_url(url: str) -> str:
    """The base address of an endpoint, without a slash at its end.

    `InputError` unless it is http or https, without a password or query, which would be written into results.

    Example:
        >>> checked_url("http://localhost:8000"), checked_url("https://host/api/v1/chat/completions")
        ('http://localhost:8000/v1', 'https://host/api/v1')
    """
    try:
        parts = urllib.parse.urlsplit(url.strip())
        found = (parts.scheme in ("http", "https"), parts.hostname, parts.port)
    except (ValueError, AttributeError):
        found = (False, None, None)
    if not (found[0] and found[1]) or any(character.isspace() or ord(character) < 33 for character in url.strip()):
        shown = shortened(repr(url)) if "@" not in str(url) else "an address with '@'"
        raise InputError(f"endpoint: {shown}; expected an address such as http://localhost:8000/v1.")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise InputError(
            f"endpoint: the address of {found[1]} holds a user, a password or a query. Addresses are written into "
            "results: give the key by the name of a variable (api_key_env)."
        )
    path = parts.path.rstrip("/").removesuffix(_PATH)
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"


class _NoReply(Exception):
    """A body that is no chat completion."""


def _reply(body: bytes, clean: Any) -> Reply:
    try:
        found = json.loads(body)
        choice = found["choices"][0]
        text = choice["message"].get("content")
        if not isinstance(text, str | None):
            raise TypeError("content is no text")
        text = text or ""
        text.encode()
        usage = found.get("usage") or {}
        counts = [usage.get(name, 0) for name in ("prompt_tokens", "completion_tokens")]
        counts = [count if type(count) is int and count >= 0 else 0 for count in counts]
        return Reply(clean(text), str(choice.get("finish_reason") or "unknown")[:40], *counts)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        start = shortened(repr(body[:200]), 200)
        raise _NoReply(f"no chat completion ({type(error).__name__}: {error}): {start}") from None


def _read(response: Any, deadline: float) -> bytes:
    """The whole body; one that is too long or too slow is a fault."""
    parts, size = [], 0
    while part := response.read1(1 << 16):
        size += len(part)
        if size > _MOST_BYTES:
            raise _NoReply(f"more than {_MOST_BYTES} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError("the reply took too long")
        parts.append(part)
    if response.length:  # http.client's count of what should still come
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(parts)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Leaves a redirect the error that it then is."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _raise_certificate(error: Exception) -> None:
    cause = getattr(error, "reason", error)
    if isinstance(cause, ssl.SSLCertVerificationError):
        raise InputError(
            f"endpoint: its certificate cannot be trusted ({cause.verify_message}). For one of your own, name its "
            "authority in the environment variable SSL_CERT_FILE."
        ) from None


def _asked_wait(error: urllib.error.HTTPError) -> float | None:
    """Seconds that ``Retry-After`` asks for, as a number or a date; ``None`` without one that can be read."""
    text = str(error.headers.get("Retry-After", "")) if error.headers else ""
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return min(max(seconds, 0.0), _LONGEST_ASKED_WAIT) if seconds == seconds else None


def _read_key(name: str | None) -> str | None:
    if name is None:
        return None
    key = os.environ.get(name, "")
    if not key:
        shown = name if name.isidentifier() else "the name given"  # somebody's key, in place of a variable's name?
        raise InputError(f"api_key_env: the environment variable {shown} is not set or empty. Put the key into it.")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(f"api_key_env: what {name} holds is no key: it has blanks, line ends or other characters.")
    return key
