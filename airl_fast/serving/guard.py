"""Around the application: who may ask, and what is counted."""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import time
from collections.abc import Callable
from typing import Any

OPEN = "/health"  # for load balancers, which have no token


class Guard:
    """ASGI middleware that checks the token and counts every answer.

    The token comes as ``Authorization: Bearer TOKEN``, or as the password of basic authentication
    (``http://any:TOKEN@host/...``) for clients that can send nothing but a URL. It is compared in
    constant time, before anything of the body is read.

    Args:
        app: the application.
        token: None lets everyone in.
        routes: paths that are counted under their own name.
        on_arrival: called when a request comes.
        on_answer: called with path, status and seconds.
    """

    def __init__(
        self,
        app: Any,
        *,
        token: str | None,
        routes: frozenset[str],
        on_arrival: Callable[[], None],
        on_answer: Callable[[str, int, float], None],
    ) -> None:
        self.app = app
        self._token = None if token is None else token.encode()
        self._routes = routes
        self._on_arrival = on_arrival
        self._on_answer = on_answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one connection's request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        self._on_arrival()
        start, status = time.monotonic(), 500

        async def counted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if scope["path"] == OPEN or self._admits(scope):
                await self.app(scope, receive, counted)
            else:
                await _unauthorised(counted)
        finally:
            route = scope["path"] if scope["path"] in self._routes else "other"
            self._on_answer(route, status, time.monotonic() - start)

    def _admits(self, scope: Any) -> bool:
        if self._token is None:
            return True
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(_secret(given[0]), self._token)


def _secret(header: bytes) -> bytes:
    """The token in an Authorization header; empty where there is none."""
    scheme, _, value = header.partition(b" ")
    if scheme.lower() == b"bearer":
        return value.strip()
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    return b""


async def _unauthorised(send: Any) -> None:
    message = (
        "expected the header 'Authorization: Bearer TOKEN' with this server's token, received "
        "none or another: the server's operator has it"
    )
    body = json.dumps({"error": {"code": 401, "message": message}}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"www-authenticate", b"Bearer"),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": body})
