"""Sets of prompts that are drawn by a seed: several subjects, look-alikes, swapped colours."""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from math import comb
from pathlib import Path

from attend_excite.benchmark.prompts import BenchmarkPrompt, one, word_lists
from attend_excite.documents import read_text

SEED = 0
"""Of the sets, unless another is given."""

LOOK_ALIKES, SWAPPED = "look-alikes", "swapped-colours"
_NUMBERS = {"two-subjects": 2, "three-subjects": 3, "four-subjects": 4}
SETS = (*_NUMBERS, LOOK_ALIKES, SWAPPED)
"""The sets by name."""


def draw_set(
    name: str,
    count: int,
    *,
    seed: int = SEED,
    things: Sequence[str] | None = None,
    pairs: Sequence[tuple[str, str]] = (),
) -> list[BenchmarkPrompt]:
    """So many prompts of a set, no two of the same subjects, in the order in which they were drawn.

    A set depends on its name, its seed and its words alone, and a longer one begins with the shorter.

    Args:
        name: one of `SETS`. "three-subjects": "a cat and a car and an elephant"; "look-alikes": a pair that
            is hard to tell apart, in the order that the seed gives it; "swapped-colours": two prompts for
            each draw, "a red car and a blue bowl" and "a blue car and a red bowl".
        count: of prompts, 1 or more.
        seed: of the draw.
        things: what can be drawn; None: the paper's animals and objects, and for swapped colours its objects.
        pairs: the look-alikes.

    Raises:
        ValueError: there is no such set, or there aren't so many prompts of it.
    """
    if name not in SETS:
        raise ValueError(f"unknown set '{name}': choose one of {', '.join(SETS)}")
    if count < 1:
        raise ValueError(f"the prompts of a set are {count}: there must be 1 or more")
    words = word_lists()
    # Seeded by the name too, so that no set depends on which others are drawn.
    draw = random.Random(f"{name} {seed}")
    if name == LOOK_ALIKES:
        _enough(name, count, len(pairs), "pairs: give them with --pairs FILE")
        chosen = [draw.sample(pair, 2) for pair in draw.sample(list(pairs), len(pairs))][:count]
        return [_prompt(name, subjects) for subjects in chosen]
    if name == SWAPPED:
        objects = list(dict.fromkeys(things or words["objects"]))
        if count % 2:
            raise ValueError(f"the prompts of '{name}' come in pairs: {count} is an odd number of them")
        _enough(name, count, 2 * comb(len(objects), 2), "prompts of these things")
        drawn = islice(_different(lambda: draw.sample(objects, 2)), count // 2)
        return [
            _prompt(name, pair, colours)
            for pair in drawn
            for first, second in [draw.sample(words["colours"], 2)]
            for colours in ((first, second), (second, first))
        ]
    everything = list(dict.fromkeys(things or words["animals"] + words["objects"]))
    number = _NUMBERS[name]
    _enough(name, count, comb(len(everything), number), "prompts of these things")
    return [
        _prompt(name, subjects)
        for subjects in islice(_different(lambda: draw.sample(everything, number)), count)
    ]


def read_things(path: Path) -> list[str]:
    """Names from a file, one a line.

    Raises:
        ValueError: it cannot be read, or has none.
    """
    things = [line.strip() for line in _text(path).splitlines() if line.strip()]
    if not things:
        raise ValueError(f"there are no names in '{path}': it must have one a line")
    return list(dict.fromkeys(things))


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """Pairs from a file, one a line: "cat, dog".

    Raises:
        ValueError: it cannot be read, or a line is no pair.
    """
    pairs: dict[frozenset[str], tuple[str, str]] = {}
    for number, line in enumerate(_text(path).splitlines(), 1):
        names = [name.strip() for name in line.split(",")]
        if not line.strip():
            continue
        if len(names) != 2 or not all(names) or names[0] == names[1]:
            raise ValueError(f"line {number} of '{path}' is no pair: write it like cat, dog")
        pairs.setdefault(frozenset(names), (names[0], names[1]))
    return list(pairs.values())


def as_csv(prompts: Sequence[BenchmarkPrompt]) -> str:
    """Prompts as a table that `read_prompts` reads."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("prompt", "subset", "subjects"))
    table.writerows((each.text, each.subset, "; ".join(each.subjects or ())) for each in prompts)
    return text.getvalue()


def _prompt(name: str, subjects: Sequence[str], colours: Sequence[str] = ()) -> BenchmarkPrompt:
    if colours:
        # As in the authors' list, "a orange bench".
        told = [f"a {colour} {subject}" for colour, subject in zip(colours, subjects, strict=True)]
    else:
        told = [one(subject) for subject in subjects]
    subset = name if name == LOOK_ALIKES else name.replace("-", " ")
    return BenchmarkPrompt(" and ".join(told), subset, tuple(subjects))


def _different(draw: Callable[[], list[str]]) -> Iterator[list[str]]:
    """What is drawn, without what was drawn before in another order."""
    seen = set[frozenset[str]]()
    while True:
        drawn = draw()
        if frozenset(drawn) not in seen:
            seen.add(frozenset(drawn))
            yield drawn


def _enough(name: str, wanted: int, there: int, what: str) -> None:
    if wanted > there:
        raise ValueError(f"'{name}' can have {there} {what}, and {wanted} are asked for")


def _text(path: Path) -> str:
    try:
        return read_text(path)
    except ValueError as error:
        raise ValueError(f"'{path}' {error}") from error
