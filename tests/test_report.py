"""Reports on made-up runs of a few images, whose figures are known."""

from __future__ import annotations

import csv
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

pytest.importorskip("pyarrow", reason="the benchmark's extra is not installed")
pytest.importorskip("jinja2", reason="the benchmark's extra is not installed")

from pyarrow import parquet

from attend_excite.benchmark import figures, store
from attend_excite.benchmark.figures import Bar, Curve, Panel
from attend_excite.benchmark.names import titles
from attend_excite.benchmark.report import write_report
from attend_excite.benchmark.results import read_results
from attend_excite.benchmark.score import UPPER_BOUND
from attend_excite.benchmark.statistics import Estimate
from attend_excite.figures import styled

_PROMPTS = {
    "a cat and a dog": ("animals", ["cat", "dog"]),
    "a cat and a frog": ("animals", ["cat", "frog"]),
    "a red car and a blue bowl": ("objects", ["car", "bowl"]),
    "a red car and a pink clock": ("objects", ["car", "clock"]),
}
# By system: the minimum object similarity on each prompt, and whether a subject is missing there.
_PLAIN = ([0.20, 0.24, 0.30, 0.26], [True, True, False, True])
_OURS = ([0.25, 0.25, 0.25, 0.25], [False, False, False, True])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return _made_up(tmp_path / "run", "stickers", {"stable-diffusion": _PLAIN, "attend-excite": _OURS})


def test_a_report_written_again_leaves_nothing_of_the_former(run: Path) -> None:
    pictures = run / "report" / "pictures"
    write_report(run, run / "report")
    shown = {path.name for path in pictures.iterdir()}
    for name in ("0123456789abcdef.webp", "mine.webp"):
        (pictures / name).write_bytes(b"")
    write_report(run, run / "report")
    assert {path.name for path in pictures.iterdir()} == shown | {"mine.webp"}


def test_the_report_says_what_the_scores_say(run: Path) -> None:
    store.write_scores(
        run,
        UPPER_BOUND,
        [
            {"job": name, "scored_by": "judge", "similarity": 0.5, "images": 1}
            for name in ("cat", "dog", "frog", "car", "bowl", "clock")
        ],
    )
    write_report(run, run / "report")
    text = (run / "report" / "report.md").read_text("utf-8")
    assert "Nothing here is a result of Stable Diffusion" in text
    assert "8 images: 4 prompts, 1 seed, 2 systems" in text
    assert "A subject is missing: 75.0 % plain, 25.0 % with Attend-and-Excite" in text
    # All prompts: plain 0.25 on average, and so is ours; animals 0.22 against 0.25, which is 12 % less.
    assert re.search(r"stickers, plain \| 0\.220 \(.12\.0 %", text)
    assert "| upper bound, real images | 0.500 | 0.500 | 0.500 |" in text
    assert "stable-diffusion" not in text
    numbers = parquet.read_table(run / "report" / "numbers" / "averages.parquet").to_pylist()
    assert len(numbers) == 2 * 3 * 5  # systems, subsets, measures
    (animals,) = (
        row
        for row in numbers
        if (row["system"], row["subset"], row["measure"]) == ("stable-diffusion", "animals", "clip minimum")
    )
    assert animals["mean"] == pytest.approx(0.22)
    assert animals["difference"] == pytest.approx(-12.0)
    assert (animals["prompts"], animals["images"]) == (2, 2)
    (findings, agreement, bounds) = (
        parquet.read_table(run / "report" / "numbers" / f"{name}.parquet").to_pylist()
        for name in ("findings", "agreement", "bounds")
    )
    ours_above_plain = {row["subset"]: row["holds"] for row in findings if row["measure"] == "clip minimum"}
    assert ours_above_plain == {"animals": "yes", "objects": "no", "all": "not told apart"}
    assert {row["subset"] for row in bounds} == {"animals", "objects", "all"}
    # Three of ours and one of the plain images have both subjects; of one prompt and system there is one.
    (minimum,) = (
        row for row in agreement if (row["truth"], row["score"]) == ("presence neglected", "clip minimum")
    )
    assert minimum["images"] == 8
    assert minimum["of_one_prompt"] == 1.0
    assert minimum["of_one_system"] is None
    assert len((run / "report" / "numbers" / "images.csv").read_text("utf-8").splitlines()) == 9


