"""Stable Diffusion with classifier-free guidance and nothing else: the plain loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from attend_excite.methods.base import Denoise, Run, Step


@dataclass(frozen=True)
class StableDiffusion:
    """The model as it is, without nursing."""

    name = "stable-diffusion"
    title = "Stable Diffusion"
    uses_subjects = False
    attends_to_prompt = True

    @contextmanager
    def attach(self, run: Run) -> Iterator[Denoise]:
        """The step of the plain loop."""

        def denoise(latents: Tensor, step: Step) -> tuple[Tensor, Tensor]:
            return latents, run.predict_guided(latents, step)

        yield denoise
