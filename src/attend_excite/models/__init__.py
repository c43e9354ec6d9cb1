"""Models by name, folder, Hub id or from a diffusers pipeline."""

from attend_excite.models.catalogue import CatalogueEntry, catalogue, load, load_tokenizer, source_of
from attend_excite.models.model import Model

__all__ = ["CatalogueEntry", "Model", "catalogue", "load", "load_tokenizer", "source_of"]
