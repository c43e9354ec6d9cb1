"""Scores against hand-computed cases, their models as tiny random ones; statistics against closed forms."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from transformers import (
    BertConfig,
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    CLIPVisionConfig,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
    SwinConfig,
)
from transformers.models.owlv2.modeling_owlv2 import Owlv2ObjectDetectionOutput
from typer.testing import CliRunner

pytest.importorskip("pyarrow", reason="the benchmark's extra is not installed")

from attend_excite.benchmark import statistics, store
from attend_excite.benchmark.metrics import (
    CaptionSimilarity,
    Clip,
    ClipSimilarity,
    DetectedPresence,
    GenEval,
    JudgedPresence,
    Metric,
    VqaScore,
)
from attend_excite.benchmark.metrics.base import signature
from attend_excite.benchmark.metrics.clip import fill, sub_prompts, templates
from attend_excite.benchmark.metrics.presence import colour_of, verdict
from attend_excite.benchmark.metrics.vqa import chance_of_yes
from attend_excite.benchmark.score import (
    PAPER,
    STICKERS,
    UPPER_BOUND,
    judges_for,
    score,
    score_real_images,
)
from attend_excite.cli import app
from attend_excite.models.judge import Judge

_SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "picture", "of", "cat", "dog", "red", ".", "and"]
_CHAT = (
    "{% for part in messages[0]['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}{% endfor %} answer:"
)
_ROWS = [
    {"job": "a" * 16, "prompt": "a cat and a red dog", "subjects": ["cat", "dog"]},
    {"job": "b" * 16, "prompt": "a cat with a crown", "subjects": ["cat", "crown"]},
]
_SQUARE = {"height": 32, "width": 32}


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [Image.new("RGB", (48, 32), "crimson"), Image.linear_gradient("L").resize((48, 32)).convert("RGB")]


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory, tokenizer: CLIPTokenizer) -> str:
    config = CLIPConfig(
        text_config={**_SMALL, "vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407},
        vision_config={**_SMALL, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    pixels = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=_SQUARE)
    return _saved(tmp_path_factory, CLIPModel, config, CLIPProcessor(pixels, tokenizer))


@pytest.fixture(scope="module")
def clip(tiny_clip: str) -> Clip:
    return Clip(tiny_clip)


class _Compass:
    """Stands for CLIP: a few texts with known directions in the plane; images look east."""

    wording, described = "official", "compass, official wording"
    directions: ClassVar = {
        "a cat and a red dog": (0.6, 0.8),
        "a cat": (1.0, 0.0),
        "a red dog": (0.0, 1.0),
        "a cat with a crown": (0.8, -0.6),
        "a crown": (-1.0, 0.0),
    }

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        return torch.tensor([[1.0, 0.0]] * len(images))

    def prompt(self, prompt: str) -> Tensor:
        return torch.tensor(self.directions[prompt])


def test_templates_as_in_the_authors_code_and_in_english() -> None:
    official = {fill(template, "a cat and a dog", "official") for template in templates()}
    assert len(templates()) == 80
    assert len(official) == 56
    assert "a photo of the hard to see a cat and a dog." in official

    def filled(template: str, prompt: str) -> str:
        assert template in templates()
        return fill(template, prompt, "paper")

    assert len({fill(template, "a cat and a dog", "paper") for template in templates()}) == 80
    assert filled("a photo of a clean {}.", "a cat and a dog") == "a photo of a clean cat and a dog."
    assert (
        filled("a photo of the {}.", "a apple and a orange bow") == "a photo of the apple and an orange bow."
    )
    assert filled("a origami {}.", "a apple") == "an origami apple."
    assert filled("a photo of a {}.", "a apple") == "a photo of an apple."
    assert filled("a photo of a dirty {}.", "yellow glasses") == "a photo of dirty yellow glasses."
    assert filled("a photo of many {}.", "a cat") == "a photo of many a cat."


@pytest.mark.parametrize(
    ("prompt", "subjects", "official", "paper"),
    [
        ("a cat and a dog", ["cat", "dog"], ["a cat", "a dog"], ["a cat", "a dog"]),
        (
            "a red car and a blue bow",
            ["car", "bow"],
            ["a red car", "a blue bow"],
            ["a red car", "a blue bow"],
        ),
        ("a cat with a bow", ["cat", "bow"], ["a cat", "a bow"], ["a cat", "a bow"]),
        ("a lion", ["lion"], ["a lion"], ["a lion"]),
        (
            "a cat next to a dog and a bird",
            ["cat", "dog", "bird"],
            ["a cat next to a dog", "a bird"],
            ["a cat", "a dog", "a bird"],
        ),
    ],
)
def test_sub_prompts_keep_colours(
    prompt: str, subjects: list[str], official: list[str], paper: list[str]
) -> None:
    assert sub_prompts(prompt, subjects, "official") == official
    assert sub_prompts(prompt, subjects, "paper") == paper


def test_clip_averages_unit_vectors_over_the_templates(clip: Clip, pictures: list[Image.Image]) -> None:
    texts = clip.texts([fill(template, "a cat", "official") for template in templates()])
    assert torch.allclose(texts.norm(dim=-1), torch.ones(80))
    assert torch.allclose(clip.prompt("a cat"), normalize(texts.sum(dim=0), dim=0), atol=1e-6)
    assert clip.images(pictures).shape == (2, 8)


def test_similarities_by_hand(pictures: list[Image.Image]) -> None:
    first, second = _judged(ClipSimilarity(_Compass()), pictures)  # type: ignore[arg-type]
    assert first["full"] == pytest.approx(0.6)
    assert first["objects"] == pytest.approx([1.0, 0.0])
    assert first["minimum"] == pytest.approx(0.0)
    assert second["full"] == pytest.approx(0.8)
    assert second["minimum"] == pytest.approx(-1.0)


def test_captions_are_compared_without_the_words_they_all_begin_with(
    tmp_path_factory: pytest.TempPathFactory, clip: Clip, pictures: list[Image.Image]
) -> None:
    text = {"vocab_size": len(_WORDS), "encoder_hidden_size": 16, "max_position_embeddings": 64}
    ends = {"pad_token_id": 0, "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3}
    config = BlipConfig(
        text_config={**_SMALL, **text, **ends}, vision_config={**_SMALL, "image_size": 32, "patch_size": 16}
    )
    processor = BlipProcessor(BlipImageProcessor(size=_SQUARE), _bert())
    metric = CaptionSimilarity(
        _saved(tmp_path_factory, BlipForConditionalGeneration, config, processor), clip
    )
    scores = _judged(metric, pictures)
    assert [one["caption"] for one in scores] == metric.captions(pictures)
    for row, one in zip(_ROWS, scores, strict=True):
        assert not one["caption"].startswith("a picture of")
        by_hand = float(clip.texts([one["caption"]])[0] @ clip.prompt(row["prompt"]))
        assert one["similarity"] == pytest.approx(by_hand, abs=1e-5)


def test_verdict_by_hand() -> None:
    assert colour_of("bowl", "a dog and a yellow bowl") == "yellow"
    assert colour_of("bow", "a dog and a yellow bowl") is None
    assert colour_of("dog", "a dog and a yellow bowl") is None
    assert colour_of("yellow bowl", "a dog and a yellow bowl") == "yellow"
    assert colour_of("big Yellow bowl", "a dog and a big Yellow bowl") == "yellow"
    assert colour_of("orange", "an orange and a dog") is None
    fine = verdict([0.9, 0.8], [True, True], [None, True])
    assert (fine["neglected"], fine["miscoloured"], fine["right"]) == (False, False, True)
    wrong = verdict([0.9, 0.8], [True, True], [None, False])
    assert (wrong["neglected"], wrong["miscoloured"], wrong["right"]) == (False, True, False)
    # The colour of what isn't there is nobody's fault.
    missing = verdict([0.9, 0.1], [True, False], [None, False])
    assert (missing["neglected"], missing["miscoloured"], missing["right"]) == (True, False, False)


def test_presence_judge_compares_scores_with_its_thresholds(
    tmp_path: Path, pictures: list[Image.Image]
) -> None:
    judge = Judge(["cat", "dog", "crown"], ["red", "blue"], width=4)
    judge.get_buffer("thresholds").copy_(torch.tensor([0.0, 1.1, 0.0]))
    # Red's logit is far above all others.
    judge.colour_head.bias.data.copy_(torch.tensor([50.0, 0.0, 0.0]))
    judge.save(tmp_path)
    first, second = _judged(JudgedPresence(str(tmp_path)), pictures)
    assert first["present"] == [True, False]
    assert first["coloured"] == [None, True]
    assert second["present"] == [True, True]
    assert second["right"]

    metric = JudgedPresence(str(tmp_path))
    for prompt, subjects, present, coloured in (
        ("a blue dog and a Cat", ["blue dog", "Cat"], [False, True], [False, None]),
        ("a red big Cat", ["big Cat"], [True], [True]),
        ("a Blue Cat", ["Cat"], [True], [False]),
        # Which of two is which isn't known.
        ("a red cat and a blue cat", ["cat", "cat"], [True, True], [None, None]),
        # Without a verdict.
        ("a cat and a van", ["cat", "van"], None, None),
        ("a cat", [], None, None),
    ):
        metric.update(pictures[:1], [{"job": "", "prompt": prompt, "subjects": subjects}])
        (found,) = metric.compute()
        assert (found["present"], found["coloured"]) == (present, coloured)
    assert dict(metric.unjudged) == {"it doesn't know van": 1, "no subject named": 1}


def _owl(tokenizer: CLIPTokenizer) -> tuple[Any, ...]:
    config = Owlv2Config(
        text_config={**_SMALL, "vocab_size": 49408, "max_position_embeddings": 16},
        vision_config={**_SMALL, "image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    return Owlv2ForObjectDetection, config, Owlv2Processor(Owlv2ImageProcessor(size=_SQUARE), tokenizer)


def _dino(_: CLIPTokenizer) -> tuple[Any, ...]:
    config = GroundingDinoConfig(
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=4,
        num_feature_levels=2,
        max_text_len=16,
        backbone_config=SwinConfig(
            image_size=32, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2, out_indices=[1, 2]
        ),
        text_config=BertConfig(**_SMALL, vocab_size=len(_WORDS)),
    )
    images = GroundingDinoImageProcessor(size={"shortest_edge": 32, "longest_edge": 48})
    return GroundingDinoForObjectDetection, config, GroundingDinoProcessor(images, _bert())


@pytest.mark.parametrize("parts", [_owl, _dino])
def test_detectors_give_a_verdict_on_every_subject(
    parts: Callable[[CLIPTokenizer], tuple[Any, ...]],
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: CLIPTokenizer,
    clip: Clip,
    pictures: list[Image.Image],
) -> None:
    scores = _judged(DetectedPresence(_saved(tmp_path_factory, *parts(tokenizer)), clip), pictures)
    for one in scores:
        assert one["present"] == [confidence >= 0.3 for confidence in one["scores"]]
        assert all(0 <= confidence <= 1 for confidence in one["scores"])
    assert scores[0]["coloured"][0] is None
    assert scores[0]["coloured"][1] in (True, False)


@pytest.mark.parametrize("subjects", [[], None])
def test_detector_gives_no_verdict_without_subjects(
    subjects: list[str] | None,
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: CLIPTokenizer,
    clip: Clip,
    pictures: list[Image.Image],
) -> None:
    metric = DetectedPresence(_saved(tmp_path_factory, *_owl(tokenizer)), clip)
    metric.update(pictures, [_ROWS[0], {"job": "c", "prompt": "running", "subjects": subjects}])
    judged, unjudged = metric.compute()
    assert judged["present"] is not None
    assert unjudged == dict.fromkeys(judged) | {"job": "c", "scored_by": metric.scored_by}
    assert dict(metric.unjudged) == {"no subject named": 1}


class _Boxes:
    """Stands for a detector: two boxes in each image, of which the first text finds one and the second the
    other, in parts of the square that the processor pads the image to."""

    device, dtype = torch.device("cpu"), torch.float32

    def __call__(self, input_ids: Tensor, **_: Tensor) -> Owlv2ObjectDetectionOutput:
        left, right = [0.25, 0.25, 0.5, 0.5], [0.75, 0.25, 0.5, 0.5]
        chances = torch.tensor([[[0.8], [0.1]], [[0.2], [0.29]]])
        return Owlv2ObjectDetectionOutput(
            logits=chances.logit()[: len(input_ids)],
            pred_boxes=torch.tensor([[left, right]] * len(input_ids)),
        )


class _ByMean(DetectedPresence):
    """Names a crop's colour by its mean, where the other names it by CLIP."""

    def colour(self, crop: Image.Image, subject: str) -> str:
        red, _, blue = np.asarray(crop).mean(axis=(0, 1))
        assert min(red, blue) == 0  # The box is that of one half, to the pixel.
        return "red" if red > blue else "blue"


