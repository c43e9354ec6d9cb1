"""The terms of the objective: closed forms, and what all of them must keep."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from attend_excite.guidance.objective import SubjectTokens, smooth, token_probabilities
from attend_excite.guidance.objectives import TERMS, Recorded, Term, term_named
from attend_excite.guidance.objectives.binding_divergence import divergences
from attend_excite.guidance.objectives.contrast import nt_xent
from attend_excite.guidance.objectives.overlap import pairwise_overlap
from attend_excite.guidance.objectives.regions import above_otsu, region_of_peak
from attend_excite.guidance.objectives.total_variation import divergence, total_variation

TOKENS, SIZE = 10, (5, 6)
# "a yellow bowl and a long-haired cat": bowl 3 (yellow 2), cat 8 of two tokens 8 and 9 (long-haired 6 7).
PHRASES = SubjectTokens.stack(
    [[[3], [8, 9]], [[2]], [[1], [3], [5]]],
    last=[9, 9, 7],
    attributes=[[[[2]], [[6, 7]]], [[]], [[[2]], [], [[6], [7]]]],
    others=[[1, 4, 5], [1], [4]],
)
PAIRS = ("overlap", "contrast", "self-overlap", "self-cross", "binding-divergence", "binding-cosine")


def _term(name: str) -> Term:
    # A soft sharpening, so that no value is so near 0 or 1 that a difference is lost.
    return term_named(name, {"gate": 1.0} if name == "self-cross" else None, temperature=12.0)


ALL = pytest.mark.parametrize("term", [_term(name) for name in TERMS], ids=list(TERMS))


def _recorded(images: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> Recorded:
    noise = partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    patches = math.prod(SIZE)
    return Recorded(
        noise(images, *SIZE, TOKENS).softmax(dim=-1).to(dtype),
        (2 * noise(images, patches, patches)).softmax(dim=-1).to(dtype),
        Recorded(noise(images, *SIZE, TOKENS).softmax(dim=-1).to(dtype)),
    )


def _rows(recorded: Recorded, rows: list[int]) -> Recorded:
    """The record of some images of the batch."""
    assert recorded.self_attention is not None
    before = None if recorded.before is None else Recorded(recorded.before.cross[rows])
    return Recorded(recorded.cross[rows], recorded.self_attention[rows], before)


def _with_gradients(
    term: Term, recorded: Recorded, subjects: SubjectTokens
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss, and its gradients at the cross-attention and the self-attention."""
    assert recorded.self_attention is not None
    inputs = tuple(each.clone().requires_grad_() for each in (recorded.cross, recorded.self_attention))
    loss = term(replace(recorded, cross=inputs[0], self_attention=inputs[1]), subjects)
    gradients = torch.autograd.grad(loss.sum(), inputs, materialize_grads=True)
    return loss, gradients


@ALL
def test_the_gradient_is_that_of_finite_differences(term: Term) -> None:
    recorded = _recorded()

    def loss(cross: Tensor, self_attention: Tensor) -> Tensor:
        return term(replace(recorded, cross=cross, self_attention=self_attention), PHRASES)

    assert recorded.self_attention is not None
    inputs = (recorded.cross.requires_grad_(), recorded.self_attention.requires_grad_())
    assert loss(*inputs).shape == (3,)
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)


@ALL
def test_a_batch_is_its_images_and_filler_changes_nothing(term: Term) -> None:
    recorded = _recorded()
    images = (
        ([[3], [8, 9]], 9, [[[2]], [[6, 7]]], [1, 4, 5]),
        ([[2]], 9, [[]], [1]),
        ([[1], [3], [5]], 7, [[[2]], [], [[6], [7]]], [4]),
    )
    alone = [
        term(
            _rows(recorded, [row]),
            SubjectTokens.stack([positions], [last], attributes=[modifiers], others=[others]),
        )
        for row, (positions, last, modifiers, others) in enumerate(images)
    ]
    torch.testing.assert_close(term(recorded, PHRASES), torch.cat(alone))
    torch.testing.assert_close(
        term(_rows(recorded, [2, 0]), PHRASES.rows(torch.tensor([2, 0]))),
        torch.cat([alone[2], alone[0]]),
    )
    # Nor does a subject that another table of tokens has.
    elsewhere = replace(PHRASES, real=torch.ones_like(PHRASES.real))
    torch.testing.assert_close(term(recorded, elsewhere), torch.cat(alone))
    # What the filler points to may be anything, and so may the tokens that take no part.
    other = replace(recorded, cross=recorded.cross.clone())
    other.cross[2, ..., 8:] = 0.7
    filled = replace(PHRASES, positions=PHRASES.positions.masked_fill(~PHRASES.valid, 9))
    torch.testing.assert_close(term(other, filled), torch.cat(alone))


