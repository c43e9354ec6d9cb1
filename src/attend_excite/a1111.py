"""Prompts as Stable Diffusion web UI (A1111) reads them: weights in brackets, and chunks of 75 tokens.

Its rules as its users know them: (cat) is 1.1 times as much and [cat] 1.1 times less, brackets in brackets
multiply, (cat:1.3) is 1.3 times, a backslash makes a bracket a bracket and is dropped elsewhere, BREAK begins
a new chunk, and a chunk that is full ends at a comma that is not far. What changes the text during a run
([cat:dog:0.5], [cat|dog]) and what isn't text (AND, <lora:...>) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_STEP = 1.1
_NEAR = 20
"""A comma so many tokens before a chunk's end still ends it."""

_MARKS = re.compile(r"\\(?P<literal>[\\()\[\]]?)|:\s*(?P<weight>[+-]?[.\d]+)\s*\)|(?P<mark>[()\[\]])")
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
# What makes [cat|dog] and [cat:dog:0.5] more than a bracket: a bar in it, and a number before its end.
_SQUARE = re.compile(r"\\.|(?P<open>\[)|(?P<bar>\|)|(?P<when>:\s*[+-]?[.\d]+\s*)?(?P<end>\])")
_REFUSED = (
    (r"<(?:lora|lyco|hypernet):[^>]*>", "give it with --lora FILE:WEIGHT, or load(..., loras=[...])"),
    (r"\bAND\b", "concepts beside one another are drawn with --method composable, without this syntax"),
)


@dataclass(frozen=True)
class WeightedText:
    """A text without the marks, and what they said.

    Attributes:
        text: as it is drawn.
        weights: of each of its characters.
        breaks: the characters before which a new chunk begins; as often as it was asked for.
    """

    text: str
    weights: tuple[float, ...]
    breaks: tuple[int, ...]

    def pieces(self) -> list[tuple[int, int]]:
        """The (start, end) of its longest runs of one weight: each is cut into tokens by itself."""
        places = range(1, len(self.text))
        ends = [at for at in places if self.weights[at] != self.weights[at - 1] or at in self.breaks]
        return [(a, b) for a, b in zip([0, *ends], [*ends, len(self.text)], strict=True) if a < b]


@dataclass(frozen=True)
class Chunk:
    """As many tokens as the text encoder reads at once: up to 75 in CLIP.

    Attributes:
        ids: of its tokens, the first and last of a text left out.
        weights: what each token's embedding is multiplied by.
    """

    ids: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()


def read_weights(prompt: str) -> WeightedText:
    """Take the marks out of a prompt.

    Raises:
        ValueError: it has something of A1111's that isn't read here.
    """
    for pattern, advice in _REFUSED:
        if found := re.search(pattern, prompt):
            raise ValueError(f"'{found[0]}' is not read here: {advice}")
    if changing := _changing(prompt):
        raise ValueError(
            f"'{changing}' is not read here: a text that changes during the run can't be nursed: leave it out"
        )
    text, weights, round_open, square_open, done = "", list[float](), list[int](), list[int](), 0

    def multiply(start: int, by: float) -> None:
        weights[start:] = [weight * by for weight in weights[start:]]

    def add(more: str) -> None:
        nonlocal text
        text += more
        weights.extend([1.0] * len(more))

    for mark in _MARKS.finditer(prompt):
        add(prompt[done : mark.start()])
        done = mark.end()
        if mark["literal"] is not None:
            add(mark["literal"])
        elif mark["weight"] and round_open:
            multiply(round_open.pop(), _number(mark["weight"], prompt))
        elif mark["mark"] == "(":
            round_open.append(len(text))
        elif mark["mark"] == "[":
            square_open.append(len(text))
        elif mark["mark"] == ")" and round_open:
            multiply(round_open.pop(), _STEP)
        elif mark["mark"] == "]" and square_open:
            multiply(square_open.pop(), 1 / _STEP)
        else:
            add(mark[0])
    add(prompt[done:])
    # What isn't closed goes on to the end.
    for start in round_open:
        multiply(start, _STEP)
    for start in square_open:
        multiply(start, 1 / _STEP)
    return _without_breaks(text, weights)


def _changing(prompt: str) -> str | None:
    """The first text in brackets that changes during a run: [cat:dog:0.5] or [cat|dog]; None: none does."""
    # Of each bracket that isn't closed yet: where it begins, and whether there is a bar in it.
    opened = list[tuple[int, bool]]()
    for mark in _SQUARE.finditer(prompt):
        if mark["open"]:
            opened.append((mark.start(), False))
        elif opened and mark["bar"]:
            opened[-1] = (opened[-1][0], True)
        elif opened and mark["end"]:
            start, bar = opened.pop()
            if bar or mark["when"]:
                return prompt[start : mark.end()]
    return None


def _without_breaks(text: str, weights: Sequence[float]) -> WeightedText:
    kept, breaks, done = list[int](), list[int](), 0
    for found in _BREAK.finditer(text):
        kept += range(done, found.start())
        # A space of it stays, so that words don't run together.
        if found[0][0].isspace():
            kept.append(found.start())
        breaks.append(len(kept))
        done = found.end()
    kept += range(done, len(text))
    return WeightedText("".join(text[at] for at in kept), tuple(weights[at] for at in kept), tuple(breaks))


def in_chunks(
    tokens: Sequence[tuple[int, int]], breaks: Sequence[int], is_comma: Callable[[int], bool], length: int
) -> list[list[int]]:
    """Lay a text's tokens into chunks: the indices of those of each.

    Args:
        tokens: the (id, first character) of each.
        breaks: the characters before which a new chunk begins.
        is_comma: of a token's id.
        length: tokens of a chunk, its first and last left out.
    """
    chunks, ahead = [list[int]()], list(breaks)
    comma: int | None = None
    for index, (token, start) in enumerate(tokens):
        while ahead and start >= ahead[0]:
            ahead.pop(0)
            chunks.append([])
            comma = None
        if is_comma(token):
            comma = len(chunks[-1])
        elif len(chunks[-1]) == length and comma is not None and length - comma <= _NEAR:
            moved = chunks[-1][comma + 1 :]
            del chunks[-1][comma + 1 :]
            chunks.append(moved)
            comma = None
        if len(chunks[-1]) == length:
            chunks.append([])
            comma = None
        chunks[-1].append(index)
    # A break at the end ends the last chunk; further ones are empty.
    return [*chunks, *([] for _ in ahead[1:])]


def _number(text: str, prompt: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"the weight '{text}' in {prompt!r} is not a number") from None
