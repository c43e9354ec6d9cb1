"""Read the attention to the text of a forward pass without changing it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attend_excite.attention.fused import Answer, fused_attention_answered
from attend_excite.attention.places import Place, map_size
from attend_excite.interrupts import cleaning_up, to_the_end


class _PassStopped(Exception):
    """Unwinds a forward pass whose last wanted map is there."""


@dataclass(frozen=True)
class Layout:
    """How the rows and columns of an attention are to be taken.

    Attributes:
        size: (height, width) of the latents.
        columns: of the text's tokens those to be kept, in the order wanted; None: all.
        joint: None where image attends to text alone; "image-first" or "text-first" where both attend to
            both in one softmax: then the rows are the image's, and what a row gives to the image is left out.
        downsampling: latent cells per map cell along one side; maps of finer layers are averaged down to it.
            None: as the layers are.
        image_multiple: of what the patches are filled up to, before the text where the image is first.
    """

    size: tuple[int, int]
    columns: Sequence[int] | None = None
    joint: Literal["image-first", "text-first"] | None = None
    downsampling: int | None = None
    image_multiple: int = 1


class Recording:
    """The maps of the latest forward pass inside a `record` block.

    A host that replaces its layers' attention by its own means makes one a pass, and lets it `hear` them.

    Args:
        places: layers of one resolution, in running order.
        layout: how rows and columns are taken; None: those of a UNet, its size told later.
        network: whose passes are recorded; None: `forward` isn't asked for.

    Attributes:
        layers: one tensor a place, by name: the probability that each patch gives each token kept, float32
            or wider. From layers of plain cross-attention (batch, heads, height * width, tokens), each row
            summing to 1; where fused attention is read (batch, 1, height * width, tokens), the mean over
            the layer's heads.
        self_layers: likewise what each patch gives each patch, where that was asked for, the mean over the
            layer's heads: (batch, height * width, height * width).
    """

    def __init__(
        self, places: Sequence[Place], layout: Layout | None, network: nn.Module | None = None
    ) -> None:
        self.layers: dict[str, Tensor] = {}
        self.self_layers: dict[str, Tensor] = {}
        self._self_heads: dict[str, int] = {}
        self._heads: dict[str, int] = {}
        self._network = network
        self._downsampling = places[0].downsampling
        self._layout = layout
        self._latent_size = (0, 0) if layout is None else layout.size

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Run the network for its maps only; where `record` was told to stop early, stop early."""
        assert self._network is not None
        with suppress(_PassStopped):
            self._network(*args, **kwargs)

    def hear(
        self,
        place: Place,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None = None,
        *,
        of_image: bool = False,
        **options: Any,
    ) -> None:
        """Keep what the image's rows of an attention give to the text, as the layout says.

        Args:
            place: which layer's it is.
            query: (B, heads, rows, d).
            key: (B, heads, columns, d).
            mask: as fused attention takes it.
            of_image: what they give to the image itself is kept instead.
            options: `scale` and `enable_gqa`, likewise.
        """
        assert self._layout is not None
        if of_image:
            part = _part("image", query, key, mask, place, self._layout, **options)
            self._keep_of_image(place, *part)
        else:
            self._keep(place, *_part("text", query, key, mask, place, self._layout, **options))

    def average(self) -> Tensor:
        """Mean over all recorded layers and heads (Section 3): (batch, height, width, tokens)."""
        if not self.layers:
            raise RuntimeError("no forward pass has run inside this record block yet")
        # Layers differ in their number of heads in Stable Diffusion 2.x, and each head counts once.
        heads = sum(self._heads.values())
        mean = sum(self._sum(name, layer) for name, layer in self.layers.items()) / heads
        assert isinstance(mean, Tensor)
        maps = mean.unflatten(1, map_size(self._latent_size, self._downsampling))
        wanted = None if self._layout is None else self._layout.downsampling
        if wanted is None or wanted == self._downsampling:
            return maps
        size = map_size(self._latent_size, wanted)
        return averaged_to(maps.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)

    def self_average(self) -> Tensor:
        """Mean over all recorded layers and heads of the image's attention to itself, of the maps' size.

        Returns:
            (batch, height * width, height * width), rows summing to 1: of finer layers the mean of the rows
            that a cell of the map covers, and the sum of the columns.
        """
        if not self.self_layers:
            raise RuntimeError("the image's attention to itself was not recorded in this block")
        weighed = (layer * self._self_heads[name] for name, layer in self.self_layers.items())
        mean = sum(weighed) / sum(self._self_heads.values())
        assert isinstance(mean, Tensor)
        # Joint attention has given a share to the text.
        mean = mean / mean.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(mean.dtype).tiny)
        wanted = None if self._layout is None else self._layout.downsampling
        if wanted is None or wanted == self._downsampling:
            return mean
        fine, coarse = (map_size(self._latent_size, each) for each in (self._downsampling, wanted))
        for _ in range(2):
            # One axis to the map's cells, and then, turned about, the other.
            mean = averaged_to(mean.unflatten(-1, fine), coarse).flatten(-2).mT
        return mean / mean.sum(dim=-1, keepdim=True)

    def _sum(self, name: str, layer: Tensor) -> Tensor:
        """Over a layer's heads."""
        return layer.sum(dim=1) if layer.shape[1] > 1 else layer.squeeze(1) * self._heads[name]

    def _begin(self, latents: Tensor | None) -> None:
        self.layers.clear()
        self.self_layers.clear()
        if latents is not None:
            self._latent_size = (latents.shape[-2], latents.shape[-1])

    def _keep(self, place: Place, probabilities: Tensor, heads: int) -> None:
        self.layers[place.name] = probabilities
        self._heads[place.name] = heads

    def _keep_of_image(self, place: Place, probabilities: Tensor, heads: int) -> None:
        self.self_layers[place.name] = probabilities.mean(dim=1)
        self._self_heads[place.name] = heads


