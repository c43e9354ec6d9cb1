"""What diffusion transformers have in common: patches of one size, whose maps are averaged down."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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


def share_of(blocks: int, first: float, last: float) -> range:
    """The blocks from one share of the depth to another, both included."""
    return range(int(first * blocks), min(int(last * blocks) + 1, blocks))


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
