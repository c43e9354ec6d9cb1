"""What Stable Diffusion's UNets have in common: where they attend to text, and what never sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from attend_excite.a1111 import Chunk
from attend_excite.attention.places import Place
from attend_excite.attention.texts import attend_to_sets
from attend_excite.models.families.base import Family


class UNetFamily(Family):
    """Around a `UNet2DConditionModel`, whose cross-attention layers have different resolutions."""

    network_part = "unet"
    reads_chunks = True
    sets_refusal = None
    activations: ClassVar[int] = 230
    """What a guidance pass keeps for the way back, in activations of the UNet's first level: 190 in Stable
    Diffusion 1.4, 230 in `stickers`."""

    def places(self, downsampling: int) -> tuple[Place, ...]:
        return cross_attention_places(self.network, downsampling)

    def self_places(self, places: Sequence[Place]) -> tuple[Place, ...]:
        return self_attention_places(self.network, places)

    def all_places(self) -> tuple[Place, ...]:
        return tuple(all_places(self.network))

    def downsamplings(self) -> tuple[int, ...]:
        return downsamplings(self.network)

    def attend_to_sets(self, sets: int, width: int) -> AbstractContextManager[None]:
        return attend_to_sets(self.network, sets, width)

    def textless_modules(self) -> tuple[nn.Module, ...]:
        return tuple(textless_modules(self.network))

    def activation_bytes(self, size: tuple[int, int]) -> int:
        first_level = size[0] * size[1] * self.network.config["block_out_channels"][0]
        # Twice what is kept, for what else comes and goes.
        return 2 * self.activations * first_level * self.network.dtype.itemsize


def in_weighted_chunks(
    tokenizer: Any, chunks: Sequence[Chunk], number: int, encode: Callable[[Tensor], Tensor]
) -> Tensor:
    """The embeddings (1, tokens number, width) of a text in A1111's syntax, chunk behind chunk.

    Each token's are multiplied by its weight, and then each chunk's by what makes the mean of its numbers
    what it was before.

    Args:
        tokenizer: of the text encoder.
        chunks: of the text.
        number: how many there are to be; empty ones follow.
        encode: (1, tokens) token ids -> their embeddings (1, tokens, width).
    """
    parts: list[Tensor] = []
    for chunk in [*chunks, *[Chunk()] * (number - len(chunks))]:
        filled = [tokenizer.pad_token_id] * (tokenizer.model_max_length - 2 - len(chunk.ids))
        states = encode(torch.tensor([[tokenizer.bos_token_id, *chunk.ids, tokenizer.eos_token_id, *filled]]))
        if set(chunk.weights) <= {1.0}:
            parts.append(states)
            continue
        before = states.to(torch.promote_types(states.dtype, torch.float32))
        weights = before.new_tensor([1.0, *chunk.weights, *[1.0] * (1 + len(filled))])
        after = before * weights[:, None]
        parts.append((after * (before.mean() / after.mean())).to(states.dtype))
    return torch.cat(parts, dim=1)


def refusal(config: Mapping[str, Any], addition: str | None = None) -> str | None:
    """Why a UNet can't be served, in a sentence; None: it can.

    Args:
        config: the UNet's.
        addition: what it is told beside the text, by its `addition_embed_type`.
    """
    if config.get("in_channels") != config.get("out_channels"):
        return "its UNet needs more than latents and a text, as those of inpainting do"
    if config.get("addition_embed_type") != addition:
        return "its UNet needs more than latents and a text"
    if config.get("class_embed_type") is not None or config.get("num_class_embeds") is not None:
        return "its UNet is told a class, as those of upscalers are"
    if config.get("encoder_hid_dim_type") is not None:
        return "its UNet wants more than a text, as with an IP-Adapter: take that out first"
    if config.get("time_cond_proj_dim") is not None:
        return "its UNet is told the guidance, as those of latent consistency models are"
    return None


def cross_attention_places(unet: UNet2DConditionModel, downsampling: int) -> tuple[Place, ...]:
    """The cross-attention layers of one resolution, in the order in which they run.

    Args:
        unet: a `UNet2DConditionModel` (Stable Diffusion 1.x, 2.x, XL and their relatives).
        downsampling: latent cells per attention cell along one side. The paper's 16x16 maps are 4:
            a quarter of Stable Diffusion's 64x64 latents.

    Raises:
        ValueError: the UNet has no cross-attention at that resolution.
    """
    places = tuple(all_places(unet))
    chosen = tuple(place for place in places if place.downsampling == downsampling)
    if not chosen:
        have = ", ".join(str(d) for d in sorted({place.downsampling for place in places}))
        raise ValueError(
            f"this model has no cross-attention at 1/{downsampling} of the latent's size: "
            f"choose a downsampling of {have or 'a model with cross-attention'}"
        )
    return chosen


def self_attention_places(unet: nn.Module, places: Sequence[Place]) -> tuple[Place, ...]:
    """The self-attention layers beside cross-attention layers, in the same transformer blocks.

    Raises:
        ValueError: there are none.
    """
    modules = dict(unet.named_modules())
    beside = (Place(place.name.removesuffix("attn2") + "attn1", place.downsampling) for place in places)
    found = tuple(place for place in beside if place.name in modules and not _sees_text(modules[place.name]))
    if not found:
        raise ValueError(
            "this model has no self-attention of the size of its maps, which this method reads: "
            "choose another method"
        )
    return found


def downsamplings(unet: UNet2DConditionModel) -> tuple[int, ...]:
    """The downsamplings at which a UNet attends to text."""
    return tuple(sorted({place.downsampling for place in all_places(unet)}))


def textless_modules(module: nn.Module) -> Iterator[nn.Module]:
    """The largest parts of a UNet that never see the text, single layers left out."""
    for child in module.children():
        if isinstance(child, nn.ModuleList) or any(map(_sees_text, child.modules())):
            yield from textless_modules(child)
        elif next(child.children(), None) is not None:
            yield child


def all_places(unet: UNet2DConditionModel) -> Iterator[Place]:
    """Every cross-attention layer, in running order."""
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
