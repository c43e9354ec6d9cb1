"""What the parts of the page send to its functions. The guard lets nothing else through."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gradio import FileData
from gradio.utils import get_upload_folder
from pydantic import ValidationError

Thing = TypeVar("Thing")

_LARGEST = 1e300
"""Integers can be larger, and then they make no float."""


@dataclass(frozen=True)
class Function:
    """One of the page's functions.

    Attributes:
        kinds: of each of its values the part that it comes from, as Gradio calls it.
        clicked: whether it is told which of several things was clicked.

    Raises:
        ValueError: it isn't known what such a part sends.
    """

    kinds: tuple[str, ...]
    clicked: bool = False

    def __post_init__(self) -> None:
        if unknown := set(self.kinds) - _SENT.keys():
            raise ValueError(f"it isn't known what a {unknown.pop()} sends")

    def problem(self, values: Sequence[Any], click: Any = None) -> str:
        """What is wrong with what it is sent; "" where nothing is.

        Args:
            values: as many as its kinds.
            click: what was clicked.
        """
        for number, (kind, value) in enumerate(zip(self.kinds, values, strict=True), 1):
            if not _SENT[kind](value):
                return f"value {number} is {repr(value)[:40]}, which no {kind} sends: load the page again"
        if self.clicked and not (
            isinstance(click, dict) and _is_index(click.get("index")) and len(click) == 1
        ):
            return f"the click is {repr(click)[:40]}, which is of no part: load the page again"
        return ""


def picked(things: Sequence[Thing], index: int, what: str) -> Thing:
    """What was clicked of what the server has by now.

    Raises:
        ValueError: it has no such thing.
    """
    if not 0 <= index < len(things):
        raise ValueError(f"there is no {what} {str(index + 1)[:20]}: load the page again")
    return things[index]


def is_uploaded(path: str) -> bool:
    """Whether it is a file that a visitor has sent; any other of this machine is none of their business."""
    try:
        file = Path(path).resolve()
        return file.is_relative_to(Path(get_upload_folder()).resolve()) and file.is_file()
    except (OSError, ValueError):  # no name that a file could have
        return False


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    # Written so that NaN is out.
    return isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST < value < _LARGEST


def _is_index(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _is_file(value: Any) -> bool:
    if value is None:
        return True
    meta = value.get("meta") if isinstance(value, dict) else None
    if not isinstance(meta, dict) or meta.get("_type") != "gradio.FileData":
        return False
    try:
        file = FileData.model_validate(value)
    except ValidationError:
        return False
    # A picture can stand in its own address, too, where no visitor's browser puts it.
    return is_uploaded(file.path) and not (file.url or "").startswith("data:")


def _is_chips(value: Any) -> bool:
    """Whether it has the form of `words.words_document`. Gradio would look for files in anything deeper."""
    if not isinstance(value, dict) or not isinstance(value.get("words"), list):
        return False
    words = value["words"]
    return all(_is_text(each) for name, each in value.items() if name != "words") and all(
        isinstance(word, dict) and all(map(_is_plain, word.values())) for word in words
    )


def _is_plain(value: Any) -> bool:
    return (
        isinstance(value, str | bool)
        or _is_number(value)
        or (isinstance(value, list) and all(map(_is_text, value)))
    )


def _is_anything(_: Any) -> bool:
    return True


_SENT: Mapping[str, Callable[[Any], bool]] = {
    "textbox": _is_text,
    "dropdown": _is_text,
    "slider": _is_number,
    "number": lambda value: value is None or _is_number(value),
    "checkbox": lambda value: isinstance(value, bool),
    "image": _is_file,
    "file": _is_file,
    "dataset": _is_index,
    "html": _is_chips,
    # What stays with the server is not read from a request, and what programs send their functions check.
    "state": _is_anything,
    "api": _is_anything,
}
