"""Keys from one text and values from another, in one pass and on any attention processor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from attend_excite.interrupts import to_the_end


def side_by_side(keys: Tensor, values: Tensor) -> Tensor:
    """Sets of texts as one text, laid out behind each other along its width.

    So whoever takes rows of a batch out of it (refinement does) has everything that belongs to them, and
    nothing needs to know which rows a pass is of.

    Args:
        keys: (B, sets, tokens, width) text embeddings.
        values: likewise.

    Returns:
        (B, tokens, sets * 2 * width): what a UNet gets as its text in an `attend_to_sets` block.
    """
    return torch.stack([keys, values], dim=2).movedim(3, 1).flatten(2)


@contextmanager
def attend_to_sets(unet: UNet2DConditionModel, sets: int, width: int) -> Iterator[None]:
    """In the block every cross-attention layer takes its text apart as `side_by_side` put it together.

    With the queries Q of a layer and its projections of each set's keys K_i and values V_i, the attention
    that goes into the layer's output projection is the mean over the sets of softmax(Q K_i^T / sqrt(d)) V_i.
    All that is added are hooks; so fused attention, and any processor, stays.

    Args:
        unet: the model.
        sets: how many sets of keys and values there are, 1 or more.
        width: of one text embedding.

    Raises:
        ValueError: the layers' projections are fused.
    """
    layers = [layer for layer in unet.modules() if isinstance(layer, Attention) and layer.is_cross_attention]
    if any(getattr(layer, "fused_projections", False) for layer in layers):
        raise ValueError(
            "keys and values of different texts need projections of their own: call unfuse_qkv_projections()"
        )

    def only_keys(_: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        return args[0][..., :width]

    def only_values(_: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        return args[0][..., width : 2 * width]

    def spread(
        _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        # A set becomes an image of the batch: (b, tokens, sets * 2w) -> (b * sets, tokens, 2w).
        text = kwargs["encoder_hidden_states"].unflatten(-1, (sets, -1)).movedim(2, 1).flatten(0, 1)
        return (args[0].repeat_interleave(sets, dim=0), *args[1:]), kwargs | {"encoder_hidden_states": text}

    def average(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # The output projection is affine, so the mean behind it is that of the attention before it.
        return output.unflatten(0, (-1, sets)).mean(dim=1)

    handles: list[RemovableHandle] = []

    def remove() -> None:
        for handle in handles:
            handle.remove()

    try:
        for layer in layers:
            assert layer.to_k is not None
            assert layer.to_v is not None
            handles.append(layer.to_k.register_forward_pre_hook(only_keys))
            handles.append(layer.to_v.register_forward_pre_hook(only_values))
            if sets > 1:
                handles.append(layer.register_forward_pre_hook(spread, with_kwargs=True))
                handles.append(layer.register_forward_hook(average))
        yield
    finally:
        to_the_end(remove)
