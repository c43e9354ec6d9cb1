"""The tensor functions of the method: closed forms and properties."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attend_excite import Recipe
from attend_excite.guidance.nurse import Measurement, nurse
from attend_excite.guidance.objective import (
    SubjectTokens,
    most_neglected,
    smooth,
    subject_attention,
    subject_leads,
    subject_losses,
    token_probabilities,
    tolerated_losses,
)
from attend_excite.guidance.objectives.most_neglected import MostNeglected
from attend_excite.guidance.recipes import method_recipes
from attend_excite.guidance.schedule import StepPlan
from attend_excite.metadata import as_plain_data

OFFICIAL, PAPER = Recipe.named("official"), Recipe.named("paper")


@pytest.mark.parametrize(
    ("recipe", "taps"), [(OFFICIAL, (0.2119, 0.5761, 0.2119)), (PAPER, (0.1065, 0.7870, 0.1065))]
)
def test_smoothing_has_the_published_taps(recipe: Recipe, taps: tuple[float, ...]) -> None:
    impulse = torch.zeros(5, 5)
    impulse[2, 2] = 1
    expected = torch.outer(torch.tensor(taps), torch.tensor(taps))
    torch.testing.assert_close(smooth(impulse, recipe.sigma)[1:4, 1:4], expected, rtol=0, atol=1e-4)


def test_smoothing_reflects_at_the_border_and_can_be_off() -> None:
    maps = torch.rand(3, 4, 6)
    row = torch.cat([maps[..., 1:2], maps, maps[..., -2:-1]], dim=-1)
    across = 0.2119 * row[..., :-2] + 0.5761 * row[..., 1:-1] + 0.2119 * row[..., 2:]
    column = torch.cat([across[:, 1:2], across, across[:, -2:-1]], dim=1)
    both = 0.2119 * column[:, :-2] + 0.5761 * column[:, 1:-1] + 0.2119 * column[:, 2:]
    torch.testing.assert_close(smooth(maps, OFFICIAL.sigma), both, rtol=0, atol=2e-4)
    assert smooth(maps, 0) is maps


def test_sot_and_what_follows_the_last_token_are_left_out() -> None:
    maps = torch.rand(2, 4, 4, 8)
    probabilities = token_probabilities(maps, torch.tensor([6, 3]), temperature=100)
    first = (100 * maps[0, ..., 1:7]).softmax(dim=-1)
    second = (100 * maps[1, ..., 1:4]).softmax(dim=-1)
    torch.testing.assert_close(probabilities[0, ..., 1:7], first)
    torch.testing.assert_close(probabilities[1, ..., 1:4], second)
    assert probabilities[..., 0].eq(0).all()
    assert probabilities[1, ..., 4:].eq(0).all()


def test_marks_between_chunks_take_no_share() -> None:
    maps = torch.rand(1, 2, 2, 9)
    between = torch.zeros(1, 9, dtype=torch.bool)
    between[:, 3:5] = True
    chunks = token_probabilities(maps, torch.tensor([7]), 30.0, excluded=between)
    whole = token_probabilities(maps[..., [0, 1, 2, 5, 6, 7, 8]], torch.tensor([5]), 30.0)
    assert torch.equal(chunks[..., 3:5], torch.zeros(1, 2, 2, 2))
    torch.testing.assert_close(chunks[..., [0, 1, 2, 5, 6, 7, 8]], whole)


def test_a_perfect_map_cannot_reach_the_first_threshold_without_the_temperature() -> None:
    maps = torch.zeros(1, 2, 2, 77)
    maps[..., 2] = 1
    probabilities = token_probabilities(maps, torch.tensor([75]), temperature=1)
    torch.testing.assert_close(probabilities[0, 0, 0, 2], torch.tensor(math.e / (math.e + 74)))


def test_the_official_numbers_fall_out_at_fifty_steps() -> None:
    for iterations in (50, 51):
        plan = OFFICIAL.plan(iterations)
        assert {i: step.threshold for i, step in enumerate(plan) if step.threshold is not None} == {
            0: 0.05,
            10: 0.5,
            20: 0.8,
        }
        assert [step.alters for step in plan] == [True] * 25 + [False] * (iterations - 25)
        sizes = 20 * torch.linspace(1, 0.5, iterations, dtype=torch.float64).sqrt()
        assert [step.step_size for step in plan] == pytest.approx(sizes.tolist())
    assert OFFICIAL.plan(50)[24].step_size == pytest.approx(17.4, abs=0.05)
    assert [PAPER.plan(50)[i].step_size for i in (0, 12, 24)] == pytest.approx([20, 15, 10])


def test_refinement_at_one_chosen_step_alone_is_a_recipe() -> None:
    once = Recipe.from_dict({"base": "official", "altered": 0.0, "thresholds": [[0.14, 0.8]]})
    assert [index for index, step in enumerate(once.plan(50)) if not step.idle] == [7]
    assert not once.plan(50)[7].alters
    # At the one step 20 updates at most, and beside it the ordinary ones.
    beside = Recipe.from_dict({"base": "official", "thresholds": [[0.2, 0.8]]}).plan(50)
    assert [index for index, step in enumerate(beside) if step.threshold is not None] == [10]
    assert sum(step.alters for step in beside) == 25


@pytest.mark.parametrize(("iterations", "places"), [(20, [0, 4, 8]), (30, [0, 6, 12]), (1, [0])])
def test_shorter_runs_keep_the_fractions(iterations: int, places: list[int]) -> None:
    plan = OFFICIAL.plan(iterations)
    assert [i for i, step in enumerate(plan) if step.threshold is not None] == places
    assert sum(step.alters for step in plan) == iterations // 2
    assert plan[0].threshold == (0.8 if iterations == 1 else 0.05)
    assert replace(OFFICIAL, thresholds=((1.0, 0.9),)).plan(iterations)[-1].threshold == 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"thresholds": ((0.0, 1.5),)}, "a threshold is 1.5: it must be an attention, 0 to 1"),
        ({"thresholds": {0: 0.05, 10: 0.5}}, "thresholds are pairs"),
        ({"thresholds": ((2.0, 0.5),)}, "a fraction of the run, 0 to 1"),
        ({"step_size": 0.0}, "step_size is 0.0: it must be above 0"),
        ({"decay": "cosine"}, "square-root or linear"),
        ({"step_size": 1e305}, "step_size is 1e\\+305"),
        ({"temperature": 10**400}, "temperature is 1000"),
        ({"max_refinements": 10**9}, "a whole number, 0 to 1000"),
        ({"summary": 5}, "summary is 5: it must be a text"),
        ({"method": 5}, "method is 5: it must be a text"),
        ({"title": ["ours"]}, "title is \\['ours'\\]: it must be a text"),
        ({"start": 0.6}, "start is 0.6: it must be a fraction of the run, 0 to where altering ends"),
        ({"start": "0.1"}, "start is '0.1': it must be a number"),
        ({"max_shift": 0.0}, "max_shift is 0.0: it must be above 0"),
        ({"choose_at": 1.5}, "choose_at is 1.5: it must be a fraction of the run, 0 to 1"),
        ({"rest_at": 1.5}, "rest_at is 1.5: it must be 0 to 1"),
        ({"rest_lead": -2}, "rest_lead is -2: it must be -1 to 1"),
    ],
)
def test_a_recipe_out_of_range_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(OFFICIAL, **change)


def test_recipes_from_plain_data() -> None:
    assert Recipe.from_dict({"base": "official", "step_size": 1.5}) == replace(OFFICIAL, step_size=1.5)
    assert Recipe.named("recommended", PAPER) == PAPER
    # An ablation as a base is one of the model's own recipe, too.
    assert Recipe.from_dict({"base": "bare"}, PAPER).decay == "linear"
    with pytest.raises(ValueError, match="unknown in a recipe: steps"):
        Recipe.from_dict({"base": "official", "steps": 3})
    for key, value, message in (
        ("prompt_tokens_only", "no", "prompt_tokens_only is 'no': it must be true or false"),
        ("update_after_refinement", 1, "true or false"),
        ("max_refinements", True, "a whole number"),
        ("step_size", "5", "step_size is '5': it must be a number"),
        ("thresholds", [[0.1, 0.2, 0.3]], "thresholds are pairs"),
    ):
        with pytest.raises(ValueError, match=message):
            Recipe.from_dict({"base": "official", key: value})
    with pytest.raises(ValueError, match="missing in a recipe"):
        Recipe.from_dict({"step_size": 1.5})
    for name in ("secret", None, 3):
        with pytest.raises(ValueError, match="choose one of recommended, official, paper"):
            Recipe.named(name)


@pytest.mark.parametrize("name", ["recommended", "bare", "no-smoothing"])
def test_what_is_made_of_a_models_recipe_needs_it(name: str) -> None:
    for make in (Recipe.named, lambda base: Recipe.from_dict({"base": base, "sigma": 0.0})):
        with pytest.raises(ValueError, match=r"what a model recommends is its own: .*model\.recipe"):
            make(name)


def test_a_later_start_moves_what_was_before_it() -> None:
    plan = replace(OFFICIAL, start=0.3).plan(50)
    assert [i for i, step in enumerate(plan) if step.alters] == list(range(15, 25))
    # What 0 and 0.2 of the run demand is demanded at the start, where the stronger holds.
    assert {i: step.threshold for i, step in enumerate(plan) if step.threshold} == {15: 0.5, 20: 0.8}
    assert [step.step_size for step in plan] == [step.step_size for step in OFFICIAL.plan(50)]
    linear = replace(PAPER, start=0.3).plan(50)
    assert (linear[15].step_size, linear[24].step_size) == (20, 10)
    every_third = replace(OFFICIAL, start=0.3, guide_every=3, thresholds=()).plan(50)
    assert [i for i, step in enumerate(every_third) if step.alters] == [15, 18, 21, 24]


def test_without_a_start_or_a_bound_the_plan_is_the_authors() -> None:
    assert (OFFICIAL.start, OFFICIAL.max_shift, OFFICIAL.rest_after) == (0, None, 0)
    assert (PAPER.start, PAPER.max_shift, PAPER.rest_after) == (0, None, 0)


def test_the_published_methods_are_recipes_in_the_models_measure() -> None:
    assert set(method_recipes()) >= {"syngen", "ebama", "conform", "divide-and-bind", "initno", "self-cross"}
    for name in method_recipes():
        plan = Recipe.named(name, OFFICIAL).plan(50)
        assert [step.alters for step in plan] == [True] * 25 + [False] * 25
        assert plan[0].step_size == 20
        # Another model's own step and temperature stay.
        own = Recipe.named(name, replace(OFFICIAL, step_size=3.0, temperature=5.0))
        assert own.plan(50)[0].step_size == 3
        assert {getattr(term, "temperature", 5.0) for _, term in own.plan(50)[0].terms} == {5.0}
        assert Recipe.from_dict(json.loads(json.dumps(asdict(own)))) == own
    assert {step.step_size for step in Recipe.named("syngen", OFFICIAL).plan(50)} == {20}
    assert [
        i for i, step in enumerate(Recipe.named("conform", OFFICIAL).plan(50)) if step.threshold == 1
    ] == [0, 10, 20]


def test_a_model_may_know_what_suits_other_methods() -> None:
    own = replace(OFFICIAL, step_size=3.0, tuned={"syngen": {"step_size": 7.0, "altered": 0.3}})
    assert own == replace(OFFICIAL, step_size=3.0)
    tuned, other = Recipe.named("syngen", own), Recipe.named("ebama", own)
    assert (tuned.step_size, tuned.altered, tuned.terms) == (7.0, 0.3, Recipe.named("syngen", OFFICIAL).terms)
    assert other == Recipe.named("ebama", replace(OFFICIAL, step_size=3.0))
    assert "tuned" not in as_plain_data(tuned)
    # What a user asks for comes first.
    users = Recipe.from_dict({"base": "recommended", "step_size": 9.0}, own)
    assert (Recipe.named("syngen", users).step_size, Recipe.named("syngen", users).altered) == (9.0, 0.3)
    with pytest.raises(ValueError, match="tuned is 5: it must be objects of numbers by the names of recipes"):
        replace(OFFICIAL, tuned=5)


def test_terms_have_their_steps_and_say_what_they_need() -> None:
    bind = Recipe.named("divide-and-bind", OFFICIAL).plan(50)
    weights = {i: [getattr(term, "binding", None) for _, term in bind[i].terms] for i in (9, 10, 19, 20, 49)}
    assert weights == {9: [1], 10: [5], 19: [5], 20: [10], 49: [10]}
    initno = Recipe.named("initno", OFFICIAL).plan(50)
    assert [term.name for _, term in initno[9].terms] == ["most-neglected"]
    assert not initno[9].needs
    assert initno[10].needs == {"self-attention", "step-before"}
    # A step without a term has nothing to move along.
    late = replace(OFFICIAL, terms=[{"term": "overlap", "start": 0.3}])
    assert [i for i, step in enumerate(late.plan(50)) if not step.idle] == list(range(15, 25))
    short = replace(
        OFFICIAL, terms=[{"term": "overlap", "end": 0.2}, {"term": "most-neglected", "start": 0.2}]
    )
    counted = [[term.name for _, term in step.terms] for step in short.plan(10)]
    assert counted == [["overlap"]] * 2 + [["most-neglected"]] * 8
    assert [term.name for _, term in short.plan(1)[0].terms] == ["most-neglected"]
    # Of terms that follow one another one counts, however few steps there are.
    for iterations in range(1, 12):
        plan = Recipe.named("divide-and-bind", OFFICIAL).plan(iterations)
        assert {len(step.terms) for step in plan} == {1}
    brief = replace(OFFICIAL, terms=[{"term": "overlap", "end": 0.2}]).plan(3)
    assert [len(step.terms) for step in brief] == [1, 0, 0]
    (planned,) = OFFICIAL.plan(1)[0].terms
    assert planned == (1.0, MostNeglected())


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ([], "terms is empty"),
        ([{"term": "iou"}], "unknown term 'iou'"),
        ([{"name": "overlap"}], "terms are a list of objects"),
        ([{"term": "overlap", "weight": 0}], "the weight of the term overlap is 0: it must be other than 0"),
        ([{"term": "overlap", "weight": "2"}], "the weight of the term overlap is '2': it must be a number"),
        ([{"term": "overlap", "options": {"raw": 1}}], "the raw of the term overlap is 1: .* true or false"),
        (
            [{"term": "top-patches", "options": {"k": 0}}],
            "the k of .* is 0: it must be a whole number above 0",
        ),
        ([{"term": "contrast", "options": {"tau": -1}}], "must be a number above 0"),
        ([{"term": "overlap", "options": [1]}], "options of the term overlap are numbers by name"),
        (
            [{"term": "overlap", "start": 0.5, "end": 0.2}],
            "start and end of the term overlap are 0.5 and 0.2",
        ),
    ],
)
def test_terms_that_cannot_be_are_refused(terms: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.from_dict({"base": "official", "terms": terms})


def _subjects(**more: Any) -> SubjectTokens:
    return SubjectTokens.stack([[[2], [5]], [[3, 4]]], last=[6, 6], **more)


def test_each_subject_has_its_largest_smoothed_attention() -> None:
    probabilities = torch.rand(2, 4, 4, 8)
    attention = subject_attention(probabilities, _subjects(), OFFICIAL.sigma)
    smoothed = smooth(probabilities.permute(0, 3, 1, 2), OFFICIAL.sigma)
    expected = [[smoothed[0, 2].max(), smoothed[0, 5].max()], [smoothed[1, 3:5].max(), 0]]
    torch.testing.assert_close(attention, torch.tensor(expected))


def test_losses_of_targets_and_negations() -> None:
    subjects = _subjects(target=[[1.0, 0.6], [0.1]], negated=[[False, False], [True]])
    attention = torch.tensor([[0.3, 0.7], [0.4, 0.0]])
    torch.testing.assert_close(subject_losses(attention, subjects), torch.tensor([[0.7, 0], [0.3, 0]]))
    # At a threshold of 0.5 the first must reach 0.5, the second 0.5, and the negated stay under 0.5.
    tolerated = tolerated_losses(subjects, 0.5)
    torch.testing.assert_close(tolerated[:, 0], torch.tensor([0.5, 0.4]))
    torch.testing.assert_close(tolerated[0, 1], torch.tensor(0.1))


def test_a_lead_is_over_the_strongest_other_in_the_best_patch() -> None:
    probabilities = torch.zeros(2, 2, 2, 8)
    probabilities[0, 0, 0, 2], probabilities[0, 0, 0, 5] = 0.4, 0.45  # the first has no patch to itself
    probabilities[0, 1, 1, 2], probabilities[0, 1, 1, 5] = 0.3, 0.2
    probabilities[1, 0, 1, 3], probabilities[1, 1, 0, 4] = 0.1, 0.25  # a subject of two tokens, alone
    leads = subject_leads(probabilities, _subjects(), sigma=0)
    torch.testing.assert_close(leads, torch.tensor([[0.1, 0.05], [0.25, 0.0]]))
    behind = subject_leads(probabilities[:, :1], _subjects(), sigma=0)
    torch.testing.assert_close(behind[0], torch.tensor([0.0, 0.05]))


def test_the_first_of_equally_neglected_subjects_has_the_gradient() -> None:
    losses = torch.tensor([[0.2, 0.9, 0.9]], requires_grad=True)
    most_neglected(losses).sum().backward()
    assert losses.grad is not None
    assert losses.grad.tolist() == [[0, 1, 0]]


def _linear(latents: Tensor, rows: Tensor) -> Measurement:
    """A subject whose attention is the latent's mean: each update of size 4 adds 1/4 of the step."""
    attention = latents.flatten(1).mean(dim=1, keepdim=True)
    return Measurement(attention, 1 - attention, 1 - attention[:, 0])


