"""What is particular to Stable Diffusion XL and PixArt, beside the contract of all families."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_img2img import (
    StableDiffusionXLImg2ImgPipeline,
)

from attend_excite import Model, StableDiffusion, load
from attend_excite.models.families import family_data
from attend_excite.subjects import Stream, parse
from tests.families import pixart_sigma, stable_diffusion_xl, t5_tokenizer


@pytest.fixture(scope="module")
def xl() -> Model:
    return load(stable_diffusion_xl())


def test_the_maps_of_sdxl_are_those_of_a_quarter_of_its_latents(xl: Model) -> None:
    names = [place.name for place in xl.places()]
    assert [name.split(".attentions")[0] for name in names] == [
        *["down_blocks.2"] * 2,
        *["mid_block"] * 2,
        *["up_blocks.0"] * 4,
    ]
    assert xl.family.downsamplings() == (2, 4)


def test_no_negative_prompt_is_zeros_for_sdxl_and_an_empty_one_where_its_config_says_so(xl: Model) -> None:
    _, empty = xl.family.encode(["a cat"], "", None, (16, 16))
    assert empty is not None
    assert not empty.states.any()
    assert not empty.tensors["text_embeds"].any()
    told = StableDiffusionXLPipeline(**xl.pipeline.components, force_zeros_for_empty_prompt=False)
    _, empty = load(told).family.encode(["a cat"], "", None, (16, 16))
    assert empty is not None
    assert empty.states.any()


@pytest.mark.parametrize("fails", [False, True])
def test_a_half_precision_autoencoder_that_overflows_decodes_in_float32(
    fails: bool, same_model: Callable[[Model], Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(stable_diffusion_xl())
    vae = model.pipeline.vae.half()
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    check, seen = same_model(model), []
    decode = vae.decode

    def watched(latent: torch.Tensor, **options: Any) -> Any:
        seen.append((latent.dtype, vae.dtype))
        if fails:
            raise KeyboardInterrupt
        return decode(latent, **options)

    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(vae, "decode", watched)
        try:
            pixels, _ = model.family.decode(latents, "pt")
            assert pixels.dtype == torch.float32
        except KeyboardInterrupt:
            assert fails
    assert seen == [(torch.float32, torch.float32)]
    check()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"in_channels": 9}, "as those of inpainting do"),
        ({"encoder_hid_dim_type": "ip_image_proj"}, "IP-Adapter"),
        ({"time_cond_proj_dim": 8}, "latent consistency"),
    ],
)
def test_unets_that_need_something_else_are_refused(xl: Model, changed: dict[str, Any], message: str) -> None:
    network = UNet2DConditionModel.from_config(xl.network.config)
    network.register_to_config(**changed)
    with pytest.raises(ValueError, match=message):
        load(StableDiffusionXLPipeline(**(xl.pipeline.components | {"unet": network})))


def test_refiners_are_refused(xl: Model, tmp_path: Path) -> None:
    parts = xl.pipeline.components | {"text_encoder": None, "tokenizer": None}
    with pytest.raises(ValueError, match="as refiners do: choose the base model"):
        load(StableDiffusionXLPipeline(**parts))
    refiner = StableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=True)
    with pytest.raises(ValueError, match="StableDiffusionXLImg2ImgPipeline is not served"):
        load(refiner)
    for pipeline, message in (
        (refiner, "StableDiffusionXLImg2ImgPipeline is not served"),
        (StableDiffusionXLPipeline(**parts), "choose the base model"),
    ):
        pipeline.save_pretrained(tmp_path)
        for weights in tmp_path.rglob("*.safetensors"):
            weights.write_bytes(b"")  # so that it is told before they are read
        with pytest.raises(ValueError, match=message):
            load(tmp_path)


def test_pixart_reads_small_letters() -> None:
    """So a capital doesn't move the tokens, and white space in front doesn't move the characters."""
    stream = Stream("T5", t5_tokenizer(), 0, 300, uncapitalised=True)
    small, capital = (parse(text, [stream], ["sombrero"]) for text in ("a red sombrero", "  A Red Sombrero"))
    assert capital.groups[0].positions == small.groups[0].positions
    assert [word.lower() for word in capital.tokens] == list(small.tokens)
    model = load(pixart_sigma())
    drawn = [
        model.generate(text, method=StableDiffusion(), steps=1, decode=False, progress=False).latents
        for text in ("a red sombrero", "  A Red Sombrero")
    ]
    assert torch.equal(*drawn)


def test_padding_has_none_of_pixarts_attention() -> None:
    model = load(pixart_sigma())
    drawn = model.generate(
        ["a cat", "a lion with a red crown"],
        method=StableDiffusion(),
        steps=1,
        decode=False,
        progress=False,
        maps=True,
    )
    values = drawn.maps.values
    torch.testing.assert_close(values.sum(dim=-1), torch.ones_like(values[..., 0]))
    assert drawn.maps.kept == tuple(range(7))
    assert not values[0, ..., 3:].any()


def test_every_familys_numbers_have_a_source() -> None:
    for defaults in family_data().values():
        assert {"recipe", "thresholds", "blocks"} & defaults.sources.keys()
