"""A run in a thread of its own: how it waits for its turn, what it reports, and how it is stopped."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from typing import Generic, TypeVar

Report = TypeVar("Report")

_LOOK_SECONDS = 0.1
"""Between two looks at whose turn it is."""

_VISITORS = 1000
"""Whose last press of Stop is remembered."""


class Stopped(Exception):
    """Raised in a run that nobody waits for any more."""


class Stops:
    """When each visitor last pressed Stop. A run takes a ticket when it is asked for, and is wanted until
    they press it again: also while it waits for its turn, and before the browser has sent it off."""

    def __init__(self) -> None:
        self._count = count(1)
        self._pressed = OrderedDict[str, int]()

    def ticket(self) -> int:
        """A ticket for a run."""
        return next(self._count)

    def press(self, visitor: str) -> None:
        """All that they have asked for is no longer wanted."""
        self._pressed[visitor] = next(self._count)
        self._pressed.move_to_end(visitor)
        if len(self._pressed) > _VISITORS:
            self._pressed.popitem(last=False)

    def wanted(self, visitor: str, ticket: int) -> bool:
        """Whether a run of theirs is still wanted."""
        return ticket > self._pressed.get(visitor, 0)


class Line:
    """Who waits for the model, in their order; the first one has it.

    Args:
        most: how many may wait, 1 or more.
        most_each: how many of one address, likewise.
    """

    def __init__(self, most: int, most_each: int) -> None:
        self._most, self._most_each = most, most_each
        self._places: list[tuple[int, str]] = []
        self._count = count()

    @contextmanager
    def place(self, address: str) -> Iterator[tuple[int, str]]:
        """In the block a run from this address stands in the line.

        Raises:
            ValueError: the line is too long, or too many in it are from there.
        """
        # The first one runs.
        waiting = [other for _, other in self._places[1:]]
        if len(waiting) >= self._most:
            raise ValueError("too many runs are waiting: try again in a minute")
        if waiting.count(address) >= self._most_each:
            raise ValueError("too many runs from your address are waiting: let them end, or stop them")
        mine = (next(self._count), address)
        self._places.append(mine)
        try:
            yield mine
        finally:
            self._places.remove(mine)

    def before(self, place: tuple[int, str]) -> int:
        """How many are before it."""
        return self._places.index(place)


@dataclass(frozen=True)
class Waiting:
    """It isn't a run's turn yet.

    Attributes:
        before: how many runs come first.
    """

    before: int


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


def heard(listening: Callable[[], bool], seconds: float) -> Callable[[], bool]:
    """Whether somebody has listened within the last seconds, from now on."""
    latest = time.monotonic()

    def still() -> bool:
        nonlocal latest
        if listening():
            latest = time.monotonic()
        return time.monotonic() - latest < seconds

    return still


async def in_turn(
    work: Callable[[Reporter[Report]], None], line: Line, address: str, wanted: Callable[[], bool]
) -> AsyncGenerator[Report | Waiting, None]:
    """As `reports`, when it is the run's turn; until then how many are before it.

    Args:
        work: the run.
        line: where it waits.
        address: of whoever asks for it.
        wanted: asked from the run's thread, too.

    Raises:
        ValueError: the line is full.
        Exception: what the work raises.
    """
    with line.place(address) as place:
        told = 0
        while before := line.before(place):
            if not wanted():
                return
            if before != told:
                told = before
                yield Waiting(before)
            await asyncio.sleep(_LOOK_SECONDS)
        async with aclosing(reports(work, wanted)) as run:
            async for value in run:
                yield value


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
