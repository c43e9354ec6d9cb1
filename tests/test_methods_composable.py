"""Composable Diffusion: its formula pass by pass, its prompts and its weights."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler

from attend_excite import Model, StableDiffusion
from attend_excite.methods import ComposableDiffusion
from attend_excite.methods.composable import Concept, concepts

STEPS = 3


def _run(model: Model, prompt: str | list[str], method: Any, **options: Any) -> torch.Tensor:
    fixed = {"steps": STEPS, "decode": False, "progress": False}
    return model.generate(prompt, method=method, **(fixed | options)).latents


def test_equals_the_formula_with_one_pass_a_concept(tiny: Model) -> None:
    """One run by hand: batches of one, one text after another."""
    parts, weights = ["a cat", "a dog", "a frog"], [5.0, 3.0, -2.0]
    empty, *texts = (tiny.pipeline.encode_prompt([part], "cpu", 1, False)[0] for part in ["", *parts])
    scheduler = copy.deepcopy(tiny.pipeline.scheduler)
    scheduler.set_timesteps(STEPS)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        for t in scheduler.timesteps:
            unconditional = tiny.network(latents, t, empty).sample
            guided = unconditional.clone()
            for weight, text in zip(weights, texts, strict=True):
                guided += weight * (tiny.network(latents, t, text).sample - unconditional)
            latents = scheduler.step(guided, t, latents).prev_sample
    ours = _run(tiny, "a cat AND a dog NOT a frog", ComposableDiffusion([5, 3, 2]), seeds=3)
    torch.testing.assert_close(ours, latents, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_one_concept_is_stable_diffusion(tiny: Model, scheduler: Any, prediction_type: str) -> None:
    tiny.pipeline.scheduler = scheduler.from_config(
        tiny.pipeline.scheduler.config, prediction_type=prediction_type
    )
    composed = _run(tiny, "a cat AND a cat", ComposableDiffusion([4.5, 3]), steps=4)
    plain = _run(tiny, "a cat", StableDiffusion(), guidance_scale=7.5, steps=4)
    torch.testing.assert_close(composed, plain, rtol=1e-9, atol=1e-9)


def test_prompts_of_different_lengths_share_one_pass_a_step(tiny: Model) -> None:
    prompts = ["a cat AND a dog AND a bird", "NOT a frog"]
    passes: list[int] = []
    handle = tiny.network.register_forward_pre_hook(
        lambda _, args, kwargs: passes.append(1), with_kwargs=True
    )
    together = _run(tiny, prompts, ComposableDiffusion(), seeds=[0, 1])
    handle.remove()
    assert len(passes) == STEPS
    alone = [_run(tiny, prompt, ComposableDiffusion(), seeds=[0, 1]) for prompt in prompts]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-9, atol=1e-9)


def test_without_guidance_the_default_weights_are_the_scale(tiny: Model) -> None:
    default = _run(tiny, "a cat and a dog", ComposableDiffusion(), guidance_scale=1.0)
    ones = _run(tiny, "a cat and a dog", ComposableDiffusion([1, 1]), guidance_scale=7.5)
    # Where there is none at all, as with Z-Image Turbo, they are no less.
    assert torch.equal(default, _run(tiny, "a cat and a dog", ComposableDiffusion(), guidance_scale=0.0))
    assert torch.equal(default, ones)


def test_the_negative_prompt_counts_without_guidance_too(tiny: Model) -> None:
    method, options = ComposableDiffusion([4, 3]), {"negative_prompt": "blurry dog"}
    with_guidance, without = (
        _run(tiny, "a cat and a dog", method, guidance_scale=scale, **options) for scale in (7.5, 1.0)
    )
    assert torch.equal(with_guidance, without)
    assert not torch.equal(without, _run(tiny, "a cat and a dog", method))


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat and a dog", ["a cat", "a dog"]),
        ("a cat, a dog, and a frog", ["a cat, a dog", "a frog"]),
        ("a red cat and hat AND a dog", ["a red cat and hat", "a dog"]),
        ("a cat NOT a frog", ["a cat", "-a frog"]),
        ("a cat AND NOT  a frog AND fog", ["a cat", "-a frog", "fog"]),
        ("NOT a frog", ["-a frog"]),
        ("a frog with a crown", ["a frog", "a crown"]),
        ("rock-and-roll with a band", ["rock-and-roll", "a band"]),
    ],
)
def test_concepts_of_a_prompt(prompt: str, expected: list[str]) -> None:
    assert concepts(prompt) == [Concept(text.lstrip("-"), text.startswith("-")) for text in expected]


def test_what_cannot_be_composed_is_refused(tiny: Model) -> None:
    for prompt in ("a cat", "a cat on a mat", "NOTHING AT ALL"):
        with pytest.raises(ValueError, match="cannot be split into concepts: join them with AND"):
            concepts(prompt)
    for prompt in ("AND a dog", "a cat AND", "a cat NOT", "a cat AND , AND a dog"):
        with pytest.raises(ValueError, match="joins a concept to nothing"):
            concepts(prompt)
    with pytest.raises(
        ValueError, match="there are 2 concepts, and 1 weights: give one for each of 'a cat', 'a dog'"
    ):
        _run(tiny, "a cat and a dog", ComposableDiffusion([7.5]))
    with pytest.raises(ValueError, match="must be finite numbers"):
        ComposableDiffusion([1, float("nan")])
    with pytest.raises(ValueError, match="it has no maps of it"):
        _run(tiny, "a cat and a dog", ComposableDiffusion(), maps=True)


def test_only_words_that_no_concept_reads_are_warned_of(stickers: Model) -> None:
    """Each concept has a context of its own, and the operators are read by no one."""
    read = "a red cat AND a blue dog AND a pink frog AND a green bird NOT a mouse AND a car"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        _run(stickers, read, ComposableDiffusion(), steps=1)
    cut = f"a mouse AND {read.replace('AND', 'and').replace('NOT', 'and')} and a crown"
    with pytest.warns(UserWarning, match="a concept is longer than the model's context of 16 tokens"):
        _run(stickers, cut, ComposableDiffusion(), steps=1)
    with pytest.warns(UserWarning, match="never read the word 'dragon'"):
        _run(stickers, "a cat AND a dragon", ComposableDiffusion(), steps=1)
