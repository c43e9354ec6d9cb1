"""Which noise a picture begins from: the best of several, or one that is searched for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from attend_excite import AttendAndExcite, ComposableDiffusion, Model, Recipe, StableDiffusion
from attend_excite.guidance.noise import Climb, search_noise
from attend_excite.guidance.nurse import Measurement
from attend_excite.guidance.objective import (
    SubjectTokens,
    most_neglected,
    subject_attention,
    subject_losses,
    token_probabilities,
)
from attend_excite.guidance.recipes import method_recipes
from attend_excite.guidance.schedule import NoiseSearch
from attend_excite.methods import method_named, noise
from attend_excite.methods.base import Run
from attend_excite.trace import ChosenNoise, Trace

OFFICIAL = Recipe.named("official")
PROMPT = "a cat and a frog"
SHORT = NoiseSearch(rounds=2, steps=2, more=1)


def _drawn(model: Model, seeds: list[int], best_of: int = 1, method=None, **options):
    method = method or StableDiffusion()
    return model.generate(
        PROMPT, method=method, seeds=seeds, best_of=best_of, decode=False, progress=False, **options
    )


def _start(trace: Trace) -> ChosenNoise:
    assert trace.noise is not None
    return trace.noise


def test_the_noise_of_the_lowest_loss_is_drawn_alone_as_in_a_batch(
    tiny: Model, same_model: Callable[[Model], Callable[[], None]]
) -> None:
    check, seeds = same_model(tiny), [0, 1, 2, 3, 4, 5]
    together = _drawn(tiny, seeds, best_of=3, steps=20)
    plain = _drawn(tiny, seeds, maps=True, steps=20)
    check()
    chosen = [_start(trace).chosen for trace in together.trace]
    assert {0} < set(chosen)
    # As the maps of the plain run at that step say it.
    tokens = SubjectTokens.stack([[[2], [5]]] * len(seeds), [75] * len(seeds), dtype=torch.float64)
    maps = plain.maps.values[:, OFFICIAL.compared_at(20)]
    probabilities = token_probabilities(maps, tokens.last, OFFICIAL.temperature)
    losses = most_neglected(subject_losses(subject_attention(probabilities, tokens, OFFICIAL.sigma), tokens))
    torch.testing.assert_close(
        torch.tensor([_start(trace).losses[0] for trace in together.trace], dtype=torch.float64), losses
    )
    for image, seed in enumerate(seeds):
        start = _start(together.trace[image])
        assert start.losses[start.chosen] == min(start.losses)
        own = chosen[image] == 0
        assert torch.equal(together.latents[image], plain.latents[image]) is own
        alone = _drawn(tiny, [seed], best_of=3, steps=20)
        torch.testing.assert_close(alone.latents[0], together.latents[image])


def test_its_own_noise_is_the_seeds_picture_also_where_a_scheduler_adds_noise(tiny: Model) -> None:
    seeds = [0, 1, 2, 3, 4, 5]
    method = AttendAndExcite("no-refinement")
    tried = _drawn(tiny, seeds, best_of=2, method=method, scheduler="euler-ancestral", steps=6)
    once = _drawn(tiny, seeds, method=method, scheduler="euler-ancestral", steps=6)
    own = [image for image in range(len(seeds)) if _start(tried.trace[image]).chosen == 0]
    assert own
    torch.testing.assert_close(tried.latents[own], once.latents[own], rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in method_recipes() if name != "initno-search"])
def test_every_methods_own_loss_compares(tiny: Model, name: str) -> None:
    (trace,) = _drawn(tiny, [0], best_of=2, method=method_named(name), steps=2).trace
    losses = _start(trace).losses
    assert losses[_start(trace).chosen] == min(losses)


def test_a_loss_that_says_nothing_of_a_noise_is_told(tiny: Model) -> None:
    with pytest.warns(UserWarning, match="all noises for 'a cat and a frog' have the same loss"):
        _drawn(tiny, [0], best_of=2, method=method_named("syngen"), steps=2)


def test_no_noise_that_is_tried_is_added_later(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stochastic schedulers add has nothing to do with what a run may begin from."""
    tried: list[Tensor] = []

    def kept(run: Run, nursing: Any, recipe: Any, candidates: list[Tensor], generators: Any, _: Any) -> Any:
        tried.extend(candidates)
        (generator,) = generators
        shape = candidates[0].shape[1:]
        tried.extend(torch.randn(shape, generator=generator.clone_state(), dtype=torch.float64)[None])
        return candidates[0], []

    monkeypatch.setattr(noise, "_best", kept)
    _drawn(tiny, [5], best_of=3, steps=1)
    flat = torch.stack([each.flatten() for each in tried])
    assert len(flat) == 4
    assert (torch.corrcoef(flat) - torch.eye(4)).abs().max() < 0.5


