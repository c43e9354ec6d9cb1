"""The host's attention, heard by replacing it: what to put among its options for the length of one pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from attend_excite.attention.places import Place, map_size
from attend_excite.attention.record import Layout, Recording

from .architectures import Architecture


class Heard(Exception):
    """Unwinds a pass whose last wanted map is there."""


class Hearing:
    """One pass of the host's model that is listened to.

    Args:
        architecture: of the model.
        network: the host's.
        layout: how the maps are taken.
        uuid: the host's mark of the conditioning that is listened to, among all that a pass works out.
        images: whether the image's attention to itself is kept, too.
        last: the layer after which the pass is ended, by name; None: it is not.
    """

    def __init__(
        self,
        architecture: Architecture,
        network: Any,
        layout: Layout,
        uuid: Any,
        *,
        images: bool = False,
        last: str | None = None,
    ) -> None:
        self._architecture, self._network, self._layout = architecture, network, layout
        self._uuid, self._images, self._last = uuid, images, last
        downsampling = architecture.patch or layout.downsampling
        assert downsampling is not None
        self._downsampling = downsampling
        self.recording = Recording([self._place("")], layout)
        self.latest: str | None = None

    def among(self, options: dict[str, Any]) -> None:
        """Put it among the options of a pass, which are the caller's own copy."""
        told = options.setdefault("transformer_options", {})
        replaced = told.setdefault("patches_replace", {})
        if self._architecture.patch is not None:
            blocks = replaced.setdefault("dit", {})
            for index in self._read_blocks():
                key = ("double_block", index)
                blocks[key] = self._double_block(f"double_block.{index}", blocks.get(key))
            return
        for kind in ("attn1", "attn2") if self._images else ("attn2",):
            layers = replaced.setdefault(kind, {})
            for key in {*_unet_blocks(self._network), *layers}:
                layers[key] = self._attention(layers.get(key), of_image=kind == "attn1")

    def _read_blocks(self) -> range:
        blocks = getattr(self._network, "double_blocks", None) or self._network.joint_blocks
        first, last = (int(share * len(blocks)) for share in self._architecture.read)
        return range(first, min(last + 1, len(blocks)))

    def _attention(self, replaced: Callable[..., Tensor] | None, of_image: bool) -> Callable[..., Tensor]:
        """A UNet's layer, in the place of the host's own or of what another node has put there."""

        def attend(query: Tensor, key: Tensor, value: Tensor, told: dict[str, Any]) -> Tensor:
            from comfy.ldm.modules.attention import optimized_attention

            heads = told["n_heads"]
            height, width = map_size(self._layout.size, self._downsampling)
            if query.shape[1] == height * width:
                name = f"{told.get('block')}.{told.get('block_index')}"
                self._hear(name, _by_head(query, heads), _by_head(key, heads), None, told, of_image)
                if not of_image and name == self._last:
                    raise Heard
            if replaced is not None:
                return replaced(query, key, value, told)
            precision = told.get("attn_precision")
            return optimized_attention(
                query, key, value, heads, attn_precision=precision, transformer_options=told
            )

        return attend

    def _double_block(self, name: str, replaced: Callable[..., Any] | None) -> Callable[..., Any]:
        """A transformer's block, around the host's own or around what another node has put there."""

        def block(args: Mapping[str, Any], extra: Mapping[str, Any]) -> Any:
            told = dict(args["transformer_options"])
            answered = told.get("optimized_attention_override")
            height, width = map_size(self._layout.size, self._downsampling)

            def attend(
                function: Callable[..., Tensor],
                query: Tensor,
                key: Tensor,
                value: Tensor,
                heads: int,
                mask: Tensor | None = None,
                **options: Any,
            ) -> Tensor:
                split = options.get("skip_reshape")
                rows, columns = (each if split else _by_head(each, heads) for each in (query, key))
                # Of SD 3.5 medium's two attentions the second is the image's alone. Asked each time, since
                # with gradient checkpointing the block runs again on the way back.
                if columns.shape[-2] > height * width:
                    self._hear(name, rows, columns, _as_fused(mask), told, False)
                    if self._images:
                        self._hear(name, rows, columns, _as_fused(mask), told, True)
                if answered is None:
                    return function(query, key, value, heads, mask=mask, **options)
                return answered(function, query, key, value, heads, mask=mask, **options)

            own = {**args, "transformer_options": {**told, "optimized_attention_override": attend}}
            out = extra["original_block"](own) if replaced is None else replaced(own, extra)
            # Not inside of the attention, which the host may have put under gradient checkpointing.
            if name == self._last:
                raise Heard
            return out

        return block

    def _hear(
        self,
        name: str,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        told: Mapping[str, Any],
        of_image: bool,
    ) -> None:
        parts: Sequence[Any] = told["uuids"]
        if self._uuid not in parts:
            return
        images = len(query) // len(parts)
        rows = slice(parts.index(self._uuid) * images, (parts.index(self._uuid) + 1) * images)
        if mask is not None and len(mask) > 1:
            mask = mask[rows]
        self.recording.hear(self._place(name), query[rows], key[rows], mask, of_image=of_image)
        if not of_image:
            self.latest = name

    def _place(self, name: str) -> Place:
        return Place(name, self._downsampling, "fused")


def by_fused_attention(options: dict[str, Any]) -> None:
    """Let PyTorch's fused attention answer in a pass: not all that the host may use has a gradient."""

    def attend(_: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        from comfy.ldm.modules.attention import attention_pytorch

        return attention_pytorch(*args, **kwargs)

    options.setdefault("transformer_options", {})["optimized_attention_override"] = attend


def _unet_blocks(network: Any) -> list[tuple[str, int]]:
    blocks = [("input", index) for index in range(len(network.input_blocks))]
    return [*blocks, ("middle", 0), *(("output", index) for index in range(len(network.output_blocks)))]


def _by_head(tokens: Tensor, heads: int) -> Tensor:
    """(B, tokens, heads x d) -> (B, heads, tokens, d)."""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


def _as_fused(mask: Tensor | None) -> Tensor | None:
    """A mask as fused attention takes it: with a batch and an axis for heads."""
    if mask is None or mask.ndim == 4:
        return mask
    return mask[None, None] if mask.ndim == 2 else mask[:, None]
