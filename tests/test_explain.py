"""Figures that explain a run, from generations and from a picture's metadata."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from attend_excite import (
    AttendAndExcite,
    AttentionReweighting,
    ComposableDiffusion,
    Generation,
    Model,
    Recipe,
    StableDiffusion,
    StructureDiffusion,
)
from attend_excite.cli import app
from attend_excite.explain import (
    animation_frames,
    curves_figure,
    evolution_figure,
    maps_figure,
    save_animation,
)
from attend_excite.metadata import read_origin, write_png

PROMPT, STEPS = "a cat and a dog with a hat", 4
# Nothing reaches 0.9 here, so that the first step is refined.
RECIPE = replace(Recipe.named("official"), thresholds=((0.0, 0.9),), max_refinements=3, temperature=5.0)


@pytest.fixture(scope="module")
def runs(tiny: Model) -> dict[str, Generation]:
    """A demanded, a partly demanded and an unwanted subject, plain and excited."""
    options = {"seeds": [3, 4], "steps": STEPS, "maps": True, "progress": False}
    subjects = ["cat", "dog=0.7", "-hat=0.1"]
    return {
        "plain": tiny.generate(PROMPT, method=StableDiffusion(), **options),
        "excited": tiny.generate(PROMPT, method=AttendAndExcite(RECIPE), subjects=subjects, **options),
    }


def test_sheets_have_a_row_a_run_and_a_column_a_subject(runs: dict[str, Generation]) -> None:
    both, one = maps_figure(runs, image=1), maps_figure({"excited": runs["excited"]}, image=1)
    assert both.height - one.height > 256
    assert both.width > 4 * 256
    # A column a step, for there are fewer than eight, and a row a subject.
    evolution = evolution_figure(runs["excited"])
    assert STEPS * 256 < evolution.width < (STEPS + 2) * 256
    assert evolution.height > 3 * 256


@pytest.mark.parametrize("kind", ["webp", "gif"])
def test_the_animation_has_a_frame_a_step(runs: dict[str, Generation], kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"film.{kind}"
    save_animation(path, animation_frames(runs))
    with Image.open(path) as film:
        assert film.n_frames == STEPS
        assert film.info["loop"] == 0
    assert list(tmp_path.iterdir()) == [path]


def test_curves_are_those_of_the_trace(runs: dict[str, Generation]) -> None:
    attention, measured, losses = curves_figure(runs, RECIPE).axes
    trace = runs["excited"].trace[0]
    updates = [update for step in trace.steps for update in step.updates]
    assert trace.refinements == {0: 3}

    lines = {line.get_label(): line for line in (*attention.lines, *measured.lines)}
    cat = runs["plain"].maps["cat"].values[0].amax(dim=(-2, -1))
    assert list(lines["cat, plain"].get_ydata()) == pytest.approx(cat.tolist())
    assert list(lines["dog, target 0.7"].get_ydata()) == [update.attention["dog"] for update in updates]
    assert list(losses.lines[0].get_ydata()) == [update.loss for update in updates]
    # Four updates between step 0 and step 1, then one a step.
    assert list(losses.lines[0].get_xdata()) == [0, 0.25, 0.5, 0.75, 1]

    texts = {text.get_text().strip() for panel in (measured, losses) for text in panel.texts}
    assert texts == {"≥ 0.9", "≤ 0.1", "+3", "last altered step: 1"}
    levels = {line.get_ydata()[0] for line in measured.lines if line.get_linestyle() == ":"}
    assert levels == {0.7, 0.1}


def test_without_nursing_only_the_attention_is_drawn(tiny: Model) -> None:
    reweighted = tiny.generate(
        "a [cat]", method=AttentionReweighting(), steps=2, maps=True, decode=False, progress=False
    )
    assert len(curves_figure({"": reweighted}).axes) == 1


def test_a_run_without_subjects_or_maps_is_refused(runs: dict[str, Generation], tiny: Model) -> None:
    with pytest.raises(ValueError, match="no run has subjects"):
        maps_figure({"plain": runs["plain"]})
    with pytest.raises(ValueError, match="maps=True"):
        maps_figure({"": tiny.generate("a cat", steps=1, progress=False)})


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of the bundled model, one of a batch of two."""
    folder = tmp_path_factory.mktemp("drawn")
    short = ["--seeds", "2", "--steps", "4"]
    drawn = CliRunner().invoke(app, ["generate", "a cat and a frog", *short, "--out", str(folder), "--json"])
    return Path(json.loads(drawn.stdout)["images"][1]["file"])