def test_detector_by_hand(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: CLIPTokenizer, clip: Clip
) -> None:
    metric = _ByMean(_saved(tmp_path_factory, *_owl(tokenizer)), clip)
    metric._model = _Boxes()
    image = Image.new("RGB", (48, 24), "red")
    image.paste(Image.new("RGB", (24, 24), "blue"), (24, 0))
    prompts = {"a red car and a blue bowl": True, "a blue car and a red bowl": False}
    rows = [{"job": "", "prompt": prompt, "subjects": ["car", "bowl"]} for prompt in prompts]
    metric.update([image] * 2, rows)
    for found, right in zip(metric.compute(), prompts.values(), strict=True):
        assert found["scores"] == pytest.approx([0.8, 0.29])
        assert found["present"] == [True, False]
        assert found["coloured"] == [right, right]
        assert (found["neglected"], found["miscoloured"], found["right"]) == (True, not right, False)
    metric.update([image], [{"job": "", "prompt": "a red car", "subjects": ["red car"]}])
    assert metric.compute()[0]["right"]


def test_genevals_verdict_by_hand(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: CLIPTokenizer, clip: Clip
) -> None:
    detector = _ByMean(_saved(tmp_path_factory, *_owl(tokenizer)), clip)
    detector._model = _Boxes()
    image = Image.new("RGB", (48, 24), "red")
    image.paste(Image.new("RGB", (24, 24), "blue"), (24, 0))
    wanted = [
        {"include": [{"class": "car", "color": "red"}]},
        {"include": [{"class": "car", "color": "blue"}]},
        {"include": [{"class": "car"}, {"class": "bowl"}]},  # of which it is not sure enough
        {"include": [{"class": "car", "count": 2}]},
    ]
    metric = GenEval(detector)
    rows = [{"job": "", "wanted": json.dumps(each)} for each in wanted]
    metric.update([image] * 5, [*rows, {"job": "", "wanted": None}])
    assert [score["right"] for score in metric.compute()] == [True, False, False, False, None]


