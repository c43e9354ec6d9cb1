"""Convolutions with large weights as matrix products: the same result, on a CPU sooner."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

from torch import Tensor, nn
from torch.nn import functional as F

# oneDNN copies a convolution's weights into an order of its own at every call. Blocks above this size glibc
# takes from the system and gives back each time, and to map their pages costs more than to fill them.
_LARGE_WEIGHTS = 32 * 2**20


@contextmanager
def large_convolutions_as_products(network: nn.Module) -> Iterator[None]:
    """In the block, convolutions with large weights that meet few cells run as one matrix product each.

    In Stable Diffusion these are the 3x3 ones of 1280 channels at 16x16 and below, two thirds of what a
    guidance pass convolves. A product takes the weights as they lie. Layers on a GPU, compiled ones and those
    whose `forward` another library has replaced stay as they are. Afterwards everything is as it was.
    """
    compiled = any(module._compiled_call_impl is not None for module in network.modules())
    layers = [] if compiled else [layer for layer in network.modules() if _is_large(layer)]
    try:
        for layer in layers:
            layer.forward = MethodType(_convolution, layer)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _is_large(layer: nn.Module) -> bool:
    return (
        type(layer) is nn.Conv2d
        and "forward" not in vars(layer)
        and layer.weight.is_cpu
        and layer.weight.nbytes > _LARGE_WEIGHTS
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
