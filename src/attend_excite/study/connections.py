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
    """How long nothing of an answer may be read."""

    _deadline: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unwatch()
        self.resume_writing()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:  # It came in part with the request before it.
            self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self.answer_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

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
