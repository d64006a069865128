"""``airl-fast serve``: an address, a token where one is due, and a graceful end."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from airl_fast.integrations.rewards import RewardReader

TOKEN_VARIABLE = "AIRL_FAST_TOKEN"
_HEAD_SECONDS = 20.0  # for a request's head; its body has the limit of the whole request


def serve(
    load: Callable[[], RewardReader],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    request_bytes: int = 4 * 2**20,
    waiting: int = 256,
    seconds: float = 120.0,
    token_file: Path | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; then finish what has been asked, and return.

    Args:
        load: makes the scorer, once address and token are known to do.
        host: name or address to listen on.
        port: 0 takes a free one; the address is printed.
        request_bytes: largest body.
        waiting: requests that may wait to be scored.
        seconds: until a request is given up.
        token_file: holds the bearer token; without it ``AIRL_FAST_TOKEN`` may.

    Raises:
        ValueError: the serve extra is missing, an empty token, or none off loopback.
        OSError: the address cannot be listened on.
    """
    try:
        import uvicorn

        from airl_fast.serving.app import Limits, make_app
        from airl_fast.serving.connections import protocol
    except ImportError as error:
        raise ValueError(
            f"serving needs the serve extra ({error.name} is missing): pip install "
            "'airl-fast[serve]'"
        ) from error
    limits = Limits(request_bytes=request_bytes, waiting=waiting, seconds=seconds)
    token = read_token(token_file)
    listener = listen(host, port, token)
    with listener:
        app = make_app(load(), limits=limits, token=token)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            http=protocol(seconds=min(seconds, _HEAD_SECONDS)),
            ws="none",
            timeout_graceful_shutdown=None,  # a request ends by limits.seconds
        )
        # uvicorn raises the signal again once all is finished: that is then the whole of it.
        previous = {number: signal.signal(number, _over) for number in _SIGNALS}
        try:
            address, bound = listener.getsockname()[:2]
            shown = f"[{address}]" if ":" in address else address
            print(f"serving on http://{shown}:{bound}", flush=True)
            uvicorn.Server(config).run(sockets=[listener])
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def _over(number: int, frame: object) -> None:
    """The signal has done its work."""


def read_token(file: Path | None) -> str | None:
    """The bearer token of a file, else of ``AIRL_FAST_TOKEN``, else None.

    Raises:
        ValueError: it is empty, or holds more than one word of ASCII.
    """
    where = TOKEN_VARIABLE if file is None else str(file)
    token = os.environ.get(TOKEN_VARIABLE) if file is None else file.read_text("utf-8").strip()
    if token is None:
        return None
    if not token or not token.isascii() or len(token.split()) != 1:
        raise ValueError(
            f"{where}: expected a token of ASCII characters without spaces, received "
            f"{'nothing' if not token else 'something else'}; make one with `openssl rand -hex 32`"
        )
    return token


def listen(host: str, port: int, token: str | None) -> socket.socket:
    """Bind an address and listen on it.

    Raises:
        ValueError: the address can be reached from elsewhere and there is no token.
        OSError: it is taken, or does not exist.
    """
    if not 0 <= port < 2**16:
        raise ValueError(f"--port {port}: expected 0 to 65535, received {port}; 0 takes a free one")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise ValueError(f"--host {host}: no such host ({error}); give an address") from error
    if token is None and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        raise ValueError(
            f"--host {host} can be reached from other machines and there is no token: give "
            f"--token-file FILE or set {TOKEN_VARIABLE}, or listen on 127.0.0.1"
        )
    try:
        return socket.create_server(address[:2], family=family, backlog=512)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port} ({error}): give another --port") from error
