"""The settings in a picture's PNG: complete, and never trusted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from attend_excite import AttendAndExcite, Recipe, StableDiffusion, Subject
from attend_excite.metadata import KEY, Origin, Settings, fingerprint, read_origin, write_png
from attend_excite.methods import METHODS
from attend_excite.pictures import PictureFile

SETTINGS = Settings(
    model="stickers",
    prompt="a [cat] and a [frög]",
    method=AttendAndExcite(Recipe.named("paper"), word_tokens="max"),
    steps=20,
    guidance_scale=7.5,
    height=128,
    width=160,
    dtype="float32",
    device="cpu",
    subjects=(Subject("cat", 0.7), Subject("hat", negated=True)),
)
PICTURE = Image.new("RGB", (8, 8), "teal")


def _here(origin: Origin) -> Origin:
    return replace(origin, threads=torch.get_num_threads())


def test_settings_survive_the_file(tmp_path: Path) -> None:
    origin = Origin(SETTINGS, seed=3, batch=(2, 3))
    write_png(tmp_path / "cat.png", PICTURE, origin)
    assert read_origin(tmp_path / "cat.png") == _here(origin)
    assert not origin.other_versions
    assert [path.name for path in tmp_path.iterdir()] == ["cat.png"]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_survives_the_file(name: str, tmp_path: Path) -> None:
    origin = Origin(replace(SETTINGS, method=METHODS[name]()), seed=0, batch=(0,))
    write_png(tmp_path / "cat.png", PICTURE, origin)
    assert read_origin(tmp_path / "cat.png") == _here(origin)


def test_what_a_picture_was_begun_from_is_known_by_its_pixels(tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "begun.png")
    begun = PictureFile.at(tmp_path / "begun.png")
    settings = replace(SETTINGS, image=begun, strength=0.5)
    write_png(tmp_path / "cat.png", PICTURE, Origin(settings, seed=0, batch=(0,)))
    assert read_origin(tmp_path / "cat.png").settings == settings
    # The same picture with something said of it is the same.
    write_png(tmp_path / "begun.png", PICTURE, Origin(SETTINGS, seed=0, batch=(0,)))
    assert begun.read().tobytes() == PICTURE.tobytes()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "begun.png")
    with pytest.raises(ValueError, match="is another than the one that was drawn with: say with --image"):
        begun.read()
    with pytest.raises(ValueError, match="for a picture to begin from"):
        replace(SETTINGS, strength=0.5)


def test_a_picture_drawn_on_other_threads_is_told_of(tmp_path: Path) -> None:
    here = torch.get_num_threads()
    for threads, told in ((here, None), (here + 1, here + 1), (None, None)):
        origin = Origin(SETTINGS, seed=0, batch=(0,), threads=threads)
        write_png(tmp_path / "cat.png", PICTURE, origin)
        assert read_origin(tmp_path / "cat.png").other_threads == told
    elsewhere = Origin(replace(SETTINGS, device="cuda"), seed=0, batch=(0,), threads=here + 1)
    assert elsewhere.other_threads is None


def test_fingerprints_tell_settings_apart() -> None:
    others = [
        replace(SETTINGS, model="sd-1.4"),
        replace(SETTINGS, steps=21),
        replace(SETTINGS, method=StableDiffusion()),
        replace(SETTINGS, method=AttendAndExcite(Recipe.named("official"), word_tokens="max")),
        replace(SETTINGS, subjects=None),
    ]
    assert len({fingerprint(settings) for settings in [SETTINGS, *others]}) == 6
    assert fingerprint(SETTINGS) == fingerprint(replace(SETTINGS))


def _saved_with(folder: Path, change: dict[str, Any]) -> Path:
    """A PNG whose settings had `change` made to them, by "path.to.the.value"."""
    path = folder / "cat.png"
    write_png(path, PICTURE, Origin(SETTINGS, seed=0, batch=(0,)))
    with Image.open(path) as picture:
        values = json.loads(picture.info[KEY])
    for place, value in change.items():
        *parents, name = place.split(".")
        target = values
        for parent in parents:
            target = target[parent]
        target[name] = value
    chunks = PngInfo()
    chunks.add_itxt(KEY, json.dumps(values))
    PICTURE.save(path, pnginfo=chunks)
    return path


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("format", 99),
        ("seed", -1),
        ("seed", 7),
        ("batch", list(range(1000))),
        ("settings", []),
        ("settings.steps", 10**9),
        ("settings.steps", "50"),
        ("settings.steps", True),
        ("settings.guidance_scale", float("nan")),
        ("settings.guidance_scale", 10**400),
        ("settings.width", 10**6),
        ("settings.dtype", "int8"),
        ("settings.model", None),
        ("settings.prompt", ["a cat"]),
        ("settings.subjects", [{"text": "cat", "target": 7.0}]),
        ("settings.method", {"name": "os.system"}),
        ("settings.method.word_tokens", "all"),
        ("settings.method.unheard", 1),
        ("settings.method.recipe.thresholds", [[0.2, 5.0]]),
        ("settings.method.recipe.thresholds", [[0.2]]),
        ("settings.method.recipe", {"step_size": 1.0}),
    ],
)
def test_nonsense_is_refused(place: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="how it was made cannot be used"):
        read_origin(_saved_with(tmp_path, {place: value}))


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    with pytest.raises(ValueError, match="there is no picture"):
        read_origin(path)
    path.write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    with pytest.raises(ValueError, match="not a PNG picture"):
        read_origin(path)
    PICTURE.save(path)
    with pytest.raises(ValueError, match="does not say how it was made"):
        read_origin(path)
    chunks = PngInfo()
    chunks.add_text(KEY, "{broken")
    PICTURE.save(path, pnginfo=chunks)
    with pytest.raises(ValueError, match="cannot be used"):
        read_origin(path)
