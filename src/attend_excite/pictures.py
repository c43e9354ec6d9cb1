"""Pictures that a run begins from: read, brought to size, masked, told apart."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

STRENGTH = 0.8
"""Where nobody says otherwise."""

_REDRAWN = 128
"""From this grey on a pixel of a mask is drawn anew."""


@dataclass(frozen=True)
class Beginning:
    """What pictures are made from, beside noise.

    Attributes:
        picture: in the size in which is drawn, RGB.
        strength: how much is made anew, above 0 to 1: the share of the steps that are made.
        mask: in the same size, white where is drawn and black where the picture stays; None: everywhere.
    """

    picture: Image.Image
    strength: float = STRENGTH
    mask: Image.Image | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.picture.height, self.picture.width

    def pixels(self) -> Tensor:
        """(1, 3, height, width), -1 to 1."""
        pixels = torch.from_numpy(np.array(self.picture, dtype=np.float32) / 255)
        return 2 * pixels.permute(2, 0, 1)[None] - 1

    def cells(self, size: tuple[int, int]) -> Tensor | None:
        """(1, 1, height, width) which cells of the latents are drawn: all with a pixel that is; None: all.

        Args:
            size: (height, width) of the latents.
        """
        if self.mask is None:
            return None
        drawn = torch.from_numpy(np.array(self.mask)) >= _REDRAWN
        return F.adaptive_max_pool2d(drawn[None, None].float(), size) > 0

    def pasted(self, drawn: Image.Image) -> Image.Image:
        """A picture that was drawn, with this one's own pixels where the mask is black."""
        return drawn if self.mask is None else Image.composite(drawn, self.picture, self.mask)


def beginning(
    picture: Any,
    strength: float | None,
    mask: Any,
    *,
    height: int | None,
    width: int | None,
    multiple: int,
) -> Beginning | None:
    """What a caller wants pictures to be made from; None: from noise alone.

    Args:
        picture: a PIL picture or the path of one. In another size than its own it is scaled to fill that,
            and what juts out is cut; in its own it is cut to what can be drawn.
        strength: None: 0.8.
        mask: likewise of the picture's size, white where is drawn.
        height: in pixels; None: the picture's own.
        width: likewise.
        multiple: of what height and width are to be multiples, in pixels.

    Raises:
        ValueError: a file is no picture, the strength is out of its range, the mask doesn't fit, or there is
            one without a picture.
    """
    if picture is None:
        given = [what for what, value in (("strength", strength), ("mask", mask)) if value is not None]
        if given:
            raise ValueError(f"there is a {given[0]}, but no picture to begin from: give image=, or --image")
        return None
    strength = STRENGTH if strength is None else strength
    if isinstance(strength, bool) or not isinstance(strength, Real) or not 0 < strength <= 1:
        raise ValueError(f"strength is {strength!r}: it must be a number above 0, 1 at most")
    picture = read_picture(picture)
    if mask is not None:
        mask = read_picture(mask, "L")
        if mask.size != picture.size:
            raise ValueError(
                f"the mask is {_size(mask)} and the picture {_size(picture)} pixels: make them equal"
            )
    own = picture.width // multiple * multiple, picture.height // multiple * multiple
    wanted = own[0] if width is None else width, own[1] if height is None else height
    if min(wanted) < 1:
        raise ValueError(f"the picture is {_size(picture)} pixels: give one of {multiple} or more each way")

    def fitted(image: Image.Image) -> Image.Image:
        if wanted == own:
            left, top = (image.width - wanted[0]) // 2, (image.height - wanted[1]) // 2
            return image.crop((left, top, left + wanted[0], top + wanted[1]))
        return ImageOps.fit(image, wanted, Image.Resampling.LANCZOS)

    mask = None if mask is None else fitted(mask)
    if mask is not None and not (np.array(mask) >= _REDRAWN).any():
        raise ValueError("the mask is black everywhere, so nothing is drawn: make white what is to be drawn")
    return Beginning(fitted(picture), float(strength), mask)


def read_picture(source: Any, mode: str = "RGB") -> Image.Image:
    """A PIL picture, or a file's, upright, on white where it is transparent.

    Args:
        source: it, or its path.
        mode: PIL's: "RGB", or "L" for shades of grey.

    Raises:
        ValueError: it is none, or can't be read.
    """
    if isinstance(source, Image.Image):
        image = source
    elif isinstance(source, str | Path):
        try:
            with Image.open(source) as file:
                file.load()
                image = file
        except FileNotFoundError:
            raise ValueError(f"there is no picture '{source}'") from None
        except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as e:
            raise ValueError(f"'{source}' is not a picture that can be read") from e
    else:
        raise ValueError(f"a {type(source).__name__} is no picture: give a PIL picture, or the path of one")
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


@dataclass(frozen=True)
class PictureFile:
    """A picture on disk, known again by its pixels.

    Attributes:
        path: as it was given.
        digest: of its pixels, 16 hex digits.
    """

    path: str
    digest: str

    @classmethod
    def at(cls, path: str | Path, mode: str = "RGB") -> PictureFile:
        """The picture of this path.

        Raises:
            ValueError: it isn't there, or can't be read.
        """
        return cls(str(path), digest_of_picture(read_picture(path, mode)))

    def read(self, mode: str = "RGB") -> Image.Image:
        """The picture.

        Raises:
            ValueError: it isn't there any more, or is another by now.
        """
        option = {"RGB": "the picture", "L": "the mask"}[mode], {"RGB": "--image", "L": "--mask"}[mode]
        if not Path(self.path).is_file():
            raise ValueError(f"{option[0]} '{self.path}' is not here: say with {option[1]} where it is")
        image = read_picture(self.path, mode)
        if digest_of_picture(image) != self.digest:
            raise ValueError(
                f"{option[0]} '{self.path}' is another than the one that was drawn with: say with "
                f"{option[1]} where that is (its pixels' digest is {self.digest})"
            )
        return image


def digest_of_picture(image: Image.Image) -> str:
    """16 hex digits of a picture's pixels, whatever its file says beside them."""
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()[:16]


def _size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"
