"""Words of a prompt -> groups of token positions (paper, appendix A.2)."""

from __future__ import annotations

import difflib
import operator
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, takewhile
from typing import TYPE_CHECKING, Any, Literal

from attend_excite.a1111 import Chunk, WeightedText, in_chunks, read_weights
from attend_excite.nouns import (
    WORD,
    Instruction,
    Span,
    find_instructions,
    find_nouns,
    head_of,
    heads_of,
    modifiers_of,
    names_a_thing,
    other_language,
)
from attend_excite.turns import turn_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Subjects = Sequence["str | int | Sequence[int] | Subject"] | Mapping[str, float | None]
"""The subjects of one prompt, as `parse` takes them."""

Syntax = Literal["plain", "a1111"]
"""How a prompt is written: see `parse`."""

SYNTAXES: tuple[Syntax, ...] = ("plain", "a1111")

_HELP = "name the subjects with subjects=[...] (--subject on the command line) or in [brackets]"


@dataclass(frozen=True)
class Subject:
    """A word or phrase of the prompt that the image must show, or must not.

    `text` is "cat", "yellow bowl", or "cat#2" for the second "cat". `target` is the attention
    demanded, 0 to 1 (default 1; appendix A.2); for a negated subject the attention that is still
    allowed (default 0). `attributes` are words of the prompt that are to show on it, ["yellow"]; None:
    those that the prompt says of it (`modifiers_of`), (): none. ValueError if the text or an attribute is
    empty or the target out of range.
    """

    text: str
    target: float | None = None
    negated: bool = False
    attributes: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.attributes is not None:
            if isinstance(self.attributes, str):
                raise ValueError(
                    f"the attributes of {self.text!r} must be a list, like [{self.attributes!r}]"
                )
            if not all(isinstance(word, str) and word.strip() for word in self.attributes):
                raise ValueError(f"an attribute of {self.text!r} is empty: give a word of the prompt")
            object.__setattr__(self, "attributes", tuple(self.attributes))
        if not self.text.strip():
            raise ValueError("a subject is empty: give a word or phrase of the prompt")
        if self.target is not None and not 0 <= self.target <= 1:
            raise ValueError(
                f"the target {self.target:g} of {self.text!r} is out of range: it goes from 0 to 1"
            )

    @classmethod
    def from_text(cls, text: str) -> Subject:
        """Read "frog", "car#2", "frog=0.7" (target), "-hat" (negated) or "-hat=0.1"."""
        word, equals, number = text.strip().rpartition("=")
        target = None
        if equals:
            try:
                target = float(number)
            except ValueError:
                raise ValueError(
                    f"the target in {text!r} is not a number: write it like 'frog=0.7'"
                ) from None
        else:
            word = number
        return cls(word.removeprefix("-").strip(), target, negated=word.startswith("-"))


@dataclass(frozen=True)
class Stream:
    """A table of text tokens that attention is paid to: what one tokenizer makes of a prompt.

    `name` is for people, as "CLIP" or "T5"; `start` is the first of its columns among all text tokens that
    the model sees, and `width` how many it has there, padding included: of what lies beyond it the model sees
    nothing. `template` is what the prompt is put into at "{}" before it is cut into tokens, and the first
    `skipped` tokens of that are none of the model's. `prompt_tokens_only` says whether attention is compared
    among the prompt's own words, without <eot> and padding, where a recipe doesn't say. `uncapitalised` says
    that the model reads the text in small letters, and without the white space around it.
    """

    name: str
    tokenizer: Any
    start: int
    width: int
    skipped: int = 0
    template: str = "{}"
    prompt_tokens_only: bool = True
    uncapitalised: bool = False


