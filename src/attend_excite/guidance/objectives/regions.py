"""Which patches a map marks: Otsu's threshold, and the connected region about its peak."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def above_otsu(maps: Tensor) -> Tensor:
    """The patches above Otsu's threshold, which splits a map's values into two classes as far apart as can
    be.

    Exact, with no histogram: the variance between the classes is worked out for every split of the sorted
    values.

    Args:
        maps: (..., H, W).

    Returns:
        (..., H, W) bool; none of a map whose values are all the same.
    """
    values = maps.detach().flatten(-2).sort(dim=-1).values
    n = values.shape[-1]
    below = torch.arange(1, n, device=maps.device, dtype=values.dtype)
    sums = values.cumsum(dim=-1)
    mean_below = sums[..., :-1] / below
    mean_above = (sums[..., -1:] - sums[..., :-1]) / (n - below)
    between = below * (n - below) * (mean_above - mean_below) ** 2
    threshold = values.gather(-1, between.argmax(dim=-1, keepdim=True))
    return maps.detach() > threshold[..., None]


def region_of_peak(maps: Tensor) -> Tensor:
    """The patches above Otsu's threshold that are connected, diagonally too, with the map's peak.

    Args:
        maps: (..., H, W).

    Returns:
        (..., H, W) bool; the peak is always in it.
    """
    flat = maps.detach().flatten(-2)
    peak = F.one_hot(flat.argmax(dim=-1), flat.shape[-1]).bool().view(maps.shape)
    allowed = above_otsu(maps) | peak
    region = peak
    # Each round grows the region by one patch to all sides, until none does.
    while True:
        grown = F.max_pool2d(region.reshape(-1, 1, *region.shape[-2:]).float(), 3, stride=1, padding=1)
        grown = grown.view(region.shape).bool() & allowed
        if torch.equal(grown, region):
            return region
        region = grown
