"""The server in this process, without a socket: a path, headers and a body in, an answer out."""

from __future__ import annotations

import asyncio
import json
import logging
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

_ROUTES = ("/score", "/get_reward", "/pooling", "/classify")
_OTHERS = ("/", "/health", "/metrics", "/score/", "/../score", "/%00", "/docs", "/openapi.json")
_METHODS = ("POST", "GET", "PUT", "HEAD", "DELETE", "OPTIONS", "X")
_REFUSALS = {400, 401, 404, 405, 408, 413, 422, 429}
TOKEN = "fuzz"


class BadAnswer(AssertionError):  # noqa: N818
    """The server did not answer as documented."""


@cache
def _app() -> tuple[Any, asyncio.AbstractEventLoop]:
    from airl_fast import RewardScorer
    from airl_fast.integrations.rewards import RewardReader
    from airl_fast.serving.app import Limits, make_app
    from tests.tiny_reward import save_reward

    logging.getLogger("airl_fast.serving").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        scorer = RewardScorer.from_pretrained(save_reward(Path(folder)) / "reward")
    app = make_app(
        RewardReader(scorer=scorer), limits=Limits(request_bytes=2**18, seconds=60), token=TOKEN
    )
    return app, asyncio.new_event_loop()


def ask(variant: int, data: bytes) -> None:
    """Send one request, and check the answer.

    Args:
        variant: which of the four protocols; 4 takes path, method and headers from the data too.
        data: the body.

    Raises:
        BadAnswer: a fault of the server, or an answer that is no JSON where it has to be.
        Exception: whatever else the application raised.
    """
    path, method, headers = "/score", "POST", [(b"authorization", f"Bearer {TOKEN}".encode())]
    if variant < len(_ROUTES):
        path = _ROUTES[variant]
    elif len(data) >= 3:
        path = (*_OTHERS, *_ROUTES)[data[0] % (len(_OTHERS) + len(_ROUTES))]
        method = _METHODS[data[1] % len(_METHODS)]
        headers = _headers(data[2], data[3:40])
        data = data[3:]
    app, loop = _app()
    status, kind, content = loop.run_until_complete(_send(app, path, method, headers, data))
    if status == 200:
        if path == "/metrics":
            return
        _plain(content)
        return
    if status not in _REFUSALS:
        raise BadAnswer(f"{method} {path}: {status} {content[:300]!r}")
    if method == "HEAD":
        return
    error = _plain(content)["error"]
    if (
        error["code"] != status
        or not isinstance(error["message"], str)
        or kind != b"application/json"
    ):
        raise BadAnswer(f"{method} {path}: {status} with {content[:300]!r}")
    if len(content) > 5000:
        raise BadAnswer(f"{method} {path}: {status} with {len(content)} bytes")


def _headers(choice: int, value: bytes) -> list[tuple[bytes, bytes]]:
    """Headers that a client may get wrong."""
    good = (b"authorization", f"Bearer {TOKEN}".encode())
    return (
        [good],
        [],
        [good, good],
        [(b"authorization", value)],
        [(b"authorization", b"Basic " + value)],
        [(b"authorization", b"Bearer " + value)],
        [good, (b"content-length", value)],
        [good, (b"content-type", value), (b"host", value), (b"x", value)],
    )[choice % 8]


def _plain(content: bytes) -> Any:
    def refuse(constant: str) -> Any:
        raise BadAnswer(f"{constant} is no JSON: {content[:300]!r}")

    return json.loads(content, parse_constant=refuse)


async def _send(
    app: Any, path: str, method: str, headers: Iterable[tuple[bytes, bytes]], body: bytes
) -> tuple[int, bytes, bytes]:
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method,
        "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"",
        "root_path": "", "headers": list(headers), "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }  # fmt: skip
    parts = [body[: len(body) // 2], body[len(body) // 2 :]]
    status, kind, content = 0, b"", b""

    async def receive() -> dict[str, Any]:
        if not parts:
            return {"type": "http.disconnect"}
        part = parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status, kind, content
        if message["type"] == "http.response.start":
            status = message["status"]
            kind = dict(message["headers"]).get(b"content-type", b"")
        elif message["type"] == "http.response.body":
            content += message.get("body", b"")

    await app(scope, receive, send)
    return status, kind, content
