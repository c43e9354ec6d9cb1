"""What the benchmark draws: the paper's three subsets (Section 5, Table 3), or a file of anyone's prompts."""

from __future__ import annotations

import csv
import io
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import combinations, groupby, product
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from attend_excite.benchmark.geneval import Asked, asked_of
from attend_excite.documents import parsed_json, read_text
from attend_excite.subjects import Stream, Subject, parse, text_of, unmarked

ANIMALS, ANIMAL_AND_OBJECT, OBJECTS = "animals", "animal and object", "objects"

COLOUR_SEED = 0
"""The seed of the colours of `paper_prompts`."""

# The keys of the authors' list.
_OFFICIAL_KEYS = {"animals": ANIMALS, "animals_objects": ANIMAL_AND_OBJECT, "objects": OBJECTS}
# What reports call all prompts.
_RESERVED = "all"

# More than an object's beginning on the first line: an object a line.
_LINE_OF_JSON = re.compile(r'\s*\{.*"prompt"\s*:.*\}\s*$', re.MULTILINE)

_CSV_COLUMNS = ("prompt", "subset", "subjects")


@dataclass(frozen=True)
class BenchmarkPrompt:
    """A prompt and what its images must show.

    Attributes:
        text: what to draw, as `parse` takes it: a literal bracket has a backslash.
        subset: the group that it is averaged in; "" for none.
        subjects: as `parse` takes them; None: to be found.
        wanted: what GenEval's rule asks of the picture, as JSON: the `include` and `exclude` of its file;
            None: nothing.
    """

    text: str
    subset: str = ""
    subjects: tuple[str, ...] | None = None
    wanted: str | None = None

    @property
    def shown(self) -> list[str]:
        """The subjects that must show, by name, the second cat being a "cat" too; empty where they are not
        known."""
        subjects = [Subject.from_text(subject) for subject in self.subjects or ()]
        return [re.sub(r" ?#\d+$", "", subject.text) for subject in subjects if not subject.negated]


def word_lists() -> dict[str, list[str]]:
    """The paper's lists (Table 3): `animals`, `objects`, those of them that are `worn`, and `colours`."""
    return json.loads(files("attend_excite").joinpath("data/benchmark.json").read_text(encoding="utf-8"))


def paper_prompts(seed: int = COLOUR_SEED) -> list[BenchmarkPrompt]:
    """The 276 prompts of the paper: 66 animal pairs, 144 of an animal and an object, 66 object pairs.

    The paper draws a colour at random for each object and doesn't print which. "a lion with a crown": what
    is worn has none. The grammar is that of the authors' list: "an elephant", but "a orange", "a glasses".

    Args:
        seed: of the colours.
    """
    words = word_lists()
    draw = random.Random(seed)

    def coloured(thing: str) -> str:
        return f"{draw.choice(words['colours'])} {thing}"

    prompts = [(ANIMALS, f"{one(a)} and {one(b)}", (a, b)) for a, b in combinations(words["animals"], 2)]
    for animal, thing in product(words["animals"], words["objects"]):
        rest = f"with a {thing}" if thing in words["worn"] else f"and a {coloured(thing)}"
        prompts.append((ANIMAL_AND_OBJECT, f"{one(animal)} {rest}", (animal, thing)))
    for a, b in combinations(words["objects"], 2):
        prompts.append((OBJECTS, f"a {coloured(a)} and a {coloured(b)}", (a, b)))
    return [BenchmarkPrompt(text, subset, subjects) for subset, text, subjects in prompts]


def one(thing: str) -> str:
    """ "a cat", "an elephant"."""
    return f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"


def read_prompts(path: str | Path) -> list[BenchmarkPrompt]:
    """Prompts from a file, each of them once.

    The file is JSON whose keys are subsets and whose values lists of prompts, as the authors' list
    (`animals`, `animals_objects`, `objects`) and that of Self-Cross with its look-alikes (`SSD-2`, `SSD-3`);
    or a line of JSON a prompt, as GenEval's (`tag`, `include`, `prompt`), which says what the picture must
    show; or, if its name ends in .csv, a table with the columns `prompt` and perhaps `subset` and `subjects`
    ("cat; yellow bowl"); or text with a prompt a line, as T2I-CompBench's, subjects perhaps in [brackets].

    Raises:
        ValueError: the file cannot be read, or has no prompt.
    """
    try:
        text = read_text(Path(path))
    except ValueError as error:
        raise ValueError(f"the file of prompts '{path}' {error}") from error
    if Path(path).suffix.lower() == ".csv":
        prompts = _from_csv(text, path)
    elif Path(path).suffix.lower() == ".jsonl" or _LINE_OF_JSON.match(text):
        prompts = _from_json_lines(text, path)
    elif Path(path).suffix.lower() == ".json" or text.lstrip().startswith("{"):
        prompts = _from_json(text, path)
    else:
        prompts = [BenchmarkPrompt(line.strip()) for line in text.splitlines()]
    if any(prompt.subset == _RESERVED for prompt in prompts):
        raise ValueError(f"a subset in '{path}' is called '{_RESERVED}', as are all prompts: rename it")
    different = [prompt for prompt in dict.fromkeys(prompts) if prompt.text]
    if not different:
        raise ValueError(f"there is no prompt in '{path}'")
    return different


