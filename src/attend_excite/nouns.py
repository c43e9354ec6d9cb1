"""The things that a prompt speaks of, found by a part-of-speech tagger (paper, appendix A.2)."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from itertools import pairwise
from typing import Any

Span = tuple[int, int]

# "t-rex" and "o'clock" are one word; the possessive "'s" is its own word, as in the tagger's model.
WORD = re.compile(r"\w+(?:-\w+|['\u2019](?!s\b)\w+)*|['\u2019]s\b|[^\w\s]")

# The tagger's time grows with the square of a word's letters, and it goes by a word's end. English words
# aren't longer.
_LETTERS = 50

# What ties an adjective behind a noun to it: "the bowl is yellow".
_TIES = ("is", "are", "was", "were")
# What other programs take for instructions. Of "(cat:1.3)" only the weight is one.
_INSTRUCTION = re.compile(
    r"""<\w+:[^<>]*>                                                # <lora:name:1>
    | \bBREAK\b
    | (?<!\S)--[a-z]+(?:\s+[\d.]+(?::[\d.]+)?)?                   # --ar 16:9
    | \([^()]*?[^\s\d()](?P<weight>\s*:\s*[+-]?\d*\.?\d+\s*)\)   # (cat:1.3)
    """,
    re.VERBOSE,
)


@dataclass(frozen=True)
class Noun:
    """A noun of a text: "grizzly bear" with its head "bear", and both character spans."""

    text: str
    head: str
    span: Span
    head_span: Span


@dataclass(frozen=True)
class _Word:
    """A word with its lemma and its tag of the BNC's C5 set: NN1, NN2, NP0, AJ0, VVG, PRP, ..."""

    text: str
    lemma: str
    tag: str
    span: Span

    @property
    def lower(self) -> str:
        return self.text.lower()

    @property
    def is_noun(self) -> bool:
        return self.tag.startswith(("NN", "NP", "UNC"))

    @property
    def is_adjective(self) -> bool:
        return self.tag.startswith("AJ")

    @property
    def is_colour(self) -> bool:
        lists = _lists()
        return self.lower in lists["colours"] or self.lower in lists["colours_that_are_things"]


@cache
def _lists() -> dict[str, frozenset[str]]:
    return _word_lists("subjects.json")


@cache
def _languages() -> dict[str, frozenset[str]]:
    return _word_lists("languages.json")


def _word_lists(file: str) -> dict[str, frozenset[str]]:
    source = files("attend_excite").joinpath("data", file).read_text(encoding="utf-8")
    return {name: frozenset(words) for name, words in json.loads(source).items()}


@cache
def _tagger() -> Any:
    from HanTa import HanoverTagger

    return HanoverTagger.HanoverTagger("morphmodel_en.pgz")


@cache
def _reading(word: str) -> str:
    """The likeliest tag of a word by itself."""
    return max(_tagger().tag_word(word.lower()[-_LETTERS:]), key=lambda reading: reading[1])[0]


@dataclass(frozen=True)
class Instruction:
    """What other programs read as an instruction, and this one as plain text.

    `text` is "(cat:1.3)", "<lora:name:1>", "BREAK", "--ar 16:9"; `span` is of what in it is no word of the
    picture: ":1.3", and all of the others.
    """

    text: str
    span: Span


def find_instructions(text: str) -> list[Instruction]:
    """The weights, networks and marks that a text pasted from another program carries, in its order."""
    return [
        Instruction(match[0], match.span("weight" if match["weight"] else 0))
        for match in _INSTRUCTION.finditer(text)
    ]


def other_language(text: str) -> str | None:
    """The language that a text seems to be in, if it isn't English; None: it may well be English.

    A rule of thumb: it has more little words of another language ("une", "und") than of English, or more
    letters that aren't Latin. A few nouns alone are taken for English.
    """
    letters = [letter for letter in text if letter.isalpha()]
    if 2 * sum(unicodedata.name(letter, "").startswith("LATIN") for letter in letters) < len(letters):
        return "another language"
    words = [word.lower() for word in re.findall(r"\w+", text) if not word.isupper()]  # MIT, the UN
    found = {language: sum(word in known for word in words) for language, known in _languages().items()}
    most = max(found.values())
    if not most or most <= found["English"]:
        return None
    likely = [language for language, count in found.items() if count == most]
    return likely[0] if len(likely) == 1 else "another language"


def find_nouns(text: str) -> list[Noun]:
    """The things that a text speaks of, in its order (paper, appendix A.2).

    A run of nouns is one, with the last as its head: "teddy bear", "crystal clear river". Left out
    are frames ("a painting of", "in the style of Monet", "by Monet"), quality tags ("4k"),
    collections ("a pair of"), places ("on top", "in the background"), colours, numbers, and what
    the text says is absent ("without a hat"), and instructions to other programs ("<lora:x:1>"). May be
    empty; raises nothing.
    """
    words = _tagged(text)
    nouns = []
    for start, end in _noun_phrases(words):
        if _is_about_the_image(words, start, end) or _is_absent_or_elsewhere(words, start, end):
            continue
        head = words[end - 1]
        first = next(word for word in words[start:end] if word.is_noun or word is head)
        span = first.span[0], head.span[1]
        nouns.append(Noun(" ".join(text[slice(*span)].split()), head.text, span, head.span))
    return nouns


