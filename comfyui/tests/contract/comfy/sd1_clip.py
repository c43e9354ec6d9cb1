"""Weights in a prompt."""

from __future__ import annotations

import re


def escape_important(text: str) -> str:
    return text.replace(r"\)", "\0\1").replace(r"\(", "\0\2")


def unescape_important(text: str) -> str:
    return text.replace("\0\1", ")").replace("\0\2", "(")


def token_weights(string: str, current_weight: float) -> list[tuple[str, float]]:
    found = []
    for match in re.finditer(r"\(([^()]*?)(?::([\d.]+))?\)|[^()]+", string):
        if match[1] is None:
            found.append((match[0], current_weight))
        else:
            found.append((match[1], float(match[2]) if match[2] else 1.1 * current_weight))
    return found
