"""How the page's events run."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

from attend_excite.app import views
from attend_excite.app.actions import Drawn, Progress, Redrawn, Report
from attend_excite.app.jobs import reports

IN_TURN: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
"""What runs a model waits for its turn."""

RUN: dict[str, Any] = IN_TURN | {"show_progress": "hidden", "api_visibility": "private"}
"""Such an event of the page. Programs have endpoints of their own."""

AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""An event of the page that runs no model."""

_FRAME_SECONDS = 0.15
"""Between two looks at a run, at least."""


async def watched(
    work: Callable[[Report], None], seeds: Sequence[int], wanted: Callable[[], bool]
) -> AsyncGenerator[str | Drawn | Redrawn, None]:
    """A run as HTML, step by step; at the end what came out. What goes wrong is shown, too.

    Args:
        work: reports its steps and what came out.
        seeds: of the pictures in the making.
        wanted: whether the visitor still waits for it.
    """
    latest = 0.0
    try:
        async with aclosing(reports(work, wanted)) as run:
            async for value in run:
                if not isinstance(value, Progress):
                    yield value
                elif time.monotonic() - latest >= _FRAME_SECONDS:
                    latest = time.monotonic()
                    yield views.progress_view(value, seeds)
    except ValueError as error:
        yield views.problem_view(views.sentence(error))
    except Exception:
        logging.exception("a run failed")
        yield views.problem_view("The server could not finish this: its log says why.")
