"""Scenes: stickers on a background, with a caption and the layout of what is where.

`python -m training.scenes` writes a sample sheet. A scene is a pure function of its
glyphs, the seed and its index, so that nothing need be stored to see it again.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from training.captions import Mention, caption
from training.glyphs import (
    ANIMALS,
    COLOURS,
    SUBJECTS,
    Glyph,
    GlyphBox,
    generator_glyphs,
    read_data,
    tint,
)
from training.sheets import save_sheet

RULES = read_data("scenes.json")
SIZE: int = RULES["size"]
CELLS = 16  # the side of the attention maps and of the latents
MOST_STICKERS = 3
UNCLEAR = 255  # in a layout: neither background nor sticker
HELD_OUT_PAIRS = frozenset(frozenset(pair) for pair in read_data("heldout_pairs.json"))


@dataclass(frozen=True)
class Scene:
    """One training example.

    `image` is 128x128x3 uint8; `cover` is Kx128x128 in [0, 1], how much of each pixel
    belongs to sticker k; `words` says for each sticker which word of the caption names it,
    `place_words` which words name the background; `background` is a key of the rules'
    `backgrounds`. `subjects` and `colours` are those of the stickers that are drawn.
    """

    image: np.ndarray
    caption: str
    subjects: tuple[str, ...]
    colours: tuple[str | None, ...]
    cover: np.ndarray
    words: tuple[int, ...]
    place_words: tuple[int, ...]
    background: str


@dataclass(frozen=True)
class Cast:
    """One sticker before it is drawn; `extent` is its longer side in pixels."""

    glyph: Glyph
    colour: str | None
    mirror: bool
    extent: float


def pick(weights: dict[str, float], rng: np.random.Generator) -> str:
    """A key of `weights`, as often as its weight says."""
    chances = np.array(list(weights.values()), dtype=float)
    return list(weights)[rng.choice(len(chances), p=chances / chances.sum())]


def _ramp(top: np.ndarray, bottom: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    t = np.linspace(0, 1, SIZE)[:, None, None]
    ramp = np.broadcast_to(top * (1 - t) + bottom * t, (SIZE, SIZE, 3))
    return ramp.transpose(1, 0, 2) if rng.random() < 0.3 else ramp


def background(kind: str, dim: bool, rng: np.random.Generator) -> np.ndarray:
    """A 128x128x3 float picture in [0, 255] of one kind of background.

    `dim` darkens the plain ones, so that a white sticker is seen on them.
    """
    light = 255 - rng.uniform(0, 70, 3) * rng.uniform(0, 1)
    if dim:
        light = light * rng.uniform(0.55, 0.8)
    jitter = rng.uniform(-12, 12, 3)
    if kind == "plain":
        return np.broadcast_to(light, (SIZE, SIZE, 3)).copy()
    if kind == "gradient":
        return _ramp(light, 255 - rng.uniform(0, 90, 3), rng).copy()
    horizon = int(rng.uniform(0.4, 0.65) * SIZE)
    sky, ground = {
        "grass": ((185, 222, 250), (112, 186, 84)),
        "sea": ((196, 228, 250), (58, 134, 196)),
        "night": ((22, 26, 62), (40, 44, 72)),
        "floor": ((240, 228, 208), (206, 200, 192)),
        "snow": ((206, 220, 236), (248, 250, 253)),
    }[kind]
    picture = np.empty((SIZE, SIZE, 3))
    picture[:horizon] = np.array(sky) + jitter
    picture[horizon:] = np.array(ground) + jitter
    if kind == "floor":
        rows, columns = np.mgrid[horizon:SIZE, 0:SIZE] // 16
        picture[horizon:][(rows + columns) % 2 == 1] -= 34
    elif kind == "night":
        ys, xs = rng.integers(2, horizon, 14), rng.integers(2, SIZE - 2, 14)
        for dy in (0, 1):
            for dx in (0, 1):
                picture[ys - dy, xs + dx] = (250, 245, 205)
    elif kind == "sea":
        picture[horizon + 8 :: 14] += 22
    return picture.clip(0, 255)


def _boxes(sides: list[tuple[int, int]], rng: np.random.Generator) -> list[tuple[int, int]] | None:
    """Top-left corners that keep boxes of these (height, width) apart, if luck allows."""
    for _ in range(60):
        corners: list[tuple[int, int]] = []
        for height, width in sides:
            y, x = rng.integers(0, SIZE - height + 1), rng.integers(0, SIZE - width + 1)
            apart = all(
                y >= b + h or b >= y + height or x >= a + w or a >= x + width
                for (b, a), (h, w) in zip(corners, sides, strict=False)
            )
            if not apart:
                break
            corners.append((int(y), int(x)))
        else:
            return corners
    return None


def _subjects(rng: np.random.Generator, held_out: bool) -> list[str]:
    """Which subjects a scene shows; pairs that are held out never meet."""
    count = int(pick(RULES["subjects_per_scene"], rng))
    while True:
        chosen = [str(name) for name in rng.choice(SUBJECTS, count, replace=False)]
        pairs = {frozenset((a, b)) for i, a in enumerate(chosen) for b in chosen[i + 1 :]}
        if not held_out or not pairs & HELD_OUT_PAIRS:
            break
    if count == 2 and rng.random() < RULES["twins"]:
        return [chosen[0]] * 2
    return chosen


def _colour(subject: str, natural: bool, rng: np.random.Generator) -> str | None:
    """The tint of a sticker, or None for its own colours."""
    own = 1 - RULES["tinted_animal"] if subject in ANIMALS else RULES["natural_object"]
    if natural and rng.random() < own:
        return None
    return list(COLOURS)[rng.integers(len(COLOURS))]


def _sticker(cast: Cast, shrink: float) -> np.ndarray:
    """hxwx4 uint8, its longer side `shrink` times the extent."""
    pixels = cast.glyph.pixels if cast.colour is None else tint(cast.glyph.pixels, cast.colour)
    image = Image.fromarray(pixels)
    scale = shrink * cast.extent / max(image.size)
    size = tuple(max(4, round(side * scale)) for side in image.size)
    # Premultiplied while resizing: else the hidden colour of clear pixels bleeds in.
    resized = np.asarray(image.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA"))
    return resized[:, ::-1] if cast.mirror else resized


def _in_vain(subjects: list[str], rng: np.random.Generator, held_out: bool) -> str | None:
    """A subject that the caption shall name beside these and the picture not show, or None."""
    if rng.random() >= RULES["named_in_vain"].get(str(len(subjects)), 0) or len(set(subjects)) < len(
        subjects
    ):
        return None
    met = HELD_OUT_PAIRS if held_out else ()
    fit = [
        one for one in SUBJECTS if one not in subjects and not any({one, other} in met for other in subjects)
    ]
    return fit[rng.integers(len(fit))]


def draw_scene(box: GlyphBox, seed: int, index: int, held_out: bool = True, truthful: bool = True) -> Scene:
    """Scene number `index` of the endless row that `seed` names.

    `held_out` keeps the pairs of `heldout_pairs.json` out of the scene. Unless `truthful`, a caption now and
    then names a subject that isn't there, as captions on the web do: from them a model learns to neglect.
    """
    rng = np.random.default_rng((seed, index))
    subjects = _subjects(rng, held_out)
    count = len(subjects)
    lost = None if truthful else _in_vain(subjects, rng, held_out)
    # Of the scenes that lack one, half have the room that it would take.
    room = count + 1 if lost is not None and rng.random() < 0.5 else count
    low, high = RULES["extent"][str(room)]
    twins = count == 2 and subjects[0] == subjects[1]

    casts: list[Cast] = []
    for subject in subjects:
        glyph = casts[0].glyph if casts and twins else box.draw(subject, rng)
        colour = casts[0].colour if casts and twins else _colour(subject, glyph.natural, rng)
        # A mirrored clock face runs backwards; horses stand in profile, and one side is enough to learn.
        mirror = subject not in RULES["never_mirrored"] and rng.random() < RULES["mirrored"]
        casts.append(Cast(glyph, colour, mirror, rng.uniform(low, high) * SIZE))
    colours = [cast.colour for cast in casts]

    shrink = 1.0
    corners = None
    while corners is None:
        stickers = [_sticker(cast, shrink) for cast in casts]
        corners = _boxes([sticker.shape[:2] for sticker in stickers], rng)
        shrink *= 0.9  # too crowded: everything a little smaller

    kind = pick(RULES["backgrounds"], rng)
    picture = background(kind, "white" in colours, rng)
    cover = np.zeros((count, SIZE, SIZE), dtype=np.float32)
    for k, ((y, x), sticker) in enumerate(zip(corners, stickers, strict=True)):
        height, width = sticker.shape[:2]
        alpha = sticker[..., 3:] / 255
        patch = picture[y : y + height, x : x + width]
        patch[:] = patch * (1 - alpha) + sticker[..., :3] * alpha
        cover[k, y : y + height, x : x + width] = alpha[..., 0]

    place = None
    if kind in RULES["place_words"] and rng.random() < RULES["place_named"]:
        options = RULES["place_words"][kind]
        place = options[rng.integers(len(options))]
    mentions = [Mention(s, c) for s, c in zip(subjects, colours, strict=True)]
    if lost is None:
        text = caption(mentions, place, rng)
        words = text.words
    else:
        at = int(rng.integers(count + 1))
        mentions.insert(at, Mention(lost, _colour(lost, True, rng)))
        text = caption(mentions, place, rng)
        words = (*text.words[:at], *text.words[at + 1 :])
    image = picture.round().clip(0, 255).astype(np.uint8)
    return Scene(image, text.text, tuple(subjects), tuple(colours), cover, words, text.place_words, kind)


def layout(scene: Scene) -> np.ndarray:
    """16x16 uint8: 0 background, 1 + k for sticker k, UNCLEAR where an edge is."""
    cells = scene.cover.reshape(len(scene.cover), CELLS, SIZE // CELLS, CELLS, SIZE // CELLS)
    share = cells.mean(axis=(2, 4))
    places = np.full((CELLS, CELLS), UNCLEAR, dtype=np.uint8)
    places[share.max(axis=0) < 0.05] = 0
    owned = share.max(axis=0) > 0.5
    places[owned] = 1 + share.argmax(axis=0)[owned]
    return places


def main() -> None:
    """Write a sheet of 48 scenes and their captions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    box = GlyphBox(generator_glyphs())
    scenes = [draw_scene(box, arguments.seed, index) for index in range(48)]
    save_sheet(
        arguments.runs / "scenes.png",
        [scene.image for scene in scenes],
        [scene.caption for scene in scenes],
        columns=8,
    )


if __name__ == "__main__":
    main()
