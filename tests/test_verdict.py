"""Which subjects are in a picture, and which of several pictures is the best."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest
from PIL import Image

from attend_excite import Model, Subject
from attend_excite.subjects import parse
from attend_excite.verdict import as_asked, best, can_judge, sentence, verdicts

DATA = files("attend_excite").joinpath("data")
OPENING = json.loads(DATA.joinpath("examples.json").read_text(encoding="utf-8"))["opening"]


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """What the web page opens with: the plain pictures and the excited ones."""
    opened = []
    for row in range(len(OPENING["verdicts"])):
        for seed in OPENING["seeds"]:
            with DATA.joinpath(f"opening-{row}-{seed}.webp").open("rb") as file:
                opened.append(Image.open(file).convert("RGB"))
    return opened


def test_the_opening_shows_what_it_says(stickers: Model, pictures: list[Image.Image]) -> None:
    prompt = parse(OPENING["prompt"], stickers.tokenizer)
    seen = verdicts(pictures, prompt, "stickers")
    assert seen == [verdict for row in OPENING["verdicts"].values() for verdict in row]
    plain = seen[: len(OPENING["seeds"])]
    assert not all(all(verdict.values()) for verdict in plain)


def test_nobody_can_tell_of_other_words_and_models(stickers: Model, pictures: list[Image.Image]) -> None:
    prompt = parse("a wombat, a yellow bowl, a cat and a cat", stickers.tokenizer)
    (seen, *_) = verdicts(pictures, prompt, "stickers")
    assert {word: there is None for word, there in seen.items()} == {
        "wombat": True,
        "bowl": False,
        "cat": False,
        "cat#2": True,
    }
    assert verdicts(pictures, prompt, "sd-1.4") == [dict.fromkeys(seen)] * len(pictures)
    assert can_judge(prompt, "stickers")
    assert not can_judge(prompt, "sd-1.4")
    assert verdicts([], prompt, "stickers") == []


def test_the_best_has_the_most_as_asked_and_the_first_of_equals_wins(stickers: Model) -> None:
    wanted = (Subject("cat"), Subject("frog"), Subject("hat", negated=True))
    prompt = parse("a cat, a frog and a hat", stickers.tokenizer, wanted)
    seen = [
        {"cat": True, "frog": False, "hat": True},
        {"cat": True, "frog": None, "hat": False},
        {"cat": False, "frog": True, "hat": False},
    ]
    assert [as_asked(verdict, prompt.groups) for verdict in seen] == [1, 2, 2]
    assert best(seen, prompt) == 1
    assert [sentence(verdict, prompt) for verdict in seen[:2]] == [
        "cat ✓ frog ✗ no hat ✗",
        "cat ✓ frog ? no hat ✓",
    ]
    unknown = dict.fromkeys(seen[0])
    assert sentence(unknown, prompt) == ""
    with pytest.raises(ValueError, match="nobody can tell"):
        best([unknown, unknown], prompt)
