"""Models by name, folder, Hub id or from a diffusers pipeline."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from attend_excite.models.catalogue import CatalogueEntry, catalogue, load_streams, load_tokenizer, source_of

if TYPE_CHECKING:
    from attend_excite.models.loading import load
    from attend_excite.models.model import Model

__all__ = ["CatalogueEntry", "Model", "catalogue", "load", "load_streams", "load_tokenizer", "source_of"]

_HOMES = {"Model": "attend_excite.models.model", "load": "attend_excite.models.loading"}


def __getattr__(name: str) -> Any:
    """Import torch and diffusers at the first use: to look at the words of a prompt needs neither."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
