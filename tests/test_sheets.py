"""Sheets of pictures, by their pixels."""

from __future__ import annotations

import torch
from PIL import Image
from transformers import CLIPTokenizer

from attend_excite.sheets import SUBJECT_COLOURS, comparison_sheet, maps_sheet
from attend_excite.subjects import Prompt, TokenGroup, parse

PROMPT = Prompt(
    "a cat and a frog",
    (TokenGroup("cat", (2,)), TokenGroup("frog", (5,))),
    ("<sot>", "a", "cat", "and", "a", "frog", "<eot>"),
    ((0, 0), (0, 1), (2, 5), (6, 9), (10, 11), (12, 16), (0, 0)),
)


def _squares(sheet: Image.Image, colour: str) -> int:
    """Pixels of exactly this colour."""
    wanted = Image.new("RGB", (1, 1), colour).getpixel((0, 0))
    counts = {pixel: count for count, pixel in sheet.getcolors(maxcolors=2**24) or []}
    return counts.get(wanted, 0)


def test_comparison_shows_every_picture_enlarged() -> None:
    reds, blues = ([Image.new("RGB", (128, 96), colour)] * 10 for colour in ("red", "blue"))
    sheet = comparison_sheet(PROMPT, "plain", {"plain": reds, "excited": blues}, range(10))
    # 96 pixels are enlarged three times, the least whole number that gives 256.
    assert _squares(sheet, "red") == _squares(sheet, "blue") == 10 * (3 * 128) * (3 * 96)
    # Eight pictures side by side, then the last two below.
    assert 8 * 3 * 128 < sheet.width < 10 * 3 * 128
    assert 4 * 3 * 96 < sheet.height < 6 * 3 * 96


def test_large_pictures_keep_their_size() -> None:
    sheet = comparison_sheet(PROMPT, "plain", {"plain": [Image.new("RGB", (512, 512), "red")]}, [0])
    assert _squares(sheet, "red") == 512 * 512


def test_maps_are_named_in_the_subjects_colours() -> None:
    heat = torch.eye(16)
    sheet = maps_sheet(PROMPT, "seed 0", {"": (Image.new("RGB", (128, 128), "red"), [heat, heat])})
    assert _squares(sheet, "red") == 256 * 256
    # In the title and above the map.
    assert all(_squares(sheet, colour) > 50 for colour in SUBJECT_COLOURS[:2])
    assert _squares(sheet, SUBJECT_COLOURS[2]) == 0


def test_a_character_of_several_tokens_has_its_subject_s_colour(tokenizer: CLIPTokenizer) -> None:
    prompt = parse("a phở and a frog", tokenizer, ["phở", "frog"])
    assert len(prompt.tokens) > len(["<sot>", "a", "phở", "and", "a", "frog", "<eot>"])
    sheet = comparison_sheet(prompt, "", {"": [Image.new("RGB", (256, 256), "red")]}, [0])
    assert all(_squares(sheet, colour) > 50 for colour in SUBJECT_COLOURS[:2])


def test_long_prompts_are_wrapped() -> None:
    long = Prompt("cat " * 60, (), ("<sot>", *["cat"] * 60, "<eot>"), ())
    picture = [Image.new("RGB", (256, 256), "red")]
    short_sheet = comparison_sheet(PROMPT, "", {"": picture}, [0])
    long_sheet = comparison_sheet(long, "", {"": picture}, [0])
    assert long_sheet.width == short_sheet.width
    assert long_sheet.height > short_sheet.height + 100
