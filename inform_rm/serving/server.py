"""`serve`: a model, a socket, and an end that loses nothing."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from inform_rm.errors import InputError

logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "INFORM_RM_TOKEN"


def serve(
    model: Any,
    tokenizer: Any = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    max_body_bytes: int | None = None,
    max_rows: int | None = None,
    max_queued_rows: int | None = None,
    **scorer_options: Any,
) -> None:
    """Serve a reward model over HTTP until SIGTERM or Ctrl-C; docs/how-to/serving.md describes the endpoints.

    The end is graceful: no new connection is taken, what was accepted is scored and answered, then the call returns. A
    second Ctrl-C does not wait.

    Args:
        model: folder, Hub id, loaded model, or a `RewardScorer` or `EnsembleScorer`.
        tokenizer: see `RewardScorer`.
        host: address to listen at. The default can be reached from this machine only.
        port: 0 takes a free one; the line that is printed when the server is ready names it.
        token: bearer token that clients must send.
        max_body_bytes: see `inform_rm.serving.app.Limits`, as the next two.
        max_rows: see there.
        max_queued_rows: see there.
        scorer_options: keywords of `RewardScorer`.

    Raises:
        InputError: the extra ``serve`` is not installed, the address is taken, or a setting is wrong.
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise InputError(f"serve: {error.name} is not installed. pip install 'inform-rm[serve]'") from error
    from inform_rm.scoring.scorer import as_scorer
    from inform_rm.serving.app import Limits, create_app

    given = {"max_body_bytes": max_body_bytes, "max_rows": max_rows, "max_queued_rows": max_queued_rows}
    limits = Limits(**{name: value for name, value in given.items() if value is not None})
    with _bound_socket(host, port) as bound:  # before the model is loaded: a taken port is said at once
        app = create_app(as_scorer(model, tokenizer, scorer_options), limits, token)
        address, real_port = bound.getsockname()[:2]
        if token is None and not (address.startswith("127.") or address == "::1"):
            logger.warning("anyone who can reach %s:%d may use the model: no token is set.", address, real_port)

        class Server(uvicorn.Server):
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets=sockets)
                shown = f"[{address}]" if ":" in address else address
                print(f"serving {model_name} at http://{shown}:{real_port}", flush=True)

        model_name = app.state.batcher.scorer.name
        server = Server(
            uvicorn.Config(
                app, http="h11", ws="none", loop="asyncio", log_config=None, access_log=False, server_header=False,
                proxy_headers=False, lifespan="on",
            )
        )  # fmt: skip
        with _ends_quietly(server):
            server.run(sockets=[bound])


def read_token(path: str | Path | None) -> str | None:
    """The bearer token: the first line of a file, else the variable ``INFORM_RM_TOKEN``, else none.

    Not an argument of the command line, which every user of the machine can list. `InputError` for a file without one.
    """
    if path is None:
        return os.environ.get(TOKEN_VARIABLE)
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"token_file: {path} cannot be read ({error}).") from error
    if not lines or not lines[0].strip():
        raise InputError(f"token_file: the first line of {path} is empty; expected the token.")
    return lines[0].strip()


@contextmanager
def _bound_socket(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that has its address and does not listen yet."""
    if type(port) is not int or not 0 <= port < 65536:  # a larger one would be cut to 16 bits
        raise InputError(f"port: {port!r}; expected a whole number from 0 to 65535.")
    with ExitStack() as stack:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            bound = stack.enter_context(socket.socket(family, kind, protocol))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise InputError(f"host, port: cannot listen at {host}:{port} ({reason}). Choose others.") from error
        yield bound


@contextmanager
def _ends_quietly(server: Any) -> Iterator[None]:
    """Signals outside uvicorn's own handlers, which it raises again once it has ended, ask for the end and no more."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGINT)

    def ask(*_: Any) -> None:
        server.should_exit = True

    before = [signal.signal(number, ask) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
