"""Prompts that others wrote, and sets that are drawn by a seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from attend_excite.benchmark.prompt_sets import draw_set
from attend_excite.benchmark.prompts import BenchmarkPrompt, read_prompts, with_subjects
from attend_excite.cli import app
from attend_excite.nouns import find_nouns
from attend_excite.subjects import parse

pytest.importorskip("pyarrow", reason="the benchmark needs pyarrow")

from attend_excite.benchmark.metrics.presence import colours_of


def test_prompt_files_of_other_benchmarks(tmp_path: Path, tokenizer: Any) -> None:
    """The shapes of GenEval's, T2I-CompBench's and Self-Cross's files, with prompts of our own."""
    lines = [
        {"tag": "single_object", "include": [{"class": "clock", "count": 1}], "prompt": "a photo of a clock"},
        {
            "tag": "counting",
            "include": [{"class": "clock", "count": 2}],
            "exclude": [{"class": "clock", "count": 3}],
            "prompt": "a photo of two clocks",
        },
        {
            "tag": "color_attr",
            "include": [
                {"class": "apple", "count": 1, "color": "blue"},
                {"class": "wine glass", "count": 1, "color": "red"},
            ],
            "prompt": "a photo of a blue apple and a red wine glass",
        },
    ]
    (tmp_path / "geneval.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    single, counted, coloured = read_prompts(tmp_path / "geneval.jsonl")
    assert (single.subset, single.subjects) == ("single object", ("clock",))
    assert (counted.text, counted.subjects) == ("a photo of two clocks", ("clocks",))
    assert json.loads(counted.wanted or "") == {key: lines[1][key] for key in ("include", "exclude")}
    assert coloured.subjects == ("blue apple", "red wine glass")
    for prompt in (single, counted, coloured):  # Whatever the name, and each subject is in its prompt.
        parse(prompt.text, tokenizer, prompt.subjects)
    (tmp_path / "lines").write_bytes((tmp_path / "geneval.jsonl").read_bytes())
    assert read_prompts(tmp_path / "lines") == [single, counted, coloured]

    (tmp_path / "color_val.txt").write_text("a brown dog and a red apple\nA bird with a blue hat.\n")
    pair, sentence = (with_subjects(prompt, tokenizer) for prompt in read_prompts(tmp_path / "color_val.txt"))
    assert (pair.subjects, colours_of(list(pair.shown), pair.text)) == (("dog", "apple"), ["brown", "red"])
    assert (sentence.subjects, colours_of(list(sentence.shown), sentence.text)) == (
        ("bird", "hat"),
        [None, "blue"],
    )

    (tmp_path / "prompts.txt").write_text(
        json.dumps({"SSD-2": ["a cat and a lynx"], "animals": ["a cat and a dog"]}, indent=4)
    )
    assert read_prompts(tmp_path / "prompts.txt") == [
        BenchmarkPrompt("a cat and a lynx", "SSD-2"),
        BenchmarkPrompt("a cat and a dog", "animals"),
    ]


def test_sets_are_drawn_by_their_seed_alone(tmp_path: Path, tokenizer: Any) -> None:
    for number, name in ((2, "two-subjects"), (3, "three-subjects"), (4, "four-subjects")):
        drawn = draw_set(name, 50)
        assert len({frozenset(prompt.subjects or ()) for prompt in drawn}) == 50
        assert all(len(set(prompt.subjects or ())) == number for prompt in drawn)
        assert drawn[:10] == draw_set(name, 10)
        assert drawn != draw_set(name, 50, seed=1)
        for prompt in drawn:
            assert [noun.text for noun in find_nouns(prompt.text)] == list(prompt.subjects or ())
    swapped = draw_set("swapped-colours", 40)
    for first, second in zip(swapped[::2], swapped[1::2], strict=True):
        assert first.subjects == second.subjects
        assert first.text != second.text
        one, other = (colours_of(list(prompt.shown), prompt.text) for prompt in (first, second))
        assert one == other[::-1]
        assert one[0] != one[1]
    alike = draw_set("look-alikes", 2, pairs=[("cat", "dog"), ("lion", "bear"), ("frog", "turtle")])
    assert {prompt.subset for prompt in alike} == {"look-alikes"}
    assert draw_set("two-subjects", 1, things=["umbrella", "fork"])[0].text in (
        "an umbrella and a fork",
        "a fork and an umbrella",
    )
    for options, message in (
        (("two-subjects", 2, ["fork", "spoon"]), "can have 1 prompts of these things, and 2 are asked for"),
        (("swapped-colours", 3, None), "come in pairs: 3 is an odd number"),
        (("look-alikes", 1, None), "can have 0 pairs: give them with --pairs FILE"),
        (("five", 1, None), "unknown set 'five'"),
    ):
        with pytest.raises(ValueError, match=message):
            draw_set(options[0], options[1], things=options[2])


def test_the_command_writes_sets_that_run_reads(tmp_path: Path) -> None:
    (tmp_path / "pairs.txt").write_text("cat, dog\nlion, bear\n\n")
    options = ["--set", "look-alikes", "--set", "swapped-colours", "--count", "2"]
    command = ["benchmark", "prompts", "--out", str(tmp_path / "sets.csv"), *options]
    told = CliRunner().invoke(app, [*command, "--pairs", str(tmp_path / "pairs.txt")])
    assert told.exit_code == 0, told.output
    assert "4 prompts" in told.stdout
    pairs = [("cat", "dog"), ("lion", "bear")]
    assert read_prompts(tmp_path / "sets.csv") == [
        *draw_set("look-alikes", 2, pairs=pairs),
        *draw_set("swapped-colours", 2),
    ]
    (tmp_path / "things.txt").write_text("cat\ndog\n")
    (tmp_path / "pairs.txt").write_text("cat, dog\n")
    files = [f"--{what}={tmp_path / what}.txt" for what in ("things", "pairs")]
    both = ["--set", "two-subjects", "--set", "look-alikes", "--count", "1"]
    told = [CliRunner().invoke(app, [*command[:4], *both, *files, f"--seed={seed}"]) for seed in range(4)]
    assert {result.exit_code for result in told} == {0, 2}
    assert "was drawn for two sets" in "".join(result.stderr for result in told)
    (tmp_path / "pairs.txt").write_text("cat dog\n")
    told = CliRunner().invoke(app, [*command, "--pairs", str(tmp_path / "pairs.txt")])
    assert told.exit_code == 2
    assert "is no pair: write it like cat, dog" in " ".join(told.stderr.split())