def find_phrases(text: str) -> list[str]:
    """The noun phrases of a text as they stand there, in its order: "a red cube", "two elephants".

    From the article or number to the noun that they are about, none within another; whatever they are
    about, so "a painting" is one, too. May be empty; raises nothing.
    """
    words = _tagged(text)
    return [
        text[words[_opening(words, start)].span[0] : words[end - 1].span[1]]
        for start, end in _noun_phrases(words)
    ]


def _tagged(text: str) -> list[_Word]:
    for instruction in find_instructions(text):
        start, end = instruction.span
        text = f"{text[:start]},{' ' * (end - start - 1)}{text[end:]}"
    matches = list(WORD.finditer(text))
    tagged = _tagger().tag_sent([match[0][-_LETTERS:] for match in matches], taglevel=1)
    words = [
        _Word(match[0], lemma, tag, match.span())
        for (_, lemma, tag), match in zip(tagged, matches, strict=True)
    ]
    for i, word in enumerate(words):
        before = words[i - 1] if i else None
        after = words[i + 1] if i + 1 < len(words) else None
        words[i] = replace(word, tag=_corrected(word, before, after))
    return words


def _corrected(word: _Word, before: _Word | None, after: _Word | None) -> str:
    """The tagger's choice, except where the trade of image prompts knows better."""
    lists = _lists()
    if not word.text[0].isalnum() and word.tag != "POS":
        return "PUN"
    if word.lower in ("a", "an", "the"):  # beside an unknown word they are unknown to the tagger
        return "AT0"
    if word.lower in lists["numbers"]:
        return "CRD"
    # "a white corgi": after a colour the tagger guesses a number for a word unknown to it.
    if word.tag == "CRD" and _reading(word.lower) == "UNC":
        return "UNC"
    # "orange" is left to the tagger, who tells "an orange" from "an orange bowl".
    as_colour = before is not None and before.lower == "in"
    if word.lower in lists["colours"] or (as_colour and word.is_colour):
        return "AJ0"
    # "a dog running and a cat": the tagger prefers a compound noun.
    if word.tag == "NN1" and word.lower.endswith("ing") and before is not None and before.is_noun:
        return "VVG" if _reading(word.lower) == "VVG" else "NN1"
    # "grizzly bear": a noun that the tagger takes for an adjective because of its place.
    if word.is_adjective and not word.is_colour and after is not None and after.is_noun:
        return "NN1" if _reading(word.lower) == "NN1" else word.tag
    # "a cat with ice-cream": nouns on both sides of the hyphen, and none behind it.
    if word.is_adjective and "-" in word.text and not (after and (after.is_noun or after.is_adjective)):
        return "NN1" if all(_reading(part).startswith("NN") for part in word.lower.split("-")) else word.tag
    return word.tag


def _noun_phrases(words: list[_Word]) -> Iterator[Span]:
    """From the first adjective to the head of each, without the article."""
    start = 0
    while start < len(words):
        end = start
        while end < len(words) and (
            words[end].is_noun or words[end].is_adjective or words[end].tag in ("ORD", "POS")
        ):
            end += 1
        nouns = [i for i in range(start, end) if words[i].is_noun]
        if nouns:
            yield start, nouns[-1] + 1
        elif start < end and _stands_for_a_noun(words, start, end):
            yield start, end
        start = end + 1


def _stands_for_a_noun(words: list[_Word], start: int, end: int) -> bool:
    """ "a remote", "a present": an article wants a noun, so its last adjective is one, unless
    adjectives go on after a comma or "and"."""
    last = words[end - 1]
    if last.is_colour or not last.is_adjective or not start or words[start - 1].tag != "AT0":
        return False
    following = words[end : end + 2]
    goes_on = len(following) == 2 and following[0].tag in ("PUN", "CJC")
    return not (goes_on and following[1].tag.startswith(("AJ", "AV")))


def _opening(words: list[_Word], start: int) -> int:
    """Where a noun phrase begins, with its article, number and adverb."""
    while start and words[start - 1].tag in ("AT0", "DT0", "DPS", "CRD", "AV0"):
        start -= 1
    return start


def _is_about_the_image(words: list[_Word], start: int, end: int) -> bool:
    """Frames, styles and their authors, quality tags."""
    lists = _lists()
    opening, head = _opening(words, start), words[end - 1]
    after = words[end].lower if end < len(words) else ""
    if head.lower in lists["quality"] or head.lemma in lists["styles"]:
        return True
    of_what = words[opening - 2] if opening > 1 and words[opening - 1].lower == "of" else None
    if of_what is not None and of_what.lemma in lists["styles"]:
        return True
    if opening == start and start and words[start - 1].lower == "by":
        return all(word.tag == "NP0" for word in words[start:end])
    # "a cat, oil painting": bare words between commas that don't make up the whole prompt.
    is_tag = (
        opening == start
        and end - start < len(words)
        and (not start or words[start - 1].tag == "PUN")
        and (end == len(words) or words[end].tag == "PUN")
    )
    return head.lemma in lists["frames"] and (after in lists["frame_links"] or is_tag)