def test_chance_of_yes_by_hand(tokenizer: CLIPTokenizer) -> None:
    yes, no = (tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("yes", "no"))
    logits = torch.full((2, 49408), -torch.inf)
    logits[0, [yes, no]] = torch.tensor([3.0, 1.0]).log()
    logits[1, no] = 0.0
    assert chance_of_yes(logits, tokenizer).tolist() == pytest.approx([0.75, 0.0])


def test_vqa_asks_about_the_whole_prompt(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: CLIPTokenizer, pictures: list[Image.Image]
) -> None:
    words = CLIPTokenizer.from_pretrained(tokenizer.name_or_path, model_max_length=77)
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_SMALL, image_size=32, patch_size=16),
        text_config=LlamaConfig(**_SMALL, vocab_size=len(words), num_key_value_heads=2),
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=_SQUARE),
        words,
        patch_size=16,
        vision_feature_select_strategy="default",
        chat_template=_CHAT,
        num_additional_image_tokens=1,
    )
    metric = VqaScore(_saved(tmp_path_factory, LlavaForConditionalGeneration, config, processor))
    together = [one["yes"] for one in _judged(metric, pictures)]
    alone = []
    for picture, row in zip(pictures, _ROWS, strict=True):
        metric.update([picture], [row])
        alone.append(metric.compute()[0]["yes"])
    assert together == pytest.approx(alone, rel=1e-4)
    assert all(0 < chance < 1 for chance in together)


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be loaded to judge images"):
        Clip(str(tmp_path))


