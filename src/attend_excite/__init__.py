"""Attend-and-Excite: make text-to-image diffusion models draw everything that a prompt asks for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attend_excite.attention.maps import AttentionMaps, overlay
    from attend_excite.attention.record import record
    from attend_excite.generate import Generation, StepEvent
    from attend_excite.guidance.schedule import Recipe
    from attend_excite.methods.attend_excite import AttendAndExcite
    from attend_excite.methods.composable import ComposableDiffusion
    from attend_excite.methods.reweighting import AttentionReweighting
    from attend_excite.methods.stable_diffusion import StableDiffusion
    from attend_excite.methods.structure import StructureDiffusion
    from attend_excite.models import Model, catalogue, load
    from attend_excite.models.families.unet import cross_attention_places
    from attend_excite.subjects import Subject

__all__ = [
    "AttendAndExcite",
    "AttentionMaps",
    "AttentionReweighting",
    "ComposableDiffusion",
    "Generation",
    "Model",
    "Recipe",
    "StableDiffusion",
    "StepEvent",
    "StructureDiffusion",
    "Subject",
    "catalogue",
    "cross_attention_places",
    "load",
    "overlay",
    "record",
]

_HOMES = {
    "AttendAndExcite": "attend_excite.methods.attend_excite",
    "AttentionMaps": "attend_excite.attention.maps",
    "AttentionReweighting": "attend_excite.methods.reweighting",
    "ComposableDiffusion": "attend_excite.methods.composable",
    "Generation": "attend_excite.generate",
    "Model": "attend_excite.models",
    "Recipe": "attend_excite.guidance.schedule",
    "StableDiffusion": "attend_excite.methods.stable_diffusion",
    "StepEvent": "attend_excite.generate",
    "StructureDiffusion": "attend_excite.methods.structure",
    "Subject": "attend_excite.subjects",
    "catalogue": "attend_excite.models",
    "cross_attention_places": "attend_excite.models.families.unet",
    "load": "attend_excite.models",
    "overlay": "attend_excite.attention.maps",
    "record": "attend_excite.attention.record",
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use: torch and diffusers take seconds, `--help` must not."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
