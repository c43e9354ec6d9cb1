"""What diffusion transformers have in common: patches of one size, whose maps are averaged down."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from attend_excite.attention.places import Place


def fused_places(names: Sequence[str], patch: int, downsampling: int) -> tuple[Place, ...]:
    """Layers of one patch size whose fused attention is read.

    Args:
        names: of the layers, in running order.
        patch: latent cells a patch has along one side.
        downsampling: of the maps that are wanted, a multiple of `patch` by a power of two.

    Raises:
        ValueError: maps of patches can't be averaged to that.
    """
    times, rest = divmod(downsampling, patch)
    if rest or times < 1 or times & (times - 1):
        raise ValueError(
            f"this model's attention is at 1/{patch} of the latent's size: choose a downsampling of {patch}, "
            f"{2 * patch} or {4 * patch}"
        )
    return tuple(Place(name, patch, "fused") for name in names)


# Blocks 5 to 12 of 24: Self-Cross Diffusion Guidance (CVPR 2025) on Stable Diffusion 3.
_READ = 5 / 24, 12 / 24


def blocks_read(blocks: int) -> range:
    """Of so many blocks those that are read: the share of the depth that is read of Stable Diffusion 3."""
    first, last = (int(share * blocks) for share in _READ)
    return range(first, min(last + 1, blocks))


def places_read(layers: Sequence[Place], downsampling: int) -> tuple[Place, ...]:
    """That share of all layers, for maps of a downsampling: see `fused_places`."""
    chosen = [layers[block].name for block in blocks_read(len(layers))]
    return fused_places(chosen, layers[0].downsampling, downsampling)


def resolution_shift(scheduler: Any, patches: int, max_shift: float = 1.15) -> float | None:
    """`mu` of flow matching's schedule for a picture of so many patches; None: the scheduler has none.

    A line through the two points of the scheduler's configuration (Esser et al., 2024): the more patches, the
    longer the run stays at high noise.
    """
    config = scheduler.config
    if not config.get("use_dynamic_shifting"):
        return None
    fewest, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", max_shift)
    slope = (high - low) / (most - fewest)
    return patches * slope + (low - slope * fewest)


def activation_bytes(network: Any, tokens: int, width: int, blocks: int) -> int:
    """About how much memory a guidance pass takes for each image: what a block keeps for the way back is some
    30 times its tokens."""
    return 30 * blocks * tokens * width * network.dtype.itemsize


def set_flow_timesteps(scheduler: Any, steps: int, device: torch.device, mu: float | None) -> None:
    """Evenly spaced noise levels from 1 to 1/steps, shifted as the scheduler is told to.

    Args:
        scheduler: a run's own.
        steps: denoising steps.
        device: of the timesteps.
        mu: from `resolution_shift`.
    """
    accepted = signature(scheduler.set_timesteps).parameters
    options: dict[str, Any] = {"num_inference_steps": steps}
    # Those that work noise levels out themselves do so where their owner says.
    if "sigmas" in accepted and not scheduler.config.get("use_flow_sigmas"):
        options = {"sigmas": np.linspace(1.0, 1 / steps, steps)}
    if mu is not None:
        options["mu"] = mu
    scheduler.set_timesteps(device=device, **options)
    scheduler.set_begin_index(0)


def chat_template(tokenizer: Any, **options: Any) -> str:
    """What a language model's tokenizer makes of what a user says, with "{}" in the place of that."""
    said = [{"role": "user", "content": "{}"}]
    return tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True, **options)


def packed(latents: Tensor) -> Tensor:
    """(B, C, height, width) -> (B, patches, 4 C): each 2x2 cells one patch."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpacked(patches: Tensor, size: tuple[int, int]) -> Tensor:
    """What `packed` made of latents of (height, width) `size`, back again."""
    grid = patches.transpose(1, 2).unflatten(2, (size[0] // 2, size[1] // 2))
    return F.pixel_shuffle(grid, 2)
