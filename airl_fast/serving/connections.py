"""Connections that do not wait for ever: for a request's head, or for a reader of the answer.

uvicorn closes a connection that is silent between two requests (``timeout_keep_alive``). It waits
without end for the head of a request that has begun or never begins, and for a client that does
not read what was sent; each of them holds one of the process's file handles. A body has the time
limit of the application.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MOST = 512  # connections at once; a further one is closed unheard


def protocol(*, seconds: float, most: int = MOST) -> type[asyncio.Protocol]:
    """Make the class that uvicorn's ``http`` setting takes.

    Args:
        seconds: for a request's head, and for the reading of an answer's end.
        most: connections at once.
    """

    class Bounded(H11Protocol):
        _late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > most:
                transport.abort()
            else:
                self._watch_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._cancel()
            super().connection_lost(exc)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._end_if_closing()

        def timeout_keep_alive_handler(self) -> None:
            super().timeout_keep_alive_handler()
            self._end_if_closing()

        def _watch_head(self) -> None:
            """Start the clock where no head has come, and stop it where one has."""
            if self.conn.their_state is not h11.IDLE:
                self._cancel()
            elif self._late is None:
                self._late = self.loop.call_later(seconds, self.transport.abort)

        def _cancel(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

        def _end_if_closing(self) -> None:
            """What is written may never be read: closing waits for it, this does not."""
            if self.transport.is_closing():
                self.loop.call_later(seconds, self.transport.abort)

    return Bounded