def test_the_passes_are_those_that_were_made(tiny: Model) -> None:
    passes = []
    hook = tiny.network.register_forward_pre_hook(
        lambda _, args, kwargs: passes.append(len(kwargs["sample"])), with_kwargs=True
    )
    try:
        (trace,) = _drawn(tiny, [3], best_of=4, steps=50).trace
        assert _start(trace).passes == 4 * (2 * 1 + 1)
        assert sum(passes) == _start(trace).passes + 2 * len(trace.steps)
        passes.clear()
        method = AttendAndExcite(Recipe.from_dict({"base": "initno", "search": SHORT}, OFFICIAL))
        (trace,) = _drawn(tiny, [3], method=method, steps=5).trace
        assert 1 <= _start(trace).passes <= SHORT.most_passes
        updates = sum(len(step.updates) for step in trace.steps)
        assert sum(passes) == _start(trace).passes + updates + 2 * len(trace.steps)
    finally:
        hook.remove()


def test_a_recipe_says_where_noises_are_compared(tiny: Model) -> None:
    later = Recipe.from_dict({"base": "official", "choose_at": 0.3, "thresholds": [], "altered": 0.1})
    assert (OFFICIAL.compared_at(50), later.compared_at(50), later.compared_at(1)) == (1, 15, 0)
    (trace,) = _drawn(tiny, [3], best_of=2, method=AttendAndExcite(later), steps=10).trace
    assert _start(trace).passes == 2 * (2 * 3 + 1)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (ComposableDiffusion(), {"best_of": 2}, "never shows the model the whole prompt"),
        (AttendAndExcite("initno-search"), {"best_of": 2}, "searches for the noise already"),
        (None, {"best_of": 0}, "best_of is 0: it must be a whole number, 1 to 1000"),
        (None, {"best_of": 2.5}, r"best_of is 2\.5"),
    ],
)
def test_what_cannot_be_chosen_is_refused(tiny: Model, method, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _drawn(tiny, [0], method=method, **options)


def test_a_noise_is_chosen_for_a_run_that_begins_from_a_picture_and_not_searched_for(tiny: Model) -> None:
    picture = Image.new("RGB", (64, 64), "red")
    options: dict[str, Any] = {"image": picture, "strength": 0.5, "steps": 4, "seeds": range(4)}
    options |= {"method": StableDiffusion(), "decode": False, "progress": False}
    chosen = tiny.generate("a cat and a frog", best_of=3, **options)
    plain = tiny.generate("a cat and a frog", **options)
    own = [_start(trace).chosen == 0 for trace in chosen.trace]
    assert True in own
    assert False in own
    same = zip(chosen.latents, plain.latents, strict=True)
    assert [torch.equal(ours, theirs) for ours, theirs in same] == own
    # Where LMS begins late it steps in its own way, and so does each trial.
    late = replace(OFFICIAL, choose_at=0.5, altered=0.0, thresholds=())
    options |= {"scheduler": "lms", "steps": 8, "method": AttendAndExcite(late)}
    options["seeds"] = range(8)
    chosen = tiny.generate("a cat and a frog", best_of=2, **options)
    plain = tiny.generate("a cat and a frog", **options)
    own = [_start(trace).chosen == 0 for trace in chosen.trace]
    assert True in own
    assert torch.equal(chosen.latents[own], plain.latents[own])
    with pytest.raises(ValueError, match="this run begins from a picture: take a recipe without a search"):
        tiny.generate("a cat and a frog", **options | {"method": AttendAndExcite(recipe="initno-search")})


def test_a_search_draws_alone_as_in_a_batch_and_leaves_the_model(
    tiny: Model, same_model: Callable[[Model], Callable[[], None]]
) -> None:
    check = same_model(tiny)
    method = AttendAndExcite(Recipe.from_dict({"base": "initno", "search": SHORT}, OFFICIAL))
    together = _drawn(tiny, [0, 1], method=method, steps=4)
    check()
    for image in (0, 1):
        alone = _drawn(tiny, [image], method=method, steps=4)
        torch.testing.assert_close(alone.latents[0], together.latents[image])
    assert together.latents.isfinite().all()


def _towards(target: float) -> Callable[[Tensor, Tensor], Measurement]:
    """The loss of an image: how far the mean of its noise is from a target."""

    def measure(noise: Tensor, rows: Tensor) -> Measurement:
        loss = (noise.flatten(1).mean(dim=1) - target).abs()
        return Measurement(loss[:, None], loss[:, None], loss, {"most-neglected": loss})

    return measure


def test_a_search_goes_down_its_loss_and_stays_close_to_normal() -> None:
    search = NoiseSearch(rounds=1, steps=30, more=0, enough=())
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64)
    (first, second) = search_noise(noise, lambda: noise, _towards(0.5), search)
    before = (noise.flatten(1).mean(dim=1) - 0.5).abs()
    assert first.losses[0] < before[0] - 0.01
    assert second.losses[0] < before[1] - 0.01
    assert (first.passes, second.passes) == (30, 30)
    # Mean m and variance e^v in each cell: KL = (m^2 + e^v - 1 - v) / 2.
    climb = Climb(noise[0])
    with torch.no_grad():
        climb.parts[0].fill_(0.3)
        climb.parts[1].fill_(0.2)
    assert float(climb.divergence().detach()) == pytest.approx((0.09 + torch.tensor(0.2).exp() - 1 - 0.2) / 2)
    climb.move([torch.zeros_like(part) for part in climb.parts], 0.01)
    assert float(climb.divergence().detach()) < 1e-3


