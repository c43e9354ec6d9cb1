"""How the page's events run."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from attend_excite.app import views
from attend_excite.app.actions import Drawn, Progress, Redrawn
from attend_excite.app.jobs import Waiting

RUN: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
"""An event of the page that runs a model: it waits in the line of `jobs`, where it can say for how many.
Programs have endpoints of their own."""

AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""An event of the page that runs no model."""

_FRAME_SECONDS = 0.15
"""Between two looks at a run, at least."""


async def watched(
    run: AsyncGenerator[Progress | Drawn | Redrawn | Waiting, None], seeds: Sequence[int]
) -> AsyncGenerator[tuple[str, Progress | Drawn | Redrawn | None], None]:
    """A run as HTML, step by step, each with what it shows. What goes wrong is shown, too.

    Args:
        run: its reports.
        seeds: of the pictures in the making.
    """
    latest = 0.0
    try:
        async with aclosing(run) as values:
            async for value in values:
                if isinstance(value, Waiting):
                    yield views.waiting_view(value.before), None
                elif isinstance(value, Drawn):
                    yield views.drawn_view(value), value
                elif isinstance(value, Redrawn):
                    yield views.redrawn_view(value), value
                elif time.monotonic() - latest >= _FRAME_SECONDS:
                    latest = time.monotonic()
                    yield views.progress_view(value, seeds), value
    except ValueError as error:
        yield views.problem_view(views.sentence(error)), None
    except Exception:
        logging.exception("a run failed")
        yield views.problem_view("The server could not finish this: its log says why."), None
