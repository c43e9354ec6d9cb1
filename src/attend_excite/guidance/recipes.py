"""The recipes that come with the package, as they stand in its file.

Needs no torch, so that the command line's help is quick.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any


def method_recipes() -> Mapping[str, str]:
    """The recipes that are methods of their own, by name, with their names for people."""
    return {name: values["title"] for name, values in packaged_recipes().items() if "method" in values}


def recipe_names() -> tuple[str, ...]:
    """The recipes of Attend-and-Excite that come with the package."""
    return tuple(name for name in packaged_recipes() if name not in method_recipes())


@cache
def packaged_recipes() -> Mapping[str, Mapping[str, Any]]:
    """All of them by name, methods of their own included: what sets each apart from the official one."""
    return json.loads(files("attend_excite").joinpath("data/recipes.json").read_text(encoding="utf-8"))
