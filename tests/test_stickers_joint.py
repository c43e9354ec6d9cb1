"""The bundled model with joint attention: diffusers' own, and nursing does on it what it is for."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from attend_excite import AttendAndExcite, Model, StableDiffusion
from attend_excite.methods import Method
from attend_excite.models import source_of
from attend_excite.subjects import parse
from attend_excite.verdict import as_asked, verdicts


def test_plain_diffusers_draws_the_same_with_it(stickers_joint: Model) -> None:
    own = stickers_joint.generate("a red car", method=StableDiffusion(), seeds=3, steps=3, progress=False)
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        source_of("stickers-joint"), text_encoder_3=None, tokenizer_3=None, dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    theirs = pipeline("a red car", num_inference_steps=3, generator=generator, output_type="latent").images
    torch.testing.assert_close(own.latents, theirs, rtol=0, atol=1e-3)


def test_nursing_brings_the_subject_that_is_missing(stickers_joint: Model) -> None:
    prompt = parse("a bird and a monkey", stickers_joint.tokenizer)

    def shown(method: Method) -> int:
        run = stickers_joint.generate(prompt.text, method=method, seeds=range(4), progress=False)
        return sum(as_asked(each, prompt.groups) for each in verdicts(run.images, prompt, "stickers-joint"))

    plain, nursed = shown(StableDiffusion()), shown(AttendAndExcite())
    assert nursed > plain + 1


def test_a_picture_larger_than_its_places_is_refused_at_the_door(stickers_joint: Model) -> None:
    with pytest.raises(ValueError, match="at most 256 pixels: stickers-joint has no places beyond"):
        stickers_joint.generate("a cat", method=StableDiffusion(), width=512, progress=False)
