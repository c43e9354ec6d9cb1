"""Where an architecture attends to text. The only module that knows how a UNet is put together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn

# Stable Diffusion 2.x is the family whose text encoder (OpenCLIP ViT-H) is 1024 wide.
_SD2_TEXT_WIDTH = 1024


@dataclass(frozen=True)
class Place:
    """One cross-attention layer.

    Attributes:
        name: the layer's name in `unet.named_modules()`.
        downsampling: latent cells per attention cell along one side: 1, 2, 4, 8, ...
    """

    name: str
    downsampling: int


def cross_attention_places(unet: UNet2DConditionModel, downsampling: int) -> tuple[Place, ...]:
    """The cross-attention layers of one resolution, in the order in which they run.

    Args:
        unet: a `UNet2DConditionModel` (Stable Diffusion 1.x, 2.x and their relatives).
        downsampling: latent cells per attention cell along one side. The paper's 16x16 maps are 4:
            a quarter of Stable Diffusion's 64x64 latents.

    Raises:
        ValueError: the UNet has no cross-attention at that resolution.
    """
    places = tuple(_all_places(unet))
    chosen = tuple(place for place in places if place.downsampling == downsampling)
    if not chosen:
        have = ", ".join(str(d) for d in sorted({place.downsampling for place in places}))
        raise ValueError(
            f"this model has no cross-attention at 1/{downsampling} of the latent's size: "
            f"choose a downsampling of {have or 'a model with cross-attention'}"
        )
    return chosen


def downsampling_for(unet: UNet2DConditionModel, latent: tuple[int, int], size: tuple[int, int]) -> int:
    """The downsampling at which a latent of (height, width) gives maps of (height, width) `size`.

    Raises:
        ValueError: no cross-attention layer has maps of that size.
    """
    levels = sorted({place.downsampling for place in _all_places(unet)})
    for downsampling in levels:
        if map_size(latent, downsampling) == tuple(size):
            return downsampling
    sizes = ", ".join("{}x{}".format(*map_size(latent, level)) for level in levels)
    raise ValueError(
        f"no cross-attention map is {size[0]}x{size[1]} (height x width): the sizes here are {sizes}"
    )


def map_size(latent: tuple[int, int], downsampling: int) -> tuple[int, int]:
    """(height, width) of the attention maps for a latent of (height, width).

    Each halving is a convolution of stride 2 with padding 1, which rounds up.
    """
    height, width = latent
    while downsampling > 1:
        height, width, downsampling = -(-height // 2), -(-width // 2), downsampling // 2
    return height, width


def attends_to_prompt_only(unet: UNet2DConditionModel) -> bool:
    """Whether the authors normalise attention over the prompt's own tokens (Stable Diffusion 2.x).

    For Stable Diffusion 1.x they normalise over the whole context, padding included.
    """
    return unet.config["cross_attention_dim"] == _SD2_TEXT_WIDTH


def textless_modules(module: nn.Module) -> Iterator[nn.Module]:
    """The largest parts of a UNet that never see the text, single layers left out."""
    for child in module.children():
        if isinstance(child, nn.ModuleList) or any(map(_sees_text, child.modules())):
            yield from textless_modules(child)
        elif next(child.children(), None) is not None:
            yield child


def _all_places(unet: UNet2DConditionModel) -> Iterator[Place]:
    downsampling = 1
    for index, block in enumerate(unet.down_blocks):
        yield from _layers(block, f"down_blocks.{index}", downsampling)
        if getattr(block, "downsamplers", None) is not None:
            downsampling *= 2
    if unet.mid_block is not None:
        yield from _layers(unet.mid_block, "mid_block", downsampling)
    for index, block in enumerate(unet.up_blocks):
        yield from _layers(block, f"up_blocks.{index}", downsampling)
        if getattr(block, "upsamplers", None) is not None:
            downsampling //= 2


def _layers(block: nn.Module, prefix: str, downsampling: int) -> Iterator[Place]:
    for name, module in block.named_modules(prefix=prefix):
        if _sees_text(module):
            yield Place(name, downsampling)


def _sees_text(module: nn.Module) -> bool:
    return isinstance(module, Attention) and module.is_cross_attention
