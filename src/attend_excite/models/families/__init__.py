"""The architectures that are served: one file each, found by the class of their pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from attend_excite.models.families.base import Conditioning, Defaults, Family, concatenated, family_data

_FAMILIES: Mapping[str, str] = {
    "StableDiffusionPipeline": "stable_diffusion:StableDiffusion",
    "StableDiffusionAttendAndExcitePipeline": "stable_diffusion:StableDiffusion",
    "StableDiffusionXLPipeline": "stable_diffusion_xl:StableDiffusionXL",
    "PixArtAlphaPipeline": "pixart:PixArt",
    "PixArtSigmaPipeline": "pixart:PixArtSigma",
    "SanaPipeline": "sana:Sana",
    "StableDiffusion3Pipeline": "stable_diffusion_3:StableDiffusion3",
    "FluxPipeline": "flux:Flux",
    "Flux2KleinPipeline": "flux_2_klein:Flux2Klein",
    "QwenImagePipeline": "qwen_image:QwenImage",
    "ZImagePipeline": "z_image:ZImage",
}
"""By the name of diffusers' class: the module here and the class in it."""


def is_served(pipeline_class: str) -> bool:
    """Whether a family serves diffusers' class of this name."""
    return pipeline_class in _FAMILIES


def family_class(pipeline_class: str) -> type[Family]:
    """The family of diffusers' class of this name.

    Raises:
        ValueError: none serves it.
    """
    if pipeline_class not in _FAMILIES:
        if "ControlNet" in pipeline_class:
            raise ValueError(
                f"{pipeline_class} is not served: ControlNets work in ComfyUI; here pass the text-to-image "
                "model without one, made with its class's from_pipe"
            )
        served = ", ".join(dict.fromkeys(defaults.title for defaults in family_data().values()))
        raise ValueError(
            f"{pipeline_class} is not served: choose a text-to-image model of {served}; to keep the "
            "weights of a pipeline for another task, pass one made with its text-to-image class's from_pipe "
            "(a picture to begin from, and a mask, are given with image= and mask=)"
        )
    module, name = _FAMILIES[pipeline_class].split(":")
    return getattr(import_module(f"{__name__}.{module}"), name)


__all__ = ["Conditioning", "Defaults", "Family", "concatenated", "family_class", "family_data", "is_served"]
