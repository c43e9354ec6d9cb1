"""What callers gave, checked at the door. Nothing here needs torch: recipes are read before it is there."""

from __future__ import annotations


def require(fine: bool, what: str, value: object, wanted: str) -> None:
    """Refuse a value that isn't fine.

    Args:
        fine: whether it is.
        what: its name for people.
        value: the value.
        wanted: what it must be.

    Raises:
        ValueError: it isn't.
    """
    if not fine:
        raise ValueError(f"{what} is {value!r}: it must be {wanted}")


def is_number(value: object) -> bool:
    """Whether it is a number; true and false, which Python counts among them, are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole(value: object, least: int, most: int) -> bool:
    """Whether it is a whole number from `least` to `most`."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
