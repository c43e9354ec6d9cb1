"""The systems that the paper compares, each a method behind one interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attend_excite.methods.attend_excite import AttendAndExcite
from attend_excite.methods.base import Denoise, Method, Run, Step
from attend_excite.methods.composable import ComposableDiffusion
from attend_excite.methods.reweighting import AttentionReweighting
from attend_excite.methods.stable_diffusion import StableDiffusion
from attend_excite.methods.structure import StructureDiffusion

METHODS: Mapping[str, Callable[..., Method]] = {
    method.name: method
    for method in (
        AttendAndExcite,
        StableDiffusion,
        ComposableDiffusion,
        StructureDiffusion,
        AttentionReweighting,
    )
}
"""The methods by the name that they have on the command line."""


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