def test_recipes_alone_make_a_report(tmp_path: Path) -> None:
    systems = {"attend-excite official": _PLAIN, "attend-excite bare": _OURS}
    run = _made_up(tmp_path / "run", "stickers", systems)
    write_report(run, run / "report")
    text = (run / "report" / "report.md").read_text("utf-8")
    assert "Attend-and-Excite, official" in text
    assert "Attend-and-Excite, bare" in text


def test_systems_that_drew_other_pictures_are_not_silently_compared(tmp_path: Path) -> None:
    systems = {
        "stable-diffusion": ([0.2, 0.2, None, None], [True, False, True, True]),
        "attend-excite": ([None, None, 0.3, 0.3], [False, False, False, True]),
    }
    run = _made_up(tmp_path / "run", "stickers", systems)
    write_report(run, run / "report")
    text = (run / "report" / "report.md").read_text("utf-8")
    assert "The systems have no prompt with the same seed in common" in text


def test_genevals_verdict_has_a_table_of_its_own(run: Path) -> None:
    rows = store.read_rows(run).to_pylist()
    store.write_scores(
        run,
        "geneval",
        [
            {"job": row["job"], "scored_by": "an owl", "right": row["system"] != "stable-diffusion"}
            for row in rows
        ],
    )
    write_report(run, run / "report")
    text = (run / "report" / "report.md").read_text("utf-8")
    section = text.split("## GenEval's verdict")[1].split("\n## ")[0]
    assert "By an owl. An image is right where each thing that is asked for is found often enough" in section
    assert re.search(r"Attend-and-Excite \| \*\*100\.0 %", section)
    assert re.search(r"stickers, plain \| 0\.0 %", section)


def test_the_bound_is_of_the_clip_that_judges(run: Path) -> None:
    subjects = ("cat", "dog", "frog", "car", "bowl", "clock")
    for judge, told in (("judge", True), ("another", False)):
        bound = [{"job": name, "scored_by": judge, "similarity": 0.5, "images": 1} for name in subjects]
        store.write_scores(run, UPPER_BOUND, bound)
        write_report(run, run / "report")
        assert ("upper bound" in (run / "report" / "report.md").read_text("utf-8")) == told
        # Nothing is left of the report before.
        assert (run / "report" / "numbers" / "bounds.csv").exists() == told


def test_the_page_is_of_one_piece(run: Path) -> None:
    write_report(run, run / "report")
    page = (run / "report" / "report.html").read_text("utf-8")
    assert (
        re.findall(r'(?:src|href)="(?!data:|#)([^"]*)"', re.sub(r"<svg.*?</svg>", "", page, flags=re.S)) == []
    )
    assert page.count("data:image/webp;base64,") >= 8
    assert "<svg" in page
    assert "currentColor" in page
    text = (run / "report" / "report.md").read_text("utf-8")
    for name in re.findall(r"\]\(([^)]+)\)", text):
        assert (run / "report" / name).is_file(), name
    assert Image.open(run / "report" / "figures" / "similarity.png").width > 400
    for picture in (run / "report" / "pictures").iterdir():
        assert max(Image.open(picture).size) <= 128


