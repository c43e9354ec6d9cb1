"""The bundled judges: found by their names, read by the standard classes, and they see what is drawn.

Pictures are scenes of the generator's drawings, which none of the judges has seen.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from attend_excite import load
from attend_excite.benchmark.metrics.captions import CaptionSimilarity
from attend_excite.benchmark.metrics.clip import Clip
from attend_excite.models import catalogue, source_of
from attend_excite.models.judge import Judge, pixels
from training.captions import Mention, spoken
from training.clip import code, fits
from training.glyphs import COLOURS, SUBJECTS, GlyphBox, generator_glyphs
from training.judge import drawn_together, even_thresholds
from training.scenes import Scene, draw_scene

SEED = 77


def better_than_guessing(right: int, asked: int, chance: float) -> bool:
    """Whether guessing is as good less than once in a hundred times."""
    return binomtest(right, asked, chance, alternative="greater").pvalue < 0.01


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    """The first 16 with a single sticker in a colour that a caption names."""
    box = GlyphBox(generator_glyphs())
    drawn = (draw_scene(box, SEED, index, held_out=False) for index in range(120))
    return [scene for scene in drawn if len(scene.subjects) == 1 and scene.colours[0]][:16]


@pytest.fixture(scope="module")
def images(scenes: list[Scene]) -> list[Image.Image]:
    return [Image.fromarray(scene.image) for scene in scenes]


@pytest.fixture(scope="module")
def clip() -> Clip:
    return Clip("stickers-clip")


def test_judges_have_names_and_folders_but_draw_nothing() -> None:
    kinds = {name: entry.kind for name, entry in catalogue().items() if entry.kind != "generator"}
    assert kinds == {"stickers-clip": "clip", "stickers-captioner": "captioner", "stickers-judge": "judge"}
    for name in kinds:
        assert (source_of(name) / "README.md").is_file()
        with pytest.raises(ValueError, match=f"'{name}' looks at pictures"):
            load(name)
    assert source_of("openai/clip-vit-base-patch16") == "openai/clip-vit-base-patch16"


@pytest.mark.parametrize(
    ("name", "cls"), [("stickers-clip", AutoModel), ("stickers-captioner", AutoModelForImageTextToText)]
)
def test_standard_classes_read_them_whole(name: str, cls: type) -> None:
    model, report = cls.from_pretrained(source_of(name), output_loading_info=True)
    assert not any(report.values())
    assert all(value.isfinite().all() for value in model.state_dict().values())
    AutoProcessor.from_pretrained(source_of(name))


@torch.no_grad()
def test_judge_finds_the_sticker_and_its_colour(scenes: list[Scene], images: list[Image.Image]) -> None:
    judge = Judge.load(source_of("stickers-judge"))
    assert (judge.subjects, judge.colours) == (SUBJECTS, list(COLOURS))
    seen = judge(pixels(images))
    found = coloured = 0
    for scene, scores, colours in zip(scenes, seen.scores, seen.colours, strict=True):
        at = SUBJECTS.index(scene.subjects[0])
        found += bool(scores[at] >= judge.thresholds[at])
        coloured += judge.colours[colours[at, :-1].argmax()] == scene.colours[0]
    assert min(found, coloured) >= 12


@torch.no_grad()
def test_judge_sees_as_much_in_a_mirror(images: list[Image.Image]) -> None:
    judge = Judge.load(source_of("stickers-judge"))
    pictures = pixels(images)
    seen, mirrored = judge(pictures), judge(pictures.flip(3))
    torch.testing.assert_close(seen.scores, mirrored.scores)
    torch.testing.assert_close(seen.colours, mirrored.colours)


def test_each_threshold_lets_as_many_false_alarms_pass() -> None:
    """Even where one subject's scores are ten times as high as another's."""
    rng = np.random.default_rng(0)
    present = rng.random((4000, 3)) < 0.2
    scores = (present * 0.4 + 0.5 * rng.random(present.shape)) * [1.0, 0.3, 0.1]
    alarms = [
        (scores[~present[:, s], s] >= threshold).mean()
        for s, threshold in enumerate(even_thresholds(scores, present))
    ]
    assert 0 < max(alarms) < 0.1
    assert np.ptp(alarms) < 0.002


def test_thresholds_drawn_together_keep_their_mean_and_half_their_spread() -> None:
    thresholds = np.array([0.05, 0.2, 0.8])
    before, after = np.log(thresholds), np.log(drawn_together(thresholds))
    assert after.mean() == pytest.approx(before.mean())
    np.testing.assert_allclose(after - after.mean(), (before - before.mean()) / 2, atol=1e-12)


def test_words_are_true_false_or_neither() -> None:
    """A part of what is there is not false, nor is it all of it; a wrong colour is false."""
    car, bowl, cat = Mention("car", "red"), Mention("bowl", "blue"), Mention("cat", None)
    texts = [[car, cat], [cat], [Mention("car", "blue"), cat], [car, cat, bowl], [car, Mention("cat", "red")]]
    true, neither = fits(code([car, cat])[None], np.stack([code(mentions) for mentions in texts]))
    assert true[0].tolist() == [True, False, False, False, False]
    assert neither[0].tolist() == [False, True, False, False, True]


@torch.no_grad()
def test_clip_prefers_the_true_words(clip: Clip, scenes: list[Scene], images: list[Image.Image]) -> None:
    """The sticker itself before other subjects in its colour, and before itself in other colours.

    The small CLIP is weak at tinted objects: there it must be better than guessing."""
    pictures = clip.images(images)
    subject_right = colour_right = 0
    for scene, picture in zip(scenes, pictures, strict=True):
        (subject,), (colour,) = scene.subjects, scene.colours
        subjects = clip.texts([f"a {colour} {name}" for name in SUBJECTS])
        colours = clip.texts([f"a {name} {subject}" for name in COLOURS])
        subject_right += SUBJECTS[(subjects @ picture).argmax()] == subject
        colour_right += list(COLOURS)[(colours @ picture).argmax()] == colour
    assert colour_right >= 12
    assert better_than_guessing(subject_right, len(scenes), 1 / len(SUBJECTS))


@torch.no_grad()
def test_clip_knows_texts_by_what_they_say(clip: Clip) -> None:
    """The templates change less than a subject or a colour does."""
    pair, same, one, other = clip.texts(
        ["a cat and a red car", "itap of a red car and a cat.", "a cat", "a cat and a blue car"]
    )
    assert pair @ same > max(pair @ one, pair @ other)


@torch.no_grad()
def test_captioner_names_the_sticker(clip: Clip, scenes: list[Scene], images: list[Image.Image]) -> None:
    """By its colour and its name, both right in a third of them at the least."""
    captions = CaptionSimilarity("stickers-captioner", clip).captions(images)
    wanted = [
        spoken([Mention(scene.subjects[0], scene.colours[0])], scene.background).split()[:3]
        for scene in scenes
    ]
    right = sum(text.split()[:3] == words for text, words in zip(captions, wanted, strict=True))
    assert right >= 6