def test_a_picture_is_explained_from_its_metadata(picture: Path) -> None:
    result = CliRunner().invoke(app, ["explain", str(picture), "--json"])
    assert result.exit_code == 0, result.output
    assert not result.stderr
    files = {name: Path(file) for name, file in json.loads(result.stdout).items()}
    assert sorted(files) == ["animation", "curves", "evolution", "maps"]
    assert all(file.parent == picture.with_name(f"{picture.stem}_explained") for file in files.values())
    with Image.open(files["animation"]) as film:
        assert (film.format, film.n_frames) == ("WEBP", 4)


def test_a_changed_picture_is_told_of(picture: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed.png"
    write_png(changed, Image.new("RGB", (128, 128), "red"), read_origin(picture))
    result = CliRunner().invoke(app, ["explain", str(changed), "--out", str(tmp_path / "why")])
    assert result.exit_code == 0, result.output
    assert "is not" in result.stderr
    assert "to the bit" in result.stderr
    assert "cat: highest attention at the last step" in result.stdout
    assert "curves.png (how much, step by step" in result.stdout
    assert (tmp_path / "why" / "curves.png").is_file()


def test_a_damaged_picture_is_named_before_anything_is_drawn(picture: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(picture.read_bytes()[:-500])
    result = CliRunner().invoke(app, ["explain", str(damaged), "--out", str(tmp_path / "why")])
    assert result.exit_code == 2
    assert "damaged.png' is damaged" in result.stderr
    assert not (tmp_path / "why").exists()


def test_other_threads_are_told_as_the_cause(picture: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed.png"
    origin = replace(read_origin(picture), threads=torch.get_num_threads() + 1)
    write_png(changed, Image.new("RGB", (128, 128), "red"), origin)
    result = CliRunner().invoke(app, ["explain", str(changed), "--out", str(tmp_path / "why")])
    assert "it was drawn on 2 threads, and here it is on 1 thread" in result.stderr
    assert "by the other number of threads" in result.stderr


def test_a_method_without_subjects_is_explained_by_nursing(picture: Path, tmp_path: Path) -> None:
    origin = read_origin(picture)
    structure = tmp_path / "structure.png"
    settings = replace(origin.settings, method=StructureDiffusion())
    write_png(structure, Image.new("RGB", (128, 128)), replace(origin, settings=settings))
    result = CliRunner().invoke(app, ["explain", str(structure), "--out", str(tmp_path / "why")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "why" / "maps.png").is_file()


def test_figures_find_subjects_by_position_in_their_own_prompt(tiny: Model) -> None:
    prompts = ["a cat and a frog", "an elephant with a sombrero"]
    run = tiny.generate(prompts, subjects=[["cat", "frog"], [5]], steps=2, maps=True, progress=False)
    assert run.prompts[1].groups[0].text == "som"
    assert torch.equal(run.maps.of_tokens([2]).values[0], run.maps.values[0, ..., 2])
    for image in range(2):
        assert maps_figure({"": run}, image).width > 256


def test_a_method_without_maps_is_refused(picture: Path, tmp_path: Path) -> None:
    origin = read_origin(picture)
    parts = tmp_path / "parts.png"
    settings = replace(origin.settings, method=ComposableDiffusion())
    write_png(parts, Image.new("RGB", (128, 128)), replace(origin, settings=settings))
    result = CliRunner().invoke(app, ["explain", str(parts)])
    assert result.exit_code == 2
    assert "no maps of composable" in result.output
