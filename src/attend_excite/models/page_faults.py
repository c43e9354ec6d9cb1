"""Layers that need large blocks of memory, done in another way: the same result, on a CPU sooner."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn
from torch.nn import functional as F

from attend_excite.interrupts import to_the_end

# Blocks above this size glibc takes from the system and gives back each time, and to map their pages costs
# more than to fill them.
_LARGE = 32 * 2**20


@contextmanager
def sparing_page_faults(network: nn.Module) -> Iterator[None]:
    """In the block, layers of a network on the CPU do without blocks of memory above 32 MiB.

    Convolutions with large weights that meet few cells run as one matrix product each: oneDNN copies the
    weights into an order of its own at every call, and a product takes them as they lie. In Stable Diffusion
    these are the 3x3 ones of 1280 channels at 16x16 and below, two thirds of what a guidance pass convolves.
    Feed-forward layers take their tokens in slices, as those at 64x64, to the same bits.

    Layers on a GPU, compiled ones and those whose `forward` another library has replaced stay as they are.
    Afterwards everything is as it was.
    """
    compiled = any(module._compiled_call_impl is not None for module in network.modules())
    layers = [] if compiled else [(layer, _other_way(layer)) for layer in network.modules()]
    layers = [(layer, forward) for layer, forward in layers if forward is not None]

    def restore() -> None:
        for layer, _ in layers:
            vars(layer).pop("forward", None)

    try:
        for layer, forward in layers:
            layer.forward = MethodType(forward, layer)
        yield
    finally:
        to_the_end(restore)


def _other_way(layer: nn.Module) -> Callable[..., Tensor] | None:
    if "forward" in vars(layer):
        return None
    if type(layer) is FeedForward and all(weight.is_cpu for weight in layer.parameters()):
        return _feed_forward
    return _convolution if _is_large(layer) else None


def _is_large(layer: nn.Module) -> bool:
    return (
        type(layer) is nn.Conv2d
        and layer.weight.is_cpu
        and layer.weight.nbytes > _LARGE
        and layer.weight.is_contiguous()
        and layer.padding == _margins(layer)
        and (layer.dilation, layer.groups, layer.padding_mode) == ((1, 1), 1, "zeros")
    )


def _margins(layer: nn.Conv2d) -> tuple[int, ...]:
    """The padding with which every cell is the middle of a patch."""
    return tuple(size // 2 for size in layer.kernel_size)


def _convolution(layer: nn.Conv2d, images: Tensor) -> Tensor:
    height, width = (
        -(-cells // stride) for cells, stride in zip(images.shape[-2:], layer.stride, strict=True)
    )
    # With more cells, over all images, the convolution itself outweighs the copy.
    few = len(images) * height * width <= layer.out_channels / 2
    if not (images.is_cpu and few):
        return nn.Conv2d.forward(layer, images)
    columns = F.unfold(images, layer.kernel_size, padding=_margins(layer), stride=layer.stride)
    columns = columns.transpose(0, 1).flatten(1)
    product = layer.weight.flatten(1) @ columns
    if layer.bias is not None:
        product = product + layer.bias[:, None]
    return product.unflatten(1, (len(images), height, width)).transpose(0, 1).contiguous()


def _feed_forward(layer: FeedForward, tokens: Tensor) -> Tensor:
    inner: Any = layer.net[0]
    at_once = (_LARGE - 1) // (inner.proj.out_features * tokens.itemsize)
    if not tokens.is_cpu or tokens[..., 0].numel() <= at_once:
        return FeedForward.forward(layer, tokens)
    done = [FeedForward.forward(layer, part) for part in tokens.flatten(0, -2).split(at_once)]
    return torch.cat(done).unflatten(0, tokens.shape[:-1])
