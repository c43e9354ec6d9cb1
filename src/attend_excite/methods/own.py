"""A method that a program's user wrote: found by where it lies, as "my_methods:Faded"."""

from __future__ import annotations

import sys
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

from attend_excite.methods import METHODS, Method, method_named
from attend_excite.methods.own_code import digest

# What `base.Method` asks for.
_NEEDED = ("attach", "name", "title", "uses_subjects", "attends_to_prompt")


def find_method(name: str) -> Method:
    """A method by its name, or by where it lies.

    Args:
        name: one of `METHODS`; or "module:NAME", NAME being a method or what makes one without arguments, in
            a module that is installed or in the current folder. Its code is run: never take this from
            strangers.

    Raises:
        ValueError: there is no such method.
    """
    module, colon, attribute = name.partition(":")
    if not colon:
        if name not in METHODS:
            raise ValueError(
                f"unknown method '{name}': choose one of {', '.join(METHODS)}, "
                "or one of your own as MODULE:NAME"
            )
        return method_named(name)
    found: Any = getattr(_imported(module), attribute, None)
    if found is None:
        missing = attribute or "name behind the colon"
        raise ValueError(f"no method '{name}': the module {module} has no {missing}")
    if callable(found) and not hasattr(found, "attach") and _is_objective(found):
        raise ValueError(
            f"'{name}' is an objective and no method: write `mine = AttendAndExcite(objective={attribute})` "
            f"into {module}, and name {module}:mine"
        )
    made = isinstance(found, type) or (callable(found) and not hasattr(found, "attach"))
    try:
        method: Any = found() if made else found
    except TypeError as error:
        raise ValueError(f"the method '{name}' cannot be made without arguments: {error}") from error
    if missing := [part for part in _NEEDED if not hasattr(method, part)]:
        raise ValueError(f"'{name}' is no method: it has no {', '.join(missing)}")
    return method


def code_digest(name: str) -> str | None:
    """16 hex digits of the code of a method and of what that uses, so that an edited one is told from what
    it was. What else stands in its module may change.

    Args:
        name: as for `find_method`.

    Returns:
        None: it is one of `METHODS`, or lies in a module that is no file.
    """
    module, colon, attribute = name.partition(":")
    return digest(_imported(module), attribute) if colon else None


def _is_objective(found: Any) -> bool:
    """Whether it takes maps and subjects and nothing else, as a function of one's own for the loss does."""
    try:
        parameters = signature(found).parameters.values()
    except (TypeError, ValueError):
        return False
    needed = [
        each.name
        for each in parameters
        if each.default is each.empty and each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
    ]
    return not isinstance(found, type) and len(needed) == 2


def _imported(module: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        # Last, so that no file here stands in for a library, and for good: a method may import as it runs.
        sys.path.append(here)
    try:
        return import_module(module)
    except Exception as error:
        absent = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
        if absent or not module:
            raise ValueError(f"no module '{module}' here or installed, to find a method in") from error
        raise ValueError(f"the module '{module}' cannot be imported: {error}") from error
