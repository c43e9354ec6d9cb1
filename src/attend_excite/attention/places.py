"""Where a model attends to text: which layer, and how finely."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Place:
    """One attention layer.

    Attributes:
        name: the layer's name in the network's `named_modules()`.
        downsampling: latent cells per attention cell along one side: 1, 2, 4, 8, ...
        read: how its attention is had: "projections", from what the layer's own projections make of its
            inputs, for plain cross-attention; "fused", from the queries and keys that it hands to fused
            attention, where they are normalised, rotated or joined with the image's before.
    """

    name: str
    downsampling: int
    read: Literal["projections", "fused"] = "projections"


def map_size(latent: tuple[int, int], downsampling: int) -> tuple[int, int]:
    """(height, width) of the attention maps for a latent of (height, width).

    Each halving is a convolution of stride 2 with padding 1, which rounds up.
    """
    height, width = latent
    while downsampling > 1:
        height, width, downsampling = -(-height // 2), -(-width // 2), downsampling // 2
    return height, width