class _Brightness(Metric):
    """Counts what it is shown."""

    name = "brightness"

    def __init__(self, scored_by: str) -> None:
        super().__init__(scored_by)
        self.seen: list[str] = []

    def _judge(self, images: Sequence[Image.Image], rows: Sequence[Any]) -> list[dict[str, Any]]:
        self.seen += [row["job"] for row in rows]
        return [{"value": float(np.asarray(image).mean())} for image in images]


def test_scores_are_made_once_and_black_images_left_out(tmp_path: Path) -> None:
    store.write_settings(tmp_path, {"model": "x"})
    rows = [_written(tmp_path, number) for number in range(5)]
    rows[3]["nsfw"] = True
    rows[4] |= {"image": None, "error": "out of memory"}
    store.write_rows(tmp_path, rows[:2])
    first = _Brightness("one")
    assert score(tmp_path, [first], batch_size=1).scored == 2

    store.write_rows(tmp_path, rows[2:])
    again, other = _Brightness("one"), _Brightness("other")
    tally = score(tmp_path, [again], batch_size=2)
    assert again.seen == [rows[2]["job"]]
    assert (tally.scored, tally.before, tally.nsfw, tally.failed) == (1, 2, 1, 1)
    values = {row["job"]: row["value"] for row in store.read_scores(tmp_path, "brightness").to_pylist()}
    assert values == {row["job"]: 10.0 * number for number, row in enumerate(rows[:3])}

    score(tmp_path, [other], batch_size=2)
    assert len(other.seen) == 3
    with pytest.raises(ValueError, match="no benchmark run"):
        score(tmp_path / "elsewhere", [first])


