"""What was done to a network that the reading of its attention, or the way back through it, can't go with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_PARALLEL = (
    "it is spread over several devices, none of which sees the whole attention; load it for one device, and "
    "offload what doesn't fit"
)


@torch.inference_mode(False)
def refuse_hindrances(network: nn.Module) -> None:
    """Raise a ValueError, in a sentence that says what to undo, where a network can't be nursed.

    To be asked before every run: caches, offloading and adapters are put into a network at any time.
    """
    for module in network.modules():
        for hook in _hooks(module):
            if reason := _hook_reason(module, hook):
                raise ValueError(f"{type(network).__name__} can't be nursed as it is: {reason}")
        processor = type(getattr(module, "processor", None)).__name__
        if "IPAdapter" in processor:
            raise ValueError(
                f"{type(network).__name__} wants a picture beside the text: take the IP-Adapter out first, "
                "with unload_ip_adapter(), or use it in ComfyUI"
            )
        if getattr(getattr(module, "processor", None), "_parallel_config", None) is not None:
            raise ValueError(f"{type(network).__name__} can't be nursed as it is: {_PARALLEL}")
    for module in _quantised(network):
        if not _passes_gradient(module, network):
            raise ValueError(
                f"{type(network).__name__} is quantised by {_quantiser(network)}, and no gradient passes "
                f"through its {type(module).__name__}: load it without, or with a quantiser that keeps only "
                "the weights in fewer bits"
            )


def _hooks(module: nn.Module) -> list[Any]:
    registry = getattr(module, "_diffusers_hook", None)
    return [] if registry is None else list(registry.hooks.values())


def _hook_reason(module: nn.Module, hook: Any) -> str | None:
    """Why a hook can't stay; None: it can."""
    package, _, kind = type(hook).__module__.rpartition(".")
    if package != "diffusers.hooks":
        return None
    if kind == "layerwise_casting":
        # A linear layer's gradient goes through a view of its weights, which stays as it was in the pass.
        if isinstance(module, nn.Linear | nn.Embedding) or next(module.parameters(), None) is None:
            return None
        if type(hook).__name__ == "PeftInputAutocastDisableHook":  # on layers of a LoRA, and stores nothing
            return None
        return (
            f"layerwise casting stores the weights of its {type(module).__name__} in another dtype again "
            "before the way back needs them; load it without"
        )
    if kind == "group_offloading":
        return (
            "group offloading takes weights away before the way back needs them; use "
            "enable_model_cpu_offload() or enable_sequential_cpu_offload()"
        )
    if kind.endswith("parallel"):
        return _PARALLEL
    return (
        f"{kind.replace('_', ' ')} reuses or leaves out what a pass would work out, so the gradient would be "
        "of something else; turn it off, a cache with disable_cache()"
    )


def _quantised(network: Any) -> Iterator[nn.Module]:
    """One linear layer of each kind in a quantised network, as far as its weights are here."""
    if getattr(network, "hf_quantizer", None) is None and not getattr(network, "is_quantized", False):
        return
    seen = set()
    for module in network.modules():
        weight = getattr(module, "weight", None)
        if not hasattr(module, "in_features") or not isinstance(weight, torch.Tensor) or weight.is_meta:
            continue
        kind = type(module), type(weight), type(weight.data)
        if kind not in seen:
            seen.add(kind)
            yield module


def _quantiser(network: Any) -> str:
    config = getattr(getattr(network, "hf_quantizer", None), "quantization_config", None)
    method = getattr(config, "quant_method", "its library")
    return str(getattr(method, "value", method))


def _passes_gradient(linear: Any, network: Any) -> bool:
    """Whether a layer of one's own weights tells how its output changes with its input."""
    values = torch.linspace(-1, 1, linear.in_features, device=linear.weight.device, dtype=network.dtype)
    with torch.enable_grad():
        values = values[None].requires_grad_(True)
        try:
            output = linear(values)
            (gradient,) = torch.autograd.grad(output.float().square().sum(), values)
        except (RuntimeError, NotImplementedError):
            return False
    return bool(gradient.isfinite().all() and gradient.any())
