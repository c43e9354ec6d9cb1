"""Connections that stall are closed: those that nobody writes to, and those that nobody reads from."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

_UNFINISHED = (h11.IDLE, h11.SEND_BODY)


class PunctualProtocol(H11Protocol):
    """uvicorn's protocol, which waits for ever for a request that was begun, or for one that never comes."""

    request_seconds = 30.0
    """From the first byte of a request, or from the connection, to the last byte of the request."""

    answer_seconds = 60.0
    """How long the rest of an answer may take once the connection is to be closed."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unwatch()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        # Closed only once all is sent, which it never is to somebody who doesn't read.
        self._deadline = self.loop.call_later(self.answer_seconds, self.transport.abort)

    def _watch(self) -> None:
        if self.conn.their_state not in _UNFINISHED or self.transport.is_closing():
            self._unwatch()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.request_seconds, self.transport.abort)

    def _unwatch(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