def test_an_image_whose_file_is_gone_is_left_unjudged(tmp_path: Path) -> None:
    store.write_settings(tmp_path, {"model": "x"})
    rows = [_written(tmp_path, number) for number in range(3)]
    store.write_rows(tmp_path, rows)
    (tmp_path / rows[1]["image"]).unlink()
    metric = _Brightness("one")
    with pytest.warns(UserWarning, match="1 picture is gone or broken.*images/.*benchmark run as before"):
        tally = score(tmp_path, [metric], batch_size=2)
    assert metric.seen == [rows[0]["job"], rows[2]["job"]]
    assert (tally.scored, tally.before, tally.missing) == (2, 0, 1)
    # Drawn again, it is judged; what is gone after that needs no judging.
    _written(tmp_path, 1)
    (tmp_path / rows[0]["image"]).unlink()
    tally = score(tmp_path, [metric], batch_size=2)
    assert (tally.scored, tally.before, tally.missing) == (1, 2, 0)


def test_a_broken_picture_and_a_broken_table_stop_nobody(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    store.write_settings(tmp_path, {"model": "x"})
    rows = [_written(tmp_path, number) for number in range(3)]
    store.write_rows(tmp_path, rows)
    score(tmp_path, [_Brightness("one")], batch_size=3)
    (scores,) = (tmp_path / "scores" / "brightness").iterdir()
    scores.write_bytes(scores.read_bytes()[:-9])
    broken = tmp_path / rows[1]["image"]
    broken.write_bytes(broken.read_bytes()[:40])
    tally = score(tmp_path, [_Brightness("one")], batch_size=3)
    said = " ".join(str(warning.message) for warning in recwarn)
    assert f"{scores.name}' of '{tmp_path}' cannot be read: it is set aside" in said
    assert f"1 picture is gone or broken, so nobody could judge them ({rows[1]['image']})" in said
    assert (tally.scored, tally.missing) == (2, 1)
    # Set aside, so that a run draws it again.
    assert not broken.exists()
    assert store.image_sizes(tmp_path).keys() == {rows[0]["job"], rows[2]["job"]}


def test_a_score_is_of_the_picture_that_was_there(tmp_path: Path) -> None:
    store.write_settings(tmp_path, {"model": "x", "systems": {}, "prompts": {}})
    rows = [_written(tmp_path, number) for number in range(2)]
    store.write_rows(tmp_path, [row | {"digest": "first", "subset": ""} for row in rows])
    score(tmp_path, [_Brightness("one")])
    assert score(tmp_path, [_Brightness("one")]).scored == 0
    store.write_rows(tmp_path, [rows[0] | {"digest": "second", "subset": "", "attempt": 1}])
    tally = score(tmp_path, [_Brightness("one")])
    assert (tally.scored, tally.before) == (1, 1)
    found = {row["job"]: row for row in store.read_scores(tmp_path, "brightness").to_pylist()}
    assert (found[rows[0]["job"]]["digest"], found[rows[1]["job"]]["digest"]) == ("second", "first")


def test_a_folder_of_ones_own_is_another_judge_with_other_files(tmp_path: Path) -> None:
    judge = Judge(["cat"], ["red"], width=4)
    judge.save(tmp_path)
    before = JudgedPresence(str(tmp_path)).scored_by
    assert before == JudgedPresence(str(tmp_path)).scored_by
    judge.get_buffer("thresholds").add_(0.1)
    judge.save(tmp_path)
    assert JudgedPresence(str(tmp_path)).scored_by != before
    # So is the bundled one of another version.
    assert re.fullmatch(r"stickers-judge \([0-9a-f]{8}\)", JudgedPresence("stickers-judge").scored_by)
    assert signature("openai/clip-vit-base-patch16") == "openai/clip-vit-base-patch16"


def test_upper_bound_from_a_folder_of_real_images(
    tmp_path: Path, clip: Clip, pictures: list[Image.Image]
) -> None:
    for number, picture in enumerate(pictures):
        (tmp_path / "real" / "cat").mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / "real" / "cat" / f"{number}.png")
    score_real_images(tmp_path, clip, tmp_path / "real")
    (row,) = store.read_scores(tmp_path, UPPER_BOUND).to_pylist()
    by_hand = float((clip.images(pictures) @ clip.prompt("a cat")).mean())
    assert (row["job"], row["images"]) == ("cat", 2)
    assert row["similarity"] == pytest.approx(by_hand, abs=1e-6)
    with pytest.raises(ValueError, match="has no images"):
        score_real_images(tmp_path, clip, tmp_path / "real" / "cat")
    for command in (["--real", str(tmp_path / "none")], ["--real", str(tmp_path / "real" / "cat" / "0.png")]):
        result = CliRunner().invoke(app, ["benchmark", "score", str(tmp_path), *command])
        assert result.exit_code == 2
        assert "there is no folder" in " ".join(result.stderr.split())


