"""A model's weights as gradients need them, for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def differentiable(network: nn.Module) -> Iterator[None]:
    """In the block gradients pass through a network whose weights were born in inference mode.

    The host loads models inside of inference mode, and autograd refuses to keep such tensors for the way
    back. Here each is exchanged for an ordinary one on the same memory, which costs none, and asks for no
    gradient of its own. Afterwards the network has the very tensors that it had before.

    Args:
        network: the host's model, on its device.
    """
    exchanged: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []
    frozen: list[Tensor] = []
    try:
        with torch.inference_mode(False):
            for module in network.modules():
                for places in (module._parameters, module._buffers):
                    for name, tensor in places.items():
                        # Tensors of a kind of their own, as of some quantisers, are their makers' business.
                        if tensor is None or type(tensor) not in (nn.Parameter, Tensor):
                            continue
                        if tensor.is_inference():
                            exchanged.append((places, name, tensor, _ordinary(tensor)))
                        elif tensor.requires_grad:
                            frozen.append(tensor)
                            tensor.requires_grad_(False)
            for places, name, _, ordinary in exchanged:
                places[name] = ordinary
        yield
    finally:
        for places, name, tensor, ordinary in exchanged:
            # The host may have put other weights there meanwhile, as its hooks do.
            if places.get(name) is ordinary:
                places[name] = tensor
        for tensor in frozen:
            tensor.requires_grad_(True)


def _ordinary(tensor: Tensor) -> Tensor:
    """The same memory as a tensor that autograd keeps; outside of inference mode."""
    alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
    return nn.Parameter(alias, requires_grad=False) if isinstance(tensor, nn.Parameter) else alias
