"""The block for diffusers' modular pipelines: its latents are our own loop's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines.modular_pipeline import BlockState, ModularPipelineBlocks
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor

from attend_excite import AttendAndExcite, Model, load
from attend_excite.models.catalogue import SETTINGS_FILE
from attend_excite.modular import Nurse, nursed
from tests.families import LATENT_DIFFUSION, keep_wide, model_of

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
    if "scheduler" in parts:  # whose timesteps diffusers sets
        parts["scheduler"] = copy.deepcopy(parts["scheduler"])
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
    # With the recipe that the blocks find: they see the pipeline alone.
    model = replace(model, recipe=load(model.pipeline).recipe)
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


def test_a_block_from_a_folder_nurses_where_it_is_put() -> None:
    """As on the Hub, in a pipeline whose text was encoded by another, within a caller's inference mode."""
    model = model_of("stable-diffusion-3")
    ours = by_our_loop(model, subjects=["frog"])
    blocks = blocks_of("stable-diffusion-3").get_workflow("text2image")
    encoder = pipeline_of(blocks.sub_blocks.pop("text_encoder"), model)
    options = options_of(model)
    nurse = ModularPipelineBlocks.from_pretrained(
        str(HUB), trust_remote_code=True, model_name="stable-diffusion-3"
    )
    assert isinstance(nurse, Nurse)
    blocks.sub_blocks["denoise.denoise"].sub_blocks.insert("nurse", nurse, 0)
    denoiser = pipeline_of(blocks, model)
    assert "text_encoder" not in denoiser.components
    with torch.inference_mode():
        state = encoder(prompt=PROMPT, negative_prompt="")
        found = denoiser(state=state, **options, subjects=["frog"], output="latents")
    assert_as_ours(found, ours.latents, model)


def test_what_a_model_recommends_in_its_folder_is_heeded(tmp_path: Path) -> None:
    (tmp_path / SETTINGS_FILE).write_text('{"attention_downsampling": 2}')
    model = model_of("stable-diffusion-3")
    ours = by_our_loop(replace(model, attention_downsampling=2))
    pipeline = pipeline_of(nursed(blocks_of("stable-diffusion-3")), model)
    pipeline._pretrained_model_name_or_path = str(tmp_path)
    assert_as_ours(pipeline(**options_of(model), output="latents"), ours.latents, model)


def test_each_picture_of_a_batch_is_nursed_for_its_own_prompt() -> None:
    model = model_of("stable-diffusion-xl")
    pipeline = pipeline_of(nursed(blocks_of("stable-diffusion-xl")), model)
    prompts, wanted = [PROMPT, "a red dog"], [["frog"], ["dog"]]
    method = AttendAndExcite("no-refinement")
    options = options_of(model) | {"method": method, "output": "latents"}
    alone = [
        pipeline(**options | {"prompt": prompt, "subjects": subjects})
        for prompt, subjects in zip(prompts, wanted, strict=True)
    ]
    two = options | {"latents": options["latents"].expand(2, -1, -1, -1)}
    together = pipeline(**two | {"prompt": prompts, "subjects": wanted})
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-9)
    twice = pipeline(**two | {"subjects": ["frog"]}, num_images_per_prompt=2)
    torch.testing.assert_close(twice, alone[0].expand(2, -1, -1, -1), rtol=0, atol=1e-9)


def test_nothing_is_left_behind(same_model: Callable[[Model], Callable[[], None]]) -> None:
    def fails(*_: Any) -> Tensor:
        raise KeyboardInterrupt

    model = model_of("qwen-image")
    pipeline = pipeline_of(nursed(blocks_of("qwen-image")), model)
    pipeline(**options_of(model))  # once, since transformers puts hooks of its own into the text encoder
    check = same_model(model)
    with pytest.raises(KeyboardInterrupt):
        pipeline(**options_of(model), method=AttendAndExcite(objective=fails))
    check()
    # Diffusers' own loop is one object in all of these blocks.
    assert "Nurse" not in repr(blocks_of("qwen-image").get_workflow("text2image"))


def test_what_cannot_be_nursed_is_refused() -> None:
    with pytest.raises(ValueError, match="has no denoising loop that can be nursed"):
        nursed(diffusers.WanBlocks())
    model = model_of("stable-diffusion-xl")
    blocks = nursed(blocks_of("stable-diffusion-xl"))
    pipeline = pipeline_of(blocks, model)
    options = options_of(model)
    with pytest.raises(ValueError, match="the brackets in 'a \\[cat\\]' would be drawn as text"):
        pipeline(**options | {"prompt": "a [cat]"})
    with pytest.raises(ValueError, match="it's diffusers' blocks that denoise"):
        pipeline(**options, method="official")
    with_control = BlockState(latents=options["latents"], controlnet_cond=torch.zeros(1))
    with pytest.raises(ValueError, match="nursing with a ControlNet isn't served"):
        Nurse()(pipeline, with_control, 0, torch.zeros(()))
    with pytest.raises(ValueError, match="'bird'"):
        pipeline(**options, subjects=["bird"])
    pipeline.update_components(scheduler=UniPCMultistepScheduler(**LATENT_DIFFUSION))
    with pytest.raises(ValueError, match="nursing would be lost: give another scheduler"):
        pipeline(**options)
