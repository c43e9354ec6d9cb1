"""The block for diffusers' modular pipelines: its latents are our own loop's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance
from torch import Tensor

from attend_excite import Model
from attend_excite.modular import nursed
from tests.families import keep_wide, model_of

PROMPT = "a cat and a frog"
STEPS = 4
HUB = Path(__file__).parent.parent / "hub" / "attend-excite"
BLOCKS = {
    "flux": "FluxAutoBlocks",
    "flux-2-klein": "Flux2KleinBaseAutoBlocks",
    "qwen-image": "QwenImageAutoBlocks",
    "stable-diffusion-3": "StableDiffusion3AutoBlocks",
    "stable-diffusion-xl": "StableDiffusionXLAutoBlocks",
    "z-image": "ZImageAutoBlocks",
}
"""By the name of a tiny model, as in `FAMILIES`."""


@pytest.fixture(autouse=True)
def _no_rounding_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_wide(monkeypatch)


def blocks_of(name: str) -> Any:
    """Diffusers' blocks of a family, without the last, which makes pictures of the latents."""
    blocks = getattr(diffusers, BLOCKS[name])()
    blocks.sub_blocks.pop("decode")
    return blocks


def pipeline_of(blocks: Any, model: Model, **others: Any) -> Any:
    """A modular pipeline of a model's parts, with the guidance of `options_of`."""
    pipeline = blocks.init_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    parts = {name: part for name, part in model.pipeline.components.items() if name in pipeline.components}
    parts["scheduler"] = copy.deepcopy(parts["scheduler"])  # whose timesteps diffusers sets
    if "guider" in pipeline.components:
        weight = model.family.weight_of_guidance(4.0)
        parts["guider"] = ClassifierFreeGuidance(guidance_scale=weight)
    pipeline.update_components(**parts | others)
    return pipeline


def noise_of(model: Model, height: int, width: int) -> Tensor:
    """That of seed 3."""
    shape = (1, model.family.latent_channels, *model.latent_size(height, width))
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def options_of(model: Model, width: int | None = None) -> dict[str, Any]:
    """What a pipeline is told to draw the prompt from seed 3's noise."""
    height, width = model.default_size[0], width or model.default_size[1]
    options = {
        "prompt": PROMPT,
        "latents": model.family.as_the_pipeline_has_them(noise_of(model, height, width)),
        "height": height,
        "width": width,
        "num_inference_steps": STEPS,
    }
    if model.family.name == "stable-diffusion-3":  # whose blocks have no guidance without
        options["negative_prompt"] = ""
    if model.family.name == "flux-2-klein":
        options["max_sequence_length"] = model.pipeline.tokenizer_max_length
    if model.family.distilled_guidance:
        options["guidance_scale"] = 4.0
    return options


def by_our_loop(model: Model, **options: Any) -> Any:
    return model.generate(
        PROMPT, seeds=[3], steps=STEPS, guidance_scale=4.0, decode=False, progress=False, **options
    )


def assert_as_ours(found: Tensor, ours: Tensor, model: Model, tolerance: float = 1e-9) -> None:
    # Qwen-Image's are of a film of one picture.
    torch.testing.assert_close(found.reshape(ours.shape), ours, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", BLOCKS)
def test_the_latents_are_those_of_our_own_loop(
    name: str, same_model: Callable[[Model], Callable[[], None]]
) -> None:
    model = model_of(name)
    width = model.default_size[1] // 4 * 3
    ours = by_our_loop(model, width=width)
    check = same_model(model)
    found = pipeline_of(nursed(blocks_of(name)), model)(
        **options_of(model, width), output=["latents", "trace"]
    )
    # FLUX's blocks divide the timestep in float32.
    assert_as_ours(found["latents"], ours.latents, model, tolerance=1e-5 if name == "flux" else 1e-9)
    assert len(ours.trace[0].losses) > 1
    assert found["trace"][0].losses == pytest.approx(ours.trace[0].losses, abs=1e-5)
    check()
    plain = pipeline_of(blocks_of(name), model)(**options_of(model, width), output="latents")
    assert not torch.allclose(plain, found["latents"])
