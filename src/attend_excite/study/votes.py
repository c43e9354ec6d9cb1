"""A vote: what one respondent answered on one page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["ordinary", "check", "repeat"]
"""ordinary: a prompt of the study; check: does the respondent read; repeat: an ordinary page once more."""

Source = Literal["web", "imported", "simulated"]
"""Where a respondent comes from: the study's own pages, a file of votes, or a program that plays one."""

SOURCES: tuple[Source, ...] = get_args(Source)


@dataclass(frozen=True)
class Vote:
    """What one respondent answered on one page.

    Attributes:
        respondent: a random id, 32 hexadecimal digits.
        page: the page's id in the study.
        kind: what the page is for.
        repeats: the page that a "repeat" page repeats, else None.
        prompt: shown above the images.
        subset: the prompt's subset of the benchmark; "" if it has none.
        shown: the systems in the order in which this respondent saw their images.
        choice: the system whose images were chosen; None: "none is better".
        expected: the system that an attentive respondent chooses on a "check" page, else None.
        seconds: from when the page was last shown to the first choice on it.
        source: where the respondent comes from.
    """

    respondent: str
    page: str
    kind: Kind
    repeats: str | None
    prompt: str
    subset: str
    shown: tuple[str, ...]
    choice: str | None
    expected: str | None
    seconds: float
    source: Source = "web"
