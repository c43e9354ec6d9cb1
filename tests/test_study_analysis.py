"""The study's figures: against closed forms, other programs and simulated panels."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from scipy.optimize import minimize
from scipy.stats import binom, binomtest
from typer.testing import CliRunner

from attend_excite.benchmark import store
from attend_excite.cli import app
from attend_excite.models.judge import Judge, pixels
from attend_excite.study.analysis import (
    ALL,
    agreement,
    analyse,
    exclusions,
    winners,
)
from attend_excite.study.create import NONE, Page, Rules, Study, create_study, read_study
from attend_excite.study.results import write_results
from attend_excite.study.simulate import CERTAINTY, judged_utilities, known_utilities, simulate
from attend_excite.study.standings import luce_strengths, standings
from attend_excite.study.votes import Kind, Vote

SYSTEMS = ("ours", "plain", "structure")
STRENGTHS = {"ours": 6.0, "plain": 2.0, "structure": 1.0}


def _vote(
    respondent: int,
    prompt: str,
    choice: str | None,
    shown: Sequence[str] = SYSTEMS,
    kind: Kind = "ordinary",
    seconds: float = 5.0,
) -> Vote:
    return Vote(
        respondent=f"{respondent:032x}",
        page=f"{kind} {prompt}",
        kind=kind,
        repeats=f"ordinary {prompt}" if kind == "repeat" else None,
        prompt=prompt,
        subset="animals",
        shown=tuple(shown),
        choice=choice,
        expected="ours" if kind == "check" else None,
        seconds=seconds,
    )


def _study(prompts: int) -> Study:
    pages = tuple(
        Page(f"{place:016x}", "ordinary", f"prompt {place}", "animals", dict.fromkeys(SYSTEMS, ()))
        for place in range(prompts)
    )
    return Study("none", SYSTEMS, (0,), pages, Rules(), False, "", 0, {})


def test_shares_strengths_and_wilson_have_closed_forms() -> None:
    choices = ["ours"] * 13 + ["plain"] * 5 + [None] * 2
    votes = [_vote(number, str(place), choice) for place in range(3) for number, choice in enumerate(choices)]
    found = standings(votes, resamples=50)
    assert list(found) == [*SYSTEMS, NONE]
    assert [standing.votes for standing in found.values()] == [39, 15, 0, 6]
    for standing in found.values():
        interval = binomtest(standing.votes, 60).proportion_ci(method="wilson")
        assert standing.share == standing.votes / 60
        assert (standing.low, standing.high) == pytest.approx((interval.low, interval.high))
    # Of those who prefer one, where every page shows all.
    assert [found[system].strength for system in SYSTEMS] == pytest.approx([39 / 54, 15 / 54, 0])
    assert found[NONE].strength is None
    # Never chosen isn't never to be chosen.
    assert found["structure"].bootstrap_high is not None
    assert 0.05 < found["structure"].bootstrap_high < 0.3


def test_strengths_are_the_likelihoods_maximum() -> None:
    members = np.array([[1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 1, 1], [1, 1, 1, 1]], dtype=float)
    cells = np.array([[7, 3, 0, 0], [0, 8, 4, 0], [5, 0, 2, 3], [9, 6, 2, 4]], dtype=float)

    def loss(logs: np.ndarray) -> float:
        worth = members * np.exp(logs)
        return -np.sum(cells * (logs - np.log(worth.sum(axis=1, keepdims=True))))

    best = np.exp(minimize(loss, np.zeros(4), tol=1e-10).x)
    found = luce_strengths(cells.sum(axis=0), cells.sum(axis=1), members)
    assert found == pytest.approx(best / best.sum(), abs=1e-4)


def test_no_strengths_where_the_votes_do_not_rank_all() -> None:
    pairs = [("a", "b"), ("c", "d")]
    votes = [
        _vote(number, f"{pair}", pair[number % 2], pair) for number in range(10) for pair in [*pairs, *pairs]
    ]
    assert {standing.strength for standing in standings(votes, 20).values()} == {None}
    bridge = [_vote(number, "bridge", ("b", "c")[number % 2], ("b", "c")) for number in range(10)]
    ranked = [standing.strength for standing in standings(votes + bridge, 20).values()]
    assert ranked == pytest.approx([0.25] * 4)


def test_strengths_stand_where_some_resamples_prefer_no_system() -> None:
    """All who prefer any prefer "plain", and so few do that a resample may hold none of them."""
    votes = [
        _vote(respondent, prompt, "plain" if prompt == "a" and respondent < 4 else None)
        for respondent in range(6)
        for prompt in "abc"
    ]
    found = standings(votes, 200)
    low, high = found["plain"].strength_low, found["plain"].strength_high
    assert found["plain"].strength == 1
    assert low is not None
    assert high is not None
    assert 0 < low < high <= 1
    assert found["ours"].strength == 0


def test_one_respondent_has_no_bootstrap() -> None:
    found = standings([_vote(0, prompt, "ours") for prompt in "abc"], 20)["ours"]
    assert (found.share, found.bootstrap_low, found.strength, found.strength_low) == (1, None, 1, None)


def test_intervals_hold_the_truth_as_often_as_they_claim() -> None:
    study, taste, spread, studies = _study(12), 0.7, 0.7, 100
    noise = np.random.default_rng(0).normal(0, np.hypot(taste, spread), (100_000, len(SYSTEMS)))
    worth = np.exp(noise) * list(STRENGTHS.values())
    truth = (worth / worth.sum(axis=1, keepdims=True)).mean(axis=0)[0]
    wilson = bootstrap = 0
    for seed in range(studies):
        utilities = known_utilities(study, STRENGTHS, spread=spread, seed=seed)
        votes = simulate(study, utilities, 25, taste=taste, inattentive=0, seed=seed)
        found = standings(votes, resamples=100)["ours"]
        assert found.bootstrap_low is not None
        assert found.bootstrap_high is not None
        wilson += found.low <= truth <= found.high
        bootstrap += found.bootstrap_low <= truth <= found.bootstrap_high
    few = binom.ppf(1e-3, studies, 0.95)
    assert bootstrap >= few
    # Votes aren't independent here, and Wilson's interval is too sure of itself.
    assert wilson < few


def test_winners() -> None:
    votes = [_vote(number, "one", "ours") for number in range(3)] + [_vote(3, "one", None)]
    votes += [_vote(number, "two", SYSTEMS[number % 2]) for number in range(4)]
    one, two = winners(votes)
    assert one.votes == {"ours": 3, "plain": 0, "structure": 0, NONE: 1}
    assert (one.winners, one.share, one.majority) == (("ours",), 0.75, True)
    assert (two.winners, two.share, two.majority) == (("ours", "plain"), 0.5, False)


def test_agreement() -> None:
    votes = [
        _vote(number, prompt, choice)
        for number in range(3)
        for prompt, choice in zip("abc", SYSTEMS, strict=True)
    ]
    votes += [_vote(0, "a", "ours", kind="repeat"), _vote(1, "a", "plain", kind="repeat")]
    found = agreement(votes)
    assert found.alpha == pytest.approx(1)
    assert (found.repeats, found.repeats_alike) == (2, 1)
    assert agreement([_vote(number, "a", "ours") for number in range(3)]).alpha is None
    # The other choices are on pages that one respondent saw.
    once = [_vote(0, "a", "ours"), _vote(1, "a", "ours"), _vote(0, "b", "plain"), _vote(1, "c", None)]
    assert agreement(once).alpha is None
    # By chance alone.
    draw = np.random.default_rng(0)
    random = [
        _vote(number, f"{place}", str(draw.choice(SYSTEMS))) for number in range(40) for place in range(40)
    ]
    assert agreement(random).alpha == pytest.approx(0, abs=0.03)


def test_rules_leave_respondents_out() -> None:
    rules = Rules(least_checks=0.5, least_seconds=2, least_answered=1)
    answers = {
        0: [_vote(0, "a", "ours"), _vote(0, "b", "ours", kind="check")],
        1: [_vote(1, "a", "plain"), _vote(1, "b", "plain", kind="check")],
        2: [_vote(2, "a", "plain")],
        3: [_vote(3, "a", "plain", seconds=1), _vote(3, "b", "ours", kind="check", seconds=1)],
    }
    pages = [Page(kind, kind, "", "", {}) for kind in ("ordinary", "check")]
    votes = [vote for theirs in answers.values() for vote in theirs]
    found = {int(exclusion.respondent, 16): exclusion.reason for exclusion in exclusions(votes, rules, pages)}
    assert found == {1: "passed 0 of 1 checks", 2: "answered 1 of 2 pages", 3: "took 1.0 s a page"}
    # A check left out isn't passed.
    patient = replace(rules, least_answered=0.5)
    found = {
        int(exclusion.respondent, 16): exclusion.reason for exclusion in exclusions(votes, patient, pages)
    }
    assert found[2] == "passed 0 of 1 checks"


def test_what_cannot_be_analysed_is_refused() -> None:
    study = _study(2)
    with pytest.raises(ValueError, match="no votes yet"):
        analyse(study, [])
    simulated = simulate(study, known_utilities(study, STRENGTHS), 2)
    with pytest.raises(ValueError, match="mix"):
        analyse(study, [*simulated, _vote(0, "a", "ours")])
    with pytest.raises(ValueError, match=r"leave out all.*answered 1 of 2 pages"):
        analyse(study, [_vote(0, "a", "ours")])


def test_a_simulated_panel_answers_all_and_the_hasty_are_found(study_folder: Path) -> None:
    study = read_study(study_folder)
    votes = simulate(study, known_utilities(study, STRENGTHS), 60, inattentive=0.2)
    assert len({(vote.respondent, vote.page) for vote in votes}) == len(votes) == 60 * len(study.pages)
    assert all(vote.respondent.startswith("simulated-") and vote.source == "simulated" for vote in votes)
    assert None in {vote.choice for vote in votes}
    result = analyse(study, votes, resamples=50)
    assert result.simulated
    assert 4 <= len(result.excluded) <= 20
    assert result.respondents + len(result.excluded) == 60
    best = max(SYSTEMS, key=lambda system: result.subsets[ALL][system].share)
    assert best == "ours"
    for strengths in ({"ours": 1.0}, STRENGTHS | {"other": 1.0}, STRENGTHS | {"ours": 0.0}):
        with pytest.raises(ValueError, match="strength"):
            known_utilities(study, strengths)


def test_a_panel_follows_the_judge(tmp_path: Path) -> None:
    white = Image.new("RGB", (64, 64), "white")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    torch.manual_seed(0)
    judge = Judge(["cat", "frog"], ["red"], width=4).eval()
    with torch.no_grad():
        scores = judge(pixels([white, noise])).scores[:, 0]
    # One picture has its cat, and both their frog.
    judge.get_buffer("thresholds").copy_(torch.tensor([scores.mean(), 0.0]))
    judge.save(tmp_path / "judge")
    rows = [
        {
            "job": store.name_of(system, seed),
            "prompt": "a cat and a frog",
            "subset": "animals",
            "seed": seed,
            "system": system,
            "model": "stickers",
            "image": store.write_png(tmp_path / "run", store.name_of(system, seed), store.png_bytes(image)),
            "nsfw": False,
        }
        for system, images in {"white": (white, white), "mixed": (white, noise)}.items()
        for seed, image in enumerate(images)
    ]
    store.write_rows(tmp_path / "run", rows)
    study = create_study(
        tmp_path / "run", tmp_path / "study", prompts_per_subset=1, seeds=2, checks=0, repeats=0
    )
    utilities = judged_utilities(study, tmp_path / "study", str(tmp_path / "judge"))
    white_is_right = float(scores[0] > scores[1])
    assert utilities == {"a cat and a frog": {"white": CERTAINTY * white_is_right, "mixed": CERTAINTY / 2}}


def test_a_users_own_method_has_its_title_in_tables_and_figures(tmp_path: Path) -> None:
    run, own = tmp_path / "run", "my_methods:Faded"
    rows = [
        {
            "job": store.name_of(system),
            "prompt": "a cat and a frog",
            "subset": "animals",
            "seed": 0,
            "system": system,
            "model": "stickers",
            "image": store.write_png(run, store.name_of(system), store.png_bytes(Image.new("RGB", (64, 64)))),
            "nsfw": False,
        }
        for system in (own, "stable-diffusion")
    ]
    store.write_rows(run, rows)
    store.write_settings(run, {"titles": {own: "Fading of ours", "stable-diffusion": "Stable Diffusion"}})
    created = create_study(run, tmp_path / "study", prompts_per_subset=1, seeds=1, checks=0, repeats=0)
    study = read_study(tmp_path / "study")
    assert study == created
    assert study.titles == {own: "Fading of ours"}
    votes = simulate(study, known_utilities(study, {own: 2.0, "stable-diffusion": 1.0}), 5)
    write_results(analyse(study, votes, resamples=10), tmp_path / "results")
    for file in ("table.md", "table.tex", "shares.svg"):
        text = (tmp_path / "results" / file).read_text()
        assert "Fading of ours" in text
        assert "Faded" not in text


def test_commands_mark_what_is_simulated(study_folder: Path, tmp_path: Path) -> None:
    database, out = ("--database", f"sqlite:///{tmp_path}/votes.sqlite"), tmp_path / "results"
    strengths = [f"--strength={system}={strength}" for system, strength in STRENGTHS.items()]
    run = CliRunner().invoke
    copy = shutil.copytree(study_folder, tmp_path / "study")
    apart = run(app, ["study", "simulate", str(copy), *strengths, "--respondents", "2"])
    assert (copy / "simulated.sqlite").is_file(), apart.output
    assert not (copy / "votes.sqlite").exists()
    second = run(app, ["study", "simulate", str(copy), *strengths, "--seed", "1"])
    assert second.exit_code == 2
    assert "give each panel one of its own" in second.output
    simulated = run(
        app, ["study", "simulate", str(study_folder), *database, *strengths, "--respondents", "12"]
    )
    assert simulated.exit_code == 0, simulated.output
    assert "SIMULATED" in simulated.output
    analysed = run(app, ["study", "analyse", str(study_folder), *database, "--out", str(out)])
    assert analysed.exit_code == 0, analysed.output
    assert "SIMULATED" in analysed.output
    result = json.loads((out / "study_result.json").read_text())
    assert result["simulated"]
    assert result["study"] == read_study(study_folder).hash
    assert set(result["subsets"]) == {"animals", "objects", ALL}
    with (out / "standings.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["simulated"] for row in rows} == {"true"}
    assert len(rows) == sum(len(systems) for systems in result["subsets"].values())
    assert set(parquet.read_table(out / "prompts.parquet")["simulated"].to_pylist()) == {True}
    for file in ("table.md", "table.tex", "shares.svg", "strengths.svg", "prompts.svg"):
        assert "SIMULATED" in (out / file).read_text()
    assert Image.open(out / "shares.png").width > 500
    refused = run(app, ["study", "simulate", str(study_folder), *database])
    assert refused.exit_code == 2
    assert "--judge presence" in refused.output