def test_a_device_that_is_not_here_is_one_sentence(tmp_path: Path) -> None:
    store.write_settings(tmp_path, {"model": "stickers"})
    missing = "abacus" if torch.cuda.is_available() else "cuda"
    result = CliRunner().invoke(app, ["benchmark", "score", str(tmp_path), "--device", missing])
    assert result.exit_code == 2
    assert f"the device '{missing}' is not here" in " ".join(result.stderr.split())


def test_the_bundled_judges_are_for_the_bundled_models() -> None:
    assert judges_for("stickers") == judges_for("stickers-joint") == STICKERS
    assert judges_for("sd-1.4") == judges_for("some/model") == PAPER
    assert STICKERS.replaced({"judge": "none", "vqa": "v", "clip": None}).judge is None
    with pytest.raises(ValueError, match="need CLIP"):
        STICKERS.replaced({"clip": "none"})
    with pytest.raises(ValueError, match="nobody is left to judge"):
        STICKERS.replaced(dict.fromkeys(("clip", "captioner", "judge"), "none"))


def test_averages_are_of_prompts_and_not_of_images() -> None:
    prompt = np.array([0, 0, 0, 1, 2])
    values = np.array([1.0, 1.0, 1.0, 5.0, np.nan])
    averages = statistics.per_prompt(prompt, values, 3)
    assert averages[:2].tolist() == [1.0, 5.0]
    assert np.isnan(averages[2])
    assert statistics.mean(averages).value == 3.0


