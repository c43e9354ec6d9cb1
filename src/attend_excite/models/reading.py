"""What a model doesn't read of the texts it is given, said aloud."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable

from attend_excite.models.model import Model
from attend_excite.subjects import cuts_of
from attend_excite.turns import turn_of


def warn_of_cut(model: Model, texts: Iterable[str], what: str = "the prompt") -> None:
    """Warn of the words of each text that lie beyond the model's context, or beyond one of several."""
    streams = model.family.streams()
    for text in dict.fromkeys(texts):
        for name, limit, cut in cuts_of(text, streams):
            of = f" ({name})" if len(streams) > 1 else ""
            warnings.warn(
                f"{what} is longer than the model's context of {limit} tokens{of}: {cut!r} is cut",
                stacklevel=2,
            )


def unread_tokens(model: Model, ids: Iterable[int]) -> set[int]:
    """Of the tokens with these ids those that the model has never read: see `Family.unread_tokens`."""
    return model.family.unread_tokens(list(ids))


def warn_of_unknown_words(model: Model, texts: Iterable[str]) -> None:
    """Warn of words that a model trained on few, as the bundled ones, never saw: it has noughts for them."""
    for text in dict.fromkeys(texts):
        with turn_of(model.tokenizer):
            encoded = model.tokenizer(text, return_offsets_mapping=True, verbose=False)
        tokens = list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
        strangers = unread_tokens(model, encoded["input_ids"])
        unread = {start for token, (start, end) in tokens if start < end and token in strangers}
        for word in re.finditer(r"[\w'-]+", text):
            if unread.intersection(range(*word.span())):
                warnings.warn(
                    f"{model.name} has never read the word '{word[0]}', so it cannot draw it", stacklevel=2
                )