@contextmanager
def record(
    network: nn.Module,
    places: Sequence[Place],
    *,
    layout: Layout | None = None,
    stop_after_last: bool = False,
    self_places: Sequence[Place] = (),
) -> Iterator[Recording]:
    """Keep the attention maps of `places` for every forward pass of `network` in the block.

    The layers' own computation is left alone, whatever processors they have: a hook reads what goes into a
    layer, or into the fused attention in it, and works out the probabilities beside it. So the output is the
    same to the bit, all layers stay on fused attention, and nothing remains in the model after the block,
    also when the block ends with an exception. With gradient checkpointing, take gradients inside the block:
    the layers run again for them, and must find what they found before. Where the caller has compiled the
    places, or what they are in, the passes in the block run eagerly: a compiled module doesn't ask for hooks.

    Args:
        network: the model.
        places: layers of one resolution, in running order, from a family or `cross_attention_places`.
        layout: how rows and columns are taken; None: those of a UNet, its size read from its `sample`.
        stop_after_last: end `Recording.forward` once the last map is there. Nothing that runs later
            can change the maps, so neither can it change their gradient.
        self_places: layers of that resolution, before the last of `places` or among them, whose attention of
            the image to itself is kept, too.

    Raises:
        ValueError: no places, or places of different resolutions.
    """
    if len({place.downsampling for place in places}) != 1:
        raise ValueError("record needs one or more places, all of one resolution")
    recording = Recording(places, layout, network)

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        latents = None if layout is not None else args[0] if args else kwargs["sample"]
        recording._begin(latents)

    def stop_after(place: Place) -> None:
        if stop_after_last and place == places[-1]:
            raise _PassStopped

    def keep(place: Place) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            probabilities = _probabilities(layer, *_attention_inputs(*args, **kwargs))
            recording._keep(place, probabilities, probabilities.shape[1])
            stop_after(place)

        return hook

    def keep_of_image(place: Place) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden_states = args[0] if args else kwargs["hidden_states"]
            probabilities = _probabilities(layer, hidden_states, hidden_states)
            recording._keep_of_image(place, probabilities, probabilities.shape[1])

        return hook

    def listen(place: Place) -> Answer:
        def hear(
            fused: Callable[..., Tensor],
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attn_mask: Tensor | None = None,
            *rest: Any,
            **options: Any,
        ) -> Tensor:
            if place in self_places:
                recording.hear(place, query, key, attn_mask, of_image=True, **options)
            if place in places:
                recording.hear(place, query, key, attn_mask, **options)
                stop_after(place)
            return fused(query, key, value, attn_mask, *rest, **options)

        return hear

    with cleaning_up() as stack:
        stack.callback(to_the_end, network.register_forward_pre_hook(begin, with_kwargs=True).remove)
        for place in places:
            layer = network.get_submodule(place.name)
            if place.read == "fused":
                if layout is None:
                    raise ValueError("a layout is needed to read what is handed to fused attention")
                stack.enter_context(fused_attention_answered(layer, place.name, listen(place)))
                continue
            # First of the layer's hooks, so that it reads what the network gives the layer.
            handle = layer.register_forward_pre_hook(keep(place), with_kwargs=True, prepend=True)
            stack.callback(to_the_end, handle.remove)
        for place in self_places:
            layer = network.get_submodule(place.name)
            if place.read == "fused" and place not in places:
                assert layout is not None
                stack.enter_context(fused_attention_answered(layer, place.name, listen(place)))
            elif place.read == "projections":
                hook = keep_of_image(place)
                handle = layer.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
                stack.callback(to_the_end, handle.remove)
        stack.enter_context(eagerly(network, places))
        yield recording