def test_relative_difference_is_of_the_means() -> None:
    ours, theirs = np.array([0.4, 0.8, np.nan, 0.9]), np.array([0.5, 1.0, 7.0, np.nan])
    found = statistics.relative_difference(ours, theirs)
    assert found.value == pytest.approx(-20.0)
    # Each prompt is a fifth below: no resample can say otherwise.
    assert (found.low, found.high) == pytest.approx((-20.0, -20.0))
    assert found.excludes(0.0)
    assert statistics.difference(ours, theirs).value == pytest.approx(-0.15)


def test_interval_is_that_of_the_mean_and_covers_it() -> None:
    rng = np.random.default_rng(0)
    found = statistics.mean(rng.normal(size=400))
    # The normal interval of a mean of 400: 1.96 / 20 to either side.
    assert found.high - found.low == pytest.approx(2 * 1.96 / 20, rel=0.1)
    covers = [not statistics.mean(rng.normal(size=60)).excludes(0.0) for _ in range(150)]
    assert 0.88 <= np.mean(covers) <= 0.99


def test_chance_of_order() -> None:
    scores = np.array([0.1, 0.4, 0.35, 0.8])
    better = np.array([False, False, True, True])
    assert statistics.chance_of_order(scores, better) == 0.75  # 3 of 4 pairs are in order
    assert statistics.chance_of_order(scores, ~better) == 0.25
    assert np.isnan(statistics.chance_of_order(scores, np.ones(4, dtype=bool)))
    # Within prompts: each in perfect order, though not across them.
    prompts = np.array([0, 0, 1, 1])
    alike = np.zeros(4, dtype=np.int64)
    scores, better = np.array([0.1, 0.2, 0.8, 0.9]), np.array([False, True, False, True])
    assert statistics.chance_of_order_within(prompts, alike, scores, better).value == 1.0
    # One prompt by two systems: in order within each; across them the one with the low scores is right.
    one, systems = np.zeros(6, dtype=np.int64), np.array([0, 0, 0, 1, 1, 1])
    scores = np.array([0.1, 0.2, 0.3, 0.7, 0.8, 0.9])
    better = np.array([False, True, True, False, False, True])
    assert statistics.chance_of_order_within(one, systems, scores, better).value == 1.0
    assert statistics.chance_of_order_within(one, 0 * systems, scores, better).value == pytest.approx(5 / 9)


def test_one_prompt_is_not_sure_of_anything() -> None:
    one = np.array([0.5, np.nan])
    for found in (
        statistics.mean(one),
        statistics.difference(one, np.array([0.1, 0.1])),
        statistics.relative_difference(one, np.array([0.1, 0.1])),
    ):
        assert np.isfinite(found.value)
        assert np.isnan([found.low, found.high]).all()
        assert not found.excludes(0.0)


def _judged(metric: Metric, pictures: list[Image.Image]) -> list[dict[str, Any]]:
    metric.update(pictures, _ROWS)
    scores = metric.compute()
    assert [one["job"] for one in scores] == [row["job"] for row in _ROWS]
    assert metric.compute() == []
    return scores


def _written(run: Path, number: int) -> dict[str, Any]:
    job = f"{number:016x}"
    grey = (10 * number,) * 3
    path = store.write_png(run, job, store.png_bytes(Image.new("RGB", (4, 4), grey)))
    return {"job": job, "prompt": "a cat", "image": path, "nsfw": False}


def _bert() -> BertTokenizer:
    return BertTokenizer(vocab={word: at for at, word in enumerate(_WORDS)})


def _saved(factory: pytest.TempPathFactory, kind: Any, config: Any, processor: Any) -> str:
    torch.manual_seed(0)
    folder = factory.mktemp(kind.__name__)
    kind(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)