def _is_absent_or_elsewhere(words: list[_Word], start: int, end: int) -> bool:
    """ "without a hat", "a pair of", "on top of"."""
    lists = _lists()
    opening, head = _opening(words, start), words[end - 1]
    before = words[opening - 1] if opening else None
    after = words[end].lower if end < len(words) else ""
    if any(word.lower == "no" for word in words[opening:start]):
        return True
    if head.lemma in lists["collections"] and after == "of":
        return True
    if before is None:
        return False
    is_place = head.lower in lists["places"] and before.tag in ("PRP", "PRF", "TO0")
    return is_place or before.lower in ("without", "not")


def modifiers_of(head: Span, text: str) -> list[Span]:
    """What the text says of a noun, in its order: the words that its picture must show on it.

    Adjectives and nouns before it ("a small, yellow bowl", "a red and blue bird", "a teddy bear"), and
    adjectives that a form of "be" ties to it ("the bowl is yellow and round"). Not among them are articles,
    numbers and owners ("the man's hat").

    Args:
        head: the characters of the noun, as `head_of` finds them.
        text: where it stands.
    """
    words = _tagged(text)
    for start, end in _noun_phrases(words):
        if words[end - 1].span[0] < head[1] and words[end - 1].span[1] > head[0]:
            before = [i for i in range(_chain_start(words, start), end - 1) if _modifies(words, i)]
            return [words[i].span for i in [*before, *_predicates(words, end)]]
    return []


def _modifies(words: list[_Word], i: int) -> bool:
    owns = i + 1 < len(words) and words[i + 1].tag == "POS"
    return (words[i].is_adjective or words[i].is_noun) and not owns


def _chain_start(words: list[_Word], start: int) -> int:
    """Where the adjectives of a phrase begin: "red and blue bird", "small, fluffy and brown cat"."""
    while start > 1 and words[start - 1].lower in (",", "and", "or", "but"):
        link = start - 1
        while link > 1 and words[link - 1].text == ",":  # "small, and brown"
            link -= 1
        first = link
        while first and words[first - 1].is_adjective:
            first -= 1
        before = words[first - 1] if first else None
        # Of another noun: "a cat, red bowl", "the bowl is yellow and red apples lie in it".
        if first == link or (before and (before.is_noun or before.lower in _TIES)):
            return start
        start = first
    return start


def _predicates(words: list[_Word], end: int) -> list[int]:
    """The adjectives that "is" or "are" ties to the noun before it, which are no other noun's."""
    found: list[int] = []
    if end == len(words) or words[end].lower not in _TIES:
        return found
    for i in range(end + 1, len(words)):
        if words[i].is_adjective:
            found.append(i)
        elif words[i].is_noun:
            # "the bowl is yellow and red apples lie in it": what stands before a noun is its own.
            while found and found[-1] == i - 1:
                i = found.pop()
            return found
        elif words[i].tag != "AV0" and words[i].lower not in (",", "and", "but"):
            return found
    return found


def head_of(span: Span, text: str) -> Span:
    """The head of a phrase of the text: "bear" of "grizzly bear", "bowl" of "bowl of apples",
    "glasses" of "pair of glasses"; without a noun the last word."""
    words = [word for word in _tagged(text) if word.span[0] < span[1] and word.span[1] > span[0]]
    spoken = [word for word in words if word.text[0].isalnum()]
    if not spoken:
        return span
    heads = [words[end - 1] for _, end in _noun_phrases(words)]
    things = [head for head in heads if head.lemma not in _lists()["collections"]]
    start, end = [*things, *heads, spoken[-1]][0].span
    return max(start, span[0]), min(end, span[1])


def names_a_thing(span: Span, text: str) -> bool:
    """Whether a part of a text has the head of a noun phrase, or is a colour: "cat", "black cat", "black"."""
    words = _tagged(text)
    heads = [words[end - 1] for _, end in _noun_phrases(words)]
    colours = [word for word in words if word.is_colour]
    return any(
        word.span[0] < span[1] and word.span[1] > span[0] and word.lower not in _lists()["quality"]
        for word in (*heads, *colours)
    )


def heads_of(span: Span, text: str) -> list[str]:
    """The things that a phrase names beside one another: "cat" and "frog" of "a cat and a frog", one of
    "a cat with a frog"; none without a noun."""
    words = [word for word in _tagged(text) if word.span[0] >= span[0] and word.span[1] <= span[1]]
    phrases = list(_noun_phrases(words))
    heads = [words[end - 1].text for _, end in phrases[:1]]
    for (_, before), (start, end) in pairwise(phrases):
        between = words[before : _opening(words, start)]
        if not between or any(word.tag not in ("CJC", "PUN") for word in between):
            break
        heads.append(words[end - 1].text)
    return heads