def test_a_search_ends_where_there_is_enough_and_else_goes_on_with_the_best_round() -> None:
    noises = [torch.full((2, 1, 2, 2), value) for value in (5.0, 1.0, 3.0)]
    noises[0][1] = 0.05  # which is enough from the start
    draws = iter(noises[1:])
    search = NoiseSearch(rounds=3, steps=2, more=4, enough=(("most-neglected", 0.2),))
    stuck, there = search_noise(noises[0], lambda: next(draws), _towards(0.0), search)
    assert (stuck.chosen, stuck.passes, len(stuck.losses)) == (1, search.most_passes, 3)
    assert (there.chosen, there.passes, there.losses) == (0, 1, (pytest.approx(0.05),))
    assert torch.equal(there.noise, noises[0][1])


def test_a_search_stands_in_a_recipe_and_comes_back_from_a_picture(tmp_path: Path) -> None:
    from PIL import Image

    from attend_excite.metadata import Origin, Settings, read_origin, write_png

    recipe = Recipe.from_dict({"base": "initno", "search": {"rounds": 2, "more": 0}}, OFFICIAL)
    assert recipe.search is not None
    assert (recipe.search.rounds, recipe.search.steps, recipe.search.most_passes) == (2, 10, 20)
    settings = Settings(
        "stickers", PROMPT, AttendAndExcite(recipe), 2, 7.5, 64, 64, "float32", "cpu", best_of=1
    )
    write_png(tmp_path / "picture.png", Image.new("RGB", (64, 64)), Origin(settings, 0, (0,)))
    assert read_origin(tmp_path / "picture.png").settings == settings
    for search, message in (
        ({"rounds": 0}, "rounds of the search is 0"),
        ({"learning_rate": "fast"}, "learning_rate of the search is 'fast'"),
        ({"enough": [["overlap", 0.1]]}, "a term that is enough is 'overlap'"),
        ({"loud": True}, "search is an object with some of rounds, steps"),
        (5, "search is an object"),
    ):
        with pytest.raises(ValueError, match=message):
            Recipe.from_dict({"base": "official", "search": json.loads(json.dumps(search))})
