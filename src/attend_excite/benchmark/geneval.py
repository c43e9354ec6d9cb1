"""GenEval's rule: is all that a prompt asks for among a detector's boxes? (Ghosh et al., NeurIPS 2023)"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from attend_excite.checks import is_whole

RULE = (
    "An image is right where each thing that is asked for is found often enough, so many of those found have "
    "the colour and the place that are asked for, and nothing is found that must not be there so often."
)
"""The rule for people."""

RELATIONS = ("left of", "right of", "above", "below")

# Two boxes that share more of their union are one thing.
_SAME = 0.5
# Of their sizes, two things must be apart by this share, and then lie in a direction by at least that part of
# their distance.
_MARGIN, _PART = 0.1, 0.5

Box = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels."""


class Detection(NamedTuple):
    """What a detector found: how sure it is, 0 to 1, and where it is."""

    confidence: float
    box: Box


@dataclass(frozen=True)
class Asked:
    """One thing that a picture must show, or must not.

    Attributes:
        thing: its name.
        count: so many of it at least; of what must not be there: fewer than so many.
        colour: that all of those have; None: any.
        relation: where each of them lies, one of `RELATIONS`; None: anywhere.
        of: the index, among all that must be there, of what they lie there from.
    """

    thing: str
    count: int = 1
    colour: str | None = None
    relation: str | None = None
    of: int = 0


@dataclass(frozen=True)
class AskedOf:
    """All that a prompt asks of a picture: what must be there, and what must not."""

    include: tuple[Asked, ...]
    exclude: tuple[Asked, ...]

    @property
    def things(self) -> list[str]:
        """What a detector must look for."""
        return list(dict.fromkeys(each.thing for each in (*self.include, *self.exclude)))


def asked_of(told: Mapping[str, Any]) -> AskedOf:
    """What GenEval's file asks: `include` and `exclude`, lists of objects as {"class": "bowl", "count": 1,
    "color": "red", "position": ["above", 0]}.

    Raises:
        ValueError: it says something else.
    """
    asked: dict[str, tuple[Asked, ...]] = {}
    for key in ("include", "exclude"):
        items = told.get(key) or []
        if not isinstance(items, list):
            raise ValueError(f'"{key}" must be a list of objects, as {{"class": "bowl", "count": 1}}')
        asked[key] = tuple(_asked(item, key) for item in items)
    for each in asked["include"]:
        if each.relation is not None and not 0 <= each.of < len(asked["include"]):
            raise ValueError(
                f'the position of "{each.thing}" is from the thing {each.of}, which is not there'
            )
    return AskedOf(asked["include"], asked["exclude"])


def reasons_against(
    asked: AskedOf, found: Mapping[str, Sequence[Detection]], colour_of: Callable[[Box, str], str]
) -> list[str]:
    """Why a picture isn't as asked; empty: it is.

    Of a thing the surest boxes count, as many as are asked for, after boxes that lie on surer ones have gone.
    A thing is left of another where their middles, less a tenth of their widths and heights together, are
    further apart to the left than half of their distance, and so on.

    Args:
        asked: by the prompt.
        found: of each thing those boxes that a detector is sure enough of, in any order.
        colour_of: the colour of what is in a box.
    """
    there = {thing: _apart(found.get(thing, ())) for thing in asked.things}
    reasons, groups = [], []
    for each in asked.include:
        boxes = there[each.thing][: each.count]
        groups.append(boxes)
        if len(boxes) < each.count:
            reasons.append(f"{each.thing}: {len(boxes)} of {each.count} found")
        elif each.colour is not None:
            colours = [colour_of(box, each.thing) for box in boxes]
            if colours.count(each.colour) < each.count:
                reasons.append(f"{each.thing}: {', '.join(colours)} and not {each.colour}")
    for each, boxes in zip(asked.include, groups, strict=True):
        if each.relation is None or len(boxes) < each.count:
            continue
        others, name = groups[each.of], asked.include[each.of].thing
        if not others or any(each.relation not in relations(box, other) for box in boxes for other in others):
            reasons.append(f"{each.thing}: not {each.relation} the {name}")
    for each in asked.exclude:
        if len(there[each.thing]) >= each.count:
            reasons.append(
                f"{each.thing}: {len(there[each.thing])} found, and fewer than {each.count} allowed"
            )
    return reasons


def relations(box: Box, other: Box) -> set[str]:
    """Where a box lies as seen from another: none, one or two of `RELATIONS`."""
    away = []
    for axis in (0, 1):
        middle = (box[axis] + box[axis + 2] - other[axis] - other[axis + 2]) / 2
        sizes = box[axis + 2] - box[axis] + other[axis + 2] - other[axis]
        away.append((middle, max(abs(middle) - _MARGIN * sizes, 0)))
    distance = (away[0][0] ** 2 + away[1][0] ** 2) ** 0.5
    found = set()
    for (middle, apart), (before, behind) in zip(away, (RELATIONS[:2], RELATIONS[2:]), strict=True):
        if distance and apart / distance > _PART:
            found.add(before if middle < 0 else behind)
    return found


def _asked(item: Any, key: str) -> Asked:
    if not isinstance(item, dict) or not isinstance(item.get("class"), str) or not item["class"].strip():
        raise ValueError(f'what is in "{key}" must be an object with a "class", as {{"class": "bowl"}}')
    thing, count, colour = item["class"].strip(), item.get("count", 1), item.get("color")
    if not is_whole(count, 1, 1000):
        raise ValueError(f'the count of "{thing}" must be a whole number, 1 to 1000')
    if not isinstance(colour, str | None):
        raise ValueError(f'the color of "{thing}" must be a text')
    position = item.get("position")
    if position is None:
        return Asked(thing, count, colour)
    fine = isinstance(position, list) and len(position) == 2 and type(position[1]) is int
    if not fine or position[0] not in RELATIONS:
        raise ValueError(
            f'the position of "{thing}" must be a pair, as ["left of", 0]: {", ".join(RELATIONS)}'
        )
    return Asked(thing, count, colour, position[0], position[1])


def _apart(detections: Sequence[Detection]) -> list[Box]:
    """The boxes, surest first, without those that lie on a surer one."""
    kept: list[Box] = []
    for _, box in sorted(detections, reverse=True):
        if all(_shared(box, other) <= _SAME for other in kept):
            kept.append(box)
    return kept


def _shared(box: Box, other: Box) -> float:
    """The intersection of two boxes over their union."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    both = max(width, 0) * max(height, 0)
    sizes = [(each[2] - each[0]) * (each[3] - each[1]) for each in (box, other)]
    return both / max(sum(sizes) - both, 1)
