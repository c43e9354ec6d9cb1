"""Some text tokens seen more, or less, by the image, on what is handed to fused attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attend_excite.attention.fused import fused_attention_answered
from attend_excite.attention.places import Place
from attend_excite.attention.record import Layout, eagerly, image_and_text
from attend_excite.interrupts import cleaning_up, to_the_end


@contextmanager
def weighted_tokens(network: nn.Module, places: Sequence[Place], layout: Layout) -> Iterator[None]:
    """In the block each pass takes `token_weights_above_1` (b, tokens) among its arguments.

    By those weights the attention that the image pays to the text's tokens is multiplied, behind the softmax
    and without normalising it again.

    softmax(QK) diag(c) V = softmax(QK) (diag(c) V), so the image's rows see values that are multiplied, and
    the text's rows those of the model. The map is never made. The price is the text's rows a second time, a
    ninth of the attention for 512 tokens beside 4096 patches. What the caller has compiled runs eagerly.

    Args:
        network: the model.
        places: its attention layers.
        layout: of image and text in them.
    """
    now: list[Tensor] = []

    def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Kept after the pass: with gradient checkpointing the layers run again on the way back.
        now[:] = [kwargs.pop("token_weights_above_1")]
        return args, kwargs

    def answer(place: Place) -> Callable[..., Tensor]:
        def weighted(
            fused: Callable[..., Tensor],
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attn_mask: Tensor | None = None,
            *rest: Any,
            **options: Any,
        ) -> Tensor:
            image, text = image_and_text(key, place, layout)
            if layout.joint is None:
                text = slice(0, key.shape[-2])
            factors = value.new_ones(len(value), 1, value.shape[-2], 1)
            # Some of a batch may have a shorter text than the whole batch: the rest is padding, and last.
            tokens = min(now[0].shape[1], text.stop - text.start)
            factors[:, 0, text.start : text.start + tokens, 0] += now[0][:, :tokens].to(value.dtype)
            # First with all rows, as the layer itself asks: whoever listens too hears the whole attention.
            output = fused(query, key, value * factors, attn_mask, *rest, **options)
            if layout.joint is None:
                return output
            others = slice(0, image.start) if image.start else slice(image.stop, None)
            if attn_mask is not None and attn_mask.shape[-2] > 1:
                attn_mask = attn_mask[..., others, :]
            own = fused(query[:, :, others], key, value, attn_mask, *rest, **options)
            parts = (own, output[:, :, image]) if image.start else (output[:, :, image], own)
            return torch.cat(parts, dim=2)

        return weighted

    with cleaning_up() as stack:
        stack.callback(to_the_end, network.register_forward_pre_hook(take, with_kwargs=True).remove)
        for place in places:
            layer = network.get_submodule(place.name)
            stack.enter_context(fused_attention_answered(layer, place.name, answer(place)))
        stack.enter_context(eagerly(network, places))
        yield