def _plan(**more: object) -> StepPlan:
    plan = StepPlan(0.4, alters=True, threshold=None, max_refinements=20, update_after_refinement=True)
    return replace(plan, **more)


START = torch.tensor([0.05, 0.42, 0.9]).reshape(3, 1, 1, 1).expand(3, 1, 2, 2)
LIMIT = torch.full((3, 1), 0.5)


@pytest.mark.parametrize(
    ("plan", "updates"),
    [
        (_plan(), [1, 1, 1]),
        # 0.05 needs five updates to reach 0.5; the measurement that finds it there updates once more,
        # and the ordinary update follows.
        (_plan(threshold=0.5), [7, 3, 1]),
        (_plan(threshold=0.5, update_after_refinement=False), [6, 2, 1]),
        (_plan(threshold=0.5, max_refinements=3), [4, 3, 1]),
        (_plan(threshold=0.5, alters=False), [6, 2, 0]),
    ],
)
def test_each_image_has_its_own_refinement(plan: StepPlan, updates: list[int]) -> None:
    tolerated = None if plan.threshold is None else LIMIT
    shifted, visits = nurse(START.double(), _linear, plan, tolerated)
    moved = (shifted - START).flatten(1).mean(dim=1) / 0.1
    torch.testing.assert_close(moved, torch.tensor(updates, dtype=torch.float64))
    made = [sum(int((visit.shift[visit.rows == row] > 0).sum()) for visit in visits) for row in range(3)]
    assert made == updates


