"""The host's attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def optimized_attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Any = None, **kwargs: Any
) -> Tensor:
    told = kwargs.get("transformer_options") or {}
    override = told.get("optimized_attention_override")
    if override is not None and not kwargs.get("_inside_attn_wrapper"):
        return override(_without_gradient, q, k, v, heads, mask=mask, **kwargs, _inside_attn_wrapper=True)
    return _without_gradient(q, k, v, heads, mask=mask)


def attention_pytorch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: Any = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **kwargs: Any,
) -> Tensor:
    q, k, v = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def _without_gradient(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Any = None, **_: Any) -> Tensor:
    """As SageAttention, which some have the host use."""
    with torch.no_grad():
        return attention_pytorch(q, k, v, heads, mask=mask)
