"""A run in a thread of its own: what it reports, step by step, and how it is stopped."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import Generic, TypeVar

Report = TypeVar("Report")


class Stopped(Exception):
    """Raised in a run that nobody waits for any more."""


class Reporter(Generic[Report]):
    """What a run is given to tell how far it is."""

    def __init__(self, deliver: Callable[[Report], object]) -> None:
        self._deliver = deliver
        self.stopped = False

    def __call__(self, value: Report) -> None:
        """Report something.

        Raises:
            Stopped: nobody waits any more.
        """
        self.check()
        self._deliver(value)

    def check(self) -> None:
        """Report nothing, but end the run if nobody waits for it.

        Raises:
            Stopped: nobody waits any more.
        """
        if self.stopped:
            raise Stopped


async def reports(work: Callable[[Reporter[Report]], None]) -> AsyncGenerator[Report, None]:
    """What `work(report)` reports, in its order, until it is done.

    When the iteration ends before that (a visitor has pressed Stop or gone away), the next use of `report`
    raises `Stopped` in the run, which so ends at its next UNet pass and cleans up behind itself.

    Raises:
        Exception: what the work raises.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Report | None] = asyncio.Queue()
    report = Reporter[Report](lambda value: loop.call_soon_threadsafe(queue.put_nowait, value))

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
        report.stopped = True