@ALL
def test_the_order_of_subjects_and_of_modifiers_changes_nothing(term: Term) -> None:
    recorded = _recorded(1)
    straight = SubjectTokens.stack(
        [[[1], [3], [5]]], [9], attributes=[[[[2]], [], [[6], [7]]]], others=[[4, 8]]
    )
    turned = SubjectTokens.stack(
        [[[5], [1], [3]]], [9], attributes=[[[[7], [6]], [[2]], []]], others=[[8, 4]]
    )
    torch.testing.assert_close(term(recorded, straight), term(recorded, turned))


@ALL
@pytest.mark.parametrize("first_step", [False, True])
def test_a_single_subject_gives_pairs_nothing_and_no_nan(term: Term, first_step: bool) -> None:
    recorded = _recorded(1)
    recorded = replace(recorded, before=None if first_step else recorded.before)
    for attention in (recorded.cross, torch.eye(TOKENS)[2].expand(1, *SIZE, -1), recorded.cross * 0):
        given = replace(recorded, cross=attention.double())
        loss, gradients = _with_gradients(term, given, SubjectTokens.stack([[[2]]], [9]))
        assert loss.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in gradients)
        if term.name in (*PAIRS, "correspondence"):
            assert loss.item() == 0
            assert not any(gradient.any() for gradient in gradients)


@ALL
def test_filler_alone_is_no_loss(term: Term) -> None:
    """An image whose subjects are all negated asks nothing of the terms that are on what is shown."""
    subjects = SubjectTokens.stack(
        [[[2], [5]]], [9], negated=[[True, True]], target=[[1.0, 1.0]], attributes=[[[[1]], []]]
    )
    loss, gradients = _with_gradients(term, _recorded(1), subjects)
    assert all(gradient.isfinite().all() for gradient in gradients)
    if term.name != "existence":
        assert loss.item() == 0


@ALL
def test_pairs_leave_out_what_is_to_be_avoided(term: Term) -> None:
    if term.name not in (*PAIRS, "alignment", "clean-background", "correspondence", "total-variation"):
        pytest.skip("on each subject by itself")
    recorded = _recorded(1)
    negated = SubjectTokens.stack(
        [[[1], [3], [5]]], [9], negated=[[False, False, True]], attributes=[[[[2]], [], [[6]]]], others=[[4]]
    )
    without = SubjectTokens.stack([[[1], [3]]], [9], attributes=[[[[2]], []]], others=[[4]])
    torch.testing.assert_close(term(recorded, negated), term(recorded, without))


@ALL
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_near_and_comes_back_wide(term: Term, dtype: torch.dtype) -> None:
    loss, gradients = _with_gradients(term, _recorded(dtype=dtype), PHRASES)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, term(_recorded(dtype=torch.float32), PHRASES), rtol=0.05, atol=0.01)
    assert all(gradient.isfinite().all() for gradient in gradients)


@ALL
def test_a_term_takes_only_what_it_says(term: Term) -> None:
    recorded = _recorded()
    needed = replace(
        recorded,
        self_attention=recorded.self_attention if "self-attention" in term.needs else None,
        before=recorded.before if "step-before" in term.needs else None,
    )
    torch.testing.assert_close(term(needed, PHRASES), term(recorded, PHRASES))
    if "self-attention" in term.needs:
        with pytest.raises(ValueError, match="self-attention was not recorded"):
            term(replace(recorded, self_attention=None), PHRASES)


def _placed(*maps: list[list[float]]) -> Tensor:
    """Raw attention of tokens 1, 2, ... as given; <sot> has the rest."""
    words = torch.tensor(maps, dtype=torch.float64).permute(1, 2, 0)
    return torch.cat([1 - words.sum(dim=-1, keepdim=True), words], dim=-1)[None]


