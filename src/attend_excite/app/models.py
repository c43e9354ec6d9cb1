"""The models that visitors may use, each loaded once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from functools import lru_cache, partial
from threading import Lock
from typing import Any
from weakref import WeakValueDictionary

from attend_excite.models import Model, load, load_tokenizer
from attend_excite.models.reading import unread_tokens

_KEPT = 2
"""Models in memory at a time."""


class Models:
    """Models by name. A visitor chooses among the names; the server loads nothing else.

    Attributes:
        names: the models, the first being the default.
        in_use: held by whoever runs one: nothing of a model belongs to a visitor, but what a method puts
            into it for a run does.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(dict.fromkeys(names))
        self.in_use = Lock()
        # One each, so that nobody waits for another model than their own ...
        self._looking = {name: Lock() for name in self.names}
        # ... unless both are to be loaded, which takes memory.
        self._loading = Lock()
        self._load = lru_cache(maxsize=_KEPT)(self._load_alone)
        # Without keeping in memory what the other has let go.
        self._latest = WeakValueDictionary[str, Model]()
        self._load_tokenizer = lru_cache(load_tokenizer)

    def get(self, name: str) -> Model:
        """The model of that name, "" being the default, loaded at its first use.

        Raises:
            ValueError: it isn't one of `names`, or cannot be loaded.
        """
        name = self._allowed(name)
        with self._looking[name]:
            model = self._latest[name] = self._load(name)
            return model

    def unread(self, name: str) -> Callable[[Sequence[int]], Set[int]]:
        """Says of token ids which that model has never read; of none, where it isn't loaded yet.

        Raises:
            ValueError: it isn't one of `names`.
        """
        model = self._latest.get(self._allowed(name))
        return (lambda _: set()) if model is None else partial(unread_tokens, model)

    def tokenizer(self, name: str) -> Any:
        """The tokenizer of the model of that name alone, which is there at once.

        Raises:
            ValueError: as for `get`.
        """
        return self._load_tokenizer(self._allowed(name))

    def _load_alone(self, name: str) -> Model:
        with self._loading:
            return load(name)

    def _allowed(self, name: str) -> str:
        if name and name not in self.names:
            raise ValueError(f"the model '{name}' is not served here: choose one of {', '.join(self.names)}")
        return name or self.names[0]
