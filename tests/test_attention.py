"""Recording attention: it changes nothing, costs no more than it must, and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from attend_excite import Model, cross_attention_places, overlay, record
from attend_excite.attention.places import map_size
from attend_excite.attention.record import averaged_to


@pytest.fixture
def inputs(tiny: Model) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    text, _ = tiny.pipeline.encode_prompt(["a cat and a frog"], "cpu", 1, False)
    return {
        "sample": torch.randn(1, 4, 16, 24, generator=generator, dtype=torch.float64),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": text.detach(),
    }


def test_places_are_found_in_running_order(tiny: Model) -> None:
    names = [place.name for place in cross_attention_places(tiny.network, 4)]
    assert [name.split(".transformer_blocks")[0] for name in names] == [
        "down_blocks.2.attentions.0",
        "up_blocks.1.attentions.0",
        "up_blocks.1.attentions.1",
    ]
    with pytest.raises(ValueError, match="choose a downsampling of 1, 2, 4, 8"):
        cross_attention_places(tiny.network, 16)


@pytest.mark.parametrize(
    ("latent", "size"), [((64, 64), (16, 16)), ((96, 64), (24, 16)), ((63, 61), (16, 16)), ((9, 8), (3, 2))]
)
def test_map_size_rounds_as_the_unet_rounds(latent: tuple[int, int], size: tuple[int, int]) -> None:
    assert map_size(latent, 4) == size


@pytest.mark.parametrize("size", [(4, 4), (4, 5), (3, 5), (8, 10)])
def test_maps_are_averaged_as_torch_does(size: tuple[int, int]) -> None:
    maps = torch.rand(2, 3, 8, 10, dtype=torch.float64)
    averaged = averaged_to(maps, size)
    torch.testing.assert_close(averaged, adaptive_avg_pool2d(maps, size), rtol=0, atol=1e-12)


def test_downsampling_is_found_by_the_maps_size(tiny: Model) -> None:
    assert tiny.family.downsampling_for((16, 24), (4, 6)) == 4
    with pytest.raises(ValueError, match="the sizes here are 16x24, 8x12, 4x6"):
        tiny.family.downsampling_for((16, 24), (16, 16))


def test_recording_changes_no_output_and_gives_distributions(tiny: Model, inputs: dict[str, Tensor]) -> None:
    plain = tiny.network(**inputs).sample
    with record(tiny.network, cross_attention_places(tiny.network, 4)) as recording:
        recorded = tiny.network(**inputs).sample
    maps = recording.average()
    assert torch.equal(plain, recorded)
    assert maps.shape == (1, 4, 6, 77)
    torch.testing.assert_close(maps.sum(dim=-1), torch.ones(1, 4, 6, dtype=torch.float64))


def test_recorded_maps_are_those_of_diffusers_attention(tiny: Model, inputs: dict[str, Tensor]) -> None:
    place = cross_attention_places(tiny.network, 4)[0]
    layer = tiny.network.get_submodule(place.name)
    seen: list[Tensor] = []

    def look(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        query = layer.head_to_batch_dim(layer.to_q(args[0]))
        key = layer.head_to_batch_dim(layer.to_k(kwargs["encoder_hidden_states"]))
        seen.append(layer.get_attention_scores(query, key))

    handle = layer.register_forward_pre_hook(look, with_kwargs=True)
    with record(tiny.network, [place]) as recording:
        tiny.network(**inputs)
    handle.remove()
    torch.testing.assert_close(recording.layers[place.name].flatten(0, 1), seen[0], rtol=1e-12, atol=1e-15)


def _loss_and_gradient(tiny: Model, inputs: dict[str, Tensor], stop: bool) -> tuple[Tensor, Tensor]:
    sample = inputs["sample"].clone().requires_grad_(True)
    with record(tiny.network, cross_attention_places(tiny.network, 4), stop_after_last=stop) as recording:
        recording.forward(**(inputs | {"sample": sample}))
        loss = 1 - recording.average()[0, ..., 2].max()
        (gradient,) = torch.autograd.grad(loss, sample)
    return loss.detach(), gradient


def test_the_shortened_pass_gives_the_full_pass_s_gradient(tiny: Model, inputs: dict[str, Tensor]) -> None:
    (_, full), (_, short) = (_loss_and_gradient(tiny, inputs, stop) for stop in (False, True))
    assert full.norm() > 0
    assert (short - full).norm() / full.norm() < 1e-12


def test_gradient_checkpointing_gives_the_same_gradient(tiny: Model, inputs: dict[str, Tensor]) -> None:
    _, expected = _loss_and_gradient(tiny, inputs, True)
    tiny.network.enable_gradient_checkpointing()
    try:
        _, gradient = _loss_and_gradient(tiny, inputs, True)
        tiny.generate("a cat and a frog", steps=1, progress=False, decode=False)
    finally:
        tiny.network.disable_gradient_checkpointing()
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)


def test_the_gradient_agrees_with_finite_differences(tiny: Model, inputs: dict[str, Tensor]) -> None:
    _, gradient = _loss_and_gradient(tiny, inputs, True)
    step = 1e-5 * gradient / gradient.norm()
    (ahead, _), (behind, _) = (
        _loss_and_gradient(tiny, inputs | {"sample": inputs["sample"] + sign * step}, True)
        for sign in (1, -1)
    )
    torch.testing.assert_close((ahead - behind) / 2e-5, gradient.norm(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_nothing_of_the_recording_remains(
    tiny: Model,
    inputs: dict[str, Tensor],
    same_model: Callable[[Model], Callable[[], None]],
    error: type[BaseException] | None,
) -> None:
    check = same_model(tiny)
    places = cross_attention_places(tiny.network, 4)
    with (
        suppress(ValueError, KeyboardInterrupt),
        record(tiny.network, places, stop_after_last=True) as recording,
    ):
        recording.forward(**inputs)
        if error is not None:
            raise error
    check()


def test_places_of_two_resolutions_are_refused(tiny: Model) -> None:
    places = cross_attention_places(tiny.network, 4) + cross_attention_places(tiny.network, 8)
    with pytest.raises(ValueError, match="all of one resolution"), record(tiny.network, places):
        pass


def test_overlay_is_brightest_where_the_word_is() -> None:
    heat = torch.zeros(4, 4)
    heat[0, 3] = 1
    grey = Image.new("RGB", (64, 64), (90, 90, 90))
    shown = overlay(grey, heat)
    assert shown.size == grey.size
    assert sum(shown.getpixel((60, 4))) > sum(shown.getpixel((4, 60)))
