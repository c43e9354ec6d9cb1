"""The systems that the paper compares and what came after it, each a method behind one interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from attend_excite.guidance.recipes import method_recipes
from attend_excite.methods.attend_excite import AttendAndExcite
from attend_excite.methods.base import Denoise, Method, Run, Step
from attend_excite.methods.composable import ComposableDiffusion
from attend_excite.methods.reweighting import AttentionReweighting
from attend_excite.methods.stable_diffusion import StableDiffusion
from attend_excite.methods.structure import StructureDiffusion

PAPER_METHODS: Mapping[str, Callable[..., Method]] = {
    "attend-excite": AttendAndExcite,
    "stable-diffusion": StableDiffusion,
    "composable": ComposableDiffusion,
    "structure": StructureDiffusion,
    "reweight": AttentionReweighting,
}
"""The systems that the paper compares, by the name that they have on the command line."""

METHODS: Mapping[str, Callable[..., Method]] = {
    **PAPER_METHODS,
    **{name: partial(AttendAndExcite, name) for name in method_recipes()},
}
"""All methods: those, and what came after, which are recipes of Attend-and-Excite's class."""


def method_named(name: str, **options: Any) -> Method:
    """A method by its name, with its own options.

    Raises:
        ValueError: there is no method of that name.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method '{name}': choose one of {', '.join(METHODS)}")
    return METHODS[name](**options)


__all__ = [
    "METHODS",
    "PAPER_METHODS",
    "AttendAndExcite",
    "AttentionReweighting",
    "ComposableDiffusion",
    "Denoise",
    "Method",
    "Run",
    "StableDiffusion",
    "Step",
    "StructureDiffusion",
    "method_named",
]
