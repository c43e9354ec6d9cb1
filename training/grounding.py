"""Attention that means something: cross-attention maps, and the loss that grounds them.

Without it a small model reads the whole prompt from the padding tokens, and a subject's
own token carries nothing that could be excited. As TokenCompose (CVPR 2024) does for Stable
Diffusion, a patch on a sticker is asked to attend to the sticker's noun, and a patch of
the background to <sot> or to the words that name the place.
"""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor

from training.latents import UNCLEAR


class KeepMaps:
    """An attention processor that also hands its head-averaged map to `maps`."""

    def __init__(self, maps: list[Tensor]) -> None:
        self.maps = maps

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        batch = len(hidden_states)
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
        value = attn.head_to_batch_dim(attn.to_v(encoder_hidden_states))
        probabilities = attn.get_attention_scores(query, key)
        self.maps.append(probabilities.unflatten(0, (batch, -1)).mean(dim=1))
        return attn.to_out[0](attn.batch_to_head_dim(probabilities @ value))


def keep_maps(unet: UNet2DConditionModel) -> list[Tensor]:
    """Make the cross-attention layers append B x patches x T maps to the list returned.

    All but the middle's, at 4x4 patches too coarse to lie on one sticker. Where only the 16x16
    layers are grounded, a patch may look at one word there and be drawn by another at 8x8.
    Whoever runs the UNet clears the list before each pass.
    """
    maps: list[Tensor] = []
    processors = dict(unet.attn_processors)
    for name in processors:
        if ".attn2." in name and not name.startswith("mid_block"):
            processors[name] = KeepMaps(maps)
    unet.set_attn_processor(processors)
    return maps


def grounding_loss(maps: list[Tensor], places: Tensor, wanted: Tensor) -> Tensor:
    """B losses: cross-entropy of the patches' attention to the tokens they should look at.

    `maps` are B x patches x T, `places` B x 16 x 16, `wanted` B x 4 x T (see `latents.Chunk`).
    Stickers and background weigh the same, however large they are.
    """
    losses = torch.zeros(len(places))
    for attention in maps:
        flat = coarsened(places, attention.shape[1]).flatten(1)
        clear = flat != UNCLEAR
        index = torch.where(clear, flat, 0).long()
        targets = wanted.gather(1, index[..., None].expand(-1, -1, wanted.shape[-1]))
        surprise = -((attention * targets).sum(dim=-1) + 1e-6).log()
        for side in (clear & (flat > 0), clear & (flat == 0)):
            losses = losses + (surprise * side).sum(dim=1) / side.sum(dim=1).clamp(min=1)
    return losses / (2 * len(maps))


def coarsened(places: Tensor, patches: int) -> Tensor:
    """A layout B x 16 x 16 as a square of so many patches: unclear where a patch holds two places."""
    factor = int((places[0].numel() // patches) ** 0.5)
    blocks = places.unfold(1, factor, factor).unfold(2, factor, factor).flatten(3)
    low, high = blocks.amin(dim=-1), blocks.amax(dim=-1)
    return torch.where(low == high, low, UNCLEAR)
