"""Runs that begin from a picture: in every architecture, and as diffusers' own pipelines for that."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

from attend_excite import AttendAndExcite, Model, StableDiffusion
from attend_excite.models.families import family_class
from attend_excite.models.families.base import Family
from attend_excite.pictures import beginning
from tests.families import FAMILIES, pipeline_options
from tests.test_families import PROMPT, _no_rounding_inside, as_compared, model_of  # noqa: F401

STEPS, STRENGTH = 5, 0.6


def _picture(width: int, height: int) -> Image.Image:
    """Colours that run from corner to corner."""
    rows, columns = np.mgrid[0:height, 0:width]
    shades = [rows * 255 / height, columns * 255 / width, (rows + columns) * 127 / (height + width)]
    return Image.fromarray(np.stack(shades, axis=-1).astype(np.uint8))


def _mask(width: int, height: int) -> Image.Image:
    """Its right half is drawn."""
    mask = Image.new("L", (width, height))
    mask.paste(255, (width // 2, 0, width, height))
    return mask


def _begun(model: Model, **options: Any) -> Any:
    height, width = model.default_size
    defaults = {"method": StableDiffusion(), "steps": STEPS, "progress": False, "seeds": [3]}
    given = {"image": _picture(width, height), "strength": STRENGTH}
    return model.generate(PROMPT, **(defaults | given | options))


def _original(model: Model) -> torch.Tensor:
    """The picture's latents."""
    height, width = model.default_size
    begin = beginning(_picture(width, height), None, None, height=None, width=None, multiple=1)
    assert begin is not None
    with torch.no_grad():
        return model.family.latents_of(begin.pixels().double())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("stable-diffusion", "Img2Img"),
        ("stable-diffusion", "Inpaint"),
        ("stable-diffusion-xl", "Img2Img"),
        ("stable-diffusion-xl", "Inpaint"),
        ("stable-diffusion-3", "Img2Img"),
        ("flux", "Img2Img"),
        ("flux", "Inpaint"),
    ],
)
def test_from_a_picture_as_diffusers_own_pipeline(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Theirs draws a picture's latents from what the autoencoder holds likely; ours takes the likeliest.
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda found, *_, **__: found.mode())
    model = model_of(name)
    own, guidance = model.pipeline, 3.0
    height, width = model.default_size
    mask = _mask(width, height) if kind == "Inpaint" else None
    ours = _begun(model, mask=mask, guidance_scale=guidance, decode=False).latents
    pipeline_class = getattr(diffusers, type(own).__name__.replace("Pipeline", f"{kind}Pipeline"))
    given = {"requires_safety_checker": False} if name == "stable-diffusion" else {}
    theirs = pipeline_class(**own.components | {"scheduler": copy.deepcopy(own.scheduler)}, **given)
    theirs.set_progress_bar_config(disable=True)
    told = {} if mask is None else {"mask_image": mask}
    if name == "flux":
        told |= {"height": height, "width": width}
    with torch.no_grad():
        expected = theirs(
            prompt=PROMPT,
            image=_picture(width, height),
            strength=STRENGTH,
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(3),
            output_type="latent",
            **pipeline_options(own, guidance),
            **told,
        ).images
    assert torch.allclose(model.family.as_the_pipeline_has_them(ours), expected, atol=1e-9)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_picture_becomes_the_latents_that_decode_to_it(name: str) -> None:
    family: Family = model_of(name).family
    latents = torch.randn(1, family.latent_channels, 4, 4, dtype=torch.float64)
    assert torch.allclose(family.scaled(family.unscaled(latents)), latents)
    original = _original(model_of(name))
    size = model_of(name).latent_size(*model_of(name).default_size)
    assert original.shape == (1, family.latent_channels, *size)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_what_is_masked_stays_to_the_bit(name: str) -> None:
    model = model_of(name)
    height, width = model.default_size
    mask = _mask(width, height)
    drawn = _begun(model, mask=mask, method=AttendAndExcite(), subjects=["cat", "frog"], seeds=[3, 4])
    half = drawn.latents.shape[-1] // 2
    original = _original(model)
    if name != "z-image":  # whose autoencoder is in float32 in the test of its pipeline
        assert torch.equal(drawn.latents[..., :half], original[..., :half].expand(2, -1, -1, -1))
    assert not torch.allclose(drawn.latents[..., half:], original[..., half:], atol=0.1)
    for image in drawn.images:
        pixels, kept = np.array(image), np.array(_picture(width, height))
        assert (pixels[:, : width // 2] == kept[:, : width // 2]).all()
        assert (pixels[:, width // 2 :] != kept[:, width // 2 :]).any()
    # Nursing begins where the run begins: the recipe's first steps are the run's first.
    assert drawn.trace[0].steps[0].updates
    assert len(drawn.trace[0].steps) < STEPS


@pytest.mark.parametrize("scheduler", ["heun", "dpm++", "pndm", "unipc", "lms"])
def test_other_schedulers_begin_there_too(tiny: Model, scheduler: str) -> None:
    drawn = _begun(tiny, scheduler=scheduler, strength=0.002, steps=500, decode=False)
    # Of five hundred steps the last: next to nothing happens to the picture.
    assert torch.allclose(drawn.latents, _original(tiny), atol=0.5)
    masked = _begun(tiny, scheduler=scheduler, mask=_mask(128, 128), decode=False).latents
    assert torch.equal(masked[..., :8], _original(tiny)[..., :8])


def test_strength_1_leaves_nothing_of_the_picture(tiny: Model) -> None:
    plain = tiny.generate(PROMPT, method=StableDiffusion(), steps=STEPS, progress=False, seeds=[3])
    whole = _begun(tiny, strength=1)
    assert torch.equal(whole.latents, plain.latents)


def test_pictures_are_brought_to_size() -> None:
    cut = beginning(_picture(70, 61), None, None, height=None, width=None, multiple=8)
    assert cut is not None
    assert cut.size == (56, 64)
    assert np.array_equal(np.array(cut.picture), np.array(_picture(70, 61))[2:58, 3:67])
    filled = beginning(_picture(70, 61), 0.3, _mask(70, 61), height=128, width=128, multiple=8)
    assert filled is not None
    assert filled.size == (128, 128)
    cells = filled.cells((16, 16))
    assert cells is not None
    assert cells[0, 0, 0].tolist() == [False] * 8 + [True] * 8
    clear = Image.new("RGBA", (8, 8), (9, 9, 9, 0))
    white = beginning(clear, None, None, height=None, width=None, multiple=8)
    assert white is not None
    assert white.picture.getpixel((0, 0)) == (255, 255, 255)


def test_what_belongs_into_comfyui_is_refused_with_its_name() -> None:
    with pytest.raises(ValueError, match="ControlNets work in ComfyUI"):
        family_class("StableDiffusionControlNetPipeline")
    with pytest.raises(ValueError, match=r"StableDiffusionInpaintPipeline is not served: .* mask="):
        family_class("StableDiffusionInpaintPipeline")


def test_what_cannot_be_begun_from_is_told(tiny: Model, tmp_path: Any) -> None:
    (tmp_path / "text.png").write_text("no picture")
    for options, message in (
        ({"image": None}, "there is a strength, but no picture to begin from"),
        ({"image": None, "strength": None, "mask": _mask(8, 8)}, "there is a mask, but no picture"),
        ({"strength": 0}, "strength is 0: it must be a number above 0, 1 at most"),
        ({"strength": 1.5}, "strength is 1.5"),
        ({"strength": 0.1}, "strength 0.1 of 5 steps is no step at all: give 0.2 or more"),
        ({"strength": 0.01, "steps": 30}, "no step at all: give 0.034 or more"),
        ({"height": "128"}, "height is '128': it must be a multiple of 8 pixels"),
        ({"mask": _mask(64, 64)}, "the mask is 64x64 and the picture 128x128 pixels"),
        ({"mask": Image.new("L", (128, 128))}, "the mask is black everywhere"),
        ({"image": tmp_path / "none.png"}, "there is no picture '.*none.png'"),
        ({"image": tmp_path / "text.png"}, "is not a picture that can be read"),
        ({"image": _picture(7, 7)}, "the picture is 7x7 pixels: give one of 8 or more"),
        ({"image": torch.zeros(3)}, "a Tensor is no picture"),
    ):
        with pytest.raises(ValueError, match=message):
            _begun(tiny, **options)
