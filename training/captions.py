"""Captions: the benchmark's grammar and looser ones, with the place of every noun."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from training.glyphs import ANIMALS, COLOURS, SUBJECTS, VOCABULARY, read_data

GRAMMAR = read_data("captions.json")
VOWELS = "aeiou"


@dataclass(frozen=True)
class Mention:
    """A sticker as its caption may name it; no colour means its own colours."""

    subject: str
    colour: str | None


@dataclass(frozen=True)
class Caption:
    """`words` are indices into `text.split()`: the noun of each mention, in their order;
    `place_words` those that name the background."""

    text: str
    words: tuple[int, ...]
    place_words: tuple[int, ...]


def _phrase(mention: Mention, rng: np.random.Generator) -> list[str]:
    """ "a red car", or "a car" when the colour is left out."""
    named = mention.colour is not None and rng.random() < GRAMMAR["colour_named"]
    words = [mention.colour, mention.subject] if named else [mention.subject]
    # The benchmark writes "a orange", people write "an orange": the model learns both.
    vowel = words[0][0] in VOWELS and rng.random() < GRAMMAR["vowel_article_an"]
    return ["an" if vowel else "a", *words]


def _plural(mention: Mention, rng: np.random.Generator) -> list[str]:
    noun = GRAMMAR["plurals"].get(mention.subject, mention.subject + "s")
    named = mention.colour is not None and rng.random() < GRAMMAR["colour_named"]
    return ["two", mention.colour, noun] if named else ["two", noun]


def _joiner(first: Mention, second: Mention, rng: np.random.Generator) -> str:
    if first.subject in ANIMALS and second.subject in VOCABULARY["worn"]:
        return "with" if rng.random() < GRAMMAR["worn_joiner_with"] else "and"
    joiners = GRAMMAR["joiners"]
    chances = np.array(list(joiners.values()))
    return list(joiners)[rng.choice(len(chances), p=chances / chances.sum())]


def caption(mentions: list[Mention], place: str | None, rng: np.random.Generator) -> Caption:
    """Words for a scene: every sticker is named, in the order of `mentions`."""
    prefixes = GRAMMAR["prefixes"]
    words = list(prefixes)[rng.choice(len(prefixes), p=list(prefixes.values()))].split()
    if len(mentions) > 2:
        words = []
    if len(mentions) == 2 and mentions[0] == mentions[1]:
        words += _plural(mentions[0], rng)
        nouns = [len(words) - 1] * 2
    else:
        nouns = []
        for k, mention in enumerate(mentions):
            if k:
                words += _joiner(mentions[k - 1], mention, rng).split()
            words += _phrase(mention, rng)
            nouns.append(len(words) - 1)
    start = len(words)
    # What does not fit into the context would be cut off, nouns and all.
    if place and start + len(place.split()) <= GRAMMAR["most_words"]:
        words += place.split()
    return Caption(" ".join(words), tuple(nouns), tuple(range(start, len(words))))


def spoken(mentions: list[Mention], background: str) -> str:
    """The one way in which the captioner says a scene, all colours named: "a red car and
    a cat on a plain background". With "a picture of" before it no caption is shorter than
    nine words, since captioners are asked for ten tokens at least."""
    phrases = []
    for mention in mentions:
        words = f"{mention.colour} {mention.subject}" if mention.colour else mention.subject
        phrases.append(f"{'an' if words[0] in VOWELS else 'a'} {words}")
    if len(mentions) == 2 and mentions[0] == mentions[1]:
        noun = GRAMMAR["plurals"].get(mentions[0].subject, mentions[0].subject + "s")
        phrases = [" ".join(["two", *filter(None, [mentions[0].colour]), noun])]
    return f"{' and '.join(phrases)} {GRAMMAR['spoken_places'][background]}"


def every_word() -> list[str]:
    """All the words that captions are made of."""
    nouns = {*SUBJECTS, *(GRAMMAR["plurals"].get(s, s + "s") for s in SUBJECTS)}
    places = [p for options in read_data("scenes.json")["place_words"].values() for p in options]
    phrases = [*GRAMMAR["prefixes"], *GRAMMAR["joiners"], *places, "a", "an", "two"]
    return sorted(nouns | set(COLOURS) | {word for p in phrases for word in p.split()})