LEFT = [[0.4, 0, 0, 0], [0.4, 0, 0, 0]]
RIGHT = [[0, 0, 0, 0.2], [0, 0, 0, 0.2]]
BOTH = [[0.2, 0, 0, 0.2], [0.2, 0, 0, 0.2]]
TWO = SubjectTokens.stack([[[1], [2]]], [2])


@pytest.mark.parametrize(
    ("second", "overlap", "cosine"),
    [(RIGHT, 0, 1), (LEFT, 0.5, 0), (BOTH, 0.25, 1 - 0.5**0.5)],
    ids=["disjoint", "equal", "half"],
)
def test_overlap_and_cosine_of_known_maps(second: list, overlap: float, cosine: float) -> None:
    recorded = Recorded(_placed(LEFT, second))
    assert term_named("overlap", {"raw": True})(recorded, TWO).item() == pytest.approx(overlap)
    # Each noun's distance to the other's, less.
    assert term_named("binding-cosine")(recorded, TWO).item() == pytest.approx(-2 * cosine)
    bound = SubjectTokens.stack([[[1]]], [2], attributes=[[[[2]]]])
    assert term_named("binding-cosine")(recorded, bound).item() == pytest.approx(cosine)


def test_overlap_of_sharpened_maps_weighs_what_a_subject_has() -> None:
    maps = torch.tensor([[[1.0, 0, 0], [0.5, 0.5, 0], [0, 0, 0]]])
    overlap = pairwise_overlap(maps)[0]
    assert overlap[0, 1].item() == pytest.approx(0.25)
    assert overlap.diagonal().tolist() == [0.5, 0.5, 0]
    assert overlap[0, 2] == overlap[2, 1] == 0
    # Twice as much of both is the same overlap, twice as much of one isn't.
    torch.testing.assert_close(pairwise_overlap(2 * maps)[0], overlap)


