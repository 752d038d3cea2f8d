"""What every request passes before the application sees it: token, size, time, and a count of what came of it."""

import asyncio
import base64
import binascii
import contextlib
import hmac
import time
from collections.abc import Callable, Mapping
from typing import Any

from fastapi.responses import JSONResponse

OPEN_PATHS = ("/health",)
_BODY_SECONDS = 30.0  # for a whole body to arrive: a client that trickles it holds memory
_DISCARD_SECONDS = 5.0  # a client that still sends cannot read the refusal
_NO_ANSWER = 499  # for the metrics, as nginx logs it: the client went away
_BODIES_HELD = 8  # times the largest body: what all requests together may hold


class RequestError(Exception):
    """Answered with this status and ``{"error": message, "row": row}``."""

    def __init__(self, status: int, message: str, row: int | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.row, self.headers = status, message, row, headers


class Gate:
    """ASGI middleware: 401, 408, 413 and 429 without the application, and bodies read whole for it.

    Args:
        app: the application.
        token: bearer token that every path but ``/health`` asks for; ``None`` asks for none. It may also come as
            the password of HTTP Basic: OpenRLHF's client sends no header but what ``http://any:TOKEN@host`` makes.
        max_body_bytes: of one request, counted while it arrives, whatever its headers say. All requests that are under
            way may hold eight times as much.
        observe: called after each request with its path, status and seconds.
    """

    def __init__(self, app: Any, token: bytes | None, max_body_bytes: int, observe: Callable[[str, int, float], None]):
        self.app = app
        self.token = token
        self.max_body_bytes = max_body_bytes
        self.observe = observe
        self._held_bytes = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request, as ASGI has it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), _NO_ANSWER

        async def noting(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._guarded(scope, receive, noting)
        except Exception:
            status = 500  # the answer is made further out
            raise
        finally:
            self.observe(scope["path"], status, time.perf_counter() - started)

    async def _guarded(self, scope: Any, receive: Any, send: Any) -> None:
        body = bytearray()
        try:
            if not self._may_enter(scope):
                await _discard(receive)
                text = "the header 'Authorization: Bearer TOKEN' is missing or wrong."
                raise RequestError(401, text, headers={"WWW-Authenticate": "Bearer"})
            if not await asyncio.wait_for(self._read(scope, receive, body), _BODY_SECONDS):
                return  # the client went away
        except (RequestError, asyncio.TimeoutError) as error:
            late = RequestError(408, f"the body did not arrive within {_BODY_SECONDS:g} seconds.")
            await refusal(error if isinstance(error, RequestError) else late)(scope, receive, send)
        else:
            whole = [{"type": "http.request", "body": bytes(body), "more_body": False}]

            async def replay() -> Any:
                return whole.pop() if whole else await receive()

            await self.app(scope, replay, send)
        finally:
            self._held_bytes -= len(body)

    def _may_enter(self, scope: Any) -> bool:
        if self.token is None or scope["path"] in OPEN_PATHS:
            return True
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, credentials = given.partition(b" ")
        scheme, credentials = scheme.lower(), credentials.strip()
        if scheme == b"basic":
            credentials = _password(credentials)
        # In a time that does not depend on where the two differ.
        return hmac.compare_digest(credentials, self.token) and scheme in (b"bearer", b"basic")

    async def _read(self, scope: Any, receive: Any, body: bytearray) -> bool:
        """Fill ``body``; False if the client went away first."""
        announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
        announced_bytes = int(announced) if announced.isdigit() and len(announced) < 20 else 0
        more = True
        while True:
            refused = None
            if max(announced_bytes, len(body)) > self.max_body_bytes:
                text = f"the body has more than {self.max_body_bytes} bytes. Send several smaller requests."
                refused = RequestError(413, text)
            elif self._held_bytes > _BODIES_HELD * self.max_body_bytes:
                text = "the requests under way hold as much memory as they may. Try again later."
                refused = RequestError(429, text, headers={"Retry-After": "1"})
            if refused is not None:
                self._held_bytes -= len(body)
                body.clear()
                if more:
                    await _discard(receive)
                raise refused
            if not more:
                return True
            message = await receive()
            if message["type"] != "http.request":
                return False
            chunk = message.get("body", b"")
            body += chunk
            self._held_bytes += len(chunk)
            more = message.get("more_body", False)


def _password(credentials: bytes) -> bytes:
    """The password of HTTP Basic credentials (RFC 7617): what a client sends that can be given only a URL."""
    try:
        return base64.b64decode(credentials, validate=True).partition(b":")[2]
    except binascii.Error:
        return b""


def refusal(error: RequestError) -> JSONResponse:
    """The response that tells of the error."""
    message = error.message.encode("utf-8", "backslashreplace").decode()  # it may repeat a key with half a character
    return JSONResponse({"error": message, "row": error.row}, error.status, error.headers)


async def _discard(receive: Any) -> None:
    async def rest() -> None:
        message = {"type": "http.request", "more_body": True}
        while message["type"] == "http.request" and message.get("more_body", False):
            message = await receive()

    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(rest(), _DISCARD_SECONDS)
