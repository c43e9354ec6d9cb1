"""Votes as files: plain CSV out and in, and Label Studio's tasks for people who run the study there."""

from __future__ import annotations

import csv
import hmac
import io
import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from attend_excite.documents import read_text
from attend_excite.files import write_whole
from attend_excite.study.create import BETWEEN, NONE, Page, Study
from attend_excite.study.votes import Vote
from attend_excite.tables import harmless

_COLUMNS = [field.name for field in fields(Vote)]
_OTHER_NAMES = {"annotator": "respondent", "lead_time": "seconds"}
_NEEDED = ("respondent", "page", "choice", "seconds")
_LOCAL_FILES = "/data/local-files/?d=images/"
"""Where Label Studio serves images whose document root is the study's folder."""


def csv_text(votes: Sequence[Vote]) -> str:
    """The votes as CSV, a line each: `votes_in_csv` reads it again."""
    return _csv([asdict(vote) for vote in votes], _COLUMNS)


def respondent_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """What `database.stored` found of a respondent as CSV, a line a page; of a page that they have not
    answered, `choice` and `seconds` are empty."""
    return _csv(rows, [*_COLUMNS, "position", "submitted"])


def _csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        none = row["choice"] is None and row["seconds"] is not None
        # Texts that nobody reads again from here; a spreadsheet might run them.
        texts = {name: harmless(row[name]) for name in ("prompt", "subset")}
        told = {**row, **texts, "shown": BETWEEN.join(row["shown"])}
        writer.writerow(told | ({"choice": NONE} if none else {}))
    return text.getvalue()


def votes_in_csv(file: Path, study: Study, key: str) -> list[Vote]:
    """Read votes that were cast elsewhere.

    Needed are the columns respondent, page, choice and seconds (or Label Studio's annotator and lead_time).
    A choice is a system, the number of a set, or "none". `shown` holds the systems in the order shown,
    parted by ";"; without it the order is that of `label_studio_tasks`. All else is the study's to say.

    Args:
        file: the CSV.
        study: whose pages were answered.
        key: secret of the study's database. A respondent who isn't called by a random id of ours, but by a
            name or an address, gets one from it: the same one each time.

    Raises:
        ValueError: names the line and what is wrong with it.
    """
    try:
        text = read_text(file)
    except ValueError as error:
        raise ValueError(f"'{file}' {error}") from error
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    names = [_OTHER_NAMES.get(name, name) for name in reader.fieldnames or ()]
    if missing := [name for name in _NEEDED if name not in names]:
        raise ValueError(f"'{file}', line 1: there is no column {', '.join(missing)}")
    reader.fieldnames = names
    votes: dict[tuple[str, str], Vote] = {}
    try:
        for row in reader:
            vote = _vote(row, study, key)
            if (vote.respondent, vote.page) in votes:
                raise ValueError(f"{row['respondent']} has answered page {vote.page} before")
            votes[vote.respondent, vote.page] = vote
    except (ValueError, csv.Error) as error:
        raise ValueError(f"'{file}', line {reader.line_num}: {error}") from None
    return list(votes.values())


def label_studio_tasks(study: Study, votes: Sequence[Vote]) -> list[dict[str, Any]]:
    """Label Studio's JSON: a task a page, with the votes on it as annotations.

    A task names no system: its sets stand in an order drawn for the page, which `votes_in_csv` knows.
    Label Studio shows all annotators the same order.
    """
    tasks = []
    for page in study.pages:
        shown = _task_order(study, page)
        images = {
            f"set{number}_{at}": _LOCAL_FILES + name
            for number, system in enumerate(shown, 1)
            for at, name in enumerate(page.images[system], 1)
        }
        check = f"Please choose set {shown.index(page.expected) + 1}" if page.expected else None
        data = {"page": page.id, "prompt": check or page.prompt, **images}
        numbers = {system: str(number) for number, system in enumerate(shown, 1)} | {None: NONE}
        annotations = [
            {"result": [_result(numbers[vote.choice], vote)], "lead_time": vote.seconds}
            for vote in votes
            if vote.page == page.id
        ]
        tasks.append({"data": data, "annotations": annotations})
    return tasks


