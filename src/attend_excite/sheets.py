"""Labelled sheets of pictures: methods side by side, and where each subject was attended to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from attend_excite.attention.maps import overlay
from attend_excite.subjects import Prompt, TokenGroup

PAPER, INK, MUTED = "#ffffff", "#1c1917", "#78716c"
SUBJECT_COLOURS = ("#c2410c", "#1d4ed8", "#15803d", "#a21caf", "#a16207", "#0e7490")

COLUMNS = 8
"""Pictures side by side before a sheet goes on below."""

_MARGIN, _GAP, _BAND_GAP = 36, 10, 28
_TITLE, _LABEL, _SMALL = 34, 20, 17
_LEAST_SIDE, _LEAST_WIDTH = 256, 640


@dataclass(frozen=True)
class _Label:
    text: str
    colour: str = INK


@dataclass(frozen=True)
class _Row:
    """Pictures side by side, all of one size; `captions` stand below them, one each or none at all."""

    label: _Label
    pictures: Sequence[Image.Image]
    captions: Sequence[str] = ()


def comparison_sheet(
    prompt: Prompt, subtitle: str, rows: Mapping[str, Sequence[Image.Image]], seeds: Sequence[int]
) -> Image.Image:
    """Methods below each other, seeds side by side.

    Args:
        prompt: the title; its subjects are coloured.
        subtitle: what else made the pictures.
        rows: a label -> one picture a seed.
        seeds: of the columns.
    """
    columns = [_Label(f"seed {seed}", MUTED) for seed in seeds]
    enlarged = [_Row(_Label(label), [_enlarged(picture) for picture in row]) for label, row in rows.items()]
    return _sheet(prompt, subtitle, columns, enlarged)


def maps_sheet(
    prompt: Prompt,
    subtitle: str,
    rows: Mapping[str, tuple[Image.Image, Sequence[Tensor]]],
    captions: Mapping[str, Sequence[str]] | None = None,
) -> Image.Image:
    """A picture, then the heat map of each of the prompt's subjects over it; a row a picture (Figure 4).

    Args:
        prompt: the title; its subjects are coloured.
        subtitle: what else made the pictures.
        rows: a label -> the picture and its heat maps: (height, width) of values 0 to 1, one a subject, as
            `WordMaps.heat_map` gives.
        captions: a label -> what stands below each heat map.
    """
    drawn = []
    for label, (picture, heat_maps) in rows.items():
        large = _enlarged(picture)
        below = ["", *captions[label]] if captions else []
        drawn.append(_Row(_Label(label), [large, *(overlay(large, heat) for heat in heat_maps)], below))
    return _sheet(prompt, subtitle, [_Label("picture", MUTED), *_subject_labels(prompt)], drawn)


def evolution_sheet(
    prompt: Prompt, subtitle: str, picture: Image.Image, columns: Mapping[str, Sequence[Tensor]]
) -> Image.Image:
    """A row a subject, a column a step: the heat maps over the finished picture (Figure 3).

    Args:
        prompt: the title; its subjects are coloured.
        subtitle: what else made the picture.
        picture: the picture, shown with a shorter side of 256 pixels.
        columns: a label -> one heat map (height, width) of values 0 to 1 a subject.
    """
    small = fitted(picture)
    rows = [
        _Row(label, [overlay(small, heat_maps[index]) for heat_maps in columns.values()])
        for index, label in enumerate(_subject_labels(prompt))
    ]
    return _sheet(prompt, subtitle, [_Label(column, MUTED) for column in columns], rows)


def fitted(picture: Image.Image) -> Image.Image:
    """The picture with a shorter side of 256 pixels, for sheets of many."""
    scale = _LEAST_SIDE / min(picture.size)
    return picture.resize(
        (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS
    )


def subject_colour(index: int) -> str:
    """The colour of a prompt's subject number `index`, the same in every picture."""
    return SUBJECT_COLOURS[index % len(SUBJECT_COLOURS)]


def subject_name(group: TokenGroup) -> str:
    """A subject for people: "frog", "frog, target 0.7", "not hat" or "not hat, up to 0.1"."""
    if group.negated:
        return f"not {group.text}" + (f", up to {group.target:g}" if group.target > 0 else "")
    return group.text + (f", target {group.target:g}" if group.target < 1 else "")


def _subject_labels(prompt: Prompt) -> list[_Label]:
    return [_Label(subject_name(group), subject_colour(index)) for index, group in enumerate(prompt.groups)]


