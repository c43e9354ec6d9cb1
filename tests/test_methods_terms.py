"""The methods that are recipes of terms: each draws, alone as in a batch, and keeps no more than it needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attend_excite import AttendAndExcite, Model, Recipe, record
from attend_excite.guidance.recipes import method_recipes
from attend_excite.methods import METHODS
from tests.families import FAMILIES
from tests.test_families import first_step as first
from tests.test_families import model_of, noise_of, run_of

PROMPTS = ["a yellow bowl and a red cat", "a dog"]


def _drawn(model: Model, method: Any, prompts: list[str] = PROMPTS, **options: Any) -> Any:
    return model.generate(prompts, method=method, decode=False, progress=False, **options)


@pytest.mark.parametrize("name", method_recipes())
def test_each_method_draws_in_a_batch_as_alone(tiny: Model, name: str) -> None:
    """The second prompt has a single subject, in the filler of the first one's."""
    numbers = Recipe.named("official")
    method = AttendAndExcite(name).on(numbers)
    assert (method.name, method.title) == (name, method_recipes()[name])
    # Of five steps 0, 1 and 2 have the published thresholds.
    search = Recipe.named(name, numbers).search and {"rounds": 1, "steps": 1, "more": 0}
    short = Recipe.from_dict({"base": name, "max_refinements": 1, "search": search}, numbers)
    together = _drawn(tiny, AttendAndExcite(short), steps=5)
    alone = [_drawn(tiny, AttendAndExcite(short), [prompt], steps=5) for prompt in PROMPTS]
    for image, single in enumerate(alone):
        torch.testing.assert_close(together.latents[image], single.latents[0])
    plain = _drawn(tiny, METHODS["stable-diffusion"](), steps=5)
    assert not torch.equal(together.latents[0], plain.latents[0])
    assert not any(trace.skipped for trace in together.trace)
    updates = [update for step in together.trace[0].steps for update in step.updates]
    for update in updates:
        if update.parts:
            assert update.loss == pytest.approx(sum(update.parts.values()))


@pytest.mark.parametrize(
    ("name", "layers"), [("attend-excite", 0), ("syngen", 0), ("conform", 0), ("self-cross", 3)]
)
def test_self_attention_is_kept_only_where_a_term_needs_it(tiny: Model, name: str, layers: int) -> None:
    """Counted among all that the graph of a guidance pass keeps: a map by a map for each of two heads."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    base = name if name in method_recipes() else "official"
    official = Recipe.named("official")
    recipe = Recipe.from_dict({"base": base, "thresholds": [], "altered": 1.0}, official)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _drawn(tiny, AttendAndExcite(recipe), PROMPTS[:1], steps=1)
    assert sum(tensor.shape == (1, 2, 16, 16) for tensor in kept) == layers


def test_the_images_attention_to_itself_is_the_layers_own(tiny: Model) -> None:
    places = tiny.family.places(4)
    beside = tiny.family.self_places(places)
    assert [place.name for place in beside] == [place.name.replace("attn2", "attn1") for place in places]
    seen: list[Tensor] = []
    hooks = [
        tiny.network.get_submodule(place.name).register_forward_pre_hook(
            lambda layer, args: seen.append(_naive(layer, args[0]))
        )
        for place in beside
    ]
    run = run_of(tiny, ["a cat and a frog"])
    inputs = run.network_inputs(noise_of(tiny), first(run), run.text)
    try:
        with record(tiny.network, places, stop_after_last=True, self_places=beside) as recording:
            recording.forward(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    torch.testing.assert_close(recording.self_average(), torch.cat(seen, dim=1).mean(dim=1))
    with record(tiny.network, places, stop_after_last=True) as recording:
        recording.forward(**inputs)
    assert not recording.self_layers
    with pytest.raises(RuntimeError, match="was not recorded"):
        recording.self_average()


def test_joint_attention_of_finer_patches_is_averaged_to_the_maps() -> None:
    model = model_of("stable-diffusion-3")
    run = run_of(model, ["a cat and a frog"])
    finest, coarse, _ = model.family.downsamplings()
    maps = {}
    for downsampling in (finest, coarse):
        places = model.family.places(downsampling)
        own = model.family.self_places(places)
        layout = run.layout(downsampling)
        with record(model.network, places, layout=layout, stop_after_last=True, self_places=own) as recording:
            recording.forward(**run.network_inputs(noise_of(model), first(run), run.text))
        maps[downsampling] = recording.self_average()
    height, width = (side // finest for side in run.size)
    fine = maps[finest].view(height, width, height, width)
    torch.testing.assert_close(maps[finest].sum(dim=-1), torch.ones(1, height * width, dtype=torch.float64))
    # Of the rows of four patches the mean, of their columns the sum.
    expected = fine[:2, :2, :2, :2].mean(dim=(0, 1)).sum()
    torch.testing.assert_close(maps[coarse][0, 0, 0], expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_self_attention_or_says_that_it_has_none(name: str) -> None:
    model = model_of(name)
    places = model.places()
    if name.startswith("sana"):
        with pytest.raises(ValueError, match=r"where Sana.* has that isn't known here"):
            model.family.self_places(places)
        return
    run = run_of(model, ["a cat and a frog"])
    inputs = run.network_inputs(noise_of(model), first(run), run.text)
    layout, own = run.layout(model.attention_downsampling), model.family.self_places(places)
    with record(model.network, places, layout=layout, stop_after_last=True, self_places=own) as recording:
        recording.forward(**inputs)
    patches = recording.average().shape[1] * recording.average().shape[2]
    found = recording.self_average()
    assert found.shape == (1, patches, patches)
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(1, patches, dtype=torch.float64))


def test_recipes_are_the_numbers_that_a_method_stands_on() -> None:
    official, own = Recipe.named("official"), Recipe.from_dict({"base": "official", "step_size": 3.0})
    assert AttendAndExcite("syngen").recipe_for(own) == Recipe.named("syngen", own)
    assert AttendAndExcite("syngen").on(Recipe.named("no-smoothing", own)).recipe_for(official).sigma == 0
    # On another model, in its measure again.
    written = AttendAndExcite(Recipe.named("syngen", own))
    assert written.on(None) == AttendAndExcite("syngen")
    assert AttendAndExcite(own).on(None) == AttendAndExcite()
    assert AttendAndExcite().on(own) == AttendAndExcite(own)


def _naive(layer: Any, hidden_states: Tensor) -> Tensor:
    query, key = (
        project(hidden_states).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        for project in (layer.to_q, layer.to_k)
    )
    return (query @ key.mT * layer.scale).softmax(dim=-1)
