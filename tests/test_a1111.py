"""Prompts in A1111's syntax: what is read, what becomes of the embeddings, and where the subjects are."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CLIPTokenizer
from typer.testing import CliRunner

from attend_excite import (
    AttendAndExcite,
    ComposableDiffusion,
    Model,
    Recipe,
    StableDiffusion,
    StructureDiffusion,
    load,
)
from attend_excite.a1111 import read_weights
from attend_excite.cli import app
from attend_excite.columns import tables_of
from attend_excite.generate import _encode
from attend_excite.methods.base import Run
from attend_excite.subjects import parse
from tests.families import FAMILIES, hurried, ready
from tests.test_families import model_of

LONG = "a red cat, " + ", ".join(["very small"] * 30) + ", a green frog"


def _pieces(prompt: str) -> list[tuple[str, float]]:
    read = read_weights(prompt)
    runs = groupby(zip(read.text, read.weights, strict=True), key=lambda pair: pair[1])
    return [("".join(letter for letter, _ in run), pytest.approx(weight)) for weight, run in runs]


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("normal text", [("normal text", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("((cat)) [frog]", [("cat", 1.21), (" ", 1), ("frog", 1 / 1.1)]),
        ("(cat:1.3) and (frog : 0.5 )", [("cat", 1.3), (" and ", 1), ("frog ", 0.5)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\] \\", [("(literal] \\", 1)]),
        (r"smile \o/ \[cat|dog\] \[cat:0.5]", [("smile o/ [cat|dog] [cat:0.5]", 1)]),
        ("[(blurry:1.2), 1990]", [("blurry", 1.2 / 1.1), (", 1990", 1 / 1.1)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("at 12:30) a cat", [("at 12:30) a cat", 1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1),
                ("house", 1.573),
                (" ", 1.1),
                ("on", 1),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641),
                (".", 1.1),
            ],
        ),
    ],
)
def test_weights_are_read_as_a1111_reads_them(prompt: str, pieces: list[tuple[str, float]]) -> None:
    assert _pieces(prompt) == pieces


@pytest.mark.parametrize("part", [":", "[a:1", "[ 1:", "|", "(a:1.2), "])
def test_a_long_prompt_is_read_at_once(part: str) -> None:
    began = time.monotonic()
    with suppress(ValueError):
        read_weights("[" + part * 2000)
    assert time.monotonic() - began < 5


def _chunks(prompt: str, tokenizer: CLIPTokenizer) -> list[str]:
    return [tokenizer.decode(chunk.ids) for chunk in parse(prompt, tokenizer, (), "a1111").chunks]


def test_texts_are_laid_into_chunks_of_75(tokenizer: CLIPTokenizer) -> None:
    words = ["cat"] * 80
    assert _chunks(" ".join(words), tokenizer) == [" ".join(words[:75]), " ".join(words[:5])]
    assert _chunks("a cat BREAK a frog", tokenizer) == ["a cat", "a frog"]
    assert _chunks("BREAK a (cat BREAK BREAK a) frog BREAK", tokenizer) == ["", "a cat", "", "a frog"]
    # A comma that is near ends a chunk: what stands behind it goes on with the next.
    near = _chunks(" ".join(words[:60]) + ", " + " ".join(words[:20]), tokenizer)
    assert [chunk.count("cat") for chunk in near] == [60, 20]
    far = _chunks(" ".join(words[:50]) + ", " + " ".join(words[:30]), tokenizer)
    assert [chunk.count("cat") for chunk in far] == [74, 6]


def test_subjects_are_found_in_any_chunk(tokenizer: CLIPTokenizer) -> None:
    prompt = parse("a (cat:1.3) BREAK a [sombrero]", tokenizer, None, "a1111")
    assert prompt.text == "a cat a sombrero"
    assert [(group.text, group.positions) for group in prompt.groups] == [
        ("cat", (2,)),
        ("sombrero", (79, 80)),
    ]
    assert [prompt.tokens[at] for at in (0, 76, 77, 79, 80, 153)] == [
        "<|startoftext|>",
        "<|endoftext|>",
        "<|startoftext|>",
        "som",
        "brero",
        "<|endoftext|>",
    ]
    assert prompt.chunks[0].weights == (1, 1.3)
    long = parse(LONG, tokenizer, ["frog"], "a1111")
    assert len(long.chunks) == 2
    (frog,) = long.groups[0].positions
    assert long.tokens[frog] == "frog"
    assert frog > 77


def _encoded(model: Model, prompt: str, negative: str | None = "", syntax: Any = "a1111") -> Run:
    parsed = parse(prompt, model.family.streams(), (), syntax)
    size = model.latent_size(*model.default_size)
    chunks = None
    if syntax == "a1111":
        chunks = () if not negative else parse(negative, model.family.streams(), (), syntax).chunks
    return _encode(model, [parsed], size, 7.5, negative or "", None, model.pipeline.scheduler, chunks)


@pytest.fixture(scope="module", params=["stable-diffusion", "stable-diffusion-xl"])
def model(request: pytest.FixtureRequest) -> Model:
    pipeline = ready(FAMILIES[request.param]())
    # Random ones leave each token's numbers with a mean of nought, which no trained text encoder does.
    torch.nn.init.normal_(pipeline.text_encoder.final_layer_norm.bias)
    return hurried(load(pipeline.to(torch.float64)))


def test_weight_1_is_the_plain_prompt_to_the_bit(model: Model) -> None:
    options = {"steps": 3, "seeds": [1], "decode": False, "progress": False, "negative_prompt": "a dog"}
    plain = model.generate("a cat and a frog", **options).latents
    weighted = model.generate("a (cat:1) and a frog", syntax="a1111", **options).latents
    assert torch.equal(plain, weighted)
    without = {**options, "negative_prompt": ""}
    assert torch.equal(
        model.generate("a cat", **without).latents, model.generate("a cat", syntax="a1111", **without).latents
    )
    assert not torch.equal(plain, model.generate("a (cat:1.3) and a frog", syntax="a1111", **options).latents)


def test_weights_multiply_embeddings_and_keep_their_mean(model: Model) -> None:
    plain = _encoded(model, "a cat and a frog", syntax="plain").text.states
    weighted = _encoded(model, "a (cat:1.5) and a [frog]").text.states
    factors = torch.ones(77, dtype=torch.float64)
    factors[2], factors[5] = 1.5, 1 / 1.1
    # Each text encoder's share of the width by itself.
    widths = [16, plain.shape[-1] - 16] if plain.shape[-1] > 16 else [16]
    for before, after in zip(plain.split(widths, -1), weighted.split(widths, -1), strict=True):
        expected = before * factors[:, None]
        expected = expected * (before.mean() / expected.mean())
        assert torch.allclose(after, expected, rtol=1e-12)


def test_chunks_stand_one_behind_the_other(model: Model) -> None:
    both = _encoded(model, "a cat BREAK a green frog", negative="a dog")
    size = model.latent_size(*model.default_size)
    with torch.no_grad():
        texts = ("a cat", "a green frog", "a dog", "")
        parts = [model.family.encode([text], None, None, size)[0] for text in texts]
    assert torch.equal(both.text.states, torch.cat([part.states for part in parts[:2]], dim=1))
    assert both.empty_text is not None
    # The negative prompt gets an empty chunk more.
    assert torch.equal(both.empty_text.states, torch.cat([part.states for part in parts[2:]], dim=1))
    if "text_embeds" in both.text.tensors:
        assert torch.equal(both.text.tensors["text_embeds"], parts[0].tensors["text_embeds"])


def test_what_lies_beyond_the_first_chunk_is_nursed(model: Model) -> None:
    options = {"steps": 4, "seeds": [1], "decode": False, "progress": False, "maps": True}
    drawn = model.generate(LONG, subjects=["cat", "frog"], syntax="a1111", **options)
    first = drawn.trace[0].steps[0].updates[0]
    assert first.shift > 0
    assert drawn.maps["frog"].values.shape[:2] == (1, 4)
    (frog,) = drawn.prompts[0].groups[1].positions
    assert torch.equal(drawn.maps["frog"].values, drawn.maps.of_tokens([frog]).values)
    # Prompts of other lengths beside it are drawn in passes of their own, and stay what they are.
    beside = model.generate(
        [LONG, "a cat and a frog"], subjects=[["cat", "frog"], None], syntax="a1111", **options
    )
    assert torch.equal(beside.latents[:1], drawn.latents)
    alone = model.generate("a cat and a frog", **options)
    assert torch.equal(beside.latents[1:], alone.latents)
    assert torch.equal(beside.maps["frog"].values[0], drawn.maps["frog"].values[0])
    ours = beside.only(1).maps["frog"].values[0]
    assert torch.equal(ours, alone.maps["frog"].values[0])
    assert list(beside.only(1).maps) == list(alone.maps)


def test_the_marks_between_chunks_are_compared_with_no_word(model: Model) -> None:
    def left_out(prompt: str, *, words_alone: bool, negative: str = "") -> list[int] | None:
        run, recipe = (
            _encoded(model, prompt, negative=negative),
            replace(Recipe.named("official"), prompt_tokens_only=words_alone),
        )
        between = tables_of(run.prompts, run.streams, recipe)[0].between
        return None if between is None else between[0].nonzero().flatten().tolist()

    assert left_out("a cat BREAK a green frog", words_alone=False) == [0, 76, 77, 153]
    kept = {1, 2, 78, 79, 80}
    assert left_out("a cat BREAK a green frog", words_alone=True) == sorted({*range(154)} - kept)
    assert left_out("a (cat:1.3)", words_alone=True) is None
    # The longer negative prompt has given it an empty chunk more.
    assert left_out("a cat", words_alone=False, negative="a dog BREAK a frog") == [0, 76, 77, 153]


def test_what_is_not_read_is_told(tiny: Model) -> None:
    for prompt, message in (
        ("a cat <lora:fur:0.7>", "'<lora:fur:0.7>' is not read here: give it with --lora FILE:WEIGHT"),
        ("a [cat:dog:0.5]", r"'\[cat:dog:0.5\]' is not read here: a text that changes during the run"),
        ("a [[red] cat:dog:0.5]", r"'\[\[red\] cat:dog:0.5\]' is not read here"),
        ("a [(red:1.2):0.5]", r"'\[\(red:1.2\):0.5\]' is not read here"),
        ("a [cat::0.5]", "a text that changes"),
        (r"a \\[cat: 7 ]", r"'\[cat: 7 \]' is not read here"),
        ("a [[cat]|dog]", r"'\[\[cat\]\|dog\]' is not read here"),
        ("a [cat|dog]", "a text that changes during the run can't be nursed"),
        ("a cat AND a frog", "'AND' is not read here: .* --method composable"),
        ("a (cat:1.2.3)", "the weight '1.2.3' in .* is not a number"),
        ("()", "the prompt is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny.generate(prompt, syntax="a1111", progress=False)
    for method in (ComposableDiffusion(), AttendAndExcite(base=StructureDiffusion())):
        with pytest.raises(
            ValueError, match="encodes parts of the prompt by itself: leave A1111's syntax out"
        ):
            tiny.generate("a (cat:1.3)", syntax="a1111", method=method, progress=False)
    with pytest.raises(ValueError, match="unknown syntax 'comfy': choose one of plain, a1111"):
        tiny.generate("a cat", syntax="comfy", progress=False)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match=r"have weights read with syntax='a1111'"):
        tiny.generate("a (cat:1.3)", method=StableDiffusion(), steps=1, decode=False, progress=False)


@pytest.mark.parametrize("name", ["stable-diffusion-3", "flux", "sana", "z-image"])
def test_other_architectures_refuse_it(name: str) -> None:
    with pytest.raises(ValueError, match="A1111's syntax is for Stable Diffusion 1, 2 and XL"):
        model_of(name).generate("a (cat:1.3)", syntax="a1111", progress=False)


def test_it_is_recorded_and_made_again(tmp_path: Path) -> None:
    def generate(folder: str, *arguments: str) -> dict[str, Any]:
        out = ["--out", str(tmp_path / folder), "--json"]
        result = CliRunner().invoke(app, ["generate", *arguments, *out])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    short = ("--steps", "2", "--recipe", "no-refinement")
    first = generate("1", "a (cat:1.3) BREAK a frog", "--syntax", "a1111", *short)
    assert first["prompt"] == "a cat a frog"
    again = generate("2", "--from", first["images"][0]["file"])
    assert again["subjects"] == first["subjects"]
    files = [Path(drawn["images"][0]["file"]) for drawn in (first, again)]
    assert Image.open(files[0]).tobytes() == Image.open(files[1]).tobytes()
