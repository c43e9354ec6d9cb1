"""Recorded attention as a value: ask it for a word."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageOps
from torch import Tensor

Locate = Callable[[int, str], Sequence[int]]
"""(image, word) -> the word's token positions in that image's prompt."""


@dataclass(frozen=True)
class AttentionMaps:
    """The cross-attention of some images to their prompts, from the conditional passes.

    Attributes:
        values: (images, steps, height, width, tokens), mean over layers and heads; over the tokens they
            sum to 1.
        locate: finds a word's tokens.
    """

    values: Tensor
    locate: Locate

    def __getitem__(self, word: str) -> Tensor:
        """Where a word was attended to: (images, steps, height, width), each value 0 to 1.

        A word of several tokens has the attention of all of them together.

        Raises:
            ValueError: a prompt lacks the word.
        """
        return torch.stack(
            [
                image[..., list(self.locate(index, word))].sum(dim=-1)
                for index, image in enumerate(self.values)
            ]
        )

    def heat_map(self, word: str, image: int = 0, step: int | None = None) -> Tensor:
        """One word's map (height, width) stretched to 0..1; without a `step` the mean over the steps."""
        maps = self[word][image]
        heat = maps.mean(dim=0) if step is None else maps[step]
        low, high = heat.min(), heat.max()
        return (heat - low) / (high - low).clamp(min=torch.finfo(heat.dtype).tiny)


def overlay(image: Image.Image, heat: Tensor) -> Image.Image:
    """Lay a heat map (height, width) of values 0..1 over a picture; the hotter, the less transparent."""
    levels = Image.fromarray(heat.mul(255).round().byte().numpy()).resize(
        image.size, Image.Resampling.BICUBIC
    )
    colours = ImageOps.colorize(levels, black="#120b36", mid="#e2513a", white="#fdffb0")
    # A cold patch still shows the picture, and so does a hot one.
    opacity = levels.point([60 + 140 * level // 255 for level in range(256)])
    return Image.composite(colours, image.convert("RGB"), opacity)