def averaged_to(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (B, N, height, width) averaged down to another (height, width), as by `adaptive_avg_pool2d`: that
    is written out where the sizes don't divide, which Apple's devices haven't."""
    fine = maps.shape[-2], maps.shape[-1]
    if not any(own % wanted for own, wanted in zip(fine, size, strict=True)):
        return F.adaptive_avg_pool2d(maps, size)
    rows, columns = (
        _shares(own, wanted).to(maps.dtype).to(maps.device) for own, wanted in zip(fine, size, strict=True)
    )
    return rows @ maps @ columns.mT


def _shares(fine: int, coarse: int) -> Tensor:
    """(coarse, fine): what each cell takes of the finer ones that it touches, equal parts that sum to 1."""
    cells, finer = torch.arange(coarse)[:, None], torch.arange(fine)
    touched = (finer >= cells * fine // coarse) & (finer < -(-(cells + 1) * fine // coarse))
    return touched / touched.sum(dim=1, keepdim=True, dtype=torch.float64)


def text_attention(query: Tensor, key: Tensor, columns: Sequence[int], **options: Any) -> Tensor:
    """The attention that rows give to some columns, exactly, and without the matrix of all.

    Fused attention in which each value is the indicator of a column returns softmax(QK^T) E, which is these
    columns, with their gradient and in the memory of fused attention.

    Args:
        query: (B, heads, rows, d).
        key: (B, heads, all columns, d).
        columns: indices of the columns wanted; up to d of them take one pass, more take more.
        options: `attn_mask`, `scale` and the like, as `scaled_dot_product_attention` takes them.

    Returns:
        (B, rows, len(columns)): the mean over heads, float32 or wider.
    """
    at_once = query.shape[-1]
    wide = torch.promote_types(query.dtype, torch.float32)
    mask = options.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        options = options | {"attn_mask": mask.to(wide)}
    index = torch.as_tensor(columns, device=key.device)
    parts = []
    for some in index.split(at_once):
        # As wide as keys are: some kernels of fused attention ask for that.
        indicators = key.new_zeros(key.shape[-2], at_once, dtype=wide)
        indicators[some, torch.arange(len(some), device=key.device)] = 1
        values = indicators.expand(*key.shape[:2], -1, -1)
        attention = F.scaled_dot_product_attention(query.to(wide), key.to(wide), values, **options)
        parts.append(attention[..., : len(some)].mean(dim=1))
    return torch.cat(parts, dim=-1)


def image_and_text(key: Tensor, place: Place, layout: Layout) -> tuple[slice, slice]:
    """Where the image's rows, or columns, and the text's are in a joint attention of these keys."""
    height, width = map_size(layout.size, place.downsampling)
    columns, patches = key.shape[-2], height * width
    if layout.joint == "text-first":
        return slice(columns - patches, columns), slice(0, columns - patches)
    filled = -(-patches // layout.image_multiple) * layout.image_multiple
    return slice(0, patches), slice(filled, columns)


def _part(
    columns_of: Literal["text", "image"],
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    place: Place,
    layout: Layout,
    scale: float | None = None,
    enable_gqa: bool = False,
    **_: Any,
) -> tuple[Tensor, int]:
    """(B, 1, patches, columns) what the image's rows give to the columns of text or image, and how many heads
    there are."""
    image, text = slice(0, query.shape[-2]), slice(0, key.shape[-2])
    if layout.joint is not None:
        image, text = image_and_text(key, place, layout)
    query = query[:, :, image]
    if mask is not None and mask.shape[-2] > 1:
        mask = mask[..., image, :]
    if enable_gqa:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    missing = 0
    if columns_of == "image":
        columns = range(image.start, image.stop)
    else:
        tokens = range(text.stop - text.start) if layout.columns is None else layout.columns
        # Some of a batch may have a shorter text than the whole batch: the rest is padding, and last.
        columns = [text.start + token for token in tokens if text.start + token < text.stop]
        missing = len(tokens) - len(columns)
    with torch.autocast(query.device.type, enabled=False):  # a caller's would make it half again
        probabilities = text_attention(query, key, columns, attn_mask=mask, scale=scale)
    probabilities = F.pad(probabilities, (0, missing))
    return probabilities[:, None], query.shape[1]


@contextmanager
def eagerly(network: nn.Module, places: Sequence[Place]) -> Iterator[None]:
    """In the block passes run eagerly where the caller has compiled places, or what they lie in."""
    if not _are_compiled(network, places):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _are_compiled(network: nn.Module, places: Sequence[Place]) -> bool:
    """Whether a place lies in something that the caller has compiled, which doesn't ask for hooks again."""
    names = {name.rsplit(".", depth)[0] for name in (place.name for place in places) for depth in range(9)}
    around = [network, *(network.get_submodule(name) for name in names)]
    return any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in around)


def _attention_inputs(
    hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, Tensor]:
    return hidden_states, encoder_hidden_states


def _probabilities(attention: Any, hidden_states: Tensor, text: Tensor) -> Tensor:
    query = attention.to_q(hidden_states).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
    key = attention.to_k(text).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
    # In half precision the softmax of a sharp map loses the small entries that the gradient needs.
    wide = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):  # a caller's would make it half again
        scores = torch.matmul(query.to(wide) * attention.scale, key.to(wide).transpose(-1, -2))
        return scores.softmax(dim=-1)