def sample(prompts: Sequence[BenchmarkPrompt], per_subset: int, seed: int = 0) -> list[BenchmarkPrompt]:
    """So many prompts of each subset, drawn at random with a seed, in the order they had.

    Raises:
        ValueError: `per_subset` is below 1.
    """
    if per_subset < 1:
        raise ValueError(f"the prompts per subset are {per_subset}: it must be 1 or more")
    draw = random.Random(seed)
    chosen: list[BenchmarkPrompt] = []
    for _, group in groupby(sorted(prompts, key=lambda prompt: prompt.subset), lambda prompt: prompt.subset):
        members = list(group)
        chosen += draw.sample(members, min(per_subset, len(members)))
    return sorted(chosen, key=list(prompts).index)


def with_subjects(
    prompt: BenchmarkPrompt, tokenizer: PreTrainedTokenizerBase | Sequence[Stream]
) -> BenchmarkPrompt:
    """The prompt with its subjects named: those in its brackets or else its nouns.

    One in which none can be found stays as it is, and fails where it is drawn.
    """
    if prompt.subjects is not None:
        return prompt
    try:
        parsed = parse(prompt.text, tokenizer)
    except ValueError:
        return prompt
    subjects = tuple(group.text for group in parsed.groups)
    return replace(prompt, text=unmarked(prompt.text), subjects=subjects)


def as_drawn(text: str) -> str:
    """A prompt's text without brackets that mark and without backslashes, for judges and people; one that
    can't be drawn stays as it is."""
    try:
        return text_of(text)
    except ValueError:
        return text


def _from_json(text: str, path: str | Path) -> list[BenchmarkPrompt]:
    try:
        lists = parsed_json(text)
    except ValueError as error:
        raise ValueError(f"the file of prompts '{path}' {error}") from error
    if not isinstance(lists, dict):
        raise ValueError(
            f"'{path}' must be an object like the authors' list, with a list of prompts a subset"
        )
    for key, prompts in lists.items():
        if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"'{key}' in '{path}' must be a list of prompts")
    return [
        BenchmarkPrompt(prompt.strip(), _OFFICIAL_KEYS.get(key) or str(key))
        for key, prompts in lists.items()
        for prompt in prompts
    ]


def _from_json_lines(text: str, path: str | Path) -> list[BenchmarkPrompt]:
    prompts = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where = f"line {number} of '{path}'"
        try:
            told = parsed_json(line)
        except ValueError as error:
            raise ValueError(f"{where} {error}") from error
        if not isinstance(told, dict) or not isinstance(told.get("prompt"), str):
            raise ValueError(f'{where} must be an object with a "prompt", as in GenEval\'s file')
        tag = told.get("tag", "")
        if not isinstance(tag, str):
            raise ValueError(f"the tag in {where} must be a text")
        wanted = {key: told[key] for key in ("include", "exclude") if told.get(key)}
        try:
            asked = asked_of(wanted)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        prompt = told["prompt"].strip()
        subjects = tuple(_as_said(prompt, each) for each in asked.include)
        known = None if not subjects or "" in subjects else tuple(dict.fromkeys(subjects))
        prompts.append(
            BenchmarkPrompt(prompt, tag.replace("_", " "), known, json.dumps(wanted) if wanted else None)
        )
    return prompts


def _as_said(prompt: str, asked: Asked) -> str:
    """A thing as the prompt says it, with its colour and in its number: "clocks"; "" where it doesn't."""
    colour = f"{re.escape(asked.colour)} " if asked.colour else ""
    said = re.search(rf"\b{colour}{re.escape(asked.thing)}(s|es)?\b", prompt, re.IGNORECASE)
    return said[0] if said else ""


def _from_csv(text: str, path: str | Path) -> list[BenchmarkPrompt]:
    table = csv.DictReader(io.StringIO(text))
    columns = table.fieldnames or []
    if "prompt" not in columns or not set(columns) <= set(_CSV_COLUMNS):
        raise ValueError(
            f"'{path}' has the columns {', '.join(columns)}: it must have 'prompt' and may have 'subset' and "
            "'subjects' (separated by semicolons)"
        )
    prompts = []
    for row in table:
        if None in row:
            raise ValueError(f"line {table.line_num} of '{path}' has too many columns: quote its commas")
        text, subset, subjects = ((row.get(name) or "").strip() for name in _CSV_COLUMNS)
        named = [subject.strip() for subject in subjects.split(";")]
        prompts.append(BenchmarkPrompt(text, subset, tuple(filter(None, named)) or None))
    return prompts
