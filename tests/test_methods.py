"""What holds for every method: by name, on top of each other, and without a trace in the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from attend_excite import AttendAndExcite, Model, Recipe, StableDiffusion, StepEvent
from attend_excite.guidance.recipes import method_recipes, recipe_names
from attend_excite.methods import (
    METHODS,
    PAPER_METHODS,
    AttentionReweighting,
    ComposableDiffusion,
    Method,
    StructureDiffusion,
    method_named,
)


def test_methods_by_name() -> None:
    assert list(PAPER_METHODS) == ["attend-excite", "stable-diffusion", "composable", "structure", "reweight"]
    assert [name for name in METHODS if name not in PAPER_METHODS] == list(method_recipes())
    for name in METHODS:
        assert method_named(name).name == name
    assert method_named("syngen").title == "SynGen"
    assert method_named("composable", weights=[1, 2]) == ComposableDiffusion([1, 2])
    with pytest.raises(ValueError, match="unknown method 'magic': choose one of attend-excite, "):
        method_named("magic")


@pytest.mark.parametrize(
    "method",
    [
        StableDiffusion(),
        ComposableDiffusion(),
        AttentionReweighting(),
        AttendAndExcite("bare", base=StructureDiffusion(align="keys-and-values")),
    ],
    ids=lambda method: method.name,
)
def test_no_trace_remains_in_the_model_after_an_exception(
    tiny: Model, same_model: Callable[[Model], Callable[[], None]], method: Method
) -> None:
    check = same_model(tiny)

    def fail(event: StepEvent) -> None:
        assert event.index < 1

    with pytest.raises(AssertionError):
        tiny.generate("a cat and a frog", method=method, steps=2, decode=False, progress=False, callback=fail)
    check()


def test_combinations_without_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot go on top of composable: it raises the attention to the"):
        AttendAndExcite(base=ComposableDiffusion())
    for no_method in (ComposableDiffusion, None):
        with pytest.raises(ValueError, match="give a method that is made"):
            AttendAndExcite(base=no_method)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="on top of itself"):
        AttendAndExcite(base=AttendAndExcite())


def test_ablations_change_what_the_model_recommends(stickers: Model) -> None:
    changed = {
        "no-smoothing": {"sigma"},
        "no-refinement": {"thresholds"},
        "all-steps": {"altered"},
        "bare": {"sigma", "thresholds"},
    }
    assert recipe_names() == ("official", "paper", *changed)
    official = Recipe.named("official")
    assert stickers.recipe.max_shift != official.max_shift
    for name, fields in changed.items():
        # An ablation knows nothing of what suits other methods.
        for recommended in (official, replace(stickers.recipe, tuned={})):
            ablated = vars(Recipe.named(name, recommended))
            same = {field for field, value in vars(recommended).items() if ablated[field] == value}
            assert vars(recommended).keys() - same == fields | {"summary"}
    assert Recipe.named("bare", official).step_size == official.step_size
