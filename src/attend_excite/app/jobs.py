"""A run in a thread of its own: what it reports, step by step, and how it is stopped."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import TypeVar

Report = TypeVar("Report")


class Stopped(Exception):
    """Raised in a run that nobody waits for any more."""


async def reports(work: Callable[[Callable[[Report], None]], None]) -> AsyncGenerator[Report, None]:
    """What `work(report)` reports, in its order, until it is done.

    When the iteration ends before that (a visitor has pressed Stop or gone away), the next call of
    `report` raises `Stopped` in the run, which so ends at its next step and cleans up behind itself.

    Raises:
        Exception: what the work raises.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Report | None] = asyncio.Queue()
    stopped = False

    def report(value: Report) -> None:
        if stopped:
            raise Stopped
        loop.call_soon_threadsafe(queue.put_nowait, value)

    def run() -> None:
        try:
            with suppress(Stopped):
                work(report)
        finally:
            loop.call_soon_threadsafe(queue.put_nowait, None)

    running = asyncio.ensure_future(asyncio.to_thread(run))
    try:
        while (value := await queue.get()) is not None:
            yield value
        await running
    finally:
        stopped = True