def test_ablations_are_compared_on_what_they_share(tmp_path: Path) -> None:
    some = ([0.25, None, None, 0.15], [True, None, None, True])
    run = _made_up(
        tmp_path / "run",
        "stickers",
        {"stable-diffusion": _PLAIN, "attend-excite": _OURS, "attend-excite no-smoothing": some},
    )
    write_report(run, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text("utf-8")
    assert "On the 2 prompts and the seeds that all of them have" in text
    # 0.25 and 0.15 against 0.25 and 0.25.
    assert re.search(r"\| no smoothing \| 100\.0 % \(\+50\.0.*0\.200 \(.20\.0 %", text)


def test_black_images_are_left_out_and_counted(tmp_path: Path) -> None:
    run = _made_up(tmp_path / "run", "sd-1.4", {"stable-diffusion": _PLAIN, "attend-excite": _OURS}, nsfw=0)
    write_report(run, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text("utf-8")
    assert "6 images: 3 prompts" in text
    assert "2 images that the safety checker blacked out" in text
    assert "Nothing here is a result" not in text
    assert "| Stable Diffusion |" in text


def test_two_runs_side_by_side(run: Path, tmp_path: Path) -> None:
    better = ([2 * value for value in _OURS[0]], [False] * 4)
    other = _made_up(tmp_path / "other", "stickers", {"attend-excite": better})
    write_report(run, tmp_path / "report", other=other)
    text = (tmp_path / "report" / "report.md").read_text("utf-8")
    assert "compared on the prompts and seeds that it has in both runs" in text
    assert re.search(r"Attend-and-Excite: minimum object similarity \| 0\.250 \| 0\.500 \| \+100\.0 %", text)
    beside = parquet.read_table(tmp_path / "report" / "numbers" / "beside.parquet").to_pylist()
    assert {row["measure"]: row["there"] for row in beside}["clip minimum"] == pytest.approx(0.5)
    assert re.search(r"Attend-and-Excite: a subject is missing \| 25\.0 % \| 0\.0 % \| .25\.0 points", text)


def test_what_two_runs_do_not_share_is_told(run: Path, tmp_path: Path) -> None:
    half = ([0.5, 0.5, None, None], [True, True, None, None])
    other = _made_up(tmp_path / "other", "stickers", {"attend-excite": half})
    store.write_settings(other, store.read_settings(other) | {"steps": 20})
    write_report(run, tmp_path / "report", other=other)
    text = (tmp_path / "report" / "report.md").read_text("utf-8")
    assert "The other has steps 20, not 50." in text
    here = sum(_OURS[0][:2]) / 2
    assert f"Attend-and-Excite: minimum object similarity | {here:.3f} | 0.500" in text
    strange = _made_up(tmp_path / "strange", "stickers", {"composable": half})
    write_report(run, tmp_path / "report", other=strange)
    assert "no system, prompt and seed in common" in (tmp_path / "report" / "report.md").read_text("utf-8")


def test_of_equal_systems_all_are_best_and_below_nought_nothing_is_per_cent(tmp_path: Path) -> None:
    below, above = ([-0.2] * 4, [True] * 4), ([-0.1] * 4, [True] * 4)
    run = _made_up(tmp_path / "run", "stickers", {"stable-diffusion": below, "attend-excite": above})
    write_report(run, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text("utf-8")
    assert "| stickers, plain | **100.0 % (+0.0 ns)**" in text
    assert "| Attend-and-Excite | **100.0 %**" in text
    assert "Minimum object similarity: -0.200 plain, -0.100 with Attend-and-Excite." in text
    found = parquet.read_table(tmp_path / "report" / "numbers" / "findings.parquet").to_pylist()
    assert {row["holds"] for row in found if row["worse"] == "stable-diffusion"} == {"yes"}


def test_one_prompt_and_a_system_without_images(tmp_path: Path) -> None:
    one = ([0.25, None, None, None], [True, None, None, None])
    run = _made_up(
        tmp_path / "run",
        "stickers",
        {"stable-diffusion": one, "attend-excite": ([0.5, *one[0][1:]], [False, *one[1][1:]])},
    )
    failed = {"job": "f" * 16, "prompt": "a cat and a dog", "seed": 0, "system": "structure", "error": "no"}
    store.write_rows(run, [failed])
    write_report(run, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text("utf-8")
    tables = (path.read_text("utf-8") for path in (tmp_path / "report" / "numbers").glob("*.csv"))
    assert "nan" not in "".join([text, *tables])
    assert "100.0 % plain, 0.0 % with Attend-and-Excite (\N{MINUS SIGN}100.0 points)." in text
    assert re.search(r"StructureDiffusion \| – \| – \| – \| 0 \| 0 \| 1 \|", text)
    # The sheets are of the systems that have images.
    assert len(list((tmp_path / "report" / "pictures").iterdir())) == 2


def test_prompts_are_ranked_by_the_seeds_that_both_systems_have(run: Path) -> None:
    right = {"job": "0" * 16, "scored_by": "judge", "neglected": False, "miscoloured": False, "right": True}
    plain = [row for row in store.read_rows(run).to_pylist() if row["system"] == "stable-diffusion"]
    row = next(row for row in plain if row["prompt"] == "a cat and a dog")
    image = store.write_png(run, right["job"], store.png_bytes(Image.new("RGB", (160, 160))))
    store.write_rows(run, [row | {"job": right["job"], "seed": 1, "image": image}])
    store.write_scores(run, "presence", [right])
    write_report(run, run / "report")
    text = (run / "report" / "report.md").read_text("utf-8")
    assert text.count("helped most: all there, in their colours 0.0 % → 100.0 %") == 2


def test_prompts_without_a_subset_are_others(tmp_path: Path) -> None:
    named = dict(zip(_PROMPTS, ("", "other", "other", "objects"), strict=True))
    run = _made_up(tmp_path / "run", "stickers", {"stable-diffusion": _PLAIN})
    rows = store.read_rows(run).to_pylist()
    store.write_rows(run, [row | {"subset": named[row["prompt"]]} for row in rows])
    subsets = read_results(run).subsets
    assert {name: int(there.sum()) for name, there in subsets.items()} == {"other": 3, "objects": 1, "all": 4}


def test_the_study_is_table_2(run: Path, tmp_path: Path) -> None:
    def share(value: float) -> dict[str, float]:
        interval = {"bootstrap_low": value - 0.1, "bootstrap_high": value + 0.1}
        return {"votes": 1, "share": value, "low": 0.0, "high": 1.0} | interval

    shares = {"attend-excite": share(0.7), "stable-diffusion": share(0.2), "none": share(0.1)}
    result = {"respondents": 5, "excluded": [], "simulated": True, "subsets": {"animals": shares}}
    (tmp_path / "study.json").write_text(json.dumps(result))
    write_report(run, tmp_path / "report", study=tmp_path / "study.json")
    text = (tmp_path / "report" / "report.md").read_text("utf-8")
    assert "5 simulated respondents" in text
    assert "| Attend-and-Excite | **70.0 %**<br>60.0 to 80.0 |" in text
    assert "| none is better | 10.0 %" in text
    assert "Intervals of 95 % over respondents and prompts" in text
    shares["none"] = {"share": 0.7, "low": 0.6, "high": 0.8, "bootstrap_low": None, "bootstrap_high": None}
    (tmp_path / "study.json").write_text(json.dumps(result))
    write_report(run, tmp_path / "report", study=tmp_path / "study.json")
    text = (tmp_path / "report" / "report.md").read_text("utf-8")
    assert "| Attend-and-Excite | **70.0 %**<br>60.0 to 80.0 |" in text
    assert "| none is better | **70.0 %**<br>– |" in text
    result["subsets"]["animals"]["composable"] = share(0)
    (tmp_path / "study.json").write_text(json.dumps(result))
    with pytest.raises(ValueError, match="a study of attend-excite, composable, stable-diffusion"):
        write_report(run, tmp_path / "report", study=tmp_path / "study.json")
    (tmp_path / "study.json").write_text("[]")
    with pytest.raises(ValueError, match="no result of a user study"):
        write_report(run, tmp_path / "report", study=tmp_path / "study.json")


def test_a_run_without_scores_says_what_to_do(tmp_path: Path) -> None:
    run = _made_up(tmp_path / "run", "stickers", {"attend-excite": _OURS}, scored=False)
    with pytest.raises(ValueError, match="attend-excite benchmark score"):
        write_report(run, tmp_path / "report")


def test_scores_of_two_judges_are_not_mixed(run: Path) -> None:
    job = store.read_rows(run).to_pylist()[0]["job"]
    store.write_scores(run, "clip", [{"job": job, "scored_by": "another", "full": 0.1, "minimum": 0.1}])
    with pytest.raises(ValueError, match="finish attend-excite benchmark score"):
        write_report(run, run / "report")


def _made_up(
    run: Path,
    model: str,
    systems: dict[str, tuple[list[Any], list[Any]]],
    *,
    nsfw: int | None = None,
    scored: bool = True,
) -> Path:
    """An image a system and prompt; None: it wasn't drawn; `nsfw`: the prompt that is blacked out."""
    rows, similarities, verdicts = [], [], []
    for system, (minima, missing) in systems.items():
        for at, (prompt, (subset, subjects)) in enumerate(_PROMPTS.items()):
            if minima[at] is None:
                continue
            # In another order than the systems, as real ones are.
            job = f"{0xFFFF - len(rows):016x}"
            path = store.write_png(
                run, job, store.png_bytes(Image.new("RGB", (160, 160), (40 * at, 90, 10 * len(rows))))
            )
            rows.append(
                {"job": job, "prompt": prompt, "subset": subset, "subjects": subjects, "seed": 0}
                | {"system": system, "method": system.split()[0], "model": model, "image": path}
                | {"nsfw": at == nsfw, "seconds": 1.5, "unet_passes": 50, "updates": 0}
            )
            if at == nsfw:
                continue
            head = {"job": job, "scored_by": "judge"}
            similarities.append(head | {"full": minima[at] + 0.1, "minimum": minima[at]})
            wrong = {"miscoloured": False, "right": not missing[at]}
            verdicts.append(head | {"neglected": missing[at]} | wrong)
    settings = {"model": model, "steps": 50, "systems": {name: {} for name in systems}, "prompts": {}}
    store.write_settings(run, settings)
    store.write_rows(run, rows)
    if scored:
        store.write_scores(run, "clip", similarities)
        store.write_scores(run, "presence", verdicts)
    return run


def test_prompts_stay_text_in_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evil = "=HYPERLINK() a <img src=x onerror=alert(1)> | cat [x](javascript:y) `z` and $5 & 100 % a_b #1 {c}"
    others = dict(zip([evil, *list(_PROMPTS)[1:]], _PROMPTS.values(), strict=True))
    monkeypatch.setitem(globals(), "_PROMPTS", others)
    run = _made_up(tmp_path / "run", "stickers", {"stable-diffusion": _PLAIN, "attend-excite": _OURS})
    store.write_settings(run, store.read_settings(run) | {"systems": {"attend-excite": {"note": evil}}})
    write_report(run, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text("utf-8")
    assert "<img" not in text
    assert r"&lt;img src=x onerror=alert(1)&gt; \| cat \[x\](javascript:y) \`z\`" in text
    assert "<img src=x" not in (tmp_path / "report" / "report.html").read_text("utf-8")
    for name in ("prompts", "images"):
        table = tmp_path / "report" / "numbers" / f"{name}.csv"
        with table.open(newline="") as lines:
            assert all(not value.startswith("=") for row in csv.reader(lines) for value in row)
        assert evil in parquet.read_table(table.with_suffix(".parquet"))["prompt"].to_pylist()
    latex = (tmp_path / "report" / "tables" / "circumstances-systems.tex").read_text("utf-8")
    assert r"\$5 \& 100\,\% a\_b \#1 \{c\}" in latex
    assert latex.count("{") - 2 * latex.count(r"\{") == latex.count("}") - 2 * latex.count(r"\}")


def test_a_system_of_ones_own_is_shown_like_any_other(tmp_path: Path) -> None:
    mine = ([0.30] * 4, [False, False, True, True])
    swept = {f"attend-excite step_size={value}": _OURS for value in (1, 2.5, 100)}
    systems = {"stable-diffusion": _PLAIN, "attend-excite": _OURS, "my_methods:Mine": mine}
    run = _made_up(tmp_path / "run", "stickers", systems | swept)
    settings = store.read_settings(run)
    settings["systems"]["attend-excite"] = {
        "name": "attend-excite",
        "recipe": {"step_size": 20.0, "sigma": 0.5},
    }
    settings["systems"]["my_methods:Mine"] = {
        "name": "my_methods:Mine",
        "share": 0.5,
        "code": "0123456789abcdef",
    }
    store.write_settings(run, settings | {"titles": {"my_methods:Mine": "Fading guidance"}})
    report = tmp_path / "report"
    write_report(run, report)
    text = (report / "report.md").read_text("utf-8")
    assert "my_methods:Mine" not in text.partition("## What ran")[0]
    assert "by stickers, plain (above the diagonal) and by Fading guidance (below it)" in text
    assert "Attend-and-Excite and Fading guidance helps most compared with stickers, plain" in text
    assert "hurt most: all there, in their colours 100.0 % → 0.0 %" in text
    for kind in ("svg", "png", "pdf"):
        assert (report / "figures" / f"pairs-2.{kind}").is_file()
    # The recipe's own value stands between those of the sweep.
    sweep = text.partition("## Sweep: step size")[2].partition("## ")[0]
    assert re.findall(r"^\| ([\d.]+)", sweep, re.M) == ["1", "2.5", "20", "100"]
    assert "20 (the recipe's own)" in sweep
    ran = text.partition("## What ran")[2]
    for told in ("| seeds | 0 |", "| step size | 20.0 |", "| digest of its code | – | – | – | – |"):
        assert told.split(" –")[0] in ran
    assert "0123456789abcdef" in ran

    write_report(run, report, reference="stable-diffusion", highlight="my_methods:Mine")
    text = (report / "report.md").read_text("utf-8")
    assert "A subject is missing: 75.0 % plain, 50.0 % with Fading guidance" in text
    assert "the difference from stickers, plain" in text
    assert not (report / "figures" / "pairs-2.svg").exists()
    with pytest.raises(ValueError, match="has no images by 'structure': it has stable-diffusion, "):
        write_report(run, report, highlight="structure")


def test_names_tell_systems_apart() -> None:
    given = {"mine:A": "Faded", "mine:B": "Faded", "mine:C": "Attend-and-Excite"}
    others = ["attend-excite no-smoothing", "attend-excite sigma=-1", "stable-diffusion", "syngen altered=1"]
    found = titles([*given, *others], "x", given)
    assert list(found.values()) == [
        "Faded (A)",
        "Faded (B)",
        "Attend-and-Excite (C)",
        "Attend-and-Excite, no smoothing",
        "Attend-and-Excite, sigma -1",
        "x, plain",
        "SynGen, altered 1",
    ]
    for model in ("sd-1.4", "stabilityai/stable-diffusion-3.5-medium"):
        assert titles(["stable-diffusion"], model) == {"stable-diffusion": "Stable Diffusion"}
    assert titles(["stable-diffusion"], "flux-dev") == {"stable-diffusion": "flux-dev, plain"}


@pytest.mark.parametrize("subsets", [1, 4])
@pytest.mark.parametrize("systems", [1, 5])
def test_nothing_in_a_figure_is_cut_or_overlaps(subsets: int, systems: int) -> None:
    names = ("Attend-and-Excite", "Composable Diffusion", "A method with a long name, and $more$", "x", "y")
    made = [Bar(name, Estimate(0.31, 0.29, 0.34), "0.310 (+10.1 % ns)", False) for name in names[:systems]]
    panels = [Panel("animal and object", made, 0.45) for _ in range(subsets)]
    points = [(1.0, made[0].estimate), (200.0, made[0].estimate)]
    curves = [Curve(f"Minimum object similarity {at}", points, 1.0, 0.3) for at in range(systems)]
    scores = {"Full prompt similarity": (np.linspace(0, 1, 50), np.arange(50) % 2 == 0)}
    for figure in (
        figures.bars({"Minimum object similarity (dashed: upper bound)": panels, "Text": panels}),
        figures.sweep("step size", curves),
        figures.separation(scores, ("all subjects there", "a subject is missing")),
        figures.pairs(["cat", "dog", "frog"], {("cat", "dog"): 0.5}, {}, (names[1], names[2])),
    ):
        _assert_readable(figure)


def _assert_readable(figure: Figure) -> None:
    """No text goes beyond the figure's edge, and no two of an axis' numbers touch."""
    with styled():
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        renderer, whole = canvas.get_renderer(), figure.bbox
        undrawn = set()
        for axes in figure.axes:
            for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
                ticks = axis.get_major_ticks()
                beyond = [tick for tick in ticks if not min(limits) <= tick.get_loc() <= max(limits)]
                undrawn |= {label for tick in beyond for label in (tick.label1, tick.label2)}
            texts = [text for text in axes.get_xticklabels() if text.get_text() and text not in undrawn]
            boxes = sorted((text.get_window_extent(renderer) for text in texts), key=lambda box: box.x0)
            assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
        for text in set(figure.findobj(Text)) - undrawn:
            box = text.get_window_extent(renderer)
            if text.get_visible() and text.get_text().strip() and box.width:
                assert whole.x0 <= box.x0 <= box.x1 <= whole.x1, text.get_text()
                assert whole.y0 <= box.y0 <= box.y1 <= whole.y1, text.get_text()
