"""What nursing did in vain is found, named and said."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from attend_excite import AttendAndExcite, Model, Recipe
from attend_excite.subjects import TokenGroup
from attend_excite.trace import TraceStep, Update, findings_of

CAT, FROG, HAT = TokenGroup("cat", (2,)), TokenGroup("frog", (5,)), TokenGroup("hat", (7,), 0.0, negated=True)


def _steps(*updates: tuple[float, float, float]) -> list[TraceStep]:
    """Steps of one update each: the attention to cat and frog, and the shift."""
    return [
        TraceStep(
            index, 0.0, 0.0, (Update({"cat": cat, "frog": frog}, 1 - min(cat, frog), shift, skipped=False),)
        )
        for index, (cat, frog, shift) in enumerate(updates)
    ]


def _kinds(steps: Sequence[TraceStep], goal: float = 0.8) -> list[tuple[str, str | None]]:
    return [(finding.kind, finding.subject) for finding in findings_of(steps, [CAT, FROG], goal)]


@pytest.mark.parametrize(
    ("updates", "kinds"),
    [
        # Each update is for the cat, whose attention stays.
        ([(0.07, 0.3, 0.01)] * 8, [("stuck", "cat")]),
        ([(0.07, 0.3, 1e-5)] * 8, [("stuck", "cat"), ("plain", "cat")]),
        ([(0.07, 0.3, 0.0)] * 8, [("idle", "cat"), ("plain", "cat")]),
        # It rises; it has what is demanded; too few to say; the other subject gets its share.
        ([(0.07 + 0.05 * i, 0.9, 0.01) for i in range(8)], []),
        ([(0.81, 0.9, 0.01)] * 8, []),
        ([(0.85, 0.9, 0.0)] * 8, []),
        ([(0.07, 0.3, 0.01)] * 3, []),
        ([(0.3, 0.3 + (-1) ** i * 0.05, 0.01) for i in range(20)], []),
        ([(0.07, 0.3, 0.01), (0.5, 0.2, 1.3), (0.9, 0.9, 0.1)], [("torn", "frog")]),
    ],
)
def test_findings(updates: list[tuple[float, float, float]], kinds: list[tuple[str, str]]) -> None:
    assert _kinds(_steps(*updates)) == kinds


def test_updates_that_were_left_out_are_said() -> None:
    steps = _steps(*[(0.07, 0.3, 0.01)] * 8)
    lost = [
        replace(step, updates=tuple(replace(update, skipped=True, shift=0.0) for update in step.updates))
        for step in steps
    ]
    (finding,) = findings_of(lost, [CAT, FROG], 0.8)
    assert finding.kind == "skipped"
    assert finding.sentence.startswith("8 of 8 updates were left out")
    assert _kinds([*lost[:3], *steps[3:]]) == [("stuck", "cat")]


def test_a_look_without_an_update_is_no_update_in_vain() -> None:
    looked = [
        replace(step, updates=tuple(replace(update, due=False) for update in step.updates))
        for step in _steps(*[(0.07, 0.3, 0.0)] * 8)
    ]
    assert _kinds(looked) == []


def test_an_unwanted_subject_that_stays_is_named_too() -> None:
    steps = [TraceStep(i, 0.0, 0.0, (Update({"hat": 0.9}, 0.9, 0.01, skipped=False),)) for i in range(8)]
    (found,) = findings_of(steps, [HAT], 0.8)
    assert (found.kind, found.subject) == ("stuck", "hat")
    assert "could not be pushed down" in found.sentence


def test_a_loss_of_ones_own_names_no_subject() -> None:
    steps = [
        TraceStep(i, 0.0, 0.0, (Update({"cat": 0.07, "frog": 0.3}, -5.0, 2.0, skipped=False),))
        for i in range(8)
    ]
    assert _kinds(steps) == [("torn", None)]


def test_a_word_that_cannot_be_raised_is_said_and_stands_in_the_trace(stickers: Model) -> None:
    options = {"steps": 10, "seeds": range(2), "decode": False, "progress": False}
    with pytest.warns(UserWarning, match="attention to 'a' could not be raised") as told:
        drawn = stickers.generate("a horse and a dog", subjects=["a", "dog"], **options)
    assert len({str(warning.message) for warning in told}) == len(told)
    for trace in drawn.trace:
        assert ("stuck", "a") in [(finding.kind, finding.subject) for finding in trace.findings]
        assert trace.to_dict()["findings"][0]["sentence"].startswith("the attention to 'a'")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        good = stickers.generate("a horse and a dog", **options)
    assert [trace.findings for trace in good.trace] == [(), ()]


def test_the_token_of_a_word_that_was_nursed_stands_in_the_trace(tiny: Model) -> None:
    options = {"steps": 2, "decode": False, "progress": False}
    (dominant,) = tiny.generate("an elephant with a sombrero", **options).trace
    assert dominant.tokens["elephant"] == (2,)
    assert dominant.tokens["sombrero"] in [(5,), (6,)]
    method = AttendAndExcite(word_tokens="max")
    (largest,) = tiny.generate("an elephant with a sombrero", method=method, **options).trace
    assert largest.tokens["sombrero"] == (5, 6)


def test_a_prompt_of_one_token_cannot_be_nursed_over_its_own_tokens(tiny: Model) -> None:
    recipe = replace(Recipe.named("official"), prompt_tokens_only=True)
    with pytest.warns(UserWarning, match="'cat' is one token, so .* nursing changes nothing"):
        drawn = tiny.generate("cat", method=AttendAndExcite(recipe), steps=2, decode=False, progress=False)
    assert torch.equal(
        drawn.latents,
        tiny.generate("cat", subjects={"cat": 0.0}, steps=2, decode=False, progress=False).latents,
    )