def test_divergence_is_symmetric_and_0_only_between_equals() -> None:
    maps = torch.rand(1, 4, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    maps = maps / maps.sum(dim=-1, keepdim=True)
    maps[0, 3] = maps[0, 0]
    found = divergences(maps)[0]
    a, b = maps[0, 0], maps[0, 1]
    expected = ((a * (a / b).log()).sum() + (b * (b / a).log()).sum()) / 2
    torch.testing.assert_close(found[0, 1], expected)
    torch.testing.assert_close(found, found.T)
    assert found[0, 3].abs() < 1e-12
    assert (found[:3, :3] + torch.eye(3) > 1e-3).all()
    # Maps that share no patch are far apart, not infinitely.
    assert divergences(torch.eye(2, dtype=torch.float64)[None])[0, 0, 1].item() == pytest.approx(
        -math.log(1e-8)
    )


def test_binding_by_divergence_is_its_sum_over_phrases() -> None:
    recorded = _recorded(1)
    maps = recorded.cross[0].permute(2, 0, 1).flatten(1)
    maps = maps / maps.sum(dim=-1, keepdim=True)

    def d(first: int, second: int) -> float:
        a, b = maps[first], maps[second]
        return float((a * (a / b).log()).sum() + (b * (b / a).log()).sum()) / 2

    # "a large yellow bowl and cat": 1 2 3 4 5 6. A cat without modifiers is what a bowl is kept apart from.
    subjects = SubjectTokens.stack([[[4], [6]]], [9], attributes=[[[[2], [3]], []]], others=[[1, 5]])
    away = {word: sum(d(word, other) for other in (1, 5, 6)) / 3 for word in (2, 3, 4)}
    bowl = sum(d(4, own) - (away[4] + away[own]) / 2 for own in (2, 3))
    assert term_named("binding-divergence")(recorded, subjects).item() == pytest.approx(bowl)


def test_contrast_of_known_vectors_and_of_their_scale() -> None:
    group = torch.tensor([0, 0, 1])
    vectors = torch.tensor([[[1.0, 0], [1, 0], [0, 1]]], dtype=torch.float64)
    valid = torch.ones(1, 3, dtype=torch.bool)
    # Equal within the group, at a right angle to the other.
    assert nt_xent(vectors, group, valid, 0.5).item() == pytest.approx(math.log(1 + math.exp(-2)))
    random = torch.rand(1, 3, 7, dtype=torch.float64)
    lengths = torch.tensor([3.0, 0.1, 20], dtype=torch.float64)[:, None]
    torch.testing.assert_close(
        nt_xent(random, group, valid, 0.5), nt_xent(random * lengths, group, valid, 0.5)
    )
    valid[0, 2] = False
    assert nt_xent(random, group, valid, 0.5).item() == 0


def test_self_attention_at_the_peaks() -> None:
    """Two subjects whose peaks look at the same patches overlap by half, at others not at all."""
    cross = _placed(LEFT, RIGHT)
    plain = {"sigma": 0.0}
    looks = torch.zeros(1, 8, 8, dtype=torch.float64)
    looks[..., 0] = 1
    assert term_named("self-overlap", plain)(Recorded(cross, looks), TWO).item() == pytest.approx(0.5)
    itself = torch.eye(8, dtype=torch.float64)[None]
    assert term_named("self-overlap", plain)(Recorded(cross, itself), TWO).item() == 0


def test_self_cross_is_the_sum_over_the_patches_of_each_subject() -> None:
    recorded = _recorded(1)
    subjects = SubjectTokens.stack([[[2], [5], [6]]], [9])
    term = term_named("self-cross", {"gate": 1.0}, temperature=30.0)
    sharp = token_probabilities(recorded.cross, subjects.last, 30.0)[0, ..., [2, 5, 6]].permute(2, 0, 1)
    maps = smooth(sharp, 0.5**0.5)
    assert recorded.self_attention is not None
    expected = []
    for i in range(3):
        seen = torch.zeros(SIZE, dtype=torch.float64)
        for y, x in above_otsu(maps[i]).nonzero().tolist():
            seen += maps[i, y, x] * recorded.self_attention[0, y * SIZE[1] + x].view(SIZE)
        seen = smooth(seen, 0.5**0.5)
        expected += [torch.minimum(seen / seen.sum(), maps[j]).sum() for j in range(3) if j != i]
    torch.testing.assert_close(term(recorded, subjects)[0], torch.stack(expected).mean())
    # A picture that still lacks a subject isn't asked to part them.
    assert term_named("self-cross", {"gate": 0.01}, temperature=30.0)(recorded, subjects).item() == 0


def test_otsu_parts_two_levels_and_the_region_is_about_the_peak() -> None:
    maps = torch.full((4, 6), 0.1)
    maps[0, 0], maps[1, 1], maps[3, 5] = 0.9, 0.8, 0.7
    assert above_otsu(maps).nonzero().tolist() == [[0, 0], [1, 1], [3, 5]]
    assert region_of_peak(maps).nonzero().tolist() == [[0, 0], [1, 1]]
    flat = torch.full((2, 3), 0.3)
    assert not above_otsu(flat).any()
    assert region_of_peak(flat).sum() == 1


def test_the_background_is_cleaned_where_it_rivals_the_foreground() -> None:
    half = [[0.45, 0.1, 0.1, 0.35], [0.1, 0.1, 0.1, 0.1]]
    recorded = Recorded(_placed(half, [[0.3] * 4] * 2))
    term = term_named("clean-background", sigma=0.0, temperature=10.0)
    sharp = torch.sigmoid(10 * (torch.tensor(half, dtype=torch.float64) - 0.3))
    # The patch at the other side is above Otsu's threshold, not below the peak's own region, which is itself.
    subjects = SubjectTokens.stack([[[1]]], [2])
    assert term(recorded, subjects).item() == 0
    assert above_otsu(sharp).sum() == 2
    # A larger region about the peak, with a fainter patch in it, is rivalled.
    wider = [[0.45, 0.31, 0.1, 0.35], [0.1, 0.1, 0.1, 0.1]]
    rivalled = term(Recorded(_placed(wider, [[0.3] * 4] * 2)), subjects)
    assert rivalled.item() == pytest.approx(torch.sigmoid(torch.tensor(0.5)).item())


def test_alignment_is_the_mean_difference_from_the_step_before() -> None:
    recorded = _recorded(1)
    term = term_named("alignment", sigma=0.0, temperature=5.0)
    assert recorded.before is not None
    now, before = (
        token_probabilities(each.cross, torch.tensor([9]), 5.0)[0, ..., [2, 5]]
        for each in (recorded, recorded.before)
    )
    expected = (now - before).abs().mean()
    torch.testing.assert_close(term(recorded, SubjectTokens.stack([[[2], [5]]], [9]))[0], expected)
    assert term(replace(recorded, before=Recorded(recorded.cross)), TWO).item() == 0


def test_total_variation_and_its_divergence() -> None:
    edge = torch.tensor([[1.0, 0], [1, 0]])
    assert total_variation(edge).item() == 1
    assert total_variation(torch.full((3, 4), 0.7)) == 0
    assert total_variation(edge.mT).item() == 1
    first, second = torch.tensor([0.9999999, 1e-7]), torch.tensor([1e-7, 0.9999999])
    assert divergence(first, first).item() == 0
    assert divergence(first, second).item() == pytest.approx(math.log(2), abs=1e-4)
    # The faintest subject counts, and a modifier that lies elsewhere costs.
    cross = _placed(LEFT, RIGHT, [[0.0] * 4] * 2)
    nouns = SubjectTokens.stack([[[1], [2]]], [3])
    bound = SubjectTokens.stack([[[1], [2]]], [3], attributes=[[[[2]], [[1]]]])
    free, tied = (term_named("total-variation")(Recorded(cross), s) for s in (nouns, bound))
    assert free < 0
    assert tied > free
    same = SubjectTokens.stack([[[1], [2]]], [3], attributes=[[[[1]], [[2]]]])
    unlike = {"noun_floor": 0.3, "modifier_floor": 0.3}
    torch.testing.assert_close(term_named("total-variation", unlike)(Recorded(cross), same), free)


def test_existence_and_correspondence_in_fuzzy_logic() -> None:
    """Words alike in every patch, so that the sharpened map is 0.5 everywhere."""
    half = Recorded(_placed([[0.3, 0.3], [0.3, 0.3]], [[0.3, 0.3], [0.3, 0.3]]))
    one = SubjectTokens.stack([[[1]]], [2])
    assert term_named("existence")(half, one).item() == pytest.approx(math.log(2))
    no = SubjectTokens.stack([[[1]]], [2], negated=[[True]])
    assert term_named("existence")(half, no).item() == pytest.approx(math.log(2))
    # Scaled to 0..1, row by row: 1 0.5 0 0, 1 1 0 0 and 0 1 1 0.
    cross = _placed([[0.4, 0.2], [0, 0]], [[0.2, 0.2], [0, 0]], [[0, 0.1], [0.1, 0]])
    bound = SubjectTokens.stack([[[1]]], [3], attributes=[[[[2]]]])
    assert term_named("correspondence")(Recorded(cross), bound).item() == pytest.approx(math.log(2) / 4)
    # What is another's modifier, no noun is.
    both = SubjectTokens.stack([[[1], [3]]], [3], attributes=[[[[1]], []]])
    expected = (-2 * math.log(0.75) + 0.3 * math.log(2)) / 4
    assert term_named("correspondence")(Recorded(cross), both).item() == pytest.approx(expected)


def test_the_best_patches_are_the_peak_if_there_is_one() -> None:
    recorded = _recorded()
    one, many = (term_named("top-patches", {"k": k})(recorded, PHRASES) for k in (1, 1000))
    torch.testing.assert_close(one, term_named("most-neglected")(recorded, PHRASES))
    assert (many > one).all()
    every = term_named("sum-of-subjects")(recorded, PHRASES)
    assert every[1].item() == pytest.approx(one[1].item())
    assert (every >= one).all()


def test_a_text_without_sot_is_read_from_its_first_token() -> None:
    recorded = _recorded(1)
    with_sot = SubjectTokens.stack([[[2], [5]]], [9])
    without = SubjectTokens.stack([[[1], [4]]], [8], first=[0])
    shorter = Recorded(recorded.cross[..., 1:])
    for name in ("most-neglected", "overlap", "existence"):
        torch.testing.assert_close(_term(name)(recorded, with_sot), _term(name)(shorter, without))


def test_unknown_terms_and_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown term 'iou': choose one of most-neglected"):
        term_named("iou")
    with pytest.raises(ValueError, match="the term overlap has no 'k'; known are raw, sigma, temperature"):
        term_named("overlap", {"k": 3})
