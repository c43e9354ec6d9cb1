"""Recorded attention as a value: ask it for a word, and the word's maps for a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageChops, ImageFilter, ImageOps
from torch import Tensor
from torch.nn import functional as F

Locate = Callable[[int, str], Sequence[int]]
"""(image, word) -> the word's token positions in that image's prompt."""


@dataclass(frozen=True)
class AttentionMaps:
    """The cross-attention of some images to their prompts, from the conditional passes.

    Attributes:
        values: (images, steps, height, width, tokens), mean over layers and heads; over all tokens they
            sum to 1 where the image attends to text alone, to less where it attends to itself beside it.
        locate: finds a word's tokens.
        kept: the token positions that `values` has; None: all.
        words: of the first image's prompt.

    `"frog" in maps` says whether all images have the word's maps; iterating gives the `words` of which they
    have.
    """

    values: Tensor
    locate: Locate
    kept: tuple[int, ...] | None = None
    words: tuple[str, ...] = ()

    def __getitem__(self, word: str) -> WordMaps:
        """Where a word was attended to; a word of several tokens has the attention of all of them together.

        Raises:
            ValueError: a prompt lacks the word, or its maps were not kept.
        """
        images = [
            image[..., self._places(self.locate(index, word))].sum(dim=-1)
            for index, image in enumerate(self.values)
        ]
        return WordMaps(torch.stack(images))

    def __contains__(self, word: object) -> bool:
        try:
            return isinstance(word, str) and all(
                self._places(self.locate(index, word)) for index in range(len(self.values))
            )
        except ValueError:
            return False

    def __iter__(self) -> Iterator[str]:
        return (word for word in self.words if word in self)

    def of_tokens(self, positions: Sequence[int]) -> WordMaps:
        """Where the tokens at these positions were attended to together, the same in every image.

        Raises:
            ValueError: their maps were not kept.
        """
        return WordMaps(self.values[..., self._places(positions)].sum(dim=-1))

    def only(self, positions: Sequence[int]) -> AttentionMaps:
        """The maps of some tokens alone, in as much less memory as they are fewer.

        Raises:
            ValueError: their maps were not kept.
        """
        values = self.values[..., self._places(positions)]
        return AttentionMaps(values, self.locate, tuple(positions), self.words)

    def _places(self, positions: Sequence[int]) -> list[int]:
        if self.kept is None:
            return list(positions)
        if missing := set(positions) - set(self.kept):
            raise ValueError(f"the maps of the token at position {min(missing)} were not kept")
        return [self.kept.index(position) for position in positions]


@dataclass(frozen=True)
class WordMaps:
    """Where one word was attended to in some images, step by step.

    Attributes:
        values: (images, steps, height, width), the probability that each patch gives the word, 0 to 1.
    """

    values: Tensor

    def at(self, image: int = 0, step: int | None = None) -> Tensor:
        """One image's map as it is: (height, width), each value a probability, 0 to 1.

        Args:
            image: its index.
            step: its index, -1 being the last (the paper's t = 0); None: the mean over the steps.
        """
        maps = self.values[image]
        return maps.mean(dim=0) if step is None else maps[step]

    def heat_map(
        self,
        image: int = 0,
        step: int | None = None,
        *,
        highest: float | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """One image's map for showing: (height, width), each value 0 to 1.

        Args:
            image: see `at`.
            step: see `at`.
            highest: the attention that is shown as 1, with 0 as 0, so that words, steps and images can be
                compared; None: from the map's own lowest to its highest, which shows where and not how much.
            size: (height, width) to interpolate to; None: the size of the recorded maps.
        """
        heat = self.at(image, step)
        low, high = (heat.min(), heat.max()) if highest is None else (heat.new_zeros(()), highest)
        heat = (heat - low) / max(float(high - low), torch.finfo(heat.dtype).tiny)
        return heat.clamp(0, 1) if size is None else _interpolated(heat, size)

    def overlay(
        self, picture: Image.Image, image: int = 0, step: int | None = None, *, highest: float | None = None
    ) -> Image.Image:
        """The heat map over its picture: see `heat_map` and `overlay`."""
        return overlay(picture, self.heat_map(image, step, highest=highest))

    def contour(
        self,
        picture: Image.Image,
        image: int = 0,
        step: int | None = None,
        *,
        highest: float | None = None,
        colour: str = "#ffffff",
    ) -> Image.Image:
        """A line around the hotter half of the heat map: see `heat_map` and `contour`."""
        return contour(picture, self.heat_map(image, step, highest=highest), colour)


def overlay(picture: Image.Image, heat: Tensor) -> Image.Image:
    """Lay a heat map (height, width) of values 0 to 1 over a picture.

    The picture gives the light and shade, attention all the colour: slate, red, yellow.
    """
    shade = ImageOps.colorize(ImageOps.grayscale(picture), black="#707070", white="#ffffff")
    heats = ImageOps.colorize(
        _levels(heat, picture), black="#55546a", mid="#e0483e", white="#ffe066", midpoint=140
    )
    return ImageChops.multiply(heats, shade)


def contour(picture: Image.Image, heat: Tensor, colour: str = "#ffffff", level: float = 0.5) -> Image.Image:
    """Draw a line around the places of a picture where a heat map (height, width) is above `level`."""
    # Four times as large, so that the line's steps melt when it is made small again.
    scale = 4
    large = Image.new("L", (picture.width * scale, picture.height * scale))
    inside = _levels(heat, large).point([255 * (k > 255 * level) for k in range(256)])
    width = max(2, min(picture.size) // 80) * scale
    core = inside.filter(ImageFilter.BoxBlur(width // 2)).point([0] * 255 + [255])
    line = ImageChops.subtract(inside, core)
    drawn = picture.convert("RGB")
    drawn.paste(colour, mask=line.reduce(scale))
    return drawn


def _levels(heat: Tensor, picture: Image.Image) -> Image.Image:
    """A heat map as a grey image of the picture's size."""
    stretched = _interpolated(heat, (picture.height, picture.width))
    return Image.fromarray(stretched.mul(255).round().byte().numpy())


def _interpolated(heat: Tensor, size: tuple[int, int]) -> Tensor:
    """Cubic, and within 0 and 1, which cubic curves overshoot."""
    return F.interpolate(heat[None, None], size, mode="bicubic").clamp(0, 1)[0, 0]