def test_where_there_is_nothing_to_lose_nobody_looks_twice() -> None:
    """As at CONFORM's first step, or for a single subject: the attention is short, the loss is 0."""

    def content(latents: Tensor, rows: Tensor) -> Measurement:
        measured = _linear(latents, rows)
        return measured._replace(loss=0 * measured.loss)

    shifted, visits = nurse(START.double(), content, _plan(threshold=0.5), LIMIT)
    assert len(visits) == 1
    assert torch.equal(shifted, START.double())


def test_an_update_that_is_not_finite_is_left_out_and_told() -> None:
    def broken(latents: Tensor, rows: Tensor) -> Measurement:
        measured = _linear(latents, rows)
        return measured._replace(loss=torch.where(rows == 1, torch.nan, measured.loss))

    shifted, (visit,) = nurse(START.double(), broken, _plan(threshold=0.0), LIMIT * 2)
    assert visit.skipped.tolist() == [False, True, False]
    assert torch.equal(shifted[1], START[1].double())
    assert not torch.equal(shifted[0], START[0].double())


@pytest.mark.parametrize("bound", [0.05, 0.5, 10.0])
def test_no_update_is_longer_than_the_bound(bound: float) -> None:
    free, (unbound,) = nurse(START.double(), _linear, _plan())
    shifted, (visit,) = nurse(START.double(), _linear, _plan(max_shift=bound))
    torch.testing.assert_close(visit.shift, unbound.shift.clamp(max=bound))
    moved, whole = shifted - START, free - START
    relative = moved.flatten(1).norm(dim=1) / START.double().flatten(1).norm(dim=1)
    torch.testing.assert_close(relative, visit.shift)
    # Shortened, not turned; and to the bit what it was where it was short enough.
    assert torch.nn.functional.cosine_similarity(moved.flatten(1), whole.flatten(1)).min() > 1 - 1e-9
    assert torch.equal(shifted[unbound.shift <= bound], free[unbound.shift <= bound])


def test_an_image_that_rests_is_left_as_it_is() -> None:
    def resting(latents: Tensor, rows: Tensor) -> Measurement:
        measured = _linear(latents, rows)
        return measured._replace(rests=measured.attention[:, 0] >= 0.4)

    shifted, visits = nurse(START.double(), resting, _plan(threshold=0.8), LIMIT - 0.3)
    assert torch.equal(shifted[1:], START[1:].double())
    # The first rests in the midst of its refinement.
    assert shifted[0].mean() == pytest.approx(0.45)
    assert [visit.due.tolist() for visit in visits[:2]] == [[True, False, False], [True]]
    assert not visits[-1].due.any()
