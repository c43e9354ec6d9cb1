"""Text and JSON files that people and other programs wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_text(path: Path) -> str:
    """What a text file says; the mark that some editors put first is left out.

    Raises:
        ValueError: it cannot be read, or is no text in UTF-8. As of all errors here, half a sentence, to go
            on after the file's name.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"is no text in UTF-8, from byte {error.start} on") from error
    except ValueError as error:
        raise ValueError("cannot be read: there is no such file") from error


def read_json(path: Path) -> Any:
    """What a JSON file says.

    Raises:
        ValueError: it cannot be read, or is no JSON, or none of a sane depth and with sane numbers.
    """
    return parsed_json(read_text(path))


def parsed_json(text: str) -> Any:
    """What a text in JSON says.

    Raises:
        ValueError: it is no JSON, or none of a sane depth and with sane numbers.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError("cannot be used: it is nested too deep") from error
    except ValueError as error:
        raise ValueError("cannot be used: a number in it is too long") from error


def read_object(path: Path) -> dict[str, Any]:
    """What a JSON file says that holds an object: values by name.

    Raises:
        ValueError: as `read_json`, or it holds something else.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"cannot be used: it holds {_kind(content)} and not an object, values by name")
    return content


def _kind(content: Any) -> str:
    kinds = {list: "a list", str: "a text", bool: "true or false", type(None): "nothing"}
    return kinds.get(type(content), "a number")
