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
from torch.nn.functional import scaled_dot_product_attention

from training.latents import COLOUR, NAME
from training.scenes import UNCLEAR

# Half precision rounds smaller chances to nothing.
LEAST_CHANCE = 1e-6


class KeepMaps:
    """An attention processor that also hands its head-averaged map to `maps`.

    It writes softmax(QK^T)V out where maps are wanted, and where weights are in bfloat16: on a CPU fused
    attention is then several times slower on its way back. In float32 it is faster, and takes less memory.
    `allowed`, handed to the UNet as one of its `cross_attention_kwargs`, masks the attention to the text: by
    the number of patches, B x patches x T bool.
    """

    def __init__(self, maps: list[Tensor] | None) -> None:
        self.maps = maps

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        allowed: dict[int, Tensor] | None = None,
    ) -> Tensor:
        batch, patches = hidden_states.shape[:2]
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is None and hidden_states.dtype == torch.float32:
            query, key, value = (
                project(source).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
                for project in (attn.to_q, attn.to_k, attn.to_v)
            )
            mixed = scaled_dot_product_attention(query, key, value, scale=attn.scale)
            return attn.to_out[0](mixed.transpose(1, 2).flatten(2))
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key = attn.head_to_batch_dim(attn.to_k(source))
        value = attn.head_to_batch_dim(attn.to_v(source))
        bias, beta = query.new_zeros(()), 0
        if allowed is not None and encoder_hidden_states is not None:
            barred = torch.where(allowed[patches], 0.0, -torch.inf).to(query.dtype)
            bias, beta = barred.repeat_interleave(attn.heads, dim=0), 1
        scores = torch.baddbmm(bias, query, key.transpose(1, 2), beta=beta, alpha=attn.scale)
        probabilities = scores.softmax(dim=-1)
        if self.maps is not None:
            self.maps.append(probabilities.unflatten(0, (batch, -1)).mean(dim=1, dtype=torch.float32))
        return attn.to_out[0](attn.batch_to_head_dim(probabilities @ value))


def keep_maps(unet: UNet2DConditionModel) -> list[Tensor]:
    """Make the cross-attention layers append B x patches x T maps to the list returned.

    All but the middle's, at 4x4 patches too coarse to lie on one sticker. Where only the 16x16
    layers are grounded, a patch may look at one word there and be drawn by another at 8x8.
    Whoever runs the UNet clears the list before each pass.
    """
    maps: list[Tensor] = []

    def processor(name: str) -> KeepMaps:
        return KeepMaps(maps if ".attn2." in name and not name.startswith("mid_block") else None)

    unet.set_attn_processor({name: processor(name) for name in unet.attn_processors})
    return maps


def grounding_loss(maps: list[Tensor], places: Tensor, roles: Tensor, shares: tuple[float, float]) -> Tensor:
    """B losses: cross-entropy between a patch's attention and the shares of it that tokens should have.

    As in Stable Diffusion most attention rests on <sot>, so that the words on a sticker have something
    left to gain: they should have `shares`, the noun's and the colour's, and <sot> the rest, and all of it
    on the background but for what the words for the place take.

    `maps` are B x patches x T, `places` B x 16 x 16, `roles` B x 4 x T (see `latents.Chunk`).
    Stickers and background weigh the same, however large they are.
    """
    losses = torch.zeros(len(places), device=places.device)
    noun, colour = shares
    for attention in maps:
        flat = coarsened(places, attention.shape[1]).flatten(1)
        clear = flat != UNCLEAR
        index = torch.where(clear, flat, 0).long()
        role = roles.gather(1, index[..., None].expand(-1, -1, roles.shape[-1]))

        def held(by: Tensor, attention: Tensor = attention) -> Tensor:
            return ((attention * by).sum(dim=-1) + LEAST_CHANCE).log()

        coloured = colour * (role == COLOUR).any(dim=-1)
        on_sticker = noun * held(role == NAME) + coloured * held(role == COLOUR)
        on_sticker = on_sticker + (1 - noun - coloured) * (attention[..., 0] + LEAST_CHANCE).log()
        surprise = -torch.where(flat > 0, on_sticker, held(role == NAME))
        for side in (clear & (flat > 0), clear & (flat == 0)):
            losses = losses + (surprise * side).sum(dim=1) / side.sum(dim=1).clamp(min=1)
    return losses / (2 * len(maps))


def own_phrases(nearest: Tensor, roles: Tensor, masked: Tensor) -> dict[int, Tensor]:
    """Masks of the text under which patches see <sot>, the background's words and the phrase of the nearest
    sticker alone.

    A model that is now and then shown a scene so learns that what a patch attends to is what it draws.

    Args:
        nearest: B x 16 x 16, as in `latents.Chunk`.
        roles: B x 4 x T, likewise.
        masked: B bool, the scenes that are; the others see everything.

    Returns:
        by the number of patches (256, 64, 16), B x patches x T bool.
    """
    allowed = {}
    for factor in (1, 2, 4):
        # Of a block of patches the one past its middle speaks.
        index = nearest[:, factor // 2 :: factor, factor // 2 :: factor].flatten(1).long()
        seen = roles.gather(1, index[..., None].expand(-1, -1, roles.shape[-1])) > 0
        allowed[index.shape[1]] = seen | (roles[:, :1] > 0) | ~masked[:, None, None]
    return allowed


def coarsened(places: Tensor, patches: int) -> Tensor:
    """A layout B x 16 x 16 as a square of so many patches: unclear where a patch holds two places."""
    factor = int((places[0].numel() // patches) ** 0.5)
    blocks = places.unfold(1, factor, factor).unfold(2, factor, factor).flatten(3)
    low, high = blocks.amin(dim=-1), blocks.amax(dim=-1)
    return torch.where(low == high, low, UNCLEAR)
