"""What the page shows first: example prompts, and one that is drawn already."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from attend_excite.app.forms import Form
from attend_excite.benchmark.names import is_bundled
from attend_excite.models import Model, catalogue
from attend_excite.subjects import Prompt, parse
from attend_excite.verdict import Verdict, judge_of


@dataclass(frozen=True)
class Opening:
    """An example with its pictures.

    Attributes:
        prompt: parsed.
        seeds: of the pictures.
        pictures: by a method's label its picture of each seed: a URL that needs no file, and which subjects
            it shows.
    """

    prompt: Prompt
    seeds: Sequence[int]
    pictures: Mapping[str, Sequence[tuple[str, Verdict]]]


def opening_form(model: Model) -> Form:
    """The form as the page opens with that model."""
    opening = _data()["opening"]
    if opening["model"] != model.name:
        return Form().on(model)
    first, *_ = seeds = opening["seeds"]
    return Form(
        prompt=opening["prompt"],
        method=opening["method"],
        seed=first,
        pictures=len(seeds),
        steps=opening["steps"],
    ).on(model)


def opening_of(model: Model) -> Opening | None:
    """The example of a model; None: it has none.

    It is the first prompt of the benchmark for which one of the plain pictures of the seeds 0 to 3 lacks a
    subject by the bundled judge, with all four seeds: `python docs/make_pictures.py opening` looks for it.
    """
    opening = _data()["opening"]
    if opening["model"] != model.name:
        return None
    seeds = opening["seeds"]
    pictures = {
        label: [
            (_url(f"opening-{row}-{seed}.webp"), verdict) for seed, verdict in zip(seeds, told, strict=True)
        ]
        for row, (label, told) in enumerate(opening["verdicts"].items())
    }
    return Opening(parse(opening["prompt"], model.tokenizer), seeds, pictures)


def examples(model: str) -> list[list[str]]:
    """The paper's prompts; of a bundled model those that it knows the words of."""
    prompts, few = _data()["prompts"], is_bundled(model)
    return [[example["prompt"]] for example in prompts if example["stickers"] or not few]


def about(model: str) -> tuple[str, dict[str, Sequence[str]]]:
    """What a model is, in a sentence, and the words that it knows by kind, where they can be told."""
    entry, judge = catalogue().get(model), judge_of(model)
    sentence = f"Drawn by {model}, {entry.summary}." if entry else f"Drawn by {model}."
    return sentence, {} if judge is None else {"subjects": judge.subjects, "colours": judge.colours}


def _url(name: str) -> str:
    content = files("attend_excite").joinpath(f"data/{name}").read_bytes()
    return "data:image/webp;base64," + base64.b64encode(content).decode()


@cache
def _data() -> Any:
    return json.loads(files("attend_excite").joinpath("data/examples.json").read_text(encoding="utf-8"))
