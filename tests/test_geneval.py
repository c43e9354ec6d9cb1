"""GenEval's rule, on boxes by hand."""

from __future__ import annotations

from typing import Any

import pytest

from attend_excite.benchmark.geneval import Detection, asked_of, reasons_against, relations

LEFT, RIGHT = (0, 0, 20, 20), (60, 0, 80, 20)
BELOW, TOUCHING = (0, 70, 20, 90), (15, 0, 35, 20)


def _against(told: dict[str, Any], colour: str = "red", **found: list[tuple[float, tuple]]) -> list[str]:
    boxes = {name: [Detection(*each) for each in of_it] for name, of_it in found.items()}
    return reasons_against(asked_of(told), boxes, lambda box, thing: colour)


def test_each_thing_must_be_there_often_enough_and_not_too_often() -> None:
    two = {
        "include": [{"class": "clock", "count": 2}],
        "exclude": [{"class": "clock", "count": 3}],
    }
    three = [(0.9, LEFT), (0.5, RIGHT), (0.4, BELOW)]
    assert _against(two, clock=three[:1]) == ["clock: 1 of 2 found"]
    assert _against(two, clock=three[:2]) == []
    assert _against(two, clock=three) == ["clock: 3 found, and fewer than 3 allowed"]
    # A box that lies on a surer one is the same thing: here two thirds of their union, and there a third.
    assert _against(two, clock=[(0.9, LEFT), (0.8, (4, 0, 24, 20))]) == ["clock: 1 of 2 found"]
    assert _against(two, clock=[(0.9, LEFT), (0.8, (10, 0, 30, 20))]) == []


def test_so_many_must_have_the_colour() -> None:
    told = {"include": [{"class": "bowl", "count": 1, "color": "red"}, {"class": "cat"}]}
    there = {"bowl": [(0.5, LEFT)], "cat": [(0.5, RIGHT)]}
    assert _against(told, "red", **there) == []
    assert _against(told, "blue", **there) == ["bowl: blue and not red"]
    # The surest box alone counts where one is asked for.
    asked = asked_of({"include": [{"class": "bowl", "count": 1, "color": "red"}]})
    boxes = {"bowl": [Detection(0.4, RIGHT), Detection(0.9, LEFT)]}
    assert reasons_against(asked, boxes, lambda box, _: "red" if box == LEFT else "blue") == []
    assert reasons_against(asked, boxes, lambda box, _: "blue" if box == LEFT else "red") != []


def test_places_are_told_from_the_middles() -> None:
    assert relations(LEFT, RIGHT) == {"left of"}
    assert relations(RIGHT, LEFT) == {"right of"}
    assert relations(LEFT, BELOW) == {"above"}
    assert relations(BELOW, LEFT) == {"below"}
    # 60 to the side and 70 down, less 4 of each: 56 and 66 of 92.2, both above a half.
    assert relations(RIGHT, BELOW) == {"right of", "above"}
    # 100 and 30, less 4: 26 of 104.4 is less than half.
    assert relations((100, 30, 120, 50), LEFT) == {"right of"}
    # 15 apart, less a tenth of 40: 11 of 15. And 4 apart: nothing is left of that.
    assert relations(TOUCHING, LEFT) == {"right of"}
    assert relations((4, 0, 24, 20), LEFT) == set()
    assert relations(LEFT, LEFT) == set()
    told = {"include": [{"class": "cat"}, {"class": "dog", "position": ["right of", 0]}]}
    assert _against(told, cat=[(0.9, LEFT)], dog=[(0.9, RIGHT)]) == []
    assert _against(told, cat=[(0.9, RIGHT)], dog=[(0.9, LEFT)]) == ["dog: not right of the cat"]
    assert _against(told, dog=[(0.9, LEFT)]) == ["cat: 0 of 1 found", "dog: not right of the cat"]


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"include": {"class": "cat"}}, '"include" must be a list'),
        ({"include": ["cat"]}, 'must be an object with a "class"'),
        ({"include": [{"class": "cat", "count": 0}]}, 'the count of "cat" must be a whole number'),
        ({"include": [{"class": "cat", "color": 5}]}, 'the color of "cat" must be a text'),
        ({"include": [{"class": "cat", "position": ["near", 0]}]}, 'the position of "cat" must be a pair'),
    ],
)
def test_what_asks_nothing_is_refused(told: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        asked_of(told)
