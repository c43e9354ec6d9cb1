"""A run in a thread of its own: what it reports, step by step, and how it is stopped."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import Generic, TypeVar

Report = TypeVar("Report")


class Stopped(Exception):
    """Raised in a run that nobody waits for any more."""


class Stops:
    """How often each visitor has pressed Stop. A run takes a ticket when it is asked for, and is wanted until
    they press it again: also while it waits for its turn, and before it has come into the queue."""

    def __init__(self) -> None:
        self._pressed = Counter[str]()

    def ticket(self, visitor: str) -> str:
        """A ticket for a run of theirs."""
        return f"{self._pressed[visitor]} {visitor}"

    def press(self, visitor: str) -> None:
        """All that they have asked for is no longer wanted."""
        self._pressed[visitor] += 1

    def wanted(self, ticket: str) -> bool:
        """Whether a run is still wanted."""
        return ticket == self.ticket(ticket.partition(" ")[2])


class Reporter(Generic[Report]):
    """What a run is given to tell how far it is."""

    def __init__(self, deliver: Callable[[Report], object], wanted: Callable[[], bool]) -> None:
        self._deliver, self._wanted = deliver, wanted
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
        if self.stopped or not self._wanted():
            raise Stopped


async def reports(
    work: Callable[[Reporter[Report]], None], wanted: Callable[[], bool] = lambda: True
) -> AsyncGenerator[Report, None]:
    """What `work(report)` reports, in its order, until it is done.

    When it is no longer wanted, or the iteration ends (a visitor has gone away), the next use of `report`
    raises `Stopped` in the run, which so ends at its next UNet pass and cleans up behind itself.

    Args:
        work: the run.
        wanted: asked from the run's thread.

    Raises:
        Exception: what the work raises.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Report | None] = asyncio.Queue()
    report = Reporter[Report](lambda value: loop.call_soon_threadsafe(queue.put_nowait, value), wanted)

    def run() -> None:
        try:
            with suppress(Stopped):
                work(report)
        finally:
            loop.call_soon_threadsafe(queue.put_nowait, None)

    running = asyncio.ensure_future(asyncio.to_thread(run))
    try:
        while (value := await queue.get()) is not None:
            if wanted():
                yield value
        await running
    finally:
        report.stopped = True
