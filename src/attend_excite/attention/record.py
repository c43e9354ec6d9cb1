"""Read the cross-attention maps of a forward pass without changing it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from attend_excite.attention.places import Place, map_size


class _PassStopped(Exception):
    """Unwinds a forward pass whose last wanted map is there."""


class Recording:
    """The maps of the latest forward pass inside a `record` block.

    Attributes:
        layers: one tensor a place, by name: the probability that each patch gives each token,
            (batch, heads, height * width, tokens), each row summing to 1, float32 or wider.
    """

    def __init__(self, unet: UNet2DConditionModel, places: Sequence[Place]) -> None:
        self.layers: dict[str, Tensor] = {}
        self._unet = unet
        self._downsampling = places[0].downsampling
        self._latent_size = (0, 0)

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Run the UNet for its maps only; where `record` was told to stop early, stop early."""
        with suppress(_PassStopped):
            self._unet(*args, **kwargs)

    def average(self) -> Tensor:
        """Mean over all recorded layers and heads (Section 3): (batch, height, width, tokens)."""
        if not self.layers:
            raise RuntimeError("no forward pass has run inside this record block yet")
        # Layers differ in their number of heads in Stable Diffusion 2.x, and each head counts once.
        heads = sum(layer.shape[1] for layer in self.layers.values())
        mean = sum(layer.sum(dim=1) for layer in self.layers.values()) / heads
        assert isinstance(mean, Tensor)
        return mean.unflatten(1, map_size(self._latent_size, self._downsampling))

    def _begin(self, latents: Tensor) -> None:
        self.layers.clear()
        self._latent_size = (latents.shape[-2], latents.shape[-1])


@contextmanager
def record(
    unet: UNet2DConditionModel, places: Sequence[Place], *, stop_after_last: bool = False
) -> Iterator[Recording]:
    """Keep the cross-attention maps of `places` for every forward pass of `unet` in the block.

    The layers' own computation is left alone, whatever processors they have: a hook reads what goes
    into a layer and works out the probabilities beside it. So the output is the same to the bit, all
    layers stay on fused attention, and nothing remains in the model after the block, also when the
    block ends with an exception. With gradient checkpointing, take gradients inside the block: the layers
    run again for them, and must find what they found before. Where the caller has compiled the places, or
    what they are in, the passes in the block run eagerly: a compiled module doesn't ask for hooks.

    Args:
        unet: the model.
        places: layers of one resolution, in running order, from `cross_attention_places`.
        stop_after_last: end `Recording.forward` once the last map is there. Nothing that runs later
            can change the maps, so neither can it change their gradient.

    Raises:
        ValueError: no places, or places of different resolutions.
    """
    if len({place.downsampling for place in places}) != 1:
        raise ValueError("record needs one or more places, all of one resolution")
    recording = Recording(unet, places)

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recording._begin(args[0] if args else kwargs["sample"])

    def keep(place: Place) -> Callable[..., None]:
        def hook(layer: Attention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            recording.layers[place.name] = _probabilities(layer, *_attention_inputs(*args, **kwargs))
            if stop_after_last and place == places[-1]:
                raise _PassStopped

        return hook

    handles = [unet.register_forward_pre_hook(begin, with_kwargs=True)]
    try:
        for place in places:
            layer = unet.get_submodule(place.name)
            # First of the layer's hooks, so that it reads what the UNet gives the layer.
            handles.append(layer.register_forward_pre_hook(keep(place), with_kwargs=True, prepend=True))
        # Made where it is entered: the stance holds from its making on.
        with torch.compiler.set_stance("force_eager") if _are_compiled(unet, places) else nullcontext():
            yield recording
    finally:
        for handle in handles:
            handle.remove()


def _are_compiled(unet: nn.Module, places: Sequence[Place]) -> bool:
    """Whether a place lies in something that the caller has compiled, which doesn't ask for hooks again."""
    names = {name.rsplit(".", depth)[0] for name in (place.name for place in places) for depth in range(9)}
    around = [unet, *(unet.get_submodule(name) for name in names)]
    return any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in around)


def _attention_inputs(
    hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, Tensor]:
    return hidden_states, encoder_hidden_states


def _probabilities(attention: Attention, hidden_states: Tensor, text: Tensor) -> Tensor:
    assert attention.to_k is not None
    query = attention.to_q(hidden_states).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
    key = attention.to_k(text).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
    # In half precision the softmax of a sharp map loses the small entries that the gradient needs.
    wide = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):  # a caller's would make it half again
        scores = torch.matmul(query.to(wide) * attention.scale, key.to(wide).transpose(-1, -2))
        return scores.softmax(dim=-1)
