"""A prompt as the host reads it: weights taken out, cut into tokens and chunks by its own tokenizer."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attend_excite.subjects import Prompt, Stream, Subjects, parse

from .architectures import TokenTable

_EMBEDDING = re.compile(r"(?:(?<=\s)|^)embedding:\S+")


@dataclass(frozen=True, eq=False)
class Asked:
    """A prompt and its subjects, as they travel with a CONDITIONING.

    Attributes:
        text: as it was written, with weights such as (cat:1.3); without the brackets of [subjects].
        marked: the same with them.
        subjects: as they were written, by lines or commas; "": those in brackets, or the nouns.
        clip: the host's CLIP, whose tokenizer reads it.
    """

    text: str
    marked: str
    subjects: str
    clip: Any

    @classmethod
    def of(cls, text: str, subjects: str, clip: Any) -> Asked:
        """What was written into a node."""
        # As `parse` will have it.
        marked = unicodedata.normalize("NFC", text)
        plain = re.sub(r"(?<!\\)[\[\]]", "", marked).replace(r"\[", "[").replace(r"\]", "]")
        return cls(plain, marked, subjects, clip)


@dataclass(frozen=True)
class Reading:
    """What the model will see of a prompt.

    Attributes:
        prompt: with its subjects. Positions leave out what the host puts between the chunks of a long prompt.
        streams: the tables of tokens, in those positions.
        columns: the host's column of each position, table by table.
        width: how many columns the host's context has at least.
    """

    prompt: Prompt
    streams: tuple[Stream, ...]
    columns: tuple[int, ...]
    width: int


def read(asked: Asked, tables: Sequence[TokenTable]) -> Reading:
    """Find a prompt's subjects in each table of tokens.

    Args:
        asked: the prompt.
        tables: those that the model attends to.

    Raises:
        ValueError: in the words of `attend_excite.subjects.parse`, or the CLIP isn't this model's.
    """
    tokens = asked.clip.tokenize(asked.text, return_word_ids=True)
    laid_out = []
    for table in tables:
        if table.key not in tokens:
            raise ValueError(f"the CLIP has no {table.name} tokens for this model: connect the MODEL's own")
        if any(getattr(asked.clip.cond_stage_model, name, None) is not None for name in table.encoders):
            tokenizer = getattr(asked.clip.tokenizer, table.encoders[0])
            laid_out.append((table, _LaidOut(asked.text, tokenizer.tokenizer, tokens[table.key])))
    if not laid_out:
        raise ValueError(
            "the CLIP has no text encoder that this model attends to: connect the MODEL's own CLIP"
        )
    streams, columns, start, width = [], [], 0, 0
    for table, layout in laid_out:
        streams.append(
            Stream(
                table.name, layout, start, len(layout.columns), prompt_tokens_only=table.prompt_tokens_only
            )
        )
        columns += [width + column for column in layout.columns]
        start += len(layout.columns)
        width += layout.width
    # In brackets is said what the subjects are where they aren't named; weights are the host's business.
    wanted = subjects_of(asked.subjects)
    text = "".join(_texts(asked.text if wanted else asked.marked))
    if wanted:
        text = text.replace("[", r"\[").replace("]", r"\]")
    return Reading(parse(text, streams, wanted), tuple(streams), tuple(columns), width)


def subjects_of(text: str) -> Subjects | None:
    """The subjects in "cat, frog=0.7", by lines or commas; None if there are none."""
    named = [each.strip() for each in re.split(r"[,\n]", text)]
    return [each for each in named if each] or None


def pieces(prompt: Prompt) -> list[tuple[str, int | None]]:
    """A prompt's text in pieces, each with the index of the subject that it belongs to, for showing."""
    owner: dict[int, int] = {}
    for index, group in enumerate(prompt.groups):
        for word in (group, *group.attributes):
            for position in word.positions:
                owner.update(dict.fromkeys(range(*prompt.spans[position]), index))
    found: list[tuple[str, int | None]] = []
    for at, letter in enumerate(prompt.text):
        # A space between two words of one subject belongs to it.
        of = owner.get(at)
        if letter.isspace() and at and owner.get(at - 1) is not None and owner.get(at + 1) == owner[at - 1]:
            of = owner[at] = owner[at - 1]
        if found and found[-1][1] == of:
            found[-1] = (found[-1][0] + letter, of)
        else:
            found.append((letter, of))
    return found


