"""The settings in a picture's PNG: complete, and never trusted."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from attend_excite import AttendAndExcite, Recipe, StableDiffusion, Subject
from attend_excite.a1111 import read_weights
from attend_excite.infotext import infotext
from attend_excite.metadata import KEY, Origin, Settings, fingerprint, read_origin, write_png
from attend_excite.methods import METHODS
from attend_excite.models.additions import Addition
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


def test_a_text_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    write_png(tmp_path / "cat.png", PICTURE, Origin(SETTINGS, seed=0, batch=(0,)))
    chunks = PngInfo()
    with Image.open(tmp_path / "cat.png") as picture:
        chunks.add_itxt(KEY, str(picture.info[KEY]).ljust(2**17 + 1))
    PICTURE.save(tmp_path / "cat.png", pnginfo=chunks)
    with pytest.raises(ValueError, match="its length is 131073: it must be at most 131072 characters"):
        read_origin(tmp_path / "cat.png")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_survives_the_file(name: str, tmp_path: Path) -> None:
    origin = Origin(replace(SETTINGS, method=METHODS[name]()), seed=0, batch=(0,))
    write_png(tmp_path / "cat.png", PICTURE, origin)
    assert read_origin(tmp_path / "cat.png") == _here(origin)


def _as_others_read(text: str) -> tuple[str, str, dict[str, str]]:
    """A `parameters` text as the programs that show it take it apart."""
    *lines, last = text.split("\n")
    at = next((at for at, line in enumerate(lines) if line.startswith("Negative prompt: ")), len(lines))
    negative = "\n".join(lines[at:]).removeprefix("Negative prompt: ")
    found = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    values = {name: json.loads(value) if value.startswith('"') else value for name, value in found}
    return "\n".join(lines[:at]), negative, values


def test_other_programs_read_what_a_picture_was_made_with(tmp_path: Path) -> None:
    settings = replace(
        SETTINGS,
        model="checkpoints/dreams.safetensors",
        prompt=r"a [cat] (in a box), \[sic\]",
        negative_prompt="a (dog)",
        subjects=None,
        scheduler="dpm++-karras",
        loras=(Addition("loras/ink.safetensors", "0123456789abcdef", 0.7),),
        image=PictureFile("begun.png", "00"),
        strength=0.5,
    )
    write_png(tmp_path / "cat.png", PICTURE, Origin(settings, seed=3, batch=(3,)))
    with Image.open(tmp_path / "cat.png") as picture:
        prompt, negative, values = _as_others_read(picture.info["parameters"])
    text, lora = prompt.split(" <")
    assert lora == "lora:ink:0.7>"
    # Their brackets are weights: read so, it is the text that was drawn, all of it weighing 1.
    for written, drawn in ((text, "a cat (in a box), [sic]"), (negative, "a (dog)")):
        read = read_weights(written)
        assert (read.text, set(read.weights)) == (drawn, {1.0})
    assert values == {
        "Steps": "20",
        "Sampler": "DPM++ 2M",
        "Schedule type": "Karras",
        "CFG scale": "7.5",
        "Seed": "3",
        "Size": "160x128",
        "Model": "dreams",
        "Denoising strength": "0.5",
        "Lora hashes": "ink: 0123456789",
        "Method": "Attend-and-Excite",
        "Version": f"attend-excite {version('attend-excite')}",
    }
    # Weights that were written for them stay as they are, and so does what has no negative prompt.
    theirs = replace(SETTINGS, prompt="a (cat:1.3)", syntax="a1111", subjects=None)
    lines = infotext(Origin(theirs, seed=0, batch=(0,))).split("\n")
    assert lines[0] == "a (cat:1.3)"
    assert lines[1].startswith("Steps: 20, CFG scale: 7.5, Seed: 0")


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
