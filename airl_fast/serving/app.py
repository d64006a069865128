"""The ASGI application: bodies in, errors in words, answers out; no model is called here.

Requests are parsed on the event loop, encoded in one thread (tokenizers are not made for several)
and scored in another, the batcher's.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from airl_fast import __version__
from airl_fast.integrations.rewards import RewardReader
from airl_fast.serving import protocols
from airl_fast.serving.batcher import Batcher, NonFiniteScore, QueueFull
from airl_fast.serving.guard import Guard
from airl_fast.serving.metrics import Metrics

logger = logging.getLogger("airl_fast.serving")
_DRAIN = 16  # times the limit: how much of a refused body is read, so that its sender can listen


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server takes on.

    Attributes:
        request_bytes: of one body; a larger one gets 413.
        waiting: requests that may wait to be scored; a further one gets 429.
        seconds: until a request is answered; then it gets 504 and, if it still waits, is dropped.
    """

    request_bytes: int = 4 * 2**20
    waiting: int = 256
    seconds: float = 120.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 < value < float("inf"):
                raise ValueError(
                    f"expected {name} above 0 and finite, received {value}: raise it, or name a "
                    "number"
                )


class Refused(Exception):  # noqa: N818  # an answer, not a fault
    """An answer other than 200, with what was expected, what came, and what to do."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def make_app(reader: RewardReader, *, limits: Limits, token: str | None = None) -> Any:
    """Make the application.

    Args:
        reader: the scorer, and what of it is the reward.
        limits: what the server takes on.
        token: what callers must send as ``Authorization: Bearer TOKEN``; None asks for nothing.
    """
    metrics = Metrics()
    batcher = Batcher(
        reader.scorer.score_encoded,
        token_budget=reader.scorer.token_budget,
        limit=limits.waiting,
        on_pass=metrics.on_pass,
    )
    metrics.watch(batcher)
    encoder = ThreadPoolExecutor(1, thread_name_prefix="airl-fast-encoder")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(batcher.close)
        encoder.shutdown()

    app = FastAPI(
        title="airl_fast", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        openapi_url=None, redirect_slashes=False,
    )  # fmt: skip

    async def answer(request: Request) -> Response:
        try:
            async with asyncio.timeout(limits.seconds):
                body = await _body(request, limits.request_bytes)
        except TimeoutError:
            message = f"expected the whole body within {limits.seconds:g} s: send it faster"
            raise Refused(408, message, Connection="close") from None
        parsed = _parsed(protocols.ROUTES[request.url.path], body)
        try:
            async with asyncio.timeout(limits.seconds):
                return _json(await _scored(parsed, reader, batcher, encoder))
        except TimeoutError:
            raise Refused(
                504,
                f"not scored within {limits.seconds:g} s, the server's limit: send fewer or "
                "shorter texts at once, or raise --timeout",
            ) from None

    async def health() -> Response:
        trained = asdict(reader.scorer.trained)
        return _json({"status": "ok", "version": __version__, "value": reader.value, **trained})

    async def exposition() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    for path in protocols.ROUTES:
        app.add_api_route(path, answer, methods=["POST"], response_model=None)
    app.add_api_route("/health", health, methods=["GET"], response_model=None)
    app.add_api_route("/metrics", exposition, methods=["GET"], response_model=None)
    app.add_exception_handler(Refused, _on_refused)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(Exception, _on_fault)
    routes = frozenset([*protocols.ROUTES, "/health", "/metrics"])
    return Guard(
        app,
        token=token,
        routes=routes,
        on_arrival=metrics.on_arrival,
        on_answer=metrics.on_answer,
    )


async def _scored(
    parsed: protocols.Request, reader: RewardReader, batcher: Batcher, encoder: ThreadPoolExecutor
) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    try:
        pairs = await loop.run_in_executor(encoder, parsed.pairs, reader)
    except ValueError as error:
        raise Refused(422, str(error)) from error
    try:
        future = batcher.submit(pairs)
    except QueueFull as full:
        raise Refused(429, str(full), Retry_After=str(full.retry_after)) from full
    try:
        scored = await asyncio.wrap_future(future)
    except (NonFiniteScore, ValueError, ArithmeticError, RuntimeError) as error:
        logger.exception("scoring failed")
        raise Refused(500, f"the model could not score this: {error}") from error
    return parsed.response(reader, pairs, scored)


async def _body(request: Request, limit: int) -> bytes:
    """Read a body of at most ``limit`` bytes, whether or not its length was announced."""
    announced = request.headers.get("content-length", "0")
    size, parts = 0, []
    async for part in request.stream():
        size += len(part)
        if size <= limit:
            parts.append(part)
        elif size > _DRAIN * limit:
            break
    if size > limit:
        received = max(size, int(announced) if announced.isdecimal() else 0)
        raise Refused(
            413,
            f"expected a body of at most {limit} bytes, received {received} or more: send fewer "
            "texts at once, or raise --max-request-mib",
            Connection="close",
        )
    return b"".join(parts)


def _parsed(kind: type[protocols.Request], body: bytes) -> protocols.Request:
    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON")

    try:
        values = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise Refused(
            400,
            f"expected a JSON object, received {body[:80].decode(errors='replace')!r} ({error}): "
            "check the body",
        ) from error
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the body"
        fields = ", ".join(kind.model_fields)
        raise Refused(
            422,
            f"{where}: {first['msg']}, received {repr(first['input'])[:80]}; expected an object "
            f"with {fields}, see docs/serving.md",
        ) from error


def _json(values: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    # ASCII: a text may hold half of a surrogate pair, which UTF-8 cannot.
    content = json.dumps(values, allow_nan=False).encode("ascii")
    return Response(content, status, headers=headers, media_type="application/json")


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return _json({"error": {"code": status, "message": message}}, status, headers)


async def _on_refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return _error(error.status, str(error), error.headers)


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    paths = ", ".join(f"POST {path}" for path in protocols.ROUTES)
    return _error(
        error.status_code,
        f"{error.detail}: received {request.method} {request.url.path}, expected one of {paths}, "
        "GET /health, GET /metrics",
        dict(error.headers or {}),
    )


async def _on_fault(_: Request, error: Exception) -> Response:
    return _error(500, f"a fault of the server ({type(error).__name__}): see its log")