def _sheet(prompt: Prompt, subtitle: str, columns: Sequence[_Label], rows: Sequence[_Row]) -> Image.Image:
    width, height = rows[0].pictures[0].size
    row_height = height + (_line(_SMALL) + _GAP if rows[0].captions else 0)
    left = _MARGIN + max(_row_label_width(row.label.text) for row in rows)
    across = min(len(columns), COLUMNS)
    bands = -(-len(columns) // COLUMNS)
    sheet_width = max(left + across * (width + _GAP) - _GAP + _MARGIN, _LEAST_WIDTH)
    lines = _wrapped(prompt, sheet_width - 2 * _MARGIN)
    top = _MARGIN + len(lines) * _line(_TITLE) + _line(_SMALL) + _BAND_GAP
    band_height = _line(_LABEL) + len(rows) * (row_height + _GAP) - _GAP
    sheet_height = top + bands * (band_height + _BAND_GAP) - _BAND_GAP + _MARGIN

    sheet = Image.new("RGB", (sheet_width, sheet_height), PAPER)
    pen = ImageDraw.Draw(sheet)
    _write_title(pen, lines)
    pen.text((_MARGIN, top - _BAND_GAP - _line(_SMALL)), subtitle, MUTED, _font(_SMALL))
    for band in range(bands):
        y = top + band * (band_height + _BAND_GAP)
        shown = slice(band * COLUMNS, (band + 1) * COLUMNS)
        centres = [left + column * (width + _GAP) + width / 2 for column in range(COLUMNS)]
        for x, label in zip(centres, columns[shown], strict=False):
            pen.text((x, y), label.text, label.colour, _font(_LABEL), anchor="ma")
        for index, row in enumerate(rows):
            row_y = y + _line(_LABEL) + index * (row_height + _GAP)
            pen.text(
                (_MARGIN, row_y + height / 2), row.label.text, row.label.colour, _font(_LABEL), anchor="lm"
            )
            for x, picture in zip(centres, row.pictures[shown], strict=False):
                sheet.paste(picture, (round(x - width / 2), row_y))
            for x, caption in zip(centres, row.captions[shown], strict=False):
                pen.text((x, row_y + height + _GAP / 2), caption, MUTED, _font(_SMALL), anchor="ma")
    return sheet


def _enlarged(picture: Image.Image) -> Image.Image:
    """Small pictures a whole number of times as large."""
    factor = -(-_LEAST_SIDE // min(picture.size))
    if factor == 1:
        return picture
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.LANCZOS)


def _wrapped(prompt: Prompt, width: int) -> list[list[list[tuple[str, str]]]]:
    """The prompt as lines of words; a word is made of (text, colour) pieces."""
    space = _font(_TITLE).getlength(" ")
    lines: list[list[list[tuple[str, str]]]] = [[]]
    room = float(width)
    for word in _coloured_words(prompt):
        needed = sum(_font(_TITLE).getlength(text) for text, _ in word)
        if lines[-1] and needed > room:
            lines.append([])
            room = width
        lines[-1].append(word)
        room -= needed + space
    return lines


def _coloured_words(prompt: Prompt) -> list[list[tuple[str, str]]]:
    colours = [INK] * len(prompt.text)
    for index, group in enumerate(prompt.groups):
        for position in group.positions:
            start, end = prompt.spans[position]
            colours[start:end] = [subject_colour(index)] * (end - start)
    words: list[list[tuple[str, str]]] = []
    for blank, characters in groupby(zip(prompt.text, colours, strict=True), lambda pair: pair[0].isspace()):
        if not blank:
            pieces = groupby(characters, lambda pair: pair[1])
            words.append([("".join(text for text, _ in piece), colour) for colour, piece in pieces])
    return words


def _write_title(pen: ImageDraw.ImageDraw, lines: list[list[list[tuple[str, str]]]]) -> None:
    for number, line in enumerate(lines):
        x = float(_MARGIN)
        for word in line:
            for text, colour in word:
                pen.text((x, _MARGIN + number * _line(_TITLE)), text, colour, _font(_TITLE))
                x += _font(_TITLE).getlength(text)
            x += _font(_TITLE).getlength(" ")


def _row_label_width(label: str) -> int:
    return round(_font(_LABEL).getlength(label)) + 2 * _GAP if label else 0


@cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _line(size: int) -> int:
    return round(1.4 * size)
