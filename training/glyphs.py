"""The sticker glyphs: read, cropped to their ink, sampled evenly and tinted."""

from __future__ import annotations

import functools
import io
import json
import zipfile
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Glyph:
    """One sticker: `pixels` is HxWx4 uint8 RGBA, cropped to what is opaque."""

    subject: str
    set: str
    name: str
    natural: bool  # drawn in its own colours (a silhouette has none and must be tinted)
    pixels: np.ndarray


def read_data(name: str) -> dict:
    """A JSON file of `training/data`."""
    return json.loads((DATA / name).read_text())


VOCABULARY: dict[str, list[str]] = json.loads(
    files("attend_excite").joinpath("data/benchmark.json").read_text(encoding="utf-8")
)
ANIMALS = VOCABULARY["animals"]
SUBJECTS = [*ANIMALS, *VOCABULARY["objects"]]
CANONICAL: dict[str, list[str]] = read_data("canonical.json")
COLOURS: dict[str, list[str]] = read_data("colours.json")
GENERATOR_SETS: list[str] = read_data("sets.json")["generator"]
CALIBRATION_SETS: list[str] = read_data("sets.json")["calibration"]


def _open(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    box = image.getchannel("A").point(lambda a: 255 * (a > 16)).getbbox()
    return np.asarray(image.crop(box))


@functools.cache
def all_glyphs() -> tuple[Glyph, ...]:
    """Every glyph of `glyphs.zip`, then the benches drawn for this project."""
    with zipfile.ZipFile(DATA / "glyphs.zip") as archive:
        glyphs = []
        for row in read_data("glyphs.json"):
            set_name, name = Path(row["file"]).stem.split("__", 1)
            pixels = _open(archive.read(row["file"]))
            # The drawn benches replace the five silhouettes in the generator's share.
            glyphs.append(Glyph(row["concept"], set_name, name, row["kind"] == "colour", pixels))
    for path in sorted((DATA / "benches").glob("*.png")):
        glyphs.append(Glyph("bench", "drawn", path.stem, True, _open(path.read_bytes())))
    return tuple(glyphs)


def generator_glyphs() -> list[Glyph]:
    """The few canonical drawings per subject that the generator learns: `canonical.json` has their names,
    with the set before them where not every set's will do."""
    return [
        glyph
        for glyph in all_glyphs()
        if glyph.set in GENERATOR_SETS
        and {glyph.name, f"{glyph.set}/{glyph.name}"} & set(CANONICAL[glyph.subject])
    ]


def judge_glyphs() -> list[Glyph]:
    """Glyphs of sets that neither the generator nor the judge's calibration uses."""
    spared = {*GENERATOR_SETS, *CALIBRATION_SETS} - {"drawn"}
    canonical_benches = CANONICAL["bench"]
    return [
        glyph
        for glyph in all_glyphs()
        if glyph.set not in spared and not (glyph.set == "drawn" and glyph.name in canonical_benches)
    ]


def calibration_glyphs() -> list[Glyph]:
    """Glyphs of sets that no model was trained on. Subjects that those lack are taken from the judge's own:
    the bench."""
    spared = [glyph for glyph in all_glyphs() if glyph.set in CALIBRATION_SETS]
    lacking = set(SUBJECTS) - {glyph.subject for glyph in spared}
    return spared + [glyph for glyph in judge_glyphs() if glyph.subject in lacking]


class GlyphBox:
    """Draws a glyph of a subject: first its set, then the glyph, so that a set with ten
    moods of one face counts no more than a set with one."""

    def __init__(self, glyphs: list[Glyph]) -> None:
        self.by_subject: dict[str, dict[str, list[Glyph]]] = {}
        for glyph in glyphs:
            sets = self.by_subject.setdefault(glyph.subject, {})
            sets.setdefault(glyph.set, []).append(glyph)

    def draw(self, subject: str, rng: np.random.Generator) -> Glyph:
        sets = self.by_subject[subject]
        members = sets[list(sets)[rng.integers(len(sets))]]
        return members[rng.integers(len(members))]


class JostledBox(GlyphBox):
    """Turns, stretches and often tints what it draws: for who must know a subject in a
    hand that he has never seen."""

    TURN = 15  # degrees, either way
    STRETCH = 1.25  # of the width, or its inverse
    TINTED = 0.25  # of the glyphs in their own colours are treated as if they had none

    def draw(self, subject: str, rng: np.random.Generator) -> Glyph:
        glyph = super().draw(subject, rng)
        image = Image.fromarray(glyph.pixels).convert("RGBa")
        stretch = self.STRETCH ** rng.uniform(-1, 1)
        image = image.resize((max(1, round(image.width * stretch)), image.height))
        turn = rng.uniform(-self.TURN, self.TURN)
        image = image.rotate(turn, Image.Resampling.BILINEAR, expand=True).convert("RGBA")
        natural = glyph.natural and rng.random() >= self.TINTED
        return replace(glyph, pixels=np.asarray(image.crop(image.getbbox())), natural=natural)


def _rgb(code: str) -> tuple[int, ...]:
    return tuple(int(code[i : i + 2], 16) for i in (1, 3, 5))


def tint(pixels: np.ndarray, colour: str) -> np.ndarray:
    """HxWx4 `pixels` in one colour: luminance mapped to the colour's gradient.

    The glyph's median luminance becomes the colour itself, so that dark and light
    drawings alike come out in a colour that deserves its name.
    """
    light = pixels[..., :3] @ np.array([0.299, 0.587, 0.114])
    inked = light[pixels[..., 3] > 128]
    low, middle, high = np.percentile(inked, [2, 50, 98]) if inked.size else (0, 128, 255)
    # Less than this much contrast is no shading: a flat glyph stays flat.
    low, high = min(low, middle - 60), max(high, middle + 60)
    gradient = np.array([_rgb(code) for code in COLOURS[colour]], dtype=float)
    tinted = np.stack(
        [np.interp(light, [low, middle, high], gradient[:, channel]) for channel in range(3)],
        axis=-1,
    )
    return np.concatenate([tinted.round().astype(np.uint8), pixels[..., 3:]], axis=-1)
