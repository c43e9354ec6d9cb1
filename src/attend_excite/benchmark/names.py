"""Systems by the names that people read: the same in the benchmark's reports and in the study's."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from attend_excite.methods import METHODS, method_named
from attend_excite.models.catalogue import catalogue, plain_title

FULL_METHOD, PLAIN, REWEIGHT = "attend-excite", "stable-diffusion", "reweight"


def is_bundled(model: str) -> bool:
    """Whether a model comes with the package."""
    entry = catalogue().get(model)
    return entry is not None and entry.bundled


def is_ablation(system: str) -> bool:
    """Whether it is Attend-and-Excite with another recipe: "attend-excite no-smoothing" is."""
    return system.startswith(f"{FULL_METHOD} ")


def is_own(system: str) -> bool:
    """Whether a user wrote it: "my_methods:Faded"."""
    return ":" in system.partition(" ")[0]


def recipe_of(system: str) -> str:
    """What stands behind a method's name, for people: "no smoothing", "step size 10", "best of 4"."""
    words = system.partition(" ")[2].removesuffix(".json").split()
    # Of a number the minus is one.
    return " ".join(re.sub("[=_]", " ", word) if "=" in word else word.replace("-", " ") for word in words)


def titles(systems: Iterable[str], model: str, given: Mapping[str, str] | None = None) -> dict[str, str]:
    """A name for people for each system, no two of them alike.

    Args:
        systems: by their names in a run.
        model: that drew. Only Stable Diffusion's own images are called that.
        given: the titles of methods that a user wrote, as the run keeps them.
    """
    given = given or {}
    found = {system: _title(system, model, given) for system in systems}
    # Where a user's method has the title of another, it also gets the name that it has in its module.
    counts = Counter([*found.values(), *(method_named(name).title for name in METHODS if name not in found)])
    return {
        system: f"{title} ({system.partition(':')[2]})" if is_own(system) and counts[title] > 1 else title
        for system, title in found.items()
    }


def _title(system: str, model: str, given: Mapping[str, str]) -> str:
    method, _, recipe = system.partition(" ")
    if method not in METHODS and system not in given:
        return system
    if method == PLAIN:
        title = plain_title(model)
    else:
        title = method_named(method).title if method in METHODS else given[system]
    return f"{title}, {recipe_of(system)}" if recipe else title
