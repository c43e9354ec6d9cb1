"""Which of a prompt's subjects are in a picture, by the judge of the model that drew it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from PIL import Image

from attend_excite.models.catalogue import catalogue, source_of
from attend_excite.models.judge import Judge, pixels
from attend_excite.subjects import Prompt, TokenGroup

Verdict = Mapping[str, bool | None]
"""A subject's text -> whether it is in the picture; None: nobody can tell."""

NOBODY_CAN_TELL = (
    "nobody can tell which picture is the best: the bundled judge knows the pictures of the bundled models "
    "alone, and of the words its subjects"
)
"""Why there is no best picture."""


def judge_of(model: str) -> Judge | None:
    """The bundled judge of a model's pictures, by the model's name. None: it has none, as all but the bundled
    models."""
    entry = catalogue().get(model)
    return None if entry is None or entry.judge is None else _read(entry.judge)


@torch.inference_mode()
def verdicts(images: Sequence[Image.Image], prompt: Prompt, model: str) -> list[Verdict]:
    """Look for the subjects of a prompt in its pictures.

    A judge knows the words that it was trained on, and sees whether there is any such thing: neither how many
    nor in which colour. So nobody can tell of a word that it doesn't know, of the second of two cats, and of
    what a model without a judge drew.

    Args:
        images: of one size.
        prompt: parsed, with its subjects.
        model: the name of the model that drew them.

    Returns:
        A verdict an image, its subjects in the prompt's order.
    """
    judge = judge_of(model)
    places = {group.text: None if judge is None else judge.index_of(group.text) for group in prompt.groups}
    known = {text: place for text, place in places.items() if place is not None}
    if judge is None or not known or not images:
        return [dict.fromkeys(places) for _ in images]
    scores = judge(pixels(images)).scores
    there = scores >= judge.get_buffer("thresholds")
    return [
        {text: None if place is None else bool(row[place]) for text, place in places.items()} for row in there
    ]


def can_judge(prompt: Prompt, model: str) -> bool:
    """Whether there is a judge of that model's pictures, and it knows any of the prompt's subjects."""
    judge = judge_of(model)
    return judge is not None and any(judge.index_of(group.text) is not None for group in prompt.groups)


def as_asked(verdict: Verdict, groups: Sequence[TokenGroup]) -> int:
    """How many subjects are as the prompt asks: there, or where negated not there."""
    return sum(verdict[group.text] is (not group.negated) for group in groups)


def best(verdicts: Sequence[Verdict], prompt: Prompt) -> int:
    """The index of the picture with the most subjects as asked, the first of those that are equal.

    Raises:
        ValueError: nobody can tell of any subject.
    """
    if not any(value is not None for verdict in verdicts for value in verdict.values()):
        raise ValueError(NOBODY_CAN_TELL)
    counts = [as_asked(verdict, prompt.groups) for verdict in verdicts]
    return counts.index(max(counts))


def sentence(verdict: Verdict, prompt: Prompt) -> str:
    """A verdict in one line, "cat ✓ frog ✗ no hat ✓"; "" where nobody can tell."""
    marks = {True: "✓", False: "✗", None: "?"}
    if all(value is None for value in verdict.values()):
        return ""
    words = []
    for group in prompt.groups:
        there = verdict[group.text]
        fits = None if there is None else there is not group.negated
        words.append(f"{'no ' * group.negated}{group.text} {marks[fits]}")
    return " ".join(words)


@cache
def _read(name: str) -> Judge:
    return Judge.load(Path(source_of(name)))