def label_studio_config(study: Study) -> str:
    """The labelling configuration of a Label Studio project that takes the tasks."""
    view = ElementTree.Element("View")
    ElementTree.SubElement(view, "Header", value="Which set of images best reflects this description?")
    ElementTree.SubElement(view, "Header", value="$prompt")
    numbers = [str(number) for number, _ in enumerate(study.systems, 1)]
    for number in numbers:
        ElementTree.SubElement(view, "Header", value=number, size="4")
        row = ElementTree.SubElement(view, "View", style="display: flex")
        for at, _ in enumerate(study.seeds, 1):
            ElementTree.SubElement(row, "Image", name=f"set{number}_{at}", value=f"$set{number}_{at}")
    choices = ElementTree.SubElement(
        view, "Choices", name="choice", toName="set1_1", choice="single", required="true"
    )
    for number in numbers + [NONE] * study.allow_none:
        ElementTree.SubElement(choices, "Choice", value=number, hotkey="0" if number == NONE else number)
    ElementTree.indent(view)
    return ElementTree.tostring(view, encoding="unicode") + "\n"


def write_votes(file: Path, study: Study, votes: Sequence[Vote]) -> list[Path]:
    """Write a .csv, or a .json of Label Studio's tasks and beside it the .xml of its configuration.

    Returns:
        The files written.

    Raises:
        ValueError: the name ends in neither.
    """
    if file.suffix == ".csv":
        texts = {file: csv_text(votes)}
    elif file.suffix == ".json":
        tasks = json.dumps(label_studio_tasks(study, votes), indent=1, ensure_ascii=False) + "\n"
        texts = {file: tasks, file.with_suffix(".xml"): label_studio_config(study)}
    else:
        raise ValueError(f"'{file}': end the name in .csv, or in .json for Label Studio")
    if not file.parent.is_dir():
        raise ValueError(f"there is no folder '{file.parent}' to write '{file.name}' to")
    for path, text in texts.items():
        write_whole(path, text)
    return list(texts)


def _vote(row: dict[str, Any], study: Study, key: str) -> Vote:
    if None in row or None in row.values():
        raise ValueError("it has not as many columns as the first line")
    name = row["respondent"].strip()
    if not name:
        raise ValueError("it names no respondent")
    if (page := study.page.get(row["page"])) is None:
        raise ValueError(f"the study has no page '{row['page']}'")
    shown = tuple(row["shown"].split(BETWEEN)) if row.get("shown") else _task_order(study, page)
    if sorted(shown) != list(study.systems):
        raise ValueError(f"what was shown is not {', '.join(study.systems)} in some order")
    return Vote(
        respondent=name if re.fullmatch("[0-9a-f]{32}", name) else _random_id(name, key),
        page=page.id,
        kind=page.kind,
        repeats=page.repeats,
        prompt=page.prompt,
        subset=page.subset,
        shown=shown,
        choice=_choice(row["choice"].strip(), shown, study),
        expected=page.expected,
        seconds=_seconds(row["seconds"]),
        # What was simulated stays marked as such.
        source="simulated" if row.get("source") == "simulated" else "imported",
    )


def _choice(text: str, shown: Sequence[str], study: Study) -> str | None:
    if text == NONE and study.allow_none:
        return None
    numbered = {str(number): system for number, system in enumerate(shown, 1)}
    if text not in shown and text not in numbered:
        none = f" or {NONE}" if study.allow_none else ""
        raise ValueError(f"the choice '{text}' is not {', '.join(shown)}, 1 to {len(shown)}{none}")
    return numbered.get(text, text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError(f"the seconds are '{text}': they must be a number, 0 or more")
    return seconds


def _random_id(name: str, key: str) -> str:
    return hmac.digest(key.encode(), name.encode(), "sha256").hex()[:32]


def _task_order(study: Study, page: Page) -> tuple[str, ...]:
    # The study's hash is not in the tasks: without study.json nobody can work the order out.
    draw = random.Random(f"{study.hash} {page.id}")
    before = None if page.repeats is None else _task_order(study, study.page[page.repeats])
    order = tuple(draw.sample(study.systems, len(study.systems)))
    while order == before:
        order = tuple(draw.sample(study.systems, len(study.systems)))
    return order


def _result(choice: str, vote: Vote) -> dict[str, Any]:
    return {
        "from_name": "choice",
        "to_name": "set1_1",
        "type": "choices",
        "value": {"choices": [choice]},
        "meta": {"text": [vote.respondent, vote.source]},
    }