def _texts(text: str) -> Iterator[str]:
    """The text without its weights, in the segments that the host cuts it into."""
    # Imported here, as everywhere: the host's modules exist once it runs.
    from comfy.sd1_clip import escape_important, token_weights, unescape_important

    for segment, _ in token_weights(escape_important(text), 1.0):
        yield unescape_important(segment)


class _LaidOut:
    """The tokens of a prompt as the host lays them out, where `parse` asks a tokenizer for them.

    The host cuts each weighted segment by itself, puts vectors for the names of embeddings, and fills chunks
    of the encoder's length, each with its own begin, end and padding. What stands between two chunks is left
    out here, since only the prompt's own words are compared; `columns` says where each token is in the
    context.
    """

    added_tokens_encoder: Mapping[str, int] = {}

    def __init__(self, text: str, tokenizer: Any, chunks: Sequence[Sequence[tuple[Any, float, int]]]) -> None:
        self._tokenizer = tokenizer
        laid = [(token, word != 0) for chunk in chunks for token, _, word in chunk]
        own = [column for column, (_, is_own) in enumerate(laid) if is_own]
        begin = own[0] if own else 1
        last = own[-1] if own else 0
        self.width = len(laid)
        self.columns = [
            column for column in range(self.width) if laid[column][1] or not begin <= column <= last
        ]
        # The first chunk's end token stands for the padding too, which is never a word.
        self._rows: list[tuple[Any, tuple[int, int], bool]] = []
        words = iter(self._words(text))
        for column in self.columns[: len(own) + begin + 1]:
            token, is_own = laid[column]
            vector = not isinstance(token, int)
            if not is_own or vector:
                self._rows.append(("" if vector else token, (0, 0), True))
                continue
            found, span = next(words, (None, (0, 0)))
            if found != token:
                raise ValueError(
                    f"the host's tokens of {text!r} can't be matched with its words: simplify it"
                )
            self._rows.append((token, span, False))

    def _words(self, text: str) -> Iterator[tuple[int, tuple[int, int]]]:
        """The prompt's own tokens in their order, each with the characters that it was made of."""
        start = 0
        for segment in _texts(text):
            done = 0
            for match in [*_EMBEDDING.finditer(segment), None]:
                piece = segment[done : len(segment) if match is None else match.start()]
                cut = self._tokenizer(
                    piece, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False
                )
                rows = zip(cut["input_ids"], cut["offset_mapping"], cut["special_tokens_mask"], strict=True)
                for token, (a, b), special in rows:
                    if not special:
                        yield token, (start + done + a, start + done + b)
                done = len(segment) if match is None else match.end()
            start += len(segment)

    def tokenize(self, text: str) -> list[str]:
        """Of words learnt by textual inversion, which the host writes out itself: none."""
        return []

    def convert_ids_to_tokens(self, ids: Sequence[Any]) -> list[str]:
        """For people."""
        return [
            each if isinstance(each, str) else self._tokenizer.convert_ids_to_tokens(each) for each in ids
        ]

    def __call__(self, text: str, **_: Any) -> Mapping[str, list[Any]]:
        """The tokens of the prompt, whose text without weights and brackets this is."""
        ids, spans, special = zip(*self._rows, strict=True)
        return {
            "input_ids": list(ids),
            "offset_mapping": list(spans),
            "special_tokens_mask": [int(each) for each in special],
        }