@dataclass(frozen=True)
class Attribute:
    """A word that is said of a subject, "yellow", and where its tokens lie, as with `TokenGroup`."""

    text: str
    positions: tuple[int, ...]
    further: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class TokenGroup:
    """Where a subject lies in the model's context.

    `text` names it ("grizzly bear"; "car#2" if it isn't the prompt's first "car"). `positions`
    are those of the head word's tokens ("bear"), 0 being <sot>; several when the tokenizer splits
    the word. `target` is 0 to 1: the attention demanded or, if `negated`, allowed. `further` has the
    positions in each further table of tokens of a model that has several; where a table's context cuts the
    word, its positions are empty. `attributes` are the words said of it ("grizzly"), none of them another
    subject.
    """

    text: str
    positions: tuple[int, ...]
    target: float = 1.0
    negated: bool = False
    further: tuple[tuple[int, ...], ...] = ()
    attributes: tuple[Attribute, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """A parsed prompt: its text without brackets, its subjects, its tokens as they appear in the
    text, from <sot> to <eot>, and the span of characters that each was made of, (0, 0) for those two.
    What the model's context cuts is not among the tokens. A character split into several tokens is
    that of each of them. `further` has the tokens and spans in each further table of tokens, and `cut` the
    words that no table has room for. `chunks` are those in which the text encoder reads a prompt in A1111's
    syntax, each a table of its own, one behind the other; none: it reads the text at once."""

    text: str
    groups: tuple[TokenGroup, ...]
    tokens: tuple[str, ...]
    spans: tuple[Span, ...]
    further: tuple[tuple[tuple[str, ...], tuple[Span, ...]], ...] = ()
    cut: str = ""
    chunks: tuple[Chunk, ...] = ()

    def words(self, stream: int = 0) -> tuple[int, int]:
        """The first and the last position of the text's own tokens in a table, special ones left out."""
        spans = self.spans if stream == 0 else self.further[stream - 1][1]
        own = [position for position, span in enumerate(spans) if span != (0, 0)]
        return (own[0], own[-1]) if own else (1, 0)

    def others(self, stream: int = 0) -> tuple[int, ...]:
        """The positions in a table of the words that belong to no subject, "a" and "and" among them."""
        tokens, spans = (self.tokens, self.spans) if stream == 0 else self.further[stream - 1]
        belonging = {
            position
            for group in self.groups
            for word in (group, *group.attributes)
            for position in (word.further[stream - 1] if stream else word.positions)
        }
        return tuple(
            position
            for position, span in enumerate(spans)
            if span != (0, 0) and position not in belonging and any(c.isalnum() for c in tokens[position])
        )


def parse(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase | Sequence[Stream],
    subjects: Subjects | None = None,
    syntax: Syntax = "plain",
) -> Prompt:
    """Find the subjects of a prompt and the tokens they lie on (paper, appendix A.2).

    `tokenizer` is a CLIP model's only one, or all tables of tokens that a model attends to: a subject is
    found in each by its characters, and its positions, and token positions given, are those of the first.

    In the syntax "a1111" the prompt's brackets are weights and none of it is cut: see `a1111`.

    With `subjects` None they are the phrases in brackets, "a [cat] and a [yellow bowl]" (a literal
    bracket is written `\\[`), or else the nouns (`find_nouns`). Otherwise each is a string as in
    `Subject.from_text`, a `Subject`, a token position, or several positions as one group; or they are
    a mapping of such strings to targets, {"cat": 0.3, "frog": None}.
    A string listed n times means its first n occurrences. A phrase stands for its head, the last
    of its first nouns. With no subjects, (), only the brackets are taken out.

    What a prompt from another program has for that program, "(cat:1.3)", "[blurry]", "<lora:x:1>", "BREAK",
    is warned of and no subject: `find_instructions`, and brackets beside one or without noun or colour.

    Raises ValueError, in one sentence that says what to do, if the prompt is empty, has no noun, isn't
    English (where the nouns are wanted), or has bad brackets; if a subject or its occurrence isn't in the
    prompt, is given twice, names several things or lies beyond `tokenizer.model_max_length`; or if a
    position or target is out of range.
    """
    if not isinstance(prompt, str):
        raise ValueError(f"the prompt is {prompt!r}: it must be a text")
    if syntax == "a1111":
        context = _Context.of_chunks(prompt, tokenizer)
        brackets, others = list[Span](), list[Span]()
    else:
        text, brackets = _read_brackets(prompt)
        brackets, others = _marked_here(text, brackets)
        context = _Context.of_streams(text, tokenizer)
    if brackets and subjects:
        raise ValueError(
            "subjects are given both in [brackets] and by name (subjects=[...], --subject): use one of them "
            "(a literal bracket is written \\[)"
        )
    if subjects is not None:
        groups = _named(subjects, context)
    elif brackets:
        groups = [_group_at(span, context) for span in brackets]
    else:
        groups = _automatic(context, others)
    _refuse_duplicates(groups)
    further = tuple((reading.tokens, reading.offsets) for reading in context.further)
    groups = _with_distinct_texts(_with_attributes_apart(groups))
    cut = min((reading.cut for reading in (context, *context.further)), key=len)
    return Prompt(context.text, tuple(groups), context.tokens, context.offsets, further, cut, context.chunks)


def checked_syntax(name: str | None) -> Syntax:
    """The syntax of this name; None: plain.

    Raises:
        ValueError: there is none.
    """
    for syntax in SYNTAXES:
        if name in (syntax, None):
            return syntax
    raise ValueError(f"unknown syntax {name!r}: choose one of {', '.join(SYNTAXES)}")


def locate_in(word: str, prompt: Prompt, streams: Sequence[Stream]) -> tuple[int, ...]:
    """As `locate`, in a prompt of whatever syntax."""
    if not prompt.chunks:
        return locate(word, prompt.text, streams)
    limit = len(prompt.tokens)
    context = _Context(prompt.text, prompt.tokens, prompt.spans, limit, len(prompt.text), ())
    (group,) = _named([word], context)
    return group.positions


def locate(word: str, text: str, tokenizer: PreTrainedTokenizerBase | Sequence[Stream]) -> tuple[int, ...]:
    """The columns of a word or phrase of a text that has no marked subjects, among all tokens that the model
    attends to: with one table of tokens its positions there.

    Raises ValueError as `parse` does, if the word isn't in the text or lies beyond the context.
    """
    context = _Context.of_streams(text, tokenizer)
    (group,) = _named([word], context)
    return columns_of(group, [reading.start for reading in (context, *context.further)])


def columns_of(group: TokenGroup, starts: Sequence[int]) -> tuple[int, ...]:
    """A subject's columns among all tokens that the model attends to; `starts` are those of its tables."""
    tables = zip((group.positions, *group.further), starts, strict=True)
    return tuple(start + position for positions, start in tables for position in positions)


def words_of(text: str) -> Iterator[str]:
    """The words of a text that has no marked subjects, numbered as `locate` finds them: "cat", "cat#2"."""
    for match in WORD.finditer(text):
        if match[0][0].isalnum():
            yield label_of(match[0], match.start(), text)


def cuts_of(text: str, tokenizer: PreTrainedTokenizerBase | Sequence[Stream]) -> list[tuple[str, int, str]]:
    """What a model doesn't read of a text: of each table of tokens that cuts it the name, how many tokens it
    has room for, and the words that are cut."""
    context = _Context.of_streams(text, tokenizer)
    return [(each.name, each.limit, each.cut) for each in (context, *context.further) if each.cut]


def foreign_instructions(text: str) -> str:
    """A sentence on what a text has that other programs read as instructions; "" if it has none."""
    found = [instruction.text for instruction in find_instructions(text)]
    if "((" in text:
        found.append("((")
    if not found:
        return ""
    named = " and ".join(f"'{each}'" for each in dict.fromkeys(found))
    return (
        f"{named}: other programs read that as an instruction, and here the model reads it as plain text, so "
        "leave it out, or have weights read with syntax='a1111' (--syntax a1111); how much attention a "
        "subject is to get is said with subjects=['cat=0.7'] (--subject cat=0.7)"
    )


def text_of(prompt: str) -> str:
    """The prompt without the brackets that mark its subjects, as it is drawn; errors are those of `parse`."""
    return _read_brackets(prompt)[0]


def unmarked(prompt: str) -> str:
    """The prompt without the brackets that mark its subjects, as `parse` takes it beside a list of them.

    Raises ValueError, as `parse` does, if the prompt is empty or has bad brackets.
    """
    return text_of(prompt).replace("[", r"\[").replace("]", r"\]")


def _read_brackets(prompt: str) -> tuple[str, list[Span]]:
    """The prompt without its brackets, and the spans that they enclosed."""
    # The tokenizer composes accents too, so this changes nothing that the model sees.
    prompt = unicodedata.normalize("NFC", prompt)
    text, spans, opened, done = "", [], None, 0
    for mark in re.finditer(r"\\[\[\]]|[\[\]]", prompt):
        text += prompt[done : mark.start()]
        done = mark.end()
        if mark[0].startswith("\\"):
            text += mark[0][1]
        elif (mark[0] == "[") != (opened is None):
            raise ValueError(f"unbalanced brackets in {prompt!r}: write each subject as [subject]")
        elif opened is None:
            opened = len(text)
        else:
            inside = text[opened:]
            if not inside.strip():
                raise ValueError(f"empty brackets in {prompt!r}: put a word or phrase into them")
            if re.search(r"^\s*-|=\s*[\d.]+\s*$", inside):
                raise ValueError(
                    f"[{inside}] is no word: a target, or what is to be avoided, is named with "
                    f"subjects=[{inside.strip()!r}] (--subject={inside.strip()} on the command line)"
                )
            start = opened + len(inside) - len(inside.lstrip())
            spans.append((start, start + len(inside.strip())))
            opened = None
    if opened is not None:
        raise ValueError(f"unbalanced brackets in {prompt!r}: close the last one with ']'")
    text += prompt[done:]
    if not text.strip():
        raise ValueError("the prompt is empty: describe the image in a few words")
    return text, spans


def _marked_here(text: str, brackets: list[Span]) -> tuple[list[Span], list[Span]]:
    """The brackets that name a subject, and the others; warns of what the prompt has for other programs."""
    said = [sentence] if (sentence := foreign_instructions(text)) else []
    kept = [
        span
        for span in brackets
        if not said and not re.search(r"[:|]", text[slice(*span)]) and names_a_thing(span, text)
    ]
    others = [span for span in brackets if span not in kept]
    if others:
        named = " and ".join(f"'[{text[slice(*span)]}]'" for span in others)
        said.append(
            f"{named} {'is' if len(others) == 1 else 'are'} taken for no subject, but for "
            "what other programs mean by brackets: to name a subject all the same, use subjects=[...] "
            "(--subject on the command line)"
        )
    if said:
        warnings.warn("; ".join(said), stacklevel=3)
    return kept, others


@dataclass(frozen=True)
class _Context:
    """What the model reads of a text: its tokens and the characters each was made of.

    `end` is the character at which it stops reading. `instructions` are those to other programs.
    """

    text: str
    tokens: tuple[str, ...]
    offsets: tuple[Span, ...]
    limit: int
    end: int
    instructions: tuple[Instruction, ...]
    name: str = ""
    start: int = 0
    further: tuple[_Context, ...] = ()
    chunks: tuple[Chunk, ...] = ()

    @classmethod
    def of_chunks(cls, prompt: str, tokenizer: PreTrainedTokenizerBase | Sequence[Stream]) -> _Context:
        """What the model reads of a prompt in A1111's syntax: chunk behind chunk, each with its own <sot>."""
        if isinstance(tokenizer, Sequence):
            if [stream.name for stream in tokenizer] != ["CLIP"]:
                raise ValueError("A1111's syntax is for Stable Diffusion 1, 2 and XL: leave it out")
            tokenizer = tokenizer[0].tokenizer
        cutter: Any = tokenizer
        weighted = read_weights(unicodedata.normalize("NFC", prompt))
        if not weighted.text.strip():
            raise ValueError("the prompt is empty: describe the image in a few words")
        chunks, words, spans = list[Chunk](), list[str](), list[Span]()
        with turn_of(cutter):
            rows = [row for piece in weighted.pieces() for row in _tokens_of(weighted, piece, cutter)]
            comma = cutter.convert_tokens_to_ids(",</w>")
            places = [(token, span[0]) for token, span in rows]
            length = cutter.model_max_length - 2
            for chosen in in_chunks(places, weighted.breaks, lambda token: token == comma, length):
                ids = tuple(rows[index][0] for index in chosen)
                weights = tuple(weighted.weights[rows[index][1][0]] for index in chosen)
                chunks.append(Chunk(ids, weights))
                empty = length - len(chosen)
                words += [cutter.bos_token, *(weighted.text[slice(*rows[index][1])] for index in chosen)]
                words += [cutter.eos_token] * (empty + 1)
                spans += [(0, 0), *(rows[index][1] for index in chosen), *[(0, 0)] * (empty + 1)]
        limit, end = len(words), len(weighted.text)
        return cls(weighted.text, tuple(words), tuple(spans), limit, end, (), chunks=tuple(chunks))

    @classmethod
    def of_streams(cls, text: str, tokenizer: PreTrainedTokenizerBase | Sequence[Stream]) -> _Context:
        streams = tokenizer
        if not isinstance(streams, Sequence):
            streams = [Stream("", tokenizer, 0, streams.model_max_length)]
        first, *further = (cls.of(text, stream) for stream in streams)
        return replace(first, further=tuple(further))

    @classmethod
    def of(cls, text: str, stream: Stream) -> _Context:
        tokenizer, limit, before = stream.tokenizer, stream.width, stream.template.index("{}")
        with turn_of(tokenizer):
            written_out, origins = _written_out(text, tokenizer)
            if stream.uncapitalised:
                # One letter for each, also for those whose small form is two.
                stripped = written_out.lstrip()
                origins = origins[len(written_out) - len(stripped) :]
                written_out = "".join(letter.lower()[0] for letter in stripped).rstrip()
            # Cut below, and not here, so that it is known what is cut.
            encoded: Any = tokenizer(
                stream.template.replace("{}", written_out),
                return_offsets_mapping=True,
                return_special_tokens_mask=True,
                verbose=False,
            )
            tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
        rows = list(zip(tokens, encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True))
        words: list[str] = []
        spans: list[Span] = []
        for token, (a, b), special in rows[stream.skipped :]:
            a, b = max(a - before, 0), min(b - before, len(written_out))
            of_text = not special and a < b  # and neither the tokenizer's nor the template's
            spans.append((origins[a][0], origins[b - 1][1]) if of_text else (0, 0))
            words.append(text[slice(*spans[-1])] if of_text else token)
        end = len(text)
        if len(words) > limit:
            kept = limit - sum(1 for _ in takewhile(lambda row: row[2], reversed(rows)))
            closing = len(words) - limit + kept
            end = next((span[0] for span in spans[kept:closing] if span != (0, 0)), end)
            words, spans = words[:kept] + words[closing:], spans[:kept] + spans[closing:]
        marks = tuple(find_instructions(text))
        return cls(text, tuple(words), tuple(spans), limit, end, marks, stream.name, stream.start)

    @property
    def cut(self) -> str:
        words = [w[0] for w in re.finditer(r"\S+", self.text) if w.end() > self.end]
        return " ".join(words)

    def group(
        self,
        text: str,
        span: Span,
        target: float = 1.0,
        negated: bool = False,
        said: Sequence[Span] | None = None,
    ) -> TokenGroup:
        """A subject on its head word; ValueError if every table's context cuts it.

        `said` are the words that are said of it; None: those that the text says.
        """
        first, *further = self._places(span)
        attributes = self.attributes(modifiers_of(span, self.text) if said is None else said)
        return TokenGroup(text, first, target, negated, tuple(further), attributes)

    def attributes(self, said: Iterable[Span]) -> tuple[Attribute, ...]:
        """Those words that the model reads."""
        end = max(reading.end for reading in (self, *self.further))
        read = [span for span in said if span[1] <= end]
        places = [(self.text[slice(*span)], self._places(span)) for span in read]
        return tuple(Attribute(text, first, tuple(further)) for text, (first, *further) in places)

    def _places(self, span: Span) -> list[tuple[int, ...]]:
        """A word's positions in each table, none in those whose context cuts it; ValueError if all do."""
        readings = (self, *self.further)
        # Where all cut it, asking the first raises the error that names the words.
        seen = [reading.end >= span[1] for reading in readings]
        seen[0] |= not any(seen)
        return [
            reading.positions(span) if there else () for reading, there in zip(readings, seen, strict=True)
        ]

    def positions(self, span: Span) -> tuple[int, ...]:
        """The tokens of a head word; ValueError if the context cuts any of them."""
        word = self.text[slice(*span)]
        if span[1] > self.end:
            raise ValueError(
                f"{word!r} lies beyond the model's context of {self.limit} tokens, which cuts "
                f"{self.cut!r}: shorten the prompt or move the word forward"
            )
        self.refuse_instructions(span)
        found = [position for position, (a, b) in enumerate(self.offsets) if a < span[1] and b > span[0]]
        if not found:
            raise ValueError(f"{word!r} has no token of its own: choose another word")
        # The hyphen of "t-rex" shows nothing that could be attended to.
        spoken = [p for p in found if any(c.isalnum() for c in self.tokens[p])]
        return tuple(spoken or found)

    def refuse_instructions(self, span: Span) -> None:
        for instruction in self.instructions:
            if instruction.span[0] < span[1] and instruction.span[1] > span[0]:
                raise ValueError(
                    f"{self.text[slice(*span)]!r} is a part of {instruction.text!r}, which names nothing in "
                    "the picture: choose another word"
                )


def _tokens_of(weighted: WeightedText, piece: tuple[int, int], tokenizer: Any) -> Iterator[tuple[int, Span]]:
    """The tokens of a piece of a text, cut as if it stood alone, with the characters that they are of."""
    text, origins = _written_out(weighted.text[slice(*piece)], tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    for token, (a, b) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        yield token, (piece[0] + origins[a][0], piece[0] + origins[b - 1][1])


def _written_out(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[Span]]:
    """The text as the pipeline hands it to the tokenizer, and where in `text` each of its characters is from.

    A word learnt by textual inversion is written out as its vectors, "<toy> <toy>_1 <toy>_2": where the
    text has it to the letter, so "<Toy>" stays one token.
    """
    added: Any = tokenizer.added_tokens_encoder
    origins = [(at, at + 1) for at in range(len(text))]
    for token in sorted(added.keys() & set(tokenizer.tokenize(text))):
        vectors = next(n for n in count(1) if f"{token}_{n}" not in added)
        written = " ".join([token, *(f"{token}_{n}" for n in range(1, vectors))])
        for match in reversed(list(re.finditer(re.escape(token), text))):
            start, end = match.span()
            origins[start:end] = [(origins[start][0], origins[end - 1][1])] * len(written)
            text = text[:start] + written + text[end:]
    return text, origins


def _automatic(context: _Context, others: Sequence[Span]) -> list[TokenGroup]:
    """The nouns, but for those in brackets that name no subject, where there are more."""
    if language := other_language(context.text):
        raise ValueError(
            f"{context.text!r} seems to be in {language}, and nouns are found in English only: {_HELP}"
        )
    nouns = find_nouns(context.text)
    if not nouns:
        raise ValueError(f"no noun found in {context.text!r}: {_HELP}")
    nouns = [noun for noun in nouns if not any(a <= noun.head_span[0] < b for a, b in others)] or nouns
    end = max(reading.end for reading in (context, *context.further))
    inside = [noun for noun in nouns if noun.head_span[1] <= end]
    # When every noun was cut, asking for one of them raises the error that names the cut words.
    return [
        context.group(label_of(noun.text, noun.span[0], context.text), noun.head_span)
        for noun in inside or nouns
    ]


def _group_at(span: Span, context: _Context) -> TokenGroup:
    text = " ".join(context.text[slice(*span)].split())
    return context.group(label_of(text, span[0], context.text), _one_head(span, context))


def _one_head(span: Span, context: _Context) -> Span:
    """The head of a phrase; ValueError if it names things beside one another, which are as many subjects."""
    things = heads_of(span, context.text)
    if len(things) > 1:
        raise ValueError(
            f"{context.text[slice(*span)]!r} names several things: give each as a subject of its own, "
            f"as {things}"
        )
    return head_of(span, context.text)


def _named(subjects: Subjects, context: _Context) -> list[TokenGroup]:
    if isinstance(subjects, str) or not isinstance(subjects, Iterable):
        raise ValueError(f"subjects must be a list, like {[subjects]}")
    if isinstance(subjects, Mapping):
        subjects = [_with_target(word, target) for word, target in subjects.items()]
    groups, listed = [], Counter()
    for subject in subjects:
        if isinstance(subject, str):
            subject = Subject.from_text(subject)
        if isinstance(subject, Subject):
            groups.append(_group_of(subject, context, listed))
        else:
            groups.append(_group_on(_positions(subject), context))
    return groups


def _with_target(word: Any, target: Any) -> Subject:
    if not isinstance(word, str) or not isinstance(target, float | int | None) or isinstance(target, bool):
        raise ValueError(
            f"{word!r}: {target!r} is no subject with its target: give words and numbers from 0 to 1, like "
            "{'cat': 0.3}"
        )
    subject = Subject.from_text(word)
    if subject.target is not None and target is not None:
        raise ValueError(f"{word!r} has two targets, one of them {target:g}: give one")
    return subject if target is None else replace(subject, target=float(target))


def _positions(subject: Any) -> list[int]:
    try:
        return [operator.index(at) for at in (subject if isinstance(subject, Iterable) else [subject])]
    except TypeError:
        raise ValueError(
            f"{subject!r} is no subject: give a word or phrase, a token position, or a list of positions"
        ) from None


def _group_of(subject: Subject, context: _Context, listed: Counter[str]) -> TokenGroup:
    """The group of a word or phrase; `listed` counts how often each was asked for so far."""
    words = " ".join(unicodedata.normalize("NFC", subject.text).split())
    # "player #7" is no seventh player where the prompt says so itself.
    numbered = None if _occurrences(words, context.text) else re.fullmatch(r"(.+?) ?#(\d+)", words)
    phrase = numbered[1] if numbered else words
    if numbered:
        occurrence = int(numbered[2])
    else:
        listed[phrase.lower()] += 1
        occurrence = listed[phrase.lower()]
    found = _occurrences(phrase, context.text)
    if not found:
        raise ValueError(f"{phrase!r} is not in the prompt: {_hint(phrase, context.text)}")
    if not 1 <= occurrence <= len(found):
        times = "once" if len(found) == 1 else f"{len(found)} times"
        raise ValueError(f"'{phrase}#{occurrence}' is not in the prompt: it has {phrase!r} {times}, from #1")
    span = found[occurrence - 1]
    target = float(not subject.negated) if subject.target is None else float(subject.target)
    label, head = label_of(phrase, span[0], context.text), _one_head(span, context)
    said = None
    if subject.attributes is not None:
        said = [_nearest(word, head, context) for word in subject.attributes]
    return context.group(label, head, target, subject.negated, said)


def _nearest(word: str, head: Span, context: _Context) -> Span:
    """Where a word stands that is said of a noun: of several places the nearest, before it rather than
    behind."""
    word = " ".join(unicodedata.normalize("NFC", word).split())
    found = _occurrences(word, context.text)
    if not found:
        raise ValueError(
            f"the attribute {word!r} of {context.text[slice(*head)]!r} is not in the prompt: "
            f"{_hint(word, context.text)}"
        )
    return min(found, key=lambda span: (max(head[0] - span[1], span[0] - head[1]), span[0]))


def _with_attributes_apart(groups: Sequence[TokenGroup]) -> list[TokenGroup]:
    """Without the attributes that are subjects themselves, as "salmon" may be of "salmon river"."""
    taken = set().union(*(_tokens(group) for group in groups))
    return [
        replace(group, attributes=tuple(each for each in group.attributes if taken.isdisjoint(_tokens(each))))
        for group in groups
    ]


def _tokens(word: TokenGroup | Attribute) -> set[tuple[int, int]]:
    """(table, position) of each of a word's tokens."""
    tables = enumerate((word.positions, *word.further))
    return {(table, position) for table, positions in tables for position in positions}


def _group_on(positions: Sequence[int], context: _Context) -> TokenGroup:
    if not positions:
        raise ValueError("a group has no token positions: give at least one")
    own = [position for position, span in enumerate(context.offsets) if span != (0, 0)]
    for position in positions:
        if position not in own:
            raise ValueError(
                f"token position {position} is out of range: the prompt's tokens are {own[0]} to {own[-1]}"
            )
        context.refuse_instructions(context.offsets[position])
    positions = tuple(sorted(set(positions)))
    start, end = context.offsets[positions[0]][0], context.offsets[positions[-1]][1]
    if positions[-1] - positions[0] + 1 == len(positions):
        text, spans = context.text[start:end], [(start, end)]
    else:  # without what stands between them
        text = " ".join(context.tokens[position] for position in positions)
        spans = [context.offsets[position] for position in positions]
    further = tuple(
        tuple(sorted({position for span in spans for position in reading.positions(span)}))
        for reading in context.further
    )
    attributes = context.attributes(modifiers_of(spans[-1], context.text))
    return TokenGroup(label_of(text, start, context.text), positions, further=further, attributes=attributes)


def _refuse_duplicates(groups: Sequence[TokenGroup]) -> None:
    seen: dict[tuple[tuple[int, ...], ...], str] = {}
    for group in groups:
        place = (group.positions, *group.further)
        if place in seen:
            raise ValueError(
                f"{seen[place]!r} and {group.text!r} are the same word of the prompt: "
                "name it once ('car#2' is the second 'car')"
            )
        seen[place] = group.text


def _with_distinct_texts(groups: Sequence[TokenGroup]) -> list[TokenGroup]:
    """Results are looked up by text, and two pieces of words ("som") may have the same."""
    seen = Counter()
    distinct = []
    for group in groups:
        seen[group.text] += 1
        number = seen[group.text]
        distinct.append(replace(group, text=f"{group.text}#{number}") if number > 1 else group)
    return distinct


def _occurrences(phrase: str, text: str) -> list[Span]:
    pattern = r"(?<!\w)" + r"\s+".join(map(re.escape, phrase.split())) + r"(?!\w)"
    return [match.span() for match in re.finditer(pattern, text, re.IGNORECASE)]


def label_of(phrase: str, start: int, text: str) -> str:
    """A phrase that stands in a text from there on, numbered unless it is the first of its kind, also within
    "t-shirt": as `parse` understands it."""
    earlier = sum(span[0] < start for span in _occurrences(phrase, text))
    return f"{phrase}#{earlier + 1}" if earlier else phrase


def _hint(phrase: str, text: str) -> str:
    parts = [part.strip() for part in re.split(r",|;|\band\b|&", phrase)]
    if len(parts) > 1 and all(part and _occurrences(part, text) for part in parts):
        return f"give each as a subject of its own, as {parts}"
    words = [word for word in WORD.findall(text) if word[0].isalnum()]
    length = len(phrase.split())
    spelled = {
        " ".join(words[i : i + length]).lower(): " ".join(words[i : i + length])
        for i in range(len(words) - length + 1)
    }
    close = difflib.get_close_matches(phrase.lower(), spelled, n=1)
    return f"did you mean {spelled[close[0]]!r}?" if close else f"use words of {text!r}"
