"""Is each subject there, and in its colour? The bundled judge's verdict on sticker pictures."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from attend_excite.benchmark.metrics.base import Metric, Row, signature
from attend_excite.models import source_of
from attend_excite.models.judge import Judge, pixels

COLUMNS = ("scores", "present", "coloured", "neglected", "miscoloured", "right")
"""Of a verdict."""


@cache
def colours() -> tuple[str, ...]:
    """The paper's eleven (Table 3)."""
    text = files("attend_excite").joinpath("data/benchmark.json").read_text("utf-8")
    return tuple(json.loads(text)["colours"])


def colour_of(subject: str, prompt: str) -> str | None:
    """The colour that a subject has in its prompt, which stands in it or right before it: "yellow" for "bowl"
    and for "yellow bowl" in "a dog and a yellow bowl"."""
    within = re.findall(rf"\b{_colour()} (?=\w)", subject, re.IGNORECASE)
    found = within or re.findall(rf"\b{_colour()} {re.escape(subject)}\b", prompt, re.IGNORECASE)
    return found[-1].lower() if found else None


def without_colour(subject: str) -> str:
    """ "bowl" for "yellow bowl"."""
    return re.sub(rf"\b{_colour()} (?=\w)", "", subject, flags=re.IGNORECASE)


@cache
def _colour() -> str:
    return f"({'|'.join(colours())})"


def colours_of(subjects: Sequence[str], prompt: str) -> list[str | None]:
    """The colour of each subject; None also where several have the same name, and nobody can tell which of
    them is which."""
    return [colour_of(name, prompt) if subjects.count(name) == 1 else None for name in subjects]


def verdict(
    scores: Sequence[float], present: Sequence[bool], coloured: Sequence[bool | None]
) -> dict[str, Any]:
    """The columns of a verdict on one image.

    Args:
        scores: how sure the judge is of each subject, 0 to 1.
        present: whether that is enough.
        coloured: whether each subject has its colour; None: the prompt names none.

    Returns:
        The same, and `neglected`: a subject is missing; `miscoloured`: one is there in a wrong colour;
        `right`: neither.
    """
    neglected = not all(present)
    wrong = any(there and fits is False for there, fits in zip(present, coloured, strict=True))
    return {
        "scores": list(scores),
        "present": list(present),
        "coloured": list(coloured),
        "neglected": neglected,
        "miscoloured": wrong,
        "right": not neglected and not wrong,
    }


class JudgedPresence(Metric):
    """The presence judge's `verdict` on subjects that it knows, each by itself or at the end of a phrase:
    "bowl", "yellow bowl", "big yellow bowl". A prompt with another has none: its columns are null.

    Args:
        judge: a short name, or a folder that `Judge.load` reads.
        device: where it goes.

    Raises:
        ValueError: there is no such judge.
    """

    name = "presence"

    def __init__(self, judge: str, device: str | torch.device = "cpu") -> None:
        super().__init__(signature(judge))
        folder = Path(source_of(judge))
        if not (folder / "config.json").is_file():
            raise ValueError(f"'{judge}' is no presence judge: it must be a folder with its config.json")
        self._judge_model = Judge.load(folder).to(device)
        self._device = device

    def knows(self, subject: str) -> bool:
        """Whether it can tell if a subject is there."""
        return self._judge_model.index_of(subject) is not None

    def _judge(self, images: Sequence[Image.Image], rows: Sequence[Row]) -> list[dict[str, Any]]:
        seen = self._judge_model(pixels(images).to(self._device))
        return [self._verdict(row, seen.scores[at], seen.colours[at]) for at, row in enumerate(rows)]

    def _verdict(self, row: Row, scores: torch.Tensor, hues: torch.Tensor) -> dict[str, Any]:
        subjects, judge = row["subjects"] or [], self._judge_model
        places = [place for subject in subjects if (place := self._judge_model.index_of(subject)) is not None]
        if not subjects or len(places) < len(subjects):
            strangers = [subject for subject in subjects if not self.knows(subject)]
            self.unjudged[f"it doesn't know {', '.join(strangers)}" if strangers else "no subject named"] += 1
            return dict.fromkeys(COLUMNS)
        thresholds = judge.get_buffer("thresholds")
        wanted = colours_of(subjects, row["prompt"])
        # The last colour is a sticker's own, which is no answer: a red apple in its own colour is red.
        seen = [judge.colours[int(hues[place, :-1].argmax())] for place in places]
        return verdict(
            scores[places].tolist(),
            (scores[places] >= thresholds[places]).tolist(),
            [None if colour is None else colour == hue for colour, hue in zip(wanted, seen, strict=True)],
        )
