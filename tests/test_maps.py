"""A word's maps: the value that `result.maps[word]` is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from PIL import Image, ImageChops

from attend_excite import Model, StableDiffusion
from attend_excite.attention.maps import AttentionMaps, WordMaps, contour, overlay

WORDS = {"cat": (1,), "sombrero": (2, 3)}


@pytest.fixture
def maps() -> AttentionMaps:
    """Two images, three steps, 4x6 patches, five tokens."""
    torch.manual_seed(0)

    def locate(image: int, word: str) -> Sequence[int]:
        return WORDS[word]

    return AttentionMaps(torch.rand(2, 3, 4, 6, 5).softmax(dim=-1), locate)


def test_a_word_has_the_attention_of_all_its_tokens(maps: AttentionMaps) -> None:
    assert torch.equal(maps["cat"].values, maps.values[..., 1])
    torch.testing.assert_close(maps["sombrero"].values, maps.values[..., 2] + maps.values[..., 3])


def test_maps_are_had_per_step_at_the_end_and_on_average(maps: AttentionMaps) -> None:
    cat = maps["cat"]
    assert torch.equal(cat.at(1, 2), cat.values[1, 2])
    assert torch.equal(cat.at(1, -1), cat.values[1, 2])
    torch.testing.assert_close(cat.at(1), cat.values[1].mean(dim=0))


def test_heat_maps_show_where_or_compare_how_much(maps: AttentionMaps) -> None:
    cat = maps["cat"]
    own = cat.heat_map(step=0)
    assert (own.min(), own.max()) == (0, 1)
    assert own.argmax() == cat.at(step=0).argmax()
    torch.testing.assert_close(cat.heat_map(step=0, highest=0.5), (cat.at(step=0) / 0.5).clamp(max=1))
    # A map that is the same everywhere shows nothing, and nothing is divided by zero.
    assert WordMaps(torch.full((1, 1, 4, 4), 0.2)).heat_map().max() == 0


def test_heat_maps_come_in_any_size(maps: AttentionMaps) -> None:
    heat = maps["cat"].heat_map(size=(40, 60))
    assert heat.shape == (40, 60)
    assert 0 <= heat.min() < heat.max() <= 1
    row, column = divmod(int(heat.argmax()), 60)
    assert (row // 10) * 6 + column // 10 == maps["cat"].at().argmax()


def test_the_contour_parts_hot_from_cold() -> None:
    heat = torch.zeros(4, 4)
    heat[:2] = 1
    picture = Image.new("RGB", (128, 128), "white")
    drawn = contour(picture, heat, "#ff0000")
    # The line is where the halves meet; the picture's edge has none.
    left, top, right, bottom = ImageChops.difference(drawn, picture).getbbox() or (0, 0, 0, 0)
    assert (left, right) == (0, 128)
    assert 60 <= top < bottom <= 66


def test_the_overlay_keeps_the_picture_s_light_and_shade() -> None:
    picture = Image.new("RGB", (64, 64), "white")
    picture.paste("black", (0, 0, 32, 64))
    hot, cold = overlay(picture, torch.ones(4, 4)), overlay(picture, torch.zeros(4, 4))
    for shown in (hot, cold):
        assert sum(shown.getpixel((8, 32))) < sum(shown.getpixel((56, 32)))
    assert all(sum(hot.getpixel((x, 32))) > sum(cold.getpixel((x, 32))) for x in (8, 56))


def test_maps_of_other_layers_are_had_by_their_size(tiny: Model) -> None:
    options = {"method": StableDiffusion(), "steps": 1, "decode": False, "progress": False}
    own = tiny.generate("a cat", maps=True, **options).maps
    same = tiny.generate("a cat", maps=(4, 4), **options).maps
    fine = tiny.generate("a cat", maps=(16, 16), **options).maps
    assert torch.equal(own.values, same.values)
    assert fine["cat"].values.shape == (1, 1, 16, 16)
    named = replace(tiny, layers=tuple(place.name for place in tiny.places()))
    assert torch.equal(named.generate("a cat", maps=(4, 4), **options).maps.values, own.values)
    assert torch.equal(named.generate("a cat", maps=(16, 16), **options).maps.values, fine.values)
    with pytest.raises(ValueError, match="the sizes here are 16x16, 8x8, 4x4"):
        tiny.generate("a cat", maps=(5, 5), **options)


def test_maps_say_which_words_they_have(tiny: Model) -> None:
    options = {"method": StableDiffusion(), "steps": 1, "decode": False, "progress": False, "maps": True}
    of_one = tiny.generate("a cat and a [frog]", **options).maps
    assert "cat" in of_one
    assert "dog" not in of_one
    assert 2 not in of_one
    assert list(of_one) == ["a", "cat", "and", "a#2", "frog"]
    total = torch.stack([of_one[word].values for word in of_one]).sum(dim=0)
    torch.testing.assert_close(total, of_one.of_tokens([1, 2, 3, 4, 5]).values)
    of_two = tiny.generate(["a cat and a frog", "the cat"], **options).maps
    assert (list(of_two), "frog" in of_two) == (["cat"], False)
    assert list(of_one.only([2])) == ["cat"]
